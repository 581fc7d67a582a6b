"""What only a GPU shows: ids equal to the CPU's, repeatability, sizes beyond 32 bits.

Loss and gradients of the CUDA kernels are compared with the oracle by the tests of the fused backend, which run with
backend "cuda" where there is a GPU; see on_cuda.py.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import Case
from operator_arguments import ADVERSARIAL, SOFTMAX, B, V, epilogue_arguments, forward_arguments, row_arguments
from tolerances import assert_close

import nce_ext
from nce_ext import functional
from nce_ext import noise as noises
from nce_ext._ops.sampled_loss import SampledLossInputs

pytestmark = pytest.mark.usefixtures("cuda")


def to(device: torch.device, value):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def make(n_classes: int = 5000, dim: int = 64, k: int = 10, **options) -> nce_ext.NCELoss:
    law = noises.Unigram(1 / torch.arange(1, n_classes + 1).double())
    return nce_ext.NCELoss(dim, n_classes, law, k, **options)


@pytest.mark.parametrize("classes", [1, 2, 1000, 10**6, 2**31 - 1])
@pytest.mark.parametrize("law", ["uniform", "log-uniform", "alias"])
@pytest.mark.parametrize("size", [(3, 5), (1000, 33), (1, 1), (0, 4), (4, 0), (70_000, 1)])
def test_ids_are_those_of_the_cpu(law, classes, size, cuda):
    if law == "alias":
        if classes > 10**6:
            pytest.skip("a table of that size takes minutes")
        noise = noises.Unigram(torch.rand(classes) + 0.01)
    else:
        noise = (noises.Uniform if law == "uniform" else noises.LogUniform)(classes)
    seed = torch.tensor([123456789, -987654321])
    on_cpu = noise.sample(size, seed=seed)
    on_gpu = noise.to(cuda).sample(size, seed=seed.to(cuda))
    assert on_gpu.device.type == cuda.type
    assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("remove_hits", [False, True])
@pytest.mark.parametrize("dim", [4, 100, 600])
def test_the_operators_agree_with_those_of_the_cpu(dim, remove_hits, cuda):
    torch.manual_seed(3)
    arguments = list(
        forward_arguments(
            hidden=torch.randn(B, dim), weight=torch.randn(V, dim), num_negatives=40, remove_hits=remove_hits
        )
    )
    wanted = torch.ops.nce_ext.sampled_loss(*arguments)
    got = torch.ops.nce_ext.sampled_loss(*(to(cuda, a) for a in arguments))
    assert torch.equal(got[1].cpu(), wanted[1])
    for name, ours, theirs in zip(("loss", "ids", "dlogit", "hidden"), got, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    rows = (wanted[1], wanted[2], torch.randn(B), arguments[0], V, torch.float32, True, True)
    for operator, padded in (("row_grad", (False,)), ("row_grad", (True,)), ("row_grad_dense", ())):
        call = getattr(torch.ops.nce_ext, operator)
        for ours, theirs in zip(call(*(to(cuda, a) for a in rows), *padded), call(*rows, *padded), strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)


UNCORRECTED = {"objective": 1, "correct_positive": False, "remove_hits": True, "target": torch.zeros(B, 1).long()}


@pytest.mark.parametrize("objective", [SOFTMAX, ADVERSARIAL, UNCORRECTED, {"positive_weight": 0.25}])
@pytest.mark.parametrize("dim", [4, 100, 600, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_objective_agrees_with_the_cpu(objective, dim, dtype, cuda):
    torch.manual_seed(4)
    arguments = forward_arguments(**{
        "hidden": torch.randn(B, dim, dtype=dtype), "weight": torch.randn(V, dim).to(dtype) / dim**0.5,
        "bias": torch.randn(V).to(dtype), "num_negatives": 40, "remove_hits": True, **objective,
    })  # fmt: skip
    wanted = torch.ops.nce_ext.sampled_loss(*arguments)
    got = torch.ops.nce_ext.sampled_loss(*(to(cuda, a) for a in arguments))
    assert torch.equal(got[1].cpu(), wanted[1])
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", [{}, SOFTMAX, ADVERSARIAL])
@pytest.mark.parametrize("columns", [1, 40, 1000, 8191, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_epilogue_of_shared_negatives_agrees_with_the_cpu(objective, columns, dtype, cuda):
    torch.manual_seed(5)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    batch, targets, dim = 9, 2, 300
    begin = torch.randint(columns, (batch, targets))
    arguments = epilogue_arguments(**{
        "logits": torch.randn(batch, columns, dtype=compute), "hidden": torch.randn(batch, dim).to(dtype),
        "weight": (torch.randn(V, dim) / dim**0.5).to(dtype), "bias": torch.randn(V).to(dtype),
        "target": torch.randint(V, (batch, targets)), "target_log_q": -torch.rand(batch, targets, dtype=compute),
        "column_shift": torch.randn(columns, dtype=compute), "example_weight": torch.randn(batch, dtype=compute),
        "multiplicity": torch.randint(3, (columns,)).to(compute), "n_draws": columns,
        "accidental_hits": torch.stack([begin, begin + 1], 2).int(), **objective,
    })  # fmt: skip
    moved = [a.to(cuda, copy=True) if isinstance(a, torch.Tensor) else a for a in arguments]
    wanted = torch.ops.nce_ext.shared_loss_(*arguments)
    got = torch.ops.nce_ext.shared_loss_(*moved)
    assert torch.equal(got[1].cpu(), wanted[1])
    for ours, theirs in zip((*got, moved[0]), (*wanted, arguments[0]), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


def test_opcheck_on_the_device(cuda):
    ops = torch.ops.nce_ext
    forward = [to(cuda, a) for a in forward_arguments()]
    rows = [to(cuda, a) for a in row_arguments()]
    inputs = SampledLossInputs._make(forward)
    torch.library.opcheck(ops.sample.default, (inputs.seed, inputs.table, inputs.kind, V, 4, 3))
    torch.library.opcheck(ops.sampled_loss.default, tuple(forward))
    for objective in ({}, SOFTMAX, ADVERSARIAL):
        epilogue = tuple(to(cuda, a) for a in epilogue_arguments(**objective))
        torch.library.opcheck(ops.shared_loss_.default, epilogue)
    torch.library.opcheck(ops.row_grad.default, (*rows, False))
    torch.library.opcheck(ops.row_grad.default, (*rows, True))
    torch.library.opcheck(ops.row_grad_dense.default, tuple(rows))


@pytest.mark.parametrize("sparse", [False, True, "padded"])
def test_cuda_is_the_whole_change(sparse, cuda):
    """The same module, seed and data on both devices: the same loss and gradients."""
    on_cpu = make(sparse=sparse)
    on_gpu = copy.deepcopy(on_cpu).to(cuda)
    assert on_gpu.noise.table.device.type == cuda.type
    hidden, target, seed = torch.randn(40, 64), torch.randint(5000, (40,)), torch.tensor([5, 6])
    losses = []
    for loss_fn, device in ((on_cpu, torch.device("cpu")), (on_gpu, cuda)):
        losses.append(loss_fn(hidden.to(device), target.to(device), seed=seed.to(device)))
        losses[-1].backward()
    torch.testing.assert_close(losses[1].cpu(), losses[0])
    for name in ("weight", "bias"):
        ours, theirs = getattr(on_gpu, name).grad, getattr(on_cpu, name).grad
        torch.testing.assert_close(ours.to_dense().cpu(), theirs.to_dense(), rtol=1e-4, atol=1e-6)
    if sparse is True:
        assert on_gpu.weight.grad.is_coalesced()
        assert on_gpu.bias.grad.is_coalesced()
        assert on_gpu.weight.grad._nnz() == on_cpu.weight.grad._nnz()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam])
def test_training_lowers_the_exact_loss(optimizer, cuda):
    loss_fn = make(200, 16, 20, sparse=True).to(cuda)
    hidden, target = torch.randn(256, 16, device=cuda), torch.randint(200, (256,), device=cuda)
    step = optimizer(loss_fn.parameters(), lr=0.05)
    before = nce_ext.evaluate.nll(loss_fn, hidden, target)
    for _ in range(100):
        step.zero_grad()
        loss_fn(hidden, target).backward()
        step.step()
    assert nce_ext.evaluate.nll(loss_fn, hidden, target) < before - 0.3


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_repeat_bit_for_bit(sparse, dtype, cuda):
    """Also with one class in a third of all pairs, whose segment crosses thousands of tiles."""
    counts = torch.ones(1000, dtype=torch.float64)
    counts[7] = 500
    loss_fn = nce_ext.NCELoss(100, 1000, noises.Unigram(counts, power=1.0), 100, sparse=sparse, dtype=dtype).to(cuda)
    hidden = torch.randn(8192, 100, device=cuda, dtype=dtype, requires_grad=True)
    target, seed = torch.randint(1000, (8192,), device=cuda), torch.tensor([1, 2], device=cuda)
    results = []
    for _ in range(3):
        loss_fn.zero_grad()
        hidden.grad = None
        loss_fn(hidden, target, seed=seed).backward()
        gradients = [g.to_dense() for g in (loss_fn.weight.grad, loss_fn.bias.grad, hidden.grad)]
        results.append(gradients)
    for later in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], later, strict=True))


@pytest.mark.parametrize("batch", [1, 33, 1000])
def test_an_example_has_the_same_loss_in_any_batch(batch, cuda):
    loss_fn = make().to(cuda)
    hidden, target = torch.randn(1000, 64, device=cuda), torch.randint(5000, (1000,), device=cuda)
    negatives = torch.randint(5000, (1000, 10), device=cuda)
    loss_fn.reduction = "none"
    whole = loss_fn(hidden, target, negatives=negatives)
    part = loss_fn(hidden[:batch], target[:batch], negatives=negatives[:batch])
    assert torch.equal(whole[:batch], part)


@pytest.mark.slow
def test_a_table_and_pairs_beyond_2_to_31_elements(cuda):
    """V D = 2.6e9 and B k D = 4.3e9: offsets that 32 bits do not hold."""
    n_classes, dim, batch, k = 20_000_000, 128, 32_768, 1023
    if torch.cuda.get_device_properties(cuda).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    weight = torch.empty(n_classes, dim, device=cuda, dtype=torch.bfloat16)
    weight[: n_classes // 2].fill_(1 / 128)
    weight[n_classes // 2 :].fill_(-1 / 64)
    hidden = torch.ones(batch, dim, device=cuda, dtype=torch.bfloat16)
    target = torch.full((batch,), n_classes - 1, device=cuda)
    noise, seed = noises.Uniform(n_classes).to(cuda), torch.tensor([1, 2], device=cuda)
    options = {"correction": "none", "reduction": "none", "seed": seed, "sparse": True}
    weight.requires_grad_()
    losses = functional.nce_loss(hidden, weight, target, noise, k, **options)
    ids = noise.sample((batch, k), seed=seed)
    high = (ids >= n_classes // 2).sum(1)
    softplus = lambda z: math.log1p(math.exp(z))  # noqa: E731
    wanted = softplus(2.0) + (k - high) * softplus(1.0) + high * softplus(-2.0)
    torch.testing.assert_close(losses.double(), wanted.double(), rtol=1e-5, atol=0)
    losses.sum().backward()
    gradient = weight.grad.coalesce()
    assert gradient.indices()[0, -1] == n_classes - 1
    slope = -batch / (1 + math.exp(-2.0)) * 1.0
    hits = int((ids == n_classes - 1).sum())
    last = slope + hits / (1 + math.exp(2.0))
    torch.testing.assert_close(float(gradient.values()[-1, -1]), last, rtol=2**-7, atol=0)


def test_memory_does_not_grow_with_the_vocabulary(cuda):
    peaks = []
    for n_classes in (10_000, 1_000_000):
        loss_fn = nce_ext.NCELoss(64, n_classes, noises.LogUniform(n_classes), 20, sparse=True).to(cuda)
        hidden = torch.randn(8192, 64, device=cuda, requires_grad=True)
        target = torch.randint(10_000, (8192,), device=cuda)
        loss_fn(hidden, target).backward()
        loss_fn.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_fn(hidden, target).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del loss_fn
    pairs_bytes = 8192 * 21 * 64 * 4
    assert max(peaks) < 3 * pairs_bytes  # the rows of all pairs, were they all different, and the scratch to sum them
    assert peaks[1] - peaks[0] < pairs_bytes


class TestHogwild:
    def test_the_step_is_close_to_the_exact_one(self, cuda):
        """Sums are of the same terms, in another order."""
        case = Case(lead=(512,), classes=300, dim=100)
        rate = 1e-4
        exact, racy = case.weight.clone(), case.weight.to(cuda)
        exact_bias, racy_bias = case.bias.clone(), case.bias.to(cuda)
        wanted = functional.hogwild_sgd_(
            case.hidden, exact, case.target, case.noise, 5, rate, bias=exact_bias, seed=case.seed
        )
        got = functional.hogwild_sgd_(
            case.hidden.to(cuda), racy, case.target.to(cuda), copy.deepcopy(case.noise).to(cuda), 5, rate,
            bias=racy_bias, seed=case.seed.to(cuda),
        )  # fmt: skip
        torch.testing.assert_close(got[0].cpu(), wanted[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(racy.cpu() - case.weight, exact - case.weight, rtol=2e-2, atol=2e-6)
        torch.testing.assert_close(racy_bias.cpu() - case.bias, exact_bias - case.bias, rtol=2e-2, atol=2e-6)

    def test_only_float32(self, cuda):
        weight = torch.zeros(10, 8, device=cuda, dtype=torch.bfloat16)
        with pytest.raises(TypeError, match="weight must be float32 to be changed in place on CUDA"):
            functional.hogwild_sgd_(
                torch.zeros(2, 8, device=cuda), weight, torch.zeros(2, dtype=torch.int64, device=cuda),
                noises.Uniform(10).to(cuda), 5, 0.1,
            )  # fmt: skip

    def test_a_bad_example_changes_nothing(self, cuda):
        weight = torch.ones(10, 8, device=cuda)
        target = torch.tensor([10, -100], device=cuda)
        losses, gradient = functional.hogwild_sgd_(
            torch.ones(2, 8, device=cuda), weight, target, noises.Uniform(10).to(cuda), 5, 0.1
        )
        assert torch.isnan(losses).tolist() == [True, False]
        assert not gradient.any()
        assert torch.equal(weight, torch.ones_like(weight))


@pytest.mark.parametrize("dim", [5, 64, 512, 1000, 4096, 16_384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_long_rows_agree_with_the_cpu(dim, dtype, cuda):
    case = Case(lead=(9,), dim=dim, classes=30, negatives=40, dtype=dtype)
    options = {"seed": case.seed, "reduction": "none"}
    wanted = functional.nce_loss(case.hidden, case.weight, case.target, case.noise, 40, bias=case.bias, **options)
    got = functional.nce_loss(
        case.hidden.to(cuda), case.weight.to(cuda), case.target.to(cuda), copy.deepcopy(case.noise).to(cuda), 40,
        bias=case.bias.to(cuda), seed=case.seed.to(cuda), reduction="none",
    )  # fmt: skip
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert_close(got, wanted, compute, "loss")


def test_rows_longer_than_the_kernels_take_are_refused(cuda):
    noise = noises.Uniform(4).to(cuda)
    arguments = (
        torch.zeros(1, 16_385, device=cuda),
        torch.zeros(4, 16_385, device=cuda),
        torch.zeros(1, device=cuda).long(),
    )
    with pytest.raises(ValueError, match=r"weight must have at most 16384 columns for the CUDA kernels, got 16385"):
        functional.nce_loss(*arguments, noise, 2)
    assert torch.isfinite(functional.nce_loss(*arguments, noise, 2, backend="reference"))
