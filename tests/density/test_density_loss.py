"""DensityNCELoss: the formula, its gradients, refusals, state."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from refusals import assert_tested, messages
from tolerances import as_float64, assert_close

from nce_ext import density, set_debug
from nce_ext.density import DensityNCELoss

INF = math.inf


def scores(n=7, ratio=3, dtype=torch.float32, seed=0):
    """log_f_data, log_q_data, log_f_noise, log_q_noise; some far from 0."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (n, n, n * ratio, n * ratio)
    values = [8 * torch.randn(size, generator=generator, dtype=torch.float64) - 3 for size in sizes]
    return [value.to(dtype) for value in values]


def truth(arguments, ratio, log_z, upstream=1.0):
    """The loss of each datum and its gradients in log_f_data, log_f_noise and log_z [B], from the formula."""
    log_f, log_q, log_f_noise, log_q_noise = (as_float64(value) for value in arguments)
    log_z = np.broadcast_to(np.asarray(log_z, np.float64), log_f.shape)
    data = log_f - log_z - np.log(ratio) - log_q
    noise = (log_f_noise - log_q_noise).reshape(-1, ratio) - log_z[:, None] - np.log(ratio)
    loss = np.logaddexp(0, -data) + np.logaddexp(0, noise).sum(1)
    upstream = np.broadcast_to(upstream, log_f.shape)
    d_data = -upstream / (1 + np.exp(data))
    d_noise = upstream[:, None] / (1 + np.exp(-noise))
    return loss, d_data, d_noise.reshape(log_f_noise.shape), -d_data - d_noise.sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("n", "ratio"), [(7, 3), (1, 1), (33, 5)])
def test_formula_and_gradients(dtype, reduction, n, ratio):
    arguments = scores(n, ratio, dtype)
    loss_fn = DensityNCELoss(ratio, reduction=reduction, dtype=torch.float64 if dtype == torch.float64 else None)
    with torch.no_grad():
        loss_fn.log_z.fill_(0.375)
    log_f, log_q, log_f_noise, log_q_noise = arguments
    log_f.requires_grad_()
    log_f_noise.requires_grad_()
    got = loss_fn(log_f, log_q, log_f_noise, log_q_noise)
    upstream = torch.linspace(-1, 2, n).to(got) if reduction == "none" else torch.ones_like(got)
    got.backward(upstream)

    weight = {"mean": 1 / n, "sum": 1.0, "none": as_float64(upstream)}[reduction]
    loss, d_data, d_noise, d_log_z = truth(arguments, ratio, 0.375, weight)
    loss = {"mean": loss.mean(), "sum": loss.sum(), "none": loss}[reduction]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.dtype == compute
    # z is a difference of numbers of about 30, and the loss of a datum is nearly that of its largest z.
    scale = float(max(as_float64(value.detach().abs().max()) for value in arguments)) * (n if reduction == "sum" else 1)
    assert_close(got, loss, compute, "loss", scale=np.full(np.shape(loss), max(scale, np.max(loss))))
    largest = np.max(np.abs(weight)) * 30
    assert_close(log_f.grad, d_data, dtype, "log_f_data.grad", scale=np.full(d_data.shape, largest))
    assert_close(log_f_noise.grad, d_noise, dtype, "log_f_noise.grad", scale=np.full(d_noise.shape, largest))
    assert_close(loss_fn.log_z.grad, d_log_z.sum(), compute, "log_z.grad", scale=largest * n * (1 + ratio))


def test_noise_rows_belong_to_their_datum():
    """Both shapes of the noise, and what one datum's noise changes."""
    data, log_q, noise, noise_q = scores(5, 4, torch.float64)
    loss_fn = DensityNCELoss(4, reduction="none")
    flat = loss_fn(data, log_q, noise, noise_q)
    assert torch.equal(flat, loss_fn(data, log_q, noise.view(5, 4), noise_q.view(5, 4)))
    changed = noise.clone()
    changed[2 * 4 : 3 * 4] += 1
    assert (loss_fn(data, log_q, changed, noise_q) != flat).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("log_z", [-1.5, torch.tensor(-1.5), torch.linspace(-2, 2, 7)], ids=["number", "scalar", "[B]"])
