"""Contrastive losses between two batches of vectors: InfoNCE (CLIP, two towers), its debiased form, and SigLIP's."""

from nce_ext.contrastive.losses import InfoNCELoss, SigmoidContrastiveLoss
from nce_ext.contrastive.memory import CrossBatchMemory

__all__ = ["CrossBatchMemory", "InfoNCELoss", "SigmoidContrastiveLoss"]
