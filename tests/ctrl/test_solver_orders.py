"""Strong and weak orders, locally and two-sided, of our solvers and of torchsde's.

Weak: expectations by backward induction through the production step, exact to round-off: the
equation and the payoff are periodic, so functions of the state are trigonometric polynomials on a
grid, and the normal of a step is a Gauss-Hermite rule. Strong: geometric Brownian motion, solved
exactly along one Brownian path that is refined.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import ctrl

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
    t0 = torch.zeros((), dtype=torch.float64)
    x = POINTS.repeat_interleave(RULE)[:, None]
    dw = (widen(h) * NORMALS).repeat(NODES)[:, None]
    after = solver.step(sde, t0, t0 + h, x, torch.zeros_like(x), dw).detach()
    values = payoff(POINTS)
    # the step does not depend on time, so neither does the matrix that maps values to values
    waves = torch.fft.fftfreq(NODES, 1 / NODES, dtype=torch.float64)
    basis = (torch.exp(1j * after.view(NODES, RULE, 1) * waves) * MASSES[:, None]).sum(1)
    for _ in range(steps):
        values = (basis @ (torch.fft.fft(values) / NODES)).real
    return float(interpolated(values, torch.tensor([0.8], dtype=torch.float64))[0])


def orders_and_limit(solver, sde, **settings):
    found = [expectation(solver, sde, steps, **settings) for steps in (16, 32, 64, 128)]
    gaps = -np.diff(found)
    return np.log2(gaps[:-1] / gaps[1:]), 2 * found[-1] - found[-2]


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
    orders, found = orders_and_limit(solver, sde)
    # the next term of the expansion moves a local order by O(h): 0.004 to 0.04 at these steps
    assert abs(orders[-1] - 1) < 0.03, orders
    assert abs(orders[-1] - 1) < abs(orders[0] - 1) + 1e-3
    # extrapolated once, an error of second order is left: (1 / 128)^2 times a constant below 1
    assert abs(found - limit) < 1e-4


def test_heun_of_additive_noise_is_of_weak_order_two():
    sde = ctrl.ControlledSDE(
        lambda t, x, a: 0.5 * x.sin() - 0.2, lambda t, x: 0.6, calculus="stratonovich"
    )
    orders, _ = orders_and_limit(ctrl.Heun(), sde)
    assert abs(orders[-1] - 2) < 0.03


@pytest.mark.parametrize(
    ("wrong", "effect"),
    [
        ("no correction", 5e-3),
        ("correction's sign", 1e-2),
        ("correction without its half", 5e-3),
        ("h for sqrt(h)", 1e-2),
        ("noise + 1 %", 5e-4),
    ],
)
def test_wrong_variants_have_another_limit(wrong, effect, limit):
    """So the limit's tolerance, 1e-4, decides between right and wrong."""

    def shifted(share):
        return replace(
            STRATONOVICH,
            drift=lambda t, x, a: ITO.drift(t, x, a) + share * ITO.noise_drift(t, x),
        )

    settings = {}
    if wrong == "h for sqrt(h)":
        solver, sde, settings = ctrl.EulerMaruyama(), ITO, {"widen": lambda h: h}
    elif wrong == "noise + 1 %":
        solver, sde, settings = ctrl.EulerMaruyama(), ITO, {"widen": lambda h: 1.01 * h**0.5}
    else:
        share = {"no correction": 0.0, "correction's sign": 0.5}.get(wrong, -1.0)
        solver, sde = ctrl.Heun(), shifted(share)
    _, found = orders_and_limit(solver, sde, **settings)
    assert abs(found - limit) > effect


# --- exact moments of one step of geometric Brownian motion


@pytest.mark.parametrize("name", ["EulerMaruyama", "Milstein", "Heun"])
def test_moments_of_a_linear_step_by_hand(name):
    mu, sigma = 0.3, 0.5
    ito = ctrl.ControlledSDE(lambda t, x, a: mu * x, lambda t, x: sigma * x)
    solver = OURS[name][0]
    sde = ito.to_stratonovich() if name == "Heun" else ito
    grid = ctrl.TimeGrid(torch.tensor([0.0, 0.2, 0.5], dtype=torch.float64))
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=6)
    start = torch.full((len(noise.increments), 1), 1.3, dtype=torch.float64)
    problem = ctrl.ControlProblem(sde, 1.0)
    end = ctrl.simulate(problem, STILL, start, grid, solver, noise=noise).states[:, -1, 0]
    mean, square = 1.3, 1.3**2
    for h in (0.2, 0.3):
        v = sigma**2 * h
        if name == "Heun":  # R = 1 + A + A^2 / 2, A ~ N(m, v)
            m = (mu - sigma**2 / 2) * h
            second, third = m**2 + v, m**3 + 3 * m * v
            fourth = m**4 + 6 * m**2 * v + 3 * v**2
            mean *= 1 + m + second / 2
            square *= 1 + 2 * m + 2 * second + third + fourth / 4
        else:
            mean *= 1 + mu * h
            square *= (1 + mu * h) ** 2 + v + (v**2 / 2 if name == "Milstein" else 0)
    assert float(noise.weights @ end) == pytest.approx(mean, rel=1e-13)
    assert float(noise.weights @ end.square()) == pytest.approx(square, rel=1e-12)


# --- strong order along one path

MU, SIGMA, PATHS, GROUPS = 0.3, 0.5, 6000, 12
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


@pytest.mark.parametrize("name", STRONG)
def test_strong_order(name, increments):
    solver, sde, order = STRONG[name]
    start = torch.ones(PATHS, 1, dtype=torch.float64)
    problem = ctrl.ControlProblem(sde, 1.0)
    squares = []
    for grid, dw in increments:
        end = ctrl.simulate_end(
            problem, STILL, start, grid, solver, noise=ctrl.Noise(dw.contiguous())
        )
        exact = torch.exp(MU - SIGMA**2 / 2 + SIGMA * dw.sum(1))
        squares.append((end - exact).square().view(GROUPS, -1).mean(1))
    slopes = 0.5 * torch.log2(squares[-2] / squares[-1])  # of every group, at the fine end
    error = float(slopes.std()) / GROUPS**0.5
    # groups of 500 paths tell the slope to 0.01 to 0.03; half a unit separates orders, and at 64
    # steps the next order moves a slope by less than 0.05
    assert error < 0.04
    assert abs(float(slopes.mean()) - order) < 0.05 + 4 * error, (slopes.mean(), error)
