"""The pendulum's reference: it converges, is symmetric, and is what simulated paths earn."""

import math
from dataclasses import replace

import pytest
import torch

from ctrl import DeterministicPolicy, GaussianPolicy, hjb, simulate, uniform_grid
from ctrl.pendulum import noisy_pendulum
from ctrl.returns import running_rewards

NOW = torch.tensor(0.0, dtype=torch.float64)
# nodes of every grid whose resolution is a multiple of 8
STATES = torch.tensor(
    [[0.0, 0.0], [-math.pi, 0.0], [math.pi / 2, -1.5], [-math.pi / 2, -1.5]], dtype=torch.float64
)
RECORDED = torch.tensor([1.645832, -1.151259, 1.005559, -0.459659], dtype=torch.float64)


@pytest.fixture(scope="module")
def references():
    return {n: noisy_pendulum().reference(n) for n in (24, 48, 96)}


def test_the_reference_converges_with_order_two_to_the_recorded_limit(references):
    coarse, middle, fine = (reference.value(NOW, STATES) for reference in references.values())
    for reference in references.values():  # no error of interpolation
        for i, axis in enumerate(reference.value.axes):
            place = (STATES[:, i] - axis.low) / axis.spacing
            torch.testing.assert_close(place, place.round(), rtol=0, atol=1e-9)
    ratio = (coarse - middle).abs().max() / (middle - fine).abs().max()
    assert 3.2 < ratio < 4.8  # two-sided around 4: the next term is two orders smaller
    limit = fine + (fine - middle) / 3
    # extrapolated, of order 4: an eighth of a percent of the coarse error, 4e-2
    torch.testing.assert_close(limit, RECORDED, rtol=0, atol=2e-4)


def test_monotone_differences_tend_to_the_same_value():
    pendulum = noisy_pendulum()
    errors = []
    for n in (24, 48, 96):
        axes = (hjb.Axis(-math.pi, math.pi, n, "periodic"), hjb.Axis(-6.0, 6.0, n + 1))
        solution = hjb.solve_discounted(pendulum.problem, axes, hjb.trapezoid(-8.0, 8.0, 41))
        errors.append(float((solution.value(NOW, STATES) - RECORDED).abs().max()))
    orders = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert all(0.6 < order < 1.4 for order in orders), (errors, orders)  # upwind in the angle: one


def test_the_reference_is_symmetric(references):
    solution = references[48]
    torch.testing.assert_close(
        solution.value(NOW, -STATES), solution.value(NOW, STATES), rtol=0, atol=1e-9
    )
    turned = STATES + STATES.new_tensor([2 * math.pi, 0.0])
    torch.testing.assert_close(
        solution.mean_action(NOW, turned), solution.mean_action(NOW, STATES), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(
        solution.mean_action(NOW, -STATES[2:]),
        -solution.mean_action(NOW, STATES[2:]),
        rtol=0,
        atol=1e-9,
    )


def test_the_optimal_policy_is_gaussian_with_one_variance(references):
    policy = references[48].policy()
    assert isinstance(policy, GaussianPolicy)
    std = float(policy.std_at(NOW))
    assert std == pytest.approx(math.sqrt(0.1 / 0.3), rel=1e-3)


def test_the_policy_earns_what_the_equation_says(references, generator):
    pendulum = noisy_pendulum()
    problem, policy = pendulum.problem, DeterministicPolicy(references[48].mean_action)
    axes = references[48].value.axes
    exact = float(
        hjb.evaluate_discounted(problem, policy, axes, differences="central")(NOW, STATES)[2]
    )
    paths, horizon, steps = 4096, 12.0, 480
    start = STATES[2].expand(paths, 2)
    finite = replace(problem, horizon=horizon)
    rolled = simulate(finite, policy, start, uniform_grid(horizon, steps), generator=generator)
    times = rolled.grid.nodes[:-1]
    earned = (running_rewards(problem, rolled) * (-0.5 * times).exp()).sum(1)
    gap, error = float(earned.mean()) - exact, float(earned.std()) / math.sqrt(paths)
    # 5 standard errors (6e-7), the tail e^{-6} of a value of 2, Euler's and the grid's error
    assert 5 * error < 0.06
    assert abs(gap) < 5 * error + 0.005 + 0.02, (gap, error)


def test_the_optimum_is_better_than_letting_go(references):
    pendulum = noisy_pendulum(temperature=0.0)
    solution = pendulum.reference(48, action_nodes=81)
    axes = solution.value.axes
    idle = hjb.evaluate_discounted(
        pendulum.problem, DeterministicPolicy(lambda t, x: 0 * x[:, :1]), axes
    )
    assert bool((solution.value(NOW, STATES) > idle(NOW, STATES) + 0.3).all())


@pytest.mark.parametrize(
    "name", ["gravity", "damping", "noise", "velocity_cost", "torque_cost", "discount", "fastest"]
)
def test_bad_numbers_are_refused(name):
    for number in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match=name):
            noisy_pendulum(**{name: number})
    if name in ("noise", "torque_cost", "discount", "fastest"):
        with pytest.raises(ValueError, match=name):
            noisy_pendulum(**{name: 0.0})


def test_bad_temperatures_and_torques_are_refused():
    with pytest.raises(ValueError, match="temperature"):
        noisy_pendulum(temperature=-0.1)
    with pytest.raises(ValueError, match="strongest"):
        noisy_pendulum(strongest=1.0).reference(24)
    with pytest.raises(ValueError, match="take more nodes"):
        noisy_pendulum().reference(24, action_nodes=9)
    with pytest.raises(ValueError, match="nodes"):
        noisy_pendulum().reference(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_problem_keeps_the_states_dtype(dtype, generator):
    problem = noisy_pendulum().problem
    start = torch.zeros(5, 2, dtype=dtype)
    policy = GaussianPolicy(lambda t, x: -x[:, :1], 0.3)
    finite = replace(problem, horizon=1.0)
    rolled = simulate(finite, policy, start, uniform_grid(1.0, 4), generator=generator)
    assert rolled.states.dtype == dtype
    assert running_rewards(problem, rolled).dtype == dtype
