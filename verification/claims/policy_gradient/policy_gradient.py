"""Theorem 4.1: the policy gradient by returns and temporal differences, exactly.

grad V(0, x) = E sum e^{-discount t} grad log pi(a_t) A_t, the actions drawn from the policy
(view A), for A the discounted return to go, with or without V subtracted, for the temporal
difference dV + (r - temperature log pi - discount V) dt, and for its exponentially
forgetting sums at any rate: exactly, on any grid, if V is that of the chain. Discount and
entropy count twice each: outside and inside of A. A gradient in the policy's mean alone
sees no mistake in the entropy, so the spread is tested too.
"""

from collections.abc import Iterator

from ctrl import policy_gradient as pg
from verification.claim import Check, Setting, expectation
from verification.closed_form import complex_steps, lq_chain
from verification.closed_form.lq_chain import THETA
from verification.problems.exploratory_lq import (
    NODES,
    chain_value,
    drawn_paths,
    parameters,
    policy,
    problem,
)
from verification.problems.policy_gradient import P, gradient

SOURCE = (
    '"Score as Action", arXiv 2502.01819, Theorem 4.1, Lemma 2.2; Jia & Zhou 2022, policy '
    "gradient and actor-critic, Theorem 2"
)


def checks(setting: Setting) -> Iterator[Check]:
    """Returns and temporal differences of drawn actions, against the chain's exact gradient."""
    theta = parameters(setting, THETA)
    stated, chosen = problem(P), policy(*theta)
    value = chain_value(setting, P, THETA, NODES)
    paths = drawn_paths(setting, P, theta, NODES)
    backward = complex_steps.gradient(lambda th: lq_chain.performance(P, th, NODES), THETA)
    forward = complex_steps.gradient(lambda th: lq_chain.forward_performance(P, th, NODES), THETA)
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


MISTAKES = """
ctrl.returns.regularised_rewards
    entropy dropped | if not problem.temperature: => if True:
ctrl.policy_gradient.DrawnActions.log_prob
    score divided by s for s^2 | _log_probs(policy, paths)
        => _log_probs(policy, paths) * policy.std_at(paths.grid.nodes[0]).detach()
    score at the next state | _log_probs(policy, paths)
        => torch.stack([policy.log_prob(t, paths.states[:, k + 1], paths.actions[:, k]) for k, t in enumerate(paths.grid.nodes[:-1])], dim=1)
ctrl.advantages.temporal_differences
    1 - discount h for exp(-discount h) | torch.exp(-discount * step_sizes) => (1 - discount * step_sizes)
ctrl.value.values
    value at the horizon not the terminal reward | if not ends_at_horizon(problem, paths.grid): => if True:
ctrl.policy_gradient.return_gradient
    baseline depends on the action | problem, paths)[:, :-1] => problem, paths)[:, :-1] * kept_actions(paths)[..., 0]
    baseline of the next node, which depends on the action | problem, paths)[:, :-1] => problem, paths)[:, 1:]
    return from the next node on, the step's own reward left out | policy)[:, :-1] => policy)[:, 1:]
ctrl.policy_gradient._summed
    gradient flows into the advantage | advantages.detach() => advantages
    mean over steps instead of the sum | .sum(1) => .mean(1)
verification.problems.exploratory_lq.chain_value
    the chain's value off by 1 % | square * x.square() / 2 => 1.01 * square * x.square() / 2
shared
    entropy's sign
    sign of the score
    score halved
    chain rule of log s missing
    discount inside the return missing
    discount inside the temporal difference missing
    outer discount missing
    terminal reward missing
    dt missing in the reward
    value of step i for i + 1
"""
