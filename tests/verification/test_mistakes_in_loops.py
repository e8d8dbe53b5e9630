"""Kinds of mistakes in loops: schedules, and sums to the end."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import ctrl
from ctrl import martingale, q_learning
from ctrl.agents import online_actor_critic, online_q_learning
from tests.verification.kinds_of_mistakes import Kinds
from verification.claim import Setting
from verification.problems.training_loop import trainer

KINDS = Kinds()
SETTING = Setting()


def ergodic() -> ctrl.ControlProblem:
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.4)
    return ctrl.ControlProblem(
        sde, math.inf, lambda t, x, a: -(x[:, 0] ** 2) - 0.3 * a[:, 0] ** 2, temperature=0.2
    )


@KINDS.sees(r"""
ctrl.agents.q_learning.online_q_learning
    average reward without the schedule's factor | average_reward += factor * average_rate => average_reward += average_rate
    q-learning without the schedule's factor | group["lr"] = rate * factor => group["lr"] = rate
    the schedule of the next step | schedule(k * step_size) => schedule((k + 1) * step_size)
ctrl.agents.actor_critic.online_actor_critic
    average reward without the schedule's factor, of the actor | average_reward += factor * average_rate => average_reward += average_rate
    actor and critic without the schedule's factor | group["lr"] = rate * factor => group["lr"] = rate
    factors pile up | group["lr"] = rate * factor => group["lr"] = group["lr"] * factor
""")
def online_learners_follow_their_schedule(folder) -> None:
    """All rates, step by step, by hand: V = w x, an actor of slope k, SGD."""

    def schedule(time: float) -> float:
        return 1 / (1 + 3 * time)

    rates = {"w": 0.5, "k": 0.25, "average": 0.8}
    for online in (online_q_learning, online_actor_critic):
        w, k = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, -0.4))
        policy = ctrl.GaussianPolicy(lambda t, x, k=k: k * x, 0.6)
        q = q_learning.GibbsQ(policy, 0.2)
        groups = [{"params": [w], "lr": rates["w"]}, {"params": [k], "lr": rates["k"]}]
        start = torch.tensor([[0.5], [-0.8], [1.1]], dtype=torch.float64)

        def value(t: Tensor, x: Tensor, w: Tensor = w) -> Tensor:
            return w * x[:, 0]

        common = (ergodic(), policy, value)
        noise, more = torch.Generator().manual_seed(4), {"average_rate": rates["average"]}
        if online is online_q_learning:
            learner = torch.optim.SGD(groups)
            steps = online_q_learning(
                *common, q, start, 0.1, 4, learner, noise, schedule=schedule, **more
            )
        else:
            actor, critic = (torch.optim.SGD([group]) for group in groups[::-1])
            steps = online_actor_critic(
                *common, start, 0.1, 4, actor, critic, noise, schedule=schedule, **more
            )
        kept, average = [w.item(), k.item()], 0.0
        for n, step in enumerate(steps):
            (x, after), a = step.paths.states[..., 0].T, step.paths.actions[:, 0, 0]
            log_prob = -0.5 * ((a - kept[1] * x) / 0.6) ** 2 - math.log(
                0.6 * math.sqrt(2 * math.pi)
            )
            paid = -(x**2) - 0.3 * a**2 - 0.2 * log_prob - average
            dm = kept[0] * (after - x) + 0.1 * paid
            score = (a - kept[1] * x) * x / 0.36
            share = 0.2 if online is online_q_learning else 1.0
            factor = schedule(0.1 * n)
            kept[0] += factor * rates["w"] * float((x * dm).mean())
            kept[1] += factor * rates["k"] * share * float((score * dm).mean())
            average += factor * rates["average"] * float(dm.mean())
            assert w.item() == pytest.approx(kept[0], rel=1e-12)
            assert k.item() == pytest.approx(kept[1], rel=1e-12)
            assert step.average_reward == pytest.approx(average, rel=1e-12)


@KINDS.sees(r"""
diffusion_envs.training.trainer.Trainer._scheduled
    the loop without the schedule's factor | group["lr"] *= factor => group["lr"] *= 1.0
    the schedule of the next update | rate_factor(self.update) => rate_factor(self.update + 1)
    the rate is not put back | group["lr"] = rate => group["lr"] = group["lr"]
