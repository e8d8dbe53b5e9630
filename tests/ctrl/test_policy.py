"""Policies: densities against torch.distributions, precision, bad input."""

import math
from typing import Any

import pytest
import torch
from torch.distributions import Normal

import ctrl


def test_gaussian_policy_density_and_entropy():
    policy = ctrl.GaussianPolicy(lambda t, x: 2 * x, std=0.3)
    x = torch.tensor([[0.1, -0.4]], dtype=torch.float64)
    a = torch.tensor([[0.5, 0.2]], dtype=torch.float64)
    law = Normal(2 * x, 0.3)
    t = torch.tensor(0.0)
    torch.testing.assert_close(policy.log_prob(t, x, a), law.log_prob(a).sum(1))
    torch.testing.assert_close(policy.entropy(t, x), law.entropy().sum(1))


@pytest.mark.parametrize("std", [0.3, lambda t: 0.3], ids=["number", "function of time"])
def test_a_float64_policy_reads_its_std_in_float64(std):
    policy = ctrl.GaussianPolicy(lambda t, x: 2 * x, std=std)
    x = torch.tensor([[0.1, -0.4]], dtype=torch.float64)
    a = torch.tensor([[0.5, 0.2]], dtype=torch.float64)
    law = Normal(2 * x, torch.tensor(0.3, dtype=torch.float64))
    t = torch.tensor(0.0)  # float32, as a caller may give it: 0.3 in float32 is 4e-8 off
    close = {"rtol": 1e-14, "atol": 1e-14}
    torch.testing.assert_close(policy.log_prob(t, x, a), law.log_prob(a).sum(1), **close)
    torch.testing.assert_close(policy.entropy(t, x), law.entropy().sum(1), **close)
    noise = torch.tensor([[0.7, -1.1]], dtype=torch.float64)
    torch.testing.assert_close(policy.act(2 * x, t, noise), 2 * x + 0.3 * noise, **close)


@pytest.mark.parametrize("event", [(), (3,), (4, 8, 8)], ids=str)
def test_densities_of_events_of_any_shape_are_sums_over_coordinates(event, generator):
    policy = ctrl.GaussianPolicy(lambda t, x: torch.sin(x) + t, std=lambda t: 0.4 + t)
    t = torch.tensor(0.25, dtype=torch.float64)
    x, a = torch.randn(2, 5, *event, dtype=torch.float64, generator=generator)
    law = Normal(torch.sin(x) + t, 0.4 + t)
    expected = law.log_prob(a).reshape(5, -1).sum(1)
    torch.testing.assert_close(policy.log_prob(t, x, a), expected, rtol=1e-12, atol=1e-12)
    expected = law.entropy().reshape(5, -1).sum(1)
    torch.testing.assert_close(policy.entropy(t, x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"std": 0.0}, "std"),
        ({"std": -0.3}, "std"),
        ({"std": math.nan}, "std"),
        ({"std": math.inf}, "std"),
        ({"std": "wide"}, "std"),
        ({"std": True}, "std"),
        ({"mean": 0.0}, "mean"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], name):
    good: dict[str, Any] = {"mean": lambda t, x: x, "std": 0.3}
    with pytest.raises((ValueError, TypeError), match=name):
        ctrl.GaussianPolicy(**good | settings)
    if name == "mean":
        with pytest.raises(TypeError, match=name):
            ctrl.DeterministicPolicy(**settings)


@pytest.mark.parametrize("std", [0.0, -0.2, math.nan, math.inf])
def test_a_std_that_turns_bad_in_time_has_no_density(std):
    policy = ctrl.GaussianPolicy(lambda t, x: x, std=lambda t: std)
    t, x = torch.tensor(0.5), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"std must be positive and finite, at t = 0\.5"):
        policy.log_prob(t, x, x)
    with pytest.raises(ValueError, match="std"):
        policy.entropy(t, x)


