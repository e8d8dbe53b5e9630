"""Strong and weak orders, locally and two-sided, of our solvers and of torchsde's.

Weak: expectations by backward induction through the production step, exact to round-off: the
equation and the payoff are periodic, so functions of the state are trigonometric polynomials on a
grid, and the normal of a step is a Gauss-Hermite rule. Strong: geometric Brownian motion, solved
exactly along one Brownian path that is refined.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

import ctrl
from ctrl.torchsde_solver import _Piece

STILL = ctrl.DeterministicPolicy(lambda t, x: torch.zeros_like(x))
ITO = ctrl.ControlledSDE(lambda t, x, a: 0.5 * x.sin() - 0.2 + a, lambda t, x: 0.5 + 0.3 * x.cos())
STRATONOVICH = ITO.to_stratonovich()
NODES, RULE, HORIZON = 64, 24, 0.5
POINTS = 2 * math.pi * torch.arange(NODES, dtype=torch.float64) / NODES
NORMALS, MASSES = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(RULE))
MASSES = MASSES / MASSES.sum()


def payoff(x):
    return x.sin().exp()


def interpolated(values, x):
    """The trigonometric polynomial through values at POINTS, at x."""
    coefficients = torch.fft.fft(values) / NODES
    waves = torch.fft.fftfreq(NODES, 1 / NODES, dtype=torch.float64)
    return (torch.exp(1j * x[..., None] * waves) @ coefficients).real


def expectation(solver, sde, steps, widen=lambda h: h**0.5):
    """E payoff(X_T) from x = 0.8."""
    h = HORIZON / steps
    x = POINTS.repeat_interleave(RULE)[:, None]
    dw = (widen(h) * NORMALS).repeat(NODES)[:, None]
    return backwards(stepped(solver, sde, h, x, dw), MASSES, steps)


def stepped(solver, sde, h, x, dw):
    """One production step from x."""
    t0 = torch.zeros((), dtype=torch.float64)
    return solver.step(sde, t0, t0 + h, x, torch.zeros_like(x), dw).detach()


def backwards(after, masses, steps):
    """E payoff(X_T) from x = 0.8, the step mapping every POINT to ``after`` with these masses."""
    values = payoff(POINTS)
    # the step does not depend on time, so neither does the matrix that maps values to values
    waves = torch.fft.fftfreq(NODES, 1 / NODES, dtype=torch.float64)
    basis = (torch.exp(1j * after.view(NODES, -1, 1) * waves) * masses[:, None]).sum(1)
    for _ in range(steps):
        values = (basis @ (torch.fft.fft(values) / NODES)).real
    return float(interpolated(values, torch.tensor([0.8], dtype=torch.float64))[0])


def orders_and_limit(solver, sde, **settings):
    means = [expectation(solver, sde, steps, **settings) for steps in (32, 64, 128, 256)]
    gaps = -np.diff(means)
    return np.log2(gaps[:-1] / gaps[1:]), 2 * means[-1] - means[-2]


OURS = {
    "EulerMaruyama": (ctrl.EulerMaruyama(), ITO),
    "Milstein": (ctrl.Milstein(), ITO),
    "Heun": (ctrl.Heun(), STRATONOVICH),
}
THEIRS = {
    name: (ctrl.TorchSDE(name), ITO if name in ("euler", "milstein") else STRATONOVICH)
    for name in ("euler", "milstein", "euler_heun", "heun", "midpoint", "reversible_heun")
}


@pytest.fixture(scope="module")
def limit():
    """By Richardson's extrapolation to third order of Milstein's values; own error below 1e-9."""
    values = [expectation(ctrl.Milstein(), ITO, steps) for steps in (64, 128, 256, 512)]
    for power in (1, 2, 3):
        values = [(2**power * b - a) / (2**power - 1) for a, b in itertools.pairwise(values)]
    return values[0]


@pytest.mark.parametrize("name", [*OURS, *THEIRS])
def test_weak_order_is_one_and_the_limit_is_everybodys(name, limit):
    solver, sde = (OURS | THEIRS)[name]
    orders, limit_of_means = orders_and_limit(solver, sde)
    # the next term of the expansion moves a local order by O(h): at most 0.012 at 128 steps
    assert abs(orders[-1] - 1) < 0.02, orders
    assert abs(orders[-1] - 1) < abs(orders[0] - 1) + 1e-3
    # extrapolated once, an error of second order is left: (1 / 256)^2 times a constant below 0.1
    assert abs(limit_of_means - limit) < 2e-6


def test_heun_of_additive_noise_is_of_weak_order_two():
    sde = ctrl.ControlledSDE(
        lambda t, x, a: 0.5 * x.sin() - 0.2, lambda t, x: 0.6, calculus="stratonovich"
    )
    orders, _ = orders_and_limit(ctrl.Heun(), sde)
    assert abs(orders[-1] - 2) < 0.02


@pytest.mark.parametrize(
    ("wrong", "effect"),
    [
        ("no correction", 5e-3),
        ("correction's sign", 1e-2),
        ("correction without its half", 5e-3),
        ("h for sqrt(h)", 1e-2),
        ("noise + 1 %", 5e-4),
        ("drift + 1 %", 3e-4),
        ("square of the diffusion", 1e-2),
    ],
)
def test_wrong_variants_have_another_limit(wrong, effect, limit):
    """So the limit's tolerance, 2e-6, decides between right and wrong."""

    def shifted(share):
        return replace(
            STRATONOVICH,
            drift=lambda t, x, a: ITO.drift(t, x, a) + share * ITO.noise_drift(t, x),
        )

    settings = {}
    if wrong == "h for sqrt(h)":
        solver, sde, settings = ctrl.EulerMaruyama(), ITO, {"widen": lambda h: h}
    elif wrong == "drift + 1 %":
        solver = ctrl.EulerMaruyama()
        sde = replace(ITO, drift=lambda t, x, a: 1.01 * ITO.drift(t, x, a))
    elif wrong == "square of the diffusion":
        solver = ctrl.EulerMaruyama()
        sde = replace(ITO, diffusion=lambda t, x: (0.5 + 0.3 * x.cos()).square())
    elif wrong == "noise + 1 %":
        solver, sde, settings = ctrl.EulerMaruyama(), ITO, {"widen": lambda h: 1.01 * h**0.5}
    else:
        share = {"no correction": 0.0, "correction's sign": 0.5}.get(wrong, -1.0)
        solver, sde = ctrl.Heun(), shifted(share)
    _, limit_of_means = orders_and_limit(solver, sde, **settings)
    assert abs(limit_of_means - limit) > effect


