"""Noise ids and alias tables by numpy's and Python's integers, after the papers: nothing here comes from nce_ext.

Philox4x32-10 is of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the alias method is of
Walker (1977) in Vose's form (1991).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

UNIFORM, LOG_UNIFORM, ALIAS = 0, 1, 2
WORD = 0xFFFFFFFF
FULL = 1 << 32  # mass of a bucket

_32 = np.uint64(32)
_WORD = np.uint64(WORD)


def philox4x32(counter, key, rounds: int = 10) -> list[np.ndarray]:
    """Four words from four words of counter and two of key: integers below 2^32, or arrays of them."""
    c = [np.asarray(word, np.uint64) for word in counter]
    k0, k1 = key
    for _ in range(rounds):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)  # below 2^64
        c = [(b >> _32) ^ c[1] ^ np.uint64(k0), b & _WORD, (a >> _32) ^ c[3] ^ np.uint64(k1), a & _WORD]
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c


def random_bits(seed, rows: int, columns: int) -> np.ndarray:
    """The 64 bits of every (example, slot): slots 2 i and 2 i + 1 are the halves of Philox at (i, example, nonce)."""
    key, nonce = (int(word) % (1 << 64) for word in seed)
    example, slot = np.indices((rows, columns), np.uint64)
    words = philox4x32([slot >> np.uint64(1), example, nonce & WORD, nonce >> 32], [key & WORD, key >> 32])
    odd = slot % np.uint64(2) == 1
    return np.where(odd, words[2] | words[3] << _32, words[0] | words[1] << _32)


class Noise(NamedTuple):
    kind: int
    n_classes: int
    table: np.ndarray | None = None  # int32 [V, 4]: threshold, alias, bits of log q of the class and of the alias

    def draw(self, seed, rows: int, columns: int) -> np.ndarray:
        bits, n = random_bits(seed, rows, columns), np.uint64(self.n_classes)
        if self.kind == LOG_UNIFORM:
            exponent = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53 * math.log2(self.n_classes + 1)
            return np.clip(exp2(exponent).astype(np.int64) - 1, 0, self.n_classes - 1)
        scaled = (bits >> _32) * n + (((bits & _WORD) * n) >> _32)  # floor(bits V / 2^32)
        bucket = (scaled >> _32).astype(np.int64)
        if self.kind == UNIFORM:
            return bucket
        threshold, alias = (self.table[bucket, i].view(np.uint32) for i in (0, 1))
        return np.where((scaled & _WORD) < threshold, bucket, alias)

    def log_q(self, ids) -> np.ndarray:
        """Of the law that is realised: the float32 that kernels use, as float64."""
        ids = np.asarray(ids)
        if self.kind == ALIAS:
            return self.table[:, 2].view(np.float32)[ids].astype(np.float64)
        if self.kind == UNIFORM:
            value = np.full(ids.shape, -math.log(self.n_classes))
        else:
            log_range = math.log(math.log1p(self.n_classes))
            value = np.array([math.log(math.log1p(1 / (y + 1.0))) - log_range for y in ids.flat]).reshape(ids.shape)
        return value.astype(np.float32).astype(np.float64)


def exp2(t: np.ndarray) -> np.ndarray:
    """2^t by its Taylor series around the nearest integer: a fixed sequence of IEEE operations defines the draw."""
    whole = np.floor(t + 0.5)
    power = np.full_like(t, math.log(2) ** 13 / math.factorial(13))
    for i in reversed(range(13)):
        power = power * (t - whole) + math.log(2) ** i / math.factorial(i)
    return np.ldexp(power, whole.astype(np.int64))


def alias_noise(weights) -> Noise:
    """Integer masses that sum to V 2^32, the rounding residue on the heaviest class, dealt into V buckets of 2^32."""
    n, total = len(weights), math.fsum(weights)
    mass = [max(1, round(w / total * n * FULL)) if w > 0 else 0 for w in weights]
    mass[int(np.argmax(weights))] += n * FULL - sum(mass)
    own_log_q = np.array([math.log(m) - math.log(n * FULL) if m else -math.inf for m in mass], np.float32)
    threshold, alias, rest = [WORD] * n, list(range(n)), list(mass)
    light = [i for i in range(n) if rest[i] < FULL]
    heavy = [i for i in range(n) if rest[i] > FULL]
    while light:
        i, j = light.pop(), heavy[-1]
        threshold[i], alias[i] = rest[i], j
        rest[j] -= FULL - rest[i]
        if rest[j] <= FULL:
            heavy.pop()
            light += [j] if rest[j] < FULL else []
    assert not heavy
    words = [np.array(threshold, np.uint32), np.array(alias, np.uint32), own_log_q, own_log_q[alias]]
    return Noise(ALIAS, n, np.stack([w.view(np.int32) for w in words], 1))
