"""Jia & Zhou 2023: the pair of value and q-rate, along paths of its own policy or any other."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

import ctrl
from ctrl import martingale as mg
from ctrl import q_learning as ql
from ctrl.paths import kept_actions
from ctrl.value import Value
from verification.claim import Check, Setting, claim, expectation, limit, pathwise, wrong
from verification.claims.martingale import (
    ERROR,
    POLICY,
    C,
    earned,
    exact_value,
    gaussian,
    problem,
    sampled,
)
from verification.closed_form import exploratory_chain as exact
from verification.closed_form import q_learning as closed
from verification.cubature import degree_five, mean
from verification.problems import NODES

BEHAVIOUR = exact.Feedback(gain=0.5, offset=-0.3, std=0.9)
NAMES = ("1", "x", "x^2", "x eps", "eps^2 - 1")
RATE_ERROR = np.array([0.1, -0.2, 0.15, 0.25, -0.12, 0.3])  # of 1, x, x^2, a, a x, a^2
ALONG = {"on-policy": POLICY, "off-policy": BEHAVIOUR}


def exact_q(setting: Setting, times: Sequence[float] = NODES) -> ql.QRate:
    """q of the chain: what the action is worth beyond V, for a unit of time."""
    table, nodes = setting.tensor(exact.rates(C, POLICY, np.array(times))), setting.tensor(times)

    def q(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return quadratic(table[(nodes - t).abs().argmin()], x, a)

    return q


def quadratic(c: Tensor, x: Tensor, a: Tensor) -> Tensor:
    """c . (1, x, x^2, a, a x, a^2)."""
    x, a = x[:, 0], a[:, 0]
    return c[0] + c[1] * x + c[2] * x**2 + c[3] * a + c[4] * a * x + c[5] * a**2


def basis(behaviour: exact.Feedback) -> mg.TestFunctions:
    """1, x, x^2, x eps, eps^2 - 1, eps the noise of the step's own action."""

    def tests(paths: ctrl.Paths) -> Tensor:
        x, a = paths.states[:, :-1, 0], kept_actions(paths)[..., 0]
        eps = (a - behaviour.gain * x - behaviour.offset) / behaviour.std
        return torch.stack([torch.ones_like(x), x, x**2, x * eps, eps**2 - 1], dim=2)

    return tests


def centred(w: Tensor, x: Tensor, a: Tensor) -> Tensor:
    """Directions for q whose mean under the policy is 0: w . (x eps, eps^2 - 1)."""
    eps = (a[:, 0] - POLICY.gain * x[:, 0] - POLICY.offset) / POLICY.std
    return w[0] * x[:, 0] * eps + w[1] * (eps**2 - 1)


