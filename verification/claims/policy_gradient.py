"""Theorem 4.1 of "Score as Action": the policy gradient, both views of an action.

A scalar exploratory LQ problem with controlled noise, discount and entropy, on an uneven grid. Its
Euler chain has an exact gradient (complex steps through a recursion), and every normal variable of
a path gets Gauss-Hermite nodes, so the estimators' means must equal it to round-off.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import policy_gradient as pg
from verification.claim import Check, Setting, claim, expectation, limit, wrong
from verification.closed_form import lq_chain
from verification.closed_form.lq_chain import THETA, LQChain
from verification.cubature import mean
from verification.exploratory_lq import (
    HORIZON,
    NODES,
    chain_value,
    continuous_value,
    deterministic,
    drawn_paths,
    parameters,
    policy,
    problem,
    silent_paths,
    to_zero,
)

P = LQChain()
# view B: the next state is decided, so the action's std has no part
TRANSITIONS = replace(P, noise_slope=0.0, noise_push=0.0, temperature=0.0)
SILENT = np.array([THETA[0], THETA[1], -40.0])  # a std of 4e-18 is none


def gradient(each: Tensor, paths: ctrl.Paths, theta: list[Tensor]) -> Tensor:
    """The mean of an estimator, as users take it: one backward pass."""
    return torch.stack(torch.autograd.grad(mean(each, paths), theta))


DISCOUNT_IN_RETURN = wrong(
    "discount inside the return missing",
    "ctrl.paths.returns_to_go",
    "-discount * ",
    "-0.0 * ",
)
DISCOUNT_IN_DIFFERENCE = wrong(
    "discount inside the temporal difference missing",
    "ctrl.advantages.temporal_differences",
    "torch.exp(-discount * step_sizes) * values[:, 1:]",
    "values[:, 1:]",
)
OUTER_DISCOUNT = wrong(
    "outer discount missing", "ctrl.value.discount_factors", "-discount * ", "-0.0 * "
)
FIRST_ORDER_DISCOUNT = wrong(
    "1 - discount h for exp(-discount h)",
    "ctrl.advantages.temporal_differences",
    "torch.exp(-discount * step_sizes)",
    "(1 - discount * step_sizes)",
)
TERMINAL = wrong(
    "terminal reward missing",
    "ctrl.paths.returns_to_go",
    "terminal_rewards(problem, paths.states[:, -1])",
    "rewards.new_zeros(len(rewards))",
)
PINNED = wrong(
    "value at the horizon not the terminal reward",
    "ctrl.value.values",
    "if not ends_at_horizon(problem, paths.grid):",
    "if True:",
)
STEP_IN_REWARD = wrong(
    "dt missing in the reward",
    "ctrl.paths.running_rewards",
    "kept_actions(paths))) * steps",
    "kept_actions(paths)))",
)
SCORE_SIGN = wrong(
    "sign of the score",
    "ctrl.policy_gradient._summed",
    "(log_prob * advantages",
    "(-log_prob * advantages",
)
RETURN_FROM_NEXT = wrong(
    "return from the next node on, the step's own reward left out",
    "ctrl.policy_gradient.return_gradient",
    "policy)[:, :-1]",
    "policy)[:, 1:]",
)
LATE_DIFFERENCE = wrong(
    "value of step i for i + 1",
    "ctrl.advantages.temporal_differences",
    "* values[:, 1:]",
    "* values[:, :-1]",
)


@claim(
    statement="""
        grad V(0, x) = E sum e^{-discount t} grad log pi(a_t) A_t, the actions drawn from the policy
        (view A), for A the discounted return to go, with or without V subtracted, for the temporal
        difference dV + (r - temperature log pi - discount V) dt, and for its exponentially
        forgetting sums at any rate: exactly, on any grid, if V is that of the chain. Discount and
        entropy count twice each: outside and inside of A. A gradient in the policy's mean alone
        sees no mistake in the entropy, so the spread is tested too.
        """,
    source='"Score as Action", arXiv 2502.01819, Theorem 4.1, Lemma 2.2; Jia & Zhou 2022, policy '
    "gradient and actor-critic, Theorem 2",
    wrongs=[
        wrong(
            "entropy's sign",
            "ctrl.paths.regularised_rewards",
            "rewards - problem.temperature",
            "rewards + problem.temperature",
        ),
        wrong(
            "entropy dropped",
            "ctrl.paths.regularised_rewards",
            "if not problem.temperature:",
            "if True:",
        ),
        SCORE_SIGN,
        wrong(
            "score divided by s for s^2",
            "ctrl.policy_gradient.DrawnActions.log_prob",
            "_log_probs(policy, paths)",
            "_log_probs(policy, paths) * policy.std_at(paths.grid.nodes[0]).detach()",
        ),
        wrong(
            "score halved",
            "ctrl.policy_gradient.DrawnActions.log_prob",
            "return _log_probs",
            "return 0.5 * _log_probs",
        ),
        wrong(
            "chain rule of log s missing",
            "verification.exploratory_lq.policy",
            "lambda t: log_std.exp()",
            "lambda t: log_std.detach().exp() + log_std - log_std.detach()",
        ),
        wrong(
            "score at the next state",
            "ctrl.policy_gradient.DrawnActions.log_prob",
            "_log_probs(policy, paths)",
            "torch.stack([policy.log_prob(t, paths.states[:, k + 1], paths.actions[:, k]) "
            "for k, t in enumerate(paths.grid.nodes[:-1])], dim=1)",
        ),
        DISCOUNT_IN_RETURN,
        DISCOUNT_IN_DIFFERENCE,
        FIRST_ORDER_DISCOUNT,
        OUTER_DISCOUNT,
        TERMINAL,
        PINNED,
        STEP_IN_REWARD,
        LATE_DIFFERENCE,
        wrong(
            "baseline depends on the action",
            "ctrl.policy_gradient.return_gradient",
            "problem, paths)[:, :-1]",
            "problem, paths)[:, :-1] * kept_actions(paths)[..., 0]",
        ),
        wrong(
            "baseline of the next node, which depends on the action",
            "ctrl.policy_gradient.return_gradient",
            "problem, paths)[:, :-1]",
            "problem, paths)[:, 1:]",
        ),
        RETURN_FROM_NEXT,
        wrong(
            "gradient flows into the advantage",
            "ctrl.policy_gradient._summed",
            "advantages.detach()",
            "advantages",
        ),
        wrong(
            "mean over steps instead of the sum",
            "ctrl.policy_gradient._summed",
            ".sum(1)",
            ".mean(1)",
        ),
        wrong(
            "the chain's value off by 1 %",
            "verification.exploratory_lq.chain_value",
            "square * x.square() / 2",
            "1.01 * square * x.square() / 2",
        ),
    ],
)
def policy_gradient(setting: Setting) -> Iterator[Check]:
    """Returns and temporal differences of drawn actions, against the chain's exact gradient."""
    theta = parameters(setting, THETA)
    stated, chosen = problem(P), policy(*theta)
    value = chain_value(setting, P, THETA, NODES)
    paths = drawn_paths(setting, P, theta, NODES)
    backward = lq_chain.gradient(lambda th: lq_chain.performance(P, th, NODES), THETA)
    forward = lq_chain.gradient(lambda th: lq_chain.forward_performance(P, th, NODES), THETA)
    slope = gradient(pg.return_gradient(stated, chosen, paths), paths, theta)
    yield expectation("return, against the derivative of a backward recursion", slope, backward)
    yield expectation("return, against the derivative of the states' moments", slope, forward)
    each = pg.return_gradient(stated, chosen, paths, value)
    yield expectation("return less V", gradient(each, paths, theta), backward)
    each = pg.temporal_difference_gradient(stated, chosen, value, paths)
    yield expectation("temporal difference", gradient(each, paths, theta), backward)
    each = pg.temporal_difference_gradient(stated, chosen, value, paths, rate=1.3)
    yield expectation(
        "temporal differences, forgotten slowly", gradient(each, paths, theta), forward
    )


