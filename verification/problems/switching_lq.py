"""Linear-quadratic control whose coefficients switch at random, or change with time."""

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl.linear import LinearQuadratic
from verification.claim import rounding
from verification.closed_form.switching_lq import Coefficients

HORIZON, AT = 0.9, 0.25

# the time derivative of a polynomial of degree 16 on panels of [0, HORIZON] has this much round-off
SLOPE = rounding(size=16**2 / HORIZON)
TIMES = torch.linspace(0, HORIZON, 4, dtype=torch.float64)


def production(c: Coefficients) -> LinearQuadratic:
    """The same for ``ctrl``, a batch as the coefficients are."""
    n = {
        each.name: torch.as_tensor(getattr(c, each.name), dtype=torch.float64) for each in fields(c)
    }
    matrix = {name: n[name][..., None, None] for name in ("A", "B", "M", "N", "H")}
    scaled = {} if not np.any(c.D) else {"D": n["D"][..., None, None, None]}
    return LinearQuadratic(
        **matrix, **scaled, sigma=n["s"][..., None, None], p=n["p"][..., None],
        f=n["f"][..., None], C=n["C"][..., None, None, None], discount=n["discount"],
    )  # fmt: skip


def flat(value: ctrl.linear.Quadratic) -> Tensor:
    """S, e and c, [3, regimes]."""
    parts = (value.hessian.flatten(), value.slope.flatten(), value.constant.flatten())
    return torch.stack(parts)
