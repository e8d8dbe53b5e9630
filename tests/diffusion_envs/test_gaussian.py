import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from scipy.linalg import sqrtm
from torch.distributions import MultivariateNormal, kl_divergence

from diffusion_envs.denoising import tweedie_mean
from diffusion_envs.exact import gaussian
from diffusion_envs.exact.gaussian import Affine, Gaussian, Quadratic
from diffusion_envs.noise_schedules import VE, DDPMTable, VPLinear


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# eigenvalues 1.7, 0.3 and exactly 1: above, below and at the noise's
ANGLE = 0.7
TURN = tensor(
    [
        [math.cos(ANGLE), -math.sin(ANGLE), 0.0],
        [math.sin(ANGLE), math.cos(ANGLE), 0.0],
        [0.0, 0.0, 1.0],
    ]
)
DATA = Gaussian(tensor([0.8, -0.5, 0.3]), TURN @ tensor([1.7, 0.3, 1.0]).diag() @ TURN.T)
REWARD = Quadratic(
    tensor([[0.9, 0.2, 0.1], [0.2, -0.2, 0.0], [0.1, 0.0, 0.4]]),
    tensor([0.6, -0.3, 0.2]),
    tensor(0.11),
)
BETA = 0.7  # KL weight
SD15 = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
SCHEDULES = {
    "linear": VPLinear(0.1, 20.0),
    "constant": VPLinear(2.0, 2.0),
    "table": DDPMTable((1 - SD15).cumprod(0)),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
EXACT = {"rtol": 1e-11, "atol": 1e-11}
FROM, TO = tensor(0.9), tensor(0.15)


def law(it):
    return MultivariateNormal(it.mean, it.covariance)


@each_schedule
def test_the_score_is_the_gradient_of_the_log_density(schedule, generator):
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator).requires_grad_()
    log_density = law(gaussian.marginal(DATA, schedule, FROM)).log_prob(x).sum()
    expected = torch.autograd.grad(log_density, x)[0]
    torch.testing.assert_close(gaussian.score(DATA, schedule, FROM, x.detach()), expected, **EXACT)


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), VE(0.05, 3.0)])
def test_the_reverse_transition_is_bayes_rule(schedule, generator):
    """p(x_to | x_from) p(x_from) = p(x_from | x_to) p(x_to), pointwise."""
    step = gaussian.transition(DATA, schedule, FROM, TO)
    before, after = torch.randn(2, 6, 3, dtype=torch.float64, generator=generator)
    signal = schedule.alpha(FROM) / schedule.alpha(TO)
    noise = schedule.sigma(FROM) ** 2 - signal**2 * schedule.sigma(TO) ** 2
    unit = torch.eye(3, dtype=torch.float64)
    forward = MultivariateNormal(signal * after, noise * unit).log_prob(before)
    reverse = MultivariateNormal(before @ step.matrix.T + step.shift, step.covariance)
    left = reverse.log_prob(after) + law(gaussian.marginal(DATA, schedule, FROM)).log_prob(before)
    right = forward + law(gaussian.marginal(DATA, schedule, TO)).log_prob(after)
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_transitions_compose_and_carry_marginals_to_marginals(eta):
    schedule, middle = SCHEDULES["linear"], tensor(0.4)
    whole = gaussian.transition(DATA, schedule, FROM, TO, eta)
    first = gaussian.transition(DATA, schedule, FROM, middle, eta)
    second = gaussian.transition(DATA, schedule, middle, TO, eta)
    torch.testing.assert_close(second.matrix @ first.matrix, whole.matrix, **EXACT)
    torch.testing.assert_close(
        second.matrix @ first.covariance @ second.matrix.T + second.covariance,
        whole.covariance,
        **EXACT,
    )
    arrived = whole.after(gaussian.marginal(DATA, schedule, FROM))
    expected = gaussian.marginal(DATA, schedule, TO)
    torch.testing.assert_close(arrived.mean, expected.mean, **EXACT)
    torch.testing.assert_close(arrived.covariance, expected.covariance, **EXACT)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_the_transitions_matrix_solves_the_sdes_drift(eta):
    """Against an ODE solver in numpy: d log F = -k - (1 + eta^2)/2 g^2 / v along an eigenvector."""
    schedule, values = SCHEDULES["linear"], np.array([0.3, 1.0, 1.7])

    def rate(u, f):
        s = 0.9 - u
        beta, b = 0.1 + 19.9 * s, 0.1 * s + 9.95 * s**2
        spread = np.exp(-b) * values + 1 - np.exp(-b)
        return (0.5 * beta - 0.5 * (1 + eta**2) * beta / spread) * f

    end = solve_ivp(rate, (0, 0.75), np.ones(3), rtol=1e-11, atol=1e-13, method="DOP853").y[:, -1]
    found = torch.linalg.eigvalsh(gaussian.transition(DATA, schedule, FROM, TO, eta).matrix)
    np.testing.assert_allclose(found.numpy(), np.sort(end), rtol=1e-9)