""")
def the_loop_follows_its_schedule(folder) -> None:
    """The learning rates within an update, and what is left of them after it."""
    made = trainer(SETTING, warm_up=8)
    rates = [group["lr"] for group in made.optimiser.param_groups]
    with made._scheduled():
        within = [group["lr"] for group in made.optimiser.param_groups]
    assert within == pytest.approx([rate * 4 / 9 for rate in rates])  # three updates are done
    assert [group["lr"] for group in made.optimiser.param_groups] == rates


@KINDS.sees(r"""
ctrl.returns.returns_to_go
    return without the step's own reward | ahead = rewards[:, k] + => ahead = 0 * rewards[:, k] +
ctrl.q_learning.martingale_loss
    return of V and q without the step's own dM | .flip(1).cumsum(1).flip(1)
        => .flip(1).cumsum(1).flip(1) - discounts * dm
ctrl.advantages.continuous_gae
    advantage without the step's own difference | deltas[:, k] + keep => 0 * deltas[:, k] + keep
diffusion_envs.training.critic.Critic._fit
    return without the step's own cost | to_go = rollout.costs.flip(1).cumsum(1).flip(1)
        => to_go = rollout.costs.flip(1).cumsum(1).flip(1) - rollout.costs
    costs so far for costs to go | rollout.costs.flip(1).cumsum(1).flip(1) => rollout.costs.cumsum(1)
""")
def sums_to_the_end_begin_with_their_own_step(folder) -> None:
    """Returns, losses and advantages, as sums that are written out; the critic's targets too."""
    nodes = torch.tensor([0.0, 0.1, 0.35, 0.5], dtype=torch.float64)
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.4)
    problem = ctrl.ControlProblem(
        sde, 0.5, lambda t, x, a: x[:, 0] - a[:, 0] ** 2, lambda x: x[:, 0] ** 2, discount=0.7
    )
    policy = ctrl.DeterministicPolicy(lambda t, x: -0.6 * x)
    start = torch.tensor([[0.5], [-0.8]], dtype=torch.float64)
    noise = torch.Generator().manual_seed(4)
    paths = ctrl.simulate(problem, policy, start, ctrl.TimeGrid(nodes), generator=noise)
    x, a, h = paths.states[..., 0], paths.actions[..., 0], nodes.diff()
    rewards, d = (x[:, :-1] - a**2) * h, torch.exp(-0.7 * nodes)
    whole = [
        sum(rewards[:, j] * d[j] / d[k] for j in range(k, 3)) + d[3] / d[k] * x[:, 3] ** 2
        for k in range(3)
    ]
    got = ctrl.returns_to_go(problem, paths)[:, :-1]
    torch.testing.assert_close(got, torch.stack(whole, 1), rtol=1e-12, atol=0)

    def value(t: Tensor, x: Tensor) -> Tensor:
        return 0.3 * x[:, 0]

    along = torch.cat([0.3 * x[:, :-1], x[:, 3:] ** 2], 1)
    gap = torch.stack(whole, 1) - along[:, :-1]
    loss = martingale.martingale_loss(value, problem, paths)
    torch.testing.assert_close(loss, (h * (d[:-1] * gap) ** 2).sum(1), rtol=1e-12, atol=0)
    loss = q_learning.martingale_loss(value, lambda t, x, a: 0 * a[:, 0], problem, paths)
    torch.testing.assert_close(loss, (h * (d[:-1] * gap) ** 2).sum(1), rtol=1e-12, atol=0)
    gae = ctrl.policy_gradient.continuous_gae(along, rewards, h, 0.0, 0.7)
    torch.testing.assert_close(gae, gap, rtol=1e-12, atol=0)

    made = trainer(SETTING)
    rollout, seen = made.sample().rollout, list[Tensor]()
    made.critic._differentiated = lambda _, __, returns, part, of: (
        seen.append(returns) or returns.new_zeros(len(part))
    )
    made.critic._fit(rollout, None, 0)
    costs = rollout.costs.numpy()
    for k in range(costs.shape[1] + 1):
        expected = rollout.rewards.numpy() - 2.3 * costs[:, k:].sum(1)
        np.testing.assert_allclose(seen[0][:, k].numpy(), expected, rtol=1e-5)


test_the_right_code_is_right, test_the_planted_mistake_is_seen = KINDS.tests()
