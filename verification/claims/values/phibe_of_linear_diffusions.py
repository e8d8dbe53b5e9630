"""PhiBE on data at step h: the values it aims at, and by which power of h they miss the truth.

From data at times 0, h, ..., i h the equation of order i, with b_i = 1/h sum_j a_j E d_j
and Sigma_i = 1/h sum_j a_j E d_j d_j' in place of drift and covariance, has a solution
that misses the value by O(h^i); the Bellman equation's misses it by O(h). Optimal-PhiBE of
a linear-quadratic problem is linear-quadratic; undiscounted, without noise and in one
dimension its policy is the optimal one at every h.

A linear diffusion in two dimensions with a quadratic reward: the true value, PhiBE's of each order
and the Bellman equation's are quadratics, so that features 1, x and x x' have no error of
projection. Windows of exact transitions on Gauss-Hermite nodes make every expectation exact.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import linear, martingale, phibe
from verification.claim import Check, Setting, expectation, limit, rounding, stated
from verification.closed_form import phibe as exact

SOURCE = "Zhu, arXiv 2405.12535, PhiBE of order i; arXiv 2506.05208, the linear-quadratic case"
WHY_DOUBLE = "errors of order h^2 are differences of nearly equal numbers"

H = 0.2
FINE = (1 / 128, 1 / 256, 1 / 512)
WEIGHTS = {1: [1.0], 2: [2.0, -0.5], 3: [3.0, -1.5, 1 / 3]}


def windows(setting: Setting, h: float, order: int) -> ctrl.Paths:
    """All values of X at 0, h, ..., of exact transitions, with their weights."""
    F, f, C = exact.law(h)
    root = setting.tensor(np.linalg.cholesky(C))
    both = ctrl.noise.gauss_hermite(setting.tensor([1.0] * (order + 1)), nodes=3, noise=(2,))
    assert both.increments is not None
    normals = both.increments.unbind(1)
    states = [setting.tensor([0.3, -0.4]) + 0.6 * normals[0]]
    for z in normals[1:]:
        states.append(states[-1] @ setting.tensor(F).T + setting.tensor(f) + z @ root.T)
    grid = ctrl.uniform_grid(h * order, order, dtype=setting.dtype, device=setting.device)
    actions = states[0].new_zeros(len(states[0]), order, 1)
    return ctrl.Paths(torch.stack(states, dim=1), actions, None, grid, both.weights)


def features(t: Tensor, x: Tensor) -> Tensor:
    """1, x1, x2, x1^2, x1 x2, x2^2."""
    one, two = x.unbind(1)
    return torch.stack([torch.ones_like(one), one, two, one**2, one * two, two**2], dim=1)


def problem(setting: Setting) -> ctrl.ControlProblem:
    """The rewards; nothing may look at the dynamics, which are wrong here."""
    M, slope = setting.tensor(exact.M), setting.tensor(exact.SLOPE)

    def reward(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return -0.5 * ((x @ M) * x).sum(1) - x @ slope

    unknown = ctrl.ControlledSDE(lambda t, x, a: 7 * x, lambda t, x: 3.0)
    return ctrl.ControlProblem(unknown, float("inf"), reward, discount=exact.DISCOUNT)


def solution(setting: Setting, h: float, order: int) -> Tensor:
    """PhiBE's coefficients by the library, from windows of ``order + 1`` nodes."""
    paths = windows(setting, h, order)
    return phibe.galerkin(features, problem(setting), paths, order).coefficients


def ctd(setting: Setting, h: float) -> Tensor:
    """Those of least-squares temporal differences, from the same data."""
    return martingale.clstd(features, problem(setting), windows(setting, h, 1)).coefficients


def order_of(error: Callable[[float], float]) -> tuple[float, list[tuple[float, float]]]:
    """Power of h by which an error decreases, extrapolated once; and its curve."""
    curve = [(h, error(h)) for h in FINE]
    local = [np.log2(a[1] / b[1]) for a, b in itertools.pairwise(curve)]
    return 2 * local[1] - local[0], curve


def scalar_lq(discount: float, noise: float) -> linear.LinearQuadratic:
    """The problem in one dimension, in double precision."""
    pull, push, sigma, state, action = (
        torch.tensor([[each]], dtype=torch.float64)
        for each in (exact.PULL, exact.PUSH, noise, exact.STATE, exact.ACTION)
    )
    return linear.LinearQuadratic(pull, push, sigma, state, action, discount=discount)


def checks(setting: Setting) -> Iterator[Check]:
    """Exact expectations at one step, and orders by refinement."""
    powers = np.arange(1, 5)
    for order in (2, 3, 4):
        a = phibe.coefficients(order).numpy()
        sums = [(a * np.arange(1, order + 1.0) ** k).sum() for k in powers[:order]]
        yield stated(
            expectation(f"sum_j a_j j^k, order {order}", sums, np.eye(4)[0, :order]),
            units=rounding(order, 4.0**order),
        )
    for order, weights in WEIGHTS.items():
        if order < 3 or setting.full:
            got, want = solution(setting, H, order), exact.phibe(H, weights)
            yield expectation(f"solution of order {order} at h = {H}", got, want)
    yield expectation(f"least-squares TD at h = {H}", ctd(setting, H), exact.bellman(H))

    held = linear.solve_lq_discounted(phibe.held_lq(scalar_lq(exact.DISCOUNT, exact.NOISE), H))
    S, K = exact.optimal(H)
    got = [float(held.quadratic.hessian), float(held.law.gain)]
    yield stated(
        expectation(f"Optimal-PhiBE at h = {H}: value and gain", got, [S, K]),
        precision=torch.float64,
    )
    free = scalar_lq(0.0, 0.0)
    gains = [
        float(linear.solve_lq_ergodic(each).law.gain) for each in (phibe.held_lq(free, 0.8), free)
    ]
    yield stated(
        expectation("its policy without noise and discount, any h", gains[0], gains[1]),
        precision=torch.float64,
    )

    value = exact.true()
    for order in (1, 2):
        power, curve = order_of(
            lambda h, order=order: np.abs(solution(setting, h, order).cpu().numpy() - value).max()
        )
        yield limit(f"power of h, PhiBE of order {order}", power, float(order), curve=curve)
    power, curve = order_of(lambda h: np.abs(ctd(setting, h).cpu().numpy() - value).max())
    yield limit("power of h, least-squares TD", power, 1.0, curve=curve)


MISTAKES = """
ctrl.phibe.coefficients
    second order with 1/2 for -1/2 | `(-1) ** (j + 1) * ` => ``
    without 1/j | math.comb(order, j) / j => math.comb(order, j)
ctrl.phibe.generator
    1/2 before Sigma dropped | 0.5 * w => w
    d_j d_j' with the weights of order 1 only | own_memory(move)) => own_memory(moves[0])) * (w > 0)
    drift not divided by h | ` / as_like(step, states)` => ``
ctrl.phibe.galerkin
    discount dropped [ValueError] | ` - rate * here` => ``
    reward of the step, not its rate | [:, :count] / as_like(step, paths.states) => [:, :count]
    sign of the reward | target = - => `target = `
    test functions and equation exchanged | ij => ji
    quadrature weights dropped | weights is None => True
ctrl.martingale.clstd
    temporal differences with the sign of the reward | target = - => `target = `
ctrl.phibe.held_lq
    noise of the held action not squared over h | root, width = math.sqrt(step) => root, width = step
    action's part of the drift not integrated over the step | "B": of_action / step => "B": lq.B
    held action adds no noise | of_action / root => 0
"""