def test_the_probability_flow_whitens_and_colours():
    schedule = SCHEDULES["linear"]
    flow = gaussian.transition(DATA, schedule, FROM, TO, eta=0.0)
    first, last = (gaussian.marginal(DATA, schedule, s).covariance.numpy() for s in (FROM, TO))
    np.testing.assert_allclose(
        flow.matrix.numpy(), sqrtm(last) @ np.linalg.inv(sqrtm(first)), rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(flow.covariance, torch.zeros(3, 3).double(), rtol=0, atol=1e-14)


def test_the_posterior_mean_is_tweedies(generator):
    schedule = SCHEDULES["constant"]
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    posterior = gaussian.transition(DATA, schedule, FROM, tensor(0.0))
    tweedie = tweedie_mean(
        x, gaussian.score(DATA, schedule, FROM, x), schedule.alpha(FROM), schedule.sigma(FROM)
    )
    torch.testing.assert_close(x @ posterior.matrix.T + posterior.shift, tweedie, **EXACT)


@pytest.mark.parametrize("end", [0.0, 0.15])
def test_the_response_to_a_constant_shift_is_the_integral_of_sensitivity_times_g2(end):
    schedule = SCHEDULES["linear"]
    response = gaussian.shift_response(DATA, schedule, FROM, tensor(end))

    def rate(s, value):
        def b(s):
            return 0.1 * s + 9.95 * s**2

        def spread(s):
            return math.exp(-b(s)) * value + 1 - math.exp(-b(s))

        return (0.1 + 19.9 * s) * math.exp(-(b(s) - b(end)) / 2) * spread(end) / spread(s)

    expected = [
        quad(rate, end, 0.9, args=(v,), epsabs=1e-13, epsrel=1e-12)[0] for v in (0.3, 1.0, 1.7)
    ]
    found = torch.linalg.eigvalsh(response).numpy()
    np.testing.assert_allclose(found, np.sort(expected), rtol=1e-10)


def test_the_response_of_a_published_instance():
    data = Gaussian(tensor([0.0]), tensor([[0.5]]))
    response = gaussian.shift_response(data, VPLinear(0.1, 20.0), tensor(1.0), tensor(0.0))
    root = math.sqrt(0.5)  # (2 w / r) (atanh r - atanh(r alpha_T)), w = 1/2
    expected = math.sqrt(2) * (math.atanh(root) - math.atanh(root * math.exp(-20.1 / 4)))
    assert response.item() == pytest.approx(expected, rel=1e-12)
    assert response.item() == pytest.approx(1.240, abs=5e-4)


# -- rewards, values, the optimum -----------------------------------------------------------------


def test_expectations_of_quadratics_are_those_of_cubature():
    nodes, weights = np.polynomial.hermite_e.hermegauss(2)
    grid = torch.cartesian_prod(*[torch.from_numpy(nodes)] * 3)
    mass = torch.cartesian_prod(*[torch.from_numpy(weights / weights.sum())] * 3).prod(1)
    root = torch.linalg.cholesky(DATA.covariance)
    expected = (REWARD(DATA.mean + grid @ root.T) * mass).sum()
    torch.testing.assert_close(REWARD.expectation(DATA), expected, **EXACT)

    step = Affine(0.6 * TURN + 0.1, tensor([0.2, -0.4, 0.5]), DATA.covariance)
    x = tensor([0.3, 0.9, -1.1])
    after = step.matrix @ x + step.shift + grid @ root.T
    torch.testing.assert_close(REWARD.before(step)(x), (REWARD(after) * mass).sum(), **EXACT)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(
        REWARD.gradient(x), torch.autograd.grad(REWARD(leaf), leaf)[0], **EXACT
    )


def test_the_tilt_is_the_data_times_the_exponential_reward(generator):
    x = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    tilted = gaussian.tilt(DATA, REWARD, BETA)
    log_weight = law(tilted).log_prob(x) - law(DATA).log_prob(x) - REWARD(x) / BETA
    torch.testing.assert_close(log_weight, log_weight[:1].expand(6), rtol=1e-10, atol=1e-10)


def test_the_tilt_maximises_reward_less_kl(generator):
    tilted = gaussian.tilt(DATA, REWARD, BETA)

    def objective(mean, root):
        candidate = Gaussian(mean, root @ root.T)
        return REWARD.expectation(candidate) - BETA * kl_divergence(law(candidate), law(DATA))

    mean = tilted.mean.clone().requires_grad_()
    root = torch.linalg.cholesky(tilted.covariance).requires_grad_()
    for gradient in torch.autograd.grad(objective(mean, root), (mean, root)):
        torch.testing.assert_close(
            gradient.tril() if gradient.ndim == 2 else gradient,
            torch.zeros_like(gradient),
            rtol=0,
            atol=1e-12,
        )


@each_schedule
@pytest.mark.parametrize("end", [0.0, 0.15])
def test_the_optimal_value_solves_the_hjb_equation(schedule, end, generator):
    """V_t + b_pre V_x + g^2/2 Lap V + g^2/(2 kl_weight) |V_x|^2 = 0, b_pre = g^2 (x/2 + score)."""
    x = torch.randn(3, dtype=torch.float64, generator=generator)
    s = tensor(0.5237).requires_grad_()  # inside a timestep of the table
    value = gaussian.optimal_value(DATA, schedule, REWARD, BETA, s, tensor(end))
    time_derivative = -torch.autograd.grad(value(x), s)[0]
    s, value = s.detach(), Quadratic(*(v.detach() for v in vars(value).values()))
    g2, slope = schedule.g2(s), value.gradient(x)
    drift = g2 * (0.5 * x + gaussian.score(DATA, schedule, s, x[None])[0])
    residual = (
        time_derivative
        + drift @ slope
        - 0.5 * g2 * value.curvature.trace()
        + 0.5 * g2 / BETA * slope @ slope
    )
    assert abs(residual) < 1e-9 * g2  # every term is of the size of g^2, up to 20
    at_end = gaussian.optimal_value(DATA, schedule, REWARD, BETA, tensor(end), tensor(end))
    torch.testing.assert_close(at_end(x), REWARD(x), **EXACT)


@each_schedule
def test_the_optimal_score_is_that_of_the_noised_tilt(schedule, generator):
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    value = gaussian.optimal_value(DATA, schedule, REWARD, BETA, FROM, tensor(0.0))
    optimal = gaussian.score(DATA, schedule, FROM, x) + value.gradient(x) / BETA
    tilted = gaussian.tilt(DATA, REWARD, BETA)
    torch.testing.assert_close(gaussian.score(tilted, schedule, FROM, x), optimal, **EXACT)


def test_bad_input_is_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match="covariance must be positive semidefinite"):
        Gaussian(tensor([0.0, 0.0]), tensor([[1.0, 2.0], [2.0, 1.0]])).spectrum  # noqa: B018  # reading it is the test
    with pytest.raises(ValueError, match="covariance must be finite"):
        Gaussian(tensor([0.0]), tensor([[math.nan]])).spectrum  # noqa: B018  # as above
    with pytest.raises(ValueError, match="kl_weight must be positive and finite, got 0"):
        gaussian.tilt(DATA, REWARD, 0.0)
    convex = Quadratic(-3 * torch.eye(3).double(), DATA.mean, tensor(0.0))
    with pytest.raises(ValueError, match="the tilt has no finite mass"):
        gaussian.tilt(DATA, convex, 1.0)
    with pytest.raises(ValueError, match="the tilt has no finite mass"):
        gaussian.optimal_value(DATA, SCHEDULES["constant"], convex, 1.0, FROM, tensor(0.0))
    with pytest.raises(ValueError, match="kl_weight must be positive and finite, got -1"):
        gaussian.optimal_value(DATA, SCHEDULES["constant"], REWARD, -1.0, FROM, tensor(0.0))
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as in production
    with pytest.raises(ValueError, match=r"covariance must be .* to fit mean \[3\], got \[2, 2\]"):
        Gaussian(DATA.mean, torch.eye(2).double())


