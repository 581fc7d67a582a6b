"""The sampled losses and the density loss under torch.func: as backward, and as a Python loop, would have it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call, grad, grad_and_value, jacrev, vjp, vmap

import nce_ext
from nce_ext.noise import LogUniform, Mixture, Uniform, Unigram

V, D, B, K = 20, 5, 6, 4
N = 3  # batches that vmap sees at once
SEED = torch.tensor([3, 4])

LOSSES = {
    "nce": lambda noise, **options: nce_ext.NCELoss(D, V, noise, K, **options),
    "learned log z": lambda noise, **options: nce_ext.NCELoss(D, V, noise, K, log_z="learned", **options),
    "without bias": lambda noise, **options: nce_ext.NCELoss(D, V, noise, K, bias=False, **options),
    "mean": lambda noise, **options: nce_ext.NCELoss(D, V, noise, K, candidate_reduction="mean", **options),
    "negative sampling": lambda noise, **options: nce_ext.NegativeSamplingLoss(D, V, noise, K, **options),
    "adversarial": lambda noise, **options: nce_ext.NegativeSamplingLoss(
        D, V, noise, K, adversarial_temperature=0.5, margin=1.0, **options
    ),
    "softmax": lambda noise, **options: nce_ext.SampledSoftmaxLoss(D, V, noise, K, label_smoothing=0.1, **options),
    "ranking": lambda noise, **options: nce_ext.SampledSoftmaxLoss(D, V, noise, K, correct_positive=False, **options),
}
NOISE = {"uniform": Uniform(V), "log uniform": LogUniform(V), "unigram": Unigram(range(1, V + 1))}
REDUCTIONS = ("mean", "sum", "none")


def batch(**sizes):
    target = torch.randint(V, (B, *sizes.values()))
    target[1] = -100
    return {"hidden": torch.randn(B, D), "target": target, "seed": SEED}


def weights(loss: torch.Tensor) -> torch.Tensor:
    """Upstream gradients that differ between the examples."""
    return torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view(loss.shape)


def by_backward(loss_fn, given):
    """Loss, and gradients of hidden and of the parameters, without torch.func."""
    leaves = {n: t.detach().requires_grad_() for n, t in loss_fn.named_parameters()}
    hidden = given["hidden"].detach().requires_grad_()
    loss = functional_call(loss_fn, leaves, (), {**given, "hidden": hidden})
    inputs = {"hidden": hidden, **leaves}
    return loss.detach(), dict(zip(inputs, torch.autograd.grad(loss, inputs.values(), weights(loss)), strict=True))


def pure(loss_fn, given):
    """The weighted sum of the losses as a function of a dict of hidden and parameters."""

    def function(inputs):
        inputs = dict(inputs)
        hidden = inputs.pop("hidden", given["hidden"])
        loss = functional_call(loss_fn, inputs, (), {**given, "hidden": hidden})
        return (weights(loss) * loss).sum(), loss

    return function


def inputs_of(loss_fn, given):
    return {"hidden": given["hidden"], **{n: t.detach() for n, t in loss_fn.named_parameters()}}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for n, gradient in want.items():
        assert got[n].layout == gradient.layout, n
        assert got[n].dtype == gradient.dtype, n
        assert torch.equal(got[n].to_dense(), gradient.to_dense()), n


@pytest.mark.parametrize("sparse", [False, True, "padded"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_grad_is_what_backward_gives(name, reduction, shared, sparse, backend):
    loss_fn = LOSSES[name](NOISE["unigram"], reduction=reduction, shared=shared, sparse=sparse, backend=backend)
    given = batch()
    loss, gradients = by_backward(loss_fn, given)
    got, (_, got_loss) = grad_and_value(pure(loss_fn, given), has_aux=True)(inputs_of(loss_fn, given))
    assert torch.equal(got_loss, loss)
    assert_same(got, gradients)
    assert all(p.grad is None for p in loss_fn.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
def test_grad_in_other_dtypes(dtype, shared, backend):
    loss_fn = nce_ext.NCELoss(D, V, NOISE["unigram"], K, shared=shared, backend=backend, dtype=dtype)
    given = {**batch(), "hidden": torch.randn(B, D, dtype=dtype)}
    got, _ = grad(pure(loss_fn, given), has_aux=True)(inputs_of(loss_fn, given))
    assert_same(got, by_backward(loss_fn, given)[1])


OPTIONS = {
    "two targets": ({}, lambda: batch(targets=2)),
    "given": ({}, lambda: {**batch(), "negatives": torch.randint(V, (B, K)),
                           "log_q": (-3 * torch.rand(B), -3 * torch.rand(B, K))}),
    "given, shared": ({"remove_hits": True}, lambda: {**batch(), "negatives": torch.randint(V, (K,))}),
    "sample weight": ({}, lambda: {**batch(), "sample_weight": torch.rand(B)}),
    "log z of examples": ({}, lambda: {**batch(), "log_z": torch.rand(B)}),
    "distinct": ({"unique": True}, batch),
    "tensorflow": ({"unique": "tf"}, batch),
    "no correction": ({"correction": "none"}, batch),
}  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_grad_with_every_kind_of_argument(name, reduction, backend):
    options, make = OPTIONS[name]
    loss_fn = nce_ext.NCELoss(D, V, NOISE["unigram"], K, reduction=reduction, backend=backend, **options)
    given = {n: t for n, t in make().items() if n != "seed" or "given" not in name}
    got, _ = grad(pure(loss_fn, given), has_aux=True)(inputs_of(loss_fn, given))
    assert_same(got, by_backward(loss_fn, given)[1])


@pytest.mark.parametrize("wanted", [{"hidden"}, {"weight"}, {"bias"}, {"log_z"}])
@pytest.mark.parametrize("shared", [False, True])
def test_grad_of_one_input_alone(wanted, shared, backend):
    loss_fn = LOSSES["learned log z"](NOISE["uniform"], shared=shared, backend=backend)
    given = batch()
    gradients = by_backward(loss_fn, given)[1]
    inputs = {n: t for n, t in inputs_of(loss_fn, given).items() if n in wanted}
    got, _ = grad(pure(loss_fn, given), has_aux=True)(inputs)
    assert_same(got, {n: gradients[n] for n in wanted})


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["nce", "adversarial", "softmax"])
def test_vjp_and_jacrev(name, reduction, shared, backend):
    loss_fn = LOSSES[name](NOISE["unigram"], reduction=reduction, shared=shared, backend=backend)
    given = batch()
    loss, gradients = by_backward(loss_fn, given)
    inputs = inputs_of(loss_fn, given)

    def losses(inputs):
        return pure(loss_fn, given)(inputs)[1]

    value, pull = vjp(losses, inputs)
    assert torch.equal(value, loss)
    assert_same(pull(weights(loss))[0], gradients)
    for n, jacobian in jacrev(losses)(inputs).items():
        assert jacobian.shape == loss.shape + inputs[n].shape
        torch.testing.assert_close(torch.tensordot(weights(loss), jacobian, loss.dim()), gradients[n])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_differentiating_the_kernels_twice_is_refused(reduction, shared, native):
    loss_fn = nce_ext.NCELoss(D, V, NOISE["uniform"], K, reduction=reduction, shared=shared, backend="fused")
    given = batch()
    inputs = inputs_of(loss_fn, given)

    def total(inputs):
        return pure(loss_fn, given)(inputs)[0]

    for n in inputs:
        for m in inputs:

            def second(x, n=n, m=m):
                first = grad(lambda y: total({**inputs, n: x, m: y}))(x if n == m else inputs[m])
                return first.sum()

            with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*backend='reference'"):
                grad(second)(inputs[n])


def test_the_reference_is_differentiated_twice():
    loss_fn = nce_ext.NCELoss(D, V, NOISE["uniform"], K, backend="reference").double()
    given = {**batch(), "hidden": torch.randn(B, D, dtype=torch.float64)}

    def total(hidden):
        return loss_fn(**{**given, "hidden": hidden})

    want = torch.autograd.functional.hessian(total, given["hidden"])
    torch.testing.assert_close(torch.func.hessian(total)(given["hidden"]), want)
    torch.testing.assert_close(jacrev(jacrev(total))(given["hidden"]), want)


# vmap


def stacked(batches):
    return {n: torch.stack([b[n] for b in batches]) for n in batches[0] if n != "seed"}


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_reference_under_vmap_is_a_loop(name, shared, noise):
    for reduction in REDUCTIONS:
        loss_fn = LOSSES[name](NOISE[noise], reduction=reduction, shared=shared, backend="reference")
        batches = [batch() for _ in range(N)]
        looped = [by_backward(loss_fn, b) for b in batches]
        losses = vmap(lambda given, loss_fn=loss_fn: loss_fn(**given, seed=SEED))(stacked(batches))
        torch.testing.assert_close(losses, torch.stack([loss for loss, _ in looped]).detach())

        def of_batch(given, loss_fn=loss_fn):
            given = {**given, "seed": SEED}
            return grad(pure(loss_fn, given), has_aux=True)(inputs_of(loss_fn, given))[0]

        got = vmap(of_batch)(stacked(batches))
        for n in got:
            torch.testing.assert_close(got[n], torch.stack([gradients[n] for _, gradients in looped]))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_of_argument_under_vmap(name):
    options, make = OPTIONS[name]
    loss_fn = nce_ext.NCELoss(D, V, NOISE["unigram"], K, reduction="none", backend="reference", **options)
    batches = [make() for _ in range(N)]
    tensors = [{n: t for n, t in b.items() if n not in ("seed", "log_q")} for b in batches]
    log_q = [b["log_q"] for b in batches] if "log_q" in batches[0] else None
    seed = {} if "negatives" in batches[0] else {"seed": SEED}
    looped = [loss_fn(**b, **seed, **({"log_q": log_q[i]} if log_q else {})) for i, b in enumerate(tensors)]
    more = {"log_q": tuple(map(torch.stack, zip(*log_q, strict=True)))} if log_q else {}
    got = vmap(lambda given: loss_fn(**given, **seed))({**stacked(tensors), **more})
    torch.testing.assert_close(got, torch.stack(looped))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("noise", [*NOISE.values(), Mixture([Uniform(V), LogUniform(V)], [0.5, 0.5])])
def test_every_entry_draws_by_its_own_seed(noise, shared):
    loss_fn = nce_ext.NCELoss(D, V, noise, K, shared=shared, backend="reference")
    given, seeds = batch(), torch.arange(2 * N).view(N, 2)
    looped = torch.stack([loss_fn(**{**given, "seed": seed}) for seed in seeds])
    assert len(looped.unique()) == N
    torch.testing.assert_close(vmap(lambda seed: loss_fn(**{**given, "seed": seed}))(seeds), looped)


@pytest.mark.parametrize("unique", [True, "tf"])
def test_distinct_draws_by_seeds_of_each_entry(unique):
    loss_fn = nce_ext.NCELoss(D, V, NOISE["unigram"], K, unique=unique, backend="reference")
    given, seeds = batch(), torch.arange(2 * N).view(N, 2)
    for function in (
        lambda seed: loss_fn(**{**given, "seed": seed}),
        lambda seed: grad(lambda h: loss_fn(**{**given, "hidden": h, "seed": seed}))(given["hidden"]),
    ):
        if unique == "tf":
            with pytest.raises(ValueError, match="unique must not be 'tf' with a seed of each entry of a vmap"):
                vmap(function)(seeds)
        else:
            torch.testing.assert_close(vmap(function)(seeds), torch.stack([function(seed) for seed in seeds]))


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_draws_and_log_probabilities_under_vmap(noise):
    seeds = torch.arange(2 * N).view(N, 2)
    ids = vmap(lambda seed: noise.sample((2, 7), seed=seed))(seeds)
    assert torch.equal(ids, torch.stack([noise.sample((2, 7), seed=seed) for seed in seeds]))
    assert torch.equal(vmap(noise.log_prob)(ids), noise.log_prob(ids))
    inclusion = vmap(lambda ids, trials: noise.log_inclusion(ids, trials))(ids, torch.arange(N))
    assert torch.equal(inclusion, torch.stack([noise.log_inclusion(each, i) for i, each in enumerate(ids)]))


def test_random_draws_under_vmap():
    loss_fn = nce_ext.NCELoss(D, V, NOISE["unigram"], K, backend="reference")
    hidden, target = torch.randn(D).expand(N, B, D), torch.zeros(N, B, dtype=torch.int64)
    same = vmap(loss_fn, randomness="same")(hidden, target)
    assert torch.equal(same, same[0].expand(N))
    assert len(vmap(loss_fn, randomness="different")(hidden, target).unique()) == N
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(loss_fn)(hidden, target)


@pytest.mark.parametrize("sparse", [True, "padded"])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_a_table_are_dense_under_vmap(shared, sparse):
    loss_fn = nce_ext.NCELoss(D, V, NOISE["unigram"], K, shared=shared, sparse=sparse, backend="reference")
    batches = [batch() for _ in range(N)]
    looped = [by_backward(loss_fn, b)[1] for b in batches]

    def of_batch(given):
        return grad(pure(loss_fn, {**given, "seed": SEED}), has_aux=True)(inputs_of(loss_fn, given))[0]

    each = vmap(of_batch)(stacked(batches))
    vmap(lambda given: loss_fn(**given, seed=SEED))(stacked(batches)).sum().backward()
    for n, p in loss_fn.named_parameters():
        want = torch.stack([gradients[n].to_dense() for gradients in looped])
        torch.testing.assert_close(each[n], want)
        torch.testing.assert_close(p.grad, want.sum(0))


@pytest.mark.parametrize("kind", ["auto", "fused"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_kernels_refuse_vmap_by_name(kind, shared, native):
    loss_fn = nce_ext.NCELoss(D, V, NOISE["unigram"], K, shared=shared, backend=kind)
    batches, hidden = stacked([batch() for _ in range(N)]), torch.randn(B, D)
    for function in (
        lambda given: loss_fn(**given, seed=SEED),
        lambda given: grad(lambda h: loss_fn(h, given["target"], seed=SEED))(given["hidden"]),
        lambda given: loss_fn(hidden, given["target"], seed=SEED),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.func\.vmap; backend='reference' works") as caught:
            vmap(function)(batches)
        assert "\n" not in str(caught.value)


def test_a_fused_optimizer_refuses_transforms_by_name(backend):
    loss_fn = nce_ext.NCELoss(D, V, NOISE["unigram"], K, backend=backend)
    loss_fn.fuse_optimizer(nce_ext.optim.SGD(loss_fn.parameters(), lr=0.1))
    given = batch()
    before = loss_fn.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"fuse_optimizer .*torch\.func.*unfuse_optimizer"):
        grad(lambda h: loss_fn(h, given["target"], seed=SEED))(given["hidden"])
    assert torch.equal(loss_fn.weight, before)


def test_values_are_checked_under_grad_and_not_under_vmap(backend):
    loss_fn = nce_ext.NCELoss(D, V, NOISE["unigram"], K, backend=backend, reduction="none")
    given = batch()
    given["target"][2] = V
    with pytest.raises(ValueError, match=f"target must be in 0 .. {V - 1} or ignore_index = -100, got {V}"):
        grad(lambda h: loss_fn(**{**given, "hidden": h}).sum())(given["hidden"])
    if backend == "reference":
        loss = vmap(lambda h: loss_fn(**{**given, "hidden": h}))(given["hidden"][None])
        assert loss.isnan().tolist() == [[i == 2 for i in range(B)]]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_density_loss(reduction):
    loss_fn = nce_ext.DensityNCELoss(4, reduction=reduction)
    data = [torch.randn(N, B), torch.randn(N, B), torch.randn(N, 4 * B), torch.randn(N, 4 * B)]

    def total(log_z, *data):
        loss = functional_call(loss_fn, {"log_z": log_z}, data)
        return (weights(loss) * loss).sum(), loss

    log_z = torch.tensor(0.3)
    got = vmap(grad(total, argnums=(0, 1, 3), has_aux=True), in_dims=(None, 0, 0, 0, 0))(log_z, *data)
    for i in range(N):
        leaves = [t.clone().requires_grad_() for t in (log_z, data[0][i], data[2][i])]
        value, loss = total(leaves[0], leaves[1], data[1][i], leaves[2], data[3][i])
        torch.testing.assert_close(got[1][i], loss.detach())
        for gradient, want in zip(got[0], torch.autograd.grad(value, leaves), strict=True):
            torch.testing.assert_close(gradient[i], want)
    data[1][1, 2] = math.nan
    with pytest.raises(ValueError, match="log_q_data must be finite"):
        grad(lambda f: total(log_z, f, *(t[1] for t in data[1:]))[0])(data[0][1])
