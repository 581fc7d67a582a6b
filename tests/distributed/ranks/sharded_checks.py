"""Run by each of three ranks: refusals, agreement, bytes, autograd's corners, initial values and evaluation."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import leaf
from ranks.sharded_run import everybody, run_all, start
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F

import nce_ext
from nce_ext import _checks
from nce_ext.distributed import ShardedLoss, shard

D, V, K = 4, 10, 3
NOISE = nce_ext.noise.Unigram(torch.arange(1.0, V + 1))
SEED = torch.tensor([5, 6])
MESH: DeviceMesh
RANK = 0


def loss_fn(kind: type = nce_ext.NCELoss, **options: Any) -> nn.Module:
    torch.manual_seed(7)
    options = {"in_features": D, "n_classes": V, "noise": NOISE, "num_negatives": K, **options}
    return kind(**options)


def batch(n: int = 3, **changes: Any) -> dict[str, Any]:
    torch.manual_seed(RANK)
    return {"hidden": torch.randn(n, D), "target": torch.randint(V, (n,)), "seed": SEED, **changes}


def refused(call: Any, error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert re.search(message, str(caught.value)), caught.value


def works(loss: ShardedLoss) -> None:
    before = loss.weight.detach().clone()
    value = loss(**batch())
    assert len(set(everybody(value.item()))) == 1
    assert torch.equal(loss.weight, before)


# Refusals: {what: (of the constructor on rank 1, message on all ranks)}
CONSTRUCTORS = {
    "V": ({"n_classes": 9, "noise": nce_ext.noise.Uniform(9)}, "loss_fn must be the same .* rank 1"),
    "D": ({"in_features": 5}, "loss_fn must be the same .* rank 1"),
    "k": ({"num_negatives": 4}, "loss_fn must be the same .* rank 1"),
    "bias": ({"bias": False}, "loss_fn must be the same .* rank 1"),
    "dtype": ({"dtype": torch.float64}, "dtype must be the same .* rank 1"),
    "reduction": ({"reduction": "sum"}, "options must be the same .* rank 1"),
    "shared": ({"shared": True}, "must be the same .* rank 1"),
    "margin": ({"margin": 0.5}, "must be the same .* rank 1"),
    "log_z": ({"log_z": 1e-9}, "must be the same .* rank 1"),
    "learned log_z": ({"log_z": "learned"}, "must be the same .* rank 1"),
    "ignore_index": ({"ignore_index": 3}, "options must be the same .* rank 1"),
    "law": ({"noise": nce_ext.noise.Unigram(torch.ones(V))}, "noise must be the same .* rank 1"),
    "order of the law": (
        {"noise": nce_ext.noise.Unigram(torch.arange(V, 0.0, -1))},
        "noise must be the same .* checksum .* rank 1",
    ),
    "class of noise": ({"noise": nce_ext.noise.Uniform(V)}, "noise must be the same .* rank 1"),
    "weights": ({"device": "meta", "noise": nce_ext.noise.Uniform(V)}, "weights must be the same .* rank 1"),
}
# {what: (of the call on rank 1, message on all ranks)}
CALLS = {
    "seed": ({"seed": torch.tensor([5, 7])}, r"seed must be the same on all ranks, got \[5, 6\] .* rank 1"),
    "no seed": ({"seed": None}, "seed must be the same .* 'drawn' on rank 1"),
    "T": ({"target": torch.ones(3, 2, dtype=torch.int64)}, "target must be the same .*'2 an example' on rank 1"),
    "k": ({"negatives": torch.tensor([1, 2])}, "num_negatives must be the same .* 2 on rank 1"),
    "negatives": ({"negatives": torch.tensor([1, 2, 3])}, "negatives must be the same .* rank 1"),
    "gradient": ({"hidden": torch.ones(3, D, requires_grad=True)}, "hidden must be the same .* gradient' on rank 1"),
    "dtype": ({"hidden": torch.ones(3, D, dtype=torch.bfloat16)}, "hidden must be the same .*'bfloat16.* rank 1"),
    "log_z": ({"log_z": 0.5}, r"log_z must be the same .*'0\.5' on rank 1"),
    "log_z of each": ({"log_z": torch.ones(3)}, "log_z must be the same .* one per example' on rank 1"),
}
# {what: (of the call on rank 1, error and message on rank 1)}
BAD = {
    "target": ({"target": torch.tensor([1, V, 2])}, ValueError, r"target must be in 0 \.\. 9 .* got 10 at index \[1\]"),
    "negatives": ({"negatives": torch.tensor([1, 2, -1])}, ValueError, r"negatives must be in 0 \.\. 9, got -1"),
    "hidden": ({"hidden": torch.ones(3, D + 1)}, ValueError, "hidden must have weight's D = 4"),
    "type": ({"target": torch.ones(3)}, TypeError, "target must be a int64 or int32 tensor"),
    "shape": ({"target": torch.ones(2, dtype=torch.int64)}, ValueError, r"target must have shape \[3\]"),
    "seed": ({"seed": torch.tensor([1])}, ValueError, r"seed must have shape \[2\]"),
    "weights": ({"sample_weight": torch.ones(2)}, ValueError, r"sample_weight must have shape \[3\]"),
    "None": ({"hidden": None}, TypeError, "hidden must be a .* got NoneType"),
}


# {what: (call on all ranks, error, message)}
OTHERS = {
    "another loss": (
        lambda: shard(nn.Linear(D, V), MESH), TypeError,
        "loss_fn must be an NCELoss, NegativeSamplingLoss or SampledSoftmaxLoss, which have a vocabulary, got Linear",
    ),
    "no mesh": (
        lambda: shard(loss_fn(), "cpu"), TypeError, "device_mesh must be a torch.distributed DeviceMesh, got str"
    ),
    "mesh of two dimensions": (
        lambda: shard(loss_fn(), square()), ValueError, "device_mesh must have one dimension, got 2"
    ),
    "rows of others": (
        lambda: shard(loss_fn(), MESH).as_dtensor(torch.ones(99)), ValueError,
        r"rows must be \[\d, \.\.\.\], got shape \[99\]",
    ),
    "hidden to evaluate": (
        lambda: shard(loss_fn(), MESH).logits(torch.ones(2, 5)), ValueError,
        r"hidden must be \[\.\.\., 4\], got shape \[2, 5\]",
    ),
    "dtype to evaluate": (
        lambda: shard(loss_fn(), MESH).predict(torch.ones(2, 4).half()), TypeError,
        "hidden must be a float32 tensor, got a float16 tensor",
    ),
    "table of another size": (
        lambda: shard(loss_fn(), MESH).load_state_dict({"weight": torch.ones(V + 1, D), "bias": torch.ones(V)}),
        RuntimeError, r"weight must have shape \[10, 4\], got \[11, 4\]",
    ),
    "log_z of a softmax": (
        lambda: shard(loss_fn(nce_ext.SampledSoftmaxLoss), MESH)(**batch(log_z=0.5)), ValueError,
        r"log_z must be 0\.0 with a softmax loss",
    ),
}  # fmt: skip


def square() -> DeviceMesh:
    return init_device_mesh("cpu", (1, 3), mesh_dim_names=("data", "vocabulary"))


def differs_in_the_constructor(name: str) -> None:
    changes, message = CONSTRUCTORS[name]
    kind = nce_ext.NegativeSamplingLoss if name == "margin" else nce_ext.NCELoss
    mine = loss_fn(kind, **changes) if RANK == 1 else loss_fn(kind)
    refused(lambda: shard(mine, MESH), ValueError, message)
    works(shard(loss_fn(), MESH))


def differs_in_the_call(name: str) -> None:
    changes, message = CALLS[name]
    loss = shard(loss_fn(), MESH)
    refused(lambda: loss(**batch(**(changes if RANK == 1 else {}))), ValueError, message)
    works(loss)


def is_bad_on_one_rank(name: str) -> None:
    changes, error, message = BAD[name]
    loss = shard(loss_fn(), MESH)
    if RANK == 1:
        refused(lambda: loss(**batch(**changes)), error, message)
    else:
        refused(lambda: loss(**batch()), RuntimeError, f"rank 1 raised {error.__name__}: {message}")
    works(loss)


def is_refused(name: str) -> None:
    refused(*OTHERS[name])
    works(shard(loss_fn(), MESH))


def takes_a_part_of_a_larger_mesh() -> None:
    works(shard(loss_fn(), square()["vocabulary"]))


def notices_a_law_that_parts() -> None:
    noise = nce_ext.noise.Streaming(V)
    loss = shard(loss_fn(noise=noise), MESH)
    works(loss)
    noise.update(torch.tensor([RANK]))
    noise.rebuild()
    refused(lambda: loss(**batch()), ValueError, "noise must be the same on all ranks, .* checksum")


# Autograd


def backward_twice() -> None:
    loss = shard(loss_fn(log_z="learned"), MESH)
    inputs = batch()
    inputs["hidden"] = hidden = leaf(inputs["hidden"])
    value = loss(**inputs)
    value.backward(retain_graph=True)
    once = [p.grad.clone() for p in (hidden, *loss.parameters())]
    value.backward()
    for gradient, p in zip(once, (hidden, *loss.parameters()), strict=True):
        assert torch.equal(p.grad, 2 * gradient)
    refused(value.backward, RuntimeError, "second time")


def cannot_be_differentiated_twice() -> None:
    loss = shard(loss_fn(), MESH)
    inputs = batch()
    inputs["hidden"] = leaf(inputs["hidden"])
    (gradient,) = torch.autograd.grad(loss(**inputs), inputs["hidden"], create_graph=True)
    refused(gradient.sum().backward, RuntimeError, "twice")


def frozen_parameters() -> None:
    """Only what requires a gradient gets one, and only hidden's is sent."""
    whole = loss_fn()
    whole.weight.requires_grad_(False)
    loss = shard(whole, MESH)
    assert not loss.weight.requires_grad
    inputs = batch()
    loss(**inputs).backward()
    assert loss.weight.grad is None
    assert loss.bias.grad is not None
    inputs["hidden"] = leaf(inputs["hidden"])
    loss.bias.requires_grad_(False)
    loss(**inputs).backward()
    assert inputs["hidden"].grad is not None
    with torch.no_grad():
        assert not loss(**inputs).requires_grad


