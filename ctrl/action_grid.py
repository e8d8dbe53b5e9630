"""Actions to choose from: nodes and weights of a quadrature rule over a box."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ActionGrid:
    """Nodes and weights, so that int f(a) da ~ sum_k weights_k f(nodes_k).

    Attributes:
        nodes: actions, [nodes, *action], float64, on the CPU.
        weights: positive, in units of the actions' volume, [nodes], float64.
    """

    nodes: Float[Tensor, " nodes *action"]
    weights: Float[Tensor, " nodes"]

    def __post_init__(self) -> None:
        for name, tensor in (("nodes", self.nodes), ("weights", self.weights)):
            if tensor.dtype != torch.float64 or not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} must be finite and float64, got {tensor.dtype}")
        if self.nodes.ndim < 1 or self.weights.shape != self.nodes.shape[:1] or not len(self.nodes):
            raise ValueError(
                f"weights must be [nodes], one for each of the nodes [nodes, *action], got "
                f"{list(self.weights.shape)} for {list(self.nodes.shape)}"
            )
        for name, tensor in (("nodes", self.nodes), ("weights", self.weights)):
            if tensor.device.type != "cpu":
                raise ValueError(
                    f"{name} must be on the CPU, where the HJB equation is solved, got them on "
                    f"{tensor.device}: {name}.cpu()"
                )
        if bool((self.weights <= 0).any()):
            raise ValueError(f"weights must be positive, got {float(self.weights.min()):g}")

    def ends(self) -> Tensor:
        """Whether each node is outermost in some coordinate, [nodes]."""
        flat = self.nodes.reshape(len(self.nodes), -1)
        return ((flat == flat.amin(0)) | (flat == flat.amax(0))).any(-1)

    def moments(
        self, mass: Float[Tensor, "nodes points"]
    ) -> tuple[Float[Tensor, " points *action"], Float[Tensor, " points *action"]]:
        """Mean and standard deviation of the action under probabilities of the nodes."""
        flat = self.nodes.reshape(len(self.nodes), -1)
        mean = mass.T @ flat
        squares = (flat.unsqueeze(1) - mean).square()  # [nodes, points, action]
        std = (mass.unsqueeze(-1) * squares).sum(0).sqrt()
        shape = (mass.shape[1], *self.nodes.shape[1:])
        return mean.view(shape), std.view(shape)


def gauss_legendre(low: float | Tensor, high: float | Tensor, nodes: int) -> ActionGrid:
    """Gauss-Legendre nodes of a box; the best for policies that the box cuts off.

    Args:
        low: smallest action, a number or [dim].
        high: largest action, the same.
        nodes: for each coordinate, so nodes ** dim in all.

    Raises:
        ValueError: low is not below high, one is not finite, or there are fewer than two nodes.
    """
    points, weights = np.polynomial.legendre.leggauss(_checked(nodes))
    return _product(low, high, torch.from_numpy(points), torch.from_numpy(weights))


def trapezoid(low: float | Tensor, high: float | Tensor, nodes: int) -> ActionGrid:
    """Equally spaced nodes of a box, its ends among them.

    The best for temperature 0, where a maximum is looked for, and for Gibbs policies that vanish
    at the ends of the box.

    Args:
        low: smallest action, a number or [dim].
        high: largest action, the same.
        nodes: for each coordinate, so nodes ** dim in all.

    Raises:
        ValueError: as ``gauss_legendre``.
    """
    points = torch.linspace(-1, 1, _checked(nodes), dtype=torch.float64)
    weights = torch.full_like(points, 2 / (nodes - 1))
    weights[[0, -1]] /= 2
    return _product(low, high, points, weights)


def _checked(nodes: int) -> int:
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 2:
        raise ValueError(f"nodes must be an integer, at least 2, got {nodes!r}")
    return nodes


def _product(
    low: float | Tensor, high: float | Tensor, points: Tensor, weights: Tensor
) -> ActionGrid:
    """The rule on [-1, 1], carried to each side of the box."""
    bottom, top = (
        torch.atleast_1d(torch.as_tensor(bound, dtype=torch.float64, device="cpu"))
        for bound in (low, high)
    )
    if bottom.shape != top.shape or bottom.ndim != 1:
        raise ValueError(
            f"low and high must be numbers or [dim] alike, got {list(bottom.shape)} and "
            f"{list(top.shape)}"
        )
    if not bool((bottom < top).all() & torch.isfinite(top - bottom).all()):
        raise ValueError(f"low and high must be finite and low < high, got {low} and {high}")
    dim = len(bottom)
    if len(points) ** dim > 100_000:
        raise ValueError(f"nodes ** dim must be at most 100000, got {len(points)} ** {dim}")
    mesh = torch.meshgrid(*dim * [points], indexing="ij")
    masses = torch.meshgrid(*dim * [weights], indexing="ij")
    unit = torch.stack([one.reshape(-1) for one in mesh], dim=-1)
    weight = torch.stack([one.reshape(-1) for one in masses]).prod(0)
    nodes = 0.5 * (bottom + top) + 0.5 * (top - bottom) * unit
    return ActionGrid(nodes, weight * math.prod((0.5 * (top - bottom)).tolist()))