def test_shapes_that_would_broadcast_are_refused():
    policy = ctrl.GaussianPolicy(lambda t, x: x[:, :1], std=0.3)
    t, x = torch.tensor(0.5), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="actions"):
        policy.log_prob(t, x, x)
    for noise in (None, torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="noise"):
            policy.act(x[:, :1], t, noise)
    wide = ctrl.GaussianPolicy(lambda t, x: x, std=lambda t: torch.full((2,), 0.2))
    with pytest.raises((ValueError, TypeError), match="std"):
        wide.act(x, t, x)


# --- one standard deviation a coordinate, covariances, KL


def test_a_std_for_each_coordinate_is_the_product_of_normals():
    std = torch.tensor([0.3, 1.7], dtype=torch.float64)
    policy = ctrl.GaussianPolicy(lambda t, x: 0.5 * x, std)
    x = torch.tensor([[0.4, -1.0], [2.0, 0.1]], dtype=torch.float64)
    a = torch.tensor([[0.1, 0.9], [-0.3, 0.2]], dtype=torch.float64)
    t = torch.tensor(0.0, dtype=torch.float64)
    law = torch.distributions.Normal(0.5 * x, std)
    torch.testing.assert_close(policy.log_prob(t, x, a), law.log_prob(a).sum(1))
    torch.testing.assert_close(policy.entropy(t, x), law.entropy().sum(1))
    torch.testing.assert_close(policy.act(0.5 * x, t, a), 0.5 * x + std * a)


def test_a_covariance_is_that_of_the_actions():
    scale = torch.tensor([[0.5, 0.0], [-0.2, 0.3]], dtype=torch.float64)
    policy = ctrl.MultivariateGaussianPolicy(lambda t, x: x, scale)
    x = torch.zeros(1, 2, dtype=torch.float64)
    t = torch.tensor(0.0, dtype=torch.float64)
    noise = ctrl.noise.gauss_hermite(torch.ones(1, dtype=torch.float64), nodes=3, noise=(2,))
    z = noise.increments[:, 0]
    drawn = policy.act(x.expand_as(z), t, z)
    second = torch.einsum("p,pi,pj->ij", noise.weights, drawn, drawn)
    torch.testing.assert_close(second, scale @ scale.T, rtol=1e-13, atol=1e-14)
    inverse, a = torch.linalg.inv(scale @ scale.T), torch.tensor([[0.4, -0.1]]).double()
    by_hand = -0.5 * torch.einsum("pi,ij,pj->p", a, inverse, a)
    by_hand = by_hand - math.log(2 * math.pi) - scale.diagonal().log().sum()
    torch.testing.assert_close(policy.log_prob(t, x, a), by_hand, rtol=1e-13, atol=0)


def test_policy_kl_is_the_mean_of_the_log_ratio():
    t = torch.tensor(0.0, dtype=torch.float64)
    x = torch.tensor([[0.4, -1.0]], dtype=torch.float64)
    scale = torch.tensor([[0.5, 0.0], [-0.2, 0.3]], dtype=torch.float64)
    one = ctrl.MultivariateGaussianPolicy(lambda t, x: 0.5 * x, scale)
    other = ctrl.MultivariateGaussianPolicy(lambda t, x: -0.2 * x, 2 * torch.eye(2).double())
    noise = ctrl.noise.gauss_hermite(torch.ones(1, dtype=torch.float64), nodes=4, noise=(2,))
    wide = x.expand(len(noise.increments), 2)
    a = one.act(0.5 * wide, t, noise.increments[:, 0])
    mean = noise.weights @ (one.log_prob(t, wide, a) - other.log_prob(t, wide, a))
    torch.testing.assert_close(ctrl.policy_kl(one, other, t, x)[0], mean, rtol=1e-12, atol=0)
    assert float(ctrl.policy_kl(one, one, t, x)) == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize(
    "scale",
    [
        torch.tensor([[1.0, 0.5], [0.0, 1.0]]),
        torch.tensor([[-1.0, 0.0], [0.0, 1.0]]),
        torch.tensor([[math.nan, 0.0], [0.0, 1.0]]),
        torch.ones(2, 3),
        torch.ones(2),
    ],
)
def test_what_is_no_cholesky_factor_is_refused(scale):
    with pytest.raises((ValueError, TypeError)):
        ctrl.MultivariateGaussianPolicy(lambda t, x: x, scale)


