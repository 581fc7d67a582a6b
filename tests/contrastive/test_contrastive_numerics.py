"""What the contrastive losses promise of memory, precision, masks, autograd, autocast, compilation and devices."""

from __future__ import annotations

import math

import pytest
import torch
from contrastive_cases import vectors
from contrastive_oracle import pairwise
from tolerances import as_float64, assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nce_ext.contrastive import InfoNCELoss, SigmoidContrastiveLoss, arguments

HALVES = [torch.bfloat16, torch.float16]
LOSSES = {
    "info nce": lambda **o: InfoNCELoss(0.2, **o),
    "symmetric": lambda **o: InfoNCELoss(0.2, symmetric=True, **o),
    "debiased": lambda **o: InfoNCELoss(0.2, debias=0.1, normalize=True, **o),
    "learned": lambda **o: InfoNCELoss(0.2, learn_temperature=True, **o),
    "siglip": lambda **o: SigmoidContrastiveLoss(**o),
}


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_no_tensor_is_larger_than_a_chunk(name, reduction):
    batch, dim, extra, max_logits = 700, 3, 200, 20_000
    operands = vectors(batch, dim, extra, dtype=torch.float32)
    given = {"ids": torch.randint(300, (batch,)), "negative_ids": torch.randint(300, (extra,))}
    with Largest() as seen:
        loss = LOSSES[name](reduction=reduction, max_logits=max_logits)(**operands, **given)
        loss.backward(torch.ones_like(loss))
    assert (batch + extra) * dim <= seen.elements <= max_logits < batch * (batch + extra) / 30
    with Largest() as seen:
        loss = LOSSES[name](reduction=reduction)(**operands, **given)
    assert seen.elements == batch * (batch + extra), "the measure sees what it should"


def test_what_is_saved_is_of_the_operands_size():
    saved = []
    operands = vectors(300, 3, 50, dtype=torch.float32)
    for reduction in ("sum", "none"):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            InfoNCELoss(reduction=reduction, max_logits=2**20)(**operands)
        assert max(saved) <= 350 * 3


def test_soft_labels_are_read_in_chunks():
    batch, max_logits = 500, 20_000
    operands, target = vectors(batch, 3, None, dtype=torch.float32), torch.rand(batch, batch)
    with Largest() as seen:
        InfoNCELoss(max_logits=max_logits)(**operands, target=target).backward()
        InfoNCELoss(max_logits=max_logits).mutual_information_bound(**operands)
    assert seen.elements <= max_logits


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
def test_everything_masked(name, dtype, scale):
    """Equal ids everywhere: InfoNCE has nothing to tell apart, so loss and gradient are exactly 0."""
    for reduction in ("mean", "none"):
        operands = vectors(5, 4, 3, dtype=dtype, scale=scale)
        given = {"ids": torch.zeros(5, dtype=torch.int64), "negative_ids": torch.zeros(3, dtype=torch.int64)}
        loss = LOSSES[name](reduction=reduction)(**operands, **given)
        gradients = torch.autograd.grad(loss, operands.values(), torch.ones_like(loss))
        if name == "siglip":
            assert torch.isfinite(loss).all()
            assert all(torch.isfinite(g).all() for g in gradients)
        else:
            assert (loss == 0).all()
            assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_mask_pattern_is_finite(name, dtype):
    """All 2^6 patterns of three rows' ids and three negatives' mask, among large and small vectors."""
    operands = vectors(3, 4, 3, dtype=dtype)
    with torch.no_grad():
        operands["query"][0] *= 300
        operands["key"][1] = 0
        operands["negatives"][2] *= 300
    for bits in range(64):
        pattern = [bool(bits >> i & 1) for i in range(6)]
        ids = torch.tensor([0 if same else 10 + i for i, same in enumerate(pattern[:3])])
        mask = torch.tensor(pattern[3:])
        for reduction in ("sum", "none"):
            loss = LOSSES[name](reduction=reduction)(
                **operands, ids=ids, negative_ids=torch.tensor([0, 10, 99]), negative_mask=mask
            )
            assert torch.isfinite(loss).all()
            for gradient in torch.autograd.grad(loss, operands.values(), torch.ones_like(loss)):
                assert torch.isfinite(gradient).all(), (bits, reduction)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("debias", [0.0, 0.05, 0.8])
