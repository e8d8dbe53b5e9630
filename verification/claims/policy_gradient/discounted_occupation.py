"""Performance differences by discounted occupation times, and the surrogate's error.

d = rho int e^{-rho t} law(X_t) dt. V' - V = (1/rho) E_{d', pi'}[q - gam log pi'], q of the
old policy, states of the new one; grad V = (1/rho) E_{d, pi}[grad log pi (q - gam log pi)].
With the old policy's d the first is only a surrogate: its error is of second order.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl.exploration import drawn_actions
from ctrl.q_learning import q_rate
from verification.claim import Check, Setting, expectation, limit
from verification.closed_form import lq as exact
from verification.problems.lq import LAW, production, production_law

SOURCE = "Zhao, Tang & Yao 2023, NeurIPS 36, Theorems 2 and 3"
WHY_DOUBLE = "ctrl.linear solves its equations in float64 only, and refuses other types"

START = np.array([0.7, -0.4])
MOVE = exact.Law(
    np.array([[0.13, -0.07], [0.05, 0.11]]),
    np.array([-0.09, 0.12]),
    np.array([[0.06, -0.02], [-0.02, 0.04]]),
)


def policy_at(by: float) -> exact.Law:
    """Another policy."""
    return exact.Law(LAW.K + by * MOVE.K, LAW.k + by * MOVE.k, LAW.Sigma + by * MOVE.Sigma)


def states(lq: exact.LQ, law: exact.Law) -> tuple[Tensor, Tensor]:
    """Nodes and weights with mean and covariance of the occupation: enough for quadratics."""
    mean, covariance = exact.occupation(lq, law, START)
    points, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = np.stack(np.meshgrid(points, points, indexing="ij"), axis=-1).reshape(-1, 2)
    nodes = mean + grid @ np.linalg.cholesky(covariance).T
    weights = np.outer(weights, weights).ravel()
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def advantage(
    problem: ctrl.ControlProblem, value: ctrl.Value, policy: ctrl.RandomPolicy
) -> Callable[[Tensor, Tensor], Tensor]:
    """q - gam log pi at states and actions, pi the policy that acts."""
    t = torch.zeros((), dtype=torch.float64)

    def rate(x: Tensor, a: Tensor) -> Tensor:
        log_prob = policy.log_prob(t, x, a).detach()
        return q_rate(problem, value, t, x, a) - problem.temperature * log_prob

    return rate


def gain(lq: exact.LQ, new: exact.Law, occupied: exact.Law, setting: Setting) -> float:
    """(1/rho) E_{x ~ d, a ~ new}[q - gam log new], q of the old policy, d of ``occupied``."""
    as_tensors = production(lq, setting)
    old = ctrl.linear.evaluate_lq_discounted(as_tensors, production_law(LAW, setting))
    policy, problem = production_law(new, setting).policy(), as_tensors.problem()
    assert isinstance(policy, ctrl.MultivariateGaussianPolicy)
    rate = advantage(problem, old.value, policy)
    x, weights = states(lq, occupied)
    t, total = torch.zeros((), dtype=torch.float64), torch.zeros_like(weights)
    drawn = list(drawn_actions(policy, t, policy.mean(t, x), 3))
    rates = rate(x.repeat(len(drawn), 1), torch.cat([a for _, a in drawn])).view(-1, len(x))
    for (weight, _), each in zip(drawn, rates, strict=True):
        total = total + weight * each
    return float(weights @ total) / lq.discount


def slope(lq: exact.LQ, setting: Setting) -> Tensor:
    """(1/rho) E_{x ~ d, a ~ pi}[grad log pi (q - gam log pi)] in K, k and the root of Sigma."""
    as_tensors = production(lq, setting)
    old = ctrl.linear.evaluate_lq_discounted(as_tensors, production_law(LAW, setting))
    root = torch.linalg.cholesky(torch.from_numpy(LAW.Sigma)).requires_grad_()
    K, k = (torch.tensor(each, requires_grad=True) for each in (LAW.K, LAW.k))
    policy = ctrl.MultivariateGaussianPolicy(lambda t, x: x @ K.T + k, root)
    rate = advantage(as_tensors.problem(), old.value, policy)
    x, weights = states(lq, LAW)
    t, total = torch.zeros((), dtype=torch.float64), torch.zeros_like(weights)
    with torch.no_grad():
        drawn = list(drawn_actions(policy, t, policy.mean(t, x), 4))
    rates = rate(x.repeat(len(drawn), 1), torch.cat([a for _, a in drawn])).view(-1, len(x))
    for (weight, a), each in zip(drawn, rates, strict=True):
        total = total + weight * policy.log_prob(t, x, a) * each.detach()
    by_K, by_k, by_root = torch.autograd.grad(weights @ total / lq.discount, (K, k, root))
    rows, columns = torch.tril_indices(2, 2)
    return torch.cat([by_K.flatten(), by_k, by_root[rows, columns]])


def checks(setting: Setting) -> Iterator[Check]:
    """Both identities, and the order of what the surrogate leaves out."""
    lq = exact.example()
    lq = replace(lq, H=0 * lq.H, h=0 * lq.h)
    before = exact.discounted_value_by_moments(lq, LAW, START)
    after = [exact.discounted_value_by_moments(lq, policy_at(by), START) for by in (1.0, 0.1, 0.05)]
    change = gain(lq, policy_at(1.0), policy_at(1.0), setting)
    yield expectation("performance difference", change, after[0] - before)
    no_change = gain(lq, LAW, LAW, setting)
    yield expectation("the same policy gains nothing", no_change, 0.0, abs(after[0] - before))
    want = exact.gradient_in_law(lq, LAW, START)
    yield expectation(
        "gradient in gain, offset and root of the covariance", slope(lq, setting), want
    )
    near = [gain(lq, policy_at(by), LAW, setting) for by in (0.1, 0.05)]
    left = [value - before - no_change for value, no_change in zip(after[1:], near, strict=True)]
    yield limit("surrogate: half the change, a quarter of the error", left[0] / left[1], 4.0)


MISTAKES = """
verification.claims.policy_gradient.discounted_occupation.gain
    factor 1/rho missing | total) / lq.discount => total)
    states of the old policy | states(lq, occupied) => states(lq, LAW)
verification.claims.policy_gradient.discounted_occupation.slope
    gradient's factor 1/rho missing | total / lq.disc => total * lq.disc
verification.claims.policy_gradient.discounted_occupation.advantage
    entropy missing | - problem.temperature * log => - 0 * log
    sign of the entropy | - problem.temp => + problem.temp
verification.closed_form.lq.occupation
    occupation not discounted | lq.discount * np.linalg.solve(lq.discount
        => 2 * lq.discount * np.linalg.solve(2 * lq.discount
ctrl.q_learning.q_rate
    discount missing in q | rate - problem.discount_at(t, states) * value(t, states) => rate
ctrl.value.generator
    second-order term of q missing | + 0.5 * trace => ``
shared
    second-order term of q without 1/2
    price of drawing missing
"""
