import pytest
import torch

import ctrl

T = torch.tensor(0.3, dtype=torch.float64)
X = torch.tensor([[0.4], [-1.1]], dtype=torch.float64)
A, B, C, D = -0.7, 0.9, 0.3, 0.8  # Wang, Zariphopoulou & Zhou 2020: dX = (AX + Ba)dt + (CX + Da)dW


def linear(noise="diagonal", noise_dim=None):
    def diffusion(t, x, a):
        sigma = C * x + D * a
        return sigma.unsqueeze(-1) if noise == "general" else sigma

    return ctrl.ControlledSDE(
        lambda t, x, a: A * x + B * a, diffusion, noise, noise_dim, controls_diffusion=True
    )


@pytest.mark.parametrize(
    ("noise", "noise_dim"), [("diagonal", None), ("scalar", None), ("general", 1)]
)
def test_drift_and_diffusion_average_as_in_the_paper(noise, noise_dim):
    mean, std = -0.6, 0.45
    policy = ctrl.GaussianPolicy(lambda t, x: mean * x, std)
    averaged = ctrl.exploratory_sde(linear(noise, noise_dim), policy, state_dim=1)
    a = policy.mean(T, X)
    torch.testing.assert_close(averaged.drift_at(T, X, a), A * X + B * a, rtol=1e-14, atol=1e-14)
    # E (C x + D a)^2 = (C x + D mean)^2 + D^2 std^2
    expected = ((C * X + D * a).square() + D**2 * std**2).sqrt()
    sigma = torch.as_tensor(averaged.diffusion_at(T, X, a)).reshape(2, 1)
    torch.testing.assert_close(sigma, expected, rtol=1e-14, atol=0)


def test_correlated_actions_average_to_a_full_covariance():
    gain = torch.tensor([[1.0, 0.4], [-0.3, 0.7]], dtype=torch.float64)
    scale = torch.tensor([[0.5, 0.0], [-0.2, 0.3]], dtype=torch.float64)
    sde = ctrl.ControlledSDE(
        lambda t, x, a: a,
        lambda t, x, a: (a @ gain.T).unsqueeze(-1),
        "general",
        1,
        controls_diffusion=True,
    )
    x = torch.tensor([[0.2, -0.5], [0.9, 0.1]], dtype=torch.float64)
    policy = ctrl.MultivariateGaussianPolicy(lambda t, x: -x, scale)
    averaged = ctrl.exploratory_sde(sde, policy, state_dim=2)
    sigma = averaged.diffusion_at(T, x, -x)
    second_moment = x[:, :, None] * x[:, None, :] + scale @ scale.T  # E a a'
    expected = gain @ second_moment @ gain.T
    torch.testing.assert_close(sigma @ sigma.mT, expected, rtol=1e-13, atol=1e-14)


def test_drawn_actions_have_the_exploratory_law_to_first_order():
    """Second moment after a unit of time: held, drawn actions miss it by O(h)."""
    policy = ctrl.GaussianPolicy(lambda t, x: -0.6 * x, 0.45)
    mean_policy = ctrl.DeterministicPolicy(policy.mean)
    sde = linear()
    averaged = ctrl.exploratory_sde(sde, policy)

    def second_moment(problem, policy, steps, action):
        grid = ctrl.uniform_grid(0.4, steps)
        noise = ctrl.noise.gauss_hermite(grid.steps, nodes=4, noise=(1,), action=action)
        start = torch.full((len(noise.increments), 1), 0.4, dtype=torch.float64)
        paths = ctrl.simulate(problem, policy, start, grid, noise=noise)
        return float(noise.weights @ paths.states[:, -1, 0].square())

    def recursion(steps, drawn):
        h, m = 0.4 / steps, 0.4**2
        for _ in range(steps):
            m *= (1 + h * (A - 0.6 * B)) ** 2 + h * (C - 0.6 * D) ** 2
            m += h * (D * 0.45) ** 2 + drawn * (h * B * 0.45) ** 2
        return m

    for steps in (1, 2, 4):
        drawn = second_moment(ctrl.ControlProblem(sde, 1.0), policy, steps, (1,))
        mean = second_moment(ctrl.ControlProblem(averaged, 1.0), mean_policy, steps, None)
        # quadrature: round-off of 4 ** 8 weighted paths
        assert drawn == pytest.approx(recursion(steps, drawn=True), rel=1e-11)
        assert mean == pytest.approx(recursion(steps, drawn=False), rel=1e-11)
    gap, finer = (recursion(n, True) - recursion(n, False) for n in (512, 1024))
    assert gap / finer == pytest.approx(
        2, abs=0.01
    )  # first order; the next order moves it by 1 / n


