"""From one well to the other: a rare event, sampled under the control that makes it happen.

The chance to reach 1 from -1 by T solves an equation on a grid with an absorbing wall. Its
logarithm's slope drives almost all paths there, and weights turn them back into those of the SDE.
"""

import torch

import ctrl
from ctrl import hjb

SIGMA, HORIZON, LOW, HIGH = 0.35, 2.0, -2.0, 1.0
sde = ctrl.ControlledSDE(lambda t, x, a: x - x**3 + a, lambda t, x: SIGMA)
wall = ctrl.stopping.Interval(-torch.inf, HIGH)
pays = {"domain": wall, "exit_reward": lambda t, x: torch.ones_like(t)}  # and 0 at the horizon
problem = ctrl.ControlProblem(sde, HORIZON, **pays)
free = ctrl.DeterministicPolicy(lambda t, x: torch.zeros_like(x))


def main() -> tuple[ctrl.Estimate, float]:
    """The chance by weighted paths, and from the grid."""
    chance = hjb.evaluate_finite_horizon(problem, free, (hjb.Axis(LOW, HIGH, 401),), steps=200)

    def slope(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        left, right = (x - 0.01).clamp(min=LOW), (x + 0.01).clamp(max=HIGH)
        low, high = ((chance(t, end).clamp(min=0) + 1e-12).log() for end in (left, right))
        return SIGMA**2 * (high - low).unsqueeze(1) / (right - left)

    driven = ctrl.DeterministicPolicy(slope)
    grid, start = ctrl.uniform_grid(HORIZON, 200), torch.full((4000, 1), -1.0).double()
    paths = ctrl.simulate(problem, driven, start, grid, generator=ctrl.noise.stream(0, "well"))
    weights = (-ctrl.girsanov.log_ratio(sde, driven, free, paths)).exp()
    estimate = ctrl.Estimate.of(weights * ctrl.returns_to_go(problem, paths)[:, 0])
    return estimate, float(chance(grid.nodes[0], start)[0])


if __name__ == "__main__":
    print("by weighted paths {}, from the grid {:.4g}".format(*main()))
