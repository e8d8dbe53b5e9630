"""Lyapunov equations, and what they belong to: second moments of linear SDEs without horizon.

    A'S + S A + sum_j C_j'S C_j = Q,   the operator on the left being that of E|X_t|^2 for
    dX = A X dt + sum_j C_j X dW_j

Small problems, and those with noise in proportion to the state, are linear systems of the pairs of
coordinates. Without that noise Smith's method ([S68]) costs dim^3: for a rate p > 0 the equation is

    S = E'S E + P,   E = (A + p)(A - p)^{-1},   P = -2 p (A - p)^{-T} Q (A - p)^{-1}

whose solution sum_k E'^k P E^k is summed by doubling. All is differentiable to any order.

Sources  [S68] Smith 1968, matrix equation XA + BX = C, SIAM J. Applied Mathematics 16.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.linear.margin import margin, solve

SMALL = 8  # dimensions up to which all unknowns are solved for at once, which is then faster
DOUBLINGS = 60  # of Smith's sum; E|X_t|^2 would decay by round-off only
_NO_DECAY = "E|X_t|^2 must decay, or it has no Lyapunov equation"


def lyapunov(
    A: Float[Tensor, "*batch dim dim"],
    C: Float[Tensor, "*batch noise dim dim"],
    Q: Float[Tensor, "*batch dim dim"],
) -> Float[Tensor, "*batch dim dim"]:
    """The symmetric S with A'S + S A + sum_j C_j'S C_j = Q.

    Args:
        A: drift matrix, under which the second moments decay (``growth``).
        C: noise in proportion to the state; of no Brownian motion if there is none.
        Q: symmetric.

    Raises:
        ValueError: there is none that is finite.
    """
    if C.shape[-3] or A.shape[-1] <= SMALL:
        i, j = torch.tril_indices(*Q.shape[-2:], device=Q.device)
        pairs = solve(second_moments(A, C), Q[..., i, j].unsqueeze(-1), _NO_DECAY).squeeze(-1)
        place = torch.zeros(Q.shape[-2:], dtype=torch.int64, device=Q.device)
        place[i, j] = place[j, i] = torch.arange(len(i), device=Q.device)
        return pairs[..., place]
    terms, shifted, p = _smith(A)

    def solved(right: Tensor) -> Tensor:
        half = solve(shifted.mT, -2 * p * right, _NO_DECAY)
        total = solve(shifted.mT, half.mT, _NO_DECAY)
        for E in terms:
            total = total + E.mT @ total @ E
        return 0.5 * (total + total.mT)

    S = solved(Q)
    return S + solved(Q - A.mT @ S - S @ A)  # what round-off has left


def _smith(A: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """E, E^2, E^4, ..., up to the last that counts; A - p; and p, between A's largest and least."""
    eye = torch.eye(A.shape[-1]).to(A)
    inverse, info = torch.linalg.inv_ex(A.detach())
    size = [each.square().sum((-2, -1)).sqrt() for each in (A.detach(), inverse)]
    p = (size[0] / size[1]).sqrt()[..., None, None]
    if bool((info != 0).any()) or not bool(torch.isfinite(p).all()):
        raise ValueError(_NO_DECAY)
    shifted = A - p * eye
    power = eye + 2 * p * solve(shifted, eye.expand_as(A), _NO_DECAY)
    terms = list[Tensor]()
    for _ in range(DOUBLINGS):
        left = float(power.detach().square().sum((-2, -1)).max())
        if left < 1e-20:  # counts as its square
            return terms, shifted, p
        if not left < 1e100:
            break
        terms.append(power)
        power = power @ power
    raise ValueError(_NO_DECAY)


def growth(
    A: Float[Tensor, "*batch dim dim"], C: Float[Tensor, "*batch noise dim dim"]
) -> tuple[Float[Tensor, " *batch"], Float[Tensor, " *batch"]]:
    """Exponential rate of E|X_t|^2 for dX = A X dt + sum_j C_j X dW_j, 1/time, and its margin.

    A rate that is not below minus the margin cannot be told from one of no decay.
    """
    operator = (second_moments(A, C) if C.shape[-3] else 2 * A).detach()
    size = operator.square().sum((-2, -1)).sqrt()
    finite = torch.isfinite(size)
    safe = torch.where(finite[..., None, None], operator, 0)
    rate = torch.linalg.eigvals(safe).real.amax(-1)
    return torch.where(finite, rate, torch.inf), margin(operator.shape[-1], size)


def second_moments(
    A: Float[Tensor, "*batch dim dim"], C: Float[Tensor, "*batch noise dim dim"]
) -> Float[Tensor, "*batch pairs pairs"]:
    """S -> A'S + S A + sum_j C_j'S C_j of symmetric S, as a matrix on the pairs i >= j."""
    n = A.shape[-1]
    eye = torch.eye(n).to(A).expand_as(A)
    scaled = torch.einsum("...mki,...mlj->...ijkl", C, C).flatten(-4, -3).flatten(-2)
    whole = (kron(A.mT, eye) + kron(eye, A.mT) + scaled).unflatten(-1, (n, n))
    whole = (whole + whole.mT).flatten(-2)  # S_ij and S_ji are one unknown
    i, j = torch.tril_indices(n, n, device=A.device)
    once = torch.where(i == j, 0.5, 1.0).to(A)
    return whole[..., i * n + j, :][..., i * n + j] * once


def kron(left: Tensor, right: Tensor) -> Float[Tensor, "..."]:
    """Kronecker product of the last two dimensions, batched."""
    size = left.shape[-1] * right.shape[-1]
    product = torch.einsum("...ij,...kl->...ikjl", left, right)
    return product.reshape(*product.shape[:-4], size, size)
