"""Run by each rank: save what other numbers of ranks load, and load what they have saved, bit for bit.

Arguments: a folder, and what is done there, each by a word: "save:NAME", "load:NAME", "train", "continue" or "resume".
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks.sharded_run import everybody, run_all, start
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import nce_ext
from nce_ext.distributed import ShardedLoss, shard

NOISE = nce_ext.noise.Unigram(torch.arange(1.0, 3001))


def losses() -> dict[str, nn.Module]:
    """Of more blocks of initial values than ranks; of fewer classes than ranks; without bias; of 16 bits."""
    return {
        "large": nce_ext.NCELoss(3, 3000, NOISE, 5, log_z="learned", sparse=True),
        "five": nce_ext.SampledSoftmaxLoss(4, 5, nce_ext.noise.LogUniform(5), 2, bias=False, dtype=torch.bfloat16),
        "two": nce_ext.NegativeSamplingLoss(4, 2, nce_ext.noise.Uniform(2), 2),
    }


def model(mesh: DeviceMesh | None, seed: int) -> nn.ModuleDict:
    """A model around losses, sharded if there is a mesh: its own rows, made on the rank that has them."""
    torch.manual_seed(seed)
    trunk = nn.Linear(4, 3)
    if mesh is None:
        whole = losses()
    else:
        with torch.device("meta"):
            whole = losses()
        whole = {name: shard(loss, mesh) for name, loss in whole.items()}
    with torch.no_grad():
        whole["large"].log_z.fill_(seed + 0.5)
    return nn.ModuleDict({"trunk": trunk, **whole})


def full(state: dict[str, object]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def save(folder: Path, name: str, seed: int, mesh: DeviceMesh) -> None:
    own = model(mesh, seed)
    state = own.state_dict()
    keys = {key for key in nn.ModuleDict({"trunk": nn.Linear(4, 3), **losses()}).state_dict()}
    assert set(state) == keys, set(state) ^ keys
    for key in ("large.weight", "large.bias", "five.weight", "two.bias"):
        assert isinstance(state[key], DTensor)
        assert len(state[key]) == {"large": 3000, "five": 5, "two": 2}[key.partition(".")[0]]
    dcp.save(state, checkpoint_id=folder / name)
    values = full(state)
    if dist.get_rank() == 0:
        torch.save(values, folder / f"{name}.pt")
    dist.barrier()


def load(folder: Path, name: str, mesh: DeviceMesh) -> None:
    expected = torch.load(folder / f"{name}.pt")
    # As many ranks as there are make the same table of one seed.
    assert_equal(full(model(mesh, int(name[-1])).state_dict()), expected)

    own = model(mesh, 99)
    assert not torch.equal(full(own.state_dict())["large.weight"], expected["large.weight"])
    state = own.state_dict()
    dcp.load(state, checkpoint_id=folder / name)
    own.load_state_dict(state)
    check(own, expected)

    # Through PyTorch's own functions for the state of models.
    own = model(mesh, 98)
    state = get_model_state_dict(own)
    dcp.load(state, checkpoint_id=folder / name)
    set_model_state_dict(own, state)
    check(own, expected)
    whole = get_model_state_dict(own, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        assert_equal(whole, expected)

    # From whole tensors, and into losses that are not sharded.
    own = model(mesh, 97)
    own.load_state_dict(expected)
    check(own, expected)
    unsharded = model(None, 96)
    state = unsharded.state_dict()
    dcp.load(state, checkpoint_id=folder / name)
    unsharded.load_state_dict(state)
    assert_equal(unsharded.state_dict(), expected)
    if dist.get_world_size() == 1:
        unsharded.load_state_dict(model(mesh, 95).state_dict() | expected)


def train(loss: ShardedLoss, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """On the same examples whatever the number of ranks is."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for step in steps:
        torch.manual_seed(step)
        hidden, target = torch.randn(12, 3, dtype=torch.float64), torch.randint(3000, (12,))
        own = slice(12 * rank // size, 12 * (rank + 1) // size)
        optimizer.zero_grad()
        loss(hidden[own], target[own], seed=torch.tensor([step, 1])).backward()
        optimizer.step()


OPTIMIZERS = {
    "adamw": lambda p: nce_ext.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw, dense": lambda p: nce_ext.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "rowwise": lambda p: nce_ext.optim.RowwiseAdagrad(p, lr=0.1),
    "sparse adam": lambda p: torch.optim.SparseAdam(p, lr=0.1),
}


def trained(mesh: DeviceMesh, name: str) -> tuple[ShardedLoss, torch.optim.Optimizer]:
    torch.manual_seed(2)
    with torch.device("meta"):
        whole = nce_ext.NCELoss(3, 3000, NOISE, 5, sparse="dense" not in name, dtype=torch.float64)
    loss = shard(whole, mesh)
    return loss, OPTIMIZERS[name](loss.parameters())


def save_training(folder: Path, mesh: DeviceMesh) -> None:
    """Six steps, saved after the third."""
    for name in OPTIMIZERS:
        loss, optimizer = trained(mesh, name)
        train(loss, optimizer, range(3))
        state = {"model": loss.state_dict(), "optimizer": loss.optimizer_state_dict(optimizer)}
        assert any(isinstance(value, DTensor) for value in state["optimizer"]["weight"].values())
        dcp.save(state, checkpoint_id=folder / f"training {name}")
        train(loss, optimizer, range(3, 6))
        values = full(loss.state_dict())
        if dist.get_rank() == 0:
            torch.save(values, folder / f"training {name}.pt")
    dist.barrier()


def continue_training(folder: Path, mesh: DeviceMesh) -> None:
    for name in OPTIMIZERS:
        loss, optimizer = trained(mesh, name)
        with torch.no_grad():
            loss.weight.zero_()
        loss(torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)).backward()
        optimizer.step()
        assert not loss.weight.any()
        state = {"model": loss.state_dict(), "optimizer": loss.optimizer_state_dict(optimizer)}
        dcp.load(state, checkpoint_id=folder / f"training {name}")
        loss.load_state_dict(state["model"])
        loss.load_optimizer_state_dict(optimizer, state["optimizer"])
        train(loss, optimizer, range(3, 6))
        expected = torch.load(folder / f"training {name}.pt")
        for key, got in full(loss.state_dict()).items():
            assert torch.allclose(got, expected[key], rtol=1e-11, atol=1e-13), (name, key)


