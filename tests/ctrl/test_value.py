"""The generator against formulas written out by hand."""

from dataclasses import replace

import pytest
import torch

import ctrl
from ctrl.value import generator, martingale_increments, values

T = torch.tensor(0.4, dtype=torch.float64)
ROUND_OFF = {"rtol": 1e-12, "atol": 1e-12}


def points(dim, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(5, dim, dtype=torch.float64, generator=g) for _ in range(2))


def value(t, x):
    return torch.sin(t) * x.square().sum(1) + x[:, 0] ** 3 * x[:, 1]


def slope(x):
    found = 2 * torch.sin(T) * x
    found[:, 0] += 3 * x[:, 0] ** 2 * x[:, 1]
    found[:, 1] += x[:, 0] ** 3
    return found


def curvature(x):
    found = 2 * torch.sin(T) * torch.eye(2, dtype=x.dtype).repeat(len(x), 1, 1)
    found[:, 0, 0] += 6 * x[:, 0] * x[:, 1]
    found[:, 0, 1] += 3 * x[:, 0] ** 2
    found[:, 1, 0] += 3 * x[:, 0] ** 2
    return found


def expected(x, a, columns):
    """d_t V + b . grad V + 1/2 tr(sigma sigma' Hess V), for the drift a - x."""
    transport = torch.cos(T) * x.square().sum(1) + ((a - x) * slope(x)).sum(1)
    return transport + 0.5 * torch.einsum("pij,pik,pkj->p", columns, curvature(x), columns)


@pytest.mark.parametrize("kind", ["number", "diagonal", "scalar", "general", "controlled"])
def test_generator_of_every_noise(kind):
    x, a = points(2)
    matrix = torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.7, -0.4]], dtype=torch.float64)
    diffusion, noise, motions, controlled = {
        "number": (lambda t, x: 0.6, "diagonal", None, False),
        "diagonal": (lambda t, x: 0.3 + 0.1 * x.square(), "diagonal", None, False),
        "scalar": (lambda t, x: 0.3 + 0.1 * x, "scalar", None, False),
        "general": (lambda t, x: matrix.expand(len(x), 2, 3), "general", 3, False),
        "controlled": (lambda t, x, a: 0.2 + a.square(), "diagonal", None, True),
    }[kind]
    sde = ctrl.ControlledSDE(
        lambda t, x, a: a - x, diffusion, noise, motions, controls_diffusion=controlled
    )
    columns = sde.columns(T, x, a)
    torch.testing.assert_close(generator(sde, value, T, x, a), expected(x, a, columns), **ROUND_OFF)
    with torch.no_grad():
        torch.testing.assert_close(
            generator(sde, value, T, x, a), expected(x, a, columns), **ROUND_OFF
        )


def test_a_stratonovich_equation_has_the_generator_of_its_ito_form():
    x, a = points(2)
    sde = ctrl.ControlledSDE(
        lambda t, x, a: a - x, lambda t, x: 0.3 + 0.1 * x.square(), calculus="stratonovich"
    )
    correction = 0.5 * (0.3 + 0.1 * x.square()) * 0.2 * x  # sigma sigma' / 2
    columns = torch.diag_embed(0.3 + 0.1 * x.square())
    torch.testing.assert_close(
        generator(sde, value, T, x, a), expected(x, a + correction, columns), **ROUND_OFF
    )


def test_generator_of_a_network_has_parameter_gradients_and_takes_images():
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)
    ).double()
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.6)
    x, a = (v.view(5, 1, 2, 3) for v in points(6))
    found = generator(sde, lambda t, x: (1 + t) * net(x).squeeze(1), T, x, a)
    hessian = torch.autograd.functional.hessian(lambda x: (1 + T) * net(x).sum(), x)
    laplacian = torch.einsum("pijkpijk->p", hessian)
    grad = torch.autograd.grad(((1 + T) * net(x.requires_grad_())).sum(), x)[0]
    by_hand = net(x).squeeze(1) + ((a - x) * grad).flatten(1).sum(1) + 0.18 * laplacian
    torch.testing.assert_close(found, by_hand, **ROUND_OFF)
    found.sum().backward()
    assert net[1].weight.grad.abs().sum() > 0


