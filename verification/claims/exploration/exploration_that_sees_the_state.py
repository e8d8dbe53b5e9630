"""Exploration that depends on the state: Merton's investor draws money in proportion to wealth.

dX = (r X + e a) dt + sigma a dW, log utility, temperature lambda per nat of the money a:
V = A log x + B with A = 1 + lambda (T - t), and the optimal policy is
N(e x / sigma^2, lambda x^2 / (sigma^2 A)). Its q-rate is lambda log pi at every action, it
is the Gibbs policy of V, and the chain that draws and holds its actions has moments that
are products of growth factors: they need the standard deviation at every path's own state.

The drawn action is an amount of money, its standard deviation grows with wealth and with time: a
policy that cannot see the state when it acts has another law.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl.paths import log_probs
from ctrl.q_learning import gibbs_policy, q_rate
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form import merton as exact
from verification.cubature import mean

SOURCE = "Merton 1969; Wang, Zariphopoulou & Zhou 2020, equation 13; solution by hand"

NODES, START = np.array([0.0, 0.35, 0.5, 1.2]), 1.7


def problem() -> ctrl.ControlProblem:
    """Log utility and a reward for entropy."""
    sde = ctrl.ControlledSDE(
        lambda t, x, a: exact.RATE * x + exact.EXCESS * a,
        lambda t, x, a: exact.SIGMA * a,
        controls_diffusion=True,
    )
    return ctrl.ControlProblem(
        sde,
        exact.HORIZON,
        terminal_reward=lambda x: x[:, 0].log(),
        temperature=exact.TEMPERATURE,
    )


def relative_std(t: Tensor) -> Tensor:
    """Standard deviation of the share in the stock."""
    a = 1 + exact.TEMPERATURE * (exact.HORIZON - t)
    return (exact.TEMPERATURE / a).sqrt() / exact.SIGMA


def investor() -> ctrl.GaussianPolicy:
    """The optimal policy."""
    return ctrl.GaussianPolicy(
        lambda t, x: exact.share() * x, lambda t, x: relative_std(t) * x.abs()
    )


def value(t: Tensor, x: Tensor) -> Tensor:
    """V, in operations that can be differentiated."""
    a = 1 + exact.TEMPERATURE * (exact.HORIZON - t)
    tau, lam = exact.HORIZON - t, exact.TEMPERATURE
    explored = tau * math.log(2 * math.pi * lam / exact.SIGMA**2) - (a * a.log() - (a - 1)) / lam
    sharpe = exact.EXCESS / exact.SIGMA
    earned = (exact.RATE + sharpe**2 / 2) * (tau + lam * tau**2 / 2)
    return a * x[:, 0].log() + earned + lam / 2 * explored


def checks(setting: Setting) -> Iterator[Check]:
    """Identities at every state and action; exact moments on quadrature paths."""
    t, policy, stated = setting.tensor(0.37), investor(), problem()
    x = setting.tensor([[0.4], [1.0], [2.6]]).repeat_interleave(3, 0)
    a = x * setting.tensor([[-0.9], [0.6], [2.1]]).repeat(3, 1)
    wealth, money = x[:, 0].double().cpu().numpy(), a[:, 0].double().cpu().numpy()
    density = exact.log_density(float(t), wealth, money)
    yield pathwise("log-density of drawn money", policy.log_prob(t, x, a), density)
    yield pathwise("entropy at every wealth", policy.entropy(t, x), exact.entropy(0.37, wealth))
    worth = q_rate(stated, value, t, x, a)
    yield pathwise("q-rate of V is lambda log pi", worth, exact.TEMPERATURE * density)
    averaged = ctrl.exploratory_sde(stated.dynamics, policy)
    root = averaged.diffusion_at(t, x, policy.mean(t, x))
    assert isinstance(root, Tensor)
    size = math.hypot(exact.share(), exact.relative_std(0.37))
    yield pathwise("diffusion of the exploratory SDE", root[:, 0], exact.SIGMA * size * wealth)

    nodes = setting.tensor(NODES)
    both = ctrl.noise.gauss_hermite(nodes.diff(), nodes=3, noise=(2,))
    assert both.increments is not None
    drawn = both.increments[..., 1:] / nodes.diff().sqrt()[:, None]
    noise = ctrl.Noise(both.increments[..., :1].contiguous(), drawn, both.weights)
    start = torch.full_like(noise.increments[:, 0], START)
    paths = ctrl.simulate(stated, policy, start, ctrl.TimeGrid(nodes), noise=noise)
    end = paths.states[:, -1, 0]
    moments = torch.stack([mean(end, paths), mean(end.square(), paths)])
    yield expectation("E X and E X^2 of the chain", moments, exact.moments(NODES, START))
    assert paths.actions is not None
    along = [
        exact.log_density(float(s), x.double().cpu().numpy(), a.double().cpu().numpy())
        for s, x, a in zip(
            NODES, paths.states[:, :-1, 0].unbind(1), paths.actions[..., 0].unbind(1), strict=False
        )
    ]
    yield pathwise("log-densities along the paths", log_probs(policy, paths), np.stack(along, 1))

    gibbs = gibbs_policy(stated, value, 1)
    yield pathwise("Gibbs policy of V: mean", gibbs.mean(t, x)[:, 0], exact.share() * wealth)
    yield pathwise(
        "Gibbs policy of V: standard deviation",
        gibbs.scale_at(t, gibbs.mean(t, x), x)[:, 0, 0],
        exact.relative_std(0.37) * wealth,
    )


MISTAKES = """
ctrl.policy.GaussianPolicy.act
    one path's standard deviation for all, in the draw | self.std_at(t, mean, states) * noise
        => self.std_at(t, mean, states)[:1] * noise
ctrl.policy.GaussianPolicy.std_at
    the standard deviation at the mean action instead of the state | self.std, t, _needed(states, "std")
        => self.std, t, as_like(0.0, kind) + (kind if like is None else like)
ctrl.policy.GaussianPolicy.distribution
    the average standard deviation of all paths, in the density | std = self.std_at(t, mean, states)
        => std = self.std_at(t, mean, states).mean()
ctrl.simulate._act
    the roll-out acts with the states at the mean's place | if policy.is_random else None, x)
        => if policy.is_random else None, mean)
ctrl.exploration.drawn_actions
    exploratory SDE with one state's standard deviation | normal.expand_as(mean), states)
        => normal.expand_as(mean), None if states is None else states[:1].expand_as(states))
ctrl.q_learning.gibbs_policy
    Gibbs policy with the covariance of one state | return _scale(hessian, problem.temperature)
        => return _scale(hessian[:1].expand_as(hessian), problem.temperature)
    Gibbs policy's mean without the Hessian | return torch.linalg.solve(-hessian, slope) => return slope
ctrl.q_learning._scale
    temperature missing in the Gibbs policy's covariance | temperature * precision => precision
verification.closed_form.merton.slope
    drawn shares explore as money does: A = 1 | 1 + TEMPERATURE * (HORIZON - t) => 1 + 0 * TEMPERATURE * (HORIZON - t)
shared
    variance for standard deviation in the density
"""
