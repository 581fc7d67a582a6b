"""The table of a law as part of a module: whatever others write into it, or leave unwritten, is refused by name."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import nce_ext
from nce_ext import noise as noises
from nce_ext.noise.law_table import flaw_of_table

V, D, K = 20, 8, 3
SEED = torch.tensor([3, 4])
COUNTS = np.arange(1, V + 1)
HIDDEN, TARGET = torch.randn(6, D), torch.tensor([1, 2, 3, 0, 19, 7])
LAWS = {
    "Unigram": lambda **where: noises.Unigram(COUNTS, **where),
    "Mixture": lambda **where: noises.Mixture([noises.Unigram(COUNTS), noises.Uniform(V)], [2, 1], **where),
    "Streaming": lambda **where: noises.Streaming(V, **where),
    "Uniform": lambda **where: noises.Uniform(V, **where),
    "LogUniform": lambda **where: noises.LogUniform(V, **where),
}
TABLES = [name for name in LAWS if "niform" not in name]
REFUSED = r"noise's table must be an alias table of its 20 classes, got .*; load its state_dict, or construct"


def loss_of(noise, backend="auto", **options):
    return nce_ext.NCELoss(D, V, noise, K, backend=backend, **options)


def spoil(table: torch.Tensor, how: str) -> None:
    if how == "zeros":
        table.zero_()
    elif how == "garbage":
        table.copy_(torch.arange(table.numel()).view(table.shape) * 7919 - 2**30)
    elif how == "an alias too large":
        table[::2, 1] = V
    elif how == "a negative alias":
        table[3, 1] = -1
    elif how == "another threshold":
        table[0, 0] = 1
    elif how == "another law":
        table.copy_(noises.Unigram(COUNTS[::-1]).table)
        table[:, 2:] = noises.Unigram(COUNTS).table[:, 2:]
    elif how == "log q of the aliases":
        table[:, 3] = table[:, 2].flip(0)


SPOILT = ["zeros", "garbage", "an alias too large", "a negative alias", "another threshold", "another law",
          "log q of the aliases"]  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_a_table_that_was_changed_is_refused_by_name(how, backend):
    noise = noises.Unigram(COUNTS)
    loss_fn = loss_of(noise, backend)
    loss_fn(HIDDEN, TARGET)
    before = noise.table.clone()
    spoil(noise.table, how)
    for use in (
        lambda: loss_fn(HIDDEN, TARGET),
        lambda: noise.sample(5),
        lambda: noise.sample_distinct(3),
        lambda: noise.log_prob(TARGET),
        lambda: noise.log_prob(TARGET, dtype=torch.float64),
        noise.probabilities,
        loss_fn.reset_parameters,
        lambda: noises.Mixture([noise], [1]),
        lambda: nce_ext.evaluate.diagnose(loss_fn, HIDDEN, TARGET),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            use()
    noise.table.copy_(before)
    loss_fn(HIDDEN, TARGET)


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_no_alias_table_is_refused(how, assign):
    loss_fn = loss_of(noises.Unigram(COUNTS))
    state = copy.deepcopy(loss_fn.state_dict())
    expected = loss_fn(HIDDEN, TARGET, seed=SEED)
    spoil(state["noise.table"], how)
    with pytest.raises(RuntimeError, match=r"noise\.table must be an alias table of 20 classes, got "):
        loss_fn.load_state_dict(state, assign=assign)
    assert torch.equal(loss_fn(HIDDEN, TARGET, seed=SEED), expected)


@pytest.mark.parametrize("table", [
    noises.Unigram(range(1, V)).table, noises.Unigram(COUNTS).table.long(), noises.Unigram(COUNTS).table.float(), "it",
])  # fmt: skip
def test_a_checkpoint_of_another_shape_or_type_is_refused(table):
    noise = noises.Unigram(COUNTS)
    with pytest.raises(RuntimeError, match=r"table must be an alias table of 20 classes, got (a .* tensor|str)"):
        noise.load_state_dict({"table": table})


@pytest.mark.parametrize("weights", [[1.0], [1, 0, 1], [1] * 7, np.geomspace(1e-300, 1e300, 50), [0, 5], range(1, 999)])
def test_every_table_that_is_built_is_one(weights):
    table = noises.Unigram(weights).table
    assert flaw_of_table(table, len(table)) is None
    table = nce_ext.reference.alias_table(*nce_ext.noise.laws._unnormalised_law(torch.tensor(weights).double(), 1.0))
    assert flaw_of_table(table, len(table)) is None


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("alias", [V, 2**31 - 1, -1])
def test_what_nobody_sees_being_written_is_not_read_through(alias):
    """``.data`` counts no versions; the kernels look at what they draw."""
    noise = noises.Unigram(COUNTS)
    loss_fn = loss_of(noise)
    noise.table.data[:, 0], noise.table.data[:, 1] = 0, alias
    with pytest.raises(RuntimeError, match="table must be an alias table of 20 classes, got an alias out of range"):
        loss_fn(HIDDEN, TARGET)
    with pytest.raises(RuntimeError, match="table must be an alias table of 20 classes, got an alias out of range"):
        noise.sample(5)


def test_what_nobody_sees_being_written_in_the_reference():
    noise = noises.Unigram(COUNTS)
    noise.table.data[:, 0], noise.table.data[:, 1] = 0, V
    assert torch.isnan(loss_of(noise, "reference", correction="none")(HIDDEN, TARGET))


def test_a_table_is_looked_at_once(monkeypatch):
    looked = []
    monkeypatch.setattr(noises.law_table, "flaw_of_table", lambda *given: looked.append(given))
    noise = noises.Unigram(COUNTS)
    loss_fn = loss_of(noise)
    for _ in range(3):
        loss_fn(HIDDEN, TARGET).backward()
    loss_fn.to(torch.float64).to("meta").to_empty(device="cpu").to(torch.float32)
    loss_fn.reset_parameters()
    loss_fn(HIDDEN, TARGET)
    streaming = noises.Streaming(V)
    streaming.update(TARGET)
    streaming.rebuild()
    streaming.sample(3)
    assert not looked
    noise.table += 0
    for _ in range(3):
        loss_fn(HIDDEN, TARGET)
    assert len(looked) == 1


# Averages
@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("average", [{}, {"avg_fn": get_ema_avg_fn(0.9)}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_leave_the_table_alone(name, average, use_buffers):
    model = nn.Sequential(nn.Linear(D, D), loss_of(LAWS[name]()))
    averaged = AveragedModel(model, use_buffers=use_buffers, **average)
    for _ in range(4):
        averaged.update_parameters(model)
    for of in (model, averaged.module):
        assert torch.equal(of[1].noise.table, LAWS[name]().table)
        of[1](HIDDEN, TARGET)
    assert not any("table" in name for name, _ in model.named_buffers())


def test_an_average_of_state_dicts_is_refused():
    """As some do by hand: every entry, in place."""
    average, model = loss_of(noises.Unigram(COUNTS)), loss_of(noises.Unigram(COUNTS))
    for mine, other in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(0.9 * mine + 0.1 * other)
    with pytest.raises(ValueError, match=REFUSED):
        average(HIDDEN, TARGET)
    model(HIDDEN, TARGET)


# State
@pytest.mark.parametrize("name", LAWS)
def test_keys_of_the_state(name):
    state = nn.ModuleDict({"noise": LAWS[name]()}).state_dict()
    own = ["values", "last_step", "step", "total"] if name == "Streaming" else []
    assert list(state) == [f"noise.{key}" for key in (["table"] if name in TABLES else []) + own]
    assert not any(value.requires_grad for value in state.values())


def test_missing_and_unexpected_tables():
    state = noises.Unigram(COUNTS).state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"table\""):
        noises.Unigram(COUNTS).load_state_dict({})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"table\""):
        noises.Uniform(V).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"tables\""):
        noises.Unigram(COUNTS).load_state_dict({**state, "tables": state["table"]})
    assert noises.Unigram(COUNTS).load_state_dict({}, strict=False).missing_keys == ["table"]


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_is_loaded(assign):
    other, noise = noises.Unigram(COUNTS[::-1].copy()), noises.Unigram(COUNTS)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    noise.load_state_dict(state, assign=assign)
    assert (noise.table.data_ptr() == state["table"].data_ptr()) == assign
    assert torch.equal(noise.sample(99, seed=SEED), other.sample(99, seed=SEED))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda noise: pickle.loads(pickle.dumps(noise))])
@pytest.mark.parametrize("name", LAWS)
def test_copies(name, copied):
    noise = LAWS[name]()
    twin = copied(noise)
    assert torch.equal(twin.sample(99, seed=SEED), noise.sample(99, seed=SEED))
    assert list(twin.state_dict()) == list(noise.state_dict())


def test_a_module_that_was_pickled_with_a_buffer():
    noise = noises.Unigram(COUNTS)
    state = noise.__getstate__()
    old = {key: value for key, value in state.items() if key not in ("table", "_kept", "_checked")}
    old["_buffers"] = {"table": state["table"]}
    restored = noises.Unigram.__new__(noises.Unigram)
    restored.__setstate__(old)
    assert not list(restored.buffers())
    assert list(restored.state_dict()) == ["table"]
    assert torch.equal(restored.to(torch.float64).sample(9, seed=SEED), noise.sample(9, seed=SEED))


def test_shared_memory():
    noise = noises.Unigram(COUNTS).share_memory()
    assert noise.table.is_shared()
    assert torch.equal(noise.sample(9, seed=SEED), noises.Unigram(COUNTS).sample(9, seed=SEED))


def test_the_table_as_a_parameter_of_loaders():
    """Loaders that set attributes one by one wrap every tensor as a parameter."""
    noise, other = noises.Unigram(COUNTS), noises.Unigram(COUNTS[::-1].copy())
    noise.table = nn.Parameter(other.table, requires_grad=False)
    assert not list(noise.parameters())
    assert torch.equal(noise.sample(9, seed=SEED), other.sample(9, seed=SEED))


@pytest.mark.parametrize("name", TABLES)
def test_checkpoints_of_torch_distributed(name):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    trained, fresh = (
        loss_of(LAWS[name]()),
        loss_of(noises.Unigram(COUNTS[::-1].copy()) if name == "Unigram" else LAWS[name]()),
    )
    set_model_state_dict(fresh, get_model_state_dict(trained))
    assert torch.equal(fresh.noise.table, trained.noise.table)


# The meta device, and others
def test_a_table_that_was_never_filled():
    """The law is kept while the module has no memory."""
    loss_fn = nce_ext.NCELoss(D, V, noises.Unigram(torch.arange(1, V + 1)), K, device="meta")
    assert loss_fn.noise.table.is_meta
    loss_fn.to_empty(device="cpu")
    loss_fn.reset_parameters()
    assert torch.isfinite(loss_fn(HIDDEN, TARGET))
    assert torch.equal(loss_fn.noise.table, noises.Unigram(COUNTS).table)
    assert torch.equal(loss_fn.bias.detach(), loss_fn.noise.log_prob(torch.arange(V)))


def test_a_table_whose_law_is_nowhere():
    noise = noises.Unigram(COUNTS)
    noise.table = torch.empty_like(noise.table, device="meta")
    loss_fn = loss_of(noises.Unigram(COUNTS))
    loss_fn.noise = noise
    with pytest.raises(ValueError, match=r"noise must be on .* got meta; load its state_dict with assign=True"):
        loss_fn(HIDDEN, TARGET)
    loss_fn.to_empty(device="cpu")
    loss_fn.noise.table.zero_()
    with pytest.raises(ValueError, match=REFUSED):
        loss_fn.reset_parameters()
    loss_fn.noise.load_state_dict(noises.Unigram(COUNTS).state_dict(), assign=True)
    loss_fn.reset_parameters()
    assert torch.isfinite(loss_fn(HIDDEN, TARGET))


@pytest.mark.parametrize("name", LAWS)
def test_construction_on_the_meta_device(name):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(D, D), loss_of(LAWS[name]()))
        listed = noises.Unigram(list(range(1, V + 1)))
    assert model[1].noise.table.is_meta
    assert listed.table.is_meta
    filled = copy.deepcopy(model).to_empty(device="cpu")
    for module in (filled[0], filled[1]):
        module.reset_parameters()
    assert torch.equal(filled[1].noise.table, LAWS[name]().table)
    assert torch.isfinite(filled[1](HIDDEN, TARGET))
    if name == "Streaming":
        assert not any(state.any() for state in filled[1].noise.buffers())


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("at_once", [True, False])
def test_loading_into_a_model_on_the_meta_device(name, at_once):
    trained = nn.Sequential(nn.Linear(D, D), loss_of(LAWS[name]()))
    if name == "Streaming":
        trained[1].noise.update(TARGET)
        trained[1].noise.rebuild()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(D, D), loss_of(LAWS[name]()))
    state = trained.state_dict()
    for part in [state] if at_once else [{key: value} for key, value in state.items()]:
        model.load_state_dict(part, assign=True, strict=at_once)
    assert torch.equal(model[1](HIDDEN, TARGET, seed=SEED), trained[1](HIDDEN, TARGET, seed=SEED))
    assert not any(tensor.is_meta for tensor in (model[1].noise.table, *model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", ["Uniform", "LogUniform", "Unigram", "Mixture"])
def test_a_law_alone_leaves_the_meta_device(name):
    for moved in (
        LAWS[name](device="meta").to("cpu"),
        LAWS[name]().to("meta").to("meta").to("cpu"),
        LAWS[name](device="meta").to_empty(device="cpu"),
    ):
        assert torch.equal(moved.sample(9, seed=SEED), LAWS[name]().sample(9, seed=SEED))


def test_a_checkpoint_that_is_loaded_on_the_meta_device_is_the_law():
    noise, other = noises.Unigram(COUNTS, device="meta"), noises.Unigram(COUNTS[::-1].copy())
    noise.load_state_dict(other.state_dict())
    assert noise.table.is_meta
    assert torch.equal(noise.to("cpu").table, other.table)
    noise.load_state_dict({"table": other.table.to("meta")}, assign=True)
    assert torch.equal(noise.table, other.table)


def test_the_default_device_is_that_of_every_law():
    torch.set_default_device("meta")
    try:
        made = {name: law() for name, law in LAWS.items()}
        assert {law.table.device.type for law in made.values()} == {"meta"}
        assert noises.Unigram(COUNTS, device="cpu").table.device.type == "cpu"
        with pytest.raises(ValueError, match=r"counts must be on a device with memory, got .* on meta"):
            noises.Unigram(torch.arange(1, 3))
    finally:
        torch.set_default_device(None)
    assert {law().table.device.type for law in LAWS.values()} == {"cpu"}


# Counts
def test_counts_of_any_layout_and_byte_order():
    expected = noises.Unigram(COUNTS[::-1].copy()).table
    ascending = np.sort(COUNTS)
    for counts in (
        ascending[::-1], ascending[::-1].astype(">i8"), ascending[::-1].astype(">f4"), np.stack([ascending])[0, ::-1],
        ascending[::-1].astype(np.uint64), ascending[::-1].astype(np.float16), list(ascending[::-1]),
    ):  # fmt: skip
        assert torch.equal(noises.Unigram(counts).table, expected)
    frozen = ascending[::-1].copy()
    frozen.flags.writeable = False
    assert torch.equal(noises.Unigram(frozen).table, expected)
    assert noises.Mixture([noises.Uniform(V)] * 2, np.array([1.0, 3.0])[::-1]).counts == [3, 1]


def test_streaming_is_not_lost_by_its_own_rebuild():
    noise = noises.Streaming(V)
    for _ in range(3):
        noise.update(TARGET)
        noise.rebuild()
        noise.sample(4)
