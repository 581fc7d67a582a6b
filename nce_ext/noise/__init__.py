"""Noise distributions: where negatives come from, and the exact log-probability of drawing each.

Every distribution is an ``nn.Module``: it moves with ``.to()``, and what it needs lives in ``state_dict``. Drawing is a
pure function of a seed, so the same seed gives the same ids on every device, backend and thread count.
"""

from __future__ import annotations

from nce_ext.noise.laws import LogUniform, Noise, Uniform, Unigram
from nce_ext.noise.mixture import Mixture
from nce_ext.noise.streaming import Streaming

__all__ = ["LogUniform", "Mixture", "Noise", "Streaming", "Uniform", "Unigram"]
