"""Shared negatives under torch.compile with fullgraph=True, and under autocast."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, leaf
from objective_cases import loss, run
from test_shared_negatives import PARTS, case_of

import nce_ext
from nce_ext import noise as noises
from nce_ext._sampled import shared


@pytest.mark.parametrize("name", ["nce", "adversarial", "smoothed"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("works", [False, True])
def test_autocast_changes_nothing(name, reduction, works, monkeypatch, native):
    """Neither in the forward pass nor, where the backward pass is under it too, there."""
    monkeypatch.setattr(shared, "_one_dnn_works", lambda: works)
    case = case_of(name, dtype=torch.float32, options={"shared": True, "reduction": reduction})
    plain = run(name, case, "fused")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(name, case, "fused")
        leaves = [leaf(t) for t in (case.hidden, case.weight, case.bias)]
        value = loss(name, *leaves, case, backend="fused").sum()
    value.backward()
    for part, tensor in zip(PARTS[1:], leaves, strict=True):
        assert torch.equal(getattr(inside, part), getattr(plain, part))
        assert torch.equal(tensor.grad, getattr(plain, part))
    assert torch.equal(inside.loss, plain.loss)


# torch.compile
@pytest.fixture
def clean_dynamo(known_state):
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


MODULES = {
    "nce": (nce_ext.NCELoss, {"shared": True}),
    "nce, one loss each": (nce_ext.NCELoss, {"shared": True, "reduction": "none", "log_z": "learned"}),
    "adversarial": (nce_ext.NegativeSamplingLoss, {"shared": True, "adversarial_temperature": 1.0}),
    "softmax": (nce_ext.SampledSoftmaxLoss, {"shared": True}),
    "unique softmax": (nce_ext.SampledSoftmaxLoss, {"unique": True, "label_smoothing": 0.1}),
    "sparse softmax": (nce_ext.SampledSoftmaxLoss, {"shared": True, "sparse": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_a_compiled_loss_equals_the_eager_one(name, clean_dynamo, native):
    """In one graph that serves the second batch as well."""
    module, options = MODULES[name]
    loss_fn = module(12, 300, noises.Unigram(torch.rand(300)), 6, backend="fused", **options)
    graphs = []

    def compiler(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    def step(hidden, target, seed):
        return loss_fn(torch.tanh(hidden), target, seed=seed).sum()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for batch in range(2):
        hidden, target = torch.randn(9, 12, requires_grad=True), torch.randint(300, (9,))
        inputs, seed = [hidden, *loss_fn.parameters()], torch.tensor([batch, 6])
        eager, got = step(hidden, target, seed), compiled(hidden, target, seed)
        torch.testing.assert_close(got, eager)
        for one, other in zip(*(torch.autograd.grad(value, inputs) for value in (got, eager)), strict=True):
            assert one.layout == other.layout
            torch.testing.assert_close(one.to_dense(), other.to_dense())
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["nce", "softmax", "adversarial"])
def test_bad_negatives_are_refused_in_a_compiled_graph(name, clean_dynamo, native):
    """Ids and log q are not looked at while tracing; the operator does when it runs."""
    case = Case(classes=10, options={"correction": "log_q"})
    case.noise = noises.Unigram([1] * 9 + [0])
    case.target %= 9

    def step(hidden, weight, negatives, log_q):
        return loss(name, hidden, weight, None, case, negatives=negatives, log_q=log_q, backend="fused")

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    good, of_target, log_q = torch.tensor([0, 1, 3]), torch.zeros(7), torch.zeros(3)
    assert torch.isfinite(compiled(case.hidden, case.weight, good, (of_target, log_q)))
    for bad in (10, -1, 2**40):
        with pytest.raises((ValueError, RuntimeError), match="negatives must be"):
            compiled(case.hidden, case.weight, torch.tensor([0, bad, 3]), (of_target, log_q))
    for bad in (math.nan, -math.inf, math.inf):
        with pytest.raises((ValueError, RuntimeError), match="negatives must be"):
            compiled(case.hidden, case.weight, good, (of_target, torch.tensor([0, bad, 0])))
    with pytest.raises((ValueError, RuntimeError), match="negatives must be"):
        torch.compile(step, fullgraph=True, backend="eager")(case.hidden, case.weight, torch.tensor([0, 9, 3]), None)
