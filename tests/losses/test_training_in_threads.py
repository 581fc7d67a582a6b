"""Eight threads that train at once: each ends where it does alone, to the last bit."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from native import require_native
from torch import Tensor, nn

import nce_ext

V, D, B, K, STEPS, THREADS = 50, 8, 16, 4, 4, 8
COUNTS = range(1, V + 1)


def table_losses(backend: str) -> dict[str, Callable[[], nn.Module]]:
    """Losses over a table of classes, each with a noise law of its own."""

    def make(cls, noise=nce_ext.noise.Unigram, **options):
        return lambda: cls(D, V, noise(COUNTS if noise is nce_ext.noise.Unigram else V), K, backend=backend, **options)

    nce, softmax, sampling = nce_ext.NCELoss, nce_ext.SampledSoftmaxLoss, nce_ext.NegativeSamplingLoss
    return {
        "nce": make(nce),
        "nce, sparse": make(nce, sparse=True),
        "nce, each": make(nce, sparse=True, reduction="none"),
        "nce, padded": make(nce, sparse="padded"),
        "nce, learned log z": make(nce, sparse=True, log_z="learned"),
        "nce, shared": make(nce, shared=True),
        "nce, shared, sparse": make(nce, shared=True, sparse=True),
        "nce, shared, each": make(nce, shared=True, sparse=True, reduction="none"),
        "nce, distinct": make(nce, unique=True, sparse=True),
        "nce, tensorflow": make(nce, unique="tf"),
        "softmax": make(softmax, nce_ext.noise.LogUniform),
        "softmax, shared, sparse": make(softmax, nce_ext.noise.LogUniform, shared=True, sparse=True),
        "negative sampling": make(sampling, nce_ext.noise.Uniform),
        "adversarial, sparse": make(sampling, nce_ext.noise.Uniform, adversarial_temperature=1.0, sparse=True),
    }


def train_table(
    make: Callable[[], nn.Module], seed: int, fuse: Callable[..., torch.optim.Optimizer] | None = None
) -> list[Tensor]:
    """Parameters and hidden gradients after a few steps; everything random comes from the seed."""
    generator = torch.Generator().manual_seed(seed)
    loss_fn = make()
    with torch.no_grad():
        for p in loss_fn.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    optimizer = (fuse or nce_ext.optim.Adagrad)(loss_fn.parameters(), lr=0.1)
    if fuse is not None:
        loss_fn.fuse_optimizer(optimizer)
    seen = []
    for _ in range(STEPS):
        hidden = torch.randn(B, D, generator=generator).requires_grad_()
        target = torch.randint(V, (B,), generator=generator)
        loss_fn(hidden, target, generator=generator).sum().backward()
        seen.append(hidden.grad)
        if fuse is None:
            optimizer.step()
            optimizer.zero_grad()
    return [*(p.detach().clone() for p in loss_fn.parameters()), *seen]


def train_pairs(make: Callable[[], nn.Module], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    loss_fn, past = make(), nce_ext.CrossBatchMemory(2 * B, D)
    towers = [torch.randn(D, D, generator=generator).requires_grad_() for _ in range(2)]
    optimizer = torch.optim.SGD([*towers, *loss_fn.parameters()], lr=0.1)
    for _ in range(STEPS):
        x = torch.randn(B, D, generator=generator)
        ids = torch.randint(9, (B,), generator=generator)
        query, key = x @ towers[0], x @ towers[1]
        more = past.padded()
        given = {"negatives": more.keys, "negative_ids": more.ids, "negative_mask": more.mask} if len(past) else {}
        loss_fn(query, key, ids=ids, **given).sum().backward()
        past.enqueue(key.detach(), ids)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in (*towers, *loss_fn.parameters())]


def train_density(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    loss_fn = nce_ext.DensityNCELoss(K)
    energy = torch.randn(D, generator=generator).requires_grad_()
    optimizer = torch.optim.SGD([energy, *loss_fn.parameters()], lr=0.1)
    for _ in range(STEPS):
        x, noise = (torch.randn(n, D, generator=generator) for n in (B, B * K))
        loss_fn(x @ energy, -x.square().sum(1), noise @ energy, -noise.square().sum(1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [energy.detach().clone(), loss_fn.log_z.detach().clone()]


def train_transformed(make: Callable[[], nn.Module], seed: int) -> list[Tensor]:
    """Steps along gradients that torch.func takes."""
    generator = torch.Generator().manual_seed(seed)
    loss_fn = make()
    parameters = {n: torch.randn(p.shape, generator=generator) for n, p in loss_fn.named_parameters()}
    for _ in range(STEPS):
        hidden = torch.randn(B, D, generator=generator)
        target = torch.randint(V, (B,), generator=generator)
        draws = {"seed": torch.randint(9, (2,), generator=generator)}

        def loss(parameters, hidden=hidden, target=target, draws=draws):
            return torch.func.functional_call(loss_fn, parameters, (hidden, target), draws).sum()

        gradients = torch.func.grad(loss)(parameters)
        parameters = {n: p - 0.1 * gradients[n].to_dense() for n, p in parameters.items()}
    return list(parameters.values())


PAIRS: dict[str, Callable[[], nn.Module]] = {
    "info nce, each": lambda: nce_ext.InfoNCELoss(learn_temperature=True, reduction="none"),
    "info nce": lambda: nce_ext.InfoNCELoss(learn_temperature=True, normalize=True),
    "symmetric": lambda: nce_ext.InfoNCELoss(symmetric=True, normalize=True, max_logits=40),
    "debiased": lambda: nce_ext.InfoNCELoss(debias=0.1, normalize=True),
    "siglip": lambda: nce_ext.SigmoidContrastiveLoss(normalize=True),
}
RULES = {
    "sgd": lambda parameters, lr: nce_ext.optim.SGD(parameters, lr=lr, momentum=0.9),
    "adagrad": nce_ext.optim.Adagrad,
    "adam": nce_ext.optim.Adam,
}


def cases() -> Iterator[object]:
    for backend in ("fused", "reference"):
        native = backend == "fused"
        losses = table_losses(backend)
        for name, make in losses.items():
            yield pytest.param(native, lambda s, make=make: train_table(make, s), id=f"{backend}, {name}")
        for rule, fuse in RULES.items():
            for name in ("nce", "nce, shared", "softmax"):
                run = lambda s, make=losses[name], fuse=fuse: train_table(make, s, fuse)  # noqa: E731
                yield pytest.param(native, run, id=f"{backend}, {name}, fused {rule}")
        for name in ("nce", "nce, shared, sparse"):
            run = lambda s, make=losses[name]: train_transformed(make, s)  # noqa: E731
            yield pytest.param(native, run, id=f"{backend}, {name}, transformed")
    for name, make in PAIRS.items():
        yield pytest.param(False, lambda s, make=make: train_pairs(make, s), id=name)
    yield pytest.param(False, train_density, id="density")


def at_once(run: Callable[[int], list[Tensor]], seeds: range) -> list[list[Tensor]]:
    """Results of one thread for each seed; an exception in any of them is raised here."""
    got: dict[int, list[Tensor] | BaseException] = {}
    ready = threading.Barrier(len(seeds))

    def work(seed: int) -> None:
        torch.set_num_threads(1)
        ready.wait()
        try:
            got[seed] = run(seed)
        except BaseException as error:
            got[seed] = error

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in seeds:
        if isinstance(result := got[seed], BaseException):
            raise result
    return [got[seed] for seed in seeds]  # type: ignore[misc]


@pytest.fixture(params=[1e-6, pytest.param(None, marks=pytest.mark.slow)], ids=["restless", "as usual"])
def switch_interval(request):
    """Seconds after which Python hands over to another thread: hardly any, or as many as ever."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(request.param or before)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize(("needs_native", "run"), list(cases()))
def test_threads_train_as_each_would_alone(needs_native, run, switch_interval):
    if needs_native:
        require_native()
    alone = [at_once(run, range(seed, seed + 1))[0] for seed in range(THREADS)]
    for got, want in zip(at_once(run, range(THREADS)), alone, strict=True):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert torch.isfinite(a).all()
            assert torch.equal(a, b)