def test_log_z_at_call_time_takes_the_place_of_the_modules(log_z):
    arguments = scores(7, 3, torch.float64)
    got = DensityNCELoss(3, log_z=100.0, reduction="none")(*arguments, log_z=log_z)
    assert_close(got, truth(arguments, 3, as_float64(log_z))[0], torch.float64, "loss")


def test_a_fixed_log_z_is_subtracted():
    arguments = scores(7, 3, torch.float64)
    got = DensityNCELoss(3, log_z=0.7)(*arguments)
    assert_close(got, truth(arguments, 3, 0.7)[0].mean(), torch.float64, "loss", scale=30)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("per_datum", [False, True])
def test_gradcheck(reduction, per_datum):
    log_f, log_q, log_f_noise, log_q_noise = scores(5, 3, torch.float64)
    log_z = torch.linspace(-1, 1, 5, dtype=torch.float64) if per_datum else torch.tensor(0.3, dtype=torch.float64)
    loss_fn = DensityNCELoss(3, reduction=reduction)

    def call(log_f, log_f_noise, log_z):
        return loss_fn(log_f, log_q, log_f_noise, log_q_noise, log_z=log_z)

    inputs = [(value / 4).requires_grad_() for value in (log_f, log_f_noise, log_z)]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_log_f_and_log_q_may_differ_in_dtype():
    """Float64 anywhere makes the arithmetic float64: exact to 1e-14 where float32 would keep 1e-6."""
    log_f, log_q, log_f_noise, log_q_noise = scores(7, 3)
    arguments = [log_f, log_q.double() + 1e-9, log_f_noise, log_q_noise.double() - 1e-9]
    got = DensityNCELoss(3, reduction="none")(*arguments)
    assert_close(got, truth(arguments, 3, 0.0)[0], torch.float64, "loss")


@pytest.mark.parametrize(("reduction", "empty"), [("mean", 0.0), ("sum", 0.0), ("none", [])])
def test_empty_batch(reduction, empty):
    nothing = torch.empty(0, requires_grad=True)
    loss_fn = DensityNCELoss(3, reduction=reduction)
    loss = loss_fn(nothing, torch.empty(0), nothing, torch.empty(0))
    assert loss.tolist() == empty
    loss.sum().backward()
    assert loss_fn.log_z.grad == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_density_at_noise_contributes_nothing(dtype):
    """The loss is that of the other samples, and no gradient is NaN, nor that of the parameters behind log f."""
    data, log_q, noise, noise_q = scores(17, 3, dtype)
    outside = torch.zeros(51, dtype=torch.bool)
    outside[[0, 4, 9, 10, 11, 50]] = True  # all of datum 3's
    shift = torch.zeros((), dtype=dtype, requires_grad=True)
    loss_fn = DensityNCELoss(3, reduction="none", dtype=dtype)
    log_f_noise = (noise + shift).masked_fill(outside, -INF)
    log_f_noise.retain_grad()
    got = loss_fn(data + shift, log_q, log_f_noise, noise_q)
    got.sum().backward()
    arguments = [data, log_q, torch.where(outside, -INF, noise), noise_q]
    loss, d_data, d_noise, d_log_z = truth(arguments, 3, 0.0)
    assert_close(got, loss, dtype, "loss", scale=np.full(17, 30.0))
    assert (log_f_noise.grad[outside] == 0).all()
    assert_close(shift.grad, d_data.sum() + d_noise.sum(), dtype, "shift.grad", scale=1000)
    assert_close(loss_fn.log_z.grad, d_log_z.sum(), dtype, "log_z.grad", scale=1000)