@claim(
    statement="""
        grad V(0, x) = E int e^{-discount t} grad log pi(a_t) (q - temperature log pi) dt
        = E int e^{-discount t} (d a / d theta)' grad_a (q - temperature log pi) dt
        with q = L^a V + r - discount V. On a grid both sums are, for any value function, moments
        of the states times Stein's identities, exactly; with V of the continuous-time problem they
        tend to its gradient, and are biased by O(h) before.
        """,
    source='"Score as Action", arXiv 2502.01819, Theorem 4.1; Jia & Zhou 2022, policy gradient and '
    "actor-critic, Theorem 2",
    wrongs=[
        wrong(
            "entropy's sign",
            "ctrl.policy_gradient._regularised_q",
            "return q - problem.temperature",
            "return q + problem.temperature",
        ),
        wrong(
            "entropy dropped",
            "ctrl.policy_gradient._regularised_q",
            "if not problem.temperature:",
            "if True:",
        ),
        wrong(
            "entropy dropped in the pathwise form",
            "ctrl.policy_gradient.pathwise_gradient",
            "if problem.temperature:",
            "if False:",
        ),
        SCORE_SIGN,
        wrong(
            "score halved",
            "ctrl.policy_gradient.DrawnActions.log_prob",
            "return _log_probs",
            "return 0.5 * _log_probs",
        ),
        wrong(
            "second-order term of q missing",
            "ctrl.value.generator",
            "along_drift + 0.5 * trace",
            "along_drift",
        ),
        wrong(
            "second-order term of q without 1/2",
            "ctrl.value.generator",
            "0.5 * trace",
            "trace",
        ),
        wrong(
            "value of step i + 1 for i",
            "ctrl.paths.over_steps",
            "paths.grid.nodes[..., :-1]",
            "paths.grid.nodes[..., 1:]",
        ),
        wrong(
            "state at the right end of a step",
            "ctrl.paths.over_steps",
            "paths.states[:, :-1]",
            "paths.states[:, 1:]",
        ),
        wrong(
            "running reward left out of q",
            "ctrl.q_learning.q_rate",
            "rate = rate + one_a_path",
            "rate = rate + 0 * one_a_path",
        ),
        OUTER_DISCOUNT,
        wrong(
            "dt missing",
            "ctrl.policy_gradient.DrawnActions.advantages",
            "return rates * as_like(paths.grid.steps, rates)",
            "return rates",
        ),
        wrong(
            "noise of the action not held in the pathwise form",
            "ctrl.policy_gradient._reparametrised",
            "return policy.act(mean, t, noise, x)",
            "return mean + 0 * policy.act(mean, t, noise, x)",
        ),
        wrong(
            "diffusion of an average action, so that q is linear in the action",
            "ctrl.value._columns",
            "sde.diffusion_at(t, states, actions)",
            "sde.diffusion_at(t, states, actions.mean(0).expand_as(actions))",
        ),
    ],
)
def policy_gradient_with_q_rates(setting: Setting) -> Iterator[Check]:
    """q-rates and their derivative in the action, on a grid and in the limit."""
    theta = parameters(setting, THETA)
    stated, chosen = problem(P), policy(*theta)
    value, series = continuous_value(setting, P, THETA), lq_chain.value_series(P, THETA)

    def by_ratio(nodes: np.ndarray) -> Tensor:
        paths = drawn_paths(setting, P, theta, nodes)
        each = pg.q_rate_gradient(stated, chosen, value, paths)
        return gradient(each, paths, theta)

    along = np.array([lq_chain.series_at(series, HORIZON - t) for t in NODES])
    exact = lq_chain.q_rate_gradient(P, THETA, NODES, along)
    yield expectation("q-rates on a grid, against Stein's identities", by_ratio(NODES), exact)
    paths = drawn_paths(setting, P, theta, NODES)
    by_path = gradient(pg.pathwise_gradient(stated, chosen, value, paths), paths, theta)
    yield expectation("pathwise form on a grid, against Stein's identities", by_path, exact)
    true = lq_chain.gradient(lambda th: lq_chain.continuous_performance(P, th, HORIZON), THETA)
    finer = [by_ratio(np.linspace(0, HORIZON, steps + 1)) for steps in (1, 2, 3)]
    yield limit("q-rates, steps to 0: the continuous gradient", to_zero(*finer), true)


