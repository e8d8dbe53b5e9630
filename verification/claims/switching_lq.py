"""Linear-quadratic control whose coefficients switch at random, or change with time."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

import ctrl
from ctrl import regimes
from ctrl.linear import LinearQuadratic, TimeVarying, evaluate_lq, solve_lq, solve_lq_switching
from ctrl.q_learning import q_rate
from verification.claim import (
    Check,
    Setting,
    claim,
    expectation,
    limit,
    pathwise,
    rounding,
    stated,
    wrong,
)
from verification.closed_form.jumps import count_cells
from verification.closed_form.switching_lq import (
    RATES,
    REGIMES,
    Coefficients,
    after_a_step,
    of_time,
    values,
)

HORIZON, AT = 0.9, 0.25
# the time derivative of a polynomial of degree 16 on panels of [0, HORIZON] has this much round-off
SLOPE = rounding(size=16**2 / HORIZON)
WHY_DOUBLE = "ctrl.linear solves its equations in float64 only, and refuses other types"
TIMES = torch.linspace(0, HORIZON, 4, dtype=torch.float64)


def production(c: Coefficients) -> LinearQuadratic:
    """The same for ``ctrl``, a batch as the coefficients are."""
    n = {
        each.name: torch.as_tensor(getattr(c, each.name), dtype=torch.float64) for each in fields(c)
    }
    matrix = {name: n[name][..., None, None] for name in ("A", "B", "M", "N", "H")}
    scaled = {} if not np.any(c.D) else {"D": n["D"][..., None, None, None]}
    return LinearQuadratic(
        **matrix, **scaled, sigma=n["s"][..., None, None], p=n["p"][..., None],
        f=n["f"][..., None], C=n["C"][..., None, None, None], discount=n["discount"],
    )  # fmt: skip


def flat(value: ctrl.linear.Quadratic) -> Tensor:
    """S, e and c, [3, regimes]."""
    parts = (value.hessian.flatten(), value.slope.flatten(), value.constant.flatten())
    return torch.stack(parts)


def switched(setting: Setting, h: float, i: int) -> Tensor:
    """Law of the regime after one step of a roll-out from regime i, exactly."""
    cells = [count_cells(h * rate, 9) for rate in RATES[i]]
    cells[i] = (np.ones(1), np.zeros(1))
    every = list(itertools.product(*(range(len(mass)) for mass, _ in cells)))
    rows = [[cells[j][1][n] for j, n in enumerate(counts)] for counts in every]
    weights = [math.prod(cells[j][0][n] for j, n in enumerate(counts)) for counts in every]
    jumps, weight = setting.tensor(rows)[:, None], setting.tensor(weights)
    weight = weight / weight.sum()
    noise = ctrl.Noise(jumps[..., :1] * 0, weights=weight, jumps=jumps)
    problem = regimes.switching_problem(production(REGIMES), torch.as_tensor(RATES), 1.0)
    start = regimes.join(setting.tensor(0.4).expand(len(rows), 1), i)
    grid = ctrl.TimeGrid(setting.tensor([0.0, h]))
    nobody = ctrl.DeterministicPolicy(lambda t, x: 0 * x[:, :1])
    paths = ctrl.simulate(problem, nobody, start, grid, noise=noise)
    last = paths.states[:, -1, 1]
    return torch.stack([weight @ (last == j).to(weight) for j in range(3)])


SWITCHING = "ctrl.regimes.regime_switching"


@claim(
    statement="""
        The values x'S_i x/2 + e_i'x + c_i of linear-quadratic problems that switch from i to j at
        the rates q_ij solve Riccati equations coupled by sum_j q_ij (V_j - V_i), which is the
        integral of the generator of (X, regime) as a jump process. A step of its roll-out has the
        law of the regime up to O(h^2).
        """,
    source="Costa, Fragoso & Todorov 2013, chapter 4; Yin & Zhu 2010, section 2.4",
    wrongs=[
        wrong(
            "Riccati equations not coupled",
            "ctrl.linear.riccati.solve_lq_switching",
            "return within + moves @ y - moves.sum(1, keepdim=True) * y",
            "return within",
        ),
        wrong(
            "rates of the wrong direction in the Riccati equations",
            "ctrl.linear.riccati.solve_lq_switching",
            "moves @ y",
            "moves.T @ y",
        ),
        wrong(
            "rate of leaving missing",
            "ctrl.linear.riccati.solve_lq_switching",
            "- moves.sum(1, keepdim=True) * y",
            "",
        ),
        wrong("rates of the wrong direction", SWITCHING, "moves.to(x)[i]", "moves.to(x).T[i]"),
        wrong(
            "a switch by j regimes, not to j",
            SWITCHING,
            "j - states[:, -1]",
            "j + 0 * states[:, -1]",
            raises=IndexError,
        ),
        wrong(
            "switches of one step added up",
            "ctrl.jumps.add_jumps",
            "kind.sizes_at(t, after, actions",
            "kind.sizes_at(t, before, actions",
        ),
        wrong(
            "half of the rates", "ctrl.jumps.add_jumps", "expected = h *", "expected = 0.5 * h *"
        ),
        wrong(
            "discount of the first regime",
            "ctrl.regimes.switching_problem",
            "[split(states)[1]]",
            "[0 * split(states)[1]]",
        ),
        wrong(
            "policy of the first regime",
            "ctrl.regimes.switching_policy",
            "law.gain.to(x)[i]",
            "law.gain.to(x)[0 * i]",
        ),
    ],
    why_double=WHY_DOUBLE,
)
def regime_switching(setting: Setting) -> Iterator[Check]:
    """Coupled Riccati equations, the generator, and a step."""
    lq, rates = production(REGIMES), torch.as_tensor(RATES)
    solution = solve_lq_switching(lq, rates, TIMES)
    want = values(lambda t: REGIMES, RATES, AT, HORIZON)
    t = setting.tensor(AT)
    yield limit("coupled Riccati equations", flat(solution.value_at(t)), want)
    problem = regimes.switching_problem(lq, rates, HORIZON)
    x = setting.tensor([[-0.8], [0.3], [1.1]])
    policy = regimes.switching_policy(solution)

    def value(t: Tensor, states: Tensor) -> Tensor:
        return regimes.switching_value(solution, t, states)

    for i in range(3):
        states = regimes.join(x, i)
        best = policy.mean(t, states)
        for shift in (0.0, 0.6):
            q = q_rate(problem, value, t, states, best + shift)
            lost = -0.5 * REGIMES.N[i] * shift**2 + 0 * q
            yield stated(
                pathwise(f"q {shift} from the best action of regime {i}", q, lost, 1.0), units=SLOPE
            )
    errors = []
    for h in (0.02, 0.01):
        got = switched(setting, h, 1)
        yield expectation(f"law of the regime after {h}", got, after_a_step(h, 1))
        generator = RATES - np.diag(RATES.sum(1))
        errors.append(float(np.abs(got.numpy() - scipy.linalg.expm(h * generator)[1]).max()))
    yield limit("order of the regime's law, locally", math.log2(errors[0] / errors[1]), 2.0)


def varying() -> TimeVarying:
    """The same for ``ctrl``."""
    return TimeVarying(lambda t: production(of_time(t.numpy())))


@claim(
    statement="""
        With coefficients that are functions of time S, e and c solve the Riccati equation with the
        coefficients of that time, backwards; the best action is that of the time too, and the
        discount exp(-int discount dt).
        """,
    source="Yong & Zhou 1999, chapter 6",
    wrongs=[
        wrong(
            "coefficients at the time to go",
            "ctrl.linear.riccati.solve_lq",
            "problem_at(lq, grid[-1] - t)",
            "problem_at(lq, t)",
        ),
        wrong(
            "the same for a policy's value",
            "ctrl.linear.riccati.evaluate_lq",
            "problem_at(lq, grid[-1] - t)",
            "problem_at(lq, t)",
        ),
        wrong(
            "best action with the horizon's coefficients",
            "ctrl.linear.riccati.FiniteHorizon.law_at",
            "lq = problem_at(self.lq, t)",
            "lq = self._last",
        ),
        wrong(
            "drift at time 0",
            "ctrl.linear.lq.TimeVarying.sde",
            "self.now(t).sde.drift(",
            "first.sde.drift(",
        ),
        wrong(
            "discount at time 0",
            "ctrl.linear.lq.TimeVarying.problem",
            "self.now(t).rates[0]",
            "first.rates[0]",
        ),
        wrong(
            "action's noise left out",
            "ctrl.linear.lq.TimeVarying.sde",
            "+ times(lq.D.to(x), a.unsqueeze(-2))",
            "",
        ),
    ],
    why_double=WHY_DOUBLE,
)
def time_dependent_lq(setting: Setting) -> Iterator[Check]:
    """Against scipy, and q of the best action."""
    lq, t = varying(), setting.tensor(AT)
    solution = solve_lq(lq, TIMES)
    want = values(lambda s: of_time(np.array([s])), np.zeros((1, 1)), AT, HORIZON)
    yield limit("Riccati equation of changing coefficients", flat(solution.value_at(t)), want)
    problem = lq.problem(HORIZON)
    x = setting.tensor([[-0.8], [0.3], [1.1]])
    best = solution.law_at(t).mean(x)
    q = q_rate(problem, solution.value, t, x, best)
    yield stated(pathwise("q of the best action", q, 0 * q, 1.0), units=SLOPE)
    W = float(of_time(AT).N - of_time(AT).D ** 2 * want[0, 0])
    q = q_rate(problem, solution.value, t, x, best + 0.7)
    yield stated(pathwise("q of another", q, -0.5 * W * 0.49 + 0 * q, 1.0), units=SLOPE)
    law = ctrl.linear.LinearGaussian(
        setting.tensor([[-0.5]]), setting.tensor([0.2]), setting.tensor([[0.0]])
    )
    evaluated = evaluate_lq(lq, law, TIMES)
    q = q_rate(problem, evaluated.value, t, x, law.mean(x))
    yield stated(pathwise("q of a policy's own action", q, 0 * q, 1.0), units=SLOPE)
