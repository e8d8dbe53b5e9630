"""Jia & Zhou's conditions where everything is there at once.

In two dimensions, with noise that mixes, coefficients of time, a cost of the action, entropy
and a discount: E int xi dM = 0 of the true value for adapted xi; q = d_t V + b . grad V
+ tr(S S' Hess V) / 2 + r - discount V has E_pi[q - temperature log pi] = 0; the pair (V, q)
fulfils its condition on paths of any policy; CLSTD finds the chain's value; and the losses of
a wrong value are what their sums say, step by step.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import martingale as mg
from ctrl import q_learning as ql
from ctrl.advantages import continuous_gae
from ctrl.paths import kept_actions
from ctrl.returns import regularised_rewards
from ctrl.value import values
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form import matrix_lq_chain as lq
from verification.closed_form.matrix_lq_chain import HORIZON, NODES, THETA
from verification.cubature import mean
from verification.problems.matrix_lq import (
    OTHER,
    P,
    along,
    chain_value,
    drawn_paths,
    parameters,
    policy,
    problem,
    quadratic,
)

SOURCE = (
    "Jia & Zhou 2022a, JMLR 23, Propositions 1 and 2, sections 3 and 4; Jia & Zhou 2023, JMLR 24, "
    "equation 14, Theorems 6, 7 and 9"
)

DECAY = 1.3
ERROR = (0.3, -0.2)  # of a value that is wrong, in x1 and x2^2


def monomials(t: Tensor, x: Tensor) -> Tensor:
    """1, x1, x2, x1^2, x1 x2, x2^2."""
    squares = torch.stack([x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2], 1)
    return torch.cat([torch.ones_like(x[:, :1]), x, squares], 1)


def of_each_node(t: Tensor, x: Tensor) -> Tensor:
    """A constant at the first node, monomials at the second: the chain's V is among these."""
    each, first = monomials(t, x), t < NODES[1] / 2
    return torch.cat([each[:, :1] * first, each * ~first], 1)


def seeing_actions(paths: ctrl.Paths) -> Tensor:
    """Test functions of the state and of the step's own action."""
    x, a = paths.states[:, :-1], kept_actions(paths)
    return torch.cat([torch.ones_like(x[..., :1]), x, a, a[..., :1] * x, a.square()], 2)


