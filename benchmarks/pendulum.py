"""How near does a learned policy come to the finite-difference optimum of the noisy pendulum?

Actor-critic with two small networks of (cos angle, sin angle, velocity), from random starts, five
seconds of the pendulum's time each. The learned policy is then evaluated exactly, by finite
differences, as the optimum is. Prints one JSON line a seed.

    python -m benchmarks.pendulum --seeds 3 --updates 400
"""

import argparse
import json
import math
import statistics
import time

import torch
from torch import Tensor, nn

import ctrl
from ctrl import agents, hjb
from ctrl.pendulum import NoisyPendulum, noisy_pendulum

PATHS, HORIZON, STEPS = 256, 5.0, 100
STATES = torch.tensor([[0.0, 0.0], [math.pi, 0.0], [math.pi / 2, -1.5]], dtype=torch.float64)


class Network(nn.Module):
    """(angle, velocity) -> one number, periodic in the angle."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1)
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, generator=generator)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """One number a state."""
        angle, velocity = x[..., :1], x[..., 1:]
        seen = torch.cat([angle.cos(), angle.sin(), velocity / 3], dim=-1)
        return self.layers(seen.to(next(self.layers.parameters()).dtype)).to(x.dtype)


def learn(pendulum: NoisyPendulum, seed: int, updates: int) -> ctrl.GaussianPolicy:
    """A policy, trained from nothing."""
    generator = ctrl.noise.stream(seed, "pendulum")
    actor, critic = Network(generator), Network(generator)
    log_std = nn.Parameter(torch.tensor(0.0))
    policy = ctrl.GaussianPolicy(lambda t, x: actor(x), lambda t: log_std.exp())
    grid = ctrl.uniform_grid(HORIZON, STEPS)

    def value(t: Tensor, x: Tensor) -> Tensor:
        return critic(x).squeeze(1)

    def sample() -> ctrl.Paths:
        angle = math.pi * (2 * torch.rand(PATHS, 1, generator=generator) - 1)
        start = torch.cat([angle, 1.5 * torch.randn(PATHS, 1, generator=generator)], dim=1)
        return ctrl.simulate(
            pendulum.problem, policy, start, grid, generator=generator, keep=("actions",)
        )

    actor_optimiser = torch.optim.Adam([*actor.parameters(), log_std], lr=1e-2)
    critic_optimiser = torch.optim.Adam(critic.parameters(), lr=1e-2)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(o, updates, 1e-4)
        for o in (actor_optimiser, critic_optimiser)
    ]

    def critic_loss(paths: ctrl.Paths) -> Tensor:
        return ctrl.martingale.ctd_lambda(value, pendulum.problem, paths, 1.0, policy)

    loop = agents.actor_critic(
        pendulum.problem, policy, value, sample, actor_optimiser, critic_optimiser, updates,
        critic_loss=critic_loss, critic_updates=3, rate=2.0,
    )  # fmt: skip
    for _ in loop:
        for schedule in schedules:
            schedule.step()
    frozen = float(log_std.detach().exp())
    return ctrl.GaussianPolicy(lambda t, x: actor(x).detach(), frozen)


def main() -> None:
    """Learn, evaluate, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--resolution", type=int, default=120)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    pendulum = noisy_pendulum()
    optimum = pendulum.reference(chosen.resolution)
    zero = torch.zeros((), dtype=torch.float64)
    best = optimum.value(zero, STATES)
    idle = ctrl.GaussianPolicy(lambda t, x: 0 * x[:, :1], 0.577)  # the optimal std, no torque
    axes = (
        hjb.Axis(-math.pi, math.pi, chosen.resolution, "periodic"),
        hjb.Axis(-pendulum.fastest, pendulum.fastest, chosen.resolution + 1),
    )

    def evaluated(policy: ctrl.Policy) -> Tensor:
        value = hjb.evaluate_discounted(pendulum.problem, policy, axes, differences="central")
        return value(zero, STATES)

    worst = evaluated(idle)
    print(json.dumps({"optimum": best.tolist(), "no torque": worst.tolist()}))
    shares = []
    for seed in range(chosen.seeds):
        started = time.perf_counter()
        policy = learn(pendulum, seed, chosen.updates)
        rewards = evaluated(policy)
        share = ((rewards - worst) / (best - worst)).tolist()
        shares += share
        line = {"seed": seed, "value": rewards.tolist(), "share_of_the_gain": share}
        line |= {"std": policy.std, "seconds": round(time.perf_counter() - started, 1)}
        print(json.dumps(line), flush=True)
    print(json.dumps({"least share": min(shares), "mean share": statistics.mean(shares)}))


if __name__ == "__main__":
    main()
