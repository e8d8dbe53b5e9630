"""What exploration costs in a linear-quadratic problem: temperature * action dimension / 2 a time.

V_classical - (V_gam - gam E int e^{-rho t} entropy dt) = gam d / (2 rho), d the number of
actions; gam d (1 - e^{-rho T}) / (2 rho) with a horizon, gam d T / 2 without discount,
gam d / 2 per unit of time in ergodic problems. As gam -> 0 the classical problem is
recovered: the mean of the policy is the same for every gam, and V_gam - V_0 is
gam log det(2 pi gam W^{-1}) / (2 rho), which vanishes but may have either sign.

The optimal exploratory policy has the classical mean and the covariance gam W^{-1}; drawing costs
tr(W gam W^{-1}) / 2 = gam d / 2 per unit of time, whatever the state, the dynamics and the rewards.
"""

import math
from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import torch

import ctrl
from ctrl.linear import LinearGaussian, LinearQuadratic
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form import lq as exact
from verification.problems.lq import HORIZON, X, production

SOURCE = "Wang, Zariphopoulou & Zhou 2020, Theorems 5 and 8"
WHY_DOUBLE = "ctrl.linear solves its equations in float64 only, and refuses other types"


def classical(lq: LinearQuadratic) -> LinearQuadratic:
    """The same problem, in which entropy is not paid."""
    return replace(lq, temperature=0 * lq.rates[1])


def numbers(law: LinearGaussian) -> exact.Law:
    """The policy for the reference."""
    return exact.Law(*(getattr(law, each.name).cpu().numpy() for each in fields(law)))


def checks(setting: Setting) -> Iterator[Check]:
    """Discounted, over a horizon, at rest; and as the temperature vanishes."""
    lq = exact.example()
    whole = production(lq, setting)
    paid = exact.exploration_cost(lq.temperature, 2, lq.discount, HORIZON)
    said = ctrl.linear.cost_of_exploration(whole, HORIZON)
    yield pathwise("over a horizon: cost_of_exploration", said, paid)
    flat = ctrl.linear.cost_of_exploration(production(replace(lq, discount=0.0), setting), HORIZON)
    want = exact.exploration_cost(lq.temperature, 2, 0.0, HORIZON)
    yield pathwise("over a horizon, without discount: cost_of_exploration", flat, want)

    for number, lq in (
        ("two actions", exact.example()),
        ("one", exact.one_action(exact.example())),
    ):
        warm = production(replace(lq, H=0 * lq.H, h=0 * lq.h), setting)
        cold, actions = classical(warm), lq.B.shape[1]
        x = torch.as_tensor(X, device=setting.device)
        best, drawn = (ctrl.linear.solve_lq_discounted(each) for each in (cold, warm))
        want = exact.exploration_cost(lq.temperature, actions, lq.discount, math.inf)
        both = want * np.ones(2)
        plain = ctrl.linear.evaluate_lq_discounted(cold, drawn.law)
        lost = best.quadratic(x) - plain.quadratic(x)
        yield expectation(f"{number}, discounted: what the policy loses", lost, both)
        still = replace(lq, temperature=0.0)
        lost = [
            exact.discounted_value_by_moments(still, numbers(best.law), each)
            - exact.discounted_value_by_moments(still, numbers(drawn.law), each)
            for each in X
        ]
        yield expectation(f"{number}, discounted: the loss, by moments of the state", lost, both)
        said = ctrl.linear.cost_of_exploration(warm)
        yield pathwise(f"{number}, discounted: cost_of_exploration", said, want)

        S = best.quadratic.hessian.cpu().numpy()
        W = lq.N - np.einsum("jia,ik,jkb->ab", lq.D, S, lq.D)
        gain = exact.entropy_gain(W, lq.temperature, lq.discount)
        value_gain = drawn.quadratic(x) - best.quadratic(x)
        yield expectation(f"{number}, discounted: V_gam - V_0", value_gain, gain * np.ones(2))
        if actions == 1:
            shifted = replace(lq, A=lq.A - 0.5 * np.eye(2), discount=0.0)  # comes to rest
            warm = production(replace(shifted, H=0 * lq.H, h=0 * lq.h), setting)
            cold = classical(warm)
            best, drawn = (ctrl.linear.solve_lq_ergodic(each) for each in (cold, warm))
            plain = ctrl.linear.evaluate_lq_ergodic(cold, drawn.law)
            assert best.average_reward is not None
            assert plain.average_reward is not None
            want = exact.exploration_cost(lq.temperature, actions, 0.0, 1.0)
            lost = best.average_reward - plain.average_reward
            yield expectation("ergodic: average reward that the policy loses", lost, want)

    times = torch.tensor([0.0, HORIZON], dtype=torch.float64, device=setting.device)
    cold = classical(whole)
    best, drawn = (ctrl.linear.solve_lq(each, times) for each in (cold, whole))
    plain = ctrl.linear.evaluate_lq(cold, drawn.law_at, times)
    lost = best.value(times[0], x) - plain.value(times[0], x)
    yield expectation("over a horizon: what the policy loses", lost, paid * np.ones(2))
    mean_drawn, mean_best = (
        torch.cat([each.laws.gain[0].flatten(), each.laws.offset[0]]) for each in (drawn, best)
    )
    yield pathwise(
        "the mean of the policy does not depend on the temperature", mean_drawn, mean_best
    )


MISTAKES = """
ctrl.linear.riccati.cost_of_exploration
    1/2 missing | return 0.5 * temperature => return temperature
    number of states for that of actions | lq.B.shape[-1] => lq.B.shape[-2]
    temperature missing | 0.5 * temperature * lq => 0.5 * lq
    undiscounted | -torch.expm1(-safe * horizon) / safe => horizon + 0 * safe
    e^{-discount horizon} for 1 - e^{-discount horizon} | -torch.expm1(-safe * horizon) => torch.exp(-safe * horizon)
verification.claims.exploration.cost_of_exploration.classical
    entropy counted as reward | 0 * lq.rates[1] => lq.rates[1]
ctrl.linear.lq.greedy
    temperature squared | `covariance = temperature[..., None, None] * `
        => `covariance = temperature[..., None, None] ** 2 * `
    mean of the policy moved by the temperature | gains[..., :-1], gains[..., -1],
        => gains[..., :-1], (1 + temperature[..., None]) * gains[..., -1],
ctrl.linear.lq.value_rate
    noise of the drawn actions not priced | (curvature(lq, S) * law.covariance) => (lq.N * law.covariance)
shared
    policy's variance temperature * W for temperature / W
    price of drawing missing
    entropy without its e
"""