def chain_q(setting: Setting) -> ql.QRate:
    """q of the chain, by numpy."""

    def q(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        k = int(np.abs(NODES - float(t)).argmin())
        numbers = [each.detach().double().cpu().numpy() for each in (x, a)]
        return setting.tensor(lq.chain_q(P, THETA, NODES, k, *numbers))

    return q


def advantages_by_hand(paths: ctrl.Paths, rate: float) -> np.ndarray:
    """sum_l e^{-(discount + rate) (t_l - t_k)} delta_l of a wrong value, [paths, steps].

    delta is dM, each discounted to its own step's time.
    """
    steps, own = along(paths), lq.chain_value(P, THETA, NODES)
    last = paths.states[:, -1].detach().double().cpu().numpy()

    def value(k: int, x: np.ndarray) -> np.ndarray:
        return own[k](x) + ERROR[0] * x[:, 0] + ERROR[1] * x[:, 1] ** 2

    ends, ahead, advantages = lq.value(HORIZON)(last), np.zeros(len(last)), []
    for k, t, h, x, a in reversed(steps):
        earned = h * (lq.paid(P, t, x, a) - P.temperature * lq.log_density(THETA, x, a))
        delta = np.exp(-P.discount * h) * ends - value(k, x) + earned
        ahead = delta + np.exp(-(P.discount + rate) * h) * ahead
        advantages.append(ahead)
        ends = value(k, x)
    return np.stack(advantages[::-1], 1)


def checks(setting: Setting) -> Iterator[Check]:
    """Zeros of the true value and pair, sums of a wrong value."""
    stated, chosen, value = problem(setting), policy(parameters(setting)), chain_value(setting)
    paths = drawn_paths(setting, parameters(setting))
    other = drawn_paths(setting, parameters(setting, OTHER))
    size = abs(lq.performance(P, THETA, NODES))
    xi = mg.features_along(monomials)
    zero = mean(mg.orthogonality(xi, value, stated, paths, chosen), paths).detach()
    yield expectation("E int xi dM = 0 of the chain's own value", zero, [0.0] * 6, size)
    smooth = quadratic(setting, lq.value)
    exact = np.stack([lq.q_rate(P, t, x, a) for _, t, _, x, a in along(other)], 1)
    yield pathwise("q of every action", ql.q_rates(stated, smooth, other), exact)

    # a value that is wrong, and the direction x1 x2 in which losses are differentiated
    error = setting.tensor(0.0).requires_grad_()

    def off(t: Tensor, x: Tensor) -> Tensor:
        return value(t, x) + ERROR[0] * x[:, 0] + ERROR[1] * x[:, 1] ** 2 + error * x.prod(1)

    grid, h = np.array(NODES[:-1]), np.diff(NODES)
    discounts = np.exp(-P.discount * grid)
    x = paths.states.detach()[:, :-1].prod(2).double().cpu().numpy()
    whole, slow, single = (advantages_by_hand(paths, rate) for rate in (0.0, DECAY, np.inf))
    got = mg.martingale_loss(off, stated, paths, chosen)
    yield pathwise("martingale loss", got, (h * (discounts * whole) ** 2).sum(1))
    rewards, ends = regularised_rewards(stated, paths, chosen), values(off, stated, paths)
    gae = continuous_gae(ends, rewards, paths.grid.steps, DECAY, P.discount)
    yield pathwise("advantages, forgotten slowly", gae, slow)
    for name, loss, slopes in (
        ("CTD(0)", mg.ctd0(off, stated, paths, chosen), discounts * x * single),
        (
            "CTD(lambda)",
            mg.ctd_lambda(off, stated, paths, DECAY, chosen),
            h * discounts * x * slow,
        ),
    ):
        (got,) = torch.autograd.grad(mean(loss, paths), error)
        assert paths.weights is not None
        wanted = -float(paths.weights.double().cpu().numpy() @ slopes.sum(1))
        yield expectation(f"{name}: the slope of its loss", got, wanted)

    fitted = mg.clstd(of_each_node, stated, paths, chosen).coefficients
    first, (P1, e1, c1), _ = lq.chain_value(P, THETA, NODES)
    there = [first(np.array(P.start)), c1, *e1, P1[0, 0] / 2, P1[0, 1], P1[1, 1] / 2]
    yield expectation("CLSTD finds the chain's value", fitted, there)

    # q, of the value in continuous time and of the chain
    log_prob = np.stack([lq.log_density(THETA, x, a) for _, _, _, x, a in along(paths)], 1)
    beyond = ql.q_rates(stated, smooth, paths) - P.temperature * setting.tensor(log_prob)
    zero = mean(torch.cat([beyond, beyond * paths.states[:, :-1, 0]], 1), paths)
    yield expectation("E_pi[q - temperature log pi] = 0", zero, [0.0] * 4, abs(exact).mean())
    q = chain_q(setting)
    for kind, each in (("on-policy", paths), ("off-policy", other)):
        zero = mean(ql.orthogonality(seeing_actions, value, q, stated, each), each).detach()
        yield expectation(f"{kind}: E int xi dM = 0 of the pair", zero, [0.0] * len(zero), size)
    unpaid = replace(stated, terminal_reward=None)
    dm = ql.increments(lambda t, x: 0 * x[:, 0], q, unpaid, other)
    rates = [
        h * (lq.paid(P, t, x, a) - lq.chain_q(P, THETA, NODES, k, x, a))
        for k, t, h, x, a in along(other)
    ]
    yield pathwise("dM of q alone: (r - q) h", dm, np.stack(rates, 1))


MISTAKES = """
verification.claims.values.martingales_in_several_dimensions.chain_q
    q of the chain + 1 % | setting.tensor(lq => setting.tensor(1.01 * lq
ctrl.martingale.clstd
    the terminal reward counted as a feature | unpaid = replace(problem, terminal_reward=None, exit_reward=None)
        => unpaid = problem
    sign of the target | target = -torch => target = torch
ctrl.martingale.ctd_lambda
    discount left out of lambda's sum | rewards, h, decay, discount, running => rewards, h, decay, 0.0, running
    step sizes left out of lambda's sum | * h * along[:, :-1] => * along[:, :-1]
ctrl.martingale.ctd0
    discount of the features missing | (discount_factors(problem, paths) * along * dm) => (along * dm)
ctrl.martingale.martingale_loss
    squares not discounted | (discount_factors(problem, paths) * gap).square() => gap.square()
ctrl.value._columns
    sigma' for sigma in the trace | sigma[..., some] => sigma.mT[..., some]
shared
    discount missing
    entropy's sign
    sigma transposed
    second-order term of q without 1/2
    second-order term of q missing
    derivative of V in time missing
    discount V left out of q
    running reward left out of q
    scale transposed
    states at the right end of a step
    uneven grid taken for an even one, in the reward
    value of step i for i + 1
    discount inside the return missing
"""
