"""torch.compile with fullgraph=True of whole training steps, and autocast."""

from __future__ import annotations

import pytest
import torch
from cases import Case, leaf
from torch import nn

import nce_ext
from nce_ext import functional
from nce_ext import noise as noises

V, D, B, K = 300, 12, 9, 6
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def clean_dynamo(known_state):
    """No graph of an earlier test, and no poisoned memory: inductor allocates nothing that it leaves unwritten."""
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function, compiler: str, **options):
    return torch.compile(function, fullgraph=True, backend=compiler, **options)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_compiled_loss_equals_the_eager_one(compiler, sparse, native):
    noise = noises.Unigram(torch.rand(V))
    hidden, target, seed = torch.randn(B, D), torch.randint(V, (B,)), torch.tensor([5, 6])
    loss_fn = nce_ext.NCELoss(D, V, noise, K, sparse=sparse, backend="fused")
    trunk = nn.Linear(D, D)

    def step(hidden, target, seed):
        return loss_fn(torch.tanh(trunk(hidden)), target, seed=seed)

    parameters = [*trunk.parameters(), loss_fn.weight, loss_fn.bias]
    eager = step(hidden, target, seed)
    expected = torch.autograd.grad(eager, parameters)
    loss = compiled(step, compiler)(hidden, target, seed)
    torch.testing.assert_close(loss, eager)
    for got, want in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        assert got.layout == want.layout
        torch.testing.assert_close(got.to_dense(), want.to_dense())


@pytest.mark.parametrize("compiler", COMPILERS)
def test_every_call_draws_new_negatives(compiler, native):
    """Two losses of one step differ, and so do two runs of one graph: no seed is baked in."""
    noise = noises.LogUniform(V)
    hidden, weight, target = torch.randn(B, D), torch.randn(V, D, requires_grad=True), torch.randint(V, (B,))

    def step(hidden, weight, target):
        first = functional.nce_loss(hidden, weight, target, noise, K)
        second = functional.nce_loss(hidden, weight, target, noise, K)
        return first, second

    run = compiled(step, compiler)
    first, second = run(hidden, weight, target)
    third, fourth = run(hidden, weight, target)
    values = {float(loss.detach()) for loss in (first, second, third, fourth)}
    assert len(values) == 4
    (first + second + third + fourth).backward()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dynamic", [None, True])
def test_few_graphs_serve_many_batch_sizes(dynamic, sparse, native):
    """dynamic=True makes one graph at once; by default the second batch size makes the second, general one."""
    noise = noises.Unigram(torch.rand(V))
    loss_fn = nce_ext.NCELoss(D, V, noise, K, sparse=sparse, backend="fused")
    graphs = 0

    def counting(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def step(hidden, target, seed):
        return loss_fn(hidden, target, seed=seed)

    run, count = compiled(step, "aot_eager", dynamic=dynamic), compiled(step, counting, dynamic=dynamic)
    for batch in (9, 5, 64, 3):
        hidden, target, seed = torch.randn(batch, D), torch.randint(V, (batch,)), torch.tensor([batch, 0])
        loss_fn.zero_grad()
        run(hidden, target, seed).backward()
        got = loss_fn.weight.grad.to_dense()
        loss_fn.zero_grad()
        step(hidden, target, seed).backward()
        torch.testing.assert_close(got, loss_fn.weight.grad.to_dense())
        count(hidden, target, seed)
    assert graphs == (1 if dynamic else 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"shared": True},
        {"remove_hits": True, "positive_label": "uniform", "candidate_reduction": "mean", "reduction": "none"},
        {"correction": "none", "reduction": "sum"},
        {"log_z": "learned"},
    ],
    ids=str,
)
def test_options_compile(options, native):
    loss_fn = nce_ext.NCELoss(D, V, noises.Unigram(torch.rand(V)), K, backend="fused", **options)
    hidden, target = torch.randn(4, 3, D, requires_grad=True), torch.randint(V, (4, 3, 2))
    target[0, 0, 1] = -100
    weights, seed = torch.rand(4, 3), torch.tensor([1, 2])

    def step(hidden, target):
        return loss_fn(hidden, target, sample_weight=weights, seed=seed).sum()

    eager = step(hidden, target)
    loss = compiled(step, "aot_eager")(hidden, target)
    torch.testing.assert_close(loss, eager)
    for got, want in zip(
        *(torch.autograd.grad(x, [hidden, *loss_fn.parameters()]) for x in (loss, eager)), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_given_negatives_compile(native):
    loss_fn = nce_ext.NCELoss(D, V, noises.Uniform(V), K, backend="fused")
    hidden, target, negatives = torch.randn(B, D), torch.randint(V, (B,)), torch.randint(V, (B, 4))
    log_q = (-torch.rand(B), -torch.rand(B, 4))

    def step(hidden, target, negatives, log_q):
        return loss_fn(hidden, target, negatives=negatives, log_q=log_q)

    torch.testing.assert_close(
        compiled(step, "aot_eager")(hidden, target, negatives, log_q), step(hidden, target, negatives, log_q)
    )


@pytest.mark.slow
def test_a_bad_id_raises_from_a_compiled_graph(native):
    """Ids are not looked at while tracing; the operator does when it runs."""
    loss_fn = nce_ext.NCELoss(D, V, noises.Unigram([1] * (V - 1) + [0]), K, backend="fused")
    run = compiled(lambda hidden, target: loss_fn(hidden, target), "aot_eager")
    hidden, target = torch.randn(B, D), torch.randint(V - 1, (B,))
    assert torch.isfinite(run(hidden, target))
    before = loss_fn.weight.detach().clone()
    for bad in (V, -1, V - 1):
        target[3] = bad
        with pytest.raises((ValueError, RuntimeError), match=rf"target must be .* got .*{bad}"):
            run(hidden, target)
    assert torch.equal(loss_fn.weight.detach(), before)
    target[3] = 0
    assert torch.isfinite(run(hidden, target))


@pytest.mark.slow
@pytest.mark.parametrize("noise", [noises.Uniform(V), noises.LogUniform(V), noises.Unigram(range(1, V + 1))], ids=str)
def test_noise_compiles(noise, native):
    def draw(seed):
        ids = noise.sample((4, 5), seed=seed)
        return ids, noise.log_prob(ids)

    seed = torch.tensor([3, 4])
    got, expected = compiled(draw, "aot_eager")(seed), draw(seed)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])


