"""evaluate.diagnose: every number against numpy written from its definition, and that it changes nothing."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from allocations import Allocations
from refusals import assert_tested, messages

import nce_ext
from nce_ext import evaluate
from nce_ext import noise as noises
from nce_ext.evaluate import diagnosis as _diagnosis

V, D, N, K = 11, 3, 6, 4
F64 = torch.float64
COUNTS = 1.0 / np.arange(1, V + 1)


def make(cls, *, classes=V, k=K, dtype=F64, noise=None, **options):
    """A layer far from its start."""
    noise = noises.Unigram(1.0 / np.arange(1, classes + 1), 1.0) if noise is None else noise
    loss_fn = cls(D, classes, noise, k, dtype=dtype, **{"backend": "reference", **options})
    with torch.no_grad():
        for parameter in loss_fn.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=F64))
    return loss_fn


def examples(n=N, dtype=F64):
    return torch.randn(n, D, dtype=dtype), torch.randint(V, (n,))


def softmax(z):
    p = np.exp(z - z.max())
    return p / p.sum()


# What of a loss is written down here once more: z -> (loss, d loss / d z), the targets' columns first.
def binary(z, labels):
    loss = (np.logaddexp(0, z) - labels * z).sum()
    return loss, 1 / (1 + np.exp(-z)) - labels


def softmax_cross_entropy(z, labels):
    return labels.sum() * np.logaddexp.reduce(z) - labels @ z, labels.sum() * softmax(z) - labels


CASES = {
    "NCE": (nce_ext.NCELoss, {}),
    "NCE of a learned log Z, sparse": (nce_ext.NCELoss, {"log_z": "learned", "sparse": True}),
    "negative sampling, summed": (nce_ext.NegativeSamplingLoss, {"reduction": "sum"}),
    "sampled softmax": (nce_ext.SampledSoftmaxLoss, {}),
    "sampled softmax with hits, shared": (nce_ext.SampledSoftmaxLoss, {"remove_hits": False, "shared": True}),
    "sampled softmax, each": (nce_ext.SampledSoftmaxLoss, {"reduction": "none", "positive_label": "one"}),
    "sampled softmax of distinct ids": (nce_ext.SampledSoftmaxLoss, {"unique": True}),
    "sampled softmax of TensorFlow": (nce_ext.SampledSoftmaxLoss, {"unique": "tf"}),
    "sampled softmax, corrected": (nce_ext.SampledSoftmaxLoss, {"correct_positive": False}),
}


def drawn(loss_fn, batch, seed, draw):
    """Ids [batch, k'], and the expected count of every class among an example's."""
    q, seed = COUNTS / COUNTS.sum(), torch.tensor([seed, draw])
    if loss_fn.unique == "tf":
        ids, trials = loss_fn.noise.sample_distinct(K, seed=seed)
        count = K * q if trials == K else 1 - (1 - q) ** int(trials)
        return np.broadcast_to(ids.numpy(), (batch, K)), count
    ids = loss_fn.noise.sample((1 if loss_fn.shared or loss_fn.unique else batch, K), seed=seed).numpy()
    if loss_fn.unique:
        ids = np.unique(ids)[None]
    return np.broadcast_to(ids, (batch, ids.shape[1])), 1 - (1 - q) ** K if loss_fn.unique else K * q


def brute_force(loss_fn, hidden, target, draws, seed):
    """The fields of a Diagnosis, from loops over examples and draws; hidden [N, D], target [N, T]."""
    x, w, b = (t.detach().numpy() for t in (hidden, loss_fn.weight, loss_fn.bias))
    soft, corrected = isinstance(loss_fn, nce_ext.SampledSoftmaxLoss), getattr(loss_fn, "correct_positive", True)
    used = [i for i in range(len(x)) if (target[i] >= 0).any()]
    s = x @ w.T + b
    log_z = np.log(np.exp(s).sum(1))
    exact, exact_x, exact_w = 0.0, np.zeros_like(x), np.zeros_like(w)
    losses, by_x, by_w = np.zeros(draws), np.zeros((draws, *x.shape)), np.zeros((draws, *w.shape))
    sizes, hits, numbers, expected, expected_numbers, offset = [], 0, 0, 0.0, 0.0, 0.0
    for i in used:
        classes = [int(c) for c in target[i] if c >= 0]
        label = 1 / len(classes) if loss_fn.positive_label == "uniform" else 1.0
        slope = label * len(classes) * np.exp(s[i] - log_z[i])
        for c in classes:
            slope[c] -= label
            exact += label * (log_z[i] - s[i, c]) / len(used)
        exact_x[i] = slope @ w / len(used)
        exact_w += np.outer(slope, x[i]) / len(used)
        for d in range(draws):
            ids, count = drawn(loss_fn, len(x), seed, d)
            ids = ids[i]
            weights = np.exp(s[i, ids]) / count[ids]
            sizes.append(weights.sum() ** 2 / (weights**2).sum())
            hits, numbers = hits + np.isin(ids, classes).sum(), numbers + len(ids)
            expected += sum(count[c] for c in set(classes))
            expected_numbers += count.sum() if loss_fn.unique is True else K
            kept = ids[~np.isin(ids, classes)] if loss_fn.remove_hits else ids
            columns = np.array(classes + list(kept))
            labels = np.array([label] * len(classes) + [0.0] * len(kept))
            subtracted = np.log(count[columns]) * (loss_fn.correction != "none")
            if not corrected:
                q = count / K
                subtracted = np.log(np.append(1.0, len(kept) * q[kept] / (1 - q[classes[0]])))
            if soft:
                offset += labels @ subtracted / len(used) / draws
            z = s[i, columns] - subtracted - float(getattr(loss_fn, "log_z", 0.0))
            loss, slopes = (softmax_cross_entropy if soft else binary)(z, labels)
            losses[d] += loss / len(used)
            by_x[d, i] = slopes @ w[columns] / len(used)
            np.add.at(by_w[d], columns, np.outer(slopes, x[i]) / len(used))

    def error(samples, exact):
        mean, norm = samples.mean(0), np.linalg.norm(exact)
        spread = math.sqrt(samples.var(0, ddof=1).sum()) / norm
        cosine = (mean * exact).sum() / np.linalg.norm(mean) / norm
        return evaluate.GradientError(cosine, np.linalg.norm(mean - exact) / norm, spread / math.sqrt(draws), spread)

    offset = offset if soft else math.nan
    return evaluate.Diagnosis(
        n_examples=len(used), n_classes=len(w), num_negatives=K, draws=draws, exact_loss=exact,
        sampled_loss=losses.mean(), loss_offset=offset, loss_bias=losses.mean() - offset - exact,
        loss_std=losses.std(ddof=1), loss_standard_error=losses.std(ddof=1) / math.sqrt(draws),
        hidden_gradient=error(by_x, exact_x), weight_gradient=error(by_w, exact_w),
        effective_sample_size=np.mean(sizes), hit_rate=hits / numbers,
        expected_hit_rate=expected / expected_numbers,
        log_z_mean=log_z[used].mean(), log_z_std=log_z[used].std(),
    )  # fmt: skip


def flat(diagnosis):
    return np.array([x for field in diagnosis for x in (field if isinstance(field, tuple) else (field,))], np.float64)


@pytest.mark.parametrize(
    ("name", "targets"),
    [(name, "one") for name in CASES] + [(name, "several") for name in CASES if name != "sampled softmax, corrected"],
)
def test_every_field(name, targets, backend):
    cls, options = CASES[name]
    loss_fn = make(cls, backend=backend, **options)
    hidden, target = examples()
    target[2] = -100
    if targets == "several":
        target = torch.stack([target, torch.randint(V, (N,)), torch.randint(V, (N,))], 1)
        target[2] = target[4, 1] = -100
        target[0, 1] = target[0, 0]  # twice the same
    wanted = brute_force(loss_fn, hidden, target.reshape(N, -1).numpy(), draws=7, seed=5)
    got = evaluate.diagnose(loss_fn, hidden, target, draws=7, seed=5)
    assert got.n_examples == N - 1
    # log q is kept in float32.
    np.testing.assert_allclose(flat(got), flat(wanted), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("max_logits", [1, 2 * N, 5 * V])
def test_chunks_and_leading_shapes_change_nothing(name, max_logits):
    cls, options = CASES[name]
    loss_fn = make(cls, **options)
    hidden, target = examples()
    wanted = evaluate.diagnose(loss_fn, hidden, target, draws=3)
    got = evaluate.diagnose(loss_fn, hidden.view(2, 3, D), target.view(2, 3), draws=3, max_logits=max_logits)
    np.testing.assert_allclose(flat(got), flat(wanted), rtol=1e-12)


@pytest.mark.parametrize("name", [name for name, (_, options) in CASES.items() if "sparse" not in options])
def test_the_logits_are_never_held_at_once(name):
    cls, options = CASES[name]
    n, classes, max_logits = 400, 2000, 2**13
    loss_fn = make(cls, classes=classes, **options)
    with Allocations() as made:
        evaluate.diagnose(loss_fn, *examples(n), draws=2, max_logits=max_logits)
    assert made.largest <= max(max_logits, classes * D, n * (K + 1) * D, 8 * n * K)


@pytest.mark.parametrize("options", [{"correct_positive": False}, {"remove_hits": False}, {"unique": True}])
def test_the_bias_of_sampled_softmax_vanishes_as_k_grows(options):
    noise = noises.Uniform(V) if "unique" in options else None
    hidden, target = examples()
    results = []
    for k in (2, 30, 450):
        torch.manual_seed(4)
        loss_fn = make(nce_ext.SampledSoftmaxLoss, k=k, noise=noise, **options)
        results.append(evaluate.diagnose(loss_fn, hidden, target, draws=100))
    first, second, last = (abs(result.loss_bias) for result in results)
    assert first > 3 * second > 9 * last
    assert last < 4 * results[2].loss_standard_error
    for error in (results[2].hidden_gradient, results[2].weight_gradient):
        assert error.cosine > 0.9995
        assert error.relative_error < 3 * error.standard_error + 1e-12
    assert results[0].hidden_gradient.relative_error > 0.2


def test_many_draws_without_their_hits_leave_the_target_out_of_z():
    """With k q of a target far above 1 its column stands for more than its share: the loss tends to
    log(Z - e^s) - s + log(k q), whose gradient is another. It is what the diagnosis is for."""
    loss_fn = make(nce_ext.SampledSoftmaxLoss, k=2000, remove_hits=True)
    hidden, target = examples()
    got = evaluate.diagnose(loss_fn, hidden, target, draws=20)
    log_p = loss_fn.log_prob(hidden).gather(1, target[:, None])
    assert got.loss_bias == pytest.approx(float(torch.log1p(-log_p.exp()).mean()), abs=0.02)
    assert got.hidden_gradient.relative_error > 10 * got.hidden_gradient.standard_error


def test_all_classes_as_distinct_negatives_are_the_full_softmax():
    """k draws so many that all classes are among them for sure: loss, gradients and hits are exact, nothing varies."""
    loss_fn = make(nce_ext.SampledSoftmaxLoss, k=3000, unique=True, noise=noises.Uniform(V))
    got = evaluate.diagnose(loss_fn, *examples(), draws=3)
    assert got.loss_bias == pytest.approx(0, abs=1e-6)
    assert got.loss_offset == pytest.approx(0, abs=1e-6)
    assert got.loss_std < 1e-7
    for error in (got.hidden_gradient, got.weight_gradient):
        assert error.cosine == pytest.approx(1, abs=1e-9)
        assert max(error.relative_error, error.spread) < 1e-6
    assert got.hit_rate == pytest.approx(1 / V)
    assert got.expected_hit_rate == pytest.approx(1 / V)


def test_the_gradient_of_nce_tends_to_maximum_likelihood():
    """At a normalised model with many noise samples, and only there."""
    errors = []
    for shift in (0.0, 1.0):
        loss_fn, (hidden, target) = make(nce_ext.NCELoss, k=2000), examples()
        with torch.no_grad():
            loss_fn.weight.zero_()
            loss_fn.bias.copy_(torch.log_softmax(loss_fn.bias, 0) + shift)
        got = evaluate.diagnose(loss_fn, hidden, target, draws=50)
        assert got.log_z_mean == pytest.approx(shift, abs=1e-12)
        assert got.log_z_std == pytest.approx(0, abs=1e-12)
        assert math.isnan(got.loss_bias)
        assert math.isnan(got.loss_offset)
        assert math.isnan(got.hidden_gradient.cosine)  # weight is 0, and so are both gradients
        errors.append(got.weight_gradient)
    assert errors[0].relative_error < 0.01 + 2 * errors[0].standard_error
    assert errors[1].relative_error > 0.3


def test_equal_importance_weights_are_worth_k_samples():
    """q proportional to exp(s): every weight is Z."""
    loss_fn = make(nce_ext.NegativeSamplingLoss, correction="log_q")
    with torch.no_grad():
        loss_fn.weight.zero_()
        loss_fn.bias.copy_(loss_fn.noise.log_prob(torch.arange(V)).double() + 2.5)
    got = evaluate.diagnose(loss_fn, *examples())
    assert got.effective_sample_size == pytest.approx(K, rel=1e-12)
    assert got.log_z_mean == pytest.approx(2.5, abs=1e-6)
    uniform = make(nce_ext.NegativeSamplingLoss, noise=noises.Uniform(V), bias=False)
    hidden, target = examples()
    assert evaluate.diagnose(uniform, 0 * hidden, target).effective_sample_size == pytest.approx(K, rel=1e-12)
    assert evaluate.diagnose(uniform, 0 * hidden, target).log_z_mean == pytest.approx(math.log(V), rel=1e-12)


def test_the_hit_rate_is_that_of_the_law():
    loss_fn = make(nce_ext.NCELoss, k=50)
    hidden, target = examples(40)
    got = evaluate.diagnose(loss_fn, hidden, target, draws=50)
    p = got.expected_hit_rate
    assert p == pytest.approx((COUNTS / COUNTS.sum())[target.numpy()].mean(), rel=1e-6)
    assert abs(got.hit_rate - p) < 4.5 * math.sqrt(p * (1 - p) / (50 * 50 * 40))


@pytest.mark.parametrize("sparse", [False, True])
def test_nothing_is_changed(sparse, backend):
    loss_fn = make(nce_ext.NCELoss, dtype=torch.float32, sparse=sparse, log_z="learned", backend=backend)
    loss_fn.bias.requires_grad_(False)
    calls = []
    loss_fn.weight.register_hook(lambda gradient: calls.append("hook"))
    loss_fn.weight.grad = torch.full_like(loss_fn.weight, 7.0)
    hidden, target = examples(dtype=torch.float32)
    hidden.requires_grad_()
    state, options = copy.deepcopy(loss_fn.state_dict()), {k: v for k, v in vars(loss_fn).items() if k[0] != "_"}
    parameters = {name: id(p) for name, p in loss_fn.named_parameters()}
    random_state, inputs = torch.get_rng_state(), (hidden.detach().clone(), target.clone())
    with torch.no_grad():  # as one evaluates
        evaluate.diagnose(loss_fn, hidden, target)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(hidden.detach(), inputs[0])
    assert torch.equal(target, inputs[1])
    assert hidden.grad is None
    assert all(torch.equal(loss_fn.state_dict()[name], value) for name, value in state.items())
    assert {k: v for k, v in vars(loss_fn).items() if k[0] != "_"} == options
    assert {name: id(p) for name, p in loss_fn.named_parameters()} == parameters
    assert [p.requires_grad for p in loss_fn.parameters()] == [True, False, True]
    assert torch.equal(loss_fn.weight.grad, torch.full_like(loss_fn.weight, 7.0))
    assert loss_fn.log_z.grad is None
    assert not calls


def test_a_seed_is_a_result():
    loss_fn = make(nce_ext.SampledSoftmaxLoss)
    hidden, target = examples()
    first = evaluate.diagnose(loss_fn, hidden, target, seed=1)
    assert first == evaluate.diagnose(loss_fn, hidden, target, seed=1)
    assert first.sampled_loss != evaluate.diagnose(loss_fn, hidden, target, seed=2).sampled_loss


def test_low_precision_is_measured_in_float32():
    """Parameters and hidden of bfloat16 are exact numbers: the diagnosis is that of the same numbers in float32."""
    loss_fn = make(nce_ext.SampledSoftmaxLoss, dtype=torch.bfloat16)
    hidden, target = examples(dtype=torch.bfloat16)
    same = copy.deepcopy(loss_fn).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = evaluate.diagnose(loss_fn, hidden, target)
    assert got == evaluate.diagnose(same, hidden.float(), target)


def test_the_table_has_every_number():
    loss_fn = make(nce_ext.SampledSoftmaxLoss)
    got = evaluate.diagnose(loss_fn, *examples())
    lines = str(got).splitlines()
    assert lines[0] == f"32 draws of {K} negatives, {N} examples, {V} classes"
    for value in flat(got)[4:]:
        assert f"{value:.4g}" in str(got).split(), value
    assert {len(line) for line in lines[1:]} <= {20 + 15 * n for n in (2, 4, 5)}
    assert "not comparable" in str(evaluate.diagnose(make(nce_ext.NCELoss), *examples()))
    assert repr(got).startswith("Diagnosis(n_examples=6, ")


HIDDEN, TARGET = torch.zeros(N, D), torch.zeros(N, dtype=torch.int64)


def call(loss_fn=None, hidden=HIDDEN, target=TARGET, **options):
    noise = noises.Uniform(V)
    loss_fn = nce_ext.NCELoss(D, V, noise, K, backend="reference") if loss_fn is None else loss_fn
    return lambda: evaluate.diagnose(loss_fn, hidden, target, **options)


def without_negatives():
    return nce_ext.NegativeSamplingLoss(D, V, noises.Uniform(V), 0)


REFUSALS = {
    "no module": (call(lambda x: x), TypeError, r"loss_fn must be a sampled loss module, got function"),
    "a Linear": (call(torch.nn.Linear(D, V)), TypeError, r"loss_fn must be .* got Linear without noise, num_negatives"),
    "a ReLU": (call(torch.nn.ReLU()), TypeError, r"loss_fn must be .* got ReLU without weight, bias, noise, num_neg"),
    "no negatives": (call(without_negatives()), ValueError, r"num_negatives must be >= 1, got 0"),
    "hidden elsewhere": (call(hidden=HIDDEN.to("meta")), ValueError, r"(weight|noise) must be on hidden's device"),
    "hidden of ints": (call(hidden=HIDDEN.long()), TypeError, r"hidden must be a float32 .* got a int64 tensor"),
    "hidden too wide": (call(hidden=torch.zeros(N, 5)), ValueError, r"hidden must have weight's D = 3 as its last"),
    "hidden in float64": (
        call(hidden=HIDDEN.double()),
        TypeError,
        r"hidden and weight must both be float64 or neither",
    ),
    "target a list": (call(target=[0] * N), TypeError, r"target must be a int64 or int32 tensor, got list"),
    "target of floats": (
        call(target=TARGET.float()),
        TypeError,
        r"target must be a int64 or int32 tensor, got a float",
    ),
    "target too short": (call(target=TARGET[:2]), ValueError, r"target must have shape \[6\] or \[6, 'T'\], got \[2\]"),
    "target too deep": (call(target=TARGET.view(2, 3)), ValueError, r"target must have shape .* got \[2, 3\]"),
    "target above": (call(target=TARGET + V), ValueError, r"target must be in 0 \.\. 10 or ignore_index = -100"),
    "target below": (call(target=TARGET - 1), ValueError, r"target must be in 0 \.\. 10 or ignore_index = -100"),
    "target ignored": (call(target=TARGET - 100), ValueError, r"target must have at least one class .* got none"),
    "no examples": (call(hidden=HIDDEN[:0], target=TARGET[:0]), ValueError, r"target must have at least one .* none"),
    "no targets": (call(target=TARGET.expand(0, N).T), ValueError, r"target must have at least one class .* none"),
    "one draw": (call(draws=1), ValueError, r"draws must be >= 2, got 1"),
    "draws a float": (call(draws=8.0), TypeError, r"draws must be an int, got float 8\.0"),
    "seed a tensor": (call(seed=TARGET[:2]), TypeError, r"seed must be an int, got a int64 tensor of shape \[2\]"),
    "seed too large": (call(seed=2**63), ValueError, r"seed must be in -9223372036854775808 \.\. 92"),
    "max_logits": (call(max_logits=0), ValueError, r"max_logits must be >= 1, got 0"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    function, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        function()


def test_every_refusal_in_the_source_is_tested():
    assert_tested([_diagnosis], messages(REFUSALS))