# --- exact moments of one step of geometric Brownian motion


@pytest.mark.parametrize("name", ["EulerMaruyama", "Milstein", "Heun", "euler", "milstein", "heun"])
def test_moments_of_a_linear_step_by_hand(name):
    mu, sigma = 0.3, 0.5
    ito = ctrl.ControlledSDE(lambda t, x, a: mu * x, lambda t, x: sigma * x)
    solver = (OURS | THEIRS)[name][0]
    sde = ito.to_stratonovich() if name in ("Heun", "heun") else ito
    grid = ctrl.TimeGrid(torch.tensor([0.0, 0.2, 0.5], dtype=torch.float64))
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=6)
    start = torch.full((len(noise.increments), 1), 1.3, dtype=torch.float64)
    problem = ctrl.ControlProblem(sde, 1.0)
    end = ctrl.simulate(problem, STILL, start, grid, solver, noise=noise).states[:, -1, 0]
    mean, square = 1.3, 1.3**2
    for h in (0.2, 0.3):
        v = sigma**2 * h
        if name in ("Heun", "heun"):  # R = 1 + A + A^2 / 2, A ~ N(m, v)
            m = (mu - sigma**2 / 2) * h
            second, third = m**2 + v, m**3 + 3 * m * v
            fourth = m**4 + 6 * m**2 * v + 3 * v**2
            mean *= 1 + m + second / 2
            square *= 1 + 2 * m + 2 * second + third + fourth / 4
        else:
            mean *= 1 + mu * h
            square *= (1 + mu * h) ** 2 + v + (v**2 / 2 if name in ("Milstein", "milstein") else 0)
    assert float(noise.weights @ end) == pytest.approx(mean, rel=1e-13)
    assert float(noise.weights @ end.square()) == pytest.approx(square, rel=1e-12)


# --- srk, which asks for the integral of the path too


@dataclass(frozen=True)
class WithIntegral(ctrl.TorchSDE):
    """srk on prescribed pairs of W and int (W - W(t0)) dt, in place of a drawn integral."""

    integral: Any = None

    def _pieces(self, begin, end, increment, normals):
        yield begin, end, _Piece(increment, self.integral)


FEW, FEW_MASSES = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(12))
FIRST, SECOND = torch.cartesian_prod(FEW, FEW).T
PAIR_MASSES = torch.outer(FEW_MASSES, FEW_MASSES).flatten() / FEW_MASSES.sum() ** 2


