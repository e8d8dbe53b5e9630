"""The matrix exponential, to round-off in every block of a block triangular matrix.

    e^M = p(M / 2^k)^(2^k),   p the Taylor polynomial of degree 20, row sums of |M| / 2^k at most 1

With r the largest row sum the polynomial leaves out at most sum_{j > 20} r^j / j!, less than
1.05 r^21 / 21! = 2.1e-20 r^21. Of a block triangular matrix every term is a sum of products with
one factor from outside the diagonal, at most j |block| r^(j-1) / j!: such a block, of any size, is
exact to 1.05 / 20! = 4.4e-19 of its own. What is left is the round-off of seven products. A
squaring doubles relative errors: k of them leave about 2^k dim eps e^|M| at worst, as they do in
every method that scales and squares.

(``torch.linalg.matrix_exp`` has the ninth digit wrong where norms are from 5e-3 to 0.05.)

Sources  [PS73] Paterson & Stockmeyer 1973, on the number of nonscalar multiplications, SIAM J.
         Computing 2.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.linear.reading import largest

_DEGREE, _STRIDE = 20, 4


def exponential(matrix: Float[Tensor, "*batch dim dim"]) -> Float[Tensor, "*batch dim dim"]:
    """e^M of every matrix of a batch; differentiable to any order, and may be vectorised.

    Args:
        matrix: M, finite, float64. A block that the answer is linear in had better be made small
            (``unit``): its size counts in the squarings.
    """
    halvings = torch.log2(matrix.detach().abs().sum(-1).amax(-1).clamp(min=1)).ceil().long()
    power = _taylor(matrix * torch.exp2(-halvings.to(matrix))[..., None, None])
    for k in range(int(largest(halvings))):
        power = torch.where((halvings > k)[..., None, None], power @ power, power)
    return power


def unit(matrix: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch 1 1"]:
    """Divisor that makes a block's row sums at most 1; 1 for zeros. A constant."""
    size = matrix.detach().abs().sum(-1).amax(-1)[..., None, None]
    return torch.where(size > 0, size, torch.ones_like(size))


def _taylor(matrix: Tensor) -> Tensor:
    """sum_{j <= 20} M^j / j!, a polynomial in M^4 whose coefficients are cubics in M ([PS73])."""
    powers = [torch.eye(matrix.shape[-1]).to(matrix).expand_as(matrix), matrix]
    for _ in range(_STRIDE - 1):
        powers.append(powers[-1] @ matrix)
    total = powers[0] / math.factorial(_DEGREE)
    for low in range(_DEGREE - _STRIDE, -1, -_STRIDE):
        total = total @ powers[_STRIDE]
        for j in range(_STRIDE):
            total = total + powers[j] / math.factorial(low + j)
    return total