def test_scales_that_do_not_fit_the_actions_are_refused():
    policy = ctrl.MultivariateGaussianPolicy(lambda t, x: x, torch.eye(3))
    with pytest.raises(ValueError, match="scale_tril"):
        policy.act(torch.zeros(4, 2), torch.tensor(0.0), torch.zeros(4, 2))
    for std in (torch.tensor([0.1, -0.2]), torch.tensor([0.1, math.nan])):
        with pytest.raises(ValueError, match="std"):
            ctrl.GaussianPolicy(lambda t, x: x, std)


SCALE = torch.tensor([[0.5, 0.0], [-0.3, 0.8]], dtype=torch.float64)
MOVING = (
    ctrl.MultivariateGaussianPolicy(lambda t, x: (0.4 + t) * x, lambda t: (1 + t) * SCALE),
    ctrl.GaussianPolicy(lambda t, x: (0.1 - t) * x, lambda t: 0.3 + t),
)


def moments(policy, t, x):
    """Mean and covariance, by hand."""
    if policy is MOVING[0]:
        return (0.4 + t) * x, (1 + t) ** 2 * SCALE @ SCALE.T
    return (0.1 - t) * x, (0.3 + t) ** 2 * torch.eye(2, dtype=torch.float64)


@pytest.mark.parametrize("policy", MOVING, ids=["multivariate", "diagonal"])
def test_actions_are_mean_plus_scale_times_noise_at_every_time(policy):
    t = torch.tensor(0.35, dtype=torch.float64)
    x, noise = torch.tensor([[0.4, -1.1]] * 2).double(), torch.eye(2, dtype=torch.float64)
    mean, covariance = moments(policy, t, x)
    deviation = policy.act(policy.mean(t, x), t, noise) - mean
    torch.testing.assert_close(deviation.T @ deviation, covariance)
    assert bool((deviation.diagonal() > 0).all())  # along the noise, not against it


def test_divergence_of_two_policies_at_one_time():
    t = torch.tensor(0.35, dtype=torch.float64)
    x = torch.tensor([[0.4, -1.1], [0.2, 0.9]], dtype=torch.float64)

    def gaussian_kl(one, other):
        (m1, s1), (m0, s0) = moments(one, t, x), moments(other, t, x)
        gap = torch.linalg.solve(s0, (m1 - m0).T).T
        trace = torch.linalg.solve(s0, s1).trace()
        return 0.5 * (trace - 2 + ((m1 - m0) * gap).sum(1) + torch.logdet(s0) - torch.logdet(s1))

    diagonal = ctrl.MultivariateGaussianPolicy(
        MOVING[1].mean, lambda t: (0.3 + t) * torch.eye(2, dtype=torch.float64)
    )
    divergence = ctrl.policy.policy_kl(MOVING[0], diagonal, t, x)
    torch.testing.assert_close(divergence, gaussian_kl(*MOVING))
    divergence = ctrl.policy.policy_kl(diagonal, MOVING[0], t, x)
    torch.testing.assert_close(divergence, gaussian_kl(*MOVING[::-1]))


def test_spreads_that_are_not_positive_somewhere_are_refused():
    x, t = torch.zeros(3, 2), torch.tensor(0.0)
    half = ctrl.GaussianPolicy(lambda t, x: x, lambda t: torch.tensor([0.3, 0.0]))
    with pytest.raises(ValueError, match="std must be positive"):
        half.distribution(t, x)
    for bad, words in (
        (torch.tensor([[0.5, 0.0, 0.0], [0.2, 0.4, 0.0]]), r"must be \[dim, dim\]"),
        (torch.tensor([[0.5, 0.0], [0.2, 0.0]]), "positive diagonal"),
    ):
        with pytest.raises(ValueError, match=words):
            ctrl.MultivariateGaussianPolicy(lambda t, x: x, bad)