def pairs(h, width=1.0):
    """Quadrature nodes of (W, int W dt) over h: the integral is h (W / 2 + N(0, h / 12))."""
    w = h**0.5 * FIRST
    return w, h * (0.5 * w + width * (h / 12) ** 0.5 * SECOND)


def srk_expectation(steps, width=1.0):
    h = HORIZON / steps
    w, integral = (value.repeat(NODES)[:, None] for value in pairs(h, width))
    x = POINTS.repeat_interleave(len(FIRST))[:, None]
    return backwards(
        stepped(WithIntegral("srk", integral=integral), ITO, h, x, w), PAIR_MASSES, steps
    )


def test_srk_has_everybodys_limit_and_needs_areas_of_the_right_width(limit):
    # measured: 2.7e-5 at 8 steps, 3.0e-7 at 64, where Euler-Maruyama's error is above 1e-4
    assert abs(srk_expectation(8) - limit) < 5e-5
    assert abs(srk_expectation(64) - limit) < 1e-6
    assert abs(srk_expectation(64, width=1.1) - limit) > 5e-6  # negative controls
    assert abs(srk_expectation(64, width=0.0) - limit) > 2e-5


def test_srk_has_weak_order_one_and_a_half_for_a_linear_equation():
    """Moments of one step, by quadrature, miss exp(m h) by h^(order + 1)."""
    mu, sigma = 0.7, 0.9
    sde = ctrl.ControlledSDE(lambda t, x, a: mu * x, lambda t, x: sigma * x)

    def gaps(h):
        w, integral = (value[:, None] for value in pairs(h))
        x = torch.ones_like(w)
        end = stepped(WithIntegral("srk", integral=integral), sde, h, x, w)[:, 0]
        mean, square = float(PAIR_MASSES @ end), float(PAIR_MASSES @ end.square())
        return mean - math.exp(mu * h), square - math.exp((2 * mu + sigma**2) * h)

    errors = np.array([gaps(2.0**-k) for k in range(5, 10)])
    mean, square = errors.T
    # the mean is that of a third-order method for ordinary equations; the next term is O(h)
    assert abs(np.log2(mean[1] / mean[2]) - 4) < 0.02
    # the square's terms are h^(5/2), h^3, h^(7/2): the second is eliminated
    left = square[:-1] - 8 * square[1:]
    assert abs(np.log2(left[-2] / left[-1]) - 2.5) < 0.02


# --- strong order along one path

MU, SIGMA, PATHS, GROUPS = 0.3, 0.5, 6000, 12
SWIFT = ctrl.ControlledSDE(
    lambda t, x, a: 1.5 * x.sin() - 0.2, lambda t, x: 0.5 + 0.3 * x.cos()
)  # whose drift bends the path within a step
GEOMETRIC = ctrl.ControlledSDE(lambda t, x, a: MU * x, lambda t, x: SIGMA * x)
STRONG = {
    "EulerMaruyama": (ctrl.EulerMaruyama(), GEOMETRIC, 0.5),
    "Milstein": (ctrl.Milstein(), GEOMETRIC, 1.0),
    "Heun": (ctrl.Heun(), GEOMETRIC.to_stratonovich(), 1.0),
    "euler": (ctrl.TorchSDE("euler"), GEOMETRIC, 0.5),
    "milstein": (ctrl.TorchSDE("milstein"), GEOMETRIC, 1.0),
    "srk": (ctrl.TorchSDE("srk"), GEOMETRIC, 1.5),
    "euler_heun": (ctrl.TorchSDE("euler_heun"), GEOMETRIC.to_stratonovich(), 1.0),
    "heun": (ctrl.TorchSDE("heun"), GEOMETRIC.to_stratonovich(), 1.0),
    "midpoint": (ctrl.TorchSDE("midpoint"), GEOMETRIC.to_stratonovich(), 1.0),
    "log_ode": (ctrl.TorchSDE("log_ode"), GEOMETRIC.to_stratonovich(), 1.0),
    "reversible_heun": (ctrl.TorchSDE("reversible_heun"), GEOMETRIC.to_stratonovich(), 1.0),
}


@pytest.fixture(scope="module")
def increments():
    """One Brownian path on 32, 64 and 128 steps."""
    g = torch.Generator().manual_seed(11)
    grids = [ctrl.uniform_grid(1.0, steps) for steps in (32, 64, 128)]
    finest = ctrl.noise.brownian_increments(grids[2].steps, PATHS, (1,), generator=g)
    return [
        (grid, ctrl.noise.coarsen(finest, grids[2].nodes, grid.nodes) if k < 2 else finest)
        for k, grid in enumerate(grids)
    ]


