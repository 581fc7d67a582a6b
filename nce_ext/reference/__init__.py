"""The whole library in plain PyTorch: slow, on any device, and written to be read.

It is a backend like the compiled one (``backend="reference"``), the oracle of the tests and the baseline of the
benchmarks. Every function here has a compiled twin that must agree with it: ids bit for bit, values to rounding.
"""

from nce_ext.reference.losses import sampled_loss
from nce_ext.reference.noise import (
    ALIAS,
    LOG_UNIFORM,
    UNIFORM,
    alias_masses,
    alias_table,
    draw,
    log_q,
    log_q_log_uniform,
    philox4x32,
    random_words,
)
from nce_ext.reference.objective import ADVERSARIAL, BINARY, BINARY_OBJECTIVE, SMALLEST_REST, SOFTMAX, Objective

__all__ = [
    "ADVERSARIAL",
    "ALIAS",
    "BINARY",
    "BINARY_OBJECTIVE",
    "LOG_UNIFORM",
    "SMALLEST_REST",
    "SOFTMAX",
    "UNIFORM",
    "Objective",
    "alias_masses",
    "alias_table",
    "draw",
    "log_q",
    "log_q_log_uniform",
    "philox4x32",
    "random_words",
    "sampled_loss",
]
