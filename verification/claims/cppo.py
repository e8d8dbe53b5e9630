"""Continuous-time PPO: what its surrogate is of, and what one update of it does.

Without horizon, with d = rho int e^{-rho t} law(X_t) dt the discounted occupation of a policy,
    grad V = (1/rho) E_{x ~ d, a ~ pi}[grad log pi (q - gam log pi)]
    V' - V = (1/rho) E_{x ~ d', a ~ pi'}[q - gam log pi']
and with d for d' in the second it is the surrogate, right to first order in pi' - pi.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ctrl
from ctrl import agents
from ctrl.exploration import drawn_actions
from ctrl.q_learning import q_rate
from verification import exploratory_lq
from verification.claim import Check, Setting, claim, expectation, limit, pathwise, wrong
from verification.claims.lq import LAW, WHY_DOUBLE, production, production_law
from verification.closed_form import lq as exact
from verification.closed_form import lq_chain
from verification.closed_form.lq_chain import THETA, LQChain

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
    for weight, a in drawn_actions(policy, t, policy.mean(t, x), 3):
        total = total + weight * rate(x, a)
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
    for weight, a in drawn:
        total = total + weight * policy.log_prob(t, x, a) * rate(x, a).detach()
    by_K, by_k, by_root = torch.autograd.grad(weights @ total / lq.discount, (K, k, root))
    rows, columns = torch.tril_indices(2, 2)
    return torch.cat([by_K.flatten(), by_k, by_root[rows, columns]])


OWN = "verification.claims.cppo"


@claim(
    statement="""
        d = rho int e^{-rho t} law(X_t) dt. V' - V = (1/rho) E_{d', pi'}[q - gam log pi'], q of the
        old policy, states of the new one; grad V = (1/rho) E_{d, pi}[grad log pi (q - gam log pi)].
        With the old policy's d the first is only a surrogate: its error is of second order.
        """,
    source="Zhao, Tang & Yao 2023, NeurIPS 36, Theorems 2 and 3",
    wrongs=[
        wrong("factor 1/rho missing", f"{OWN}.gain", "total) / lq.discount", "total)"),
        wrong(
            "gradient's factor 1/rho missing", f"{OWN}.slope", "total / lq.disc", "total * lq.disc"
        ),
        wrong(
            "states of the old policy",
            f"{OWN}.gain",
            "states(lq, occupied)",
            "states(lq, LAW)",
        ),
        wrong("entropy missing", f"{OWN}.advantage", "- problem.temperature * log", "- 0 * log"),
        wrong("sign of the entropy", f"{OWN}.advantage", "- problem.temp", "+ problem.temp"),
        wrong(
            "occupation not discounted",
            "verification.closed_form.lq.occupation",
            "lq.discount * np.linalg.solve(lq.discount",
            "2 * lq.discount * np.linalg.solve(2 * lq.discount",
        ),
        wrong(
            "discount missing in q",
            "ctrl.q_learning.q_rate",
            "rate - problem.discount_at(t, states) * value(t, states)",
            "rate",
        ),
        wrong("second-order term of q missing", "ctrl.value.generator", "+ 0.5 * trace", ""),
        wrong("second-order term without 1/2", "ctrl.value.generator", "0.5 * trace", "trace"),
        wrong(
            "value without the price of drawing",
            "ctrl.linear.lq.value_rate",
            "constant - drawn + _entropy",
            "constant + _entropy",
        ),
    ],
    why_double=WHY_DOUBLE,
)
def discounted_occupation(setting: Setting) -> Iterator[Check]:
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


class Learned(nn.Module):
    """Gain, offset and log-std."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.theta = nn.ParameterList(each.detach() for each in parameters(setting))


def parameters(setting: Setting) -> list[Tensor]:
    """To begin with."""
    return exploratory_lq.parameters(setting, THETA)


def policy_of(module: nn.Module) -> ctrl.GaussianPolicy:
    """The policy with a module's parameters."""
    assert isinstance(module, Learned)
    return exploratory_lq.policy(*module.theta)


