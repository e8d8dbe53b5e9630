"""Your own controlled SDE, from nothing to a learned policy and its distance from the optimum.

A particle is pushed to 0.8 by a deadline; pushing costs. The policy learns by actor-critic; the
answer is known (linear-quadratic), so we see how near it came. About ten seconds.

    python examples/own_problem.py
"""

import torch

import ctrl
from ctrl import agents

torch.manual_seed(0)  # of the networks' first weights; all other randomness has a name


def network() -> torch.nn.Sequential:
    """(t, x) -> one number."""
    return torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))


# the problem: dX = (-X + a) dt + 0.5 dW, and what is rewarded
sde = ctrl.ControlledSDE(drift=lambda t, x, a: -x + a, diffusion=lambda t, x: 0.5)
problem = ctrl.ControlProblem(
    sde,
    horizon=1.0,
    running_reward=lambda t, x, a: -0.1 * a.square().sum(1),
    terminal_reward=lambda x: -(x - 0.8).square().sum(1),
    temperature=0.02,
)

# what is learned
actor_net, critic_net = network(), network()


def on(net: torch.nn.Module, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return net(torch.cat([t.expand(len(x), 1), x], dim=1))


log_std = torch.nn.Parameter(torch.tensor(-1.0))
policy = ctrl.GaussianPolicy(lambda t, x: on(actor_net, t, x), std=lambda t: log_std.exp())


def value(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return on(critic_net, t, x).squeeze(1)


# how paths are sampled: the caller's business
grid, generator = ctrl.uniform_grid(1.0, steps=20), ctrl.noise.stream(0, "example")


def sample(paths: int = 512) -> ctrl.Paths:
    start = torch.zeros(paths, 1)
    return ctrl.simulate(problem, policy, start, grid, generator=generator, keep=("actions",))


def performance() -> ctrl.Estimate:
    with torch.no_grad():
        return ctrl.Estimate.of(ctrl.returns_to_go(problem, sample(20_000), policy)[:, 0])


def main() -> tuple[ctrl.Estimate, ctrl.Estimate, float]:
    """Learn; return the performance before and after, and the best there is."""
    before = performance()
    loop = agents.actor_critic(
        problem,
        policy,
        value,
        sample,
        actor=torch.optim.Adam([*actor_net.parameters(), log_std], lr=1e-2),
        critic=torch.optim.Adam(critic_net.parameters(), lr=1e-2),
        updates=300,
        critic_loss=lambda paths: ctrl.martingale.martingale_loss(value, problem, paths, policy),
        critic_updates=4,
        rate=3.0,
    )
    for update, _ in enumerate(loop, start=1):
        if update % 100 == 0:
            print(f"update {update}: {performance()}")
    one = torch.ones(1, 1, dtype=torch.float64)
    lq = ctrl.linear.LinearQuadratic(
        A=-one, B=one, sigma=0.5 * one, M=0 * one, N=0.2 * one, H=2 * one, h=-1.6 * one[0],
        temperature=0.02,
    )  # fmt: skip
    exact = ctrl.linear.solve_lq(lq, grid.nodes)
    start = torch.zeros(1, 1, dtype=torch.float64)
    # the terminal reward -(x - 0.8)^2 = -x^2 + 1.6 x - 0.64
    optimum = float(exact.value(grid.nodes[0], start)) - 0.64
    return before, performance(), optimum


if __name__ == "__main__":
    before, after, optimum = main()
    print(f"before {before}, after {after}, optimum {optimum:.4f}")
