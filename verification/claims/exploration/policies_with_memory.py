"""Policies with memory: computed again in order along stored paths, they have exact densities.

a_k ~ pi(. | t_k, x_k, m_k), m_{k+1} = remember(t_k, x_k, a_k, m_k): the memory is a
function of the past, so the log-density of stored actions is that of the ordinary policy
with the memory computed again in order; E return, its gradient by the score function, and
the path KL from a policy without memory are those of the Markov chain (x, m).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import ctrl
from ctrl.paths import log_probs
from verification.claim import Check, Setting, array, expectation, pathwise
from verification.closed_form import memory as exact
from verification.cubature import degree_five, mean

SOURCE = "chain rule of densities; second moments of a linear chain of state and memory"


def problem() -> ctrl.ControlProblem:
    """Quadratic rewards, with a reward for entropy."""
    sde = ctrl.ControlledSDE(lambda t, x, a: exact.A * x + a, lambda t, x: exact.SIGMA)
    return ctrl.ControlProblem(
        sde,
        float(exact.NODES[-1]),
        running_reward=lambda t, x, a: -(x[:, 0].square() + exact.COST * a[:, 0].square()),
        terminal_reward=lambda x: -x[:, 0].square(),
        temperature=exact.TEMPERATURE,
    )


def with_memory(gain: float | Tensor, nodes: Tensor) -> ctrl.PolicyWithMemory:
    """a ~ N(-gain m, STD^2)."""

    def remember(t: Tensor, x: Tensor, a: Tensor, m: Tensor) -> Tensor:
        h = nodes.diff()[torch.argmin((nodes - t).abs())]
        return m + h * (exact.LEAK * (x - m) + exact.HEARD * a)

    return ctrl.PolicyWithMemory(
        start=lambda x: exact.MEMORY * x,
        remember=remember,
        at=lambda m: ctrl.GaussianPolicy(lambda t, x: -gain * m, exact.STD),
    )


def checks(setting: Setting) -> Iterator[Check]:
    """Exact second moments by cubature of degree five."""
    grid = ctrl.TimeGrid(setting.tensor(exact.NODES))
    start, noise = degree_five(grid, exact.START, exact.START_STD, draws=True)
    gain = setting.tensor(exact.GAIN).requires_grad_()
    policy, stated = with_memory(gain, grid.nodes), problem()
    paths = ctrl.simulate(stated, policy, start, grid, noise=noise)
    moments = exact.second_moments(exact.GAIN)
    got = mean(paths.states[..., 0].square(), paths)
    yield expectation("E X^2 at every node", got, [float(one[0, 0].real) for one in moments])
    assert paths.actions is not None
    states, actions = (array(one[..., 0]) for one in (paths.states, paths.actions))
    densities = exact.log_densities(states, actions)
    yield pathwise("log-density of every action", log_probs(policy, paths), densities)
    returns = mean(ctrl.returns_to_go(stated, paths, policy)[:, 0], paths)
    want = float(exact.expected_return(exact.GAIN).real)
    yield expectation("return, entropy included", returns, want)
    without = ctrl.DeterministicPolicy(lambda t, x: exact.REFERENCE * x)
    kl = ctrl.girsanov.path_kl(stated.dynamics, policy, without, paths)
    yield expectation("path KL from a policy without memory", mean(kl, paths), exact.path_kl())
    score = ctrl.policy_gradient.return_gradient(stated, policy, paths)
    (slope,) = torch.autograd.grad(mean(score, paths), gain)
    yield expectation("gradient of the return", slope, exact.slope())


MISTAKES = r"""
ctrl.memory._InOrder.act
    the roll-out forgets | `        self._now = with_memory(self._policy, self._memory)\n        return action`
        => `        return action`
    the roll-out remembers the mean for the drawn action | next_memory(self._policy, t, states, action, self._memory)
        => next_memory(self._policy, t, states, mean, self._memory)
ctrl.memory.memories
    the memory of a step contains its own action | states[:, k], actions[:, k], memory)
        => states[:, k], actions[:, k + 1], memory)
    the memory of a step looks at the state after it | times[k], states[:, k], => times[k], states[:, k + 1],
    a memory that begins anew at every step | actions[:, k], memory)
        => actions[:, k], first_memory(policy, states[:, k]))
ctrl.paths.over_policy_steps
    every step with the first memory | past = memories_along(policy, paths)
        => past = memories_along(policy, paths)\n        past = past[:, :1].expand_as(past)
ctrl.policy_gradient._log_probs
    no gradient through the memory's policy | return log_probs(policy if isinstance(policy, PolicyWithMemory) else _random(policy), paths)
        => return log_probs(policy if isinstance(policy, PolicyWithMemory) else _random(policy), paths) * 0.5
ctrl.paths.in_order
    the path KL with the first memory throughout | memory) for memory in memories_along(policy, paths).unbind(1)
        => memories_along(policy, paths)[:, 0]) for _ in paths.grid.steps
"""
