"""Evaluation over the whole vocabulary: what a sampled loss trains for, and what sampling costs it."""

from nce_ext.evaluate.diagnosis import Diagnosis, GradientError, diagnose
from nce_ext.evaluate.exact import OutputLayer, nll, perplexity, topk

__all__ = ["Diagnosis", "GradientError", "OutputLayer", "diagnose", "nll", "perplexity", "topk"]
