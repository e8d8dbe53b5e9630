"""Thirty particles drawn to their average, which is steered to 1; the optimum is known.

python examples/mean_field.py
"""

import torch

import ctrl
from ctrl import mean_field
from ctrl.linear import Gaussian, LinearQuadratic


def matrix(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


# dX = (0.8 (m - X) + a) dt + 0.4 dW, m the mean; costs (X - m)^2 + a^2 / 2, at the end 2 m^2 - 4 m
alone = LinearQuadratic(
    matrix(-0.8), matrix(1.0), sigma=matrix(0.4), M=matrix(2.0), N=matrix(1.0), h=-matrix(4.0)[0]
)
problem = mean_field.MeanFieldLQ(alone, A_mean=matrix(0.8), M_mean=matrix(-2.0), H_mean=matrix(4.0))


def main(particles: int = 30, systems: int = 400) -> tuple[ctrl.Estimate, float, float]:
    """Simulate the optimum; return the estimate, its exact value, and the limit of many."""
    grid = ctrl.uniform_grid(1.0, steps=100)
    solution = mean_field.solve(problem, grid.nodes, particles)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(systems, particles, 1, generator=generator, dtype=torch.float64)
    system = problem.particles(particles, horizon=1.0)
    paths = ctrl.simulate(system, solution.policy(), start, grid, generator=generator)
    returns = ctrl.returns_to_go(system, paths)[:, 0]
    exact = solution.value(grid.nodes[0], start).mean()
    many, law = mean_field.solve(problem, grid.nodes), Gaussian(matrix(0.0)[0], matrix(1.0))
    return ctrl.Estimate.of(returns), float(exact), float(many.value_of(grid.nodes[0], law))


if __name__ == "__main__":
    estimate, exact, limit = main()
    print(f"30 particles: simulated {estimate}, exact {exact:.4f}; limit of many {limit:.4f}")
