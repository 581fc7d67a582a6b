"""The contrastive losses under torch.func: as backward, and as a Python loop, would have it."""

from __future__ import annotations

import itertools

import pytest
import torch
from contrastive_cases import data, vectors
from torch.func import functional_call, grad, grad_and_value, jacrev, vjp, vmap

from nce_ext import InfoNCELoss, SigmoidContrastiveLoss

N = 3  # batches that vmap sees at once
LOSSES = {
    "info nce": lambda **options: InfoNCELoss(0.5, **options),
    "symmetric": lambda **options: InfoNCELoss(0.5, symmetric=True, normalize=True, **options),
    "learned": lambda **options: InfoNCELoss(0.5, learn_temperature=True, **options),
    "capped": lambda **options: InfoNCELoss(0.5, learn_temperature=True, max_scale=2.0, **options),
    "debiased": lambda **options: InfoNCELoss(0.5, debias=0.2, normalize=True, **options),
    "out of batch": lambda **options: InfoNCELoss(0.5, in_batch=False, **options),
    "siglip": lambda **options: SigmoidContrastiveLoss(2.0, -1.0, **options),
    "in chunks": lambda **options: InfoNCELoss(0.5, max_logits=20, **options),
}
REDUCTIONS = ("mean", "sum", "none")
DATA = {
    "nothing": (),
    "ids": ("ids", "negative_ids", "negative_mask"),
    "log q": ("log_q", "negative_log_q"),
    "labels": ("target",),
}


def weights(loss: torch.Tensor) -> torch.Tensor:
    """Upstream gradients that differ between the examples."""
    return torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view(loss.shape)


def by_backward(loss_fn, operands, given):
    """Loss, and gradients of the operands and parameters, without torch.func."""
    leaves = {n: t.detach().requires_grad_() for n, t in operands.items()}
    loss = loss_fn(**leaves, **given)
    parameters = dict(loss_fn.named_parameters())
    inputs = {**leaves, **parameters}
    gradients = torch.autograd.grad(loss, inputs.values(), weights(loss), allow_unused=True)
    named = {n: torch.zeros_like(inputs[n]) if g is None else g for n, g in zip(inputs, gradients, strict=True)}
    return loss.detach(), named


def pure(loss_fn, given):
    """The weighted sum of the losses as a function of a dict of parameters and operands."""
    names = dict(loss_fn.named_parameters()).keys()

    def function(inputs):
        parameters = {n: t for n, t in inputs.items() if n in names}
        operands = {n: t for n, t in inputs.items() if n not in names}
        loss = functional_call(loss_fn, parameters, (), {**operands, **given})
        return (weights(loss) * loss).sum(), loss

    return function


def detached(tensors):
    return {n: t.detach() for n, t in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_grad_is_what_backward_gives(name, reduction, dtype):
    loss_fn = LOSSES[name](reduction=reduction)
    operands = detached(vectors(dtype=dtype))
    loss, gradients = by_backward(loss_fn, operands, {})
    inputs = operands | detached(dict(loss_fn.named_parameters()))
    got, (_, got_loss) = grad_and_value(pure(loss_fn, {}), has_aux=True)(inputs)
    assert torch.equal(got_loss, loss)
    assert got.keys() == gradients.keys()
    for n, gradient in gradients.items():
        assert got[n].dtype == gradient.dtype
        assert torch.equal(got[n], gradient), n


@pytest.mark.parametrize("names", DATA.values(), ids=DATA)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_grad_with_data(reduction, names):
    loss_fn = InfoNCELoss(0.5, reduction=reduction)
    operands, given = detached(vectors()), data(*names)
    if "target" in given:
        given |= {"ids": torch.arange(len(operands["query"]))}
    _, gradients = by_backward(loss_fn, operands, given)
    got, _ = grad(pure(loss_fn, given), has_aux=True)(operands)
    for n, gradient in gradients.items():
        assert torch.equal(got[n], gradient), n


@pytest.mark.parametrize("operand", ["query", "key", "negatives"])
@pytest.mark.parametrize("loss", [InfoNCELoss, SigmoidContrastiveLoss])
def test_grad_of_one_operand_alone(loss, operand):
    operands = detached(vectors())
    _, gradients = by_backward(loss(), operands, {})
    got = grad(lambda x: loss()(**{**operands, operand: x}))(operands[operand])
    assert torch.equal(got, gradients[operand])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_vjp_and_jacrev(name, reduction):
    loss_fn = LOSSES[name](reduction=reduction)
    operands = detached(vectors())
    loss, gradients = by_backward(loss_fn, operands, {})

    def of_query(query):
        return loss_fn(**{**operands, "query": query})

    value, pull = vjp(of_query, operands["query"])
    assert torch.equal(value, loss)
    assert torch.equal(pull(weights(loss))[0], gradients["query"])
    jacobian = jacrev(of_query)(operands["query"])
    assert jacobian.shape == loss.shape + operands["query"].shape
    torch.testing.assert_close(torch.tensordot(weights(loss), jacobian, loss.dim()), gradients["query"])


TAKE_IDS_ALONE = ("symmetric", "debiased", "siglip")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in LOSSES for kind in DATA if kind in ("nothing", "ids") or name not in TAKE_IDS_ALONE],
)
def test_vmap_is_a_loop(name, kind, reduction):
    options, names = {"in_batch": name != "out of batch"}, DATA[kind]
    loss_fn = LOSSES[name](reduction=reduction)
    batches = [detached(vectors()) for _ in range(N)]
    given = [data(*names, **options) for _ in range(N)]
    looped = [by_backward(loss_fn, *batch) for batch in zip(batches, given, strict=True)]
    parameters = detached(dict(loss_fn.named_parameters()))
    stacked = {n: torch.stack([b[n] for b in batches]) for n in batches[0]}
    stacked_given = {n: torch.stack([g[n] for g in given]) for n in given[0]}

    losses = vmap(lambda operands, given: loss_fn(**operands, **given))(stacked, stacked_given)
    assert torch.equal(losses, torch.stack([loss for loss, _ in looped]))

    def of_batch(operands, given):
        return grad(pure(loss_fn, given), has_aux=True)(operands | parameters)[0]

    got = vmap(of_batch)(stacked, stacked_given)
    for n in got:
        assert torch.equal(got[n], torch.stack([gradients[n] for _, gradients in looped])), n


