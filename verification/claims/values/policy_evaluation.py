"""Policy evaluation by martingale conditions (Jia & Zhou 2022a): each method has its own limit.

Under a value that cannot be represented, J = (T - t) c . (1, x, x^2) for r = x^2 along an
Ornstein-Uhlenbeck process, methods end in different places: the martingale loss (ML) in
the L2 projection of the true value, c = (0.115391, 0.008037, 0.432786) as h -> 0;
CTD(0) and CLSTD in the root of E int d_c J dM, (0.133110, 0.009761, 0.341519);
CTD(lambda) in between, (0.12970, 0.00997, 0.35914) for lambda = 1e-6 a unit of time, and
at ML for lambda = 1 without discount. The sum of squared increments is not a loss for
values: it ends in the flat (0.41475, 0, 0), and even where J = c V has the true V in it,
c = 0.72 at four steps and 0 in the limit.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import martingale as mg
from verification.claim import Check, Setting, expectation, limit, pathwise
from verification.closed_form import policy_evaluation as exact
from verification.closed_form.extrapolation import by_polynomial
from verification.problems.policy_evaluation import problem, sampled

SOURCE = "Jia & Zhou 2022a, JMLR 23, sections 3 and 4"

UNEVEN = (0.0, 0.25, 0.4, 0.75, 1.0)
E = exact.Evaluation(discount=0.8, terminal=0.3)
PLAIN = exact.Evaluation()  # Jia & Zhou's is undiscounted
FORGETS = 1.7  # lambda = e^{-1.7}, on four steps
DECAY = math.log(1e6)  # lambda = 1e-6 for a unit of time, in the limit
LIMITS = {
    "ML": [0.115391, 0.008037, 0.432786],
    "CTD(0)": [0.133110, 0.009761, 0.341519],
    "CTD(lambda)": [0.12970, 0.00997, 0.35914],
    "squares": [0.41475, 0.0, 0.0],
}
STEPS = (6, 12, 24, 48)  # of the grids that limits are extrapolated from
Loss = Callable[[ctrl.value.Value], Tensor]


def features(t: Tensor, x: Tensor) -> Tensor:
    """(T - t) (1, x, x^2): none of them makes the value that is true."""
    return (E.horizon - t) * torch.cat([x**0, x, x**2], dim=1)


def tests(t: Tensor, x: Tensor) -> Tensor:
    """More test functions than there are coefficients."""
    return torch.cat([features(t, x), x**0, x], dim=1)


def base(e: exact.Evaluation) -> ctrl.value.Value:
    """The terminal reward, as the part of J that is known."""
    return lambda t, x: e.terminal * x[:, 0] ** 2


def true_value(e: exact.Evaluation, nodes: Tensor) -> mg.Features:
    """V of the chain, as the only feature."""
    table = torch.as_tensor(exact.values(e, nodes.double().cpu().numpy())).to(nodes)

    def true(t: Tensor, x: Tensor) -> Tensor:
        c = table[(nodes - t).abs().argmin()]
        return c[0] + c[2] * x**2

    return true


def losses(e: exact.Evaluation, paths: ctrl.Paths, decay: float) -> dict[str, Loss]:
    """Losses that the methods descend, and the squares, which are the wrong loss."""
    p, xi = problem(e), mg.features_along(tests)

    def gmm(v: ctrl.value.Value, weighting: Literal["identity", "covariance"]) -> Tensor:
        return mg.cgtd_loss(xi, v, p, paths, weighting=weighting)

    return {
        "ML": lambda v: mg.martingale_loss(v, p, paths),
        "CTD(0)": lambda v: mg.ctd0(v, p, paths),
        "CTD(lambda)": lambda v: mg.ctd_lambda(v, p, paths, decay),
        "GMM, identity": lambda v: gmm(v, "identity"),
        "GMM, covariance": lambda v: gmm(v, "covariance"),
        "squares": lambda v: mg.increments(v, p, paths).square().sum(1),
    }


def root(
    loss: Loss, paths: ctrl.Paths, phi: mg.Features, known: ctrl.value.Value | None = None
) -> np.ndarray:
    """Coefficients at which the gradient, which is affine in them, vanishes."""
    weights = paths.weights
    assert weights is not None

    def gradient(theta: Tensor) -> Tensor:
        theta = theta.requires_grad_()
        each = loss(mg.LinearValue(phi, theta, known))
        total = each if each.ndim == 0 else weights @ each
        return torch.autograd.grad(total, theta)[0]

    unit = torch.eye(phi(paths.grid.nodes[0], paths.states[:, 0]).shape[1]).to(paths.states)
    offset = gradient(torch.zeros_like(unit[0]))
    slope = torch.stack([gradient(one) - offset for one in unit.unbind()], dim=1)
    return torch.linalg.solve(slope, -offset).double().cpu().numpy()


def gradients(loss: Callable[[ctrl.value.Value], Tensor], paths: ctrl.Paths) -> Tensor:
    """Gradients of every path's own loss, at coefficients away from every root, [paths, 3]."""
    theta = paths.states.new_tensor([0.7, -0.4, 0.25]).repeat(len(paths.states), 1)
    theta.requires_grad_()
    each = loss(lambda t, x: (features(t, x) * theta).sum(1))
    return torch.autograd.grad(each.sum(), theta)[0]


