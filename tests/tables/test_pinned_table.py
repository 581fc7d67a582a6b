"""A table in pinned host memory with hidden vectors on a GPU: what is refused, and where everything lies.

The devices are those of fake tensors, which have no values; test_pinned_table_on_cuda.py compares numbers on a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from operator_arguments import SOFTMAX, forward_arguments, shared_arguments
from refusals import assert_tested, messages
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import nce_ext
from nce_ext import _checks, functional, losses
from nce_ext import noise as noises
from nce_ext._ops import coo, library
from nce_ext._ops.row_grad import RowGradient, Table, gradients_of_table
from nce_ext._sampled import loss as _sampled
from nce_ext._tables import pinned as _pinned

V, D, B, K = 10, 4, 3, 5
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class Waits:
    """Stands for a stream, and counts how often it was waited for."""

    def __init__(self) -> None:
        self.count = 0

    def synchronize(self) -> None:
        self.count += 1


@pytest.fixture
def fake_gpu(native, monkeypatch):
    """Fake tensors on CUDA beside fake ones on the host, of which "pinned" ones say that they are pinned.

    Without gradients: a torch without CUDA ends the process where autograd meets such a tensor.
    """
    waits = Waits()
    monkeypatch.setattr(library, "_has_cuda", True)
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: getattr(self, "said_to_be_pinned", False))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: waits)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield SimpleNamespace(waits=waits, patch=monkeypatch)


def pinned(*sizes: int, **options) -> Tensor:
    table = torch.empty(*sizes, **options)
    table.said_to_be_pinned = True  # type: ignore[attr-defined]
    return table.requires_grad_()


def arguments(**changes):
    return {
        "hidden": torch.empty(B, D, device=CUDA, requires_grad=True),
        "weight": pinned(V, D),
        "target": torch.empty(B, dtype=torch.int64, device=CUDA),
        "noise": noises.Uniform(V).to(CUDA),
        "num_negatives": K,
        "bias": pinned(V),
        "sparse": True,
        **changes,
    }


class Refusal(NamedTuple):
    changes: dict  # of functions without arguments, since fake tensors come to be within a test
    error: type[Exception]
    message: str


WHERE = r"weight must be on hidden's device cuda:0 or in pinned host memory \(weight\.pin_memory\(\)\), got "
REFUSALS = {
    "pageable weight": Refusal({"weight": lambda: torch.empty(V, D)}, ValueError, WHERE + "pageable memory on cpu"),
    "weight on another GPU": Refusal(
        {"weight": lambda: torch.empty(V, D, device="cuda:1")}, ValueError, WHERE + "cuda:1"
    ),
    "weight without memory": Refusal({"weight": lambda: torch.empty(V, D, device="meta")}, ValueError, WHERE + "meta"),
    "weight a list": Refusal({"weight": lambda: [[0.0] * D] * V}, TypeError, r"weight must be a .* tensor, got list"),
    "integer weight": Refusal(
        {"weight": lambda: pinned(V, D).detach().long()}, ValueError, WHERE + "pageable memory on cpu"
    ),
    "pageable bias": Refusal(
        {"bias": lambda: torch.empty(V)},
        ValueError,
        r"bias must be in pinned host memory \(bias\.pin_memory\(\)\), as weight is, got pageable memory on cpu",
    ),
    "bias on the GPU": Refusal(
        {"bias": lambda: torch.empty(V, device=CUDA)}, ValueError, r"bias must be in pinned host memory .* got cuda:0"
    ),
    "bias alone on the host": Refusal(
        {"weight": lambda: torch.empty(V, D, device=CUDA), "bias": lambda: pinned(V)},
        ValueError,
        r"bias must be on hidden's device cuda:0, got cpu",
    ),
    "bias a list": Refusal({"bias": lambda: [0.0] * V}, TypeError, r"bias must be a float32 tensor, got list"),
    "bias of another dtype": Refusal(
        {"bias": lambda: pinned(V, dtype=torch.float16)}, TypeError, r"bias must be a float32 tensor, got a float16"
    ),
    "weight of too many columns": Refusal(
        {"weight": lambda: pinned(V, D + 1)}, ValueError, r"hidden must have weight's D = 5 as its last size"
    ),
    "noise with the weight": Refusal(
        {"noise": lambda: noises.Uniform(V)}, ValueError, r"noise must be on hidden's device cuda:0, got cpu; use noise"
    ),
    "target with the weight": Refusal(
        {"target": lambda: torch.empty(B, dtype=torch.int64)}, ValueError, r"target must be on hidden's device cuda:0"
    ),
    "log_z with the weight": Refusal(
        {"log_z": lambda: torch.zeros(())}, ValueError, r"log_z must be on hidden's device cuda:0, got cpu"
    ),
    "a dense gradient": Refusal(
        {"sparse": lambda: False},
        ValueError,
        r"sparse must be True or 'padded' with a weight in host memory, got False",
    ),
    "reference": Refusal(
        {"backend": lambda: "reference"},
        ValueError,
        r"weight must be on hidden's device cuda:0 for the reference backend, got cpu",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name, fake_gpu):
    changes, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        functional.nce_loss(**arguments(**{key: value() for key, value in changes.items()}))


def test_without_kernels_for_the_gpu(fake_gpu):
    fake_gpu.patch.setattr(library, "_has_cuda", False)
    fake_gpu.patch.setattr(library, "warn_of_reference", lambda device: None)
    with pytest.raises(
        ValueError, match=r"weight must be on hidden's device cuda:0 for the reference backend, got cpu"
    ):
        functional.nce_loss(**arguments())


def test_a_captured_graph_is_refused(fake_gpu):
    fake_gpu.patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match=r"weight must be on .* cuda:0 while a CUDA graph is captured, got cpu: the h"):
        functional.nce_loss(**arguments())


def test_hogwild_is_refused(fake_gpu):
    changed = arguments(learning_rate=0.1)
    del changed["sparse"]
    with pytest.raises(ValueError, match=r"weight must be on hidden's device cuda:0, got cpu"):
        functional.hogwild_sgd_(**changed)


def test_a_fused_optimizer_is_refused(fake_gpu):
    loss_fn = nce_ext.NCELoss(D, V, noises.Uniform(V), K, sparse=True, correction="none")
    loss_fn.fuse_optimizer(nce_ext.optim.SGD([loss_fn.weight, loss_fn.bias], lr=0.1))
    fake_gpu.patch.setattr(losses, "reduced_loss", lambda *_, **__: pytest.fail("not refused"))
    given = arguments()
    with (
        torch.enable_grad(),
        pytest.raises(ValueError, match=r"weight must be on hidden's device cuda:0 with fuse_optimizer, got cpu"),
    ):
        loss_fn(given["hidden"], given["target"])


def test_other_callers_of_the_checks_take_no_host_memory(fake_gpu):
    given = arguments()
    with pytest.raises(ValueError, match=r"weight must be on hidden's device cuda:0, got cpu"):
        _checks.operands(given["hidden"], given["weight"], given["bias"])


def test_pinned_tables_serve_the_cpu_as_any(fake_gpu):
    weight, hidden = pinned(V, D), torch.empty(B, D, requires_grad=True)
    target, noise = torch.empty(B, dtype=torch.int64), noises.Uniform(V)
    with torch.enable_grad():
        functional.negative_sampling_loss(hidden, weight, target, noise, K, sparse=False).backward()
    assert weight.grad is not None
    assert weight.grad.layout == torch.strided


@pytest.mark.parametrize("function", [functional.nce_loss, functional.sampled_softmax_loss])
def test_without_a_gradient_the_call_waits(function, fake_gpu):
    """Also with a dense gradient of tables that have none."""
    given = arguments(sparse=False, reduction="none")
    for name in ("weight", "bias"):
        given[name].requires_grad_(False)
    losses = function(**given)
    assert losses.shape == (B,)
    assert losses.device == CUDA
    assert fake_gpu.waits.count == 1
    function(**arguments(weight=torch.empty(V, D, device=CUDA), bias=None, reduction="none"))
    assert fake_gpu.waits.count == 1


def test_with_a_gradient_the_call_does_not_wait(fake_gpu):
    on_host = SimpleNamespace(operands=SimpleNamespace(host_weight=True, hidden=SimpleNamespace(device=CUDA)))
    with torch.enable_grad():
        _sampled._wait_for_rows(on_host)
    assert fake_gpu.waits.count == 0
    _sampled._wait_for_rows(SimpleNamespace(operands=SimpleNamespace(host_weight=False)))
    assert fake_gpu.waits.count == 0
    _sampled._wait_for_rows(on_host)
    assert fake_gpu.waits.count == 1


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("objective", [{}, SOFTMAX])
@pytest.mark.parametrize("operator", ["sampled_loss", "shared_loss"])
def test_each_gradient_lies_with_its_tensor(operator, objective, reduced, native):
    """The device "meta" in the place of a GPU, whose tensors autograd takes on no build without CUDA."""
    if operator == "sampled_loss":
        real = forward_arguments(gradient_layout=coo.PADDED, log_z=torch.zeros(5), **objective)
    else:
        row_scale = torch.ones(5) if reduced else None
        real = shared_arguments(gradient_layout=coo.PADDED, log_z=torch.zeros(5), example_weight=row_scale, **objective)
    with FakeTensorMode():
        given = [
            torch.empty(t.shape, dtype=t.dtype, device=CPU if i in (1, 2) else "meta", requires_grad=i in (0, 1, 2, 4))
            if isinstance(t, Tensor)
            else t
            for i, t in enumerate(real)
        ]
        losses = getattr(torch.ops.nce_ext, operator)(*given)[0]
        assert losses.device.type == "meta"
        losses.sum().backward()
        for i in (0, 4):
            assert given[i].grad.device.type == "meta"
        for i in (1, 2):
            gradient = given[i].grad
            assert gradient.layout == torch.sparse_coo
            assert gradient.shape == given[i].shape
            assert gradient.device == gradient._values().device == gradient._indices().device == CPU


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("layout", [coo.COALESCED, coo.PADDED])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rows_become_gradients_where_the_weight_is(device, layout, needs):
    classes, rows, elements = torch.tensor([2, 5, 7]), torch.randn(3, D), torch.randn(3)
    table, needs_weight, needs_bias = Table(V, torch.float32, torch.device(device), layout), *needs
    gradients = gradients_of_table(
        RowGradient(classes, rows, elements), table, layout, needs_weight=needs_weight, needs_bias=needs_bias
    )
    assert [t is not None for t in gradients] == list(needs)
    for gradient, values in zip(gradients, (rows, elements), strict=True):
        if gradient is None:
            continue
        assert gradient.device.type == device
        assert gradient.shape == (V, *values.shape[1:])
        assert gradient._nnz() == 3
        assert gradient.is_coalesced() == (layout == coo.COALESCED)
        if device == "cpu":
            wanted = torch.zeros(V, *values.shape[1:])
            wanted[classes] = values
            assert torch.equal(gradient.to_dense(), wanted)


def test_tensors_are_brought_to_a_device():
    tensors = (torch.arange(3), torch.randn(3, 4), torch.randn(0))
    same = coo.brought_to(CPU, *tensors)
    assert all(a is b for a, b in zip(same, tensors, strict=True))
    moved = coo.brought_to(torch.device("meta"), *tensors)
    for a, b in zip(moved, tensors, strict=True):
        assert a.device.type == "meta"
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


class TestModule:
    @pytest.fixture
    def copies(self, monkeypatch) -> list[Tensor]:
        """Pinning makes a copy, as it does where there is a GPU."""
        made: list[Tensor] = []

        def pin_memory(self: Tensor) -> Tensor:
            made.append(self.clone())
            return made[-1]

        monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
        return made

    @staticmethod
    def make(**options) -> nce_ext.NCELoss:
        return nce_ext.NCELoss(D, V, noises.Unigram(range(1, V + 1)), K, **{"sparse": True, **options})

    def test_a_dense_gradient_is_refused(self, copies):
        with pytest.raises(
            ValueError, match=r"sparse must be True or 'padded' with a weight in host memory, got False"
        ):
            self.make(sparse=False).pin_weight()
        assert not copies

    @pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be pinned here")
    def test_without_a_gpu_nothing_changes(self):
        loss_fn = self.make()
        address = loss_fn.weight.data_ptr()
        with pytest.raises(RuntimeError):
            loss_fn.pin_weight()
        assert loss_fn.weight.data_ptr() == address
        assert loss_fn.to("meta").weight.device.type == "meta"

    @pytest.mark.parametrize("bias", [False, True])
    def test_all_but_the_tables_moves(self, bias, copies):
        loss_fn = self.make(bias=bias, log_z="learned")
        before = {name: value.clone() for name, value in loss_fn.state_dict().items()}
        names = [name for name, _ in loss_fn.named_parameters()]
        identities = [id(loss_fn.weight), id(loss_fn.bias)]
        assert loss_fn.pin_weight() is loss_fn
        model = nn.Sequential(nn.Linear(D, D), loss_fn).to("meta")
        assert model[0].weight.device.type == "meta"
        assert loss_fn.noise.table.device.type == "meta"
        assert loss_fn.log_z.device.type == "meta"
        assert loss_fn.weight.device == CPU
        assert [id(loss_fn.weight), id(loss_fn.bias)] == identities
        assert [name for name, _ in loss_fn.named_parameters()] == names
        assert [c.data_ptr() for c in copies] == [p.data_ptr() for p in (loss_fn.weight, loss_fn.bias) if p is not None]
        assert torch.equal(loss_fn.weight, before["weight"])

    def test_a_new_dtype_is_pinned_again(self, copies):
        loss_fn = self.make().pin_weight()
        weight = loss_fn.weight.detach().clone()
        loss_fn.bfloat16()
        assert loss_fn.weight.dtype == loss_fn.bias.dtype == torch.bfloat16
        assert torch.equal(loss_fn.weight, weight.bfloat16())
        assert copies[-2].data_ptr() == loss_fn.weight.data_ptr()
        assert len(copies) == 4
        loss_fn.bfloat16()
        assert len(copies) == 4

    def test_a_state_dict_loads_into_the_pinned_memory(self, copies):
        loss_fn, other = self.make().pin_weight(), self.make()
        address = loss_fn.weight.data_ptr()
        loss_fn.load_state_dict(other.state_dict())
        assert loss_fn.weight.data_ptr() == address
        assert torch.equal(loss_fn.weight, other.weight)


def test_every_refusal_in_the_source_is_tested():
    assert_tested([_pinned], messages(REFUSALS))
