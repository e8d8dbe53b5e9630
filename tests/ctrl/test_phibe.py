import math
from dataclasses import replace

import pytest
import torch

import ctrl
from ctrl import linear, phibe


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


H = 0.13


def at_rest(t, x, a):
    return 0 * x


def problem(horizon=math.inf, **settings):
    sde = ctrl.ControlledSDE(at_rest, lambda t, x: 1.0)
    return ctrl.ControlProblem(sde, horizon, lambda t, x, a: x[:, 0], **settings)


def quadrature(order):
    """Exact windows of an Ornstein-Uhlenbeck process, and what drove them."""
    law = linear.transition(
        tensor([[-0.8]]), tensor([0.3]),
        tensor([[0.6]]), H,
    )  # fmt: skip
    noise = ctrl.noise.gauss_hermite(torch.ones(order + 1).double(), nodes=3)
    z = noise.increments[:, :, 0]
    states = [0.4 + 0.7 * z[:, 0]]
    for k in range(order):
        states.append(law.F[0, 0] * states[-1] + law.f[0] + law.C[0, 0].sqrt() * z[:, k + 1])
    states = torch.stack(states, 1)[:, :, None]
    grid = ctrl.uniform_grid(H * order, order)
    return ctrl.Paths(states, 0 * states[:, :-1], None, grid, noise.weights)


def test_the_generator_of_an_euler_step_is_the_equations_and_h_over_two_of_the_drifts_square():
    sde = ctrl.ControlledSDE(lambda t, x, a: 0.3 - x.flip(1) + t, lambda t, x: 0.5 + 0.1 * x)
    x = tensor([[0.4, -0.9], [1.3, 0.2]])
    t = tensor(0.7)
    hessian = tensor([[1.1, 0.4], [0.4, -0.6]])

    def value(t, x):
        return (1 + t) * (((x @ hessian) * x).sum(1) + x[:, 1])

    drift, noise = sde.drift_at(t, x, x), ctrl.noise.gauss_hermite(
        tensor([H]), nodes=2, noise=(2,)
    )  # fmt: skip
    means = sum(
        weight * phibe.generator(value, t, x, (x + drift * H + (0.5 + 0.1 * x) * dw)[:, None], H)
        for weight, dw in zip(noise.weights, noise.increments[:, 0], strict=True)
    )
    more = H * (1 + t) * ((drift @ hessian) * drift).sum(1)
    expected = ctrl.value.generator(sde, value, t, x, x) + more
    torch.testing.assert_close(means, expected, rtol=1e-12, atol=1e-12)


def test_a_terminal_reward_is_pinned_by_base_and_features_that_vanish():
    horizon, paths = 2 * H, quadrature(2)
    paid = replace(problem(horizon), running_reward=None)

    def base(t, x):
        return 0.9 * x[:, 0]

    def features(t, x):
        left = horizon - t
        return torch.stack([left * x[:, 0], left + 0 * x[:, 0]], 1)

    fitted = phibe.galerkin(features, paid, paths, base=base)
    t, x = torch.zeros(()).double(), tensor([[0.0], [1.0]])
    law = linear.transition(
        tensor([[-0.8]]), tensor([0.3]),
        tensor([[0.6]]), horizon,
    )  # fmt: skip
    expected = 0.9 * (law.F[0, 0] * x[:, 0] + law.f[0])
    # all windows begin at 0, where V = (0.9 + T c) x + .. has d_t V = -c x, so that the equation is
    # -c + (0.9 + T c) b = 0 in x, b the drift's slope at second order
    b = [2 * (math.exp(-0.8 * j * H) - 1) / H * (1, -0.25)[j - 1] for j in (1, 2)]
    slope = 0.9 * sum(b) / (1 - horizon * sum(b))
    assert float(fitted.coefficients[0]) == pytest.approx(slope, rel=1e-12)
    assert float((fitted(t, x) - expected).abs().max()) < 0.9 * (0.8 * horizon) ** 2


@pytest.mark.parametrize("order", [0, -1])
def test_an_order_that_is_none_is_refused(order):
    with pytest.raises(ValueError, match="order must be an integer of at least 1"):
        phibe.coefficients(order)


def ones(t, x):
    return torch.ones_like(x)


def test_windows_must_have_equal_steps_and_be_long_enough():
    paths = quadrature(2)
    uneven = replace(paths, grid=ctrl.TimeGrid(tensor([0.0, 0.1, 0.3])))
    with pytest.raises(
        ValueError, match=r"grid must have equal steps, got steps from 0\.1 to 0\.2"
    ):
        phibe.galerkin(ones, problem(discount=0.4), uneven)
    with pytest.raises(ValueError, match="at least 3 steps for order 3, got 2"):
        phibe.galerkin(ones, problem(discount=0.4), paths, 3)


def test_features_that_do_not_determine_the_value_are_refused():
    with pytest.raises(ValueError, match="do not determine the coefficients"):
        phibe.galerkin(ones, problem(), quadrature(1), 1)


def test_scaled_noise_and_steps_that_are_none_are_refused():
    one = torch.ones(1, 1).double()
    lq = linear.LinearQuadratic(-one, one, one, one, one, discount=0.3)
    with pytest.raises(ValueError, match="C = 0 and D = 0"):
        phibe.held_lq(replace(lq, C=one[None]), 0.1)
    with pytest.raises(ValueError, match="step must be positive"):
        phibe.held_lq(lq, 0.0)


def quadratics(t, x):
    return torch.stack([torch.ones_like(x[:, 0]), x[:, 0], x[:, 0] ** 2], 1)


def test_only_windows_within_a_path_count(generator):
    noise = torch.randn(5, 4, 1, generator=generator, dtype=torch.float64).cumsum(1)
    actions = torch.zeros(5, 3, 1, dtype=torch.float64)
    whole = ctrl.Paths(noise, actions, None, ctrl.uniform_grid(3 * H, 3))
    ends = torch.tensor([1, 3, 2, 3, 1])
    cut = ctrl.paths.stop(whole, ends, torch.zeros(5, dtype=torch.bool))
    for order in (1, 2):
        windows = [
            noise[i, k : k + order + 1] for i in range(5) for k in range(int(ends[i]) - order + 1)
        ]
        alone = ctrl.Paths(
            torch.stack(windows), actions[:1, :order].expand(len(windows), order, 1), None,
            ctrl.uniform_grid(order * H, order),
        )  # fmt: skip
        ours, theirs = (
            phibe.galerkin(quadratics, problem(discount=0.4), each, order).coefficients
            for each in (cut, alone)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_problems_with_a_domain_are_refused():
    inside = replace(problem(discount=0.4), domain=ctrl.stopping.Interval(-1.0, 2.0))
    with pytest.raises(ValueError, match=r"problem\.domain must be None"):
        phibe.galerkin(quadratics, inside, quadrature(1), 1)


def test_a_discount_may_depend_on_the_state():
    number = problem(discount=0.4)
    function = replace(number, discount=lambda t, x: 0.4 + 0 * x[:, 0])
    paths, base = quadrature(2), lambda t, x: x[:, 0]
    ours, theirs = (
        phibe.galerkin(quadratics, each, paths, base=base).coefficients
        for each in (function, number)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
