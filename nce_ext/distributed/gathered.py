"""Contrastive losses whose negatives are the keys of all ranks, with the values and gradients of one process."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nce_ext._checks import describe
from nce_ext._ops import library
from nce_ext.contrastive import InfoNCELoss, SigmoidContrastiveLoss, pairwise
from nce_ext.contrastive import arguments as _arguments
from nce_ext.contrastive import losses as contrastive
from nce_ext.distributed.collectives import Collectives
from nce_ext.reference.dtypes import compute_dtype

__all__ = ["GatheredLoss", "gather", "gather_rows"]


def gather(
    loss_fn: InfoNCELoss | SigmoidContrastiveLoss, group: dist.ProcessGroup | None = None, *, ddp: bool = False
) -> GatheredLoss:
    """Compute ``loss_fn`` over the batches of all ranks: constructs a :class:`GatheredLoss`."""
    return GatheredLoss(loss_fn, group, ddp=ddp)


@torch.no_grad()
def gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenate the rows of every rank, in the order of ranks, without gradient: [n, ...] to [sum of n, ...].

    For what each rank has to hold alike, such as a memory of past keys: ``memory.enqueue(gather_rows(key))``.

    Raises:
        ValueError: a scalar; ranks whose rows differ in shape or dtype, on all of them.
        RuntimeError: another rank refused, or is missing.
    """
    collectives = Collectives(group)
    with collectives.step():
        if not isinstance(rows, Tensor) or rows.dim() < 1:
            raise ValueError(f"rows must be a tensor [n, ...], got {describe(rows)}")
        row: dict[str, Any] = {"the shape of a row": tuple(rows.shape[1:]), **_dtypes(rows=rows)}
        sizes = collectives.sizes(rows.shape[0], **row)
        return collectives.all_gather(rows.detach(), sizes)


