"""Plots are looked at by people; tests see that they hold what they should."""

import numpy as np
import pytest
import torch

import ctrl
from ctrl import plots

GRID = ctrl.uniform_grid(1.0, 8)
X = torch.linspace(-2, 2, 41, dtype=torch.float64)


def paths(weights=False):
    sde = ctrl.ControlledSDE(lambda t, x, a: -x, lambda t, x: 0.5)
    problem, policy = ctrl.ControlProblem(sde, 1.0), ctrl.DeterministicPolicy(lambda t, x: x)
    if weights:
        grid = ctrl.uniform_grid(1.0, 3)
        noise = ctrl.noise.gauss_hermite(grid.steps, nodes=3)
        start = torch.ones(len(noise.increments), 1, dtype=torch.float64)
        return ctrl.simulate(problem, policy, start, grid, noise=noise)
    start = torch.ones(200, 2, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    return ctrl.simulate(problem, policy, start, GRID, generator=g)


@pytest.mark.parametrize("weights", [False, True])
def test_paths_show_lines_and_their_mean(weights, tmp_path):
    made = paths(weights)
    axes = plots.plot_paths(made, show=5)
    assert len(axes.lines) == 6
    mean = axes.lines[-1].get_ydata()
    weighted = made.states[..., 0].mean(0) if not weights else made.weights @ made.states[..., 0]
    np.testing.assert_allclose(mean, weighted)
    axes.figure.savefig(tmp_path / "paths.png")
    assert (tmp_path / "paths.png").stat().st_size > 5000


def test_the_lines_of_weighted_paths_surround_their_mean():
    """The first paths of a quadrature are a corner of it: they would lie on one side."""
    made = paths(weights=True)
    axes = plots.plot_paths(made, show=8)
    ends = [line.get_ydata()[-1] for line in axes.lines[:-1]]
    mean = axes.lines[-1].get_ydata()[-1]
    assert min(ends) < mean - 0.1
    assert max(ends) > mean + 0.1


def test_weighted_quantiles():
    values = np.array([[3.0, 1.0], [1.0, 2.0], [2.0, 3.0]])
    weights = np.array([0.1, 0.3, 0.6])
    np.testing.assert_array_equal(plots._quantile(values, weights, 0.05), [1, 1])
    np.testing.assert_array_equal(plots._quantile(values, weights, 0.5), [2, 3])
    np.testing.assert_array_equal(plots._quantile(values, weights, 0.95), [3, 3])
    same = np.full(3, 1 / 3)
    np.testing.assert_array_equal(plots._quantile(values, same, 1 / 3), [1, 1])


def test_value_lines_and_map(tmp_path):
    value = lambda t, x: -(1 + t) * x.square().sum(1)
    axes = plots.plot_value(value, X, times=(0.0, 0.5, 1.0))
    assert [line.get_label() for line in axes.lines] == ["t = 0", "t = 0.5", "t = 1"]
    np.testing.assert_allclose(axes.lines[1].get_ydata(), -1.5 * X.square())
    axes.figure.savefig(tmp_path / "value.png")
    flat = plots.plot_value(value, (X, X[:7]))
    flat.figure.savefig(tmp_path / "map.png")


def test_policies_have_a_band_of_one_standard_deviation():
    policy = ctrl.GaussianPolicy(lambda t, x: -x, lambda t: 0.3 + t)
    axes = plots.plot_policy(policy, X, times=(0.0, 0.2))
    assert len(axes.lines) == len(axes.collections) == 2
    top = axes.collections[1].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(2.5)
    certain = plots.plot_policy(ctrl.DeterministicPolicy(lambda t, x: -x), X)
    assert not certain.collections
    assert [a.get_ylabel() for a in (axes, certain)] == [
        "action 0 (mean, one standard deviation)",
        "action 0",
    ]


def test_given_axes_are_used():
    axes = plots.plot_paths(paths())
    before = len(axes.lines)
    assert plots.plot_paths(paths(), coordinate=1, show=0, axes=axes) is axes
    assert len(axes.lines) == before + 1


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="coordinate"):
        plots.plot_paths(paths(), coordinate=2)
    with pytest.raises(ValueError, match="show"):
        plots.plot_paths(paths(), show=-1)
    value = lambda t, x: x[:, 0]
    for times in ((), (0.0, 1.0)):
        with pytest.raises(ValueError, match="times"):
            plots.plot_value(value, (X, X), times=times)
    with pytest.raises(ValueError, match="coordinate"):
        plots.plot_policy(ctrl.DeterministicPolicy(lambda t, x: x), X, coordinate=3)


def test_the_std_of_a_squashed_policy_is_that_of_its_actions():
    latent = ctrl.GaussianPolicy(lambda t, x: x, 0.7)
    policy = ctrl.SquashedGaussianPolicy(latent, -1.0, 3.0)
    x, t = torch.tensor([[0.3], [-0.8]]), torch.zeros(())
    drawn = 1 + 2 * torch.tanh(x + 0.7 * torch.linspace(-6, 6, 2001))
    weights = torch.exp(-(torch.linspace(-6, 6, 2001) ** 2) / 2)
    mean = (drawn * weights).sum(1) / weights.sum()
    variance = ((drawn - mean[:, None]) ** 2 * weights).sum(1) / weights.sum()
    torch.testing.assert_close(plots._std(policy, t, policy.mean(t, x), x)[:, 0], variance.sqrt())