def slope(squares):
    """Local strong order from mean squares of groups of paths at two levels; standard error."""
    slopes = 0.5 * torch.log2(squares[0] / squares[1])
    return float(slopes.mean()), float(slopes.std()) / len(slopes) ** 0.5


def strong_order(solver, sde, increments):
    """At the fine end."""
    start = torch.ones(PATHS, 1, dtype=torch.float64)
    problem, squares = ctrl.ControlProblem(sde, 1.0), []
    for grid, dw in increments[-2:]:
        noise = ctrl.Noise(dw.contiguous())
        end = ctrl.simulate_end(problem, STILL, start, grid, solver, noise=noise)
        exact = torch.exp(MU - SIGMA**2 / 2 + SIGMA * dw.sum(1))
        squares.append((end - exact).square().view(GROUPS, -1).mean(1))
    return slope(squares)


@pytest.mark.parametrize("name", STRONG)
def test_strong_order(name, increments):
    solver, sde, order = STRONG[name]
    measured_order, error = strong_order(solver, sde, increments)
    # groups of 500 paths tell the slope to 0.01 to 0.03; half a unit separates orders, and at 64
    # steps the next order moves a slope by less than 0.05
    assert error < 0.04
    assert abs(measured_order - order) < 0.05 + 4 * error, (measured_order, error)


@dataclass(frozen=True)
class WrongMilstein:
    """Milstein's correction with a wrong factor: 0 drops it, -1 flips its sign."""

    factor: float

    def step(self, *arguments):
        euler = ctrl.EulerMaruyama().step(*arguments)
        return euler + self.factor * (ctrl.Milstein().step(*arguments) - euler)


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.5, 1.1])
def test_wrong_corrections_are_not_of_strong_order_one(factor, increments):
    order, error = strong_order(WrongMilstein(factor), GEOMETRIC, increments)
    assert abs(order - 1) > 0.05 + 4 * error


def test_two_paths_that_are_not_one_have_no_order(increments):
    grid, dw = increments[-1]
    other = [increments[-2], (grid, dw.flip(0))]
    start = torch.ones(PATHS, 1, dtype=torch.float64)
    problem, squares = ctrl.ControlProblem(GEOMETRIC, 1.0), []
    exact = torch.exp(MU - SIGMA**2 / 2 + SIGMA * dw.sum(1))
    for grid, dw in other:
        noise = ctrl.Noise(dw.contiguous())
        end = ctrl.simulate_end(problem, STILL, start, grid, ctrl.Milstein(), noise=noise)
        squares.append((end - exact).square().view(GROUPS, -1).mean(1))
    assert slope(squares)[0] < 0


def test_srk_has_strong_order_one_and_a_half_with_the_paths_own_integrals():
    """And 1 with integrals drawn anew on every grid, as where increments alone are known."""
    fine, paths, h = 512, 3000, 1 / 512
    g = torch.Generator().manual_seed(7)
    z = torch.randn(2, fine, paths, 1, dtype=torch.float64, generator=g)
    w = h**0.5 * z[0]
    integral = h * (0.5 * w + (h / 12) ** 0.5 * z[1])

    def end(w, integral):
        h, x = 1 / len(w), torch.full((paths, 1), 0.8, dtype=torch.float64)
        for one, area in zip(w, integral, strict=True):
            x = stepped(WithIntegral("srk", integral=area), SWIFT, h, x, one)
        return x

    finest = end(w, integral)

    def error(steps, coupled):
        blocks = w.unflatten(0, (steps, -1))
        before, sums = blocks.cumsum(1) - blocks, blocks.sum(1)
        whole = (integral.unflatten(0, (steps, -1)) + before * h).sum(1)
        if not coupled:
            normal = torch.randn(sums.shape, dtype=torch.float64, generator=g)
            whole = (0.5 * sums + (1 / steps / 12) ** 0.5 * normal) / steps
        return (end(sums, whole) - finest).square().view(GROUPS, -1).mean(1)

    for coupled, order in ((True, 1.5), (False, 1.0)):
        measured_order, uncertainty = slope([error(16, coupled), error(32, coupled)])
        assert uncertainty < 0.06
        assert abs(measured_order - order) < 0.05 + 4 * uncertainty, (
            coupled,
            measured_order,
            uncertainty,
        )
