"""The cross-batch memory: what it holds, in which order it forgets, and that a resumed run goes on exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nce_ext.contrastive import CrossBatchMemory, InfoNCELoss

D = 3


def batch_of(first: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys that tell their number, numbers, and log q that tells it too."""
    ids = torch.arange(first, first + n)
    return ids[:, None].expand(n, D).float(), ids, -ids.float()


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 25), max_size=8), resume=st.integers(0, 7))
def test_the_last_ones_are_kept(size, batches, resume):
    """Whatever the batch sizes: the last ``size`` keys with their ids and log q, also across a save and a load."""
    memory, seen = CrossBatchMemory(size, D), 0
    for i, n in enumerate(batches):
        if i == resume:
            other = CrossBatchMemory(size, D)
            other.load_state_dict(memory.state_dict())
            memory = other
        keys, ids, log_q = batch_of(seen, n)
        memory.enqueue(keys, ids, log_q)
        seen += n
        kept = memory.get()
        expected = list(range(max(0, seen - size), seen))
        assert len(memory) == len(expected)
        assert sorted(kept.ids.tolist()) == expected
        assert torch.equal(kept.keys, kept.ids[:, None].expand(-1, D).float())
        assert torch.equal(kept.log_q, -kept.ids.float())
        padded = memory.padded()
        assert padded.keys.shape == (size, D)
        assert torch.equal(padded.keys[padded.mask], kept.keys)
        assert torch.equal(padded.ids[padded.mask], kept.ids)
        assert torch.equal(padded.log_q[padded.mask], kept.log_q)


def test_properties_and_repr():
    memory = CrossBatchMemory(4, D)
    assert memory.keys.shape == (0, D)
    assert memory.ids is None
    assert memory.log_q is None
    memory.enqueue(*batch_of(5, 3))
    assert memory.ids.tolist() == [5, 6, 7]
    assert memory.log_q.tolist() == [-5, -6, -7]
    assert memory.keys[:, 0].tolist() == [5, 6, 7]
    assert repr(memory) == f"CrossBatchMemory(size=4, dim={D}, dtype=torch.float32)"
    assert not list(memory.parameters())


def test_what_is_stored_is_detached_and_cast():
    memory = CrossBatchMemory(4, D, dtype=torch.bfloat16)
    keys = torch.randn(2, D, requires_grad=True)
    memory.enqueue(2 * keys, torch.tensor([1, 2], dtype=torch.int32), torch.zeros(2).double())
    assert not memory.keys.requires_grad
    assert memory.keys.dtype == torch.bfloat16
    assert memory.ids.dtype == torch.int64
    assert memory.log_q.dtype == torch.float32
    assert torch.equal(memory.keys, (2 * keys).detach().bfloat16())
    assert CrossBatchMemory(4, D, dtype=torch.float64).stored_keys.dtype == torch.float64


def test_everything_is_in_the_state_dict():
    memory = CrossBatchMemory(4, D)
    assert list(memory.state_dict()) == ["stored_keys", "position", "filled"]
    memory.enqueue(*batch_of(0, 6))
    state = memory.state_dict()
    assert sorted(state) == ["filled", "position", "stored_ids", "stored_keys", "stored_log_q"]
    assert (int(state["position"]), int(state["filled"])) == (0, 4)
    for other in (CrossBatchMemory(4, D), copy.deepcopy(memory)):
        other.load_state_dict({name: value.clone() for name, value in state.items()})
        memory2 = copy.deepcopy(memory)
        for m in (memory2, other):
            m.enqueue(*batch_of(6, 3))
        assert all(torch.equal(a, b) for a, b in zip(memory2.get(), other.get(), strict=True))
    # One that stored ids takes a state without them, and the other way round.
    without = CrossBatchMemory(4, D)
    without.enqueue(batch_of(0, 2)[0])
    assert len(memory) == 4
    memory.load_state_dict(without.state_dict())
    assert memory.ids is None
    assert len(memory) == 2
    memory.load_state_dict({}, strict=False)
    assert len(memory) == 2


def test_it_is_found_inside_a_model():
    model = torch.nn.ModuleDict({"memory": CrossBatchMemory(4, D), "loss": InfoNCELoss()})
    model["memory"].enqueue(*batch_of(0, 3))
    other = torch.nn.ModuleDict({"memory": CrossBatchMemory(4, D), "loss": InfoNCELoss()})
    other.load_state_dict(model.state_dict())
    assert other["memory"].ids.tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match="size mismatch for stored_keys"):
        CrossBatchMemory(5, D).load_state_dict(model["memory"].state_dict())


def test_reset_forgets_also_what_is_stored():
    memory = CrossBatchMemory(4, D)
    memory.enqueue(*batch_of(0, 9))
    assert len(memory) == 4
    memory.reset()
    assert len(memory) == 0
    memory.enqueue(batch_of(0, 1)[0])
    assert memory.ids is None