@claim(
    statement="""
        Where the next state is the decision (view B), the gradient of the deterministic policy's
        chain is E sum e^{-discount t} (grad log p(X_{k+1}|X_k) A_k + h grad_a r d mu / d theta),
        with A the return to go, the temporal difference, or (in the limit) grad V . (X_{k+1} -
        E X_{k+1}): a running reward of the action itself has a slope of its own, whatever the next
        state is.
        """,
    source='"Score as Action", arXiv 2502.01819, Theorem 4.1, with the decisions of its algorithm '
    "(the transitions of DDPO)",
    wrongs=[
        SCORE_SIGN,
        DISCOUNT_IN_RETURN,
        DISCOUNT_IN_DIFFERENCE,
        OUTER_DISCOUNT,
        TERMINAL,
        STEP_IN_REWARD,
        LATE_DIFFERENCE,
        wrong(
            "factor 1/2 of the normal density dropped",
            "ctrl.transitions.log_prob",
            "0.5 * z.square()",
            "z.square()",
        ),
        wrong(
            "divided by s for s^2",
            "ctrl.transitions.log_prob",
            "0.5 * z.square()",
            "0.5 * z.square() * std",
        ),
        wrong(
            "transition of the step after",
            "ctrl.transitions._laws",
            "in enumerate(paths.states[:, :-1]",
            "in enumerate(paths.states[:, 1:]",
        ),
        wrong(
            "sqrt(h) missing in the transition",
            "ctrl.solvers.EulerMaruyama.transition",
            "sigma.abs() * math.sqrt(h)",
            "sigma.abs()",
        ),
        wrong(
            "last transition left out",
            "ctrl.policy_gradient._summed",
            "(log_prob * advantages.detach() + held)).sum(1)",
            "(log_prob * advantages.detach() + held))[:, :-1].sum(1)",
        ),
        wrong(
            "slope of V at the next state",
            "ctrl.policy_gradient.Transitions.advantages",
            "_directional(value, t, x, surprise)",
            "_directional(value, t, paths.states[:, k + 1], surprise)",
        ),
        wrong(
            "increment not centred, and V at the next time",
            "ctrl.policy_gradient.Transitions.advantages",
            "_directional(value, t, x, surprise)",
            "_directional(value, nodes[k + 1].to(x), x, surprise)",
        ),
        wrong(
            "surprise of twice the size",
            "ctrl.policy_gradient.Transitions.advantages",
            "after[k] - mean",
            "2 * (after[k] - mean)",
        ),
        wrong(
            "the action's own slope dropped",
            "ctrl.policy_gradient._summed",
            "+ held",
            "",
        ),
        wrong(
            "the action's own slope without dt",
            "ctrl.policy_gradient.Transitions.held_rewards",
            "return rates * as_like(paths.grid.steps, rates)",
            "return rates",
        ),
        wrong(
            "the action's own slope not discounted",
            "ctrl.policy_gradient._summed",
            "discount_factors(problem, paths) * (log_prob * advantages.detach() + held)",
            "discount_factors(problem, paths) * log_prob * advantages.detach() + held",
        ),
        wrong(
            "the action's own slope of a fixed action",
            "ctrl.policy_gradient.Transitions.held_rewards",
            "reward(t, x, again)",
            "reward(t, x, a)",
        ),
    ],
)
def policy_gradient_of_transitions(setting: Setting) -> Iterator[Check]:
    """All estimators of view B, on a chain of three steps."""
    p, theta = TRANSITIONS, parameters(setting, THETA)[:2]
    stated, chosen = problem(p), deterministic(*theta)
    value = chain_value(setting, p, SILENT, NODES)
    paths, view = silent_paths(setting, p, theta, NODES), pg.Transitions(ctrl.EulerMaruyama())
    exact = lq_chain.gradient(lambda th: _silent_performance(p, th), SILENT[:2])
    each = pg.return_gradient(stated, chosen, paths, decisions=view)
    yield expectation("return", gradient(each, paths, theta), exact)
    each = pg.return_gradient(stated, chosen, paths, value, view)
    yield expectation("return less V", gradient(each, paths, theta), exact)
    each = pg.temporal_difference_gradient(stated, chosen, value, paths, view)
    yield expectation("temporal difference", gradient(each, paths, theta), exact)
    smooth, series = continuous_value(setting, p, SILENT), lq_chain.value_series(p, SILENT)
    along = np.array([lq_chain.series_at(series, HORIZON - t) for t in NODES])
    slopes = lq_chain.transition_gradient(p, SILENT, NODES, along)
    each = pg.q_rate_gradient(stated, chosen, smooth, paths, view)
    slopes = slopes + lq_chain.own_slope(p, SILENT, NODES)
    yield expectation("q-rates on a grid", gradient(each, paths, theta), slopes)


def _silent_performance(p: LQChain, theta: np.ndarray) -> float | complex:
    return lq_chain.performance(p, np.array([*theta, SILENT[2]]), NODES)