def limits(setting: Setting) -> Iterator[Check]:
    """Extrapolated from production code on grids of up to 48 steps."""
    roots: dict[str, list[np.ndarray]] = {method: [] for method in LIMITS}
    factors = []
    for steps in STEPS:
        paths = sampled(PLAIN, torch.linspace(0, PLAIN.horizon, steps + 1).to(setting.tensor(1.0)))
        for method in LIMITS:
            roots[method].append(root(losses(PLAIN, paths, DECAY)[method], paths, features))
        squares = losses(PLAIN, paths, DECAY)["squares"]
        factors.append(root(squares, paths, true_value(PLAIN, paths.grid.nodes)) * steps)
    continuous = exact.continuous(PLAIN, DECAY)
    for method, printed in LIMITS.items():
        got = by_polynomial(roots[method], 1 / np.array(STEPS))
        yield limit(f"{method}: limit of small steps, by integrals", got, continuous[method])
        yield limit(f"{method}: the number in print", continuous[method], printed)
    name = "squares of c V, c / h"
    yield limit(
        f"{name}: limit of small steps",
        by_polynomial(factors, 1 / np.array(STEPS)),
        continuous[name],
    )


def checks(setting: Setting) -> Iterator[Check]:
    """Roots of production losses: exactly the recursion's on four steps, and their limits."""
    nodes = np.array(UNEVEN)
    paths, known = sampled(E, setting.tensor(UNEVEN)), exact.chain(E, nodes, FORGETS)
    got = mg.clstd(features, problem(E), paths, base=base(E)).coefficients
    yield expectation("CLSTD: on four steps, by recursion", got, known["CTD(0)"])
    for method, loss in losses(E, paths, FORGETS).items():
        got = root(loss, paths, features, base(E))
        yield expectation(f"{method}: root on four steps, by recursion", got, known[method])
    # lambda = 1: no root is needed, path by path
    plain = sampled(PLAIN, setting.tensor(UNEVEN))
    whole = gradients(lambda v: mg.martingale_loss(v, problem(PLAIN), plain), plain)
    half = gradients(lambda v: mg.ctd_lambda(v, problem(PLAIN), plain, 0.0), plain)
    yield pathwise("CTD(1) is half of ML's gradient on every path", 2 * half, whole)
    # the true value within reach: all but the squares find it
    true = true_value(PLAIN, setting.tensor(UNEVEN))
    for method, loss in losses(PLAIN, plain, FORGETS).items():
        factor = exact.squares_of_the_true_value(PLAIN, nodes) if method == "squares" else 1.0
        got = root(loss, plain, true)
        yield expectation(f"{method}: factor of the true value", got, [factor])
    if setting.full:
        yield from limits(setting)


MISTAKES = r"""
ctrl.martingale.ctd0
    gradient through dM in CTD(0) | average_reward).detach() => average_reward)
    no gradient through J in CTD(0), but through dM | along * dm)
        => along.detach() * increments(value, problem, paths, policy))
    features at the right end in CTD(0) | [:, :-1] => [:, 1:]
    discount of the features missing in CTD(0) | discount_factors(problem, paths) * along => along
ctrl.martingale.ctd_lambda
    gradient through dM in CTD(lambda) | running).detach() => running)
    step sizes missing in CTD(lambda)'s features | paths) * h * along => paths) * along
ctrl.advantages.continuous_gae
    lambda for a step instead of a unit of time | (discount + rate) * step_sizes)
        => discount * step_sizes - rate * step_sizes.mean())
    discount missing between features and increments | keep = torch.exp(-(discount + rate) => keep = torch.exp(-rate
    lambda above 1 | keep = torch.exp(-(discount + rate) => keep = torch.exp(-(discount - 0.1 * rate)
ctrl.martingale.martingale_loss
    time in ML summed without step sizes | return (h * ( => return (h.mean() * (
    discount missing in ML's weights | (discount_factors(problem, paths) * gap) => gap
    values of the next node in ML | (returns - values(value, problem, paths))[:, :-1]
        => returns[:, :-1] - values(value, problem, paths)[:, 1:]
ctrl.returns.returns_to_go
    discount missing in the return | keep[..., k] * returns[-1] => returns[-1]
ctrl.martingale.clstd
    known part of J left out of CLSTD | known = base if base is not None else _zero => known = _zero
    terminal reward in every feature of CLSTD | martingale_increments(column(j), unpaid,
        => martingale_increments(column(j), problem,
    weights of the paths left out of CLSTD | weights = paths.weights\n => weights = None\n
    discount of the features missing in CLSTD | weights[:, None, None] * discounts[..., None] * tests
        => weights[:, None, None] * tests
ctrl.martingale.cgtd_loss
    mean of squares for the square of the mean, in GMM | 0.5 * mean.square().sum()
        => 0.5 * (weights @ each.square()).sum()
    covariance for its inverse in GMM | torch.linalg.solve(covariance, mean) => covariance @ mean
    covariance of the test functions without dt in GMM | "pk,pki,pkj->ij", weights[:, None] * h,
        => "pk,pki,pkj->ij", weights[:, None] * (h * 0 + h.mean()),
verification.closed_form.policy_evaluation.continuous
    the stationary law for the process's own, in the continuous-time reference [full] | rest + (e.variance - rest) * np.exp(-2 * k * t)
        => rest
    second-order term left out of the continuous-time reference [full] | [s2, 0, -2 * k] => [0, 0, -2 * k]
shared
    uneven grid taken for an even one, in the reward
    discount missing
"""
