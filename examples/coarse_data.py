"""A value from data seen every 0.5 units of time: temporal differences, and PhiBE of two orders.

python examples/coarse_data.py
"""

import torch

import ctrl
from ctrl import linear, martingale, phibe

STEP, DISCOUNT = 0.5, 0.3


def features(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.ones_like(x), x.square()], dim=1)


def main(paths: int = 100_000) -> tuple[dict[str, float], float]:
    """V(1) by three methods from the same windows of data; and exactly."""
    # dX = -X dt + 0.7 dW, reward -x^2: how the states move is not told
    one = torch.ones(1, 1, dtype=torch.float64)
    law = linear.transition(-one, 0 * one[0], 0.7 * one, STEP)
    noise = torch.randn(5, paths, 1, dtype=one.dtype, generator=torch.Generator().manual_seed(0))
    states = [noise[0]]
    for z in noise[1:]:
        states.append(law.F * states[-1] + law.C.sqrt() * z)
    data = torch.stack(states, dim=1)
    seen = ctrl.Paths(data, 0 * data[:, 1:], None, ctrl.uniform_grid(4 * STEP, 4))
    paid = lambda t, x, a: -x.square().sum(1)  # noqa: E731  # as short as it reads
    unknown = ctrl.ControlProblem(None, float("inf"), paid, discount=DISCOUNT)
    values = {"temporal differences": martingale.clstd(features, unknown, seen)}
    values |= {f"PhiBE {i}": phibe.galerkin(features, unknown, seen, i) for i in (1, 2, 3)}
    exact = -(1 + 0.7**2 / DISCOUNT) / (DISCOUNT + 2)
    return {name: float(value(one[0, 0], one)) for name, value in values.items()}, exact


if __name__ == "__main__":
    estimates, exact = main()
    for name, value in {"exact": exact, **estimates}.items():
        print(f"{name:20} {value:.4f}")
