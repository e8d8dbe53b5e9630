"""Fine-tuning the jump rates of a small discrete diffusion; the optimum is a matrix exponential.

python examples/jump_rates.py
"""

import torch

import ctrl
from ctrl import chains

# five states in a row, jumps to the neighbours; state 4 is rewarded, and every nat of path KL costs
neighbours = torch.ones(5, 5, dtype=torch.float64).tril(1).triu(-1)
reward = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
KL_WEIGHT = 0.3


def main(paths: int = 20_000) -> tuple[ctrl.Estimate, float]:
    """Sample the fine-tuned chain; return its reward less the KL's cost, and the exact optimum."""
    grid, generator = ctrl.uniform_grid(1.0, steps=50), torch.Generator().manual_seed(0)
    pretrained = chains.held(chains.with_diagonal(neighbours), grid)
    best = chains.tilt(pretrained, KL_WEIGHT, reward)
    tuned = best.held()
    start = torch.full((paths,), 1)
    sampled = chains.simulate(tuned, start, generator)
    kl = chains.log_ratio(tuned, pretrained, sampled)
    objective = reward[sampled.at(1.0)] - KL_WEIGHT * kl
    return ctrl.Estimate.of(objective), float(best.values[0, 1])


if __name__ == "__main__":
    estimate, exact = main()
    print(f"reward less KL, from state 1: sampled {estimate}, exact {exact:.5f}")