def root(
    loss: Callable[[Value, ql.QRate], Tensor], value: Value, q: ql.QRate, paths: ctrl.Paths
) -> Tensor:
    """Stationary c of a loss: V = c_0 value, q with c_1 of its own size and c_2, c_3 more.

    All these q obey the constraint. The gradient is affine in c.
    """
    policy = gaussian(POLICY)

    def gradient(c: Tensor) -> Tensor:
        c = c.requires_grad_()

        def rate(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
            entropy = C.temperature * policy.log_prob(t, x, a)
            return entropy + c[1] * (q(t, x, a) - entropy) + centred(c[2:], x, a)

        each = loss(lambda t, x: c[0] * value(t, x), rate)
        return torch.autograd.grad(mean(each, paths), c)[0]

    unit = torch.eye(4).to(paths.states)
    offset = gradient(torch.zeros_like(unit[0]))
    slope = torch.stack([gradient(one) - offset for one in unit.unbind()], dim=1)
    return torch.linalg.lstsq(slope, -offset[:, None]).solution[:, 0]  # singular where wrong


@claim(
    statement="""
        With E_pi[q - temperature log pi] = 0 and V(T, .) the terminal reward, (V, q) is the value
        and q-rate of pi if and only if E int e^{-discount t} xi dM = 0,
        dM = e^{-discount h} V(X') - V(X) + (r - q) h, for adapted xi that may see the step's own
        action, along paths of pi or of any other policy. Entropy is in q alone. Without the
        constraint any V passes with its own one-step q. Functions of the state cannot see q scaled
        about temperature log pi (on-policy), those of the action's noise cannot see a constant in
        q: both kinds are needed. Three things are false: that the condition of values, without q,
        holds off-policy; that least squares on M_T - M_t finds the pair off-policy: along
        a ~ N(x/2 - 0.3, 0.81) its slopes in q at the true pair tend to (0.0345, 0.0462) here, for
        x eps and eps^2 - 1, and not to 0 with the steps; and that the sum of squared dM rests at
        the pair: its slope in q is 0 there, but not its slope in V, whose noise it squares.
        """,
    source="Jia & Zhou 2023, JMLR 24, Theorems 6, 7 and 9, equations 34 and following",
    wrongs=[
        wrong(
            "q + 1 %",
            "verification.claims.q_learning.exact_q",
            "return quadratic(",
            "return 1.01 * quadratic(",
        ),
        wrong(
            "q doubled",
            "verification.claims.q_learning.exact_q",
            "return quadratic(",
            "return 2 * quadratic(",
        ),
        wrong(
            "q missing",
            "verification.claims.q_learning.exact_q",
            "return quadratic(",
            "return 0 * quadratic(",
        ),
        wrong(
            "q not centred",
            "verification.claims.q_learning.exact_q",
            "return quadratic(",
            "return -0.2 + quadratic(",
        ),
        wrong(
            "entropy counted again beside q",
            "verification.claims.q_learning.exact_q",
            "return quadratic(",
            "return -C.temperature * gaussian(POLICY).log_prob(t, x, a) + quadratic(",
        ),
        wrong(
            "entropy missing in V, and q made of this V",
            "verification.closed_form.exploratory_chain.reward",
            "return c.temperature * policy.entropy()",
            "return 0.0",
        ),
        wrong(
            "entropy's sign in V, and q made of this V",
            "verification.closed_form.exploratory_chain.reward",
            "return c.temperature * policy.entropy()",
            "return -c.temperature * policy.entropy()",
        ),
        wrong(
            "curvature of V + 1 %",
            "verification.claims.martingale.exact_value",
            "+ curvature * ",
            "+ 1.01 * curvature * ",
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
        wrong("q added", "ctrl.q_learning.increments", "rewards - rates", "rewards + rates"),
        wrong(
            "q's dt missing",
            "ctrl.q_learning.increments",
            "rates(q, paths) * as_like(paths.grid.steps, rewards)",
            "rates(q, paths)",
        ),
        wrong(
            "q of the next action",
            "ctrl.q_learning.rates",
            "kept_actions(paths)))",
            "kept_actions(paths).roll(-1, 1)))",
        ),
        wrong(
            "average left out",
            "ctrl.q_learning.increments",
            "paid, average_reward)",
            "paid)",
        ),
        wrong(
            "test functions must not see the step's own action",
            "ctrl.q_learning.orthogonality",
            "sees_action=True",
            "sees_action=False",
            raises=ValueError,
        ),
        wrong(
            "gradient through dM",
            "ctrl.q_learning.orthogonality_loss",
            "average_reward).detach()",
            "average_reward)",
        ),
        wrong(
            "test functions of q left out",
            "ctrl.q_learning.orthogonality_loss",
            "[:, :-1] + rates(q, paths)",
            "[:, :-1]",
        ),
        wrong(
            "test functions of V at the right end",
            "ctrl.q_learning.orthogonality_loss",
            "[:, :-1] + rates(q, paths)",
            "[:, 1:] + rates(q, paths)",
        ),
        wrong(
            "discount of test functions missing",
            "ctrl.martingale.moments",
            "discount_factors(problem, paths) * increments",
            "increments",
        ),
        wrong(
            "M_t - M_0 for M_T - M_t",
            "ctrl.q_learning.martingale_loss",
            ".flip(1).cumsum(1).flip(1)",
            ".cumsum(1)",
        ),
        wrong(
            "no discount from step to step in M_T - M_t",
            "ctrl.q_learning.martingale_loss",
            "(discounts * dm)",
            "dm",
        ),
        wrong(
            "time summed without step sizes",
            "ctrl.q_learning.martingale_loss",
            "(as_like(paths.grid.steps, dm) * ahead.square())",
            "(paths.grid.steps.mean() * ahead.square())",
        ),
        wrong(
            "average under the policy left out of the constraint",
            "ctrl.q_learning.ConsistentQ.__call__",
            "actions) - average - self",
            "actions) - self",
        ),
        wrong(
            "entropy's sign in the constraint",
            "ctrl.q_learning.ConsistentQ.__call__",
            "- self.temperature * entropy",
            "+ self.temperature * entropy",
        ),
    ],
)
def q_learning(setting: Setting) -> Iterator[Check]:
    """Theorems 6, 7 and 9 on a chain whose pair is known, along paths of two policies."""
    value, q, nodes = exact_value(setting), exact_q(setting), np.array(NODES)
    size = abs(exact.values(C, POLICY, nodes)[0](C.mean))
    error, rate_error = setting.tensor(ERROR.coef), setting.tensor(RATE_ERROR)

    def off_value(t: Tensor, x: Tensor) -> Tensor:
        return value(t, x) + error[0] + error[1] * x[:, 0] + error[2] * x[:, 0] ** 2

    def off_q(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return q(t, x, a) + quadratic(rate_error, x, a)

    for kind, behaviour in ALONG.items():
        paths, xi = sampled(setting, behaviour), basis(behaviour)
        moments = mean(ql.orthogonality(xi, value, q, problem(), paths), paths)
        for name, moment in zip(NAMES, moments, strict=True):
            yield expectation(f"{kind}: E int xi dM = 0, xi = {name}", moment, 0.0, size)
        orthogonality = mean(ql.orthogonality(xi, off_value, off_q, problem(), paths), paths)
        rates = np.tile(RATE_ERROR, (len(nodes) - 1, 1))
        known = exact.moments_of_a_wrong_pair(C, behaviour, nodes, ERROR, rates)
        yield expectation(
            f"{kind}: E int xi dM of a wrong pair has its known size", orthogonality, known
        )
        rests = root(
            lambda v, r, p=paths: ql.orthogonality_loss(v, r, problem(), p), value, q, paths
        )
        yield expectation(
            f"{kind}: the orthogonality loss rests at the pair", rests, [1.0, 1.0, 0.0, 0.0]
        )

    # the constraint, which the martingale condition does not imply
    on, off = sampled(setting), sampled(setting, BEHAVIOUR)
    held = ql.ConsistentQ(q, gaussian(POLICY), C.temperature, nodes=3)
    got, want, scale = ql.rates(held, off), ql.rates(q, off), abs(off.states).max()
    yield pathwise("E_pi[q - temperature log pi] = 0", got, want, float(scale))
    loose = ql.ConsistentQ(off_q, gaussian(POLICY), C.temperature, nodes=3)
    rate_change = ql.rates(loose, off) - ql.rates(off_q, off)
    mean_error = sum(exact.in_noise(RATE_ERROR, POLICY)[::2], Polynomial([0.0]))
    known = -mean_error(off.states[:, :-1, 0].double().cpu().numpy())
    yield pathwise("the constraint, imposed on a q that breaks it", rate_change, known)

    # whatever (V, q) is, M_T - M_0 is what was earned, less q, less V(0, X_0)
    dm = ql.increments(off_value, off_q, problem(), off)
    whole = mg.moments(basis(POLICY), dm, problem(), off, sees_action=True)[:, 0]
    yield pathwise("M_T - M_0, against what was earned", whole, left_over(off, off_value, off_q))
    shifted = ql.increments(off_value, off_q, problem(), off, 0.1)
    yield pathwise("an average reward", dm - shifted, 0.1 * off.grid.nodes.diff().expand_as(dm))

    # what half of the test functions cannot see
    beyond = exact.rates(C, POLICY, nodes) - exact.entropy_rate(C, POLICY)
    none = Polynomial([0.0])

    def scaled(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return 2 * q(t, x, a) - C.temperature * gaussian(POLICY).log_prob(t, x, a)

    scaled_q = mean(ql.orthogonality(basis(POLICY), value, scaled, problem(), on), on)
    known = exact.moments_of_a_wrong_pair(C, POLICY, nodes, none, beyond)
    yield expectation("on-policy: q scaled, by 1, x, x^2 (unseen) and the rest", scaled_q, known)
    yield expectation("on-policy: q scaled is unseen by functions of x", known[:3], [0.0] * 3, size)

    # what does not hold off-policy
    state = mg.features_along(lambda t, x: torch.cat([x**0, x, x**2], dim=1))
    policy = gaussian(POLICY)
    without_q = mean(mg.orthogonality(state, value, problem(), off, policy), off)
    known = exact.moments_of_a_wrong_pair(C, BEHAVIOUR, nodes, none, -beyond)[:3]
    yield expectation("off-policy: the condition of values, without q, is off by", without_q, known)

    def loss(paths: ctrl.Paths) -> Callable[[Value, ql.QRate], Tensor]:
        return lambda v, r: ql.martingale_loss(v, r, problem(), paths)

    rests = root(loss(on), value, q, on)
    yield expectation(
        "on-policy: the martingale loss rests at the pair", rests, [1.0, 1.0, 0.0, 0.0]
    )
    slopes = slope_at_the_pair(value, q, off)
    yield expectation("off-policy: the martingale loss's slope in q", slopes, bias(nodes))
    in_value, in_q = slopes_of_squares(value, q, off)
    known = [
        exact.slope_of_squares(C, POLICY, BEHAVIOUR, nodes, Polynomial(p))
        for p in ([0, 1], [0, 0, 1])
    ]
    yield expectation("squared dM: slope in V at the pair", in_value, known)
    yield expectation(
        "squared dM: no slope in q at the pair", in_q, [0.0] * 2, max(map(abs, known))
    )
    if setting.full:
        coarse, fine = (6, 12, 24), (16, 32, 64)
        even = {steps: np.linspace(0, NODES[-1], steps + 1).tolist() for steps in coarse + fine}
        pair_slopes = [
            slope_at_the_pair(
                exact_value(setting, even[steps]),
                exact_q(setting, even[steps]),
                sampled(setting, BEHAVIOUR, even[steps]),
            )
            for steps in coarse
        ]
        got = extrapolated([f.double().cpu().numpy() for f in pair_slopes], 1 / np.array(coarse))
        want = extrapolated([bias(np.array(even[steps])) for steps in fine], 1 / np.array(fine))
        yield limit("off-policy: that slope does not vanish with the steps", got, want)


def extrapolated(results: list[np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """The limit of results at these step sizes, by a polynomial in them."""
    powers = np.vander(sizes, increasing=True)
    return np.linalg.solve(powers, np.array(results))[0]


def bias(nodes: np.ndarray) -> np.ndarray:
    """That slope by recursion, in the directions of ``centred``."""
    g, o, s = POLICY.gain, POLICY.offset, POLICY.std
    sloped = np.array([0, -o, -g, 0, 1, 0]) / s
    curved = np.array([o**2, 2 * o * g, g**2, -2 * o, -2 * g, 1]) / s**2 - np.eye(6)[0]
    return np.array(
        [
            exact.slope_of_the_martingale_loss(C, POLICY, BEHAVIOUR, nodes, w)
            for w in (sloped, curved)
        ]
    )


def slope_at_the_pair(value: Value, q: ql.QRate, paths: ctrl.Paths) -> Tensor:
    """The martingale loss's gradient in the directions of ``centred``."""
    w = paths.states.new_zeros(2, requires_grad=True)
    each = ql.martingale_loss(
        value, lambda t, x, a: q(t, x, a) + centred(w, x, a), problem(), paths
    )
    return torch.autograd.grad(mean(each, paths), w)[0]


def slopes_of_squares(value: Value, q: ql.QRate, paths: ctrl.Paths) -> tuple[Tensor, ...]:
    """E sum dM^2: gradients in V, along x and x^2, and in q, along ``centred``."""
    v, w = paths.states.new_zeros(2, 2, requires_grad=True).unbind()
    each = ql.increments(
        lambda t, x: value(t, x) + v[0] * x[:, 0] + v[1] * x[:, 0] ** 2,
        lambda t, x, a: q(t, x, a) + centred(w, x, a),
        problem(),
        paths,
    )
    return torch.autograd.grad(mean(each.square().sum(1), paths), (v, w))


def left_over(paths: ctrl.Paths, value: Value, q: ql.QRate) -> Tensor:
    """Discounted reward, terminal reward too, less q, less the first value: step by step."""
    nodes, x, a = paths.grid.nodes, paths.states, kept_actions(paths)
    policy = gaussian(POLICY)
    total = earned(paths) - value(nodes[0], x[:, 0])
    for k, h in enumerate(nodes.diff()):
        t = nodes[k]
        beyond = q(t, x[:, k], a[:, k]) - C.temperature * policy.log_prob(t, x[:, k], a[:, k])
        total = total - torch.exp(-C.discount * t) * beyond * h
    return total


LQ = closed.Endless()
PLAIN = replace(LQ, noise_slope=0.0, noise_push=0.0)  # additive noise: what quadrature is exact for
LEVEL, MOVES = np.array([0.6, -0.4, -0.9]), np.array([0.3, 0.2, 0.5])  # J and d_t J in 1, x, x^2
GRIDS = (4, 8, 16, 32)
SIZES, ZERO = 1 / np.array(GRIDS), np.zeros(5)


def endless(e: closed.Endless) -> ctrl.ControlProblem:
    """The problem without end, whose diffusion may be controlled too."""
    sde = ctrl.ControlledSDE(
        lambda t, x, a: e.drift * x + e.control * a,
        lambda t, x, a: e.noise_slope * x + e.noise_push * a + e.noise,
        controls_diffusion=True,
    )

    def reward(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        x, a = x[:, 0], a[:, 0]
        square = e.state_cost * x**2 / 2 + e.cross * x * a + e.action_cost * a**2 / 2
        return -(square + e.pull * x + e.push * a)

    return ctrl.ControlProblem(
        sde, math.inf, reward, discount=e.discount, temperature=e.temperature
    )


def optimal(e: closed.Endless) -> tuple[Value, ctrl.GaussianPolicy]:
    """V* and pi* as functions of tensors."""
    k2, k1, k0 = closed.value(e)
    gain, offset, std = closed.gibbs(e, k2, k1)
    policy = ctrl.GaussianPolicy(lambda t, x: gain * x + offset, std)
    return lambda t, x: k2 * x[:, 0] ** 2 / 2 + k1 * x[:, 0] + k0, policy


def moving(t: Tensor, x: Tensor) -> Tensor:
    """J(t, x), of a level and with a slope in time; no policy's value."""
    powers = torch.cat([x**0, x, x**2], dim=1)
    level, moves = powers.new_tensor(LEVEL), powers.new_tensor(MOVES)
    return powers @ level + t * (powers @ moves)


def one_step_rates(setting: Setting, h: float, x: Tensor, a: Tensor) -> Tensor:
    """(Q_h - J) / h at t = 0, Q_h = E[e^{-discount h} J(h, X_h) + r h | x, a], for all x and a."""
    grid = ctrl.TimeGrid(setting.tensor([0.0, h]))
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=3)
    many = len(noise.increments)
    noise = ctrl.Noise(noise.increments.repeat(len(x), 1, 1), weights=None)
    held = a.repeat_interleave(many, 0)
    policy = ctrl.DeterministicPolicy(lambda t, states: held)
    paths = ctrl.simulate(endless(LQ), policy, x.repeat_interleave(many, 0), grid, noise=noise)
    gains = mg.increments(moving, replace(endless(LQ), temperature=0.0), paths)
    masses = ctrl.noise.gauss_hermite(grid.steps, nodes=3).weights
    assert masses is not None
    return gains.view(len(x), many) @ masses / h


def off_policy_moments(setting: Setting, steps: int, offset: float) -> np.ndarray:
    """E int xi dM of V* and q* + offset along another policy's Euler paths up to time 1."""
    grid = ctrl.TimeGrid(setting.tensor(np.linspace(0, 1, steps + 1)))
    start, noise = degree_five(grid, C.mean, C.std, draws=True)
    paths = ctrl.simulate(endless(PLAIN), gaussian(BEHAVIOUR), start, grid, noise=noise)
    value, policy = optimal(PLAIN)
    gibbs = ql.GibbsQ(policy, PLAIN.temperature)
    orthogonality = ql.orthogonality(
        basis(BEHAVIOUR), value, lambda *at: gibbs(*at) + offset, endless(PLAIN), paths
    )
    return mean(orthogonality, paths).double().cpu().numpy()


@claim(
    statement="""
        q = d_t J + b . J' + sigma^2 J'' / 2 + r - discount J is the slope of the Q-function of a
        step: Q_h(x, a) = J(x) + q(x, a) h + o(h), so Q itself forgets the action as h -> 0. At the
        optimum of an exploratory linear-quadratic problem, its diffusion controlled too,
        int exp(q / temperature) da = 1 and pi = exp(q / temperature) is normal with variance
        temperature / curvature; for any J, exp(q / temperature) is the improved policy. Off-policy,
        along a ~ N(x/2 - 0.3, 0.81), the optimal pair of continuous time has E int xi dM = O(h) on
        an Euler grid, halved with the step, and q moved by -0.2 gives 0.2 int e^{-discount t} dt.
        """,
    source="Jia & Zhou 2023, JMLR 24, equation 14, Proposition 8, Theorem 9; Wang et al. 2020",
    wrongs=[
        wrong(
            "second derivative of V dropped",
            "ctrl.value.generator",
            "along_drift + 0.5 * trace",
            "along_drift",
        ),
        wrong(
            "half of the second derivative for a quarter",
            "ctrl.value.generator",
            "along_drift + 0.5 * trace",
            "along_drift + 0.25 * trace",
        ),
        wrong(
            "1/2 of the second derivative missing",
            "ctrl.value.generator",
            "along_drift + 0.5 * trace",
            "along_drift + trace",
        ),
        wrong(
            "time derivative missing",
            "ctrl.value.transport",
            "torch.ones_like(t)",
            "torch.zeros_like(t)",
        ),
        wrong(
            "discount's sign",
            "ctrl.q_learning.q_rate",
            "rate - problem.discount",
            "rate + problem.discount",
        ),
        wrong(
            "discount missing",
            "ctrl.q_learning.q_rate",
            "rate - problem.discount",
            "rate - 0 * problem.discount",
        ),
        wrong(
            "reward missing",
            "ctrl.q_learning.q_rate",
            "problem.running_reward is not None",
            "False",
        ),
        wrong(
            "temperature missing in q",
            "ctrl.q_learning.GibbsQ.__call__",
            "self.temperature * self.policy",
            "self.policy",
        ),
        wrong(
            "temperature inverse in q",
            "ctrl.q_learning.GibbsQ.__call__",
            "self.temperature * self.policy.log_prob(t, states, actions)",
            "self.policy.log_prob(t, states, actions) / self.temperature",
        ),
        wrong(
            "temperature inverse in the policy's variance",
            "ctrl.q_learning._scale",
            "temperature * precision",
            "precision / temperature",
        ),
        wrong(
            "curvature for its inverse in the policy's variance",
            "ctrl.q_learning._scale",
            "torch.cholesky_inverse(factor)",
            "-hessian",
        ),
        wrong(
            "half of the policy's mean",
            "ctrl.q_learning.gibbs_policy",
            "torch.linalg.solve(-hessian, slope)",
            "torch.linalg.solve(-2 * hessian, slope)",
        ),
        wrong(
            "mean's sign",
            "ctrl.q_learning.gibbs_policy",
            "torch.linalg.solve(-hessian, slope)",
            "torch.linalg.solve(hessian, slope)",
        ),
        wrong(
            "log-partition term missing in V",
            "verification.closed_form.q_learning.value",
            "entropy = e.temperature",
            "entropy = 0 * e.temperature",
        ),
        wrong(
            "curvature of V + 1 %",
            "verification.closed_form.q_learning.value",
            "k2 = min(",
            "k2 = 1.01 * min(",
        ),
        wrong(
            "q not centred",
            "verification.claims.q_learning.off_policy_moments",
            "lambda *at: gibbs(*at) + offset",
            "lambda *at: gibbs(*at) + offset - 0.05",
            full=True,
        ),
        wrong(
            "dM without dt in the reward",
            "ctrl.paths.running_rewards",
            "kept_actions(paths))) * steps",
            "kept_actions(paths)))",
        ),
    ],
)
def q_rate(setting: Setting) -> Iterator[Check]:
    """q against formulas, against one step of the Euler scheme, and its normalisation."""
    x, a = setting.tensor([[0.7], [-1.2], [0.3]]), setting.tensor([[0.2], [1.1], [-0.5]])
    t, flat = setting.tensor(0.0), (x[:, 0].double().cpu().numpy(), a[:, 0].double().cpu().numpy())
    by_hand = closed.rate(LQ, LEVEL, MOVES, *flat)
    got = ql.q_rate(endless(LQ), moving, t, x, a)
    yield pathwise("q of any J, by hand", got, by_hand)
    sizes = 0.2 / 2 ** np.arange(5)
    steps = [one_step_rates(setting, float(h), x, a).double().cpu().numpy() for h in sizes]
    got = extrapolated(steps, sizes)
    yield limit("(Q_h - J) / h of one step tends to q", got, by_hand)

    value, policy = optimal(LQ)
    k2, k1, _ = closed.value(LQ)
    gain, offset, std = closed.gibbs(LQ, k2, k1)
    eps = (flat[1] - gain * flat[0] - offset) / std
    known = -LQ.temperature * (eps**2 / 2 + np.log(std * np.sqrt(2 * np.pi)))
    yield pathwise("q at the optimum", ql.q_rate(endless(LQ), value, t, x, a), known)
    by_policy = ql.GibbsQ(policy, LQ.temperature)
    yield pathwise("q at the optimum, as temperature log pi", by_policy(t, x, a), known)
    wide = setting.tensor(np.linspace(-9, 9, 101))[:, None] * std + gain * x[0] + offset
    density = ql.q_rate(endless(LQ), value, t, x[:1].expand(101, 1).contiguous(), wide)
    mass = torch.exp(density / LQ.temperature).sum() * 18 * std / 100
    yield expectation("int exp(q / temperature) da = 1", mass, 1.0)

    def improved(curvature: float, slope: float) -> np.ndarray:
        gain, offset, std = closed.gibbs(LQ, curvature, slope)
        return np.array([*(gain * flat[0] + offset), std])

    for name, j, curvature, slope in (
        ("the optimum", value, k2, k1),
        ("any J", moving, 2 * LEVEL[2], LEVEL[1]),
    ):
        better = ql.gibbs_policy(endless(LQ), j, 1, x[0])
        got = torch.cat([better.mean(t, x)[:, 0], better.scale_at(t, x)[:, 0]])
        yield pathwise(f"exp(q / temperature) of {name}", got, improved(curvature, slope))
    grid = ctrl.TimeGrid(setting.tensor(NODES))
    start, noise = degree_five(grid, C.mean, C.std, draws=True)
    paths = ctrl.simulate(endless(LQ), gaussian(BEHAVIOUR), start, grid, noise=noise)
    got, want = ql.q_rates(endless(LQ), value, paths), ql.rates(by_policy, paths)
    yield pathwise("q along paths of another policy", got, want)
    if setting.full:
        exactly = [off_policy_moments(setting, n, 0.0) for n in GRIDS]
        yield limit("E int xi dM of the optimal pair -> 0", extrapolated(exactly, SIZES), ZERO, 0.2)
        orders = np.log2(np.abs(exactly[-2] / exactly[-1]))
        yield limit("... as the step", orders[:3], [1.0] * 3)
        lacking = [off_policy_moments(setting, n, -0.2) for n in GRIDS]
        whole = 0.2 * (1 - math.exp(-PLAIN.discount)) / PLAIN.discount
        yield limit("with q - 0.2, xi = 1", extrapolated(lacking, SIZES)[0], whole)
