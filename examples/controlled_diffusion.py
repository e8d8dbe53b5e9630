"""Adjoint matching where the control enters the diffusion: how much of one's wealth to invest.

dX = X (0.02 + 0.07 u) dt + 0.3 X u dW, maximise E log X_T. Merton: u = 0.07 / 0.3^2, always.

python examples/controlled_diffusion.py
"""

import torch

import ctrl
from ctrl import adjoint_matching

sde = ctrl.ControlledSDE(
    drift=lambda t, x, u: x * (0.02 + 0.07 * u),
    diffusion=lambda t, x, u: 0.3 * x * u,
    controls_diffusion=True,
)
problem = ctrl.ControlProblem(sde, horizon=1.0, terminal_reward=lambda x: x.log().sum(1))
share = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
policy = ctrl.DeterministicPolicy(lambda t, x: share.expand_as(x))


def main(updates: int = 25, paths: int = 500) -> tuple[float, float]:
    """Learn the share; return it and Merton's."""
    grid, generator = ctrl.uniform_grid(1.0, steps=10), torch.Generator().manual_seed(0)
    start = torch.ones(paths, 1, dtype=torch.float64)
    for _ in range(updates):
        sampled = ctrl.simulate(problem, policy, start, grid, generator=generator)
        adjoints = adjoint_matching.adjoints(problem, policy, sampled)
        loss = adjoint_matching.matching_loss(problem, policy, sampled, adjoints).mean()
        (slope,) = torch.autograd.grad(loss, share)
        share.data -= 8 * slope
    return share.item(), 0.07 / 0.3**2


if __name__ == "__main__":
    learned, merton = main()
    print(f"share of wealth that is invested: learned {learned:.4f}, Merton's {merton:.4f}")