# -- edges ----------------------------------------------------------------------------------------


def test_data_may_lie_in_a_plane():
    flat = Gaussian(DATA.mean, tensor([1.7, 0.3, 0.0]).diag())
    assert float(flat.spectrum[0].min()) == pytest.approx(0, abs=1e-15)
    tilted = gaussian.tilt(flat, REWARD, BETA)
    # the root of an eigenvalue that is 0 up to round-off
    assert float(tilted.mean[2]) == pytest.approx(float(flat.mean[2]), abs=1e-7)
    assert float(tilted.covariance[2].abs().max()) < 1e-7


@pytest.mark.parametrize("weight", [0.2, 1.0, 5.0])
def test_the_tilt_and_the_value_are_finite_up_to_their_edges(weight):
    """1 + Q S / kl_weight > 0 for the law's own S: that of the data, or of a step's noise."""
    schedule, slope = SCHEDULES["linear"], torch.zeros(3, dtype=torch.float64)
    step = gaussian.transition(DATA, schedule, TO, tensor(0.0))

    def reward(edge, share):
        return Quadratic(-share * weight / edge * torch.eye(3).double(), slope, tensor(0.0))

    largest, of_step = 1.7, float(torch.linalg.eigvalsh(step.covariance).max())
    assert of_step < 0.3
    gaussian.tilt(DATA, reward(largest, 0.999), weight)
    arguments = (weight, TO, tensor(0.0))
    gaussian.optimal_value(DATA, schedule, reward(of_step, 0.999), *arguments)
    with pytest.raises(ValueError, match="no finite mass"):
        gaussian.tilt(DATA, reward(largest, 1.001), weight)
    with pytest.raises(ValueError, match="no finite mass"):
        gaussian.optimal_value(DATA, schedule, reward(of_step, 1.001), *arguments)


