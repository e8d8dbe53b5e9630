"""Regimes that switch by a Markov chain: coupled Riccati equations and their generator.

The values x'S_i x/2 + e_i'x + c_i of linear-quadratic problems that switch from i to j at
the rates q_ij solve Riccati equations coupled by sum_j q_ij (V_j - V_i), which is the
integral of the generator of (X, regime) as a jump process. A step of its roll-out has the
law of the regime up to O(h^2).
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

import ctrl
from ctrl import regimes
from ctrl.linear import solve_lq_switching
from ctrl.q_learning import q_rate
from verification.claim import Check, Setting, expectation, limit, pathwise, stated
from verification.closed_form.jumps import count_cells
from verification.closed_form.switching_lq import (
    RATES,
    REGIMES,
    after_a_step,
    of_regimes,
    values,
)
from verification.problems.switching_lq import AT, HORIZON, SLOPE, TIMES, flat, production

SOURCE = "Costa, Fragoso & Todorov 2013, chapter 4; Yin & Zhu 2010, section 2.4"
WHY_DOUBLE = "ctrl.linear solves its equations in float64 only, and refuses other types"


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


def checks(setting: Setting) -> Iterator[Check]:
    """A step, coupled Riccati equations, and the generator."""
    errors = []
    for h in (0.02, 0.01):
        got = switched(setting, h, 1)
        yield expectation(f"law of the regime after {h}", got, after_a_step(h, 1))
        generator = RATES - np.diag(RATES.sum(1))
        errors.append(float(np.abs(got.numpy() - scipy.linalg.expm(h * generator)[1]).max()))
    yield limit("order of the regime's law, locally", math.log2(errors[0] / errors[1]), 2.0)

    lq, rates = production(REGIMES), torch.as_tensor(RATES)
    solution = solve_lq_switching(lq, rates, TIMES)
    want = values(of_regimes, RATES, AT, HORIZON)
    t = setting.tensor(AT)
    yield limit("coupled Riccati equations", flat(solution.value_at(t)), want)
    problem = regimes.switching_problem(lq, rates, HORIZON)
    x = setting.tensor([[-0.8], [0.3], [1.1]])
    policy = regimes.switching_policy(solution)

    def value(t: Tensor, states: Tensor) -> Tensor:
        return regimes.switching_value(solution, t, states)

    states, shifts = torch.cat([regimes.join(x, i) for i in range(3)]), (0.0, 0.6)
    best = policy.mean(t, states)
    actions = torch.cat([best + shift for shift in shifts])
    q_rates = q_rate(problem, value, t, states.repeat(2, 1), actions).view(2, 3, len(x))
    for i in range(3):
        for shift, q in zip(shifts, q_rates[:, i], strict=True):
            lost = -0.5 * REGIMES.N[i] * shift**2 + 0 * q
            yield stated(
                pathwise(f"q {shift} from the best action of regime {i}", q, lost, 1.0), units=SLOPE
            )


MISTAKES = """
ctrl.linear.riccati.solve_lq_switching
    Riccati equations not coupled | return within + moves @ y - moves.sum(1, keepdim=True) * y => return within
    rates of the wrong direction in the Riccati equations | moves @ y => moves.T @ y
    rate of leaving missing | - moves.sum(1, keepdim=True) * y => ``
ctrl.regimes.regime_switching
    rates of the wrong direction | moves.to(x)[i] => moves.to(x).T[i]
    a switch by j regimes, not to j [IndexError] | j - states[:, -1] => j + 0 * states[:, -1]
ctrl.jumps.add_jumps
    switches of one step added up | kind.sizes_at(t, after, actions => kind.sizes_at(t, before, actions
    half of the rates | expected = h * => expected = 0.5 * h *
ctrl.regimes.switching_problem
    discount of the first regime | [split(states)[1]] => [0 * split(states)[1]]
ctrl.regimes.switching_policy
    policy of the first regime | law.gain.to(x)[i] => law.gain.to(x)[0 * i]
"""