def test_a_training_run_resumes_exactly(tmp_path):
    """The same losses to the last bit, whether the run was interrupted or not."""
    torch.manual_seed(2)
    data = torch.randn(12, 5, 8)
    ids = torch.randint(20, (12, 5))

    def start():
        torch.manual_seed(1)
        return torch.nn.ModuleDict(
            {"net": torch.nn.Linear(8, D), "memory": CrossBatchMemory(13, D), "loss": InfoNCELoss(0.2)}
        )

    def steps(model, which):
        losses = []
        for i in which:
            query, key = model["net"](data[i]), model["net"](data[i].roll(1, 1))
            past = model["memory"].get()
            loss = model["loss"](query, key, negatives=past.keys, ids=ids[i], negative_ids=past.ids)
            model.zero_grad()
            loss.backward()
            model["memory"].enqueue(key, ids[i])
            with torch.no_grad():
                for parameter in model["net"].parameters():
                    parameter -= 0.1 * parameter.grad
            losses.append(loss.item())
        return losses

    through = steps(start(), range(12))
    model = start()
    before = steps(model, range(5))
    torch.save(model.state_dict(), tmp_path / "state")
    resumed = start()
    resumed.load_state_dict(torch.load(tmp_path / "state"))
    assert before + steps(resumed, range(5, 12)) == through


def test_query_before_enqueue():
    """A key that is in the memory already is its own negative, and no loss can fall below log 2."""
    key = torch.randn(4, D)
    query = key * 3
    memory, loss_fn = CrossBatchMemory(4, D), InfoNCELoss(1.0, in_batch=False, reduction="none")
    memory.enqueue(torch.randn(4, D), torch.arange(10, 14))
    right = loss_fn(query, key, negatives=memory.keys)
    memory.enqueue(key, torch.arange(4))
    wrong = loss_fn(query, key, negatives=memory.keys)
    assert (wrong >= torch.tensor(2.0).log()).all()
    assert (right < 0.5).any()
    # ids take it out again.
    with_ids = loss_fn(query, key, negatives=memory.keys, ids=torch.arange(4), negative_ids=memory.ids)
    z = query @ key.T
    z = torch.where(torch.eye(4, dtype=torch.bool), -torch.inf, z)
    want = torch.nn.functional.softplus(z.logsumexp(1) - (query * key).sum(1))
    torch.testing.assert_close(with_ids, want)


def test_a_changed_memory_is_noticed():
    """Single losses keep the views for their backward; a sum needs them no more."""
    for reduction in ("mean", "none"):
        memory = CrossBatchMemory(4, D)
        memory.enqueue(torch.randn(4, D))
        query = torch.randn(2, D, requires_grad=True)
        loss = InfoNCELoss(in_batch=False, reduction=reduction)(query, torch.randn(2, D), negatives=memory.keys)
        memory.enqueue(torch.randn(2, D))
        if reduction == "mean":
            loss.backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.sum().backward()


def test_a_padded_memory_gives_the_same_loss_and_gradients():
    query, key = (torch.randn(5, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ids, log_q = torch.randint(6, (5,)), torch.randn(5)
    memory = CrossBatchMemory(20, D, dtype=torch.float64)
    memory.enqueue(torch.randn(7, D), torch.randint(6, (7,)), torch.randn(7))
    for reduction in ("mean", "none"):
        loss_fn = InfoNCELoss(0.3, reduction=reduction)
        results = []
        for past, mask in ((memory.get(), None), (memory.padded(), memory.padded().mask)):
            loss = loss_fn(
                query, key, negatives=past.keys, ids=ids, negative_ids=past.ids, negative_mask=mask, log_q=log_q,
                negative_log_q=past.log_q,
            )  # fmt: skip
            results.append([loss, *torch.autograd.grad(loss.sum(), (query, key))])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-15)


def test_one_graph_serves_every_position():
    """The padded form and enqueue under fullgraph: no recompilation as the memory fills and wraps around."""
    torch.compiler.reset()
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    memory, plain = CrossBatchMemory(11, D), CrossBatchMemory(11, D)
    loss_fn = InfoNCELoss(0.3)
    for m in (memory, plain):
        m.enqueue(*batch_of(0, 4)[:2])

    def step(m, query, key, ids):
        past = m.padded()
        loss = loss_fn(query, key, negatives=past.keys, ids=ids, negative_ids=past.ids, negative_mask=past.mask)
        m.enqueue(key, ids)
        return loss

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for _ in range(7):
        query, key, ids = torch.randn(4, D), torch.randn(4, D), torch.randint(30, (4,))
        torch.testing.assert_close(compiled(memory, query, key, ids), step(plain, query, key, ids))
    assert graphs == 1
    assert torch.equal(memory.stored_ids, plain.stored_ids)


def test_nothing_waits_for_the_device():
    memory = CrossBatchMemory(11, D, device="meta")
    keys = torch.empty(4, D, device="meta")
    for _ in range(4):
        memory.enqueue(keys, keys[:, 0].long(), keys[:, 0])
    assert memory.padded().mask.shape == (11,)


def test_inference_mode_leaves_a_memory_that_can_be_written():
    """Whichever of its buffers are made there: by a first batch, by loading, after a reset."""
    memory, loaded = CrossBatchMemory(4, D), CrossBatchMemory(4, D)
    with torch.inference_mode():
        memory.enqueue(*batch_of(0, 2))
        loaded.load_state_dict(memory.state_dict())
    for m in (memory, loaded):
        m.enqueue(*batch_of(2, 3))
        assert sorted(m.ids.tolist()) == [1, 2, 3, 4]
        with torch.inference_mode():
            m.reset()
            m.enqueue(*batch_of(5, 1))
        m.enqueue(*batch_of(6, 1))
        assert m.ids.tolist() == [5, 6]
        assert m.log_q.tolist() == [-5, -6]
        assert not any(buffer.is_inference() for buffer in m.buffers())
