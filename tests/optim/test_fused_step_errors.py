"""What a fused optimizer refuses, and that a refusal, or a backward pass that fails, has changed nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from cases import Case
from fused_cases import Twins, batches, loss_of, rows_of
from optim_cases import BF16, F64, assert_same, make, snapshot
from refusals import assert_tested, messages

from nce_ext import optim
from nce_ext._ops import library
from nce_ext.optim import fused_step

WAYS = [{}, {"shared": True}, {"backend": "reference"}]
WORLD = object()  # stands for a process group, which a refusal does not look into


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu")


RACY = {"hogwild": True}

# name -> optimizer's class and options, options of fuse_optimizer, error, message
OF_FUSE = {
    "torch's optimizer": (
        torch.optim.SGD,
        {},
        {},
        TypeError,
        r"optimizer must be one of nce_ext\.optim, got torch\.opt",
    ),
    "no optimizer": (None, {}, {}, TypeError, r"optimizer must be one of nce_ext\.optim, got builtins\.NoneType"),
    "accumulate 0": (optim.SGD, {}, {"accumulate": 0}, ValueError, r"accumulate must be >= 1, got 0"),
    "accumulate True": (optim.SGD, {}, {"accumulate": True}, TypeError, r"accumulate must be an int, got bool True"),
    "accumulate 2.0": (optim.SGD, {}, {"accumulate": 2.0}, TypeError, r"accumulate must be an int, got float 2\.0"),
    "max_norm 0": (optim.SGD, {}, {"max_norm": 0}, ValueError, r"max_norm must be > 0, got 0"),
    "max_norm below 0": (optim.SGD, {}, {"max_norm": -1.0}, ValueError, r"max_norm must be finite and >= 0, got -1\.0"),
    "max_norm infinite": (optim.SGD, {}, {"max_norm": math.inf}, ValueError, r"max_norm must be finite and >= 0, got"),
    "max_norm NaN": (optim.SGD, {}, {"max_norm": math.nan}, ValueError, r"max_norm must be finite and >= 0, got nan"),
    "max_norm a string": (optim.SGD, {}, {"max_norm": "1"}, TypeError, r"max_norm must be a number, got str '1'"),
    "a number": (
        optim.SGD,
        {},
        {"grad_scaler": 2.0},
        TypeError,
        r"grad_scaler must be a torch\.amp\.GradScaler, got float",
    ),
    "rule": (optim.Adam, {}, RACY, ValueError, r"optimizer must be SGD with hogwild=True, got Adam"),
    "momentum": (
        optim.SGD,
        {"momentum": 0.5},
        RACY,
        ValueError,
        r"momentum must be 0 or False with hogwild=True, got 0",
    ),
    "decay": (optim.SGD, {"weight_decay": 0.5}, RACY, ValueError, r"weight_decay must be 0 or False with .*, got 0\.5"),
    "direction": (optim.SGD, {"maximize": True}, RACY, ValueError, r"maximize must be 0 or False with .*, got True"),
    "norm": (
        optim.SGD,
        {},
        {**RACY, "max_norm": 1.0},
        ValueError,
        r"max_norm must be None with hogwild=True, got 1\.0",
    ),
    "group": (optim.SGD, {}, {**RACY, "process_group": WORLD}, ValueError, r"process_group must be None with hogwild"),
    "scaler": (optim.SGD, {}, {**RACY, "grad_scaler": scaler()}, ValueError, r"grad_scaler must be None with hogwild"),
}


@pytest.mark.parametrize("name", OF_FUSE)
def test_refusals_of_fuse_optimizer(name):
    rule, options, fuse, error, message = OF_FUSE[name]
    loss_fn = loss_of("nce", Case())
    optimizer = None if rule is None else rule(loss_fn.parameters(), **options)
    with pytest.raises(error, match=message):
        loss_fn.fuse_optimizer(optimizer, **fuse)
    assert loss_fn._fused is None


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_the_optimizer_must_have_the_parameters(which):
    loss_fn = loss_of("nce", Case())
    optimizer = optim.SGD([p for name, p in loss_fn.named_parameters() if name != which])
    with pytest.raises(ValueError, match=f"optimizer must have the loss's {which} among its parameters"):
        loss_fn.fuse_optimizer(optimizer)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_the_parameters_must_learn(which):
    loss_fn = loss_of("nce", Case())
    getattr(loss_fn, which).requires_grad_(False)
    with pytest.raises(ValueError, match=f"{which} must require a gradient to be stepped on"):
        loss_fn.fuse_optimizer(optim.SGD(loss_fn.parameters()))


@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_hogwild_takes_float32_alone(dtype):
    loss_fn = loss_of("nce", Case(dtype=dtype))
    with pytest.raises(ValueError, match=f"weight must be float32 with hogwild=True, got {dtype}"):
        loss_fn.fuse_optimizer(optim.SGD(loss_fn.parameters()), hogwild=True)


def test_other_groups_may_have_momentum_beside_hogwild():
    loss_fn = loss_of("nce", Case())
    other = torch.nn.Parameter(torch.zeros(2))
    optimizer = optim.SGD([{"params": loss_fn.parameters()}, {"params": [other], "momentum": 0.9}], lr=0.1)
    assert loss_fn.fuse_optimizer(optimizer, hogwild=True).hogwild


# At the call.


def replace_weight(twins: Twins) -> None:
    twins.fused.weight = torch.nn.Parameter(twins.fused.weight.detach().clone())


def drop_bias(twins: Twins) -> None:
    twins.fused.bias = None


def freeze(twins: Twins) -> None:
    twins.fused.bias.requires_grad_(False)


def take_from_optimizer(twins: Twins) -> None:
    twins.optimizers[0].param_groups[0]["params"] = [twins.fused.bias]


def use_amsgrad(twins: Twins) -> None:
    twins.optimizers[0].param_groups[0]["amsgrad"] = True


def decay_too_much(twins: Twins) -> None:
    twins.optimizers[0].param_groups[0]["weight_decay"] = 10.0


AT_THE_CALL = {
    replace_weight: (RuntimeError, r"weight and bias were replaced after fuse_optimizer; call it again"),
    drop_bias: (RuntimeError, r"weight and bias were replaced after fuse_optimizer"),
    freeze: (RuntimeError, r"bias must require a gradient while a fused optimizer steps on it; .*unfuse_optimizer"),
    take_from_optimizer: (RuntimeError, r"weight and bias were taken from the optimizer after fuse_optimizer"),
    use_amsgrad: (ValueError, r"amsgrad must be False for sparse gradients, got True"),
    decay_too_much: (ValueError, r"lr \* weight_decay must be below 1, got 1\.0"),
}


@pytest.mark.parametrize("change", AT_THE_CALL)
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_refusals_at_the_call(change, options):
    error, message = AT_THE_CALL[change]
    case = Case()
    twins = Twins("nce", case, **options)
    twins.both(case.hidden, case.target, seed=case.seed)
    before, parameters = snapshot(twins.optimizers[0]), rows_of(twins.fused)
    change(twins)
    with pytest.raises(error, match=message):
        twins.fused(case.hidden, case.target)
    assert_same(before[0], [p.detach() for p in parameters])
    for key, state in before[1]["state"].items():
        assert_same(state, dict(twins.optimizers[0].state[parameters[key]]))
    with torch.no_grad():  # to evaluate is no step
        twins.fused(case.hidden, case.target)


def test_hidden_on_another_device():
    twins = Twins("nce", Case())
    message = r"weight must be on hidden's device meta with fuse_optimizer, got cpu"
    with pytest.raises(ValueError, match=message):
        twins.fused(torch.zeros(7, 16, device="meta"), twins.case.target)


def test_several_processes_need_a_group(monkeypatch):
    case = Case()
    twins = Twins("nce", case)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"process_group must be given to fuse_optimizer where 2 processes train"):
        twins.fused(case.hidden, case.target)


@pytest.mark.parametrize("options", [{"shared": True}, {"unique": True}, {"backend": "reference"}], ids=str)
def test_a_group_merges_pairs_alone(options):
    case = Case()
    loss_fn = loss_of("nce", case, **options)
    loss_fn.fuse_optimizer(make("SGD", loss_fn.parameters()), process_group=WORLD)
    with pytest.raises(RuntimeError, match=r"process_group must be None in fuse_optimizer with shared negatives"):
        loss_fn(case.hidden, case.target)


# In backward. ``go_on`` shows that what was refused has left nothing behind.


def go_on(twins: Twins, **more) -> None:
    for p in rows_of(twins.fused):
        assert p.grad is None
    for each in batches(twins.case, 7, 7):
        twins.both(**each, **more)
    twins.assert_same()


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_double_backward(options):
    case = Case()
    twins = Twins("nce", case, **options)
    twins.both(case.hidden, case.target, seed=case.seed)
    before = snapshot(twins.optimizers[0])
    hidden = case.hidden.detach().requires_grad_()
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice"):
        twins.fused(hidden, case.target).backward(create_graph=True)
    assert_same(before, snapshot(twins.optimizers[0]))
    go_on(twins)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_second_pass_through_one_graph(options, accumulate):
    case = Case(dtype=F64)
    twins = Twins("nce", case, fuse={"accumulate": accumulate}, **options)
    hidden = case.hidden.detach().requires_grad_()
    loss = twins.fused(hidden, case.target, seed=case.seed)
    loss.backward(retain_graph=True)
    before = snapshot(twins.optimizers[0])
    # The reference has saved the weight itself, which autograd knows to have changed.
    message = r"a fused optimizer has taken its step for this graph already|has been modified by an inplace operation"
    with pytest.raises(RuntimeError, match=message):
        loss.backward(retain_graph=True)
    assert_same(before, snapshot(twins.optimizers[0]))
    twins.handle.step()
    twins.backward(1, hidden, case.target, seed=case.seed)
    twins.step(1)
    twins.assert_same()


def test_a_second_pass_without_its_graph_is_torchs_affair():
    case = Case()
    twins = Twins("nce", case)
    loss = twins.fused(case.hidden.requires_grad_(), case.target)
    loss.backward()
    before = snapshot(twins.optimizers[0])
    with pytest.raises(RuntimeError, match=r"backward through the graph a second time"):
        loss.backward()
    assert_same(before, snapshot(twins.optimizers[0]))


@pytest.mark.parametrize("fuse", [{"accumulate": 2}, {}], ids=str)
def test_different_numbers_of_targets_in_one_step(fuse, native):
    """The step is refused, the pairs are dropped, and the next ones are not those of the step that failed."""
    case = Case()
    twins = Twins("nce", case, fuse=fuse)
    before = snapshot(twins.optimizers[0])
    one, several = case.target, case.target[:, None].expand(7, 3)
    message = r"target must have as many positives, and k must be the same, in one step, got T \+ k = \[6, 8\]"
    if fuse:
        twins.fused(case.hidden, one).backward()
        with pytest.raises(RuntimeError, match=message):
            twins.fused(case.hidden, several).backward()
    else:
        with pytest.raises(RuntimeError, match=message):
            (twins.fused(case.hidden, one) + twins.fused(case.hidden, several)).backward()
    assert_same(before, snapshot(twins.optimizers[0]))
    twins.handle = twins.fused.fuse_optimizer(twins.optimizers[0])
    go_on(twins)


def fail(gradient: torch.Tensor) -> None:
    raise ArithmeticError("a hook fails")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_pass_that_fails_leaves_nothing(options, accumulate):
    """The loss's own node has run when another one raises: its pairs are not part of any later step."""
    case = Case(dtype=F64)
    twins = Twins("nce", case, fuse={"accumulate": accumulate}, **options)
    before = snapshot(twins.optimizers[0])
    for _ in range(3):
        hidden = case.hidden.detach().requires_grad_() * 1
        hidden.register_hook(fail)
        with pytest.raises(ArithmeticError):
            (twins.fused(hidden, case.target) + twins.fused(case.hidden, case.target)).backward()
        assert_same(before, snapshot(twins.optimizers[0]))
    for each in batches(case, *[7] * accumulate):
        assert_same(before, snapshot(twins.optimizers[0]))
        twins.backward(0, **each)
        twins.backward(1, **each)
    twins.step(1)
    twins.assert_close()
    assert twins.moved()


