"""torch.distributed.checkpoint with nce_ext.optim: a run that is resumed goes on bit for bit."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from optim_cases import ALL, BF16, CASES, F16, F32, F64, OURS_ALONE, assert_same, make, parameter, sparse
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from nce_ext import optim

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
SLOW = pytest.mark.slow
SORTS = {
    "float32": (F32, {}), "float64": (F64, {}), "bfloat16, stochastic": (BF16, {}),
    "bfloat16, master": (BF16, {"rounding": "master"}), "float16, nearest": (F16, {"rounding": "nearest"}),
}  # fmt: skip
QUICK = [
    "SGD", "SGD, momentum", "SGD, nesterov, decay", "Adagrad, all", "row-wise Adagrad, all", "Adam", "AdamW, all",
    "AdamW, global",
]  # fmt: skip
ROWS = ("table", "bias", "cube")
N = 9


def matrix(names: list[str]) -> list:
    """Optimizers and types; those that add little to the others are slow tests."""
    return [
        pytest.param(name, sort, marks=() if name in QUICK and sort not in ("float64", "float16, nearest") else SLOW)
        for name in names
        for sort in SORTS
    ]


class Model(nn.Module):
    """Parameters that get sparse gradients, of one, two and three dimensions, and dense ones beside them."""

    def __init__(self, dtype: torch.dtype, seed: int, *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = parameter(N, 4, dtype=dtype)
        if bias:
            self.bias = parameter(N, dtype=dtype)
        self.cube = parameter(N, 2, 3, dtype=dtype)
        self.linear = nn.Linear(4, 3, dtype=dtype)
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=dtype))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        for name, p in model.named_parameters():
            touched = torch.randint(N, (3,))
            if name in ROWS:
                p.grad = sparse(touched, torch.randn(3, *p.shape[1:], dtype=F64).to(p.dtype), N)
            else:
                p.grad = torch.randn_like(p)
        optimizer.step()
        optimizer.zero_grad()


def step_on_zeros(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer's state by hand; at a rate of 0, without which dense states of 16 bits stay torch's."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if model.table.dtype in (BF16, F16) else group["lr"]
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()


def by_functions(flat: bool):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def save(model, optimizer, folder):
        of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
        dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder, no_dist=True)

    def load(model, optimizer, folder):
        of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
        state = {"model": of_model, "optimizer": of_optimizer}
        dcp.load(state, checkpoint_id=folder, no_dist=True)
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
        )

    return save, load


def save_plainly(model, optimizer, folder):
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder, no_dist=True)


def load_plainly(model, optimizer, folder, *, in_place=False, trained=False):
    if trained:
        train(model, optimizer, range(70, 71))
    else:
        step_on_zeros(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    if not in_place:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])


WAYS = {
    "functions": by_functions(flat=False),
    "functions, flat": by_functions(flat=True),
    "state_dict": (save_plainly, load_plainly),
    "state_dict, trained": (save_plainly, lambda *args: load_plainly(*args, trained=True)),
    "in place, trained": (save_plainly, lambda *args: load_plainly(*args, in_place=True, trained=True)),
}


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
    return copy.deepcopy((dict(model.named_parameters()), optimizer.state_dict()["state"]))


def as_saved(loaded, saved):
    """Give a loaded state the types of the saved one: dense states of 16 bits are float32 until the next step."""
    if isinstance(saved, torch.Tensor):
        return loaded.to(saved.dtype)
    return {key: as_saved(loaded[key], value) for key, value in saved.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "sort"), matrix(list(ALL)))
def test_a_run_is_resumed(name, sort, way, tmp_path):
    """Saved after some steps, loaded into a new model and optimizer, which then do what the first ones do."""
    (dtype, options), (save, load) = SORTS[sort], WAYS[way]
    for bias in (True, False):
        model = Model(dtype, 1, bias=bias)
        optimizer = make(name, model.parameters(), **options)
        train(model, optimizer, range(4))
        save(model, optimizer, tmp_path / f"{bias}")
        resumed = Model(dtype, 2, bias=bias)
        other = make(name, resumed.parameters(), **options)
        load(resumed, other, tmp_path / f"{bias}")
        saved, loaded = state_of(model, optimizer), state_of(resumed, other)
        assert_same(loaded[0], saved[0])
        for number, p in enumerate(resumed.parameters()):
            of_p = loaded[1][number]
            by_rows = bool(of_p["by_rows"])
            assert by_rows == (N in p.shape or "row-wise" in name)
            assert_same(of_p if by_rows else as_saved(of_p, saved[1][number]), saved[1][number])
        for one, its in ((model, optimizer), (resumed, other)):
            train(one, its, range(4, 8))
            its.catch_up()
        assert_same(state_of(resumed, other), state_of(model, optimizer))


@pytest.mark.parametrize("how", ["first gradients sparse", "first gradients dense"])
@pytest.mark.parametrize(("name", "sort"), matrix(list(ALL)))
def test_states_are_tensors_in_the_shapes_of_their_parameters(name, sort, how):
    """From the first step on, and the same ones whatever the first gradient was."""
    dtype, options = SORTS[sort]
    model = Model(dtype, 1)
    optimizer = make(name, model.parameters(), **options)
    if how == "first gradients dense":
        step_on_zeros(model, optimizer)
    else:
        train(model, optimizer, range(1))
    keys = {frozenset(optimizer.state[p]) for p in model.parameters()}
    assert len(keys) == 1
    assert {"step", "by_rows"} <= next(iter(keys))
    for p in (model.table, model.bias, model.cube):
        for key, value in optimizer.state[p].items():
            assert isinstance(value, torch.Tensor), key
            assert value.shape in ((), (N,), p.shape), key
            assert value.device.type == "cpu" or value.dim(), key
    assert optimizer.state[model.bias].get("log_decay", torch.zeros((), dtype=F64)).dtype == F64
    numbers = {frozenset(state) for state in optimizer.state_dict()["state"].values()}
    assert numbers == keys
    train(model, optimizer, range(2, 4))
    assert {frozenset(state) for state in optimizer.state_dict()["state"].values()} == keys
    if "row-wise" not in name:
        assert not optimizer.state[model.linear.weight].keys() & {"by_rows", "row_step", "decayed", "master"}


@pytest.mark.parametrize(("name", "sort"), matrix(list(CASES)))
def test_making_a_state_leaves_dense_steps_to_torch(name, sort):
    """After ``get_state_dict`` of new optimizers: the same bits, and after the next step the same state."""
    dtype, options = SORTS[sort]
    rule, its = CASES[name]
    ours, theirs = nn.Linear(4, 3, dtype=dtype), nn.Linear(4, 3, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    mine = make(name, ours.parameters(), **options)
    twin = getattr(torch.optim, rule)(theirs.parameters(), **{k: v for k, v in its.items() if k not in OURS_ALONE})
    get_state_dict(ours, mine)
    get_state_dict(theirs, twin)
    for step in range(3):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step()
        twin.step()
        if step == 0:
            mine = copy.deepcopy(mine)
            mine.param_groups[0]["params"] = list(mine.param_groups[0]["params"])
            for p, q in zip(ours.parameters(), mine.param_groups[0]["params"], strict=True):
                q.data.copy_(p)
            ours.weight, ours.bias = mine.param_groups[0]["params"]
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_same(p.detach(), q.detach())
        assert_same(dict(mine.state[p]), dict(twin.state.get(q, {})))


def as_earlier(state: dict) -> dict:
    """A state_dict of rows as earlier versions wrote it: Python numbers, and rows of one element for vectors."""
    old = copy.deepcopy(state)
    for of_parameter in old["state"].values():
        if not of_parameter["by_rows"]:
            for key in {"by_rows", "row_step", "decayed", "log_decay", "master"} & of_parameter.keys():
                del of_parameter[key]
            continue
        of_parameter["by_rows"] = True
        if "log_decay" in of_parameter:
            of_parameter["log_decay"] = float(of_parameter["log_decay"])
        for key in {"exp_avg", "exp_avg_sq", "momentum_buffer", "sum", "master"} & of_parameter.keys():
            of_parameter[key] = of_parameter[key].view(N, -1)
    return old


@pytest.mark.parametrize(("name", "sort"), matrix(list(CASES)))
def test_states_of_earlier_versions_are_taken(name, sort):
    dtype, options = SORTS[sort]
    model, resumed = Model(dtype, 1), Model(dtype, 2)
    optimizer, other = (make(name, m.parameters(), **options) for m in (model, resumed))
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save(as_earlier(optimizer.state_dict()), file)
    file.seek(0)
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(state_of(resumed, other), state_of(model, optimizer))
    for one, its in ((model, optimizer), (resumed, other)):
        train(one, its, range(4, 6))
    assert_same(state_of(resumed, other), state_of(model, optimizer))
    train(model, optimizer, range(6, 7))
    assert not torch.equal(model.table, resumed.table)


def test_racy_steps_are_saved_too(tmp_path):
    """Parameters on which ``hogwild=True`` steps have entries as all others have."""
    import nce_ext

    def start(seed):
        torch.manual_seed(seed)
        model = nn.ModuleDict({"linear": nn.Linear(3, 3), "loss": nce_ext.NCELoss(3, N, nce_ext.noise.Uniform(N), 2)})
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        model["loss"].fuse_optimizer(optimizer, hogwild=True)
        return model, optimizer

    def step(model, optimizer):
        torch.manual_seed(5)
        optimizer.zero_grad()
        model["loss"](model["linear"](torch.randn(2, 3)), torch.tensor([1, 4])).backward()
        optimizer.step()

    (save, load), (model, optimizer), (resumed, other) = WAYS["functions"], start(1), start(2)
    for _ in range(2):
        step(model, optimizer)
    save(model, optimizer, tmp_path)
    load(resumed, other, tmp_path)
    for each in ((model, optimizer), (resumed, other)):
        step(*each)
    assert_same(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize("options", [{"full_state_dict": True}, {"cpu_offload": True}], ids=str)
@pytest.mark.parametrize("name", QUICK[1:])  # full_state_dict asks for a state of a dimension or more, also of torch's
def test_other_options_of_the_functions(name, options):
    model, resumed = Model(F32, 1), Model(F32, 2)
    optimizer, other = make(name, model.parameters()), make(name, resumed.parameters())
    train(model, optimizer, range(3))
    chosen = StateDictOptions(**options)
    of_model, of_optimizer = copy.deepcopy(get_state_dict(model, optimizer, options=chosen))
    set_state_dict(resumed, other, model_state_dict=of_model, optim_state_dict=of_optimizer, options=chosen)
    for one, its in ((model, optimizer), (resumed, other)):
        train(one, its, range(3, 5))
    assert_same(state_of(resumed, other), state_of(model, optimizer))


@pytest.mark.parametrize("name", QUICK)
def test_numbers_of_a_state_are_on_the_cpu_under_any_default_device(name):
    """Or every step would wait for the device."""
    model, resumed = Model(F32, 1), Model(F32, 2)
    optimizer, other = make(name, model.parameters()), make(name, resumed.parameters())
    gradients = {p: sparse([1, 3], torch.randn(2, *p.shape[1:]), N) for p in (model.table, model.bias)}
    with torch.device("meta"):
        for p, gradient in gradients.items():
            p.grad = gradient
        optimizer.step()
        other.load_state_dict(optimizer.state_dict())
    for p in (model.table, model.bias):
        assert {value.device.type for value in optimizer.state[p].values()} == {"cpu"}
    assert {value.device.type for state in other.state.values() for value in state.values()} == {"cpu"}


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("name", QUICK)
def test_states_that_are_made_in_inference_mode_can_be_changed_outside(name, sort):
    dtype, options = SORTS[sort]
    model = nn.ParameterDict({"table": parameter(N, 4, dtype=dtype), "bias": parameter(N, dtype=dtype)})
    model["cube"] = parameter(N, 2, 2, dtype=dtype)
    optimizer = make(name, model.parameters(), **options)
    for mode in (True, False):
        with torch.inference_mode(mode):
            for p in model.values():
                values = torch.randn(2, *p.shape[1:], dtype=dtype)
                p.grad = sparse([1, 3], values, N)
                if mode:
                    assert not optimizer.state.get(p) or "Adagrad" in name
            optimizer.step()
        assert not any(value.is_inference() for p in model.values() for value in optimizer.state[p].values())
