"""Noise laws and their draws: ids as a pure function of a seed, alias tables of exact integer masses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    """Noise ids, int64 [rows, cols]; a pure function of (seed, example, slot). -1 where an alias is out of range."""
    high, low = random_words(seed, rows, cols)
    if kind == LOG_UNIFORM:
        u = ((high << 21) | (low >> 11)).double() * 2.0**-53
        return (_exp2(u * math.log2(n_classes + 1)).long() - 1).clamp(0, n_classes - 1)
    # floor(draw * V / 2^64) and the next 32 bits of the quotient; V < 2^31, so nothing exceeds 63 bits.
    scaled = high * n_classes + ((low * n_classes) >> 32)
    bucket = scaled >> 32
    if kind == UNIFORM:
        return bucket
    threshold, alias = table[bucket, 0].long() & _WORD, table[bucket, 1].long()
    ids = torch.where((scaled & _WORD) < threshold, bucket, alias)
    return torch.where((ids >= 0) & (ids < n_classes), ids, -1)


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

    own = torch.arange(n, device=weights.device)
    threshold, alias = torch.full_like(own, _WORD), own.clone()
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
