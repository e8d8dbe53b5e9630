"""Merton's investor who is paid to explore: money in the stock is drawn, its std one of wealth."""

import math

import torch

import ctrl

RATE, EXCESS, STD, TEMPERATURE, HORIZON = 0.02, 0.08, 0.25, 0.02, 1.0
drift = lambda t, x, a: RATE * x + EXCESS * a  # noqa: E731  # of wealth; a is in the stock
sde = ctrl.ControlledSDE(drift, lambda t, x, a: STD * a, controls_diffusion=True)
problem = ctrl.ControlProblem(
    sde, HORIZON, terminal_reward=lambda x: x[:, 0].log(), temperature=TEMPERATURE
)
investor = ctrl.GaussianPolicy(  # N(e x / s^2, lambda x^2 / (s^2 A)), A = 1 + lambda (T - t)
    mean=lambda t, x: EXCESS / STD**2 * x,
    std=lambda t, x: (TEMPERATURE / (1 + TEMPERATURE * (HORIZON - t))).sqrt() / STD * x,
)


def main() -> tuple[ctrl.Estimate, float]:
    """The value at wealth 1, simulated and in closed form."""
    start, grid = torch.ones(100_000, 1), ctrl.uniform_grid(HORIZON, 60)
    noise = ctrl.noise.stream(0, "merton")
    paths = ctrl.simulate(problem, investor, start, grid, generator=noise)
    a, square = 1 + TEMPERATURE * HORIZON, (EXCESS / STD) ** 2
    logs = (a * math.log(a) - a + 1) / TEMPERATURE  # int log A dt
    explored = HORIZON * math.log(2 * math.pi * TEMPERATURE / STD**2) - logs
    earned = (RATE + square / 2) * (HORIZON + TEMPERATURE * HORIZON**2 / 2)
    exact = earned + TEMPERATURE / 2 * explored
    return ctrl.Estimate.of(ctrl.returns_to_go(problem, paths, investor)[:, 0]), exact


if __name__ == "__main__":
    print("simulated {}, exactly {:.5f}".format(*main()))