def weights_that_change_under_a_graph() -> None:
    loss = shard(loss_fn(), MESH)
    value = loss(**batch())
    with torch.no_grad():
        loss.weight.add_(1)
    refused(value.backward, RuntimeError, "modified by an inplace operation")


def under_autocast() -> None:
    """The sums of bfloat16 vectors and float32 weights are in float32, as they are without autocast."""
    for options in ({}, {"shared": True}):
        loss = shard(loss_fn(**options), MESH)
        inputs = batch(20)
        inputs["hidden"] = inputs["hidden"].bfloat16()
        expected = loss(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            got = loss(**inputs)
            got.backward()
        assert torch.equal(got, expected)


def optimizers_step_rows() -> None:
    """The sharded table moves as the whole one does."""
    for kind in (torch.optim.SGD, nce_ext.optim.Adagrad):
        whole = loss_fn(sparse=True, dtype=torch.float64)
        loss = shard(whole, MESH)
        hidden, target = torch.randn(3, 6, D, dtype=torch.float64), torch.randint(V, (3, 6))
        for model, rows in ((whole, slice(None)), (loss, slice(2 * RANK, 2 * RANK + 2))):
            optimizer = kind(model.parameters(), lr=0.5)
            for step in range(3):
                optimizer.zero_grad()
                model(hidden[step, rows], target[step, rows], seed=SEED + step).backward()
                optimizer.step()
        for name in ("weight", "bias"):
            mine, all_rows = getattr(loss, name), getattr(whole, name)[loss.first : loss.last]
            assert torch.allclose(mine, all_rows, rtol=1e-12, atol=1e-14)


def bad_ids_on_a_gpu() -> None:
    """Where ids are not looked for: the loss of such an example is NaN, and it has no gradient."""
    known, _checks.ids = _checks.ids, lambda *_: None
    try:
        for options in ({}, {"shared": True}, {"reduction": "none", "sparse": True}):
            loss = shard(loss_fn(**{"reduction": "none", **options}), MESH)
            inputs = batch()
            inputs["hidden"] = leaf(inputs["hidden"])
            if RANK == 2:
                inputs["target"][1] = V
            value = loss(**inputs)
            assert value.isnan().tolist() == [False, RANK == 2, False]
            value.backward(torch.ones_like(value))
            assert not inputs["hidden"].grad.isnan().any()
            assert inputs["hidden"].grad[1].eq(0).all() == (RANK == 2)
            weight = loss.weight.grad.to_dense() if loss.weight.grad.is_sparse else loss.weight.grad
            assert not weight.isnan().any()
        for more in ({"negatives": torch.tensor([1, 2, V])}, {"negatives": torch.full((3, K), -5)}):
            assert shard(loss_fn(reduction="none"), MESH)(**batch(**more)).isnan().all()
    finally:
        _checks.ids = known


# Seeds, values, evaluation


def draws_the_seed_on_rank_0() -> None:
    loss = shard(loss_fn(), MESH)
    torch.manual_seed(RANK)
    inputs = batch(seed=None)
    generator = torch.Generator().manual_seed(100 + RANK)
    drawn = loss(**inputs, generator=generator)
    own = torch.randint(-(2**63), 2**63 - 1, (2,), generator=torch.Generator().manual_seed(100))
    assert torch.equal(drawn, loss(**{**inputs, "seed": own}))


def makes_its_rows() -> None:
    """Of the law of the unsharded loss, no two ranks the same."""
    n_classes, dim = 5000, 8
    noise = nce_ext.noise.Unigram(torch.arange(n_classes, dtype=torch.float64))  # class 0 is never drawn
    with torch.device("meta"):
        whole = nce_ext.NCELoss(dim, n_classes, noise, K, log_z="learned")
    torch.manual_seed(3 + RANK)  # that of rank 0 counts
    loss = shard(whole, MESH)
    assert loss.weight.shape[0] == loss.last - loss.first < n_classes
    table, bias = (torch.cat(everybody(t.detach())) for t in (loss.weight, loss.bias))
    bound = dim**-0.5
    assert table.abs().max() <= bound
    assert abs(table.mean()) < 4 * bound / (3 * table.numel()) ** 0.5
    assert abs(table.std() * 3**0.5 / bound - 1) < 0.02
    assert len(table.unique()) > 0.99 * table.numel()  # no rank repeats another's rows
    expected = nce_ext.NCELoss(dim, n_classes, noise, K)
    assert torch.equal(bias, expected.bias)
    assert loss.log_z == 0
    plain = nce_ext.noise.LogUniform(n_classes)
    closed_form = shard(nce_ext.NegativeSamplingLoss(dim, n_classes, plain, K, device="meta"), MESH)
    assert closed_form.bias.eq(0).all()
    works_here = closed_form(torch.randn(2, dim), torch.tensor([1, 2]))
    assert works_here.isfinite()


def evaluates() -> None:
    whole = loss_fn(nce_ext.SampledSoftmaxLoss, dtype=torch.float64)
    for n in ([2, 0, 3], [0, 0, 0]):
        torch.manual_seed(1)
        hidden = torch.randn(sum(n), 2, D, dtype=torch.float64)
        loss, own = shard(whole, MESH), slice(sum(n[:RANK]), sum(n[: RANK + 1]))
        logits = F.linear(hidden[own], whole.weight, whole.bias)
        assert torch.allclose(loss.logits(hidden[own]), logits, rtol=1e-14)
        assert torch.allclose(loss.log_prob(hidden[own]), whole.log_prob(hidden[own]), rtol=1e-13)
        assert torch.equal(loss.predict(hidden[own]), whole.predict(hidden[own]))
    text = repr(loss)
    for word in ("SampledSoftmaxLoss", "n_classes=10", f"classes={loss.first}..{loss.last - 1}", "ranks=3"):
        assert word in text


# Bytes


def sent(k: int, n_classes: int, dim: int, per_rank: int, **options: Any) -> int:
    """Bytes that rank 0 sends in a step."""
    with torch.device("meta"):
        whole = nce_ext.SampledSoftmaxLoss(
            dim, n_classes, nce_ext.noise.LogUniform(n_classes), k, sparse=True, **options
        )
    loss = shard(whole, MESH)
    before = loss.collectives.sent_bytes
    loss(leaf(torch.randn(per_rank, dim)), torch.randint(n_classes, (per_rank,))).backward()
    return loss.collectives.sent_bytes - before


def bytes_do_not_depend_on_the_vocabulary() -> dict[str, int]:
    torch.use_deterministic_algorithms(False)  # do not poison large tables
    n, dim, ranks = 64, 32, dist.get_world_size()
    found = {
        f"k = {k}, V = {n_classes:,}, {'shared' if shared else 'per example'}": sent(
            k, n_classes, dim, n, shared=shared
        )
        for k in (5, 500)
        for n_classes in (10**3, 10**6)
        for shared in (False, True)
    }
    assert len(set(found.values())) == 1, found
    # Vectors there and back; targets, their log q, what comes from above; a maximum, the target's score and three sums;
    # the loss and the number of examples; messages and the seed.
    others, seed = ranks - 1, 16 * (ranks - 1 > RANK)
    vectors = 2 * 4 * n * dim * others
    numbers = 3 * 4 * n * others + 2 * 5 * 4 * n * ranks * others // ranks
    assert next(iter(found.values())) == vectors + numbers + 2 * 8 * others // ranks + 512 * others + seed
    return found


def main() -> None:
    global MESH, RANK
    MESH = start()
    RANK = dist.get_rank()
    alone = [
        takes_a_part_of_a_larger_mesh, notices_a_law_that_parts, backward_twice, cannot_be_differentiated_twice,
        frozen_parameters, weights_that_change_under_a_graph, under_autocast, optimizers_step_rows, bad_ids_on_a_gpu,
        draws_the_seed_on_rank_0, makes_its_rows, evaluates, bytes_do_not_depend_on_the_vocabulary,
    ]  # fmt: skip
    checks: dict[str, Any] = {check.__name__: check for check in alone}
    for check, names in (
        (differs_in_the_constructor, CONSTRUCTORS), (differs_in_the_call, CALLS), (is_bad_on_one_rank, BAD),
        (is_refused, OTHERS),
    ):  # fmt: skip
        checks |= {f"{check.__name__}: {name}": (lambda check=check, name=name: check(name)) for name in names}
    run_all(checks)


if __name__ == "__main__":
    main()
