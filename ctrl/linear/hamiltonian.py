"""Riccati equations by their Hamiltonian flow: exact over any time, however stiff.

    P' = A'P + P A + Q - P G P,   P(0) = P_0,   G >= 0

in time to go. After a time t it is a fractional linear map of P_0, with matrices that double:

    P(t) = H + E'P_0 (1 + G_t P_0)^{-1} E
    E_2t = E (1 + G H)^{-1} E,  G_2t = G + E (1 + G H)^{-1} G E',  H_2t = H + E'H (1 + G H)^{-1} E

where nothing grows that the solution does not ([A78]). They begin as blocks of one exponential, of
(A, -G; -Q, -A') over a time so short that its row sums are at most 1.

Sources  [A78] Anderson 1978, second-order convergent algorithms for the steady-state Riccati
         equation, Int. J. Control 28.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.linear.exponential import exponential

Maps = tuple[Tensor, Tensor, Tensor]
"""E, G and H of several times."""


class HamiltonianFlow:
    """The maps P_0 -> P(t) for times t_j / 2^k, made once for every k.

    Attributes:
        A, G, Q: the equation, [*batch, dim, dim]; G and Q symmetric.
        times: t_j, [times].
    """

    def __init__(
        self,
        A: Float[Tensor, "*batch dim dim"],
        G: Float[Tensor, "*batch dim dim"],
        Q: Float[Tensor, "*batch dim dim"],
        times: Float[Tensor, " times"],
    ):
        self.times = times
        # P in units in which G and Q are alike: it is what the exponential sees
        gain, cost = (_row_sums(each) for each in (G, Q))
        unit = torch.where(gain > 0, (cost / gain).sqrt(), cost)
        self.unit = torch.where((unit > 0) & torch.isfinite(unit), unit, 1)[..., None, None]
        upper = torch.cat([A, -G * self.unit], dim=-1)
        lower = torch.cat([-Q / self.unit, -A.mT], dim=-1)
        self.generator = torch.cat([upper, lower], dim=-2)
        size = float((_row_sums(self.generator).max() if A.numel() else 0) * times.abs().max())
        self.short = max(0, math.ceil(math.log2(size))) if size > 0 else 0
        self.known = dict[int, Maps]()

    def after(self, P: Float[Tensor, "*batch dim dim"], halvings: int) -> Tensor:
        """P at times / 2^halvings, [times, *batch, dim, dim]; not finite where it explodes."""
        E, G, H = self._maps(halvings)
        ahead = torch.linalg.solve_ex(_one_plus(G @ P / self.unit), E).result
        hessian = H + E.mT @ (P / self.unit) @ ahead
        return 0.5 * self.unit * (hessian + hessian.mT)

    def _maps(self, halvings: int) -> Maps:
        if halvings not in self.known:
            longer = halvings < self.short
            maps = _doubled(*self._maps(halvings + 1)) if longer else self._short(halvings)
            self.known[halvings] = maps
        return self.known[halvings]

    def _short(self, halvings: int) -> Maps:
        n = self.generator.shape[-1] // 2
        times = (self.times / 2**halvings).reshape(-1, *[1] * self.generator.ndim)
        grown = exponential(self.generator * times)
        corner = grown[..., n:, n:]
        below = torch.linalg.solve(corner, torch.cat([_one_like(corner), -grown[..., n:, :n]], -1))
        E, H = below[..., :n].mT, below[..., n:]
        G = -grown[..., :n, n:] @ E.mT
        return E, 0.5 * (G + G.mT), 0.5 * (H + H.mT)


def _doubled(E: Tensor, G: Tensor, H: Tensor) -> Maps:
    n = E.shape[-1]
    inner = torch.linalg.solve_ex(_one_plus(G @ H), torch.cat([E, G], dim=-1)).result
    further, wider = G + E @ inner[..., n:] @ E.mT, H + E.mT @ H @ inner[..., :n]
    return E @ inner[..., :n], 0.5 * (further + further.mT), 0.5 * (wider + wider.mT)


def _one_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1]).to(matrix).expand_as(matrix)


def _one_plus(matrix: Tensor) -> Tensor:
    return matrix + torch.eye(matrix.shape[-1]).to(matrix)


def _row_sums(matrix: Tensor) -> Float[Tensor, "*batch"]:
    return matrix.detach().abs().sum(-1).amax(-1)