def test_small_temperatures_do_not_overflow(debias, dtype):
    """e^(1 / T) is 1e108 here: the published program on raw exponentials is inf / inf in every dtype but float64."""
    operands = {name: torch.nn.functional.normalize(value.detach(), dim=1).requires_grad_()
                for name, value in vectors(12, 4, 6, dtype=dtype).items()}  # fmt: skip
    with torch.no_grad():
        operands["query"][:4] = operands["key"][:4]
        operands["query"][4:6] = -operands["key"][4:6]
    loss_fn = InfoNCELoss(0.004, debias=debias, reduction="none")
    truth = pairwise(**{n: as_float64(v) for n, v in operands.items()}, scale=1 / 0.004, debias=debias)
    loss = loss_fn(**operands)
    assert_close(loss, truth.loss, torch.float32, "loss", truth.loss_scale)
    gradients = torch.autograd.grad(loss.sum(), operands.values())
    for name, gradient in zip(operands, gradients, strict=True):
        assert_close(gradient, truth.gradients[name], dtype, name, truth.scales[name])


def test_a_floor_far_above_all_logits():
    """Vectors longer than 1 in opposite directions: e^149 would be infinite in float32."""
    query = torch.tensor([[10.0, 1.0], [9.0, -1.0]], requires_grad=True)
    key = torch.tensor([[-15.0, 1.0], [-16.0, 2.0]])
    loss_fn = InfoNCELoss(1.0, debias=0.1, learn_temperature=True, reduction="none")
    truth = pairwise(as_float64(query), as_float64(key), debias=0.1)
    loss = loss_fn(query, key)
    assert_close(loss, truth.loss, torch.float32, "loss", truth.loss_scale)
    of_query, of_scale = torch.autograd.grad(loss.sum(), (query, loss_fn.logit_scale))
    assert_close(of_query, truth.gradients["query"], torch.float32, "query", truth.scales["query"])
    assert_close(of_scale, truth.gradients["scale"], torch.float32, "scale", truth.scales["scale"])