def paths(horizon=1.0):
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.6)
    problem = ctrl.ControlProblem(sde, horizon, terminal_reward=lambda x: x.sum(1), discount=0.7)
    grid = ctrl.TimeGrid(torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64))
    start = torch.ones(3, 2, dtype=torch.float64)
    policy = ctrl.DeterministicPolicy(lambda t, x: 0.5 * x)
    g = torch.Generator().manual_seed(0)
    return problem, ctrl.simulate(problem, policy, start, grid, generator=g)


def test_values_are_pinned_to_the_terminal_reward_at_the_horizon_only():
    problem, made = paths()
    along = values(value, problem, made)
    torch.testing.assert_close(along[:, -1], made.states[:, -1].sum(1))
    torch.testing.assert_close(along[:, 1], value(made.grid.nodes[1], made.states[:, 1]))
    endless = replace(problem, horizon=float("inf"), terminal_reward=None)
    along = values(value, endless, made)
    torch.testing.assert_close(along[:, -1], value(made.grid.nodes[-1], made.states[:, -1]))


def test_increments_are_the_discounted_differences():
    problem, made = paths()
    rewards = torch.arange(6, dtype=torch.float64).view(3, 2)
    along, h = values(value, problem, made), made.grid.steps
    by_hand = torch.exp(-0.7 * h) * along[:, 1:] - along[:, :-1] + rewards - 0.2 * h
    torch.testing.assert_close(martingale_increments(value, problem, made, rewards, 0.2), by_hand)


def test_bad_values_are_refused():
    problem, made = paths()
    with pytest.raises(ValueError, match="value must return"):
        values(lambda t, x: x, problem, made)
    with pytest.raises(ValueError, match="value must be finite"):
        values(lambda t, x: x[:, 0] / 0, problem, made)
    with pytest.raises((ValueError, TypeError)):
        martingale_increments(value, problem, made, torch.zeros(3, 1, dtype=torch.float64))


def test_expanded_and_strided_states_are_like_any_other():
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.3 + 0.1 * x, "scalar")
    x, a = points(2)
    for one in (x[:1].expand(5, 2), torch.stack([x, x], dim=2)[..., 0]):
        whole = one.clone(memory_format=torch.contiguous_format)
        torch.testing.assert_close(
            generator(sde, value, T, one, a), generator(sde, value, T, whole, a)
        )


def test_money_is_worth_what_has_passed_since_the_first_node():
    """Of a grid that does not begin at 0 too."""
    problem, made = paths()
    late = replace(made, grid=ctrl.TimeGrid(made.grid.nodes + 0.4))
    factors = ctrl.value.discount_factors(problem, late)
    torch.testing.assert_close(factors, torch.exp(-0.7 * made.grid.nodes[:-1]))


@pytest.mark.parametrize("noise", ["diagonal", "scalar", "general"])
def test_the_generator_knows_the_time_of_drift_and_diffusion(noise):
    """At time t it is that of the equation frozen there."""
    x, a = points(2)

    def sigma(t, x):
        spread = 0.3 + 0.1 * x + t
        return torch.diag_embed(spread) if noise == "general" else spread

    motions = 2 if noise == "general" else None
    moving = ctrl.ControlledSDE(lambda t, x, a: (1 + t) * a - x, sigma, noise, motions)
    frozen = ctrl.ControlledSDE(
        lambda t, x, a: 1.4 * a - x, lambda t, x: sigma(0.4, x), noise, motions
    )
    torch.testing.assert_close(
        generator(moving, value, T, x, a), generator(frozen, value, T, x, a), **ROUND_OFF
    )
