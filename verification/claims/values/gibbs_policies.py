"""Gibbs policies: the optimum of a Hamiltonian with entropy, and its two normalisations.

pi* = exp(q/gam) / int exp(q/gam) da maximises E_pi[q - gam log pi], and the maximum is
gam log int exp(q/gam) da; any other pi misses it by gam KL(pi || pi*). For q quadratic with
Hessian -W: pi* = N(argmax q, gam W^{-1}) and the maximum is
max q + (gam/2) log det(2 pi gam W^{-1}), without an e: the e of the entropy is paid back by
the drawn actions. At the optimal value int exp(q*/gam) da = 1; for the value of a policy
only E_pi[q - gam log pi] = 0.

    pi*(a) = exp(q(a) / gam) / int exp(q / gam)
    max over pi of E_pi[q - gam log pi] = gam log int exp(q / gam) da

The reference sums over a fine grid of actions and completes no square.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import bellman
from ctrl.action_grid import ActionGrid, trapezoid
from ctrl.exploration import drawn_actions
from ctrl.policy import RandomPolicy
from ctrl.q_learning import ConsistentQ, GibbsQ, QRate, gibbs_policy, q_rate
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form import gibbs as exact
from verification.closed_form.gaussian_law import log_density
from verification.closed_form.lq import Quadratic, example, soft_maximum
from verification.closed_form.lq import q_rate as exact_q_rate
from verification.problems.lq import ACTIONS, X, production

SOURCE = "Wang, Zariphopoulou & Zhou 2020, section 3; Jia & Zhou 2023, equations 17 and 24"

VALUE: Quadratic = (np.array([[-0.55, 0.08], [0.08, -0.9]]), np.array([-0.33, 0.78]), 0.41)
SLOPE: Quadratic = (np.array([[0.21, -0.05], [-0.05, 0.32]]), np.array([0.17, -0.12]), -0.29)
TIME = 0.3
MEAN, ROOT = np.array([0.35, -0.6]), np.array([[0.5, 0.0], [-0.2, 0.4]])


def value(t: Tensor, x: Tensor) -> Tensor:
    """A quadratic whose coefficients are linear in time."""
    now, slope = (
        x.new_tensor(np.concatenate([np.ravel(each) for each in part])) for part in (VALUE, SLOPE)
    )
    S, e, c = (now + (t - TIME) * slope).split([4, 2, 1])
    return (x * (0.5 * x @ S.view(2, 2) + e)).sum(-1) + c


def cubic(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
    """A q-rate that is not quadratic in the action."""
    return 0.3 * a[:, 0] ** 3 - a[:, 0] * a[:, 1] ** 2 + 0.7 * x[:, 0] * a[:, 1] + 0.4


def action_grid() -> ActionGrid:
    """The reference's box, with other nodes."""
    side = torch.tensor([exact.HALF] * 2, dtype=torch.float64)
    return trapezoid(-side, side, 45)


def over_actions(rate: QRate, t: Tensor, x: Tensor, grid: ActionGrid) -> Tensor:
    """The rate at every action and state, [actions, states]."""
    each = grid.nodes.to(x)
    rows = rate(t, x.repeat(len(each), 1), each.repeat_interleave(len(x), 0))
    return rows.view(len(each), len(x))


def regularised(rate: QRate, policy: RandomPolicy, gam: float, t: Tensor, x: Tensor) -> Tensor:
    """E_pi[q - gam log pi] at every x, by production's rule over actions."""
    drawn = list(drawn_actions(policy, t, policy.mean(t, x), 3))
    rates = rate(t, x.repeat(len(drawn), 1), torch.cat([a for _, a in drawn])).view(-1, len(x))
    average = torch.zeros_like(x[:, 0])
    for (weight, a), drawn_rate in zip(drawn, rates, strict=True):
        average = average + weight * (drawn_rate - gam * policy.log_prob(t, x, a))
    return average


