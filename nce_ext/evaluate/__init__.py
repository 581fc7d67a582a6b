"""Evaluation with the softmax over all classes: exact likelihoods, and what sampling costs a loss."""

from nce_ext.evaluate.diagnosis import Diagnosis, GradientError, diagnose
from nce_ext.evaluate.exact import OutputLayer, nll, perplexity, topk

__all__ = ["Diagnosis", "GradientError", "OutputLayer", "diagnose", "nll", "perplexity", "topk"]
