"""The operators of steps on rows: opcheck, the twin in plain PyTorch, what they compose, threads, refusals."""

from __future__ import annotations

import pytest
import torch
from optim_cases import ALL, BF16, F16, F32, F64, assert_same, make, parameter, random_gradient, snapshot
from row_step_arguments import (
    RULES,
    SEED,
    B,
    D,
    K,
    V,
    copied,
    fused_step,
    ops,
    pair_arguments,
    step_arguments,
)
from tolerances import assert_close

from nce_ext.reference import row_step

pytestmark = pytest.mark.usefixtures("native")

STATE = ("first", "second", "row_steps", "decayed", "master")
HYPERPARAMETERS = (
    "rule", "step", "rate", "weight_decay", "log_decay", "momentum", "dampening", "beta1", "beta2", "eps", "nesterov",
    "maximize",
)  # fmt: skip


def step_of_twin(arguments: dict) -> None:
    state = row_step.RowState(*(arguments[key] for key in STATE))
    hyperparameters = row_step.Hyperparameters(*(arguments[key] for key in HYPERPARAMETERS))
    row_step.row_step_(
        arguments["weight"], arguments["classes"], arguments["gradient"], state, hyperparameters,
        arguments["gradient_scale"], arguments["seed"],
    )  # fmt: skip


# opcheck.

OPTIONS = {
    "all rows": {"classes": None, "gradient": torch.randn(V, D)},
    "scaled": {"gradient_scale": torch.tensor(0.5)},
    "no rows": {"classes": torch.empty(0, dtype=torch.int64), "gradient": torch.empty(0, D)},
    "other switches": {"nesterov": True, "maximize": True},
}


@pytest.mark.parametrize("name", RULES)
def test_opcheck_row_step(name):
    for options in ({}, *OPTIONS.values()):
        arguments = step_arguments(name, **options)
        torch.library.opcheck(ops.row_step_.default, tuple(arguments.values()))
    for extra in ({"seed": SEED}, {"master": torch.randn(V, D)}):
        torch.library.opcheck(ops.row_step_.default, tuple(step_arguments(name, BF16, **extra).values()))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_opcheck_row_grad_step(name, with_bias):
    arguments = step_arguments(name)
    rest = [value for key, value in arguments.items() if key not in ("classes", "gradient", "weight")]
    for pairs in (pair_arguments(), pair_arguments(batch=0)):
        call = (*pairs, arguments["weight"], *rest[:7], with_bias, *rest[7:])
        torch.library.opcheck(ops.row_grad_step_.default, call)