def checks(setting: Setting) -> Iterator[Check]:
    """On a linear-quadratic Hamiltonian, and beyond it."""
    lq = example()
    problem, gam = production(lq, setting).problem(2.0), lq.temperature
    t, x, a = setting.tensor(TIME), setting.tensor(X), setting.tensor(ACTIONS)
    brute = [exact.lq_gibbs(lq, VALUE, SLOPE, each) for each in X]
    best = np.array([each.soft_maximum for each in brute])

    def rate(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return q_rate(problem, value, t, x, a)

    root = setting.tensor(ROOT)
    other = ctrl.MultivariateGaussianPolicy(lambda t, x: 0.4 * x + setting.tensor(MEAN), root)
    grid = action_grid()
    total = grid.weights @ (over_actions(GibbsQ(other, gam), t, x, grid).double() / gam).exp()
    yield expectation("int exp(q/gam) da = 1: GibbsQ", total, np.ones(2))

    centred = ConsistentQ(cubic, other, gam)
    left = []
    for row in X:
        here = setting.tensor(row)
        middle = 0.4 * row + MEAN

        def excess_rate(at: np.ndarray, here: Tensor = here, middle: np.ndarray = middle):
            rates = centred(t, here.expand(len(at), 2), setting.tensor(at)).double().cpu().numpy()
            return rates - gam * log_density(at, middle, ROOT @ ROOT.T)

        left.append(exact.gaussian_mean(middle, ROOT, excess_rate))
    yield expectation("E_pi[q - gam log pi] = 0: ConsistentQ of a cubic", left, [0.0, 0.0], 1.0)

    grid_maximum, mass = bellman.gibbs(grid.weights, gam)(over_actions(rate, t, x, grid))
    formula = [soft_maximum(lq, VALUE, SLOPE, each) for each in X]
    yield pathwise("soft maximum, on a grid: by completing the square", grid_maximum, formula)
    yield pathwise("soft maximum, on a grid: by brute force", grid_maximum, best)
    mean, std = grid.moments(mass)
    means = np.stack([each.mean for each in brute])
    stds = np.stack([np.sqrt(np.diag(each.covariance)) for each in brute])
    moments = torch.cat([mean, std])
    yield pathwise("the policy on a grid: its moments", moments, np.concatenate([means, stds]))

    policy = gibbs_policy(problem, value, 2, x[0])
    at_x, scale = policy.mean(t, x), policy.scale_at(t, x)  # its Hessians, once
    policy = ctrl.MultivariateGaussianPolicy(lambda t, x: at_x, scale)
    yield pathwise("mean, by sums over actions", at_x, means)
    yield pathwise("covariance, by sums over actions", scale @ scale.T, brute[1].covariance)
    excess = [
        exact_q_rate(lq, VALUE, SLOPE, *each) - top
        for *each, top in zip(X, ACTIONS, best, strict=True)
    ]
    log_pi = gam * policy.log_prob(t, x, a)
    yield pathwise("gam log pi = q - gam log int exp(q/gam), at any action", log_pi, excess)

    own = regularised(rate, policy, gam, t, x)
    yield expectation("the Gibbs policy attains the soft maximum", own, best)
    missed = regularised(rate, other, gam, t, x) + gam * ctrl.policy_kl(other, policy, t, x)
    yield expectation("another policy misses it by gam KL", missed, best)

    solution = ctrl.linear.solve_lq(
        production(lq, setting), torch.tensor([0.0, 0.9], dtype=torch.float64)
    )

    def optimal(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return q_rate(problem, solution.value, t, x, a)

    total = grid.weights @ (over_actions(optimal, t, x, grid).double() / gam).exp()
    yield expectation("int exp(q/gam) da = 1: q* of the optimum", total, np.ones(2))


MISTAKES = """
ctrl.q_learning._scale
    temperature inverse | temperature * prec => 1 / temperature * prec
    variance temperature * W for temperature / W | temperature * precision => temperature * -hessian
ctrl.q_learning.gibbs_policy
    mean halved | solve(-hessian, slope) => solve(-2 * hessian, slope)
ctrl.q_learning._slope_and_hessian
    no mixed derivatives in the Hessian [ValueError] | q(unit[i] + unit[j]) - up[i] - up[j] + here => 0 * here
ctrl.bellman.gibbs
    temperature inverse, on a grid | H / temperature => H * temperature
    log-partition term missing: the maximum itself | return temperature * normaliser, => return H.max(0)[0],
ctrl.q_learning.ConsistentQ.__call__
    entropy's share missing | - average - self.temperature * entropy => - average
ctrl.policy.policy_kl
    KL the other way around | kl_divergence(law, law_ref) => kl_divergence(law_ref, law)
verification.closed_form.lq.soft_maximum
    an e in the soft-max identity | 2 * math.pi * lq.temperature => 2 * math.pi * math.e * lq.temperature
shared
    outer temperature missing, in gibbs
    soft-min for soft-max
    weights of the actions missing
    temperature missing in the normalised q
    average under the policy left out of the constraint
    sign of the entropy's share
    log-partition term missing
"""