def one_update(
    setting: Setting, p: LQChain, rate: float, **options: Any
) -> tuple[np.ndarray, float, ctrl.Paths]:
    """Parameters and penalty after one update of production's agent, and its paths."""
    module = Learned(setting)
    nodes = exploratory_lq.NODES
    value = exploratory_lq.chain_value(setting, p, THETA, nodes)
    dummy = setting.tensor(0.0).requires_grad_()  # the value is exact already
    update = agents.cppo(
        exploratory_lq.problem(p),
        module,
        policy_of,
        value,
        lambda: exploratory_lq.drawn_paths(setting, p, parameters(setting), nodes),
        torch.optim.SGD(module.parameters(), lr=rate),
        torch.optim.SGD([dummy], lr=rate),
        1,
        critic_loss=lambda paths: dummy * torch.zeros_like(paths.states[:, 0, 0]),
        epochs=1,
        penalty=0.7,
        **options,
    )
    paths, penalty = next(iter(update))
    after = np.array([float(each.detach()) for each in module.theta])
    return after, penalty, paths


def mean_root_kl(theta: np.ndarray, paths: ctrl.Paths) -> float:
    """Mean over paths and steps of sqrt(KL(theta || THETA)) at the paths' states."""
    x = paths.states[:, :-1, 0].detach().double().cpu().numpy()
    shift = (theta[0] - THETA[0]) * x + theta[1] - THETA[1]
    ratio = np.exp(2 * (theta[2] - THETA[2]))
    kl = (ratio - 1 - np.log(ratio) + shift**2 * np.exp(-2 * THETA[2])) / 2
    assert paths.weights is not None
    return float(paths.weights.double().cpu().numpy() @ np.sqrt(kl).mean(1))


SURROGATE = "ctrl.agents.cppo._surrogate"


@claim(
    statement="""
        One step of CPPO from the old policy is exact gradient ascent of the chain's performance:
        the penalty sqrt(KL) has slope 0 there, and the sum of e^{-rho t} h ratio (q - gam log pi)
        has the gradient of V. Afterwards the penalty moves by its factor, up where the mean of
        sqrt(KL) is above (1 + tolerance) target and down below (1 - tolerance) target; not so
        with the root of the mean.
        """,
    source="Zhao, Tang & Yao 2023, NeurIPS 36, section 4",
    wrongs=[
        wrong(
            "discount of the weights missing", SURROGATE, "discount_factors(problem, paths) * ", ""
        ),
        wrong("dt missing", SURROGATE, " * as_like(paths.grid.steps, kl)", ""),
        wrong(
            "log-ratio's sign",
            SURROGATE,
            "kept_actions(paths)) - old_log_prob",
            "kept_actions(paths)) * -1 + old_log_prob",
        ),
        wrong(
            "advantages not per unit of time",
            "ctrl.agents.cppo._rates",
            "running) / h",
            "running)",
        ),
        wrong(
            "entropy missing in the advantages",
            "ctrl.paths.regularised_rewards",
            "rewards - problem.temperature * log_prob",
            "rewards - 0 * log_prob",
        ),
        wrong(
            "descent for ascent",
            "ctrl.agents.cppo.cppo",
            "descend(-gain, actor)",
            "descend(gain, actor)",
        ),
        wrong("KL for its root", SURROGATE, "kl.detach().sqrt()", "kl.detach()"),
        wrong(
            "root of the mean KL",
            SURROGATE,
            "float(expectation(kl.detach().sqrt().sum(1) / made, paths))",
            "float(expectation(kl.detach().sum(1) / made, paths).sqrt())",
        ),
        wrong(
            "KL the other way around",
            SURROGATE,
            "policy_kl(new, old, t, x)",
            "policy_kl(old, new, t, x)",
        ),
        wrong(
            "penalty moves the wrong way",
            "ctrl.agents.cppo.cppo",
            "if root_kl > (1",
            "if root_kl < (1",
        ),
        wrong(
            "tolerance ignored",
            "ctrl.agents.cppo.cppo",
            "elif root_kl < (1 - tolerance) * target",
            "elif root_kl < target",
        ),
    ],
)
def cppo_update(setting: Setting) -> Iterator[Check]:
    """The step, and the penalty after it."""
    p, rate = replace(LQChain(), noise_slope=0.0, noise_push=0.0), 0.08
    nodes = exploratory_lq.NODES
    after, _, paths = one_update(setting, p, rate)
    want = lq_chain.gradient(lambda theta: lq_chain.performance(p, theta, nodes), THETA)
    yield expectation("first step: the exact gradient", (after - THETA) / rate, want)
    root_kl = mean_root_kl(after, paths)
    moves = {1 / 1.11: 1.5, 1 / 1.09: 1.0, 1 / 0.91: 1.0, 1 / 0.89: 1 / 1.5}
    penalties = [one_update(setting, p, rate, target=root_kl * each)[1] / 0.7 for each in moves]
    yield pathwise("penalty: up, kept, kept, down", penalties, list(moves.values()))