@pytest.mark.parametrize("variance", [0.5, 0.3, 1 / 3, 7e5])
@pytest.mark.parametrize("weight", [0.8, 0.3, 1.7])
@pytest.mark.parametrize("ulps", [-2, -1, 0, 1, 2])
def test_the_edge_has_no_mass_whatever_its_round_off(variance, weight, ulps):
    data = Gaussian(tensor([0.4]), tensor([[variance]]))
    edge = -weight / variance * (1 + ulps * torch.finfo(torch.float64).eps)
    zero, constant = tensor([0.0]), tensor(0.0)
    with pytest.raises(ValueError, match="no finite mass"):
        gaussian.tilt(data, Quadratic(tensor([[edge]]), zero, constant), weight)
    gaussian.tilt(data, Quadratic(tensor([[edge * (1 - 1e-9)]]), zero, constant), weight)


def test_rewards_that_overflow_are_refused():
    huge = Quadratic(-1e200 * torch.eye(3).double(), DATA.mean, tensor(0.0))
    with pytest.raises(ValueError, match="must not overflow"):
        gaussian.tilt(DATA, huge, 1e-200)


@pytest.mark.parametrize("seed", range(8))
def test_data_on_a_line_in_any_direction_are_as_good(seed, generator):
    direction = torch.randn(4, dtype=torch.float64, generator=generator.manual_seed(seed))
    line = Gaussian(torch.zeros(4).double(), torch.outer(direction, direction))
    assert bool((line.spectrum[0] >= 0).all())  # round-off of either sign is none
    slope = torch.ones(4, dtype=torch.float64)
    tilted = gaussian.tilt(line, Quadratic(torch.eye(4).double(), slope, tensor(0.0)), BETA)
    size = float(direction.square().sum())
    expected = torch.outer(direction, direction) / (1 + size / BETA)
    # the root of an eigenvalue that is 0 up to round-off
    torch.testing.assert_close(tilted.covariance, expected, rtol=0, atol=1e-7 * size)


def test_no_weight_is_infinite_and_the_edge_itself_has_no_mass():
    with pytest.raises(ValueError, match="kl_weight must be positive and finite, got inf"):
        gaussian.tilt(DATA, REWARD, math.inf)
    unit = Gaussian(tensor([0.0]), tensor([[4.0]]))
    with pytest.raises(ValueError, match="no finite mass"):  # 1 + 2 (-1/4) 2 = 0, exactly
        gaussian.tilt(unit, Quadratic(tensor([[-0.25]]), tensor([0.0]), tensor(0.0)), 1.0)