class GatheredLoss(nn.Module):
    """A contrastive loss of the batch that the ranks hold together, each a part of it.

    Equivalent to the same call of ``loss_fn`` in one process, with the ranks' ``query``, ``key``, ``ids``, ``log_q``
    and ``query_log_q`` concatenated in the order of ranks: so is the value, on every rank, and so are the gradients of
    query and key (each rank those of its own) and of the loss's parameters (every rank the whole). Parts may be uneven
    or empty. A rank computes the losses of its own examples, against the columns of all: of B examples on R ranks it
    holds ``max_logits`` of its [B / R, B] logits at a time. It sends O(B D): its vectors once, in their own dtype, and
    once the gradients of the others'.

    For the reductions "mean" and "sum" all of that happens in forward, so backward neither waits for a rank nor fails
    by one; every rank must start it with the same number (1, or that of a GradScaler). The mean is over the examples
    of all ranks. With "none" each rank gets the losses of its own, and backward communicates: all ranks have to call
    it.

    **Data parallel training.** DistributedDataParallel averages the gradients of an encoder over the ranks, where one
    process adds up those of all examples. With ``ddp=True`` the gradients of query and key are multiplied by the
    number of ranks, so that the average is the gradient of one process. (The value is not, nor are the gradients that
    every rank has in full: those of the loss's own parameters, which may be inside the wrapped module or outside, and
    of ``negatives``.) ::

        loss_fn = nce_ext.distributed.gather(nce_ext.InfoNCELoss(learn_temperature=True, symmetric=True), ddp=True)
        loss = loss_fn(image_encoder(images), text_encoder(texts))        # encoders wrapped in DDP
        loss.backward()

    Without ``ddp`` it is the sum over ranks that is the gradient of one process.

    **Explicit negatives** are not gathered, being columns of every example of one process: each rank passes the same,
    which is checked on the CPU (on CUDA under :func:`nce_ext.set_debug`). A memory of past keys is the same on all
    ranks with ``memory.enqueue(gather_rows(key))``, ids and log q likewise.

    Args:
        loss_fn: an InfoNCELoss with ``in_batch=True`` or a SigmoidContrastiveLoss; a submodule, whose options and
            parameters remain its own. Parameters must start equal on all ranks.
        group: the ranks; None: the default group. A GPU's tensors need a backend of theirs, and there must be Gloo.
        ddp: multiply the gradients of query and key by the number of ranks.

    Raises:
        TypeError: another loss.
        ValueError: a loss without ``in_batch``, whose examples have no columns among other ranks' keys.
        RuntimeError: torch.distributed is not initialized.
    """

    def __init__(
        self,
        loss_fn: InfoNCELoss | SigmoidContrastiveLoss,
        group: dist.ProcessGroup | None = None,
        *,
        ddp: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(loss_fn, (InfoNCELoss, SigmoidContrastiveLoss)):
            raise TypeError(f"loss_fn must be an InfoNCELoss or a SigmoidContrastiveLoss, got {describe(loss_fn)}")
        if isinstance(loss_fn, InfoNCELoss) and not loss_fn.in_batch:
            raise ValueError("loss_fn must have in_batch=True, for other ranks' keys to be its columns, got False")
        if not isinstance(ddp, bool):
            raise TypeError(f"ddp must be True or False, got {describe(ddp)}")
        self.loss_fn = loss_fn
        self.ddp = ddp
        self.collectives = Collectives(group)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        negatives: Tensor | None = None,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        negative_mask: Tensor | None = None,
        log_q: Tensor | None = None,
        negative_log_q: Tensor | None = None,
        query_log_q: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of this rank's ``query`` [n, D] and ``key`` [n, D] among those of all ranks.

        Args: those of the wrapped loss for this rank's n examples, except ``negatives`` and what belongs to them, which
            are the same on all ranks. There is no ``target``: a rank does not know the labels of other ranks' keys.

        Returns:
            As the wrapped loss; the losses of this rank's examples, [n], for ``reduction="none"``.

        Raises:
            TypeError, ValueError: as the wrapped loss, on the rank that passed it; the others raise a RuntimeError that
                names it, and all can go on. The same ValueError on every rank for what must be the same and is not: D,
                dtypes, the optional arguments, what requires a gradient, ``negatives``, the loss's options.
            RuntimeError: a rank is missing, or failed later on; see the message. No gradient has changed.
        """
        c, data = self.collectives, pairwise.Data(ids, negative_ids, negative_mask, log_q, negative_log_q, None)
        with c.step():
            directions, options = self._prepare_own(query, key, negatives, data, query_log_q)
            sizes = c.sizes(query.shape[0], **self._must_agree(query, key, negatives, data, query_log_q))
            others = _OtherRanks(c, sizes)
            # Query looks for its key among the keys and, if symmetric, key for its query among the queries.
            towers = (key, query)[: len(directions)]
            columns = [self._gather_columns(others, t, own) for t, (*_, own) in zip(towers, directions, strict=True)]
            own_query, own_key, own_negatives, _ = directions[0]
            scale, bias = self._scale_and_bias(own_query)
            call = _GatheredCall(others, columns, options, c.size if self.ddp else 1)
            losses: Tensor = _GatheredLosses.apply(  # type: ignore[no-untyped-call]  # torch's is untyped
                own_query, own_key, own_negatives, scale, bias, call
            )
        return losses / max(sum(sizes), 1) if self.loss_fn.reduction == "mean" else losses

    def extra_repr(self) -> str:
        return f"rank={self.collectives.rank}, size={self.collectives.size}, ddp={self.ddp}"

    def _prepare_own(
        self, query: Tensor, key: Tensor, negatives: Tensor | None, data: pairwise.Data, query_log_q: Tensor | None
    ) -> tuple[list[tuple[Tensor, Tensor, Tensor | None, pairwise.Data]], pairwise.Options]:
        """Check and prepare this rank's own arguments as the wrapped loss does.

        Returns:
            (query, key, negatives, data) of each direction: query against keys and, if symmetric, key against queries.
        """
        loss_fn = self.loss_fn
        total, grad_enabled = loss_fn.reduction != "none", torch.is_grad_enabled()
        if isinstance(loss_fn, InfoNCELoss):
            return loss_fn._directions(query, key, negatives, data, query_log_q), loss_fn._options(total)
        for name, value in (("log_q", data.log_q), ("query_log_q", query_log_q)):
            if value is not None:
                raise ValueError(f"{name} must be None with a SigmoidContrastiveLoss, got {describe(value)}")
        _arguments.check(query, key, negatives, data, True)
        prepared = contrastive._prepared(loss_fn.normalize, query, key, negatives)
        return [(*prepared, data)], pairwise.Options(True, True, 0.0, total, grad_enabled, loss_fn.max_logits)

    def _scale_and_bias(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what logits are multiplied by, and what is added to them if the loss has such."""
        loss_fn = self.loss_fn
        if isinstance(loss_fn, InfoNCELoss):
            return contrastive._scale(loss_fn._scale, loss_fn.logit_scale, like, loss_fn.max_scale), None
        learned = loss_fn.logit_bias
        bias = like.new_full((), loss_fn._bias) if learned is None else learned.to(like.dtype)
        return contrastive._scale(loss_fn._scale, loss_fn.logit_scale, like, None), bias

    def _must_agree(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None,
        data: pairwise.Data,
        query_log_q: Tensor | None,
    ) -> dict[str, int | str | tuple[int, ...]]:
        """Collect what must be the same on all ranks, by the names that a refusal gives it."""
        arguments = {"query": query, "key": key, "negatives": negatives, "query_log_q": query_log_q, **data._asdict()}
        tensors = {name: value for name, value in arguments.items() if value is not None}
        with_gradient = [
            name for name, value in (*tensors.items(), *self.loss_fn.named_parameters()) if value.requires_grad
        ]
        common: dict[str, int | str | tuple[int, ...]] = {
            "D": query.shape[1],
            **_dtypes(query=query, key=key),
            "the set of arguments": ", ".join(tensors),
            "what requires a gradient": ", ".join(with_gradient if torch.is_grad_enabled() else []),
        }
        if negatives is not None:
            common["the shape of negatives"] = tuple(negatives.shape)
            common.update(_dtypes(negatives=negatives))
        if query.device.type == "cpu" or library.debug_enabled():
            common["loss_fn"] = f"{type(self.loss_fn).__name__}({self.loss_fn.extra_repr()})"
            for name in ("negatives", "negative_ids", "negative_mask", "negative_log_q"):
                if name in tensors:
                    common[f"the checksum of {name}"] = _checksum(tensors[name])
        return common

    @torch.no_grad()
    def _gather_columns(self, others: _OtherRanks, vectors: Tensor, own: pairwise.Data) -> _OtherColumns:
        """Gather the other ranks' columns of one direction, which then count as explicit negatives before any others.

        Args:
            vectors: this rank's columns, its keys or its queries.
            own: what belongs to them, and to the explicit negatives.
        """
        vectors = others.gather(vectors.detach()).to(compute_dtype(vectors.dtype))
        if self.loss_fn.normalize:
            vectors = contrastive._unit_length(vectors)
        ids = None if own.ids is None else own.ids.long()
        log_q = None if own.log_q is None else own.log_q.to(vectors.dtype)
        # Explicit negatives without ids have no place in these, and none of them is then masked by its id.
        column_ids = None if ids is None else _prepended(others.gather(ids), own.negative_ids)
        column_log_q = None if log_q is None else _prepended(others.gather(log_q), own.negative_log_q)
        return _OtherColumns(vectors, pairwise.Data(ids, column_ids, own.negative_mask, log_q, column_log_q, None))


class _OtherRanks:
    """Examples of the other ranks, in the order of ranks: gathers their vectors, and returns gradients to them."""

    def __init__(self, collectives: Collectives, sizes: list[int]) -> None:
        self.collectives, self.sizes = collectives, sizes
        self.start = sum(sizes[: collectives.rank])

    def gather(self, own: Tensor) -> Tensor:
        """Gather what the others have for their examples, given what this rank has for its own."""
        whole = self.collectives.all_gather(own, self.sizes)
        return torch.cat([whole[: self.start], whole[self.start + own.shape[0] :]])

    def sum_at_owner(self, own: Tensor, others: Tensor) -> Tensor:
        """Sum over the ranks what each has for this rank's examples.

        This rank has ``own`` for its own, and ``others`` for those of the others.
        """
        return self.collectives.reduce_scatter(torch.cat([others[: self.start], own, others[self.start :]]), self.sizes)


class _OtherColumns(NamedTuple):
    """Columns of one direction that other ranks own."""

    others: Tensor  # their vectors, [sum of the others' n, D]
    data: pairwise.Data  # of these, of this rank's own columns and of explicit negatives


class _GatheredCall(NamedTuple):
    """One call of the loss, without the tensors that have gradients."""

    others: _OtherRanks
    columns: list[_OtherColumns]  # of query against keys and, if symmetric, of key against queries
    options: pairwise.Options
    factor: int  # by which the gradients of query and key are multiplied


# Query, key, explicit negatives, scale and bias.
_Operands = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]


