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
    gradient_by_hand = 2 * torch.sin(T) * x
    gradient_by_hand[:, 0] += 3 * x[:, 0] ** 2 * x[:, 1]
    gradient_by_hand[:, 1] += x[:, 0] ** 3
    return gradient_by_hand


def curvature(x):
    hessian_by_hand = 2 * torch.sin(T) * torch.eye(2, dtype=x.dtype).repeat(len(x), 1, 1)
    hessian_by_hand[:, 0, 0] += 6 * x[:, 0] * x[:, 1]
    hessian_by_hand[:, 0, 1] += 3 * x[:, 0] ** 2
    hessian_by_hand[:, 1, 0] += 3 * x[:, 0] ** 2
    return hessian_by_hand


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
    generated = generator(sde, lambda t, x: (1 + t) * net(x).squeeze(1), T, x, a)
    hessian = torch.autograd.functional.hessian(lambda x: (1 + T) * net(x).sum(), x)
    laplacian = torch.einsum("pijkpijk->p", hessian)
    grad = torch.autograd.grad(((1 + T) * net(x.requires_grad_())).sum(), x)[0]
    by_hand = net(x).squeeze(1) + ((a - x) * grad).flatten(1).sum(1) + 0.18 * laplacian
    torch.testing.assert_close(generated, by_hand, **ROUND_OFF)
    generated.sum().backward()
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
        size = 0.3 + 0.1 * x + t
        return torch.diag_embed(size) if noise == "general" else size

    motions = 2 if noise == "general" else None
    moving = ctrl.ControlledSDE(lambda t, x, a: (1 + t) * a - x, sigma, noise, motions)
    frozen = ctrl.ControlledSDE(
        lambda t, x, a: 1.4 * a - x, lambda t, x: sigma(0.4, x), noise, motions
    )
    torch.testing.assert_close(
        generator(moving, value, T, x, a), generator(frozen, value, T, x, a), **ROUND_OFF
    )


ENTRIES = torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.7, -0.4]], dtype=torch.float64)
NOISES = {
    "number": (lambda t, x: 0.6, "diagonal", None),
    "diagonal": (lambda t, x: 0.3 + 0.1 * x.square(), "diagonal", None),
    "scalar": (lambda t, x: 0.3 + 0.1 * x, "scalar", None),
    "general": (lambda t, x: ENTRIES.expand(len(x), 2, 3), "general", 3),
}


@pytest.mark.parametrize("kind", NOISES)
def test_the_mean_over_all_signs_is_the_trace_and_its_variance_as_stated(kind):
    """Every vector of signs, one a probe: expectation and variance are exact, nothing is random."""
    x, a = points(2)
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, *NOISES[kind])
    columns = sde.columns(T, x, a)
    motions = columns.shape[2]
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * motions)
    shape = (len(x), len(signs), *sde.noise_shape((2,)))
    probes = signs.view(-1, motions).expand(len(x), -1, -1).reshape(shape)
    exact = generator(sde, value, T, x, a)
    torch.testing.assert_close(generator(sde, value, T, x, a, probes), exact, **ROUND_OFF)
    each = torch.stack([generator(sde, value, T, x, a, one) for one in probes.split(1, 1)])
    M = columns.mT @ curvature(x) @ columns
    off_diagonal = M - torch.diag_embed(M.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(
        (each - exact).square().mean(0), off_diagonal.square().sum((1, 2)) / 2, **ROUND_OFF
    )


@pytest.mark.parametrize("kind", NOISES)
def test_directions_a_few_at_a_time_give_the_same_generator(kind, monkeypatch):
    x, a = points(2)
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, *NOISES[kind])
    probes = torch.randn(5, 7, *sde.noise_shape((2,)), dtype=x.dtype)
    together = [generator(sde, value, T, x, a, each) for each in (None, probes)]
    for budget in (1, 2 * x.numel() * 8):
        monkeypatch.setattr(ctrl.value, "_CHUNK", budget)
        for chosen, expected in zip((None, probes), together, strict=True):
            generated = generator(sde, value, T, x, a, chosen)
            torch.testing.assert_close(generated, expected, **ROUND_OFF)


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2), (5, 3, 3), (5,)])
def test_probes_that_do_not_fit_are_refused(shape, monkeypatch):
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    x, a = points(2)
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.6)
    with pytest.raises(ValueError, match="probes must be"):
        generator(sde, value, T, x, a, torch.ones(shape, dtype=x.dtype))


@pytest.mark.parametrize("function", ["generator", "noise_drift", "view B"])
def test_a_view_of_stored_paths_takes_no_more_memory_than_a_copy(function):
    """Forward mode would allocate tangents for all that a view is a view of: 60 times more."""
    stored = torch.randn(60, 50, 40, dtype=torch.float64)
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.3 + 0.1 * x.square())
    squares = lambda t, x: x.square().sum(1)

    def largest(x):
        call = {
            "generator": lambda: generator(sde, squares, T, x, torch.zeros_like(x)),
            "noise_drift": lambda: replace(sde, noise="scalar").noise_drift(T, x),
            "view B": lambda: ctrl.policy_gradient._directional(squares, T, x, torch.ones_like(x)),
        }[function]
        call()
        with torch.profiler.profile(profile_memory=True) as profile:
            call()
        return max(event.self_cpu_memory_usage for event in profile.events())

    assert largest(stored[7]) <= 1.1 * largest(stored[7].clone())


def test_q_rates_by_probes_are_unbiased_along_paths(generator):
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.4 + 0.1 * x.sin())
    problem = ctrl.ControlProblem(sde, 1.0, lambda t, x, a: -a.square().sum(1))
    policy = ctrl.GaussianPolicy(lambda t, x: -0.3 * x, 0.5)
    start = torch.linspace(-1, 1, 12, dtype=torch.float64).view(6, 2)
    paths = ctrl.simulate(problem, policy, start, ctrl.uniform_grid(1.0, 5), generator=generator)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 2)
    probes = signs.expand(6, 5, 4, 2)
    rates, view = ctrl.q_learning.q_rates, ctrl.policy_gradient.DrawnActions
    torch.testing.assert_close(
        rates(problem, value, paths, probes), rates(problem, value, paths), **ROUND_OFF
    )
    estimators = (
        lambda probes: ctrl.policy_gradient.performance_difference(
            problem, value, policy, paths, probes
        ),
        lambda probes: ctrl.policy_gradient.surrogate(
            problem, value, policy, ctrl.GaussianPolicy(lambda t, x: 0 * x, 0.6), paths, probes
        ),
        lambda probes: ctrl.policy_gradient.q_rate_gradient(
            problem, policy, value, paths, view(probes)
        ),
    )
    for estimator in estimators:
        torch.testing.assert_close(estimator(probes), estimator(None), **ROUND_OFF)
    drawn = ctrl.noise.random_signs(6, 5, 3, 2, like=paths.states, generator=generator)
    assert drawn.dtype == torch.float64
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert not torch.equal(rates(problem, value, paths, drawn), rates(problem, value, paths))
