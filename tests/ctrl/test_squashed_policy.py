"""Squashed Gaussians: at the edge of the interval, in single precision, in every loss, bad input.

Density, moments, KL and entropy are verified against integrals in verification's claim
``squashed-gaussian``.
"""

import math

import pytest
import torch

import ctrl

LOW, HIGH = torch.tensor([-1.0, 0.5]).double(), torch.tensor([2.0, 0.7]).double()
LATENT = ctrl.GaussianPolicy(lambda t, x: 0.8 * x + t, lambda t, x: 0.3 + x.square())
POLICY = ctrl.SquashedGaussianPolicy(LATENT, LOW, HIGH)
T, X = torch.tensor(0.2).double(), torch.tensor([[0.4, -0.7], [1.1, 0.3]]).double()


def test_actions_of_many_coordinates_have_the_density_of_torch_s_transform(generator):
    z = torch.randn(2, 2, dtype=torch.float64, generator=generator)
    a = POLICY.act(X, T, z, X)
    assert bool(((a > LOW) & (a < HIGH)).all())
    torch.testing.assert_close(POLICY.noise_of(a, X, T, X), z, rtol=1e-9, atol=1e-9)
    law = POLICY.distribution(T, X)
    torch.testing.assert_close(POLICY.log_prob(T, X, a), law.log_prob(a), rtol=1e-9, atol=1e-9)
    scale = torch.tensor([[0.5, 0.0], [-0.3, 0.8]]).double()
    tilted = ctrl.SquashedGaussianPolicy(
        ctrl.MultivariateGaussianPolicy(lambda t, x: x, scale), LOW, HIGH
    )
    expected = tilted.distribution(T, X).log_prob(a)
    torch.testing.assert_close(tilted.log_prob(T, X, a), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_saturated_actions_stay_inside_and_have_a_finite_density(dtype):
    """tanh(40) is 1 in any precision: the nearest number inside stands for it."""
    policy = ctrl.SquashedGaussianPolicy(ctrl.GaussianPolicy(lambda t, x: 40 * x, 0.5), -2.0, 3.0)
    t, x = torch.zeros((), dtype=dtype), torch.tensor([[1.0], [-1.0]], dtype=dtype)
    a = policy.act(x, t, 0 * x, x)
    assert bool((a < 3).all() and (a > -2).all())
    assert bool(policy.log_prob(t, x, a).isfinite().all())
    edge = torch.tensor([[3.0], [-2.0]], dtype=dtype)
    assert bool(policy.log_prob(t, x, edge).isfinite().all())
    outside = torch.tensor([[3.1], [-2.1]], dtype=dtype)
    assert bool((policy.log_prob(t, x, outside) == -math.inf).all())


def test_float32_density_keeps_its_digits():
    t, x, a = T.float(), X.float(), torch.tensor([[1.9, 0.51], [-0.9, 0.69]])
    torch.testing.assert_close(
        POLICY.log_prob(t, x, a).double(), POLICY.log_prob(T, X, a.double()), rtol=1e-4, atol=1e-4
    )


def test_pathwise_and_score_gradients_have_one_mean():
    """Of E a in the latent mean: with the noise held, and by the score function."""
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.1)
    problem = ctrl.ControlProblem(sde, 0.5, running_reward=lambda t, x, a: a[:, 0].square())
    shift = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    policy = ctrl.SquashedGaussianPolicy(ctrl.GaussianPolicy(lambda t, x: x + shift, 0.6))
    rule = ctrl.noise.gauss_hermite(torch.ones(1).double(), nodes=40)
    noise = ctrl.Noise(0 * rule.increments, rule.increments, rule.weights)
    start = torch.full((40, 1), 0.2, dtype=torch.float64)
    grid = ctrl.TimeGrid(torch.tensor([0.0, 0.5]).double())
    paths = ctrl.simulate(problem, policy, start, grid, noise=noise)
    value = lambda t, x: 0 * x[:, 0]
    each = (
        ctrl.policy_gradient.return_gradient(problem, policy, paths),
        ctrl.policy_gradient.pathwise_gradient(problem, policy, value, paths),
    )
    score, pathwise = (torch.autograd.grad(rule.weights @ one, shift)[0] for one in each)
    torch.testing.assert_close(score, pathwise, rtol=1e-9, atol=0)  # the rule's error: 1e-11


def test_entropy_is_refused_and_estimated(generator):
    with pytest.raises(ValueError, match="no closed form: estimate it by samples"):
        POLICY.entropy(T, X)
    noise = torch.randn(1000, 2, 2, dtype=torch.float64, generator=generator)
    estimates = ctrl.entropy_estimates(POLICY, T, X, noise)
    z = LATENT.mean(T, X) + (0.3 + X.square()) * noise
    slope = (HIGH - LOW) / 2 / z.cosh().square()
    other = LATENT.entropy(T, X) + slope.log().sum(2)  # of the same mean
    gap = ctrl.Estimate.of((estimates - other)[:, 0])
    assert abs(gap.mean) < 5 * gap.standard_error
    closed = ctrl.Estimate.of(ctrl.entropy_estimates(LATENT, T, X, noise)[:, 1])
    assert abs(closed.mean - LATENT.entropy(T, X)[1]) < 5 * closed.standard_error
    with pytest.raises((ValueError, TypeError), match="noise"):
        ctrl.entropy_estimates(POLICY, T, X, noise[:, :1])


def test_bad_squashed_policies_are_refused():
    for low, high in ((1.0, 1.0), (2.0, 1.0), (-math.inf, 1.0), (0.0, math.nan)):
        with pytest.raises(ValueError, match="low must be below high"):
            ctrl.SquashedGaussianPolicy(LATENT, low, high)
    with pytest.raises(TypeError, match="latent"):
        ctrl.SquashedGaussianPolicy(ctrl.DeterministicPolicy(lambda t, x: x))
    with pytest.raises(ValueError, match="states must be given"):
        POLICY.act(X, T, X)
    three = torch.zeros(1, 3).double()
    with pytest.raises(ValueError, match="low must be one number"):
        POLICY.log_prob(T, three, three)
    with pytest.raises(ValueError, match="kinds whose KL has a closed form"):
        ctrl.policy_kl(POLICY, LATENT, T, X)
    with pytest.raises(ValueError, match="over one interval"):
        ctrl.policy_kl(POLICY, ctrl.SquashedGaussianPolicy(LATENT), T, X)
