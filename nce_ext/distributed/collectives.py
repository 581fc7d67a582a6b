"""The collectives of one process group: what they cost, and errors that name the rank they come from."""

from __future__ import annotations

import atexit
import contextlib
import json
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from nce_ext import _private_torch
from nce_ext._checks import describe
from nce_ext._ops.sample import draw_seed

__all__ = ["Collectives"]

# A message of every rank: its length and its first bytes; only longer ones take a second round.
_LENGTH, _FRAME = 8, 512

# Seconds for which survivors wait for each other's sign, or that part of the group's timeout if it is less.
_GRACE, _GRACE_PART = 5.0, 0.125
_POLL = 0.02


class Collectives:
    """The collectives of one process group; a failure names the rank.

    Messages (:meth:`agree`, :meth:`sizes`) and CPU tensors go through Gloo connections of the package's own between the
    same ranks; tensors of a GPU go through ``group``, by its own backend. So no message waits for a GPU, and a step
    that fails half-way leaves nothing half-way in the caller's group: the failing rank closes the package's
    connections, which ends the others' collective at once.

    **Failures.** What a rank refuses before the first message of a :meth:`step` it says in that message, and the step
    raises on every rank; all of them can go on with another batch. Any later error, or a rank that dies or does not
    arrive, ends the step on the others with a RuntimeError that names it, and quotes the error if there was one. The
    ranks then do not know how far the others came, and every later call raises the same.

    Who is missing is learned through the group's store, where the survivors sign: ``group.get_group_store()``, the one
    channel that does not need the lost rank. (Under torchrun the agent hosts it. Otherwise rank 0 does; if that is the
    one that is lost, the message says so.) All this ends within the group's timeout: a rank may be late by that, less
    twice the survivors' wait for each other, which is 5 s, or an eighth of it. Collectives of GPU tensors fail as
    NCCL's watchdog ends them; the next message then names the rank.

    Args:
        group: of which this process is a rank; None: the default group. Its ranks must all construct the first instance
            for a group; later ones share its connections.

    Attributes:
        rank, size: in the group, as are all ranks in messages.
        sent_bytes: payload that this rank has sent, counted as a ring sends it: n bytes of each rank gathered are
            n (size - 1), n reduced are 2 n (size - 1) / size, n scattered are what belongs to others, n of a broadcast
            are n, but for the last rank. Messages count as the gathering of 512 bytes.

    Raises:
        RuntimeError: no process group is initialized; a PyTorch without Gloo; a rank does not come.
        TypeError, ValueError: ``group`` is something else, or none of which this process is a rank.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed must be initialized (dist.init_process_group), and is not")
        if not dist.is_gloo_available():
            raise RuntimeError("PyTorch must have Gloo, through which the ranks' messages go, and has not")
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must be one of which this process is a rank, got one without it")
        if not (group is None or isinstance(group, dist.ProcessGroup)):
            raise TypeError(f"group must be a ProcessGroup or None, got {describe(group)}")
        self.group: dist.ProcessGroup = dist.group.WORLD if group is None else group  # type: ignore[assignment]
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.sent_bytes = 0
        if self.group not in _links:
            _links[self.group] = _Link(self.group)
        self._link = _links[self.group]
        self._agreed = True
        self._check_usable()

    # Messages

    def agree(self, **values: int | str | tuple[int, ...]) -> None:
        """Raise the same ValueError on every rank if a value is not the same on all of them."""
        self._exchange("agree", values)

    def sizes(self, n: int, **values: int | str | tuple[int, ...]) -> list[int]:
        """``n`` of every rank; in the same exchange, what :meth:`agree` does for ``values``."""
        return [message["n"] for message in self._exchange("sizes", values, n=int(n))]

    def broadcast_seed(self, generator: torch.Generator | None = None) -> Tensor:
        """A seed, int64 [2] on the CPU, drawn on rank 0 and the same everywhere; other ranks draw nothing."""
        seed = torch.zeros(2, dtype=torch.int64)
        if self.rank == 0:
            seed = draw_seed(seed.device if generator is None else generator.device, generator).cpu()
        self._count(seed.nbytes * (self.rank < self.size - 1))
        with self._watched(seed):
            if self.size > 1:
                self._backend(seed).broadcast(seed, 0).wait()
        return seed

    # Data. None of these takes part in autograd.

    @torch.no_grad()
    def all_gather(self, t: Tensor, sizes: list[int]) -> Tensor:
        """The ranks' tensors behind each other along dim 0, of which rank r has ``sizes[r]``: [sum(sizes), ...].

        Uneven parts are sent as long as the longest. With one rank ``t`` itself.
        """
        assert t.shape[0] == sizes[self.rank], (t.shape, sizes, self.rank)
        if self.size == 1:
            return t
        longest = max(sizes)
        part = t.contiguous()
        if part.shape[0] < longest:
            part = torch.cat([part, part.new_zeros((longest - part.shape[0], *part.shape[1:]))])
        whole = part.new_empty((self.size * longest, *part.shape[1:]))
        if not whole.numel():
            return whole[: sum(sizes)] if longest else whole
        self._count(part.nbytes * (self.size - 1))
        with self._watched(part):
            self._backend(part).allgather([list(whole.split(longest))], [part]).wait()
        if min(sizes) == longest:
            return whole
        parts = whole.split(longest)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    @torch.no_grad()
    def all_reduce(self, t: Tensor, op: str = "sum") -> Tensor:
        """The "sum" or the "max" over the ranks, the same bits on all; a new tensor, or with one rank ``t`` itself."""
        if self.size == 1 or not t.numel():
            return t
        whole = t.clone(memory_format=torch.contiguous_format)
        self._count(2 * whole.nbytes * (self.size - 1) // self.size)
        with self._watched(whole):
            operation = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
            self._backend(whole).allreduce(whole, operation).wait()
        return whole

    @torch.no_grad()
    def reduce_scatter(self, t: Tensor, sizes: list[int]) -> Tensor:
        """Of the sum over ranks of ``t`` [sum(sizes), ...] this rank's part [sizes[rank], ...]: all_gather's adjoint.

        Parts are exchanged, then summed in the order of ranks: at the payload of a reduction, but uneven parts are
        allowed, and the bits are the same on every backend. With one rank ``t`` itself.
        """
        assert t.shape[0] == sum(sizes), (t.shape, sizes)
        if self.size == 1:
            return t
        mine = sizes[self.rank]
        whole = t.contiguous()
        parts = whole.new_empty((self.size, mine, *whole.shape[1:]))
        if whole.numel():
            self._count(whole.nbytes - whole[:mine].nbytes)
            with self._watched(whole):
                flat = parts.view(self.size * mine, *whole.shape[1:])
                self._backend(whole).alltoall_base(flat, whole, [mine] * self.size, sizes).wait()
        return parts.sum(0)

    # Failures

    @contextlib.contextmanager
    def step(self, *, agreed: bool = False) -> Iterator[None]:
        """What the ranks do together, of which an error on one is an error on all.

        The first call inside must be :meth:`agree` or :meth:`sizes`: an error before it is told in its place, and harms
        nothing. With ``agreed=True`` (a backward, whose forward has agreed) it need not be, and any error is final.
        """
        self._check_usable()
        outer, self._agreed = self._agreed, agreed
        try:
            yield
        except BaseException as error:
            if getattr(error, "told_by", None) is self._link:
                raise
            text = f"rank {self.rank} raised {type(error).__name__}: {error}"
            if self._agreed or not isinstance(error, Exception):
                self._link.leave(text)
            else:
                with contextlib.suppress(RuntimeError):
                    self._exchange("refuse", {}, refusal=text)
            self._mark_told(error)
            raise
        finally:
            self._agreed = outer

    def _exchange(self, call: str, values: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
        """The messages of all ranks; raises alike on all of them if one refuses or the values differ."""
        self._check_usable()
        text = json.dumps({"values": {"the call": call, **values}, **more})
        self._agreed = True
        messages = [json.loads(text) for text in self._gather_text(text)]
        refusals = [message["refusal"] for message in messages if "refusal" in message]
        if refusals:
            raise self._mark_told(RuntimeError(f"a step was refused: {'; '.join(refusals)}"))
        for name in dict.fromkeys(name for message in messages for name in message["values"]):
            ranks: dict[str, list[int]] = {}
            for rank, message in enumerate(messages):
                ranks.setdefault(_value_in_words(message["values"].get(name)), []).append(rank)
            if len(ranks) > 1:
                got = [f"{value} on {_ranks_in_words(where)}" for value, where in ranks.items()]
                raise self._mark_told(ValueError(f"{name} must be the same on all ranks, got {_list_in_words(got)}"))
        return messages

    def _gather_text(self, text: str) -> list[str]:
        if self.size == 1:
            return [text]
        data = len(text.encode()).to_bytes(_LENGTH, "little") + text.encode()
        width = _FRAME
        while True:
            part = torch.frombuffer(bytearray(data[:width].ljust(width, b"\0")), dtype=torch.uint8)
            parts = [part.new_empty(width) for _ in range(self.size)]
            self._count(width * (self.size - 1))
            with self._watched(part):
                self._backend(part).allgather([parts], [part]).wait()
            frames = [part.numpy().tobytes() for part in parts]
            ends = [_LENGTH + int.from_bytes(frame[:_LENGTH], "little") for frame in frames]
            if max(ends) <= width:
                return [frame[_LENGTH:end].decode() for frame, end in zip(frames, ends, strict=True)]
            width = max(ends)

    def _backend(self, t: Tensor) -> Any:
        return self._link.gloo if t.device.type == "cpu" else self.group

    def _count(self, n: int) -> None:
        self.sent_bytes += n

    def _check_usable(self) -> None:
        if self._link.failure is not None:
            raise self._mark_told(RuntimeError(f"{self._link.failure}. The group cannot be used again: start anew"))

    @contextlib.contextmanager
    def _watched(self, t: Tensor) -> Iterator[None]:
        """A collective of ``t``: its failure becomes one that names the missing ranks."""
        self._check_usable()
        if not self._agreed:
            raise RuntimeError("agree() or sizes() must be the first call in a step, got a collective of data")
        try:
            yield
        except RuntimeError as error:
            self._link.give_up()
            raise self._mark_told(RuntimeError(self._link.failure)) from error

    def _mark_told(self, error: BaseException) -> BaseException:
        """An error that the other ranks know of, which a step around it need not tell them."""
        error.told_by = self._link  # type: ignore[attr-defined]
        return error


class _Link:
    """Gloo connections beside the caller's group, and the store in which its ranks sign when they fail."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.store = dist.PrefixStore("nce_ext", group.get_group_store())
        self.failure: str | None = None
        self.gloo: Any = None
        timeout = (_private_torch.timeout_of(group) or dist.default_pg_timeout).total_seconds()
        self.grace = min(_GRACE, _GRACE_PART * timeout)
        if self.size > 1:
            patience = timedelta(seconds=timeout - 2 * self.grace)
            try:
                # Not dist.new_group: where not all ranks of the world take part, it gives the name, and so the keys in
                # the store, of a destroyed group to the next of the same ranks.
                self.gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", self.store), self.rank, self.size, patience)
            except RuntimeError:
                self.give_up()

    def leave(self, text: str) -> None:
        """Say why this rank ends the step, and end it for the others."""
        self.failure = text
        with contextlib.suppress(RuntimeError):
            self.store.set(f"raised/{self.rank}", text)
        self.close()

    def give_up(self) -> None:
        """Sign, end the collective for the others, and find out which ranks do not sign."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"signed/{self.rank}", "")
        self.close()
        try:
            # One verdict for all: a rank that comes late learns why nobody was there.
            self.failure = self.store.compare_set("verdict", "", self._verdict()).decode()
        except RuntimeError:
            self.failure = (
                "a collective failed, and the group's store does not answer: the process that hosts it is missing, "
                "which is rank 0 unless torchrun started the ranks"
            )

    def _verdict(self) -> str:
        deadline = time.monotonic() + self.grace
        silent = set(range(self.size))
        raised: dict[int, str] = {}
        while silent:
            for rank in sorted(silent):
                if self.store.check([f"raised/{rank}"]):
                    raised[rank] = self.store.get(f"raised/{rank}").decode()
                if rank in raised or self.store.check([f"signed/{rank}"]):
                    silent.discard(rank)
            if raised or self.store.check(["verdict"]) or time.monotonic() > deadline:
                break
            time.sleep(_POLL)
        if raised:
            return f"a step failed: {'; '.join(raised[rank] for rank in sorted(raised))}"
        if silent:
            verb = "is" if len(silent) == 1 else "are"
            return (
                f"a collective failed: {_ranks_in_words(sorted(silent))} {verb} missing (no sign for {self.grace:g} s)"
            )
        return "a collective failed, though no rank is missing: one came too late, or the connection is lost"

    def close(self) -> None:
        self.gloo = None


_links: WeakKeyDictionary[dist.ProcessGroup, _Link] = WeakKeyDictionary()


@atexit.register
def _close_all() -> None:
    """Connections that outlive the interpreter abort the process."""
    for link in list(_links.values()):
        link.close()


def _value_in_words(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _ranks_in_words(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {_list_in_words([str(rank) for rank in ranks])}"


def _list_in_words(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
