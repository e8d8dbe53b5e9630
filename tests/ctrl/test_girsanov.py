"""Path KL and log-ratio: identities on every path, exact expectations, the continuous limit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

import ctrl
from ctrl import girsanov
from ctrl.noise import gauss_hermite
from verification.closed_form import ornstein_uhlenbeck as closed
from verification.closed_form.gaussian_law import kl
from verification.closed_form.ornstein_uhlenbeck import OrnsteinUhlenbeck, euler_path_kl

# No zero, no one, no equal values; an uneven grid.
PULL, REFERENCE_PULL, SHIFT, NOISE = 1.3, 0.4, 0.35, 0.7
MEAN, SPREAD = 0.6, 0.3
GRID = ctrl.TimeGrid(torch.tensor([0.0, 0.1, 0.35, 0.5, 0.9], dtype=torch.float64))


def sde(noise: float = NOISE) -> ctrl.ControlledSDE:
    return ctrl.ControlledSDE(drift=lambda t, x, a: a, diffusion=lambda t, x: noise)


POLICY = ctrl.DeterministicPolicy(lambda t, x: -PULL * x + SHIFT)
REFERENCE = ctrl.DeterministicPolicy(lambda t, x: -REFERENCE_PULL * x)


def sample(grid: ctrl.TimeGrid, start: Tensor, noise: ctrl.Noise) -> ctrl.Paths:
    return ctrl.simulate(ctrl.ControlProblem(sde(), 1.0), POLICY, start, grid, noise=noise)


def laws(mean: float = MEAN, std: float = SPREAD) -> OrnsteinUhlenbeck:
    """Both laws, whose divergences are closed forms: no line shared with ctrl."""
    return OrnsteinUhlenbeck(PULL, SHIFT, REFERENCE_PULL, 0.0, NOISE, mean, std)


def euler_kl(grid: ctrl.TimeGrid, mean: float, variance: float) -> float:
    """KL of the Euler chain by a recursion of mean and variance."""
    return euler_path_kl(laws(mean, math.sqrt(variance)), grid.nodes.numpy())


def quadrature(steps: Tensor, nodes: int = 4) -> tuple[Tensor, ctrl.Noise]:
    """Gauss-Hermite paths, the first variable of which draws the start."""
    both = gauss_hermite(torch.cat([steps.new_ones(1), steps]), nodes=nodes)
    start = MEAN + SPREAD * both.increments[:, 0]
    return start, ctrl.Noise(both.increments[:, 1:], weights=both.weights)


def test_path_kl_is_exactly_that_of_the_euler_scheme():
    start, noise = quadrature(GRID.steps)
    paths = sample(GRID, start, noise)
    kl = girsanov.path_kl(sde(), POLICY, REFERENCE, paths)
    exact = euler_kl(GRID, MEAN, SPREAD**2)
    # Quadratic in the noise, so the rule is exact. The mildest wrong variant (drift read at the
    # right
    # end of a step) is 3 % off, twelve orders above round-off.
    assert ctrl.Estimate.of(kl, quadrature_weights=paths.weights).mean == pytest.approx(
        exact, rel=1e-12
    )


def test_both_forms_of_the_kl_have_the_same_expectation():
    start, noise = quadrature(GRID.steps)
    paths = sample(GRID, start, noise)
    running = girsanov.path_kl(sde(), POLICY, REFERENCE, paths)
    likelihood = girsanov.log_ratio(sde(), POLICY, REFERENCE, paths)
    weights = paths.weights
    assert weights is not None
    torch.testing.assert_close(
        (weights * running).sum(), (weights * likelihood).sum(), rtol=1e-12, atol=0
    )
    variances = [
        float((weights * (v - (weights * v).sum()).square()).sum()) for v in (running, likelihood)
    ]
    assert variances[0] < variances[1]  # the running form is the other's conditional expectation


def test_log_ratio_is_the_ratio_of_transition_densities_on_every_path(generator):
    start = torch.randn(64, 2, dtype=torch.float64, generator=generator)
    paths = ctrl.simulate(ctrl.ControlProblem(sde(), 1.0), POLICY, start, GRID, generator=generator)
    expected = torch.zeros(64, dtype=torch.float64)
    for k, h in enumerate(GRID.steps.tolist()):
        x, after = paths.states[:, k], paths.states[:, k + 1]
        new = Normal(x + h * (-PULL * x + SHIFT), NOISE * math.sqrt(h)).log_prob(after)
        old = Normal(x - h * REFERENCE_PULL * x, NOISE * math.sqrt(h)).log_prob(after)
        expected += (new - old).sum(1)
    got = girsanov.log_ratio(sde(), POLICY, REFERENCE, paths)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    # and so is the difference of the transitions' log-densities (view B), step by step
    euler = ctrl.EulerMaruyama()
    view_b = ctrl.transitions.log_prob(sde(), euler, POLICY, paths)
    view_b = view_b - ctrl.transitions.log_prob(sde(), euler, REFERENCE, paths)
    torch.testing.assert_close(view_b.sum(1), expected, rtol=1e-10, atol=1e-10)
    chain = ctrl.transitions.transition_kl(sde(), euler, POLICY, REFERENCE, paths).sum(1)
    running = girsanov.path_kl(sde(), POLICY, REFERENCE, paths)
    torch.testing.assert_close(chain, running, rtol=1e-10, atol=1e-10)


def test_the_schemes_kl_tends_to_the_closed_form_at_order_one():
    exact = closed.path_kl(laws(), 0.9)
    errors = []
    for steps in (400, 800, 1600):
        errors.append(euler_kl(ctrl.uniform_grid(0.9, steps), MEAN, SPREAD**2) - exact)
    # local order at the finest pair; the next term of the error is O(h), 1e-3 of an order here
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=5e-3)
    assert abs(2 * errors[2] - errors[1]) < 1e-3 * abs(errors[2]) + 1e-9  # extrapolated


@given(seed=st.integers(0, 2**32 - 1), dim=st.integers(1, 4), extra=st.integers(0, 2))
def test_general_diffusion_agrees_with_the_inverse_of_its_square(seed, dim, extra):
    """|u|^2 = shift' (sigma sigma')^{-1} shift, for a wide diffusion matrix too."""
    g = torch.Generator().manual_seed(seed)
    matrix = torch.randn(dim, dim + extra, dtype=torch.float64, generator=g)
    if torch.linalg.cond(matrix) > 1e3:
        return
    model = ctrl.ControlledSDE(
        lambda t, x, a: a, lambda t, x: matrix.expand(len(x), -1, -1), "general", dim + extra
    )
    shift = torch.randn(3, dim, dtype=torch.float64, generator=g)
    u = model.whiten(torch.tensor(0.0), torch.zeros(3, dim, dtype=torch.float64), shift)
    expected = (shift * torch.linalg.solve(matrix @ matrix.T, shift.T).T).sum(1)
    torch.testing.assert_close(u.square().sum(1), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "model",
    [
        ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: torch.tensor([0.5, 0.0]).expand_as(x)),
        ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.5, "scalar"),
        ctrl.ControlledSDE(
            lambda t, x, a: a,
            lambda t, x: torch.tensor([[0.5], [0.2]]).expand(len(x), 2, 1),
            "general",
            1,
        ),
    ],
    ids=["zero in a diagonal", "one noise for two coordinates", "tall matrix"],
)
def test_singular_diffusions_are_refused_where_the_drifts_differ(model):
    x, t = torch.zeros(3, 2), torch.tensor(0.0)
    with pytest.raises(ValueError, match="singular"):
        model.whiten(t, x, torch.tensor([[0.3, -0.8]]).expand(3, 2))
    reachable = (
        torch.tensor([[0.5, 0.0]]) if model.noise == "diagonal" else torch.tensor([[0.5, 0.5]])
    )
    if model.noise == "general":
        reachable = torch.tensor([[0.5, 0.2]])
    u = model.whiten(t, x, reachable.expand(3, 2))
    torch.testing.assert_close(u[:, 0], torch.ones(3))


def test_image_shaped_events(generator):
    start = torch.randn(3, 4, 8, 8, generator=generator)
    paths = ctrl.simulate(
        ctrl.ControlProblem(sde(), 1.0),
        POLICY,
        start,
        ctrl.uniform_grid(1.0, 5),
        generator=generator,
    )
    flat = ctrl.Paths(
        paths.states.flatten(2),
        None,
        paths.increments.flatten(2),
        paths.grid,  # type: ignore[union-attr]  # kept by default
    )
    for function in (girsanov.path_kl, girsanov.log_ratio):
        torch.testing.assert_close(
            function(sde(), POLICY, REFERENCE, paths), function(sde(), POLICY, REFERENCE, flat)
        )


def test_log_ratio_needs_the_increments(generator):
    start = torch.ones(2, 1, dtype=torch.float64)
    paths = ctrl.simulate(
        ctrl.ControlProblem(sde(), 1.0), POLICY, start, GRID, generator=generator, keep=("states",)
    )
    with pytest.raises(ValueError, match="increments"):
        girsanov.log_ratio(sde(), POLICY, REFERENCE, paths)


# --- bounds, weights, and what has no likelihood ratio


def ornstein_uhlenbeck(sigma=0.5):
    return ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: sigma)


def linear_paths(steps=3, nodes=6):
    sde = ornstein_uhlenbeck()
    problem = ctrl.ControlProblem(sde, 1.0)
    policy = ctrl.DeterministicPolicy(lambda t, x: 0.4 - 0.9 * x)
    reference = ctrl.DeterministicPolicy(lambda t, x: -0.2 * x)
    grid = ctrl.uniform_grid(0.6, steps)
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=nodes)
    start = torch.full((len(noise.increments), 1), 0.7, dtype=torch.float64)
    return sde, policy, reference, ctrl.simulate(problem, policy, start, grid, noise=noise)


def test_terminal_kl_is_below_its_bound_by_the_exact_gap():
    """Terminal laws of the Euler chain are Gaussian: their KL by moment recursion."""
    sde, policy, reference, paths = linear_paths()
    bound = float(paths.weights @ ctrl.girsanov.terminal_kl_bound(sde, policy, reference, paths))
    ends = [chain_end(gain, offset) for gain, offset in ((-0.9, 0.4), (-0.2, 0.0))]
    terminal = kl(*ends)
    assert 0.5 * bound < terminal < bound
    with_start = ctrl.girsanov.terminal_kl_bound(sde, policy, reference, paths, 0.3)
    assert float(paths.weights @ with_start) == pytest.approx(bound + 0.3, rel=1e-12)
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="initial_kl"):
            ctrl.girsanov.terminal_kl_bound(sde, policy, reference, paths, bad)


def chain_end(gain, offset):
    """Law of the last state of ``linear_paths``."""
    return closed.euler_law(-gain, offset, 0.5, 0.7, 0.0, np.linspace(0, 0.6, 4)).of(-1)


def test_importance_weights_turn_paths_of_the_policy_into_paths_of_the_reference():
    sde, policy, reference, paths = linear_paths(nodes=12)
    log_ratio = ctrl.girsanov.log_ratio(sde, policy, reference, paths)
    weights = ctrl.girsanov.importance_weights(log_ratio, paths.weights)
    (mean,), ((variance,),) = chain_end(-0.2, 0.0)
    final = paths.states[:, -1, 0]
    # the ratio is an exponential of a quadratic: 12 nodes resolve it to 1e-6
    assert float(weights @ final) == pytest.approx(mean, abs=1e-5)
    assert float(weights @ final.square()) == pytest.approx(mean**2 + variance, abs=1e-5)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)


def test_effective_sample_size_counts_equal_paths():
    assert ctrl.girsanov.effective_sample_size(torch.full((8,), 1 / 8)) == pytest.approx(8)
    one = torch.zeros(5, dtype=torch.float64)
    one[2] = 1
    assert ctrl.girsanov.effective_sample_size(one) == pytest.approx(1)
    for bad in (torch.tensor([0.5, 0.4]), torch.tensor([1.5, -0.5]), torch.tensor([math.nan, 1.0])):
        with pytest.raises(ValueError, match="weights"):
            ctrl.girsanov.effective_sample_size(bad)


def test_importance_weights_survive_huge_ratios_and_refuse_nan():
    normalised = ctrl.girsanov.importance_weights(torch.tensor([-2000.0, 3000.0, math.inf]))
    torch.testing.assert_close(normalised, torch.tensor([1.0, 0.0, 0.0]))
    for bad in (math.nan, -math.inf):
        with pytest.raises(ValueError, match="log_ratio"):
            ctrl.girsanov.importance_weights(torch.tensor([0.0, bad]))
    with pytest.raises((ValueError, TypeError)):
        ctrl.girsanov.importance_weights(torch.zeros(3), torch.full((2,), 0.5))


def test_policies_that_move_the_diffusion_have_no_likelihood_ratio():
    sde = ctrl.ControlledSDE(
        lambda t, x, a: a, lambda t, x, a: 0.3 + a.square(), controls_diffusion=True
    )
    _, policy, reference, paths = linear_paths(nodes=2)
    with pytest.raises(ValueError, match="diffusion"):
        ctrl.girsanov.path_kl(sde, policy, reference, paths)
    # the square of the action does not see its sign: equal diffusions, different drifts
    mirrored = ctrl.DeterministicPolicy(lambda t, x: -(0.4 - 0.9 * x))
    shift = 2 * (0.4 - 0.9 * paths.states[:, :-1, 0])
    sigma = 0.3 + (0.4 - 0.9 * paths.states[:, :-1, 0]).square()
    expected = (0.5 * (shift / sigma).square() * paths.grid.steps).sum(1)
    divergence = ctrl.girsanov.path_kl(sde, policy, mirrored, paths)
    torch.testing.assert_close(divergence, expected, rtol=1e-12, atol=0)


def test_controls_keep_the_precision_of_the_states(generator):
    paths = sample(GRID, torch.ones(3, 2), ctrl.Noise(0.1 * torch.ones(3, 4, 2)))
    assert girsanov.controls(sde(), POLICY, REFERENCE, paths).dtype == torch.float32


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_control_of_one_coordinate_of_one_path_that_is_not_finite_is_refused(bad):
    """And the step is named where it begins."""
    start = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2)
    paths = sample(GRID, start, ctrl.Noise(torch.zeros(3, 4, 2, dtype=torch.float64)))
    spoil = torch.zeros(3, 2, dtype=torch.float64)
    spoil[0, 1] = bad
    policy = ctrl.DeterministicPolicy(lambda t, x: -x + (spoil if t > 0.3 else 0))
    with pytest.raises(ValueError, match=r"at step 2 \(t = 0.35\)"):
        girsanov.controls(sde(), policy, REFERENCE, paths)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_diffusions_are_compared_on_every_path_and_relative_to_their_size(size):
    """A difference of 1e-4 on one path in three is found, one of 1e-9 is round-off."""
    model = ctrl.ControlledSDE(
        lambda t, x, a: 0 * a, lambda t, x, a: size * (1 + t + a), controls_diffusion=True
    )
    start = torch.tensor([[-0.4], [0.0], [0.7]], dtype=torch.float64)
    paths = ctrl.Paths(start.expand(3, 5).unsqueeze(2).contiguous(), None, None, GRID)
    one = ctrl.DeterministicPolicy(lambda t, x: (x == 0.7).to(x))
    for gap, equal in ((1e-4, False), (1e-9, True)):
        other = ctrl.DeterministicPolicy(lambda t, x, gap=gap: (x == 0.7).to(x) * (1 + gap))
        if equal:
            assert not girsanov.path_kl(model, one, other, paths).any()
        else:
            with pytest.raises(ValueError, match="diffusion"):
                girsanov.path_kl(model, one, other, paths)
    # where the last path has a diffusion of its own, others may be far smaller
    uneven = ctrl.DeterministicPolicy(
        lambda t, x: (x == 0.7).to(x) - (1 - 1e-9) * (x != 0.7).to(x) - t
    )
    almost = ctrl.DeterministicPolicy(lambda t, x: uneven.mean(t, x) + 1e-9 * (x == 0.7).to(x))
    assert not girsanov.path_kl(model, uneven, almost, paths).any()


def test_without_any_diffusion_equal_policies_have_no_divergence():
    still = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x, a: 0 * a, controls_diffusion=True)
    paths = ctrl.Paths(torch.ones(2, 5, 1, dtype=torch.float64), None, None, GRID)
    assert not girsanov.path_kl(still, POLICY, POLICY, paths).any()


def test_weights_of_no_paths_of_tables_and_of_integers_are_refused():
    for bad in (torch.zeros(0), torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)):
        with pytest.raises((ValueError, TypeError)):
            girsanov.importance_weights(bad)
    weights = torch.tensor([0.6, 0.0, 0.4], dtype=torch.float64)
    normalised = girsanov.importance_weights(torch.zeros(3, dtype=torch.float64), weights)
    torch.testing.assert_close(normalised, weights)  # a path without weight has none afterwards
    with pytest.raises(ValueError, match="non-negative"):
        girsanov.importance_weights(torch.zeros(3), torch.tensor([0.6, -0.1, 0.5]))


def test_the_gradient_of_the_path_kl_goes_through_the_states_where_there_is_a_graph():
    """Without one it is that of the integrand at fixed states, which is another number."""
    start = gauss_hermite(torch.ones(1, dtype=torch.float64), nodes=2).increments[:, :, 0] + MEAN
    noise = gauss_hermite(GRID.steps, nodes=2)
    start = start.repeat_interleave(16, 0)
    noise = ctrl.Noise(noise.increments.repeat(2, 1, 1))

    def exact(pull: Tensor, graph: bool) -> Tensor:
        policy = ctrl.DeterministicPolicy(lambda t, x: -pull * x + SHIFT)
        problem = ctrl.ControlProblem(sde(), 1.0)
        paths = ctrl.simulate(problem, policy, start, GRID, noise=noise, differentiable=graph)
        return girsanov.path_kl(sde(), policy, REFERENCE, paths).mean()

    pull = torch.tensor(PULL, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(exact(pull, graph=True), pull)
    (held,) = torch.autograd.grad(exact(pull, graph=False), pull)
    h = 1e-5
    difference = (exact(pull.detach() + h, False) - exact(pull.detach() - h, False)) / (2 * h)
    torch.testing.assert_close(whole, difference, rtol=1e-8, atol=0)
    assert abs(float(held - whole)) > 0.1 * abs(float(whole))
