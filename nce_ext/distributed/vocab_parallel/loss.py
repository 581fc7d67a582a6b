"""The loss module over a sharded vocabulary: each rank owns the rows of some classes, and has its own examples."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from nce_ext import _checks, _private_torch
from nce_ext._checks import describe
from nce_ext._ops.coo import DENSE, made_coalesced
from nce_ext._sampled.arguments import validate_and_flatten
from nce_ext._sampled.call import Call
from nce_ext._sampled.resize import initial_bias
from nce_ext._tables.pages import empty_table
from nce_ext.distributed.collectives import Collectives
from nce_ext.distributed.vocab_parallel.batch import OwnedRows, gather_examples
from nce_ext.distributed.vocab_parallel.scores import VocabParallelLosses
from nce_ext.distributed.vocab_parallel.state import ShardedState
from nce_ext.losses import NCELoss, NegativeSamplingLoss, SampledSoftmaxLoss, _SampledLoss
from nce_ext.noise import Noise

_ROWS_OF_A_SEED = 1024  # so many rows are initialised from one seed


def shard(loss_fn: NCELoss | NegativeSamplingLoss | SampledSoftmaxLoss, device_mesh: DeviceMesh) -> ShardedLoss:
    """Spread the rows of a loss's table over the processes of a mesh: :class:`ShardedLoss`.

    Every process calls it, with the same arguments. Without ever holding the whole table::

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world_size,))
        with torch.device("meta"):
            loss_fn = nce_ext.NCELoss(D, V, noise, 20, sparse=True)     # no memory; noise stays where it is
        loss_fn = nce_ext.distributed.shard(loss_fn, mesh)              # V / world_size rows here

    Args:
        loss_fn: its options are those of the result. If it has its weights, the process copies its own rows of them. If
            they are on the meta device, it makes its own rows as the loss would: uniform in +-1/sqrt(D), and the bias
            at log q, or 0 without a correction. Every 1024 rows have a seed of their own, all of them derived from
            torch's random state on rank 0, so the table does not depend on the number of processes.
        device_mesh: one-dimensional; of a mesh with more dimensions, the part along one: ``mesh["vocabulary"]``. With
            fewer classes than processes the last ones have none.

    Raises:
        TypeError: no such loss, or no mesh.
        ValueError: a mesh of another number of dimensions; noise whose table is on the meta device, which has no law;
            a loss that is not the same on every rank.
    """
    return ShardedLoss(loss_fn, device_mesh)


class ShardedLoss(ShardedState):
    """A loss whose classes are spread over processes, each of which has its own batch: made by :func:`shard`.

    ``forward`` takes this process's examples, and is the loss of one process that has the whole table and the batches
    of all ranks one behind the other, with the same noise ids for the same seed: the scalar of "mean" or "sum" is the
    same on every rank, "none" gives the losses of this rank's examples. All ranks call it together, with batches of any
    sizes, and all call ``backward``. Then ``hidden.grad``, ``weight.grad`` and ``bias.grad`` are this rank's rows of
    that process's gradient, and ``log_z.grad`` is the same on all ranks: nothing is left to be averaged. A model that
    made ``hidden`` needs the *sum* over ranks of its gradients, where DistributedDataParallel takes the mean.

    A step sends O(B D) bytes, B the examples of all ranks, whatever V and k are: vectors and targets come together on
    each rank, which scores what it has, and the scores are added up to a few numbers an example.

    Attributes:
        weight: the rows of the classes ``first .. last - 1``, an ordinary parameter [last - first, D]. It is no
            DTensor, as these take no sparse gradient (torch 2.13), and with a dense one a step would depend on V. In
            checkpoints it is one: ``state_dict()`` has DTensors of shape [V, D] and [V], split along dim 0 as
            torch.chunk splits, under the keys of the unsharded loss. So torch.distributed.checkpoint saves and loads
            them with any number of ranks, and into an unsharded loss. ``load_state_dict`` takes whole tensors as well.
            An optimizer's state is saved by :meth:`optimizer_state_dict`.
        bias: [last - first], or None.
        first, last: 0 .. V; equal on a rank without classes.
        log_z: a number, or a parameter that is the same on all ranks.
        noise: the distribution; the whole of it on every rank.
        collectives: what has been sent is ``collectives.sent_bytes``.
    """

    def __init__(self, loss_fn: NCELoss | NegativeSamplingLoss | SampledSoftmaxLoss, device_mesh: DeviceMesh) -> None:
        super().__init__()
        if not isinstance(device_mesh, DeviceMesh):
            raise TypeError(f"device_mesh must be a torch.distributed DeviceMesh, got {describe(device_mesh)}")
        if device_mesh.ndim != 1:
            raise ValueError(
                f"device_mesh must have one dimension, got {device_mesh.ndim}; of a larger mesh give the part along one"
            )
        self.device_mesh = device_mesh
        self._checksum_of_table: tuple[tuple[int, int], int] | None = None
        self.collectives = Collectives(device_mesh.get_group())
        with self.collectives.step():
            if not isinstance(loss_fn, _SampledLoss):
                raise TypeError(
                    "loss_fn must be an NCELoss, NegativeSamplingLoss or SampledSoftmaxLoss, which have a vocabulary, "
                    f"got {describe(loss_fn)}"
                )
            self._copy_options(loss_fn)
            self._copy_noise(loss_fn.noise)
            self.collectives.agree(
                loss_fn=f"{type(loss_fn).__name__}({loss_fn.extra_repr()})", dtype=str(loss_fn.weight.dtype),
                options=repr(self._options), weights="meta" if loss_fn.weight.is_meta else "real",
                gradients=tuple(int(p.requires_grad) for p in loss_fn.parameters()), noise=self._noise_in_brief(),
                log_z=_log_z_in_brief(loss_fn.log_z),
            )  # fmt: skip
            self._copy_rows(loss_fn)

    def _copy_options(self, loss_fn: _SampledLoss) -> None:
        """Take over what the loss does, apart from its tables and its noise."""
        self.in_features, self.n_classes, self.num_negatives = (
            loss_fn.in_features, loss_fn.n_classes, loss_fn.num_negatives,
        )  # fmt: skip
        self._name, self._options_repr = type(loss_fn).__name__, loss_fn.extra_repr()
        self._options = {**loss_fn._call_options(), "objective": loss_fn._objective()}
        self.reduction = self._options["reduction"]

    def _copy_noise(self, noise: Noise) -> None:
        """Take over the noise, on this rank's device of the mesh."""
        kind = self.device_mesh.device_type
        self.device = (
            torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
        )
        self.noise = noise.to_empty(device=self.device) if noise.table.is_meta else noise.to(self.device)

    def _noise_in_brief(self) -> str:
        """Describe the noise, with a checksum of its table, which is computed anew only when the table has changed."""
        table = self.noise.table
        version = (table.data_ptr(), _private_torch.version(table))
        if self._checksum_of_table is None or self._checksum_of_table[0] != version:
            self._checksum_of_table = (version, _checksum(table))
        return f"{self.noise} with a table of checksum {self._checksum_of_table[1]}"

    @torch.no_grad()
    def _copy_rows(self, loss_fn: _SampledLoss) -> None:
        """Make this rank's parameters: its rows of the loss's tables, or initial ones if those have no memory."""
        self.first, self.last = self._classes_of(self.collectives.rank)
        rows, meta = slice(self.first, self.last), loss_fn.weight.is_meta
        weight = empty_table(self.last - self.first, self.in_features, self.device, loss_fn.weight.dtype)
        old_bias = loss_fn.bias
        bias = None if old_bias is None else weight.new_empty(len(weight))
        if meta:
            self._initialise_rows(weight, bias, subtracts_log_q=self._options["correction"] != "none")
        else:
            weight.copy_(loss_fn.weight[rows])
            if bias is not None and old_bias is not None:
                bias.copy_(old_bias[rows])
        self.weight = nn.Parameter(weight, requires_grad=loss_fn.weight.requires_grad)
        self.bias = None
        if bias is not None and old_bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=old_bias.requires_grad)
        self.log_z: float | Tensor = loss_fn.log_z
        if isinstance(loss_fn.log_z, Tensor):
            value = torch.zeros_like(loss_fn.log_z, device=self.device)
            if not meta:
                value.copy_(loss_fn.log_z)
            self.log_z = nn.Parameter(value, requires_grad=loss_fn.log_z.requires_grad)

    def _classes_of(self, rank: int) -> tuple[int, int]:
        """Return first and last of a rank's classes, split as torch.chunk splits."""
        per_rank = -(-self.n_classes // self.collectives.size)
        first = min(rank * per_rank, self.n_classes)
        return first, min(first + per_rank, self.n_classes)

    def _initialise_rows(self, weight: Tensor, bias: Tensor | None, *, subtracts_log_q: bool) -> None:
        """Initialise the owned rows as ``reset_parameters`` of the losses does.

        The table of all ranks does not depend on their number.
        """
        bound = 1 / math.sqrt(self.in_features)
        base = int(self.collectives.broadcast_seed()[0])
        generator = torch.Generator(self.device)
        for begin in range(self.first // _ROWS_OF_A_SEED * _ROWS_OF_A_SEED, self.last, _ROWS_OF_A_SEED):
            generator.manual_seed((base + begin) % 2**63)
            block = weight.new_empty((_ROWS_OF_A_SEED, self.in_features)).uniform_(-bound, bound, generator=generator)
            low, high = max(begin, self.first), min(begin + _ROWS_OF_A_SEED, self.last)
            weight[low - self.first : high - self.first] = block[low - begin : high - begin]
        if bias is None:
            return
        if subtracts_log_q:
            bias.copy_(initial_bias(self.noise, self._options["correction"], self.first, self.last))
        else:
            bias.zero_()

    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        *,
        negatives: Tensor | None = None,
        log_q: tuple[Tensor, Tensor] | None = None,
        log_z: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
        seed: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Compute the loss of the examples of all ranks, of which ``hidden`` [..., D] and ``target`` are this one's.

        Arguments are those of :func:`nce_ext.functional.nce_loss`, for this rank's examples, and with these additions:

        Args:
            negatives: [k] must be the same on all ranks. [..., k] are sent to all of them: O(k) bytes an example.
            log_q: as negatives.
            log_z: one value per example, or a number or scalar that is the same on all ranks; a scalar that requires a
                gradient gets that of all examples.
            seed: the same on all ranks.
            generator: on the CPU; that of rank 0 draws the seed.

        Raises:
            As the unsharded loss, on the rank that has the argument; before anything is sent, and the others raise a
            RuntimeError that names that rank. ValueError on every rank: what must be the same on all and is not.
        """
        log_z = self.log_z if log_z is None else log_z
        arguments: dict[str, Any] = dict(negatives=negatives, log_q=log_q, log_z=log_z, sample_weight=sample_weight)
        with self.collectives.step():
            drawn = seed is None and negatives is None
            call = self._prepare(hidden, target, _zero_seed(self.device) if drawn else seed, **arguments)
            _checks.ids(target, negatives, self.noise, call.labels.ignore_index, call.correction.subtract_log_q, log_q)
            sizes = self.collectives.sizes(len(call.operands.hidden), **self._must_agree(call, **arguments, seed=seed))
            if drawn:
                seed = self.collectives.broadcast_seed(generator).to(self.device)
                call = self._prepare(hidden, target, seed, **arguments)
            if call.layout.gradient_layout != DENSE and torch.is_grad_enabled():
                made_coalesced.watch(self.weight)
                made_coalesced.watch(self.bias)
            scalar = log_z if isinstance(log_z, Tensor) and log_z.dim() == 0 else None
            owned = OwnedRows(self.weight, self.bias, self.first, self.last)
            one_log_q = log_q is None or log_q[1].dim() == 1
            gathered, context = gather_examples(call, owned, self.collectives, sizes, scalar, one_log_q=one_log_q)
            losses: Tensor = VocabParallelLosses.apply(  # type: ignore[no-untyped-call]  # torch's is untyped
                call.operands.hidden,
                self.weight,
                self.bias,
                call.operands.log_z if scalar is None else scalar,
                gathered,
                context,
            )
            return self._reduce(losses, call, sample_weight)

    def _prepare(self, hidden: Tensor, target: Tensor, seed: Tensor | None, **arguments: Any) -> Call:
        """Check this rank's arguments and flatten them."""
        # The checks want a table of all classes: this one has the memory of one row.
        table = self.weight.detach().new_empty((1, self.in_features)).expand(self.n_classes, -1)
        return validate_and_flatten(
            hidden, table, target, self.noise, self.num_negatives, bias=None, seed=seed, generator=None,
            **self._options, **arguments,
        )  # fmt: skip

    def _must_agree(
        self,
        call: Call,
        *,
        negatives: Tensor | None,
        log_q: tuple[Tensor, Tensor] | None,
        log_z: float | Tensor,
        sample_weight: Tensor | None,
        seed: Tensor | None,
    ) -> dict[str, int | str | tuple[int, ...]]:
        """Collect what must be the same on all ranks, by the names that a refusal gives it."""
        kind_of_log_z = repr(log_z)
        if isinstance(log_z, Tensor):
            kind_of_log_z = f"{_dtype_and_gradient(log_z)}, {'one per example' if log_z.dim() else 'one for all'}"
        return {
            "hidden": _dtype_and_gradient(call.operands.hidden),
            "weight": _dtype_and_gradient(self.weight),
            "target": f"{call.operands.target.shape[1]} an example",
            "num_negatives": call.candidates.k,
            "noise": self._noise_in_brief(),
            "seed": "drawn" if seed is None else tuple(seed.tolist()),
            "negatives": _values_in_brief(negatives),
            "log_q": _values_in_brief(None if log_q is None else log_q[1]),
            "log_z": kind_of_log_z,
        }

    def _reduce(self, losses: Tensor, call: Call, sample_weight: Tensor | None) -> Tensor:
        """Reduce the losses of this rank's examples to what ``forward`` returns."""
        weights = None if sample_weight is None else sample_weight.reshape(-1).to(losses.dtype)
        if self.reduction == "none":
            return (losses if weights is None else losses * weights).reshape(call.layout.batch_shape)
        weights = torch.ones_like(losses) if weights is None else weights
        total = (losses * weights).sum()
        if self.reduction == "sum":
            return _sum_over_ranks(total, self.collectives)
        counted = torch.where((call.operands.target != call.labels.ignore_index).any(1), weights, 0).sum()
        total, counted = _sum_over_ranks(torch.stack([total, counted]), self.collectives).unbind()
        return total / torch.where(counted == 0, 1, counted)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the scores of all classes for this rank's ``hidden``, [..., V], without a gradient.

        For evaluation: every rank scores the examples of all, O(B V) numbers, which are sent.
        """
        with self.collectives.step():
            _checks.tensor("hidden", hidden, (self.weight.dtype,), self.device)
            if hidden.dim() < 1 or hidden.shape[-1] != self.in_features:
                raise ValueError(f"hidden must be [..., {self.in_features}], got shape {list(hidden.shape)}")
            rows = hidden.reshape(-1, self.in_features)
            sizes = self.collectives.sizes(len(rows))
            scores = F.linear(self.collectives.all_gather(rows, sizes), self.weight, self.bias)
            n_classes = [last - first for first, last in map(self._classes_of, range(self.collectives.size))]
            scores = self.collectives.all_gather(scores.T.contiguous(), n_classes).T
            begin = sum(sizes[: self.collectives.rank])
            return scores[begin : begin + len(rows)].reshape(*hidden.shape[:-1], self.n_classes)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Compute ``log_softmax(logits(hidden), -1)``, [..., V], without a gradient."""
        return F.log_softmax(self.logits(hidden), -1)

    def predict(self, hidden: Tensor) -> Tensor:
        """Return the most probable class of each example: ``logits(hidden).argmax(-1)``, [...]."""
        return self.logits(hidden).argmax(-1)

    def extra_repr(self) -> str:
        return (
            f"{self._name}({self._options_repr}), classes={self.first}..{self.last - 1}, ranks={self.collectives.size}"
        )


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks of a value that each of them has; the same on all, as is the gradient that backward is given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, collectives: Collectives) -> Tensor:
        total = collectives.all_reduce(value)
        return total.clone() if total is value else total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _sum_over_ranks(value: Tensor, collectives: Collectives) -> Tensor:
    """Sum a value over the ranks, differentiably."""
    total: Tensor = _SumOverRanks.apply(value, collectives)  # type: ignore[no-untyped-call]
    return total


def _log_z_in_brief(log_z: float | Tensor) -> str:
    """Describe a loss's log_z, to be compared between ranks."""
    if not isinstance(log_z, Tensor):
        return repr(log_z)
    return "learned" if log_z.is_meta else f"learned, {log_z.item()!r} at first"


def _checksum(table: Tensor) -> int:
    """Compute a checksum of a noise's table that depends on the order of its rows; a part at a time."""
    total, part = table.new_zeros((), dtype=torch.int64), 2**20
    for begin in range(0, len(table), part):
        rows = table[begin : begin + part].long()
        total += (
            rows.sum(1) * torch.arange(begin + 1, begin + len(rows) + 1, device=table.device)
        ).sum()  # modulo 2^64
    return int(total)


def _zero_seed(device: torch.device) -> Tensor:
    """Make a seed for checking the arguments, before the ranks have agreed on the real one."""
    return torch.zeros(2, dtype=torch.int64, device=device)


def _dtype_and_gradient(tensor: Tensor) -> str:
    """Describe a tensor's dtype, and whether it takes part in autograd."""
    has_gradient = torch.is_grad_enabled() and tensor.requires_grad
    return f"{str(tensor.dtype).removeprefix('torch.')} {'with' if has_gradient else 'without'} a gradient"


def _values_in_brief(values: Tensor | None) -> str:
    """Describe an optional argument: whether it is given, and the checksum of what all examples share, [k]."""
    if values is None or values.dim() != 1:
        return "none" if values is None else "some for each example"
    whole = values.detach().double() if values.is_floating_point() else values.long()
    checksum = (whole * torch.arange(1, len(whole) + 1, device=whole.device)).sum().item()
    return f"{len(values)} for all, of checksum {checksum}"
