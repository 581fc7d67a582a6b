"""What is made of an example's corrected scores."""

from __future__ import annotations

from typing import NamedTuple

# The codes are those of Objective in csrc/objective.h.
BINARY, SOFTMAX, ADVERSARIAL = 0, 1, 2
SMALLEST_REST = 2.0**-24  # what 1 - q is taken to be at least, of a target that is all of the noise in float32


class Objective(NamedTuple):
    """What is made of an example's corrected scores z, beside the options that all objectives share."""

    kind: int = BINARY
    positive_weight: float = 1.0  # BINARY, ADVERSARIAL: factor of the targets' terms
    label_smoothing: float = 0.0  # SOFTMAX
    temperature: float = 0.0  # ADVERSARIAL: negatives are weighted by softmax(temperature z)
    correct_positive: bool = True  # SOFTMAX: whether log q is subtracted from the target's score too


BINARY_OBJECTIVE = Objective()
