"""Theorems 6, 7 and 9: the pair (V, q) by martingale conditions, on- and off-policy.

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
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

import ctrl
from ctrl import martingale as mg
from ctrl import q_learning as ql
from ctrl.paths import kept_actions
from ctrl.value import Value
from verification.claim import Check, Setting, expectation, limit, pathwise
from verification.closed_form import exploratory_chain as exact
from verification.closed_form.extrapolation import by_polynomial
from verification.cubature import mean
from verification.problems import NODES
from verification.problems.martingale import (
    ERROR,
    POLICY,
    C,
    earned,
    exact_value,
    gaussian,
    problem,
    sampled,
)
from verification.problems.q_learning import BEHAVIOUR, basis

SOURCE = "Jia & Zhou 2023, JMLR 24, Theorems 6, 7 and 9, equations 34 and following"

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


def checks(setting: Setting) -> Iterator[Check]:
    """Theorems 6, 7 and 9 on a chain whose pair is known, along paths of two policies."""
    value, q, nodes = exact_value(setting), exact_q(setting), np.array(NODES)
    size = abs(exact.values(C, POLICY, nodes)[0](C.mean))
    error, rate_error = setting.tensor(ERROR.coef), setting.tensor(RATE_ERROR)

    def off_value(t: Tensor, x: Tensor) -> Tensor:
        return value(t, x) + error[0] + error[1] * x[:, 0] + error[2] * x[:, 0] ** 2

    def off_q(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return q(t, x, a) + quadratic(rate_error, x, a)

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
        got = by_polynomial([f.double().cpu().numpy() for f in pair_slopes], 1 / np.array(coarse))
        want = by_polynomial([bias(np.array(even[steps])) for steps in fine], 1 / np.array(fine))
        yield limit("off-policy: that slope does not vanish with the steps", got, want)


MISTAKES = """
verification.claims.values.q_learning.exact_q
    q + 1 % | return quadratic( => return 1.01 * quadratic(
    q doubled | return quadratic( => return 2 * quadratic(
    q missing | return quadratic( => return 0 * quadratic(
    q not centred | return quadratic( => return -0.2 + quadratic(
    entropy counted again beside q | return quadratic(
        => return -C.temperature * gaussian(POLICY).log_prob(t, x, a) + quadratic(
verification.closed_form.exploratory_chain.reward
    entropy missing in V, and q made of this V | return c.temperature * policy.entropy() => return 0.0
    entropy's sign in V, and q made of this V | return c.temperature * policy.entropy()
        => return -c.temperature * policy.entropy()
ctrl.q_learning.increments
    q added | rewards - rates => rewards + rates
    q's dt missing | rates(q, paths) * as_like(paths.grid.steps, rewards) => rates(q, paths)
    average left out | paid, average_reward) => paid)
ctrl.q_learning.rates
    q of the next action | kept_actions(paths))) => kept_actions(paths).roll(-1, 1)))
ctrl.q_learning.orthogonality
    test functions must not see the step's own action [ValueError] | sees_action=True => sees_action=False
ctrl.q_learning.orthogonality_loss
    gradient through dM | average_reward).detach() => average_reward)
    test functions of q left out | [:, :-1] + rates(q, paths) => [:, :-1]
    test functions of V at the right end | [:, :-1] + rates(q, paths) => [:, 1:] + rates(q, paths)
ctrl.q_learning.martingale_loss
    M_t - M_0 for M_T - M_t | .flip(1).cumsum(1).flip(1) => .cumsum(1)
    no discount from step to step in M_T - M_t | (discounts * dm) => dm
    time summed without step sizes | (as_like(paths.grid.steps, dm) * ahead.square())
        => (paths.grid.steps.mean() * ahead.square())
shared
    curvature of V + 1 %
    discount missing
    discount doubled
    discount of test functions missing
    average under the policy left out of the constraint
    sign of the entropy's share
"""
