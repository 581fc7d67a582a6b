"""Sampled-softmax losses for PyTorch whose training cost does not depend on the vocabulary.

    loss_fn = nce_ext.NCELoss(in_features, n_classes, nce_ext.noise.Unigram(counts), num_negatives)
    loss = loss_fn(hidden, target)

replaces ``nn.Linear(in_features, n_classes)`` followed by ``nn.CrossEntropyLoss()``.
"""

import importlib
from typing import Any

from nce_ext import contrastive, density, evaluate, functional, noise, optim, utils
from nce_ext._ops.library import build_info, set_debug
from nce_ext._version import __version__
from nce_ext.contrastive import CrossBatchMemory, InfoNCELoss, SigmoidContrastiveLoss
from nce_ext.density import DensityNCELoss
from nce_ext.losses import NCELoss, NegativeSamplingLoss, SampledSoftmaxLoss

__all__ = [
    "CrossBatchMemory",
    "DensityNCELoss",
    "InfoNCELoss",
    "NCELoss",
    "NegativeSamplingLoss",
    "SampledSoftmaxLoss",
    "SigmoidContrastiveLoss",
    "__version__",
    "build_info",
    "contrastive",
    "density",
    "distributed",
    "evaluate",
    "functional",
    "noise",
    "optim",
    "set_debug",
    "utils",
]


def __getattr__(name: str) -> Any:
    if name == "distributed":  # on first use: torch.distributed takes seconds to import
        return importlib.import_module("nce_ext.distributed")
    raise AttributeError(f"module 'nce_ext' has no attribute {name!r}")