class _GatheredLosses(torch.autograd.Function):
    """Sum of all ranks' losses, [], or if ``options.total`` is False the losses of this rank's examples.

    The gradients of a sum are formed in forward, where the logits are at hand; those of single losses in backward,
    which computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None,
        scale: Tensor,
        bias: Tensor | None,
        call: _GatheredCall,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        operands, total = (query, key, negatives, scale, bias), call.options.total
        needs = tuple(ctx.needs_input_grad[:5]) if call.options.grad_enabled and total else (False,) * 5
        losses, gradients = _sweep_directions(operands, call, needs, torch.ones_like(query[:, 0]))
        if not total:
            ctx.call = call
            ctx.save_for_backward(*operands)
            return losses
        ctx.call = call._replace(columns=[])  # backward needs no columns, which are as large as all ranks' vectors
        ctx.save_for_backward(*gradients)
        return call.others.collectives.all_reduce(losses.sum())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("nce_ext contrastive losses cannot be differentiated twice (create_graph=True)")
        if upstream is None:
            return (None,) * 6
        call = ctx.call
        if call.options.total:
            gradients = [None if g is None else g * upstream for g in ctx.saved_tensors]
        else:
            with call.others.collectives.step(agreed=True):
                _, gradients = _sweep_directions(ctx.saved_tensors, call, tuple(ctx.needs_input_grad[:5]), upstream)
        query, key, *rest = gradients
        return (*(g if g is None else g * call.factor for g in (query, key)), *rest, None)


def _sweep_directions(
    operands: _Operands, call: _GatheredCall, needs: tuple[bool, ...], upstream: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """Compute losses and gradients, each direction by a sweep over chunks of the logits.

    Returns:
        Losses of this rank's examples, [n], the mean over directions; and the gradients, for those operands that need
        one, of the sum over all ranks of upstream * losses.
    """
    query, key, negatives, scale, bias = operands
    needs_query, needs_key, needs_negatives, needs_scale, needs_bias = needs
    collectives = call.others.collectives
    losses, parts = [], []
    for i, (others, data) in enumerate(call.columns):
        queries, keys, explicit = (query, key, negatives) if i == 0 else (key, query, None)
        needs_queries, needs_keys = (needs_query, needs_key) if i == 0 else (needs_key, needs_query)
        extra = others if explicit is None else torch.cat([others, explicit])
        needed = (needs_queries, needs_keys, needs_keys or (needs_negatives and i == 0), needs_scale, needs_bias)
        weight = upstream / len(call.columns)
        loss, g = pairwise.sweep((queries, keys, extra, scale, bias), data, call.options, needed, weight)
        losses.append(loss)
        parts.append(g)

    first, back = parts[0], parts[1] if len(parts) > 1 else pairwise.Gradients(None, None, None, None, None)
    of_query, of_key = _add_given(first.query, back.key), _add_given(first.key, back.query)
    others_keys, of_negatives, others_queries = first.negatives, None, back.negatives
    if others_keys is not None:
        others_keys, of_negatives = torch.split(
            others_keys, [len(call.columns[0].others), 0 if negatives is None else len(negatives)]
        )
    if of_key is not None and others_keys is not None:
        of_key = call.others.sum_at_owner(of_key, others_keys)
    if of_query is not None and others_queries is not None:
        of_query = call.others.sum_at_owner(of_query, others_queries)
    of_negatives = collectives.all_reduce(of_negatives) if needs_negatives and of_negatives is not None else None
    scalars = [_add_given(first.scale, back.scale), _add_given(first.bias, back.bias)]
    scalars = [None if g is None else collectives.all_reduce(g) for g in scalars]
    return torch.stack(losses).mean(0), [of_query, of_key, of_negatives, *scalars]


def _add_given(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Add up those of two gradients that are not None."""
    return a if b is None else b if a is None else a + b


def _prepended(a: Tensor, b: Tensor | None) -> Tensor:
    """Concatenate ``a`` and, if given, ``b`` in the dtype of ``a``."""
    return a if b is None else torch.cat([a, b.to(a.dtype)])


def _dtypes(**tensors: Tensor) -> dict[str, str]:
    """Describe the dtypes of named tensors, as values that ranks agree on."""
    return {f"the dtype of {name}": str(t.dtype).removeprefix("torch.") for name, t in tensors.items()}


def _checksum(t: Tensor) -> int:
    """Sum the bits of a tensor, read as integers of its elements' size."""
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return int(t.detach().contiguous().view(size).sum(dtype=torch.int64))
