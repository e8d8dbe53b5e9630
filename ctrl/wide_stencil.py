"""Noise of any correlation on a grid of two axes, as moves with rates that are not negative.

    1/2 tr(D Hess v) = 1/2 sum_k w_k (e_k . grad)^2 v,   w_k >= 0,  e_k whole numbers of cells

D the covariance in units of the spacings. Selling's algorithm finds the three e_k: of a superbase
b_0 + b_1 + b_2 = 0 of the plane's whole vectors that is obtuse, b_i . D b_j <= 0 for all pairs, the
e_k are perpendicular to the b_k, and w_k = -b_i . D b_j of the two others ([S74]; [BOZ04] for
control problems). Where the covariance is dominant in its diagonal these are the moves along the
axes and one diagonal. The nearer D is to singular, the wider the moves.

Sources  [S74] Selling 1874, on binary and ternary quadratic forms, Crelle 77.
         [BOZ04] Bonnans, Ottenwaelter & Zidani 2004, a fast algorithm for the two dimensional HJB
         equation of stochastic control, ESAIM M2AN 38.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

REACH = 12  # cells along an axis that a move goes at most


def obtuse_superbase(
    D: Float[Tensor, "any 2 2"],
) -> tuple[Int[Tensor, "any 3 2"], Float[Tensor, "any 3"]]:
    """e_k and w_k of every matrix.

    Args:
        D: symmetric, not negative.

    Raises:
        ValueError: a move would be wider than ``REACH``: D is too near to singular.
    """
    base = torch.tensor([[1, 0], [0, 1], [-1, -1]]).expand(len(D), 3, 2).clone()
    slack = 1e-12 * D.diagonal(dim1=-2, dim2=-1).sum(-1)
    pairs = torch.tensor([[1, 2], [2, 0], [0, 1]])  # the two others of each
    while True:
        b = base.to(D)
        products = torch.einsum("nki,nij,nkj->nk", b[:, pairs[:, 0]], D, b[:, pairs[:, 1]])
        worst, k = products.max(1)
        acute = worst > slack
        if not bool(acute.any()):
            break
        i, j = pairs[k, 0], pairs[k, 1]
        rows = torch.arange(len(D))
        one, other = base[rows, i], base[rows, j]
        flipped = torch.stack([-one, other, one - other], dim=1)
        base = torch.where(acute[:, None, None], flipped, base)
        if bool((base.abs() > REACH).any()):
            raise ValueError(
                "the noises of the two coordinates are correlated too strongly for a monotone "
                f"scheme: it would need moves of more than {REACH} cells; choose spacings in the "
                "ratio of the noises, or differences='central'"
            )
    perpendicular = torch.stack([-base[..., 1], base[..., 0]], dim=-1)
    return perpendicular, (-products).clamp_min(0)


def wide_moves(
    D: Float[Tensor, "actions points 2 2"],
) -> tuple[
    list[tuple[int, ...]],
    list[Float[Tensor, "actions points"]],
    list[Float[Tensor, "actions points"]],
]:
    """Moves off the axes with their rates, and what is left of the noise for those along each.

    Args:
        D: covariance in units of the spacings, 1/time.

    Returns:
        The moves, there and back; the rate of each; the rates of the moves along the two axes.

    Raises:
        ValueError: the covariance is too near to singular.
    """
    shape = D.shape[:2]
    matrices, which = D.flatten(0, 1).unique(dim=0, return_inverse=True)
    e, w = obtuse_superbase(matrices)
    forward = (e[..., 0] > 0) | ((e[..., 0] == 0) & (e[..., 1] > 0))
    e = torch.where(forward[..., None], e, -e)  # of a move and the one back, one name
    along = [
        (0.5 * w * (e == torch.tensor(axis)).all(-1)).sum(-1)[which].view(shape)
        for axis in ((1, 0), (0, 1))
    ]
    moves, rates = list[tuple[int, ...]](), list[Tensor]()
    for p, q in e.reshape(-1, 2).unique(dim=0).tolist():
        rate = (0.5 * w * (e == torch.tensor([p, q])).all(-1)).sum(-1)
        if p and q and bool(rate.any()):
            moves += [(p, q), (-p, -q)]
            rates += 2 * [rate[which].view(shape)]
    return moves, rates, along
