"""Philox4x64-10 in integers, and Box and Muller's normals in extended precision."""

from typing import Any

import numpy as np
import numpy.typing as npt

MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
WORD = 2**64


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The four words of a counter."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        p, q = MULTIPLIERS[0] * x0, MULTIPLIERS[1] * x2
        x0, x1, x2, x3 = (q // WORD) ^ x1 ^ k0, q % WORD, (p // WORD) ^ x3 ^ k1, p % WORD
        k0, k1 = (k0 + WEYL[0]) % WORD, (k1 + WEYL[1]) % WORD
    return x0, x1, x2, x3


def group_of_normals(key: tuple[int, ...], row: int, group: int, bits: int) -> npt.NDArray[Any]:
    """The 256 numbers of a group of a row, for float32 (32 bits) or float64 (64)."""
    calls = 32 if bits == 32 else 64
    words = [w for n in range(calls) for w in philox((1 + group * calls + n, row, 0, 0), key)]
    if bits == 32:
        words = [half for w in words for half in (w % 2**32, w // 2**32)]
    kept = (31, 24) if bits == 32 else (52, 52)
    pairs = []
    for radius_word, angle_word in zip(words[:128], words[128:], strict=True):
        u, turn = (
            np.longdouble(2 * (word >> (bits - n)) + 1) / 2 ** (n + 1)
            for word, n in zip((radius_word, angle_word), kept, strict=True)
        )
        radius = np.sqrt(-2 * np.log(u)) * (-1 if radius_word % 2 else 1)
        angle = (turn - np.longdouble(0.5)) * np.longdouble(np.pi) / 2
        pair = radius * np.cos(angle), radius * np.sin(angle)
        pairs.append(pair[::-1] if angle_word % 2 else pair)
    return np.array(pairs).T.ravel()
