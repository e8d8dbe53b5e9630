"""What is an action: a drawn score (view A), or the next state (view B)? Each has its own KL.

Five KLs: of paths, terminal laws, initial laws, policies (view A, a score drawn with
standard deviation sa) and transitions (view B). A transition's is g^2 h sa^2 times the
policy's; they coincide where sa^2 = 1 / (g^2 h). Summed over steps the transitions' tend to
the path KL, the policies' grow like the number of steps: they are the KL of states and
actions together, of which the states see g^2 h |d mu|^2 / (2 (1 + g^2 h sa^2)) per step. A
fixed trust region on a policy KL is not one on paths.

Per step of length h, with the same mean scores,
    view A      KL of the drawn scores      |d mu|^2 / (2 sa^2)           order 1: adds up to N
    view B      KL of the transitions       g^2 h |d mu|^2 / 2            order h: adds up to a KL
so the path KL's rate is g^2 sa^2 times that of the policies, per step and not per unit of time.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl.paths import over_steps
from diffusion_envs.denoising import generation_sde
from diffusion_envs.noise_schedules import VPLinear
from verification.claim import Check, Setting, bound, expectation, limit, pathwise
from verification.closed_form import scores_drawn as closed
from verification.closed_form.gaussian_law import Normal, kl
from verification.closed_form.score_chains import BETA, alpha_bar, beta
from verification.cubature import mean

SOURCE = '"Score as Action", arXiv 2502.01819, section 3; DDPO, arXiv 2305.13301 (view B)'

NODES = (0.0, 0.4, 0.65)
SCHEDULE = VPLinear(*BETA)
CONSTANT = 0.45  # a shift of the score that does not depend on the state


def sde() -> ctrl.ControlledSDE:
    """The generation SDE, whose action is the score."""
    return generation_sde(SCHEDULE)


def score(t: Tensor, x: Tensor) -> Tensor:
    """Mean score of the policy."""
    return closed.SCORE[0] * x + closed.SCORE[1]


def reference(t: Tensor, x: Tensor) -> Tensor:
    """Mean score of the reference."""
    return closed.REFERENCE[0] * x + closed.REFERENCE[1]


def rate(g2: float, h: float, std: float) -> float:
    """KL of a transition over that of the drawn score."""
    return g2 * h * std**2


def matching_std(t: Tensor) -> float:
    """At which both views have one KL, on the grid of NODES."""
    k = int(np.abs(np.array(NODES) - float(t)).argmin())
    return 1 / math.sqrt(beta(1 - NODES[k]) * (NODES[k + 1] - NODES[k]))


def policy_kls(paths: ctrl.Paths, std: float | Callable[[Tensor], float]) -> Tensor:
    """KL of the drawn scores at the left end of every step, [paths, steps]."""
    one, other = ctrl.GaussianPolicy(score, std), ctrl.GaussianPolicy(reference, std)
    each = [
        ctrl.policy_kl(one, other, t, x)
        for t, x in zip(paths.grid.nodes[:-1], paths.states[:, :-1].unbind(1), strict=True)
    ]
    return torch.stack(each, dim=1)


def transition_kls(paths: ctrl.Paths, policy: Callable[[Tensor, Tensor], Tensor] = score) -> Tensor:
    """KL of the transitions of Euler-Maruyama, [paths, steps]."""
    policies = ctrl.DeterministicPolicy(policy), ctrl.DeterministicPolicy(reference)
    return ctrl.transitions.transition_kl(sde(), ctrl.EulerMaruyama(), *policies, paths)


def rolled_out(setting: Setting) -> ctrl.Paths:
    """Quadrature paths with drawn scores: the start, two increments and two draws."""
    nodes = setting.tensor(NODES)
    widths = torch.cat([nodes.new_ones(1), nodes.diff()])
    both = ctrl.noise.gauss_hermite(widths, nodes=3, noise=(2,))
    assert both.increments is not None
    begin = setting.tensor(float(closed.START.covariance[0, 0])).sqrt()
    start = float(closed.START.mean[0]) + begin * both.increments[:, 0, :1]
    drawn = both.increments[:, 1:, 1:] / nodes.diff().sqrt()[:, None]
    # the first pair's second variable is not needed: its weights sum to 1
    noise = ctrl.Noise(both.increments[:, 1:, :1], drawn, both.weights)
    policy = ctrl.GaussianPolicy(score, closed.STD)
    return ctrl.simulate(
        ctrl.ControlProblem(sde(), 1.0), policy, start, ctrl.TimeGrid(nodes), noise=noise
    )


def log_ratio_refused(paths: ctrl.Paths) -> bool:
    """Whether W alone is refused as what determines a path with drawn scores."""
    policies = ctrl.GaussianPolicy(score, closed.STD), ctrl.GaussianPolicy(reference, closed.STD)
    try:
        ctrl.girsanov.log_ratio(sde(), *policies, paths)
    except ValueError as error:
        return "deterministic" in str(error)
    return False


def of_transitions(paths: ctrl.Paths) -> Tensor:
    """The transitions' KLs along every path."""
    return transition_kls(paths).sum(1)


def log_density(policy: ctrl.GaussianPolicy, paths: ctrl.Paths) -> Tensor:
    """log pi of the actions along every path."""
    assert paths.actions is not None
    return over_steps(policy.log_prob, paths, paths.actions).sum(1)


def shifted(t: Tensor, x: Tensor) -> Tensor:
    """The reference's score and a constant."""
    return reference(t, x) + CONSTANT


