"""What a risk-averse player's policy is worth to him, and a risk-neutral one's; both are known.

python examples/risk_sensitive.py
"""

import torch

import ctrl
from ctrl import linear
from ctrl import risk_sensitive as rs


def matrix(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


RISK = -1.0  # dX = a dt + 0.6 dW, costs a^2 / 2 and at the end X^2; worth is -log E exp(-R)
lq = linear.LinearQuadratic(
    matrix(0.0), matrix(1.0), sigma=matrix(0.6), M=matrix(0.0), N=matrix(1.0), H=matrix(2.0)
)


def main(paths: int = 20_000) -> dict[str, tuple[ctrl.Estimate, float]]:
    """Estimated and exact worth of the averse and of the neutral optimum, from 0."""
    grid, generator = ctrl.uniform_grid(1.0, steps=100), torch.Generator().manual_seed(0)
    problem, start = lq.problem(1.0), torch.zeros(paths, 1, dtype=torch.float64)
    averse, neutral = rs.solve_lq(lq, RISK, grid.nodes), linear.solve_lq(lq, grid.nodes)
    worth = {}
    for name, solution in (("averse", averse), ("neutral", neutral)):
        sampled = ctrl.simulate(problem, solution.policy(), start, grid, generator=generator)
        batches = ctrl.returns_to_go(problem, sampled)[:, 0].view(20, -1)
        each = torch.stack([rs.certainty_equivalent(batch, RISK) for batch in batches])
        exact = rs.evaluate_lq(lq, solution.law_at, RISK, grid.nodes).values.constant[0]
        worth[name] = ctrl.Estimate.of(each), float(exact)
    return worth


if __name__ == "__main__":
    for name, (estimate, exact) in main().items():
        print(f"{name} policy: simulated {estimate}, exact {exact:.4f}")