def test_zero_density_at_data_is_an_infinite_loss():
    data, log_q, noise, noise_q = scores(5, 3)
    data[2] = -INF
    data.requires_grad_()
    loss = DensityNCELoss(3, reduction="none")(data, log_q, noise, noise_q)
    loss.sum().backward()
    assert loss.isinf().tolist() == [False, False, True, False, False]
    assert loss[2] == INF
    assert data.grad[2] == -1
    assert data.grad.isfinite().all()


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_no_nan_for_any_finite_input(size):
    data, log_q, noise, noise_q = (size * value for value in scores(33, 5))
    data.requires_grad_()
    noise.requires_grad_()
    loss_fn = DensityNCELoss(5)
    loss = loss_fn(data, log_q, noise, noise_q)
    loss.backward()
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in (data.grad, noise.grad, loss_fn.log_z.grad))


def test_bad_log_q_where_values_are_not_checked():
    """On CUDA and under torch.compile: NaN for the datum, no gradient from it."""
    data, log_q, noise, noise_q = scores(5, 3)
    log_q[1], noise_q[4 * 3] = -INF, math.nan
    data.requires_grad_()
    noise.requires_grad_()
    loss_fn = DensityNCELoss(3, reduction="none")
    loss = torch.compile(loss_fn, backend="eager", fullgraph=True)(data, log_q, noise, noise_q)
    assert loss.isnan().tolist() == [False, True, False, False, True]
    loss.sum().backward()
    assert data.grad[1] == 0
    assert noise.grad[4 * 3] == 0
    assert data.grad.isfinite().all()
    assert noise.grad.isfinite().all()


def test_compiled_as_one_graph():
    arguments = scores(7, 3)
    loss_fn = DensityNCELoss(3)
    compiled = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), loss_fn(*arguments))


def test_log_density_ratio():
    log_f, log_q = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    loss_fn = DensityNCELoss(8, log_z=0.25)
    assert torch.equal(loss_fn.log_density_ratio(log_f, log_q), log_f - log_q - 0.25)
    assert torch.equal(loss_fn.log_density_ratio(log_f, log_q, log_z=log_q), log_f - log_q - log_q)
    assert loss_fn.log_density_ratio(log_f.bfloat16(), log_q.half()).dtype == torch.float32
    assert loss_fn.log_density_ratio(torch.tensor(-INF), torch.tensor(0.0)) == -INF
    point = torch.randn(3, requires_grad=True)  # the score's gradient in the point, through f and q
    loss_fn.log_density_ratio(-point.square(), -point).sum().backward()
    torch.testing.assert_close(point.grad, 1 - 2 * point.detach())


