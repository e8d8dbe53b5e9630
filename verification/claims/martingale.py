"""The martingale characterisation of values (Jia & Zhou 2022a), on chains with a known value.

The Euler chain of an exploratory linear-quadratic problem has an exact value, by backward
recursion. Along its paths the conditions of Propositions 1 and 2 hold exactly, at any step size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

import ctrl
from ctrl import martingale as mg
from ctrl.paths import kept_actions
from ctrl.value import Value
from verification.claim import Check, Setting, claim, expectation, pathwise, wrong
from verification.closed_form import exploratory_chain as exact
from verification.cubature import degree_five, mean
from verification.problems import HORIZON, NODES

C, POLICY = exact.ExploratoryChain(), exact.Feedback()
ERROR = Polynomial([0.3, -0.2, 0.15])  # of a value that is wrong
NAMES = ("1", "x", "x^2", "x eps", "eps^2 - 1")


def problem() -> ctrl.ControlProblem:
    """The exploratory linear-quadratic problem."""
    sde = ctrl.ControlledSDE(lambda t, x, a: C.drift * x + C.control * a, lambda t, x: C.noise)
    return ctrl.ControlProblem(
        sde,
        HORIZON,
        lambda t, x, a: -0.5 * (C.state_cost * x[:, 0] ** 2 + C.action_cost * a[:, 0] ** 2),
        lambda x: C.terminal_slope * x[:, 0] - 0.5 * C.terminal_cost * x[:, 0] ** 2,
        C.discount,
        C.temperature,
    )


def gaussian(policy: exact.Feedback) -> ctrl.GaussianPolicy:
    """The policy as a user would write it."""
    return ctrl.GaussianPolicy(lambda t, x: policy.gain * x + policy.offset, policy.std)


def sampled(
    setting: Setting, policy: exact.Feedback = POLICY, times: Sequence[float] = NODES
) -> ctrl.Paths:
    """Paths whose weighted means are expectations, of polynomials up to degree 5."""
    grid = ctrl.TimeGrid(setting.tensor(times))
    start, noise = degree_five(grid, C.mean, C.std, draws=True)
    return ctrl.simulate(problem(), gaussian(policy), start, grid, noise=noise)


def exact_value(setting: Setting, times: Sequence[float] = NODES) -> Value:
    """V at the nodes before the end; what J(T, .) is should not matter."""
    along = exact.values(C, POLICY, np.array(times))
    table = setting.tensor(np.array([v.coef for v in along]))
    table[-1] += 0.2
    nodes = setting.tensor(times)

    def value(t: Tensor, x: Tensor) -> Tensor:
        constant, slope, curvature = table[(nodes - t).abs().argmin()]
        return constant + slope * x[:, 0] + curvature * x[:, 0] ** 2

    return value


def basis(paths: ctrl.Paths) -> Tensor:
    """1, x, x^2, x eps, eps^2 - 1, eps the noise of the action before: the past alone."""
    x, a = paths.states[:, :-1, 0], kept_actions(paths)[..., 0]
    eps = (a - POLICY.gain * x - POLICY.offset) / POLICY.std
    first = torch.zeros_like(x[:, :1])
    before = torch.cat([first, eps[:, :-1]], dim=1)
    squares = torch.cat([first, eps[:, :-1] ** 2 - 1], dim=1)
    return torch.stack([torch.ones_like(x), x, x**2, x * before, squares], dim=2)


def discounts(paths: ctrl.Paths) -> Tensor:
    """e^{-discount t} at the left end of every step."""
    return torch.exp(-C.discount * paths.grid.nodes[:-1])


def earned(paths: ctrl.Paths) -> Tensor:
    """Discounted reward, entropy and terminal reward of every path, written out."""
    x, a, last = paths.states[:, :-1, 0], kept_actions(paths)[..., 0], paths.states[:, -1, 0]
    eps = (a - POLICY.gain * x - POLICY.offset) / POLICY.std
    log_prob = -0.5 * eps**2 - np.log(POLICY.std * np.sqrt(2 * np.pi))
    rate = -0.5 * (C.state_cost * x**2 + C.action_cost * a**2) - C.temperature * log_prob
    terminal = C.terminal_slope * last - 0.5 * C.terminal_cost * last**2
    running = (discounts(paths) * rate * paths.grid.nodes.diff()).sum(1)
    return running + np.exp(-C.discount * HORIZON) * terminal


def is_refused(call: Callable[[], object]) -> float:
    """1 if the library refuses it, else 0."""
    try:
        call()
    except ValueError:
        return 1.0
    except RuntimeError:  # a singular system, found too late
        return 0.0
    return 0.0


STEP, STEPS = 0.3, 3  # without a horizon values do not depend on time where steps are equal
ENDLESS = replace(problem(), horizon=math.inf, terminal_reward=None)
ERGODIC = replace(ENDLESS, discount=0.0)


@claim(
    statement="""
        J is the value of the policy if and only if E int e^{-discount t} xi dM = 0 for all adapted
        xi, dM = e^{-discount h} J(t + h, X') - J(t, X) + (r - temperature log pi) h, with J(T, .)
        the terminal reward. Of 1, x, x^2, x eps, eps^2 - 1 (eps: the noise of the action before)
        the last sees only what changes J's curvature in x: neither an offset nor any mistake about
        the entropy; the others see all. A zero is no scale: a discount of the test functions that
        is missing is seen by none, so the moments of a wrong J are checked for their size too. It
        is false that any xi will do: X(t + h) gives -0.028 for the true value here, 24 % of it, and
        the step's own action gives what the policy gradient is made of.
        """,
    source="Jia & Zhou 2022a, JMLR 23, Propositions 1 and 2",
    wrongs=[
        wrong(
            "curvature of V + 1 %",
            "verification.claims.martingale.exact_value",
            "+ curvature * ",
            "+ 1.01 * curvature * ",
        ),
        wrong(
            "V off by 0.01",
            "verification.claims.martingale.exact_value",
            "return constant +",
            "return 0.01 + constant +",
        ),
        wrong(
            "discount missing",
            "ctrl.value.martingale_increments",
            "-discount * h",
            "-0.0 * h",
        ),
        wrong(
            "discount doubled",
            "ctrl.value.martingale_increments",
            "-discount * h",
            "-2 * discount * h",
        ),
        wrong(
            "1 - discount h for exp(-discount h)",
            "ctrl.value.martingale_increments",
            "torch.exp(-discount * h)",
            "1 - discount * h",
        ),
        wrong(
            "reward discounted over its own step",
            "ctrl.value.martingale_increments",
            "+ rewards -",
            "+ keep * rewards -",
        ),
        wrong(
            "entropy's sign",
            "ctrl.paths.regularised_rewards",
            "rewards - problem.temperature",
            "rewards + problem.temperature",
        ),
        wrong(
            "entropy missing",
            "ctrl.paths.regularised_rewards",
            "rewards - problem.temperature",
            "rewards - 0 * problem.temperature",
        ),
        wrong(
            "entropy's dt missing",
            "ctrl.paths.regularised_rewards",
            "* log_prob * as_like(paths.grid.steps, rewards)",
            "* log_prob",
        ),
        wrong(
            "reward of the next step",
            "ctrl.paths.running_rewards",
            "over_steps(rate, paths, kept_actions(paths))",
            "over_steps(rate, paths, kept_actions(paths)).roll(-1, 1)",
        ),
        wrong(
            "sqrt(dt) for dt in the reward",
            "ctrl.paths.running_rewards",
            "kept_actions(paths))) * steps",
            "kept_actions(paths))) * steps.sqrt()",
        ),
        wrong(
            "uneven grid taken for an even one, in the reward",
            "ctrl.paths.running_rewards",
            "steps = as_like(paths.grid.steps, paths.states)",
            "steps = as_like(paths.grid.steps, paths.states).mean().expand("
            "paths.states.shape[1] - 1)",
        ),
        wrong(
            "uneven grid taken for an even one, in the discount",
            "ctrl.value.martingale_increments",
            "h = as_like(paths.grid.steps, along)",
            "h = as_like(paths.grid.steps, along).mean().expand(along.shape[1] - 1)",
        ),
        wrong(
            "V not pinned to the terminal reward",
            "ctrl.value.values",
            "if not ends_at_horizon(problem, paths.grid)",
            "if True",
        ),
        wrong(
            "terminal reward of the state before the end",
            "ctrl.value.values",
            "paths.states[:, -1])",
            "paths.states[:, -2])",
        ),
        wrong(
            "paths of another policy, with this policy's formula",
            "verification.claims.martingale.sampled",
            "problem(), gaussian(policy), start",
            "problem(), gaussian(exact.Feedback(0.5, -0.3, 0.9)), start",
        ),
        wrong(
            "discount of test functions missing",
            "ctrl.martingale.moments",
            "discount_factors(problem, paths) * increments",
            "increments",
        ),
        wrong(
            "discount of test functions one step late",
            "ctrl.value.discount_factors",
            "nodes = paths.grid.nodes[..., :-1]",
            "nodes = paths.grid.nodes[..., 1:]",
        ),
        wrong(
            "test functions at the right end of a step",
            "ctrl.martingale.features_along",
            "[:, :-1]",
            "[:, 1:]",
            raises=ValueError,
        ),
        wrong(
            "test functions see their own step's action",
            "verification.claims.martingale.basis",
            "before = torch.cat([first, eps[:, :-1]], dim=1)",
            "before = eps",
            raises=ValueError,
        ),
        wrong(
            "whether test functions look ahead is not asked",
            "ctrl.martingale.require_adapted",
            "if bool(changed.any())",
            "if False",
        ),
        wrong(
            "the action of the step counts as its past",
            "ctrl.martingale.orthogonality",
            "sees_action=False",
            "sees_action=True",
        ),
    ],
)
def martingale_characterisation(setting: Setting) -> Iterator[Check]:
    """Propositions 1 and 2: zero for the true value, known sizes for a wrong one."""
    paths, value, policy = sampled(setting), exact_value(setting), gaussian(POLICY)
    nodes, size = np.array(NODES), abs(exact.values(C, POLICY, np.array(NODES))[0](C.mean))
    moments = mean(mg.orthogonality(basis, value, problem(), paths, policy), paths)
    for name, moment in zip(NAMES, moments, strict=True):
        yield expectation(f"E int xi dM = 0, xi = {name}", moment, 0.0, size)
    state = mg.features_along(lambda t, x: torch.cat([x**0, x, x**2], dim=1))
    again = mean(mg.orthogonality(state, value, problem(), paths, policy), paths)
    yield expectation("E int xi dM = 0, xi of (t, x) by features_along", again, [0.0] * 3, size)

    def off(t: Tensor, x: Tensor) -> Tensor:
        """The true value plus an error."""
        c = setting.tensor(ERROR.coef)
        return value(t, x) + c[0] + c[1] * x[:, 0] + c[2] * x[:, 0] ** 2

    orthogonality = mean(mg.orthogonality(basis, off, problem(), paths, policy), paths)
    known = exact.moments_of_a_wrong_value(C, POLICY, nodes, ERROR)
    yield expectation("E int xi dM of a wrong value has its known size", orthogonality, known)
    # whatever J is, M_T - M_0 is what was earned less J(0, X_0)
    dm = mg.increments(off, problem(), paths, policy)
    whole = mg.moments(state, dm, problem(), paths, sees_action=False)[:, 0]
    left = earned(paths) - off(paths.grid.nodes[0], paths.states[:, 0])
    yield pathwise("M_T - M_0, against what was earned, on every path", whole, left)
    # what is not adapted: refused, and for a reason
    ahead = mg.increments(value, problem(), paths, policy) * paths.states[:, 1:, 0]
    anticipating = mean((discounts(paths) * ahead).sum(1), paths)
    known = exact.look_ahead(C, POLICY, nodes)
    yield expectation("E int xi dM of the true value, xi = X(t + h), is not 0", anticipating, known)
    tries = [lambda p: p.states[:, 1:], lambda p: p.actions, lambda p: p.increments]
    answers = [
        is_refused(lambda xi=xi: mg.orthogonality(xi, value, problem(), paths, policy))
        for xi in [*tries, basis]
    ]
    yield expectation("what is not adapted is refused", answers, [1.0, 1.0, 1.0, 0.0])


def stationary_value(setting: Setting, discount: float) -> tuple[Polynomial, Value, float]:
    """V of equal steps for ever, the same for the library, and the average reward."""
    along, average = exact.stationary(C, POLICY, STEP, discount)
    constant, slope, curvature = setting.tensor(along.coef)
    return along, lambda t, x: constant + slope * x[:, 0] + curvature * x[:, 0] ** 2, average


def root(loss: Callable[[Value], Tensor], phi: mg.Features, paths: ctrl.Paths) -> Tensor:
    """Coefficients of these features at which the mean gradient, affine in them, vanishes."""

    def gradient(theta: Tensor) -> Tensor:
        theta = theta.requires_grad_()
        return torch.autograd.grad(mean(loss(mg.LinearValue(phi, theta)), paths), theta)[0]

    unit = torch.eye(phi(paths.grid.nodes[0], paths.states[:, 0]).shape[1]).to(paths.states)
    offset = gradient(torch.zeros_like(unit[0]))
    slope = torch.stack([gradient(one) - offset for one in unit.unbind()], dim=1)
    return torch.linalg.lstsq(slope, -offset[:, None]).solution[:, 0]  # singular where wrong


def quadratic(t: Tensor, x: Tensor) -> Tensor:
    """Features without the constant, which an average leaves undetermined."""
    return torch.cat([x, x**2], dim=1)


def full_quadratic(t: Tensor, x: Tensor) -> Tensor:
    """Features with the constant."""
    return torch.cat([x**0, x, x**2], dim=1)


@claim(
    statement="""
        Without a horizon nothing is paid at the end of the grid and J is not pinned there. With a
        discount, E int e^{-discount t} xi dM = 0 determines V. Without one,
        dM = J(X') - J(X) + (r - temperature log pi - average) h determines the average reward, from
        any start, not from a stationary one only, and J up to a constant: least squares with a
        constant among the features has no answer, and neither has the martingale loss (no return
        is ever complete). Both are refused.
        """,
    source="Jia & Zhou 2022a, JMLR 23, and 2022b, JMLR 23, section 5 (ergodic tasks)",
    wrongs=[
        wrong(
            "curvature of V + 1 %",
            "verification.closed_form.exploratory_chain.stationary",
            "curved = h *",
            "curved = 1.01 * h *",
        ),
        wrong(
            "V pinned to 0 where the grid ends",
            "ctrl.paths.ends_at_horizon",
            "math.isfinite(problem.horizon) and gap",
            "gap",
        ),
        wrong(
            "average added",
            "ctrl.value.martingale_increments",
            "- average_reward * h",
            "+ average_reward * h",
        ),
        wrong(
            "average's dt missing",
            "ctrl.value.martingale_increments",
            "- average_reward * h",
            "- average_reward",
        ),
        wrong(
            "average left out of CTD(lambda)",
            "ctrl.martingale.ctd_lambda",
            "policy) - average_reward * h",
            "policy)",
        ),
        wrong(
            "average left out of CTD(0)",
            "ctrl.martingale.ctd0",
            "policy, average_reward)",
            "policy)",
        ),
        wrong(
            "average's sign in CLSTD",
            "ctrl.martingale.clstd",
            "moves.append(-while",
            "moves.append(while",
        ),
        wrong(
            "entropy left out of CLSTD",
            "ctrl.martingale.clstd",
            "rewards = regularised_rewards(problem, paths, policy)",
            "rewards = regularised_rewards(replace(problem, temperature=0.0), paths, policy)",
        ),
        wrong(
            "discount doubled",
            "ctrl.value.martingale_increments",
            "-discount * h",
            "-2 * discount * h",
        ),
        wrong(
            "discount missing in CTD(lambda)",
            "ctrl.martingale.ctd_lambda",
            "h, decay, discount, running)",
            "h, decay, 0.0, running)",
        ),
        wrong(
            "ergodic J with a constant is not refused",
            "ctrl.martingale.clstd",
            "if bool(torch.linalg.cond(matrix)",
            "if False and bool(torch.linalg.cond(matrix)",
        ),
        wrong(
            "martingale loss without a horizon is not refused",
            "ctrl.paths.require_whole",
            "if not ends_at_horizon(problem, grid):",
            "if False:",
        ),
    ],
)
def infinite_horizon(setting: Setting) -> Iterator[Check]:
    """Discounted and ergodic values of equal steps without end."""
    even = ctrl.TimeGrid(STEP * torch.arange(STEPS + 1).to(setting.tensor(1.0)))
    policy = gaussian(POLICY)
    start, noise = degree_five(even, C.mean, C.std, draws=True)
    paths = ctrl.simulate(ENDLESS, policy, start, even, noise=noise)

    along, value, _ = stationary_value(setting, C.discount)
    moments = mean(mg.orthogonality(basis, value, ENDLESS, paths, policy), paths)
    size = abs(along(C.mean))
    yield expectation("discounted: E int xi dM = 0, five xi", moments, [0.0] * 5, size)
    for name, loss in {
        "CTD(0)": lambda v: mg.ctd0(v, ENDLESS, paths, policy),
        "CTD(lambda)": lambda v: mg.ctd_lambda(v, ENDLESS, paths, 1.7, policy),
    }.items():
        yield expectation(f"discounted: {name}", root(loss, full_quadratic, paths), along.coef)
    got = mg.clstd(full_quadratic, ENDLESS, paths, policy).coefficients
    yield expectation("discounted: CLSTD", got, along.coef)

    along, value, average = stationary_value(setting, 0.0)
    moments = mean(mg.orthogonality(basis, value, ERGODIC, paths, policy, average), paths)
    yield expectation("ergodic: E int xi dM = 0, five xi", moments, [0.0] * 5, abs(average))
    state = mg.features_along(full_quadratic)
    off = mg.orthogonality(state, value, ERGODIC, paths, policy, average + 0.1)
    laws = exact.state_laws(C, POLICY, STEP * np.arange(STEPS))
    known = -0.1 * STEP * np.sum([(1, m, m**2 + v) for m, v in laws], axis=0)
    yield expectation("ergodic: size where the average is off by 0.1", mean(off, paths), known)
    for name, loss in {
        "CTD(0)": lambda v: mg.ctd0(v, ERGODIC, paths, policy, average),
        "CTD(lambda)": lambda v: mg.ctd_lambda(v, ERGODIC, paths, 1.7, policy, average),
    }.items():
        yield expectation(f"ergodic: {name}", root(loss, quadratic, paths), along.coef[1:])
    fit = mg.clstd(quadratic, ERGODIC, paths, policy, ergodic=True)
    yield expectation("ergodic: CLSTD", fit.coefficients, along.coef[1:])
    yield expectation("ergodic: CLSTD's average", fit.average_reward, average)
    raised = mg.increments(lambda t, x: value(t, x) + 0.8, ERGODIC, paths, policy, average)
    same = mg.increments(value, ERGODIC, paths, policy, average)
    yield pathwise("ergodic: a constant in J changes no dM", raised, same)
    answers = [
        is_refused(lambda: mg.clstd(full_quadratic, ERGODIC, paths, policy, ergodic=True)),
        is_refused(lambda: mg.martingale_loss(value, ENDLESS, paths, policy)),
        is_refused(lambda: mg.clstd(full_quadratic, ENDLESS, paths, policy)),
    ]
    yield expectation("what is not determined is refused", answers, [1.0, 1.0, 0.0])