def summed(setting: Setting, steps: int) -> tuple[float, float]:
    """Over even steps: the transitions' KLs and the policies', of a constant shift."""
    even = ctrl.uniform_grid(1.0, steps, dtype=setting.dtype, device=setting.device)
    paths = ctrl.Paths(setting.tensor([[[0.3]] * (steps + 1)]), None, None, even)
    one, other = (
        ctrl.GaussianPolicy(shifted, closed.STD),
        ctrl.GaussianPolicy(reference, closed.STD),
    )
    drawn = sum(
        float(ctrl.policy_kl(one, other, t, paths.states[:, 0])[0]) for t in even.nodes[:-1]
    )
    return float(transition_kls(paths, shifted).sum()), drawn


def checks(setting: Setting) -> Iterator[Check]:
    """Exact on quadrature paths with drawn scores; a limit for the path KL."""
    nodes = np.array(NODES)
    paths = rolled_out(setting)
    steps = np.diff(nodes)
    of_steps = transition_kls(paths)
    rates = setting.tensor(
        [rate(beta(1 - t), h, closed.STD) for t, h in zip(NODES, steps, strict=False)]
    )
    of_policies = policy_kls(paths, closed.STD)
    yield pathwise(
        "KL of a transition, from that of the drawn score", of_steps, rates * of_policies
    )
    yield pathwise("both, where sa^2 = 1 / (g^2 h)", of_steps, policy_kls(paths, matching_std))
    path = ctrl.girsanov.path_kl(
        sde(), ctrl.GaussianPolicy(score, 0.6), ctrl.GaussianPolicy(reference, 0.6), paths
    )
    yield pathwise("path KL of the mean scores, from the transitions'", path, of_transitions(paths))

    squares = closed.shift_squares(nodes)
    joint = squares.sum() / (2 * closed.STD**2)
    yield expectation(
        "KL of states and actions, by the policies", mean(of_policies.sum(1), paths), joint
    )
    one, other = ctrl.GaussianPolicy(score, closed.STD), ctrl.GaussianPolicy(reference, closed.STD)
    drawn = log_density(one, paths) - log_density(other, paths)
    yield expectation("KL of states and actions, by their densities", mean(drawn, paths), joint)
    seen = mean((of_steps / (1 + rates)).sum(1), paths)
    yield expectation("KL of the states alone", seen, closed.states_kl(nodes))
    yield bound(
        "KL of the states <= transitions' KLs",
        [closed.states_kl(nodes)],
        mean(of_transitions(paths), paths)[None],
    )
    yield expectation("the log-ratio from W alone, refused", float(log_ratio_refused(paths)), 1.0)

    t, x = setting.tensor(0.3), setting.tensor([[0.7]])
    wide = ctrl.policy_kl(
        ctrl.GaussianPolicy(score, 0.6), ctrl.GaussianPolicy(reference, 0.9), t, x
    )
    means = [slope * 0.7 + constant for slope, constant in (closed.SCORE, closed.REFERENCE)]
    laws = zip(means, (0.6, 0.9), strict=True)
    exact = kl(*(Normal(np.array([mean]), np.array([[std**2]])) for mean, std in laws))
    yield expectation("policy KL, different spreads", wide[0], exact)

    grids = (8, 16, 32, 64)
    sums, drawn_sums = zip(*[summed(setting, n) for n in grids], strict=True)
    # the KL of a shift held constant is its square over 2 sa^2 at every step
    held = CONSTANT**2 / (2 * closed.STD**2)
    yield expectation("policy KLs of N steps, over N", np.array(drawn_sums) / grids, [held] * 4)
    tail = [float(one) for one in sums]
    exact = 0.5 * CONSTANT**2 * -np.log(alpha_bar(1.0))
    curve = [(1 / n, one - exact) for n, one in zip(grids, tail, strict=True)]
    for order in (1, 2, 3):
        tail = [(2**order * b - a) / (2**order - 1) for a, b in itertools.pairwise(tail)]
    yield limit("transitions' KLs, extrapolated: the path KL", tail[0], exact, curve=curve)


MISTAKES = """
verification.claims.policy_gradient.policy_and_transition_kl.rate
    standard deviation for variance in the rate | std**2 => std
verification.claims.policy_gradient.policy_and_transition_kl.matching_std
    the views coincide at sa = 1 / (g^2 h) | 1 / math.sqrt(beta(1 - NODES[k]) * (NODES[k + 1] - NODES[k]))
        => 1 / (beta(1 - NODES[k]) * (NODES[k + 1] - NODES[k]))
ctrl.solvers.EulerMaruyama.transition
    transition's KL without its step | sigma.abs() * math.sqrt(h) => sigma.abs() * h
diffusion_envs.denoising.generation_sde
    score's part of the drift without g^2 | * schedule.g2(s) * score => * score
verification.closed_form.scores_drawn.states
    drawn scores add no variance to the states | ` + (b * h * STD) ** 2` => ``
ctrl.girsanov.log_ratio
    random policies not refused in the log-ratio | if first.is_random: => if False:
verification.claims.policy_gradient.policy_and_transition_kl.of_transitions
    bound of the states' KL halved | return transition_kls(paths).sum(1) => return 0.5 * transition_kls(paths).sum(1)
shared
    transition's KL without 1/2
    diffusion g^2 for g
    KL of the policies in the other direction
    variance for standard deviation in the density
    variance for standard deviation
    factor 1/2 dropped
    states at the right end of a step
"""