D, N = torch.zeros(4), torch.zeros(12)
META = torch.empty(4, device="meta")
REFUSALS = {
    "log_f_data a list": (
        {"log_f_data": [0.0] * 4},
        TypeError,
        r"log_f_data must be a floating-point .* got list",
    ),
    "log_q_noise missing": ({"log_q_noise": None}, TypeError, r"log_q_noise must be .* tensor, got NoneType"),
    "log_z a string": ({"log_z": "learned"}, ValueError, r"log_z must be a finite number or a tensor, got 'learned'"),
    "log_z infinite": ({"log_z": INF}, ValueError, r"log_z must be a finite number or a tensor, got inf"),
    "log_z a bool": ({"log_z": True}, ValueError, r"log_z must be a finite number or a tensor, got True"),
    "device of log_q_data": (
        {"log_q_data": META},
        ValueError,
        r"log_q_data must be on .* cpu, got meta",
    ),
    "device of log_f_noise": ({"log_f_noise": META}, ValueError, r"log_f_noise must be on .* cpu, got meta"),
    "device of log_q_noise": ({"log_q_noise": META}, ValueError, r"log_q_noise must be on .* cpu, got meta"),
    "device of log_z": ({"log_z": META}, ValueError, r"log_z must be on log_f_data's device cpu, got meta"),
    "device of all but log_z": (
        {"log_f_data": META, "log_q_data": META, "log_f_noise": N.to("meta"), "log_q_noise": N.to("meta")},
        ValueError,
        r"log_z must be on log_f_data's device meta, got cpu",
    ),
    "device before dtype": ({"log_f_data": D.long(), "log_q_data": META}, ValueError, r"log_q_data must be on"),
    "integers": ({"log_f_data": D.long()}, TypeError, r"log_f_data must be a float32 .* got a int64 tensor"),
    "integer log_q": ({"log_q_noise": N.int()}, TypeError, r"log_q_noise must be a float32 .* got a int32 tensor"),
    "integer log_z": ({"log_z": D.long()}, TypeError, r"log_z must be a float32 .* got a int64 tensor"),
    "sparse": ({"log_f_noise": N.to_sparse()}, TypeError, r"log_f_noise must be dense, got layout torch\.sparse_coo"),
    "a column": ({"log_f_data": D[:, None]}, ValueError, r"log_f_data must be \[B\], got shape \[4, 1\]"),
    "a scalar": ({"log_f_data": D[0]}, ValueError, r"log_f_data must be \[B\], got shape \[\]"),
    "log_q_data too long": (
        {"log_q_data": N},
        ValueError,
        r"log_q_data must have .* shape \[4\], got \[12\]",
    ),
    "log_q_data a column": ({"log_q_data": D[:, None]}, ValueError, r"log_q_data must have .* got \[4, 1\]"),
    "noise of another ratio": (
        {"log_f_noise": torch.zeros(16)},
        ValueError,
        r"log_f_noise must have shape \[12\] or \[4, 3\] for 4 data and noise_ratio = 3, got \[16\]",
    ),
    "noise transposed": ({"log_f_noise": N.view(3, 4)}, ValueError, r"log_f_noise must have shape .* got \[3, 4\]"),
    "log_q_noise of another shape": (
        {"log_q_noise": N.view(4, 3)},
        ValueError,
        r"log_q_noise must have log_f_noise's shape \[12\], got \[4, 3\]",
    ),
    "log_z of the noise": (
        {"log_z": N},
        ValueError,
        r"log_z must be a scalar or of .* \[4\], got \[12\]",
    ),
    "noise of the data that learns": (
        {"log_q_data": torch.zeros(4, requires_grad=True)},
        ValueError,
        r"log_q_data must not require a gradient \(the noise stays fixed .* torch\.no_grad\(\) or use \.detach\(\)",
    ),
    "noise that learns": (
        {"log_q_noise": torch.zeros(12, requires_grad=True)},
        ValueError,
        r"log_q_noise must not require a gradient",
    ),
    "data the noise cannot produce": (
        {"log_q_data": torch.tensor([0.0, 0, -INF, 0])},
        ValueError,
        r"log_q_data must be finite, got -inf at index \[2\]",
    ),
    "noise NaN": (
        {"log_f_noise": N.view(4, 3), "log_q_noise": torch.full((4, 3), math.nan)},
        ValueError,
        r"log_q_noise must be finite, got nan at index \[0, 0\]",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    changes, error, message = REFUSALS[name]
    arguments = {"log_f_data": D, "log_q_data": D, "log_f_noise": N, "log_q_noise": N, **changes}
    loss_fn = DensityNCELoss(3)
    with pytest.raises(error, match=message):
        loss_fn(**arguments)


OF_THE_RATIO = {
    "log_f missing": ({"log_f": None}, TypeError, r"log_f must be a floating-point tensor, got NoneType"),
    "device": ({"log_q": META}, ValueError, r"log_q must be on log_f's device cpu, got meta"),
    "dtype": ({"log_q": D.long()}, TypeError, r"log_q must be a float32 .* got a int64 tensor"),
    "shape": ({"log_q": D[:, None]}, ValueError, r"log_q must have log_f's shape \[4\], got \[4, 1\]"),
    "log_z": ({"log_z": N}, ValueError, r"log_z must be a scalar or of log_f's shape \[4\], got \[12\]"),
    "log_z not a number": ({"log_z": math.nan}, ValueError, r"log_z must be a finite number or a tensor, got nan"),
}


@pytest.mark.parametrize("name", OF_THE_RATIO)
def test_refusals_of_log_density_ratio(name):
    changes, error, message = OF_THE_RATIO[name]
    with pytest.raises(error, match=message):
        DensityNCELoss(3).log_density_ratio(**{"log_f": D, "log_q": D, **changes})


CONSTRUCTOR = {
    "no noise": ({"noise_ratio": 0}, ValueError, r"noise_ratio must be in 1 \.\. 1048576, got 0"),
    "too much noise": ({"noise_ratio": 2**20 + 1}, ValueError, r"noise_ratio must be in 1 \.\. 1048576, got 1048577"),
    "a fraction": ({"noise_ratio": 1.5}, TypeError, r"noise_ratio must be an int, got float 1\.5"),
    "a bool": ({"noise_ratio": True}, TypeError, r"noise_ratio must be an int, got bool True"),
    "log_z unknown": ({"log_z": "auto"}, ValueError, r"log_z must be a finite number or 'learned', got 'auto'"),
    "log_z NaN": ({"log_z": math.nan}, ValueError, r"log_z must be a finite number or 'learned', got nan"),
    "log_z a bool": ({"log_z": False}, ValueError, r"log_z must be a finite number or 'learned', got False"),
    "reduction": ({"reduction": "batchmean"}, ValueError, r"reduction must be one of .* got 'batchmean'"),
    "dtype": ({"dtype": torch.int64}, TypeError, r"dtype must be a floating-point type .* got torch\.int64"),
}


@pytest.mark.parametrize("name", CONSTRUCTOR)
def test_refusals_of_the_constructor(name):
    changes, error, message = CONSTRUCTOR[name]
    with pytest.raises(error, match=message):
        DensityNCELoss(**{"noise_ratio": 3, **changes})


def test_state():
    loss_fn = DensityNCELoss(3)
    assert list(loss_fn.state_dict()) == ["log_z"]
    assert loss_fn.log_z.dtype == torch.float32
    assert loss_fn.log_z == 0
    with torch.no_grad():
        loss_fn.log_z.fill_(1.5)
    other = DensityNCELoss(5, dtype=torch.float64)
    other.load_state_dict(loss_fn.state_dict())
    assert other.log_z == 1.5
    assert other.log_z.dtype == torch.float64
    assert copy.deepcopy(loss_fn).log_z == 1.5
    assert loss_fn.double().log_z.dtype == torch.float64
    assert loss_fn.to("meta").log_z.device.type == "meta"
    assert DensityNCELoss(3, device="meta").log_z.device.type == "meta"
    fixed = DensityNCELoss(3, log_z=2)
    assert not fixed.state_dict()
    assert not list(fixed.parameters())
    assert repr(fixed) == "DensityNCELoss(noise_ratio=3, log_z=2, reduction='mean')"
    assert "log_z=learned" in repr(loss_fn)


def test_on_cuda(cuda):
    """As on the CPU, but that a bad log q is a NaN, until set_debug(True) asks for the check."""
    arguments = scores(33, 5)
    loss_fn = DensityNCELoss(5, reduction="none", device=cuda)
    moved = [value.to(cuda) for value in arguments]
    assert_close(loss_fn(*moved), truth(arguments, 5, 0.0)[0], torch.float32, "loss", scale=np.full(33, 100.0))
    moved[1][2] = -INF
    assert loss_fn(*moved).isnan().nonzero().tolist() == [[2]]
    set_debug(True)
    try:
        with pytest.raises(ValueError, match=r"log_q_data must be finite, got -inf at index \[2\]"):
            loss_fn(*moved)
    finally:
        set_debug(False)


def test_every_refusal_in_the_source_is_tested():
    assert_tested([density], messages(REFUSALS, OF_THE_RATIO, CONSTRUCTOR))
