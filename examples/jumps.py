"""A call on a stock whose price jumps: Monte Carlo beside Merton's series.

python examples/jumps.py
"""

import math

import torch

import ctrl
from ctrl.jumps import Jumps, NormalMarks

RATE, STD, STRIKE, HORIZON = 0.05, 0.2, 1.1, 0.5
INTENSITY, SHIFT, WIDTH = 1.5, -0.1, 0.2  # jumps a year; the log-price jumps by N(SHIFT, WIDTH^2)
RELATIVE = math.exp(SHIFT + WIDTH**2 / 2) - 1  # mean relative jump; the drift makes up for it
DRIFT = RATE - STD**2 / 2 - INTENSITY * RELATIVE


def main() -> tuple[ctrl.Estimate, float]:
    """The price by simulation, and by Merton's series (1976)."""
    intensity = lambda t, x, a: torch.full_like(x[:, 0], INTENSITY)  # noqa: E731
    jumps = Jumps(intensity, lambda t, x, a, z: z, NormalMarks(SHIFT, WIDTH))
    sde = ctrl.ControlledSDE(lambda t, x, a: 0 * x + DRIFT, lambda t, x: STD, jumps=jumps)
    pays = lambda x: (x[:, 0].exp() - STRIKE).clamp_min(0)  # noqa: E731
    problem = ctrl.ControlProblem(sde, HORIZON, None, pays, discount=RATE)
    nobody = ctrl.DeterministicPolicy(lambda t, x: x[:, :0])
    start, grid = torch.zeros(400_000, 1), ctrl.uniform_grid(HORIZON, 1)  # a step is exact in law
    paths = ctrl.simulate(problem, nobody, start, grid, generator=ctrl.noise.stream(0, "jumps"))
    n = torch.arange(30.0, dtype=torch.float64)  # numbers of jumps
    grown = INTENSITY * (1 + RELATIVE) * HORIZON
    growth = (DRIFT + STD**2 / 2) * HORIZON + n * math.log(1 + RELATIVE)
    std = (STD**2 * HORIZON + n * WIDTH**2).sqrt()
    d = (growth - math.log(STRIKE)) / std + std / 2
    worth = torch.special.ndtr(d) - STRIKE * (-growth).exp() * torch.special.ndtr(d - std)
    series = float(worth @ (n * math.log(grown) - grown - torch.lgamma(n + 1)).exp())
    return ctrl.Estimate.of(ctrl.returns_to_go(problem, paths)[:, 0]), series


if __name__ == "__main__":
    print("simulated {}, Merton's series {:.5f}".format(*main()))