@pytest.mark.parametrize("in_dims", [d for d in itertools.product((None, 0, 1), repeat=3) if d != (None,) * 3])
def test_vmap_over_any_dimension_of_some_operands(in_dims):
    operands = [t.detach() for t in vectors().values()]
    given = [t if dim is None else torch.stack([t, 2 * t], dim) for t, dim in zip(operands, in_dims, strict=True)]
    loss_fn = InfoNCELoss(0.5)

    def function(query, key, negatives):
        return loss_fn(query, key, negatives=negatives)

    each = zip(*([t, t] if dim is None else [t, 2 * t] for t, dim in zip(operands, in_dims, strict=True)), strict=True)
    assert torch.equal(vmap(function, in_dims)(*given), torch.stack([function(*one) for one in each]))


def test_vmap_inside_vmap_and_backward_through_it():
    operands = {n: torch.stack([torch.stack([t, 2 * t])] * N).detach() for n, t in vectors().items()}
    leaves = {n: t.requires_grad_() for n, t in operands.items()}
    loss_fn = InfoNCELoss(0.5)

    def function(query, key, negatives):
        return loss_fn(query, key, negatives=negatives)

    losses = vmap(vmap(function))(*leaves.values())
    looped = torch.stack([torch.stack([function(*(t[i, j] for t in leaves.values())) for j in range(2)])
                          for i in range(N)])  # fmt: skip
    assert torch.equal(losses, looped)
    for got, want in zip(
        torch.autograd.grad(losses.sum(), leaves.values()),
        torch.autograd.grad(looped.sum(), leaves.values()),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["info nce", "learned", "debiased", "siglip"])
def test_differentiating_twice_is_refused(name, reduction):
    """Whichever transform asks for it, and whichever of the operands the second derivative is of."""
    loss_fn, operands = LOSSES[name](reduction=reduction), detached(vectors())
    query, key = operands["query"], operands["key"]

    def total(query, key=key):
        return loss_fn(query, key, negatives=operands["negatives"]).sum()

    twice = [
        lambda: grad(lambda q: grad(total)(q).sum())(query),
        lambda: grad(lambda k: grad(total)(query, k).sum())(key),
        lambda: jacrev(jacrev(total))(query),
        lambda: grad(total)(query.clone().requires_grad_()).sum().backward(),
        lambda: vmap(grad(lambda q: grad(total)(q).sum()))(query.expand(N, *query.shape)),
    ]
    for function in twice:
        with pytest.raises(RuntimeError, match="contrastive losses cannot be differentiated twice"):
            function()


def test_values_are_checked_under_grad_and_not_under_vmap():
    operands = detached(vectors())
    log_q = {"log_q": torch.zeros(9), "negative_log_q": torch.full((5,), float("nan"))}
    with pytest.raises(ValueError, match="negative_log_q must be finite, got nan"):
        grad(lambda q: InfoNCELoss()(**{**operands, "query": q}, **log_q))(operands["query"])
    loss = vmap(lambda q: InfoNCELoss()(**{**operands, "query": q}, **log_q))(operands["query"][None])
    assert loss.isnan().all()


@pytest.mark.parametrize("in_batch", [True, False])
def test_the_bound_under_vmap(in_batch):
    loss_fn = InfoNCELoss(0.5, in_batch=in_batch)
    operands = {n: torch.stack([t, 2 * t]).detach() for n, t in vectors().items()}
    bounds = vmap(lambda o: loss_fn.mutual_information_bound(**o))(operands)
    looped = [loss_fn.mutual_information_bound(**{n: t[i] for n, t in operands.items()}) for i in range(2)]
    torch.testing.assert_close(bounds, torch.stack(looped))
