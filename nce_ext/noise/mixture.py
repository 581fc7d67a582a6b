"""The mixture of noise distributions that candidates follow when several laws give a fixed number of them each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from nce_ext import _checks
from nce_ext.noise.laws import Noise, TableNoise, alias_table_of


class Mixture(TableNoise):
    """Mixture q(y) = sum_i counts[i] noises[i](y) / sum_i counts[i]: counts[i] of the candidates follow noises[i].

    Mixed negative sampling (Yang et al., WWW 2020) adds K uniform negatives to the B items of a batch, since items
    of the tail hardly ever are in a batch. All B + K columns of its softmax are then candidates from

        Q(y) = B / (B + K) q(y) + K / (B + K) / n_classes

    with q the law of the data, so the log q of every column, in the batch or sampled, is that of one mixture:

        data = noise.Unigram(counts, power=1.0)
        candidates = noise.Mixture([data, noise.Uniform(n_classes)], [B, K])
        negatives = noise.Uniform(n_classes).sample(K)
        log_q, negative_log_q = candidates.log_prob(items), candidates.log_prob(negatives)

    It is a distribution like the others, drawn from in constant time by an alias table: ``log_prob`` is the law that
    the table realises, so a class of any of the laws keeps a mass of at least 1 / (n_classes 2^32). The table is built
    here, once, in O(n_classes) time and memory; a ``Streaming`` law that is rebuilt later does not change it.

    Args:
        noises: distributions over the same classes, at least one; each may be a mixture itself.
        counts: one number > 0 for each, finite; only their ratios matter.
        device: where the table goes; by default where the first of ``noises`` is.

    Raises:
        TypeError, ValueError: noises that are none or differ in n_classes; counts that are not as above.
    """

    def __init__(self, noises: Sequence[Noise], counts: Any, *, device: torch.device | str | None = None) -> None:
        if isinstance(noises, (str, Noise)) or not isinstance(noises, Sequence):
            raise TypeError(f"noises must be a sequence of noise distributions, got {_checks.describe(noises)}")
        if not noises:
            raise ValueError("noises must have at least one distribution, got none")
        for i, noise in enumerate(noises):
            if not isinstance(noise, Noise):
                raise TypeError(f"noises must be noise distributions, got {_checks.describe(noise)} at index {i}")
        for i, noise in enumerate(noises):
            if noise.n_classes != noises[0].n_classes:
                raise ValueError(
                    f"noises must have the same n_classes, got {noises[0].n_classes} and {noise.n_classes} at index {i}"
                )
        numbers = _checks.counts(counts)
        if len(numbers) != len(noises):
            raise ValueError(f"counts must have one entry for each of the {len(noises)} noises, got {len(numbers)}")
        if not (numbers > 0).all():
            where = int((numbers <= 0).nonzero()[0, 0])
            raise ValueError(f"counts must be > 0, got {float(numbers[where])} at index {where}")
        shares = (numbers / numbers.max()).tolist()  # so that no sum of counts overflows
        law = torch.zeros(noises[0].n_classes, dtype=torch.float64, device="cpu")
        for noise, share in zip(noises, shares, strict=True):
            known = copy.deepcopy(noise).to("cpu") if noise.table.is_meta else noise
            q = known.probabilities().cpu()
            # A product that underflows becomes the smallest normal number, so that a class that is drawn keeps a mass.
            law += torch.where(q > 0, (share * q).clamp_min_(torch.finfo(torch.float64).tiny), 0)
        device = noises[0].table.device if device is None else device
        super().__init__(len(law), alias_table_of(law, 1.0), device=device)
        self.counts = numbers.tolist()

    def extra_repr(self) -> str:
        return f"n_classes={self.n_classes}, counts=[{', '.join(f'{n:g}' for n in self.counts)}]"