def test_a_control_free_diffusion_stays_and_the_spread_drops_out():
    sde = ctrl.ControlledSDE(lambda t, x, a: A * x + B * a, lambda t, x: 0.5)
    policy = ctrl.GaussianPolicy(lambda t, x: -x, 0.45)
    averaged = ctrl.exploratory_sde(sde, policy)
    torch.testing.assert_close(averaged.drift_at(T, X, -X), (A - B) * X, rtol=1e-14, atol=1e-15)
    assert averaged.diffusion is sde.diffusion


def test_bad_input_is_refused():
    sde, policy = linear("scalar"), ctrl.GaussianPolicy(lambda t, x: x, 0.3)
    with pytest.raises(ValueError, match="state_dim"):
        ctrl.exploratory_sde(sde, policy)
    with pytest.raises(ValueError, match="nodes"):
        ctrl.exploratory_sde(sde, policy, nodes=0, state_dim=1)
    with pytest.raises((TypeError, ValueError)):
        ctrl.exploratory_sde(sde, ctrl.DeterministicPolicy(lambda t, x: x), state_dim=1)
    stratonovich = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.5, calculus="stratonovich")
    with pytest.raises(ValueError, match="to_ito"):
        ctrl.exploratory_sde(stratonovich, policy)


@pytest.mark.parametrize(
    ("noise", "noise_dim"), [("diagonal", None), ("scalar", None), ("general", 1)]
)
def test_coefficients_and_spread_may_move_in_time(noise, noise_dim):
    """At time t the average is that of the coefficients frozen there."""

    def diffusion(t, x, a):
        sigma = (C + t) * x + (D + t) * a
        return sigma.unsqueeze(-1) if noise == "general" else sigma

    sde = ctrl.ControlledSDE(
        lambda t, x, a: A * x + (B + t) * a * a, diffusion, noise, noise_dim,
        controls_diffusion=True,
    )  # fmt: skip
    policy = ctrl.GaussianPolicy(lambda t, x: -x, lambda t: 0.4 + t)
    averaged = ctrl.exploratory_sde(sde, policy, state_dim=1)
    a = -X
    drift = A * X + (B + 0.3) * (a.square() + 0.7**2)
    torch.testing.assert_close(averaged.drift_at(T, X, a), drift, rtol=1e-13, atol=1e-14)
    variance = ((C + 0.3) * X + (D + 0.3) * a).square() + (D + 0.3) ** 2 * 0.7**2
    averaged_sigma = torch.as_tensor(averaged.diffusion_at(T, X, a)).reshape(2, 1)
    torch.testing.assert_close(averaged_sigma.square(), variance, rtol=1e-13, atol=0)


def test_a_free_diffusion_of_general_noise_keeps_its_brownian_motions():
    sde = ctrl.ControlledSDE(
        lambda t, x, a: a, lambda t, x: torch.ones(len(x), 1, 3).to(x), "general", 3
    )
    averaged = ctrl.exploratory_sde(sde, ctrl.GaussianPolicy(lambda t, x: -x, 0.45))
    assert (averaged.noise, averaged.noise_dim) == ("general", 3)


def test_the_rule_has_eight_nodes_unless_told_and_one_is_enough_for_a_linear_drift():
    policy = ctrl.GaussianPolicy(lambda t, x: x, 1.0)
    zero = torch.zeros_like(X)

    def averaged(power, **settings):
        sde = ctrl.ControlledSDE(lambda t, x, a: a**power, lambda t, x: 0.5)
        return ctrl.exploratory_sde(sde, policy, **settings).drift_at(T, X, zero)

    torch.testing.assert_close(averaged(14), torch.full_like(X, 135135.0))  # E a^14 = 13!!
    # n nodes miss E a^(2 n) = (2 n - 1)!! by n!
    torch.testing.assert_close(averaged(16), torch.full_like(X, 2027025.0 - 40320.0))
    torch.testing.assert_close(averaged(1, nodes=1), zero)


def test_rules_of_too_many_nodes_are_refused():
    policy = ctrl.GaussianPolicy(lambda t, x: x, 1.0)
    largest = ctrl.exploration.drawn_actions(policy, T, torch.zeros(1, 5), 10)
    next(largest)  # 100 000
    with pytest.raises(ValueError, match=r"at most 100000, got 100001 \*\* 1"):
        next(ctrl.exploration.drawn_actions(policy, T, torch.zeros(1, 1), 100_001))
    with pytest.raises(ValueError, match=r"at most 100000, got 3 \*\* 11"):
        next(ctrl.exploration.drawn_actions(policy, T, torch.zeros(1, 11), 3))
