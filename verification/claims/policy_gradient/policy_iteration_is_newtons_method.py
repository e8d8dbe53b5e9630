"""Policy iteration on linear-quadratic problems is Newton's method.

Linear-quadratic problems: V^{n+1}, the value of the Gibbs policy of V^n, is Newton's step
from V^n on the Riccati equation F(S, e, c) = 0, to round-off. So V^n <= V^{n+1}, and the
error of S obeys e_{n+1} / e_n^2 -> F''/(2 F'), whatever the temperature.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import agents
from ctrl.linear import LinearGaussian, LinearQuadratic
from verification.claim import Check, Setting, bound, expectation, limit, pathwise
from verification.closed_form import lq as exact_lq
from verification.closed_form import policy_iteration as exact
from verification.problems.lq import X, flat, numbers, production, published

SOURCE = "Kleinman 1968; Wang & Zhou 2020, Theorem 4; Tang & Zhou 2024, section 4"
WHY_DOUBLE = "ctrl.linear solves its equations in float64 only, and refuses other types"

ITERATIONS = 5


@dataclass(frozen=True, eq=False)
class LawPolicy:
    """A linear-Gaussian law as a policy that still knows its law."""

    law: LinearGaussian
    is_random: bool = True

    def mean(self, t: Tensor, states: Tensor) -> Tensor:
        """K x + k."""
        return self.law.mean(states)

    def act(
        self, mean: Tensor, t: Tensor, noise: Tensor | None, states: Tensor | None = None
    ) -> Tensor:
        """Draw actions like the law's own policy."""
        return self.law.policy().act(mean, t, noise)


def iterates(lq: LinearQuadratic, iterations: int) -> list[ctrl.linear.Stationary]:
    """Values of the policies that policy iteration goes through, from an arbitrary one."""
    values = list[ctrl.linear.Stationary]()
    law = LinearGaussian(0 * lq.R - 0.1, 0 * lq.l + 0.2, lq.N)

    def evaluate(policy: ctrl.Policy) -> ctrl.Value:
        assert isinstance(policy, LawPolicy)
        values.append(ctrl.linear.evaluate_lq_discounted(lq, policy.law))
        return values[-1].value

    def improve(value: ctrl.Value) -> ctrl.Policy:
        return LawPolicy(ctrl.linear.improve_lq(lq, values[-1].quadratic))

    for _ in agents.policy_iteration(LawPolicy(law), evaluate, improve, iterations):
        pass
    return values


def checks(setting: Setting) -> Iterator[Check]:
    """Every step against Newton's, in several dimensions; the constant in one."""
    lq = replace(exact_lq.example(), discount=1.3)
    solutions = iterates(production(lq, setting), ITERATIONS)
    rows = [flat(each.quadratic) for each in solutions]
    newton = np.stack([exact.newton(lq, row.cpu().numpy()) for row in rows[:-1]])
    yield pathwise("each step is Newton's", torch.stack(rows[1:]), newton)
    x = torch.as_tensor(X, device=setting.device)
    values = torch.stack([each.quadratic(x) for each in solutions])
    yield bound("no step makes the policy worse", values[:-1], values[1:])
    p = exact_lq.DISCOUNTED
    steps = iterates(production(p.lq(), setting), 6)
    yield expectation(
        "the end of the iteration: value and rate", numbers(steps[-1])[:3], published(p)[:3]
    )
    best = exact_lq.solve_scalar(p).k2
    error = [float(each.quadratic.hessian) - best for each in steps]
    name = "e_{n+1} / e_n^2, as the error vanishes"
    yield limit(name, error[3] / error[2] ** 2, exact.scalar_constant(p))
    hotter = replace(p, temperature=7 * p.temperature)
    hot = iterates(production(hotter.lq(), setting), 4)
    both = [float(each.quadratic.hessian) for each in hot]
    cold = [float(each.quadratic.hessian) for each in steps[:4]]
    yield pathwise("the errors of S do not know the temperature", both, cold)


MISTAKES = """
ctrl.linear.lq.greedy
    inverse of the temperature | covariance = temp => covariance = 1 / temp
    improvement blind to the noise of the action | (curvature(lq, S)) => (lq.N)
    improvement blind to the mixed cost | .sum(-3) - lq.R => .sum(-3)
    worse actions taken for better ones | return LinearGaussian(gains[..., :-1], gains[..., -1],
        => return LinearGaussian(gains[..., :-1], -gains[..., -1],
    gain that shrinks with the temperature | LinearGaussian(gains[..., :-1],
        => LinearGaussian(gains[..., :-1] / (1 + temperature[..., None, None]),
ctrl.linear.lq.value_rate
    price of drawing missing | constant - drawn + _ent => constant + _ent
ctrl.agents.policy_iteration.policy_iteration
    evaluation stops at the old policy | policy = improve(value) => improve(value)
ctrl.linear.riccati._closed_loop
    discount missing in the evaluation | `kept = lq.A - 0.5 * ` => `kept = lq.A - 0 * `
shared
    policy's mean halved
    sign of the entropy
"""
