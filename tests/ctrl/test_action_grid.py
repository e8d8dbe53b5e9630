"""Action grids: they integrate what they should, and give moments of their masses."""

import math

import pytest
import torch

from ctrl.action_grid import ActionGrid, gauss_legendre, trapezoid


def test_gauss_legendre_integrates_polynomials_over_a_box():
    low, high = torch.tensor([-1.0, 0.5]), torch.tensor([2.0, 1.25])
    grid = gauss_legendre(low, high, 3)  # exact to degree 5 in each coordinate
    x, y = grid.nodes.unbind(-1)
    integral = float(grid.weights @ (x**5 * y**4))
    exact = (2**6 - 1) / 6 * (1.25**5 - 0.5**5) / 5
    assert integral == pytest.approx(exact, rel=1e-13)


def test_the_trapezoid_rule_is_spectral_for_a_density_that_vanishes_at_the_ends():
    grid = trapezoid(-6.0, 7.0, 31)
    a, std = grid.nodes[:, 0], 0.6
    density = (-0.5 * ((a - 0.3) / std) ** 2).exp() / (std * math.sqrt(2 * math.pi))
    # 2 exp(-2 pi^2 (std / spacing)^2) = 5e-17
    assert float(grid.weights @ density) == pytest.approx(1, abs=1e-14)
    mean, grid_std = grid.moments((grid.weights * density).unsqueeze(1))
    assert float(mean) == pytest.approx(0.3, abs=1e-13)
    assert float(grid_std) == pytest.approx(std, abs=1e-13)


def test_the_trapezoid_rule_integrates_linear_functions():
    grid = trapezoid(-1.0, 2.0, 4)
    assert float(grid.weights.sum()) == pytest.approx(3, abs=1e-14)
    assert float(grid.weights @ grid.nodes[:, 0]) == pytest.approx(1.5, abs=1e-14)


def test_ends_are_the_outermost_nodes_of_every_coordinate():
    assert trapezoid(0.0, 1.0, 4).ends().tolist() == [True, False, False, True]
    square = trapezoid(torch.zeros(2), torch.ones(2), 4)
    assert int(square.ends().sum()) == 12
    assert square.nodes.shape == (16, 2)


def test_bad_grids_are_refused():
    for rule in (gauss_legendre, trapezoid):
        for low, high in ((1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.inf)):
            with pytest.raises(ValueError, match="low"):
                rule(low, high, 5)
        with pytest.raises(ValueError, match="at least 2"):
            rule(0.0, 1.0, 1)
        with pytest.raises(ValueError, match="alike"):
            rule(torch.zeros(2), torch.ones(3), 5)
        with pytest.raises(ValueError, match="100000"):
            rule(torch.zeros(4), torch.ones(4), 20)
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="positive"):
        ActionGrid(one, -one)
    with pytest.raises(ValueError, match="finite"):
        ActionGrid(one / 0, one)
    with pytest.raises((ValueError, TypeError), match=r"weights must be|type"):
        ActionGrid(one, torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="float64"):
        ActionGrid(one.float(), one)
