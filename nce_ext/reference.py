"""The whole library in plain PyTorch: slow, on any device, and written to be read.

It is a backend like the compiled one (``backend="reference"``), the oracle of the tests and the baseline of the
benchmarks. Every function here has a compiled twin that must agree with it: ids bit for bit, values to rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# The codes are those of NoiseKind in csrc/noise.h.
UNIFORM, LOG_UNIFORM, ALIAS = 0, 1, 2

_WORD = 0xFFFFFFFF
_FULL = 1 << 32  # mass of one bucket of an alias table


def philox4x32(counter: list[Tensor], key: list[Tensor], rounds: int = 10) -> list[Tensor]:
    """Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on int64-held 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64, which keeps both halves exact
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def random_words(seed: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of the 64-bit draw of every (example, slot), each [rows, cols].

    The key is seed[0]; the counter is (slot // 2, example, seed[1]); one Philox call serves two slots.
    """
    slot = torch.arange(cols, device=seed.device)[None, :]
    example = torch.arange(rows, device=seed.device)[:, None]
    low, high = seed & _WORD, (seed >> 32) & _WORD
    zero = torch.zeros((rows, cols), dtype=torch.int64, device=seed.device)
    words = philox4x32([zero + slot // 2, zero + example, zero + low[1], zero + high[1]], [low[0], high[0]])
    odd = (slot % 2 == 1).expand(rows, cols)
    return torch.where(odd, words[3], words[1]), torch.where(odd, words[2], words[0])


# ln(2)^i / i!: the Taylor series of 2^f, whose error for |f| <= 1/2 is below 5e-18.
_EXP2 = [math.log(2.0) ** i / math.factorial(i) for i in range(14)]


def _exp2(t: Tensor) -> Tensor:
    """2^t from IEEE double multiplications and additions alone, so that every device agrees to the last bit."""
    whole = torch.floor(t + 0.5)
    fraction = t - whole
    power = torch.full_like(t, _EXP2[13])
    for coefficient in reversed(_EXP2[:13]):
        power = power * fraction + coefficient
    return torch.ldexp(power, whole)


def draw(kind: int, n_classes: int, table: Tensor, seed: Tensor, rows: int, cols: int) -> Tensor:
    """Noise ids, int64 [rows, cols]; a pure function of (seed, example, slot)."""
    high, low = random_words(seed, rows, cols)
    if kind == LOG_UNIFORM:
        u = ((high << 21) | (low >> 11)).double() * 2.0**-53
        return (_exp2(u * math.log2(n_classes + 1)).long() - 1).clamp_(0, n_classes - 1)
    # floor(draw * V / 2^64) and the next 32 bits of the quotient; V < 2^31, so nothing exceeds 63 bits.
    scaled = high * n_classes + ((low * n_classes) >> 32)
    bucket = scaled >> 32
    if kind == UNIFORM:
        return bucket
    threshold, alias = table[bucket, 0].long() & _WORD, table[bucket, 1].long()
    return torch.where((scaled & _WORD) < threshold, bucket, alias)


def log_q(kind: int, n_classes: int, table: Tensor, ids: Tensor) -> Tensor:
    """log q(id) of the realised law, float32."""
    if kind == UNIFORM:
        return torch.full(ids.shape, -math.log(n_classes), device=ids.device)
    if kind == LOG_UNIFORM:
        return log_q_log_uniform(n_classes, ids).float()
    return table[ids, 2].view(torch.float32)


def log_q_log_uniform(n_classes: int, ids: Tensor) -> Tensor:
    """float64 log q of the log-uniform law. log1p keeps the digits that log((y + 2) / (y + 1)) loses for large y."""
    return torch.log(torch.log1p(1.0 / (ids.double() + 1.0)) / math.log1p(n_classes))


def alias_masses(table: Tensor) -> Tensor:
    """The exact integer mass of every class, int64 [V], read back from a table; they sum to V 2^32."""
    threshold, alias = table[:, 0].long() & _WORD, table[:, 1].long()
    own = torch.arange(len(table), device=table.device)
    threshold = torch.where(alias == own, _FULL, threshold)
    return threshold.index_add(0, alias, _FULL - threshold)


def alias_table(weights: Tensor, scale: float) -> Tensor:
    """Exact-integer alias table, int32 [V, 4]: threshold, alias, and the bits of float32 log q of class and alias.

    Class i gets the integer mass m_i = max(1, round(weights_i * scale)), or 0 if its weight is 0; the rounding
    residue goes to the heaviest class so that the masses sum to V 2^32. Buckets hold 2^32 each. Light classes
    (m < 2^32) are filled up by heavy ones in index order; where the sequential sweep would stand after each class
    is known from prefix sums of deficits and excesses, so the whole construction is two searches.
    """
    n = len(weights)
    mass = torch.round(weights * scale).long()
    mass = torch.where(weights > 0, mass.clamp_min(1), 0)
    heaviest = int(torch.argmax(mass))
    mass[heaviest] += n * _FULL - int(mass.sum())

    own = torch.arange(n)
    threshold, alias = torch.full((n,), _WORD), own.clone()
    light, heavy = (mass < _FULL).nonzero()[:, 0], (mass > _FULL).nonzero()[:, 0]
    if len(light):
        deficit = torch.cumsum(_FULL - mass[light], 0)
        excess = torch.cumsum(mass[heavy] - _FULL, 0)
        before = torch.cat([deficit.new_zeros(1), deficit[:-1]])
        threshold[light] = mass[light]
        alias[light] = heavy[torch.searchsorted(excess, before, right=True)]
        # A heavy class that has given its excess away, and more, is filled up by the next heavy one.
        shortfall = deficit[torch.searchsorted(deficit, excess)] - excess
        short = shortfall > 0
        threshold[heavy[short]] = _FULL - shortfall[short]
        alias[heavy[short]] = torch.cat([heavy[1:], heavy[:1]])[short]

    own_log_q = (torch.log(mass.double()) - math.log(n * float(_FULL))).float()
    words = torch.stack([threshold, alias, *(q.view(torch.int32).long() for q in (own_log_q, own_log_q[alias]))], 1)
    return torch.where(words > 0x7FFFFFFF, words - _FULL, words).int()


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


def sampled_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    negatives: Tensor,
    log_z: Tensor | None,
    target_log_q: Tensor | None,
    negative_log_q: Tensor | None,
    *,
    objective: Objective,
    offset: float,
    remove_hits: bool,
    uniform_labels: bool,
    mean_candidates: bool,
    ignore_index: int,
    sparse: bool,
    repeated: Tensor | None = None,
) -> Tensor:
    """Per-example loss over T targets and k negatives, [B].

        z_j = <hidden, weight_j> + bias_j - log_z - offset - log q_j

    and, with labels y = 1, or 1/T, of the targets and 0 of the negatives, by the kind of objective::

        BINARY       sum_j beta_j (y_j softplus(-z_j) + (1 - y_j) softplus(z_j)), beta_j = positive_weight or 1
        SOFTMAX      sum_j y_j (logsumexp(z) - z_j), smoothed
        ADVERSARIAL  as BINARY, with the negatives' terms weighted by softmax(temperature z) over them, detached

    hidden [B, D], target [B, T], negatives [B, k]; log_q None leaves that term out. ``repeated`` [B, k] marks negatives
    to leave out. Rows are gathered as [B, T + k, D], so memory grows with k.
    """
    n_targets, n_classes = target.shape[1], weight.shape[0]
    compute = torch.promote_types(weight.dtype, torch.float32)
    positive = target != ignore_index
    any_positive = positive.any(1, keepdim=True)

    ids = torch.cat([target, negatives], 1)
    live = torch.cat([positive, any_positive.expand_as(negatives)], 1)
    bad = (live & ((ids < 0) | (ids >= n_classes))).any(1)
    if target_log_q is not None and negative_log_q is not None:
        bad = bad | (positive & ~torch.isfinite(target_log_q)).any(1)
        bad = bad | (any_positive & ~torch.isfinite(negative_log_q.expand_as(negatives))).any(1)
    live = live & ~bad[:, None]
    ids = torch.where(live, ids, 0)
    left_out = torch.zeros_like(negatives, dtype=torch.bool) if repeated is None else repeated
    if remove_hits:
        left_out = left_out | ((negatives[:, :, None] == target[:, None, :]) & positive[:, None, :]).any(2)
    live = torch.cat([live[:, :n_targets], live[:, n_targets:] & ~left_out], 1)

    with torch.autocast(hidden.device.type, enabled=False):
        rows = F.embedding(ids, weight, sparse=sparse).to(compute)
        rows = torch.where(live[:, :, None], rows, 0)
        z = torch.einsum("bd,bcd->bc", hidden.to(compute), rows)
        if bias is not None:
            z = z + torch.gather(bias, 0, ids.flatten(), sparse_grad=sparse).view(ids.shape).to(compute)
        if log_z is not None:
            z = z - log_z.to(compute)[:, None]
        if target_log_q is not None and negative_log_q is not None:
            of_target = target_log_q if objective.correct_positive else torch.zeros_like(target_log_q)
            z = z - torch.cat([of_target, negative_log_q.expand_as(negatives)], 1).to(compute)
        largest = torch.finfo(compute).max  # a score that overflowed would turn 0 * softplus into NaN
        z = torch.where(live, z - offset, 0).clamp(-largest, largest)

        count = positive.sum(1, keepdim=True).clamp_min(1)
        label = torch.zeros_like(z)
        label[:, :n_targets] = 1.0 / count.to(compute) if uniform_labels else 1.0
        label = torch.where(live, label, 0)
        if objective.kind == SOFTMAX:
            loss = _softmax(z, live, label, target_log_q, objective, n_targets)
        else:
            column = -label * F.logsigmoid(z) - (1 - label) * F.logsigmoid(-z)
            column = torch.where(live, column, 0)
            if objective.kind == ADVERSARIAL:
                share = _masked_softmax(
                    (objective.temperature * z[:, n_targets:]).clamp(-largest, largest), live[:, n_targets:]
                ).detach()
            else:
                share = torch.ones_like(z[:, n_targets:])
            loss = objective.positive_weight * column[:, :n_targets].sum(1) + (share * column[:, n_targets:]).sum(1)
        if mean_candidates:
            loss = loss / (count[:, 0] + negatives.shape[1])
    return torch.where(bad, torch.nan, loss)


def _softmax(
    z: Tensor, live: Tensor, label: Tensor, target_log_q: Tensor | None, objective: Objective, n_targets: int
) -> Tensor:
    """sum_j label_j (logsumexp(z) - z_j) over the live columns, with smoothed labels."""
    total = label.sum(1, keepdim=True)
    if not objective.correct_positive and target_log_q is not None:
        # A negative is drawn from q given that it is no target, n times: log(n q / (1 - q_target)).
        n = live[:, n_targets:].sum(1, keepdim=True).clamp_min(1)
        scale = (-torch.expm1(target_log_q[:, :1].to(z.dtype))).clamp_min(SMALLEST_REST).log() - n.to(z.dtype).log()
        z = torch.cat([z[:, :n_targets], z[:, n_targets:] + scale], 1)
    if objective.label_smoothing:
        n = live.sum(1, keepdim=True).clamp_min(1)
        label = (1 - objective.label_smoothing) * label + objective.label_smoothing * total / n
    some = live.any(1, keepdim=True)
    normaliser = torch.logsumexp(torch.where(some, z.masked_fill(~live, -torch.inf), 0), 1, keepdim=True)
    return torch.where(live & (label != 0), label * (normaliser - z), 0).sum(1)


def _masked_softmax(z: Tensor, live: Tensor) -> Tensor:
    """softmax over the live columns; 0 elsewhere, and everywhere where none is live."""
    if not z.shape[1]:
        return z
    some = live.any(1, keepdim=True)
    return torch.where(live, torch.softmax(torch.where(some, z.masked_fill(~live, -torch.inf), 0), 1), 0)
