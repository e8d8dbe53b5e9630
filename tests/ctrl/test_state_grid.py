"""Grids of states: exact on multilinear functions, around periodic axes, nowhere else."""

import math

import numpy as np
import pytest
import scipy.interpolate
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrl.state_grid import Axis, GridFunction, grid_points, neighbours

AXES = (Axis(-1.0, 2.0, 5), Axis(0.5, 1.5, 4))
TIMES = torch.linspace(0.2, 1.7, 4, dtype=torch.float64)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**31), st.integers(1, 9))
def test_interpolation_in_time_and_state_is_that_of_scipy(seed, paths):
    table, x = draw(seed, 4, 5, 4, 2), draw(seed + 1, paths, 2)
    x = torch.tensor([-1.0, 0.5]) + torch.tensor([3.0, 1.0]) * x
    t = 0.2 + 1.5 * draw(seed + 2)
    interpolated = GridFunction(AXES, TIMES, table)(t, x)
    nodes = (TIMES.numpy(), *(axis.points().numpy() for axis in AXES))
    at = np.column_stack([np.full(paths, float(t)), x.numpy()])
    exact = scipy.interpolate.RegularGridInterpolator(nodes, table.numpy())(at)
    torch.testing.assert_close(interpolated, torch.from_numpy(exact), rtol=0, atol=1e-12)


@given(st.integers(0, 2**31), st.integers(-3, 3))
def test_a_periodic_axis_goes_around(seed, turns):
    axis = Axis(-1.0, 1.0, 6, "periodic")
    function = GridFunction((axis,), torch.zeros(1), draw(seed, 1, 6))
    x = draw(seed + 1, 7, 1)
    now = torch.tensor(5.0)  # any: it is tabulated at one time alone
    torch.testing.assert_close(
        function(now, x + 2.0 * turns), function(now, x), rtol=0, atol=1e-13 * 6
    )
    middle = torch.tensor([[1.0 - axis.spacing / 2]], dtype=torch.float64)
    between = function.table[0, [0, -1]].mean()
    torch.testing.assert_close(function(now, middle)[0], between, rtol=0, atol=1e-13)


def test_neighbours_wrap_or_mirror():
    periodic, wall = Axis(0.0, 1.0, 4, "periodic"), Axis(0.0, 1.0, 4)
    assert neighbours((periodic,), (1,)).tolist() == [1, 2, 3, 0]
    assert neighbours((periodic,), (-1,)).tolist() == [3, 0, 1, 2]
    assert neighbours((wall,), (1,)).tolist() == [1, 2, 3, 2]
    assert neighbours((wall,), (-1,)).tolist() == [1, 0, 1, 2]
    assert neighbours((wall, periodic), (1, -1)).view(4, 4)[3].tolist() == [11, 8, 9, 10]
    assert len(grid_points((wall, periodic))) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_answer_has_the_dtype_of_the_states(dtype):
    function = GridFunction(AXES, TIMES, draw(3, 4, 5, 4))
    x = torch.tensor([[-1.0, 0.5], [2.0, 1.5]], dtype=dtype)
    interpolated = function(torch.tensor(1.7), x)
    assert interpolated.dtype == dtype
    torch.testing.assert_close(interpolated, function.table[-1, [0, -1], [0, -1]].to(dtype))


def test_empty_expanded_and_strided_states_are_fine():
    function = GridFunction(AXES, TIMES, draw(3, 4, 5, 4, 3))
    now = torch.tensor(1.0)
    x = draw(4, 2, 6).T
    assert function(now, x[:0] + 0.5).shape == (0, 3)
    for states in (x[:, :] + 0.5, (x + 0.5)[::2], (x[:1] + 0.5).expand(4, 2)):
        torch.testing.assert_close(function(now, states), function(now, states.contiguous()))


def test_the_slope_is_that_of_the_cell():
    function = GridFunction((Axis(0.0, 3.0, 4),), torch.zeros(1), torch.tensor([[0.0, 1, 4, 9]]))
    x = torch.tensor([[0.5], [2.25]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(torch.tensor(0.0), x).sum(), x)
    torch.testing.assert_close(slope, torch.tensor([[1.0], [5.0]], dtype=torch.float64))


def test_the_slope_in_time_is_that_of_the_step():
    function = GridFunction(AXES, TIMES, draw(3, 4, 5, 4))
    x = grid_points(AXES)[[0, 7]]
    at, one = torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda t: function(t, x), (at,), (one,))
    exact = (function.table[2] - function.table[1]).reshape(-1)[[0, 7]] / 0.5
    torch.testing.assert_close(slope, exact, rtol=0, atol=1e-13)


def test_outside_of_the_grid_is_refused():
    function = GridFunction(AXES, TIMES, draw(3, 4, 5, 4))
    inside = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    now = torch.tensor(1.0)
    for x, words in (([[0.0, 1.6]], "coordinate 1"), ([[-1.1, 1.0]], "coordinate 0")):
        with pytest.raises(ValueError, match=words):
            function(now, torch.tensor(x))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            function(now, torch.tensor([[0.0, bad]]))
    for t in (0.1, 1.8, math.nan):
        with pytest.raises(ValueError, match="t must be"):
            function(torch.tensor(t), inside)
    with pytest.raises((ValueError, TypeError), match=r"t must be|type"):
        function(torch.ones(2), inside)
    with pytest.raises(ValueError, match="states must be floating"):
        function(now, inside[:, :1])
    with pytest.raises((ValueError, TypeError), match=r"states must be floating|type"):
        function(now, inside.long())


def test_bad_axes_are_refused():
    with pytest.raises(ValueError, match="low < high"):
        Axis(1.0, 1.0, 5)
    with pytest.raises(ValueError, match="finite"):
        Axis(math.nan, 1.0, 5)
    with pytest.raises(ValueError, match="finite"):
        Axis(0.0, math.inf, 5)
    with pytest.raises(ValueError, match="at least 4"):
        Axis(0.0, 1.0, 3)
    with pytest.raises((ValueError, TypeError)):
        Axis(0.0, 1.0, 5, "absorbing")
