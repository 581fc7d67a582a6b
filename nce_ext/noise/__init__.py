"""Noise distributions: where negatives come from, and the exact log-probability of drawing each.

Every distribution is an ``nn.Module``: it moves with ``.to()``, and what it needs lives in ``state_dict``. Drawing is a
pure function of a seed, so the same seed gives the same ids on every device, backend and thread count.
"""

from __future__ import annotations

from nce_ext._ops import draw_seed as draw_seed
from nce_ext.noise.laws import MAX_CLASSES as MAX_CLASSES
from nce_ext.noise.laws import LogUniform, Noise, Uniform, Unigram
from nce_ext.noise.laws import _unnormalised_law as _unnormalised_law
from nce_ext.noise.laws import check_seed as check_seed
from nce_ext.noise.laws import describe as describe
from nce_ext.noise.laws import log1mexp as log1mexp
from nce_ext.noise.mixture import Mixture
from nce_ext.noise.streaming import Streaming

__all__ = ["LogUniform", "Mixture", "Noise", "Streaming", "Uniform", "Unigram"]
