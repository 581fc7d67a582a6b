"""A queue of past keys, which are negatives of a contrastive loss without a forward pass of their own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nce_ext import _checks
from nce_ext.reference.dtypes import compute_dtype

__all__ = ["CrossBatchMemory", "PaddedMemory", "Remembered"]


class Remembered(NamedTuple):
    """Keys [n, D] of a memory, and what was stored with them: ids [n] and log q [n], or None."""

    keys: Tensor
    ids: Tensor | None
    log_q: Tensor | None


class PaddedMemory(NamedTuple):
    """Contents of all ``size`` slots of a memory, and a mask [size] that is True for slots in use."""

    keys: Tensor
    ids: Tensor | None
    log_q: Tensor | None
    mask: Tensor


class CrossBatchMemory(nn.Module):
    """Memory of the last ``size`` keys of past batches, with their ids and log q.

    Query first, enqueue last: a key that is in the memory and in the batch at once would be its own negative::

        memory = nce_ext.CrossBatchMemory(65536, D)
        past = memory.get()
        loss = loss_fn(query, key, negatives=past.keys, ids=ids, negative_ids=past.ids)
        loss.backward()
        memory.enqueue(key, ids)

    (Its loss could then never fall below log 2; ``ids``, where they are given, mask it.) Wang et al., "Cross-batch
    memory for embedding learning", CVPR 2020; with a momentum encoder, He et al., "Momentum contrast for unsupervised
    visual representation learning", CVPR 2020.

    Everything is in ``state_dict()``: ``stored_keys`` [size, D], ``stored_ids`` and ``stored_log_q`` [size] once some
    were given, ``position`` (the slot that is written next) and ``filled`` (slots in use). A run resumed from it goes
    on exactly. The first ``enqueue`` decides whether ids and log q are stored; :meth:`reset` undoes that.

    Args:
        size: slots, >= 1.
        dim: D, >= 1.
        device, dtype: of the keys; ids are int64 and log q is float32 (float64 with float64 keys).
    """

    stored_keys: Tensor
    stored_ids: Tensor | None
    stored_log_q: Tensor | None
    position: Tensor
    filled: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size = _checks.count("size", size, 1)
        self.dim = _checks.count("dim", dim, 1)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in _checks.FLOATS:
            raise TypeError(f"dtype must be a float32, bfloat16, float16 or float64 type, got {dtype}")
        self.register_buffer("stored_keys", torch.zeros(size, dim, device=device, dtype=dtype))
        self.register_buffer("stored_ids", None)
        self.register_buffer("stored_log_q", None)
        self.register_buffer("position", torch.zeros((), device=device, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), device=device, dtype=torch.int64))
        self._full = self._started = False

    def __len__(self) -> int:
        """Count the slots in use. On CUDA this waits for the device until the memory has been seen full once."""
        if not self._full:
            filled = int(self.filled)
            self._full = filled == self.size
            return filled
        return self.size

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor | None = None, log_q: Tensor | None = None) -> None:
        """Store a batch, detached, in place of the oldest; of more than ``size`` keys the last ``size``.

        Works on tensors alone: nothing waits for a GPU, and a compiled graph serves every position.

        Args:
            keys: [B, D], any float type.
            ids: int64 or int32 [B].
            log_q: [B], the keys' log-probabilities as columns.

        Raises:
            TypeError: a wrong type, dtype or layout.
            ValueError: a wrong device or shape; ids or log q now but not in the first batch, or the other way round.
        """
        device = self.stored_keys.device
        _checks.tensor("keys", keys, _checks.FLOATS, device, "the memory")
        if keys.dim() != 2 or keys.shape[1] != self.dim:
            raise ValueError(f"keys must be [B, {self.dim}], got shape {list(keys.shape)}")
        batch = keys.shape[0]
        for name, given, dtypes, stored in (
            ("ids", ids, _checks.INTEGERS, self.stored_ids),
            ("log_q", log_q, _checks.FLOATS, self.stored_log_q),
        ):
            if given is not None:
                _checks.tensor(name, given, dtypes, device, "the memory")
                if given.shape != (batch,):
                    raise ValueError(f"{name} must have shape [{batch}], got {list(given.shape)}")
            if self._started and (given is None) != (stored is None):
                wanted, got = ("None", "a tensor") if stored is None else ("given", "None")
                raise ValueError(f"{name} must be {wanted}, as in the first batch of this memory, got {got}")
        if not self._started:
            with torch.inference_mode(False):  # or no later batch could be stored outside of it
                if ids is not None:
                    self.stored_ids = torch.zeros(self.size, dtype=torch.int64, device=device)
                if log_q is not None:
                    wide = compute_dtype(self.stored_keys.dtype)
                    self.stored_log_q = torch.zeros(self.size, dtype=wide, device=device)
            self._started = True

        kept = min(batch, self.size)
        slots = torch.arange(kept, device=device).add_(self.position).remainder_(self.size)
        for stored, given in ((self.stored_keys, keys), (self.stored_ids, ids), (self.stored_log_q, log_q)):
            if stored is not None and given is not None:
                stored.index_copy_(0, slots, given[batch - kept :].to(stored.dtype))
        self.position.add_(kept).remainder_(self.size)
        self.filled.add_(kept).clamp_(max=self.size)

    def get(self) -> Remembered:
        """Return the slots in use, in no particular order: (keys [n, D], ids [n] or None, log_q [n] or None).

        They are views of the buffers, which the next ``enqueue`` overwrites. A loss of ``reduction="none"`` keeps them
        for its backward, which raises if they have changed: call it first. n grows until the memory is full, see
        ``len``.
        """
        n = len(self)
        ids, log_q = self.stored_ids, self.stored_log_q
        return Remembered(self.stored_keys[:n], None if ids is None else ids[:n], None if log_q is None else log_q[:n])

    def padded(self) -> PaddedMemory:
        """Return all slots, for compiled and captured graphs of one shape: (keys, ids, log_q, mask), ``size`` of each.

        Pass the mask on: ``loss_fn(query, key, negatives=p.keys, negative_ids=p.ids, negative_mask=p.mask, ...)``.
        """
        mask = torch.arange(self.size, device=self.stored_keys.device) < self.filled
        return PaddedMemory(self.stored_keys, self.stored_ids, self.stored_log_q, mask)

    @property
    def keys(self) -> Tensor:
        """Keys [n, D] of the slots in use, as ``get().keys``."""
        return self.get().keys

    @property
    def ids(self) -> Tensor | None:
        """Ids [n] of the slots in use, or None, as ``get().ids``."""
        return self.get().ids

    @property
    def log_q(self) -> Tensor | None:
        """Log q [n] of the slots in use, or None, as ``get().log_q``."""
        return self.get().log_q

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything, also whether ids and log q are stored."""
        self.stored_keys.zero_()
        self.stored_ids = self.stored_log_q = None
        self.position.zero_()
        self.filled.zero_()
        self._full = self._started = False

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, dtype={self.stored_keys.dtype}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the buffers; those of ids and log q exist afterwards where the state has them."""
        for name in ("stored_ids", "stored_log_q") if prefix + "stored_keys" in state_dict else ():
            stored = state_dict.get(prefix + name)
            with torch.inference_mode(False):
                given = None if stored is None else torch.zeros_like(stored, device=self.stored_keys.device)
            setattr(self, name, given)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._started = int(self.filled) > 0
        self._full = False
