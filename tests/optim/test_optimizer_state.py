"""State of nce_ext.optim: saved, loaded, copied; groups, hooks, closures, scalers."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from optim_cases import (
    ALL,
    BF16,
    CASES,
    F16,
    F32,
    F64,
    assert_same,
    give_all_rows,
    make,
    pair,
    parameter,
    random_gradient,
    snapshot,
    sparse,
    torch_twin,
    use,
)
from optim_oracle import Oracle
from tolerances import assert_close
from torch.optim.optimizer import register_optimizer_step_post_hook

from nce_ext import optim


@pytest.fixture(autouse=True)
def _kernels(backend, monkeypatch):
    use(backend, monkeypatch)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def train(optimizer, steps: int, seed: int = 1) -> None:
    """Steps on parameters [7, 5], [7] and, dense, [3]."""
    source = torch.Generator().manual_seed(seed)
    table, bias, dense = (p for group in optimizer.param_groups for p in group["params"])
    for _ in range(steps):
        touched = torch.randint(7, (3,), generator=source)
        table.grad = sparse(touched, torch.randn(3, 5, generator=source).to(table.dtype), 7)
        bias.grad = sparse(touched, torch.randn(3, generator=source).to(bias.dtype), 7)
        dense.grad = torch.randn(3, generator=source).to(dense.dtype)
        optimizer.step()


def parameters(dtype: torch.dtype = F32) -> list[torch.nn.Parameter]:
    return [parameter(7, 5, dtype=dtype), parameter(7, dtype=dtype), parameter(3, dtype=dtype)]


def copies(params, dtype: torch.dtype | None = None) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in params]


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


SORTS = {
    "float32": (F32, {}), "float64": (F64, {}), "bfloat16, stochastic": (BF16, {}),
    "bfloat16, master": (BF16, {"rounding": "master"}), "float16, nearest": (F16, {"rounding": "nearest"}),
}  # fmt: skip


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("name", ALL)
def test_what_is_saved_continues(name, sort):
    """Bit for bit, in an optimizer of other options, from a file that has nothing but plain types."""
    dtype, options = SORTS[sort]
    params = parameters(dtype)
    optimizer = make(name, params, **options, generator=generator())
    train(optimizer, 4)
    others = copies(params)
    saved = through_a_file(optimizer.state_dict())
    loaded = type(optimizer)(others, lr=0.9, generator=generator())
    loaded.load_state_dict(saved)
    assert_same(snapshot(loaded), snapshot(optimizer))
    optimizer._generator.manual_seed(6)
    loaded._generator.manual_seed(6)
    for each in (optimizer, loaded):
        train(each, 3, seed=2)
        each.catch_up()
    assert_same(snapshot(loaded), snapshot(optimizer))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_copies_of_an_optimizer_continue(name, dtype, how):
    optimizer = make(name, parameters(dtype), generator=generator())
    train(optimizer, 3)
    other = how(optimizer)
    assert other.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]
    train(optimizer, 3, seed=2)
    train(other, 3, seed=2)
    assert_same(snapshot(other), snapshot(optimizer))
    other.add_param_group({"params": [parameter(2)]})
    assert other.param_groups[1]["rounding"] == "stochastic"


@pytest.mark.parametrize(("source", "target"), [(F32, BF16), (F32, F16), (F32, F64), (F64, F32), (BF16, F32)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_state_moves_into_tables_of_other_types(name, source, target):
    """State of 16-bit tables stays float32, and what is exact stays so."""
    params = parameters(source)
    optimizer = make(name, params)
    train(optimizer, 4)
    others = copies(params, target)
    loaded = make(name, others)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    wanted = F64 if target == F64 else F32
    for p, q in zip(params[:2], others, strict=False):
        for key, value in optimizer.state[p].items():
            got = loaded.state[q][key]
            if not torch.is_tensor(value):
                assert got == value
                continue
            exact = key in ("step", "row_step", "decayed", "by_rows", "log_decay")
            assert got.dtype == (value.dtype if exact else wanted), key
            assert torch.equal(got, value.to(got.dtype)), key
    train(loaded, 2, seed=2)
    oracle = copies(others, F64)
    again = make(name, oracle)
    again.load_state_dict(copy.deepcopy(loaded.state_dict()))
    train(loaded, 1, seed=3)
    train(again, 1, seed=3)
    if target in (F32, F64):
        assert_close(others[0], oracle[0], target, "weight")


def test_master_weights_are_dropped_by_wider_tables_and_made_by_narrow_ones():
    params = parameters(BF16)
    optimizer = optim.SGD(params, lr=0.1, rounding="master")
    train(optimizer, 3)
    assert optimizer.state[params[0]]["master"].dtype == F32
    wide = copies(params, F32)
    loaded = optim.SGD(wide, lr=0.1)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert "master" not in loaded.state[wide[0]]
    narrow = copies(wide, BF16)
    back = optim.SGD(narrow, lr=0.1)
    back.load_state_dict(copy.deepcopy(loaded.state_dict()))
    train(back, 1)
    assert back.state[narrow[0]]["master"].shape == (7, 5)


@pytest.mark.parametrize("name", CASES)
def test_states_of_torch_are_taken(name):
    """All rows count as touched at every step so far."""
    ours, truth = pair(parameter(7, 5, dtype=F64))
    mine, theirs = make(name, [ours]), torch_twin(name, [truth])
    for _ in range(3):
        give_all_rows(ours, truth)
        theirs.step()
    ours.data.copy_(truth)
    mine.load_state_dict(through_a_file(theirs.state_dict()))
    assert mine.param_groups[0].get("bias_correction", "row") == ALL[name][1].get("bias_correction", "row")
    assert mine.param_groups[0]["rounding"] == "stochastic"
    for _ in range(3):
        give_all_rows(ours, truth)
        mine.step()
        theirs.step()
        assert_close(ours, truth, F64, "weight")


@pytest.mark.parametrize("name", ["Adam", "AdamW, all", "SGD, momentum, dampening, decay", "Adagrad, all"])
def test_states_of_torch_continue_lazily(name):
    """After dense steps only some rows are touched: the oracle, which has seen dense gradients too, goes on."""
    ours, truth = pair(parameter(6, 5, dtype=F64))
    theirs, oracle = torch_twin(name, [truth]), Oracle(ALL[name][0], truth.detach().numpy(), **ALL[name][1])
    for _ in range(3):
        give_all_rows(ours, truth)
        theirs.step()
        oracle.step(dict(enumerate(truth.grad.numpy())))
    ours.data.copy_(truth)
    mine = make(name, [ours])
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for touched in ([1, 2], [5], [0, 2]):
        ours.grad = random_gradient(ours, touched)
        mine.step()
        oracle.step(dict(zip(touched, ours.grad._values().numpy(), strict=True)))
        assert_close(ours, oracle.weight, F64, "weight")


@pytest.mark.parametrize("name", ALL)
def test_options_that_an_old_state_lacks(name):
    params = parameters(BF16)
    optimizer = make(name, params, rounding="nearest")
    train(optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    missing = {"rounding", "bias_correction"} & state["param_groups"][0].keys()
    for option in missing:
        del state["param_groups"][0][option]
    other = make(name, copies(params), rounding="master")
    other.load_state_dict(state)
    assert other.param_groups[0]["rounding"] == "master"
    assert missing <= other.param_groups[0].keys()
    train(other, 1)
    assert "master" in other.state[other.param_groups[0]["params"][0]]


@pytest.mark.parametrize("name", ALL)
def test_groups_that_are_added_later(name):
    params = parameters()
    at_once = make(name, [{"params": params[:1]}, {"params": params[1:], "lr": 0.3}])
    others = copies(params)
    later = make(name, others[:1])
    later.add_param_group({"params": others[1:], "lr": 0.3})
    train(at_once, 3)
    train(later, 3)
    assert_same(snapshot(later), snapshot(at_once))


@pytest.mark.parametrize("name", ALL)
def test_hooks_are_called_once_a_step(name):
    others = [parameter(2, 2)]
    for rule in ("SGD", "Adagrad", "Adam", "AdamW"):
        getattr(torch.optim, rule)(others)  # wraps the step of its class for good
    optimizer = make(name, parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("of all"))
    train(optimizer, 2)
    handle.remove()
    assert calls == ["before", "after", "of all"] * 2


@pytest.mark.parametrize("name", ALL)
def test_closures(name):
    p = parameter(7, 5)
    optimizer = make(name, [p])
    gradient = random_gradient(p, [1, 3])

    def closure():
        assert torch.is_grad_enabled()
        p.grad = gradient
        return torch.tensor(3.0)

    before = p.detach().clone()
    assert optimizer.step(closure) == 3
    assert (p != before).any(1).tolist() == [False, True, False, True, False, False, False]


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", ALL)
def test_gradient_scaler(name, fused):
    """Scaled by a power of 2: the same bits; and with an infinite gradient no step."""
    options = {"fused": fused} if name in CASES else {}
    params, others = parameters(), None
    others = copies(params)
    scaled, plain = make(name, params, **options), make(name, others, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.tensor(1.0))
    for step in range(4):
        for p, q in zip(params, others, strict=True):
            q.grad = torch.randn_like(q) if p.dim() == 1 and len(p) == 3 else random_gradient(q, [1, 3, 3])
            p.grad = q.grad * scaler.get_scale()
        if step == 2:
            before = snapshot(scaled)
            params[0].grad._values()[0, 0] = math.inf
        scaler.step(scaled)
        scaler.update()
        if step == 2:
            assert_same(snapshot(scaled), before)
        else:
            plain.step()
    assert scaler.get_scale() == 512
    assert_same(snapshot(scaled)[0], snapshot(plain)[0])