def test_whether_a_policy_is_random_is_not_for_its_maker_to_say():
    mean = lambda t, x: x
    with pytest.raises(TypeError):
        ctrl.DeterministicPolicy(mean, True)
    with pytest.raises(TypeError):
        ctrl.GaussianPolicy(mean, 0.5, False)
    with pytest.raises(TypeError):
        ctrl.MultivariateGaussianPolicy(mean, SCALE, False)


def test_densities_do_not_look_at_the_values_of_actions():
    """What is not a number has a density that is none: looking would break transformed code."""
    t, x = torch.tensor(0.35).double(), torch.zeros(2, 2, dtype=torch.float64)
    for policy in (ctrl.GaussianPolicy(lambda t, x: x, 0.5), MOVING[0]):
        assert bool(policy.log_prob(t, x, torch.full_like(x, math.nan)).isnan().all())


# --- standard deviations that depend on the state


def std(t, x):
    return 0.2 + t + x.square()


SEEING = ctrl.GaussianPolicy(lambda t, x: 0.5 * x, std)


def test_a_std_of_the_state_is_each_path_s_own():
    t, x = torch.tensor(0.3).double(), torch.tensor([[0.4, -1.0], [2.0, 0.1]]).double()
    a, z = torch.tensor([[0.1, 0.9], [-0.3, 0.2]]).double(), torch.tensor([[1.0, -2.0]] * 2)
    law = Normal(0.5 * x, std(t, x))
    close = {"rtol": 1e-14, "atol": 1e-14}
    torch.testing.assert_close(SEEING.log_prob(t, x, a), law.log_prob(a).sum(1), **close)
    torch.testing.assert_close(SEEING.entropy(t, x), law.entropy().sum(1), **close)
    drawn = SEEING.act(SEEING.mean(t, x), t, z.double(), x)
    torch.testing.assert_close(drawn, 0.5 * x + std(t, x) * z, **close)
    torch.testing.assert_close(SEEING.noise_of(drawn, 0.5 * x, t, x), z.double(), **close)


def test_what_std_is_a_function_of_is_seen_in_its_signature():
    def scaled(t, scale=0.3):  # the second argument is no state
        return scale + t

    class Network(torch.nn.Module):
        def forward(self, t, x):
            return 0.1 + x.square()

    for function, sees in ((scaled, False), (std, True), (Network(), True), (torch.exp, False)):
        assert ctrl.GaussianPolicy(lambda t, x: x, function).sees_states is sees


def test_scales_that_depend_on_the_state_are_each_path_s_own():
    t, x = torch.tensor(0.3).double(), torch.tensor([[0.4, -1.0], [2.0, 0.1]]).double()

    def scale(t, x):
        return (1 + t + x[:, :1, None].square()) * SCALE

    policy = ctrl.MultivariateGaussianPolicy(lambda t, x: x, scale)
    a = torch.tensor([[0.1, 0.9], [-0.3, 0.2]]).double()
    for i, factor in enumerate(1.3 + x[:, 0].square()):
        alone = ctrl.MultivariateGaussianPolicy(lambda t, x: x, factor * SCALE)
        one, (row, other) = slice(i, i + 1), (x[i : i + 1], a[i : i + 1])
        torch.testing.assert_close(policy.log_prob(t, x, a)[one], alone.log_prob(t, row, other))
        drawn = policy.act(x, t, a, x)
        torch.testing.assert_close(drawn[one], alone.act(row, t, other))
    torch.testing.assert_close(policy.noise_of(drawn, x, t, x), a)


