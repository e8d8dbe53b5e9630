"""Investing under Heston's volatility: the HJB equation and paths beside Kraft's answer (2005)."""

import torch

import ctrl
from ctrl.hjb import Axis, solve_finite_horizon, trapezoid

PREMIUM, PULL, LEVEL, SWING, CORRELATION, POWER, HORIZON = 2.0, 3.0, 0.09, 0.6, -0.7, -1.5, 0.5


def drift(t: torch.Tensor, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return torch.cat([(PREMIUM * a - a**2 / 2) * x[:, 1:], PULL * (LEVEL - x[:, 1:])], dim=1)


def diffusion(t: torch.Tensor, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    root = x[:, 1:].clamp_min(0).sqrt()
    swing = SWING * torch.tensor([CORRELATION, (1 - CORRELATION**2) ** 0.5]).to(x)
    return torch.stack([torch.cat([a * root, 0 * root], dim=1), root * swing], dim=1)


def main() -> tuple[ctrl.Estimate, float, float]:
    """V = w^g / g exp(A + B y) of wealth w and variance y; B' = a + b B + c B^2 in time to go."""
    sde = ctrl.ControlledSDE(drift, diffusion, "general", 2, controls_diffusion=True)
    problem = ctrl.ControlProblem(sde, HORIZON, None, lambda x: (POWER * x[:, 0]).exp() / POWER)
    axes, shares = (Axis(-1.5, 1.5, 61), Axis(0.0, 0.6, 31)), trapezoid(0.4, 1.2, 33)
    solved = solve_finite_horizon(problem, axes, shares, steps=8, differences="central")
    start, g, grid = torch.tensor([[0, LEVEL]]).double(), POWER, ctrl.uniform_grid(HORIZON, 50)
    policy = ctrl.DeterministicPolicy(lambda t, x: solved.mean_action(t, start).expand(len(x), 1))
    k, u, to_go = SWING * CORRELATION, g / (1 - g), torch.linspace(0, HORIZON, 1001).double()
    a, b, c = u * PREMIUM**2 / 2, u * PREMIUM * k - PULL, SWING**2 / 2 + u * k**2 / 2
    root, noise = (b**2 - 4 * a * c) ** 0.5, ctrl.noise.stream(0, "heston")
    paths = ctrl.simulate(problem, policy, start.expand(50_000, 2), grid, generator=noise)
    B = 2 * a / (root / (root * to_go / 2).tanh() - b)
    exact = (PULL * LEVEL * torch.trapezoid(B, to_go) + B[-1] * LEVEL).exp() / g
    utility = ctrl.Estimate.of(ctrl.returns_to_go(problem, paths)[:, 0])
    return utility, float(solved.value(to_go[0], start)), float(exact)


if __name__ == "__main__":
    print("simulated {}, grid {:.4f}, exact {:.4f}".format(*main()))