def test_what_fails_between_passes_is_not_lost(native):
    """Of a group of three passes, the second fails; the others are stepped on."""
    case = Case(dtype=F64)
    twins = Twins("nce", case, fuse={"accumulate": 2})
    first, failing, last = batches(case, 3, 5, 4)
    twins.backward_both(**first)
    hidden = failing.pop("hidden").requires_grad_() * 1
    hidden.register_hook(fail)
    with pytest.raises(ArithmeticError):
        twins.fused(hidden, **failing).backward()
    twins.backward_both(**last)
    twins.step(1)
    twins.assert_close()


# Back to gradients.


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_unfused(options):
    """Gradients again; what has been accumulated is dropped."""
    case = Case(dtype=F64)
    twins = Twins("nce", case, fuse={"accumulate": 2}, **options)
    before = snapshot(twins.optimizers[0])
    if "backend" not in options and "shared" not in options and library.fused_available(torch.device("cpu")):
        twins.backward(0, case.hidden, case.target)
    twins.fused.unfuse_optimizer()
    assert_same(before, snapshot(twins.optimizers[0]))
    for which, loss_fn in enumerate((twins.fused, twins.plain)):
        twins.backward(which, case.hidden, case.target, seed=case.seed)
        assert loss_fn.weight.grad.is_sparse
        twins.step(which)
    twins.assert_same()
    twins.handle = twins.fused.fuse_optimizer(twins.optimizers[0])
    go_on(twins)


def test_every_refusal_in_the_source_is_tested():
    elsewhere = [
        "weight must be float32 with hogwild=True",  # test_hogwild_takes_float32_alone
        "weight must be on hidden's device",  # test_hidden_on_another_device, test_pinned_table
        "optimizer must have the loss's",  # test_the_optimizer_must_have_the_parameters
    ]
    assert_tested([fused_step], [*messages(OF_FUSE, AT_THE_CALL), *elsewhere])
