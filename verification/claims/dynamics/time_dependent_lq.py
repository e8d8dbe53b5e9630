"""Linear-quadratic problems whose coefficients are functions of time.

With coefficients that are functions of time S, e and c solve the Riccati equation with the
coefficients of that time, backwards; the best action is that of the time too, and the
discount exp(-int discount dt).
"""

from collections.abc import Iterator

import numpy as np
import torch

import ctrl
from ctrl.linear import TimeVarying, evaluate_lq, solve_lq
from ctrl.q_learning import q_rate
from verification.claim import Check, Setting, limit, pathwise, stated
from verification.closed_form.switching_lq import (
    of_one_regime,
    of_time,
    values,
)
from verification.problems.switching_lq import AT, HORIZON, SLOPE, TIMES, flat, production

SOURCE = "Yong & Zhou 1999, chapter 6"
WHY_DOUBLE = "ctrl.linear solves its equations in float64 only, and refuses other types"


def varying() -> TimeVarying:
    """The same for ``ctrl``."""
    return TimeVarying(lambda t: production(of_time(t.numpy())))


def checks(setting: Setting) -> Iterator[Check]:
    """Against scipy, and q of the best action."""
    lq, t = varying(), setting.tensor(AT)
    solution = solve_lq(lq, TIMES)
    want = values(of_one_regime, np.zeros((1, 1)), AT, HORIZON)
    yield limit("Riccati equation of changing coefficients", flat(solution.value_at(t)), want)
    problem = lq.problem(HORIZON)
    x = setting.tensor([[-0.8], [0.3], [1.1]])
    best = solution.law_at(t).mean(x)
    actions = torch.cat([best, best + 0.7])
    q, other = q_rate(problem, solution.value, t, x.repeat(2, 1), actions).view(2, len(x))
    yield stated(pathwise("q of the best action", q, 0 * q, 1.0), units=SLOPE)
    W = float(of_time(AT).N - of_time(AT).D ** 2 * want[0, 0])
    yield stated(pathwise("q of another", other, -0.5 * W * 0.49 + 0 * q, 1.0), units=SLOPE)
    law = ctrl.linear.LinearGaussian(
        setting.tensor([[-0.5]]), setting.tensor([0.2]), setting.tensor([[0.0]])
    )
    evaluated = evaluate_lq(lq, law, TIMES)
    q = q_rate(problem, evaluated.value, t, x, law.mean(x))
    yield stated(pathwise("q of a policy's own action", q, 0 * q, 1.0), units=SLOPE)


MISTAKES = """
ctrl.linear.riccati.solve_lq
    coefficients at the time to go | problem_at(lq, grid[-1] - t) => problem_at(lq, t)
ctrl.linear.riccati.evaluate_lq
    the same for a policy's value | problem_at(lq, grid[-1] - t) => problem_at(lq, t)
ctrl.linear.riccati.FiniteHorizon.law_at
    best action with the horizon's coefficients | lq = problem_at(self.lq, t) => lq = self._last
ctrl.linear.lq.TimeVarying.sde
    drift at time 0 | self.now(t).sde.drift( => first.sde.drift(
    action's noise left out | + times(lq.D.to(x), a.unsqueeze(-2)) => ``
ctrl.linear.lq.TimeVarying.problem
    discount at time 0 | self.now(t).rates[0] => first.rates[0]
"""