def test_a_tiny_loss_keeps_its_digits():
    """log(1 + 1e-20) is 0 in float32, and the loss of a row that is nearly certain is not."""
    query = torch.eye(2, dtype=torch.float32).mul_(46.0).requires_grad_()
    loss = InfoNCELoss(1.0)(query, torch.eye(2))
    assert loss.item() == pytest.approx(math.exp(-46), rel=1e-5)
    loss.backward()
    assert query.grad[0, 0].item() == pytest.approx(-math.exp(-46) / 2, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_normalizing_any_length(dtype):
    """Rows of zeros stay and get no gradient; squares that would overflow or vanish do neither."""
    tiny, huge = {torch.float16: (1e-6, 6e4)}.get(dtype, (1e-30, 1e30))
    base = vectors(4, 5, None, dtype=torch.float64)
    loss_fn = InfoNCELoss(0.2, normalize=True)
    query = base["query"].detach() * torch.tensor([1.0, tiny, 0.0, huge])[:, None] / 4
    query, key = query.to(dtype).requires_grad_(), base["key"].detach().to(dtype).requires_grad_()
    loss = loss_fn(query, key)
    loss.backward()
    truth = query.detach().double()
    truth = truth / truth.norm(dim=1, keepdim=True).clamp_min(1e-300)
    unit_key = torch.nn.functional.normalize(key.detach().double(), dim=1)
    want = torch.nn.functional.cross_entropy(truth @ unit_key.T / 0.2, torch.arange(4))
    assert loss.item() == pytest.approx(want.item(), rel=1e-6 if dtype != torch.float64 else 1e-13)
    assert not query.grad.isnan().any()
    assert not key.grad.isnan().any()
    assert (query.grad[2] == 0).all()
    assert torch.isfinite(query.grad[[0, 2, 3]]).all()


@pytest.mark.parametrize("name", LOSSES)
def test_empty_batches(name):
    for extra in (None, 0, 3):
        operands = vectors(0, 4, extra, dtype=torch.float32)
        for reduction in ("mean", "sum", "none"):
            loss_fn = LOSSES[name](reduction=reduction)
            loss = loss_fn(**operands)
            assert loss.shape == ((0,) if reduction == "none" else ())
            assert (loss == 0).all()
            leaves = [*operands.values(), *loss_fn.parameters()]
            for gradient in torch.autograd.grad(loss, leaves, torch.ones_like(loss)):
                assert (gradient == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_but_not_of_itself(name, reduction):
    operands = vectors(dtype=torch.float32)
    loss = LOSSES[name](reduction=reduction)(**operands).sum()
    first = torch.autograd.grad(loss, operands.values(), retain_graph=True)
    for got, want in zip(torch.autograd.grad(loss, operands.values(), retain_graph=True), first, strict=True):
        assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="contrastive losses cannot be differentiated twice"):
        torch.autograd.grad(loss, operands.values(), create_graph=True)


def test_without_gradients_the_loss_is_the_same():
    operands = vectors(dtype=torch.float32)
    loss_fn = InfoNCELoss()
    with torch.no_grad():
        loss = loss_fn(**operands)
    assert not loss.requires_grad
    assert torch.equal(loss, loss_fn(**operands).detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name, reduction):
    operands = vectors(dtype=torch.float32)
    loss_fn = LOSSES[name](reduction=reduction)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_fn(**operands)
            results.append([loss.detach(), *torch.autograd.grad(loss, operands.values(), torch.ones_like(loss))])
    for got, want in zip(results[1], results[0], strict=True):
        assert got.dtype == want.dtype == torch.float32
        assert torch.equal(got, want)


def test_values_that_cannot_be_checked(monkeypatch):
    """As on CUDA, where looking would wait: NaN where the loss has no meaning, and no gradient from there."""
    monkeypatch.setattr(arguments, "check_values", lambda *a: None)
    operands = vectors(6, 4, 3)
    leaves = list(operands.values())
    for reduction in ("sum", "none"):
        loss_fn = InfoNCELoss(reduction=reduction)
        for value in (math.inf, -math.inf, math.nan):
            log_q = torch.zeros(6)
            log_q[2] = value
            loss = loss_fn(**operands, log_q=log_q, negative_log_q=torch.zeros(3))
            assert loss.isnan().all()
            assert all((g == 0).all() for g in torch.autograd.grad(loss.sum(), leaves))
        target = torch.rand(6, 9)
        target[1, 4], target[3, 3], target[4, 7] = -1, math.nan, math.inf
        ids = torch.tensor([0, 1, 2, 3, 4, 0])  # rows 0 and 5 have labels for each other, which ids forbid
        loss = loss_fn(**operands, target=target, ids=ids)
        gradients = torch.autograd.grad(loss.sum(), leaves)
        assert all(torch.isfinite(g).all() for g in gradients)
        assert [bool((g == 0).all()) for g in gradients[0]] == [True, True, False, True, True, True]
        if reduction == "none":
            assert loss.isnan().tolist() == [True, True, False, True, True, True]
            assert loss[2] == InfoNCELoss(reduction="none")(**operands, target=target.nan_to_num(0, 0).abs())[2]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_waits_for_the_device(name, reduction):
    """On the meta device a tensor has no values, and whatever asks for one raises."""
    operands = {n: torch.empty_like(t, device="meta", requires_grad=True) for n, t in vectors().items()}
    ids = torch.empty(9, dtype=torch.int64, device="meta")
    given = {"ids": ids, "negative_ids": ids[:5], "negative_mask": ids[:5] > 0}
    if name in ("info nce", "learned"):
        given |= {"log_q": ids.float(), "negative_log_q": ids[:5].float(), "target": torch.empty(9, 14, device="meta")}
    loss = LOSSES[name](reduction=reduction, max_logits=30, device="meta")(**operands, **given)
    loss.backward(torch.ones_like(loss))
    assert all(t.grad.shape == t.shape for t in operands.values())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_gpu_gives_what_the_cpu_gives(name, reduction, cuda):
    operands = vectors(40, 12, 30)
    ids = {"ids": torch.randint(9, (40,)), "negative_ids": torch.randint(9, (30,))}
    loss_fn = LOSSES[name](reduction=reduction, max_logits=500)
    loss = loss_fn(**operands, **ids)
    want = [loss.detach(), *torch.autograd.grad(loss, operands.values(), torch.ones_like(loss))]
    there = {n: t.detach().to(cuda).requires_grad_() for n, t in operands.items()}
    loss = loss_fn.to(cuda)(**there, **{n: t.to(cuda) for n, t in ids.items()})
    got = [loss.detach(), *torch.autograd.grad(loss, there.values(), torch.ones_like(loss))]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("compiler", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_whole(name, compiler, reduction):
    torch.compiler.reset()
    trunk, loss_fn = torch.nn.Linear(7, 7), LOSSES[name](reduction=reduction, max_logits=60)
    operands = vectors(dtype=torch.float32)
    ids = torch.randint(6, (9,))

    def step(query, key, negatives):
        return loss_fn(trunk(query), trunk(key), negatives=negatives, ids=ids)

    leaves = [*operands.values(), *trunk.parameters(), *loss_fn.parameters()]
    want = step(**operands)
    upstream = torch.rand_like(want)
    gradients = torch.autograd.grad(want, leaves, upstream)
    got = torch.compile(step, fullgraph=True, backend=compiler)(**operands)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), gradients, strict=True):
        torch.testing.assert_close(a, b)
