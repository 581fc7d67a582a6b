"""How the CUDA kernels behave beside others: bad ids, waiting, graphs, streams, devices, torch.compile."""

from __future__ import annotations

import math

import pytest
import torch
from test_cuda_operators import make

import nce_ext
from nce_ext import functional
from nce_ext import noise as noises

pytestmark = pytest.mark.usefixtures("cuda")


class TestBadIds:
    """A bad example has loss NaN and no gradient; the others are as if it were alone."""

    @pytest.mark.parametrize("position", [0, 1, 4999])
    @pytest.mark.parametrize("value", [5000, -1, 2**40, -(2**63)])
    @pytest.mark.parametrize("name", ["target", "negatives"])
    def test_they_make_nan_and_touch_nothing(self, name, value, position, cuda):
        loss_fn = make(sparse=True, reduction="none").to(cuda)
        ids = {
            "target": torch.randint(5000, (5000,), device=cuda),
            "negatives": torch.randint(5000, (5000, 40), device=cuda),
        }
        hidden = torch.randn(5000, 64, device=cuda, requires_grad=True)
        good = loss_fn(hidden, **ids)
        bad_ids = {key: t.clone() for key, t in ids.items()}
        bad_ids[name][position] = value
        bad = loss_fn(hidden, **bad_ids)
        assert torch.isnan(bad[position])
        others = torch.arange(5000, device=cuda) != position
        assert torch.equal(bad[others], good[others])
        bad.backward(torch.ones_like(bad))
        assert not hidden.grad[position].any()
        assert torch.isfinite(hidden.grad).all()
        assert torch.isfinite(loss_fn.weight.grad.coalesce().values()).all()

    def test_a_target_that_is_never_drawn(self, cuda):
        loss_fn = nce_ext.NCELoss(8, 4, noises.Unigram([1, 1, 1, 0]), 5, reduction="none").to(cuda)
        losses = loss_fn(torch.randn(3, 8, device=cuda), torch.tensor([0, 3, 1], device=cuda))
        assert torch.isnan(losses).tolist() == [False, True, False]

    def test_debug_raises_and_names_them(self, cuda):
        loss_fn = make().to(cuda)
        hidden, target = torch.randn(4, 64, device=cuda), torch.tensor([1, 2, 5000, 3], device=cuda)
        assert torch.isnan(loss_fn(hidden, target))
        nce_ext.set_debug(True)
        try:
            with pytest.raises(ValueError, match=r"target must be in 0 \.\. 4999.* got 5000 at index \[2\]"):
                loss_fn(hidden, target)
        finally:
            nce_ext.set_debug(False)

    def test_the_device_survives(self, cuda):
        self.test_they_make_nan_and_touch_nothing("target", 2**40, 0, cuda)
        torch.cuda.synchronize()
        assert float(torch.ones(3, device=cuda).sum()) == 3


@pytest.mark.parametrize("sparse", [False, "padded"])
def test_nothing_waits_for_the_device(sparse, cuda):
    loss_fn = make(sparse=sparse).to(cuda)
    hidden = torch.randn(64, 64, device=cuda, requires_grad=True)
    target = torch.randint(5000, (64,), device=cuda)
    loss_fn(hidden, target).backward()
    loss_fn.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_fn(hidden, target).backward()
        functional.hogwild_sgd_(hidden, loss_fn.weight.detach(), target, loss_fn.noise, 5, 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sparse", [False, True, "padded"])
def test_a_replayed_graph_draws_fresh_noise(sparse, cuda):
    loss_fn = make(sparse=sparse).to(cuda)
    hidden = torch.randn(64, 64, device=cuda, requires_grad=True)
    target = torch.randint(5000, (64,), device=cuda)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            loss_fn.zero_grad()
            loss_fn(hidden, target).backward()
    torch.cuda.current_stream().wait_stream(stream)
    loss_fn.zero_grad()
    hidden.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_fn(hidden, target)
        loss.backward()
    seen = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        touched = loss_fn.weight.grad.to_dense().abs().sum(1) > 0
        seen.append((float(loss), touched.clone()))
        assert math.isfinite(seen[-1][0])
        assert touched[target].all()
    assert len({value for value, _ in seen}) == 3
    assert not torch.equal(seen[0][1], seen[1][1])


def test_a_captured_seed_is_replayed_as_it_is(cuda):
    """With a given seed a graph computes what the eager call does, for whatever the seed holds at replay."""
    loss_fn = make().to(cuda)
    hidden, target = torch.randn(64, 64, device=cuda), torch.randint(5000, (64,), device=cuda)
    seed = torch.tensor([1, 1], device=cuda)
    with torch.no_grad():
        loss_fn(hidden, target, seed=seed)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = loss_fn(hidden, target, seed=seed)
        for value in (3, 4):
            seed.fill_(value)
            graph.replay()
            assert torch.equal(loss, loss_fn(hidden, target, seed=seed))


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True, "padded"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_fullgraph(sparse, mode, cuda):
    loss_fn = make(sparse=sparse).to(cuda)
    hidden = torch.randn(64, 64, device=cuda, requires_grad=True)
    target, seed = torch.randint(5000, (64,), device=cuda), torch.tensor([1, 2], device=cuda)

    def step(hidden, target, seed):
        return loss_fn(hidden * 2, target, seed=seed)

    compiled = torch.compile(step, fullgraph=True, mode=mode)
    for _ in range(3):
        results = []
        for run in (step, compiled):
            loss_fn.zero_grad()
            hidden.grad = None
            loss = run(hidden, target, seed)
            loss.backward()
            results.append((float(loss), loss_fn.weight.grad.to_dense().clone(), hidden.grad.clone()))
        torch.testing.assert_close(results[1][0], results[0][0])
        torch.testing.assert_close(results[1][1:], results[0][1:], rtol=1e-4, atol=1e-6)


def test_another_stream(cuda):
    loss_fn = make(sparse=True).to(cuda)
    hidden = torch.randn(4096, 64, device=cuda, requires_grad=True)
    target, seed = torch.randint(5000, (4096,), device=cuda), torch.tensor([1, 2], device=cuda)
    loss_fn(hidden, target, seed=seed).backward()
    wanted = loss_fn.weight.grad.to_dense().clone()
    stream = torch.cuda.Stream()
    for _ in range(20):
        loss_fn.zero_grad()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Long before the kernels: one that ran on another stream would read hidden before it is there.
            torch.cuda._sleep(2_000_000)
            again = hidden.detach().clone().requires_grad_()
            loss_fn(again, target, seed=seed).backward()
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(loss_fn.weight.grad.to_dense(), wanted)


def test_a_second_device(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    second = torch.device("cuda", 1)
    one, two = make().to(cuda), make().to(second)
    two.load_state_dict(one.state_dict())
    hidden, target, seed = torch.randn(64, 64), torch.randint(5000, (64,)), torch.tensor([1, 2])
    results = [
        fn(hidden.to(d), target.to(d), seed=seed.to(d)).item()
        for fn, d in ((one, torch.device("cuda", 0)), (two, second))
    ]
    assert results[0] == results[1]
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="must be on hidden's device"):
        one(hidden.to(second), target.to(second))
