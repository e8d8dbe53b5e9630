"""Leave (-1, 1): the mean exit time, the side that is left through, and the cheapest way out.

Paths end where they leave; bridges between nodes find the exits that the nodes do not show.
"""

import math

import torch

import ctrl

W, START, PUSH = 1.5, 0.2, 0.3
problem = ctrl.ControlProblem(  # a^2 / 2 + W^2 / 2 per unit of time until the exit
    ctrl.ControlledSDE(drift=lambda t, x, a: a, diffusion=lambda t, x: 1.0),
    horizon=math.inf,
    running_reward=lambda t, x, a: -0.5 * (a.square().sum(1) + W**2),
    domain=ctrl.stopping.Interval(-1.0, 1.0),
)
pushed = ctrl.DeterministicPolicy(lambda t, x: PUSH + 0 * x)
best = ctrl.DeterministicPolicy(lambda t, x: W * torch.tanh(W * x))


def main() -> list[tuple[str, ctrl.Estimate, float]]:
    """Each estimate beside the known answer; Fleming's for the least cost."""
    grid, start = ctrl.uniform_grid(8.0, 400), torch.full((3000, 1), START).double()
    noise = ctrl.noise.stream(0, "exit")
    left, cheap = (ctrl.simulate(problem, p, start, grid, generator=noise) for p in (pushed, best))
    times, above = grid.nodes[left.ends], (left.states[:, -1, 0] > 0).double()
    cost = -ctrl.returns_to_go(problem, cheap)[:, 0]
    up = (math.exp(2 * PUSH) - math.exp(-2 * PUSH * START)) / (2 * math.sinh(2 * PUSH))
    least = -math.log(math.cosh(W * START) / math.cosh(W))
    answers = {"mean time": (times, (2 * up - 1 - START) / PUSH), "leaves at 1": (above, up)}
    answers["least cost"] = (cost, least)
    return [(name, ctrl.Estimate.of(each), exact) for name, (each, exact) in answers.items()]


if __name__ == "__main__":
    for name, estimate, exact in main():
        print(f"{name}: {estimate}, exactly {exact:.4f}")
