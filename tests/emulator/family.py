"""Problems of emulated.py under any objective, and what the kernels must answer by objectives_oracle.py."""

from __future__ import annotations

import emulated
import numpy as np
import objectives_oracle
from emulated import IGNORE, Expected, widened
from objectives_oracle import ADVERSARIAL, BINARY, SOFTMAX

OBJECTIVES = {
    "softmax": {"objective": SOFTMAX},
    "smoothed": {"objective": SOFTMAX, "label_smoothing": 0.25},
    "uncorrected target": {"objective": SOFTMAX, "correct_positive": False},
    "smoothed, uncorrected target": {"objective": SOFTMAX, "label_smoothing": 0.1, "correct_positive": False},
    "adversarial": {"objective": ADVERSARIAL, "temperature": 1.5, "positive_weight": 0.75},
    "adversarial, alike": {"objective": ADVERSARIAL},
    "binary": {"objective": BINARY, "positive_weight": 0.375},
}
WHOLE = [name for name in OBJECTIVES if name != "binary"]


def one_target(name: str) -> bool:
    return not OBJECTIVES[name].get("correct_positive", True)


def with_targets(*counts: int) -> list[tuple[str, int]]:
    """Objectives with each number of targets that they allow."""
    return [(name, count) for name in OBJECTIVES for count in counts if count == 1 or not one_target(name)]


def objective_options(options: dict) -> objectives_oracle.Options:
    return objectives_oracle.Options(**{k: v for k, v in options.items() if k in objectives_oracle.Options._fields})


class Family(emulated.Problem):
    """Its options name the objective as the operator's arguments do."""

    def expected(self) -> Expected:
        options, log_q = self.options, self.log_q()
        ignore = options.get("ignore_index", IGNORE)
        ids = np.concatenate([self.target, self.all_negatives], 1)
        positive = self.target != ignore
        present = np.concatenate([positive, np.ones((self.batch, self.negatives), bool)], 1)
        counted = positive.any(1)
        bad = counted & (present & ((ids < 0) | (ids >= self.classes) | ~np.isfinite(log_q))).any(1)
        present[~counted | bad] = False
        live = present.copy()
        if options.get("remove_hits"):
            same = self.all_negatives[:, :, None] == self.target[:, None, :]
            live[:, self.targets :] &= ~(same & positive[:, None, :]).any(2)

        hidden, weight = widened(self.hidden), widened(self.weight)
        bias = np.zeros(self.classes) if self.bias is None else widened(self.bias)
        shift = np.full(self.batch, options.get("offset", 0.0))
        if self.log_z_values is not None:
            shift = shift + self.log_z_values
        correction = log_q.copy()
        if not options.get("correct_positive", True):
            correction[:, : self.targets] = 0.0
        given = self.target_log_q is not None or options.get("subtract_log_q", True)

        loss, loss_scale = np.zeros(self.batch), np.zeros(self.batch)
        dlogit, dlogit_scale = np.zeros(ids.shape), np.zeros(ids.shape)
        grad, grad_scale = np.zeros(hidden.shape), np.zeros(hidden.shape)
        rows, rows_scale = np.zeros(weight.shape), np.zeros(weight.shape)
        for i in np.flatnonzero(counted & ~bad):
            columns = np.flatnonzero(live[i])
            terms = hidden[i].astype(np.longdouble) * weight[ids[i, columns]]
            others = np.stack([bias[ids[i, columns]], np.full(len(columns), -shift[i]), -correction[i, columns]])
            z = (terms.sum(1) + others.sum(0)).astype(np.float64)
            size = (np.abs(terms).sum(1) + np.abs(others).sum(0)).astype(np.float64)
            n_targets = int((columns < self.targets).sum())
            truth = objectives_oracle.example(
                z, size, n_targets, np.ones(len(columns)), objective_options(options),
                log_q[i, 0] if given and self.targets == 1 else 0.0,
            )  # fmt: skip
            factor = 1 / (n_targets + self.negatives) if options.get("mean_candidates") else 1.0
            loss[i], loss_scale[i] = factor * truth.loss, factor * truth.loss_scale
            dlogit[i, columns], dlogit_scale[i, columns] = factor * truth.dz, factor * truth.dz_scale
            grad[i] = dlogit[i, columns] @ weight[ids[i, columns]]
            grad_scale[i] = dlogit_scale[i, columns] @ np.abs(weight[ids[i, columns]])
        loss[bad] = np.nan
        scale = {"loss": loss_scale, "dlogit": dlogit_scale, "grad_hidden": grad_scale, "rows": rows_scale}
        ids = np.where(present, ids, -1).astype(np.int32)
        return Expected(ids, loss, dlogit, grad, rows, np.zeros(self.classes), scale)
