"""word2vec's racy step in backward: SGD where nothing races, close to it where something does."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from cases import Case
from fused_cases import loss_of, rows_of
from optim_cases import F32, assert_same, snapshot
from tolerances import assert_close

from nce_ext import optim

pytestmark = pytest.mark.usefixtures("native")

RATE = 0.125


def racy(name: str, case: Case, **options) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    loss_fn = loss_of(name, case, **options)
    optimizer = optim.SGD(loss_fn.parameters(), lr=RATE)
    loss_fn.fuse_optimizer(optimizer, hogwild=True)
    return loss_fn, optimizer


def exact(name: str, case: Case, upstream: torch.Tensor | None = None, **more) -> list[np.ndarray]:
    """Weight and bias after SGD on the gradient, in float64."""
    plain = loss_of(name, case, **more)
    plain(case.hidden, case.target, seed=case.seed).backward(upstream)
    return [p.detach().double().numpy() - RATE * p.grad.to_dense().double().numpy() for p in rows_of(plain)]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", ["nce", "adversarial", "softmax"])
def test_without_repeats_it_is_sgd(name, with_bias):
    """Each id once: to the last bit, on one thread or two."""
    case = Case(lead=(40,), classes=300, negatives=5, with_bias=with_bias)
    ids = torch.randperm(300)[:240].view(40, 6)
    plain, hogs = loss_of(name, case), [racy(name, case)[0] for _ in range(2)]
    upstream = torch.rand(()) + 0.5
    call = {"target": ids[:, 0], "negatives": ids[:, 1:]}
    for threads, loss_fn in zip((1, 2), hogs, strict=True):
        torch.set_num_threads(threads)
        loss_fn(case.hidden, **call).backward(upstream)
    plain(case.hidden, **call).backward(upstream)
    optim.SGD(plain.parameters(), lr=RATE).step()
    for loss_fn in hogs:
        for p, q in zip(rows_of(loss_fn), rows_of(plain), strict=True):
            assert_close(p, q.detach().double(), F32, "weight")
            assert p.grad is None


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"reduction": "sum"}], ids=str)
@pytest.mark.parametrize("name", ["nce", "adversarial", "softmax"])
def test_repeats_are_added_up_on_one_thread(name, options):
    """All derivatives are of the weights before the step, so only the order of summation differs from SGD."""
    torch.set_num_threads(1)
    case = Case(lead=(64,), classes=20)
    loss_fn, _ = racy(name, case, **options)
    upstream = torch.randn(64) if options.get("reduction") == "none" else None
    loss_fn(case.hidden, case.target, seed=case.seed).backward(upstream)
    for p, truth in zip(rows_of(loss_fn), exact(name, case, upstream, **options), strict=True):
        # Up to about 20 roundings of the row for each of its updates, of which a class has some dozens.
        assert_close(p, truth, F32, "weight", np.full_like(truth, 4 * np.abs(truth).max()))


def test_several_targets_calls_and_passes():
    torch.set_num_threads(1)
    case = Case(lead=(20,), positives=3, pad=True, classes=30)
    loss_fn = loss_of("nce", case)
    loss_fn.fuse_optimizer(optim.SGD(loss_fn.parameters(), lr=RATE), hogwild=True, accumulate=2)
    before = loss_fn.weight.detach().clone()
    loss_fn(case.hidden, case.target, seed=case.seed).backward()
    assert torch.equal(before, loss_fn.weight)
    loss_fn(case.hidden, case.target, seed=case.seed).backward()
    for p, start, truth in zip(rows_of(loss_fn), (case.weight, case.bias), exact("nce", case), strict=True):
        start = start.double().numpy()
        truth = start + 2 * (truth - start)
        assert_close(p, truth, F32, "weight", np.full_like(truth, 4 * np.abs(truth).max()))


@pytest.mark.parametrize("options", [{"shared": True}, {"backend": "reference"}], ids=str)
def test_where_rows_exist_anyway_the_step_is_the_exact_one(options):
    case = Case()
    loss_fn, optimizer = racy("nce", case, **options)
    loss_fn(case.hidden, case.target, seed=case.seed).backward()
    plain = loss_of("nce", case, **options)
    plain(case.hidden, case.target, seed=case.seed).backward()
    other = optim.SGD(plain.parameters(), lr=RATE)
    other.step()
    other.zero_grad()
    assert_same(snapshot(optimizer), snapshot(other))


def test_two_threads_stay_close():
    """50 steps on 2000 classes, of which some dozens are in most batches.

    A lost update is one of a row's, so the distance from SGD stays a small part of the way that SGD has gone: under
    one in twenty, where a kernel that lost every second update would be at a third or more.
    """
    case = Case(lead=(512,), classes=2000, dim=32)
    weights = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        loss_fn, _ = racy("negative sampling", case, reduction="sum")
        loss_fn._fused.optimizer.param_groups[0]["lr"] = 1e-3
        for step in range(50):
            loss_fn(case.hidden, case.target, seed=torch.tensor([step, 1])).backward()
        weights.append(loss_fn.weight.detach())
    one, two = weights
    assert torch.isfinite(two).all()
    assert (two - one).norm() < 0.05 * (one - case.weight).norm()


def test_threads_that_share_the_loss():
    """Each thread's backward steps on its own pairs; none is lost by the handle."""
    case = Case(lead=(16,), classes=5000)
    torch.set_num_threads(1)
    loss_fn, _ = racy("nce", case, reduction="sum")
    ids = torch.randperm(5000)[: 8 * 16 * 6].view(8, 16, 6)

    def work(part: torch.Tensor) -> None:
        loss_fn(case.hidden, part[:, 0], negatives=part[:, 1:]).backward()

    threads = [threading.Thread(target=work, args=(part,)) for part in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plain = loss_of("nce", case, reduction="sum")
    plain(case.hidden.repeat(8, 1), ids[..., 0].reshape(-1), negatives=ids[..., 1:].reshape(-1, 5)).backward()
    optim.SGD(plain.parameters(), lr=RATE).step()
    assert_close(loss_fn.weight, plain.weight.detach().double(), F32, "weight")


# Both processes of the pair train the one table; the parent only looks.
SHARED = """
import torch, torch.multiprocessing as mp, nce_ext
from nce_ext import noise, optim
V, D, STEPS = 50, 32, 150
def loss_of(weight):
    loss_fn = nce_ext.NegativeSamplingLoss(D, V, noise.Uniform(V), 5, bias=False, reduction="sum")
    loss_fn.weight = weight
    return loss_fn
def data(seed):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(V, (64,), generator=generator)
    centres = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    return centres[target], target
def work(rank, weight, steps):
    torch.set_num_threads(1)
    loss_fn = loss_of(weight)
    loss_fn.fuse_optimizer(optim.SGD(loss_fn.parameters(), lr=0.05), hogwild=True)
    for step in range(STEPS):
        loss_fn(*data(1 + 2 * step + rank), seed=torch.tensor([step, rank])).backward()
        steps[rank] += 1
if __name__ == "__main__":
    torch.set_num_threads(1)
    weight, steps = torch.nn.Parameter(torch.zeros(V, D)), torch.zeros(2)
    weight.share_memory_(); steps.share_memory_()
    # Forked before any thread exists, so that neither imports torch again.
    mp.start_processes(work, (weight, steps), nprocs=2, start_method="fork")
    with torch.no_grad():
        hidden, target = data(10**6)
        loss = float(loss_of(weight)(hidden, target, seed=torch.tensor([5, 5]))) / 64
        hits = (loss_of(weight).predict(hidden) == target).float().mean()
    print(*steps.tolist(), loss, float(hits), bool(torch.isfinite(weight).all()))
"""


def test_two_processes_train_one_table(tmp_path):
    """An untrained table costs the logarithm of 2 a score, and finds one class of 50."""
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *steps, loss, hits, finite = done.stdout.split()
    assert steps == ["150.0", "150.0"]
    assert finite == "True"
    untrained = 6 * np.log(2)
    assert float(loss) < 0.5 * untrained
    assert float(hits) > 0.7
