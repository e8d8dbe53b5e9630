"""Limits of what converges in powers of the step size."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np


def extrapolated(values: Sequence[Any], power: int = 1) -> Any:
    """Richardson's limit of values at steps h, h / 2, h / 4, ...; errors h^power, h^(power+1).."""
    row = list(values)
    for order in range(power, power + len(row) - 1):
        row = [(2**order * fine - coarse) / (2**order - 1) for coarse, fine in pairwise(row)]
    return row[0]


def by_polynomial(values: Sequence[Any], sizes: Sequence[float] | np.ndarray) -> Any:
    """The limit of values at these step sizes, by a polynomial in them."""
    powers = np.vander(np.asarray(sizes, dtype=float), increasing=True)
    return np.linalg.solve(powers, np.array(values))[0]
