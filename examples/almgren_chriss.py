"""Sell SHARES by a deadline (Almgren & Chriss 2000): impact is paid now, waiting is risky.

The feedback of the LQ solver, simulated: mean and variance of what selling costs.
"""

import math

import torch

import ctrl

SHARES, HORIZON, STD, IMPACT, PERMANENT, AVERSION = 2.0, 1.0, 0.6, 0.05, 0.1, 1.5
K = math.sqrt(AVERSION * STD**2 / IMPACT)  # the answer sells SHARES sinh(K (T - t)) / sinh(K T)


def main() -> list[tuple[str, ctrl.Estimate, float]]:
    """Each estimate beside the answer in closed form."""
    one = torch.ones(1, 1, dtype=torch.float64)
    risk, price, end = 2 * AVERSION * STD**2 * one, 2 * IMPACT * one, 1e4 * one
    lq = ctrl.linear.LinearQuadratic(A=0 * one, B=-one, sigma=0 * one, M=risk, N=price, H=end)
    grid = ctrl.uniform_grid(HORIZON, 400)
    rule = ctrl.linear.solve_lq(lq, grid.nodes).policy()
    sells = ctrl.DeterministicPolicy(lambda t, x: rule.mean(t, x[:, :1]))
    drift = lambda t, x, a: torch.cat([-a, -PERMANENT * a], 1)  # noqa: E731  # of shares and price
    sde = ctrl.ControlledSDE(drift, lambda t, x: STD * torch.tensor([0.0, 1.0]).to(x).expand_as(x))
    proceeds = lambda t, x, a: a[:, 0] * (x[:, 1] - IMPACT * a[:, 0])  # noqa: E731
    problem = ctrl.ControlProblem(sde, HORIZON, running_reward=proceeds)
    start = torch.tensor([SHARES, 0.0], dtype=torch.float64).expand(4000, 2).contiguous()
    paths = ctrl.simulate(problem, sells, start, grid, generator=ctrl.noise.stream(0, "sell"))
    cost = -ctrl.returns_to_go(problem, paths)[:, 0]
    wave, scale = math.sinh(2 * K * HORIZON) / (4 * K), (SHARES / math.sinh(K * HORIZON)) ** 2
    mean = PERMANENT * SHARES**2 / 2 + IMPACT * K**2 * scale * (wave + HORIZON / 2)
    variance = STD**2 * scale * (wave - HORIZON / 2)
    of, squares = ctrl.Estimate.of, (cost - cost.mean()) ** 2
    return [("mean", of(cost), mean), ("variance", of(squares), variance)]


if __name__ == "__main__":
    for name, estimate, exact in main():
        print(f"{name}: {estimate}, exactly {exact:.4f}")