@pytest.mark.parametrize(("with_rows", "with_bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_opcheck_row_grad_norm(with_rows, with_bias):
    torch.library.opcheck(ops.row_grad_norm.default, (*pair_arguments(), V, with_rows, with_bias))


@pytest.mark.parametrize("bias", [None, torch.randn(V)])
def test_opcheck_scatter_step(bias):
    # Without repeats, or two runs would round in different orders.
    pairs = pair_arguments(batch=2, repeated=False)
    torch.library.opcheck(ops.scatter_step_.default, (*pairs, torch.randn(V, D), bias, 0.1))


# row_step_ is its twin, up to the rounding of a product and a sum in one.


@pytest.mark.parametrize("dim", [1, 6, 16, 67])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_the_twin_in_plain_pytorch(name, dtype, dim):
    for options in ({}, {"classes": None}, {"maximize": True, "nesterov": True}, {"gradient_scale": 0.3}):
        if "gradient_scale" in options:
            options = {"gradient_scale": torch.tensor(0.3, dtype=dtype)}
        if "classes" in options:
            options = {"classes": None, "gradient": torch.randn(V, dim, dtype=dtype)}
        arguments = step_arguments(name, dtype, dim=dim, **options)
        exact, before = copied(arguments), arguments["weight"].clone()
        for key, value in exact.items():
            if torch.is_tensor(value) and value.is_floating_point():
                exact[key] = value.double()
        step_of_twin(exact)
        ops.row_step_(*arguments.values())
        assert not torch.equal(arguments["weight"][0], before[0])
        for key in ("weight", *STATE):
            if arguments[key] is not None:
                assert_close(arguments[key], exact[key], dtype if key != "decayed" else F64, key)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("extra", ["seed", "master", "nearest"])
def test_the_twin_rounds_alike(extra, dtype):
    """SGD at a rate of a power of 2 has one rounding in float32 on either side."""
    for dim in (1, 7, 8, 9, 67):
        more = {"seed": {"seed": SEED}, "master": {"master": torch.randn(V, dim)}, "nearest": {}}[extra]
        arguments = step_arguments("SGD", dtype, dim=dim, weight_decay=0.0, rate=2.0**-6, **more)
        twin = copied(arguments)
        ops.row_step_(*arguments.values())
        step_of_twin(twin)
        assert_same(arguments, twin)


# row_grad_step_ is row_grad and row_step_.


@pytest.mark.parametrize("dim", [1, 6, 16, 67, 300])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_row_grad_step(name, dtype, dim):
    for hidden in (F64,) if dtype == F64 else (F32, BF16):
        for batch, columns in ((B, K), (40, 7), (0, 3), (3, 0)):
            arguments = step_arguments(name, dtype, dim=dim)
            pairs = pair_arguments(batch, columns, dim=dim, hidden=hidden)
            classes, rows, elements = ops.row_grad(*pairs, V, dtype, True, True, False)
            two = copied({**arguments, "classes": classes, "gradient": rows})
            ops.row_step_(*two.values())
            got_classes, bias = fused_step(pairs, arguments)
            for key in ("weight", *STATE):
                assert_same(arguments[key], two[key])
            assert torch.equal(got_classes, classes)
            assert torch.equal(bias, elements)
            assert fused_step(pairs, arguments, with_bias=False)[1].numel() == 0


@pytest.mark.parametrize("extra", ["seed", "master", "nearest"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_row_grad_step_on_narrow_rows(dtype, extra):
    """The gradient is that of float32: it is never rounded."""
    pairs = pair_arguments(20, 7, hidden=BF16)
    more = {"seed": {"seed": SEED}, "master": {}, "nearest": {}}[extra]
    arguments = step_arguments("Adam", dtype, **more)
    if extra == "master":
        arguments["master"] = arguments["weight"].float() + 1e-4 * torch.randn(V, D)
    start = arguments["weight"].float() if extra != "master" else arguments["master"].clone()
    wide = copied({**arguments, "weight": start, "master": None, "seed": None})
    classes, wide["gradient"], _ = ops.row_grad(*pairs, V, F32, True, False, False)
    wide["classes"] = classes
    ops.row_step_(*wide.values())
    fused_step(pairs, arguments)
    rounded = wide["weight"].to(dtype)
    if extra == "seed":
        rounded[classes] = row_step.round_at_random(wide["weight"][classes], classes, SEED, dtype).to(dtype)
    assert torch.equal(arguments["weight"], rounded)
    for key in ("first", "second", "row_steps", "decayed"):
        assert_same(arguments[key], wide[key])
    if extra == "master":
        assert torch.equal(arguments["master"], wide["weight"])


@pytest.mark.parametrize("factor", [0.25, -1.0, 0.0])
def test_gradient_scale(factor):
    """Of a power of 2: the bits of a step on the scaled gradient."""
    pairs, arguments = pair_arguments(), step_arguments()
    scaled = copied({**arguments, "gradient_scale": torch.tensor([factor])})
    fused_step(pairs, scaled)
    fused_step((pairs[0], pairs[1], pairs[2] * factor, pairs[3]), arguments)
    for key in ("weight", *STATE):
        assert_same(scaled[key], arguments[key])


@pytest.mark.parametrize("hidden", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize(("with_rows", "with_bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_row_grad_norm(with_rows, with_bias, hidden):
    for batch, columns, dim in ((B, K, D), (40, 7, 67), (9, 2, 1), (0, 3, 4), (3, 0, 4)):
        pairs = pair_arguments(batch, columns, dim=dim, hidden=hidden)
        _, rows, elements = ops.row_grad(*pairs, V, F64 if hidden == F64 else F32, True, True, False)
        wanted = with_rows * rows.double().square().sum() + with_bias * elements.double().square().sum()
        got = ops.row_grad_norm(*pairs, V, with_rows, with_bias)
        assert got.dtype == F64
        torch.testing.assert_close(got, wanted.view(1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("hidden", [F32, BF16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dim", [1, 6, 67])
def test_scatter_step_without_repeats_is_sgd(dim, with_bias, hidden):
    n = 60
    ids, dlogit, grad_loss, h = pair_arguments(12, 4, n, dim, hidden, repeated=False)
    weight, bias = torch.randn(n, dim), torch.randn(n) if with_bias else None
    truth, bias_truth = weight.double(), None if bias is None else bias.double()
    for b in range(12):
        for c in range(4):
            if ids[b, c] >= 0:
                step = 0.3 * grad_loss[b].double() * dlogit[b, c].double()
                truth[ids[b, c]] -= step * h[b].double()
                if bias_truth is not None:
                    bias_truth[ids[b, c]] -= step
    assert ops.scatter_step_(ids, dlogit, grad_loss, h, weight, bias, 0.3) is None
    assert_close(weight, truth, F32, "weight")
    if bias is not None:
        assert_close(bias, bias_truth, F32, "bias")


# Threads.


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_steps_do_not_depend_on_threads(name, dtype):
    results = []
    for threads in (1, 2):
        torch.manual_seed(2)
        torch.set_num_threads(threads)
        p = parameter(3000, 17, dtype=dtype)
        optimizer = make(name, [p], generator=torch.Generator().manual_seed(5))
        for _ in range(2):
            p.grad = random_gradient(p, torch.randint(3000, (4000,)))
            optimizer.step()
        optimizer.catch_up()
        results.append(snapshot(optimizer))
    assert_same(*results)


def test_fused_steps_and_norms_do_not_depend_on_threads():
    pairs = pair_arguments(4000, 7, 3000, 17)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(2)
        arguments = step_arguments(n=3000, dim=17)
        outcome = fused_step(pairs, arguments)
        results.append((outcome, arguments, ops.row_grad_norm(*pairs, 3000, True, True)))
    assert_same(*results)