@pytest.mark.slow
def test_the_reference_compiles():
    case = Case(lead=(B,))

    def step(hidden, weight, target, seed):
        return functional.nce_loss(hidden, weight, target, case.noise, K, seed=seed, backend="reference")

    hidden, weight = leaf(case.hidden), leaf(case.weight)
    eager = step(hidden, weight, case.target, case.seed)
    loss = compiled(step, "aot_eager")(hidden, weight, case.target, case.seed)
    torch.testing.assert_close(loss, eager)
    for got, want in zip(*(torch.autograd.grad(x, [hidden, weight]) for x in (loss, eager)), strict=True):
        torch.testing.assert_close(got, want)


# Autocast
@pytest.mark.parametrize("sparse", [False, True])
def test_autocast_changes_hidden_and_nothing_else(sparse, backend):
    """bfloat16 hidden from an autocast layer, float32 table: the loss is float32 arithmetic on these operands."""
    case = Case(lead=(20,), dim=32, options={"sparse": sparse})
    trunk = nn.Linear(32, 32)
    weight, bias = leaf(case.weight), leaf(case.bias)

    def loss_of(hidden):
        return functional.nce_loss(
            hidden, weight, case.target, case.noise, 5, bias=bias, seed=case.seed, sparse=sparse, backend=backend
        )

    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = trunk(case.hidden)
        hidden.retain_grad()
        loss = loss_of(hidden)
    assert hidden.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    inside = [hidden.grad, weight.grad.to_dense(), bias.grad.to_dense()]
    assert [g.dtype for g in inside] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(p.grad.dtype == torch.float32 for p in trunk.parameters())

    weight.grad = bias.grad = None
    separate = leaf(hidden)
    outside = loss_of(separate)
    outside.backward()
    assert torch.equal(loss.detach(), outside.detach())
    for got, want in zip(inside, [separate.grad, weight.grad.to_dense(), bias.grad.to_dense()], strict=True):
        assert torch.equal(got, want)


def test_module_helpers_under_autocast(backend):
    loss_fn = nce_ext.NCELoss(D, V, noises.Uniform(V), K, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_fn(torch.randn(B, D).bfloat16(), torch.randint(V, (B,)))
        assert loss_fn.logits(torch.randn(B, D)).dtype == torch.bfloat16
        assert loss_fn.log_prob(torch.randn(B, D)).shape == (B, V)
    loss.backward()
    assert loss_fn.weight.grad.dtype == torch.float32