def test_a_std_of_the_state_that_does_not_fit_is_refused():
    t, x = torch.tensor(0.5), torch.ones(2, 3)
    with pytest.raises(ValueError, match="states must be given: std depends on them"):
        SEEING.act(x, t, x)
    narrow = ctrl.GaussianPolicy(lambda t, x: x, lambda t, x: x[:, :1])
    with pytest.raises(ValueError, match=r"std must return \[2, 3\]"):
        narrow.act(x, t, x, x)
    negative = ctrl.GaussianPolicy(lambda t, x: x, lambda t, x: x - 1)
    with pytest.raises(ValueError, match=r"positive and finite, at t = 0\.5 it is"):
        negative.log_prob(t, x, x)
    one = ctrl.MultivariateGaussianPolicy(lambda t, x: x, lambda t, x: torch.eye(3))
    with pytest.raises(ValueError, match=r"must be \[paths, dim, dim\]"):
        one.act(x, t, x, x)
    few = ctrl.MultivariateGaussianPolicy(lambda t, x: x, lambda t, x: torch.eye(3)[None])
    with pytest.raises(ValueError, match=r"must return \[2, dim, dim\]"):
        few.act(x, t, x, x)

    def writes(t, x):
        return x.add_(1)

    with pytest.raises(ValueError, match="std must not write into its inputs"):
        ctrl.GaussianPolicy(lambda t, x: x, writes).act(x, t, x, x)


def test_a_roll_out_and_its_density_see_one_std(generator):
    """Noise recovered from the stored actions is the noise that made them, on every path."""
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.4)
    grid = ctrl.TimeGrid(torch.tensor([0.0, 0.1, 0.4], dtype=torch.float64))
    z = torch.randn(5, 2, 3, dtype=torch.float64, generator=generator)
    noise = ctrl.Noise(0.2 * z, z.flip(0))
    paths = ctrl.simulate(ctrl.ControlProblem(sde, 1.0), SEEING, z[:, 0], grid, noise=noise)
    got = [
        SEEING.noise_of(a, SEEING.mean(t, x), t, x)
        for t, x, a in zip(
            grid.nodes, paths.states[:, :-1].unbind(1), paths.actions.unbind(1), strict=False
        )
    ]
    torch.testing.assert_close(torch.stack(got, 1), z.flip(0), rtol=1e-12, atol=1e-12)
    log_prob = ctrl.paths.log_probs(SEEING, paths)
    scales = torch.stack([std(grid.nodes[k], paths.states[:, k]) for k in range(2)], 1)
    expected = Normal(0.0, 1.0).log_prob(z.flip(0)) - scales.log()
    torch.testing.assert_close(log_prob, expected.sum(2), rtol=1e-12, atol=1e-12)


def test_a_policy_that_cannot_take_the_states_is_refused_by_name(generator):
    class Old:
        is_random = False

        def mean(self, t, x):
            return x

        def act(self, mean, t, noise):
            return mean

    problem = ctrl.ControlProblem(ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 1.0), 1.0)
    with pytest.raises(TypeError, match=r"policy.act must take \(mean, t, noise, states\)"):
        ctrl.simulate(
            problem, Old(), torch.zeros(2, 1), ctrl.uniform_grid(1.0, 2), generator=generator
        )


def test_a_std_that_turns_bad_along_paths_is_refused(generator):
    """There the steps are taken at once, and no single one can be looked at."""
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.4)
    start, problem = torch.zeros(3, 1, dtype=torch.float64), ctrl.ControlProblem(sde, 1.0)
    good = ctrl.GaussianPolicy(lambda t, x: x, 0.3)
    paths = ctrl.simulate(problem, good, start, ctrl.uniform_grid(1.0, 4), generator=generator)
    for bad in (
        ctrl.GaussianPolicy(lambda t, x: x, lambda t: 0.3 - t),
        ctrl.GaussianPolicy(lambda t, x: x, lambda t, x: 0.3 - t + 0 * x),
        ctrl.MultivariateGaussianPolicy(lambda t, x: x, lambda t: (0.3 - t).reshape(1, 1)),
    ):
        with pytest.raises(ValueError, match="must be positive and finite at every step"):
            ctrl.paths.log_probs(bad, paths)
