"""Investing under Heston's volatility: the HJB equation and paths beside Kraft's answer (2005)."""

import torch

import ctrl
from ctrl.hjb import Axis, solve_finite_horizon, trapezoid

PREMIUM, PULL, LEVEL, SWING, CORRELATION, POWER, HORIZON = 2.0, 3.0, 0.09, 0.6, -0.7, -1.5, 0.5


def drift(t: torch.Tensor, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    share, y = a[:, 0], x[:, 1].clamp_min(0)  # states: log-wealth and the stock's variance
    return torch.stack([(share * PREMIUM - share.square() / 2) * y, PULL * (LEVEL - y)], dim=1)


def diffusion(t: torch.Tensor, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    root = x[:, 1:].clamp_min(0).sqrt()
    swing = SWING * torch.tensor([CORRELATION, (1 - CORRELATION**2) ** 0.5]).to(x)
    return torch.stack([torch.cat([a * root, 0 * root], dim=1), root * swing], dim=1)


def main() -> tuple[ctrl.Estimate, float, float, float]:
    """Expected utility w^g / g from wealth 1, simulated, by the grid and exact; share's error."""
    sde = ctrl.ControlledSDE(drift, diffusion, "general", 2, controls_diffusion=True)
    problem = ctrl.ControlProblem(sde, HORIZON, None, lambda x: (POWER * x[:, 0]).exp() / POWER)
    axes, shares = (Axis(-1.5, 1.5, 61), Axis(0.0, 0.6, 31)), trapezoid(0.4, 1.2, 33)
    solved = solve_finite_horizon(problem, axes, shares, steps=8, differences="central")
    start, grid = torch.tensor([[0, LEVEL]]).double(), ctrl.uniform_grid(HORIZON, 50)
    policy = ctrl.DeterministicPolicy(lambda t, x: solved.mean_action(t, start).expand(len(x), 1))
    many, noise = start.expand(50_000, 2), ctrl.noise.stream(0, "heston")
    paths = ctrl.simulate(problem, policy, many, grid, generator=noise)
    # V = w^g / g exp(A + B y), B' = a + b B + c B^2 in the time to go, A' = pull level B
    k, g = SWING * CORRELATION, POWER / (1 - POWER)
    a, b, c = g * PREMIUM**2 / 2, g * PREMIUM * k - PULL, SWING**2 / 2 + g * k**2 / 2
    root, to_go = (b**2 - 4 * a * c) ** 0.5, torch.linspace(0, HORIZON, 1001).double()
    B = 2 * a * (root * to_go).expm1() / ((root - b) * (root * to_go).expm1() + 2 * root)
    exact = (PULL * LEVEL * torch.trapezoid(B, to_go) + B[-1] * LEVEL).exp() / POWER
    utility, t = ctrl.Estimate.of(ctrl.returns_to_go(problem, paths)[:, 0]), grid.nodes[0]
    missed = solved.mean_action(t, start) - (PREMIUM + k * B[-1]) / (1 - POWER)
    return utility, float(solved.value(t, start)), float(exact), float(missed)


if __name__ == "__main__":
    print("simulated {}, grid {:.4f}, exact {:.4f}; share off by {:.3f}".format(*main()))