def resume(folder: Path) -> None:
    """A model that all ranks have, through PyTorch's own functions for the state of models and optimizers."""

    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        loss = nce_ext.NCELoss(3, 3000, NOISE, 5, sparse=True)
        whole = nn.ModuleDict({"trunk": nn.Linear(4, 3), "loss": loss})
        return whole, nce_ext.optim.AdamW(whole.parameters(), lr=0.1, weight_decay=0.1)

    def steps(whole: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            torch.manual_seed(number)
            hidden, target = whole["trunk"](torch.randn(12, 4)), torch.randint(3000, (12,))
            optimizer.zero_grad()
            whole["loss"](hidden, target, seed=torch.tensor([number, 1])).backward()
            optimizer.step()

    first, resumed = start(1), start(2)
    steps(*first, range(3))
    of_model, of_optimizer = get_state_dict(*first)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder / "resumed")
    of_model, of_optimizer = get_state_dict(*resumed)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=folder / "resumed")
    set_state_dict(*resumed, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for each in (first, resumed):
        steps(*each, range(3, 6))
    assert_equal(resumed[0].state_dict(), first[0].state_dict())


def check(own: nn.ModuleDict, expected: dict[str, Tensor]) -> None:
    """The parameters themselves, and what they are used for."""
    for name, loss in own.items():
        if isinstance(loss, ShardedLoss):
            assert torch.equal(loss.weight, expected[f"{name}.weight"][loss.first : loss.last])
            rows = everybody((loss.first, loss.last))
            assert [first for first, _ in rows] == [0, *(last for _, last in rows[:-1])]
            assert rows[-1][1] == loss.n_classes
            parts = torch.arange(loss.n_classes).chunk(len(rows))
            assert [last - first for first, last in rows if last > first] == [len(part) for part in parts]
    assert_equal(full(own.state_dict()), expected)
    assert own["large"](torch.randn(2, 3), torch.tensor([1, 2999])).isfinite()
    assert own["two"](torch.randn(2, 4), torch.tensor([1, 0])).isfinite()


def missing_and_unknown_keys(mesh: DeviceMesh) -> None:
    own = shard(losses()["two"], mesh)
    state = own.state_dict()
    bias = state.pop("bias")
    found = own.load_state_dict({**state, "biases": bias}, strict=False)
    assert found.missing_keys == ["bias"]
    assert found.unexpected_keys == ["biases"]


if __name__ == "__main__":
    of_all_ranks = start()
    path = Path(sys.argv[1])
    checks = {"keys": lambda: missing_and_unknown_keys(of_all_ranks)}
    for argument in sys.argv[2:]:
        verb, _, what = argument.partition(":")
        if argument == "train":
            checks[argument] = lambda: save_training(path, of_all_ranks)
        elif argument == "resume":
            checks[argument] = lambda: resume(path)
        elif argument == "continue":
            checks[argument] = lambda: continue_training(path, of_all_ranks)
        elif verb == "save":
            checks[argument] = lambda what=what: save(path, what, int(what[-1]), of_all_ranks)
        else:
            checks[argument] = lambda what=what: load(path, what, of_all_ranks)
    run_all(checks)
