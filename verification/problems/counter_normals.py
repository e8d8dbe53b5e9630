"""Normals that are functions of their index: the law, the formula, and who draws them.

The law needs no statistics: where Philox's words are independent and uniform, Box and Muller's
pairs are independent normals, but for the grid on which 31 or 52 bits put the radius, and 24 or 52
the angle. What is checked is the formula, number by number, from integers on; then what a number
does not depend on; and the moments, in case the words are not what they are said to be.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from ctrl.counter_normals import fill

Array = npt.NDArray[Any]


def drawn(dtype: np.dtype, key: Array, rows: int, groups: int, row: int, group: int) -> Array:
    """So many rows from ``row`` on, so many groups from ``group`` on, by numpy."""
    out = np.empty((rows, 256 * groups), dtype)
    fill(out, key, row=row, group=group, scales=np.ones(rows))
    return out
