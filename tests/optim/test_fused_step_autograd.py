"""A fused optimizer among the rest of autograd: compiled models, checkpoints, threads, copies, scaled losses."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from cases import Case
from fused_cases import Twins, batches, rows_of
from optim_cases import F64, assert_same, snapshot
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from nce_ext import optim

WAYS = [{}, {"shared": True}, {"backend": "reference"}]


def inputs(*sizes: int) -> list[dict]:
    """For an encoder of three inputs, of a case of 50 classes."""
    return [
        {
            "hidden": torch.randn(size, 3, dtype=F64), "target": torch.randint(50, (size,)),
            "seed": torch.randint(2**62, (2,)),
        }
        for size in sizes
    ]  # fmt: skip


def encoder() -> nn.Linear:
    return nn.Linear(3, 16, dtype=F64)


@pytest.mark.parametrize(("compiler", "options"), [("aot_eager", {}), ("eager", {"shared": True})], ids=str)
def test_compiled_model(compiler, options):
    """The graph breaks at the loss, which takes its step."""
    twins = Twins("nce", Case(dtype=F64), encoder=encoder(), **options)

    def model(hidden: torch.Tensor, target: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(twins.encoders[0](hidden))
        return 2 * twins.fused(hidden * 1.5, target, seed=seed) + hidden.square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, backend=counter)
    compilations = []
    for each in inputs(7, 7, 7, 7):
        compiled(**each).backward()
        compilations.append(counter.frame_count)
        twins.step(0)
        hidden = torch.tanh(twins.encoders[1](each.pop("hidden")))
        (2 * twins.plain(hidden * 1.5, **each) + hidden.square().sum()).backward()
        twins.step(1)
    assert compilations[0] > 0
    assert compilations[-1] == compilations[1]  # no step of the weight makes a new graph
    assert twins.moved()
    twins.assert_close(1e-12)
    for p, q in zip(twins.encoders[0].parameters(), twins.encoders[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_encoder(reentrant, options):
    twins = Twins("nce", Case(dtype=F64), encoder=encoder(), **options)
    for each in inputs(7, 4):
        given = each.pop("hidden").requires_grad_()
        hidden = checkpoint(twins.encoders[0], given, use_reentrant=reentrant)
        twins.fused(hidden, **each).backward()
        twins.step(0)
        twins.plain(twins.encoders[1](given), **each).backward()
        twins.step(1)
    twins.assert_same()


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_loss(reentrant, options):
    """Its forward pass runs twice, its step once; a loss beside it loses nothing to the pass within the pass."""
    case = Case(dtype=F64)
    twins = Twins("nce", case, "SGD", **options)
    for inside, beside in zip(batches(case, 7, 4), batches(case, 3, 6), strict=True):
        for which, loss_fn in enumerate((twins.fused, twins.plain)):
            hidden = inside["hidden"].clone().requires_grad_()
            run = lambda h, loss_fn=loss_fn: loss_fn(h, inside["target"], seed=inside["seed"])  # noqa: B023, E731
            loss = checkpoint(run, hidden, use_reentrant=reentrant) if which == 0 else run(hidden)
            (loss + loss_fn(**beside)).backward()
            twins.step(which)
    twins.assert_close()


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_autograd_grad_is_no_step(options):
    case = Case()
    twins = Twins("nce", case, **options)
    before = snapshot(twins.optimizers[0])
    gradients = []
    for loss_fn in (twins.fused, twins.plain):
        hidden = case.hidden.detach().requires_grad_()
        loss = loss_fn(hidden, case.target, seed=case.seed)
        gradients.append(torch.autograd.grad(loss, hidden, retain_graph=True)[0])
        if loss_fn is twins.fused:
            assert_same(before, snapshot(twins.optimizers[0]))
            assert loss_fn.weight.grad is None
        loss.backward()  # the graph still has its step
        assert torch.equal(hidden.grad, gradients[-1])
    assert torch.equal(*gradients)
    twins.step(1)
    twins.assert_same()


def test_backward_to_some_inputs_is_no_step_either():
    case = Case()
    twins = Twins("nce", case)
    before = snapshot(twins.optimizers[0])
    hidden = case.hidden.detach().requires_grad_()
    twins.fused(hidden, case.target).backward(inputs=[hidden])
    assert hidden.grad is not None
    assert_same(before, snapshot(twins.optimizers[0]))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_not_fused(how):
    case = Case()
    twins = Twins("nce", case, fuse={"accumulate": 2})
    twins.backward(0, case.hidden, case.target)
    model = nn.Sequential(twins.fused)
    if how == "deepcopy":
        copied = copy.deepcopy(model)[0]
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))[0]
    else:
        file = io.BytesIO()
        torch.save(model, file)
        copied = torch.load(io.BytesIO(file.getvalue()), weights_only=False)[0]
    before = snapshot(twins.optimizers[0])
    copied(case.hidden, case.target).backward()
    assert copied.weight.grad is not None
    assert torch.equal(copied.weight, case.weight)
    assert_same(before, snapshot(twins.optimizers[0]))
    optimizer = optim.SGD(copied.parameters(), lr=0.1)
    copied.zero_grad()
    copied.fuse_optimizer(optimizer)
    copied(case.hidden, case.target).backward()
    assert not torch.equal(copied.weight, case.weight)
    assert torch.equal(twins.fused.weight, case.weight)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_backward_in_another_thread(options):
    case = Case()
    twins = Twins("nce", case, **options)
    for each in batches(case, 5, 6):
        loss = twins.fused(**each)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        twins.backward(1, **each)
        twins.step(1)
    twins.assert_same()


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_passes_of_several_threads_lose_nothing(options, accumulate):
    """SGD of a fixed gradient does not mind the order: four threads, all in backward at the same time."""
    case = Case(dtype=F64)
    twins = Twins("nce", case, "SGD", fuse={"accumulate": accumulate}, **options)
    n_threads, n_steps = 4, 6
    made = [batches(case, *[5] * n_threads) for _ in range(n_steps)]
    for group in made:
        arrived = threading.Barrier(n_threads)

        def meet(gradient: torch.Tensor, arrived: threading.Barrier = arrived) -> None:
            arrived.wait(20)  # all have handed over what their loss brought, and none is at its end

        losses = []
        for each in group:
            hidden = each["hidden"].clone().requires_grad_() * 1
            hidden.register_hook(meet)
            losses.append(twins.fused(hidden, each["target"], seed=each["seed"]))
        sum(twins.plain(**each) for each in group).backward()
        threads = [threading.Thread(target=loss.backward) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        twins.step(1)
    twins.assert_close()


# Scaled losses.


def scaler(**options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6, **options)


@pytest.mark.parametrize("fuse", [{}, {"max_norm": 0.05}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_scaled_steps_are_those_without_a_scale(options, fuse):
    """A power of two is no rounding."""
    case = Case(dtype=F64)
    scale = scaler()
    twins = Twins("nce", case, encoder=encoder(), fuse={**fuse, "grad_scaler": scale}, **options)
    for i, each in enumerate(inputs(7, 4, 5, 6)):
        hidden = each.pop("hidden")
        scale.scale(twins.fused(twins.encoders[0](hidden), **each)).backward()
        twins.plain(twins.encoders[1](hidden), **each).backward()
        if not fuse.get("accumulate") or i % 2:
            scale.step(twins.optimizers[0])
            scale.update()
            twins.optimizers[0].zero_grad()
            twins.step_plain()
    assert scale.get_scale() == 2.0**10
    twins.assert_close()
    assert not torch.equal(twins.fused.weight, case.weight)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_step_that_is_not_finite_is_left_out(options):
    """Weight, bias and their state stay, what waited is gone, and the scaler counts it."""
    case = Case(dtype=F64)
    scale = scaler()
    twins = Twins("nce", case, fuse={"grad_scaler": scale}, **options)
    for value in (torch.inf, -torch.inf, torch.nan):
        before, was = snapshot(twins.optimizers[0]), scale.get_scale()
        hidden = case.hidden.detach().clone()
        hidden[2, 3] = value
        scale.scale(twins.fused(hidden, case.target)).backward()
        scale.update()
        assert_same(before, snapshot(twins.optimizers[0]))
        assert scale.get_scale() == was / 2
        assert all(p.grad is None for p in rows_of(twins.fused))
        (each,) = batches(case, 6)
        scale.scale(twins.fused(**each)).backward()
        scale.update()
        assert scale.get_scale() == was / 2
        twins.backward(1, **each)
        twins.step(1)
        twins.assert_close()


def test_a_scaler_that_is_off_does_nothing():
    """As in torch, where steps that are not finite are then taken."""
    case = Case()
    twins = Twins("nce", case, fuse={"grad_scaler": scaler(enabled=False)})
    case.hidden[0, 0] = torch.inf
    for each in batches(case, 6, 5):
        twins.both(**each)
    twins.assert_same()
    twins.backward(0, case.hidden, case.target)
    assert not torch.isfinite(twins.fused.weight).all()


def test_bfloat16_under_autocast():
    case = Case()
    twins = Twins("nce", case, encoder=nn.Linear(3, 16))
    for _ in range(2):
        given, seed = torch.randn(7, 3), torch.randint(2**62, (2,))
        for which, loss_fn in enumerate((twins.fused, twins.plain)):
            with torch.autocast("cpu", torch.bfloat16):
                hidden = twins.encoders[which](given)
                assert hidden.dtype == torch.bfloat16
                loss = loss_fn(hidden, case.target, seed=seed)
            loss.backward()
            twins.step(which)
    twins.assert_same()
