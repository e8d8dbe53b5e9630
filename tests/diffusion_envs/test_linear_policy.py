import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import ctrl
from diffusion_envs.exact import linear_policy
from diffusion_envs.exact.gaussian import Gaussian, Quadratic, marginal, shift_response, transition
from diffusion_envs.exact.linear_policy import Steps
from diffusion_envs.noise_schedules import DDPMTable, VPLinear
from diffusion_envs.samplers import DDIM


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


DATA = Gaussian(tensor([0.8, -0.5]), tensor([[0.9, 0.35], [0.35, 0.4]]))
REWARD = Quadratic(tensor([[0.9, 0.2], [0.2, -0.2]]), tensor([0.6, -0.3]), tensor(0.11))
GAIN, SHIFT = tensor([[-0.3, 0.15], [0.05, 0.2]]), tensor([0.25, -0.1])
START = Gaussian(tensor([0.1, -0.2]), tensor([[1.1, 0.1], [0.1, 0.8]]))
BETA = 0.7  # KL weight
VP = VPLinear(0.1, 20.0)
SD15 = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
TABLE = DDPMTable((1 - SD15).cumprod(0))
NONE = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)


def sampler_steps(eta=1.0, count=12):
    return DDIM(eta).bind(TABLE, count)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_moments_are_those_of_simulated_paths(eta):
    """Production simulate and sampler on quadrature noise, whose moments are exact."""
    sampler = sampler_steps(eta, 3)
    steps = linear_policy.chain(DATA, TABLE, Steps.of(sampler), GAIN, SHIFT)
    laws = linear_policy.moments(steps, START)
    quadrature = ctrl.noise.gauss_hermite(sampler.grid.steps, nodes=3, noise=(2,))
    point = START.mean.expand(len(quadrature.increments), 2)
    paths = ctrl.simulate(
        linear_policy.problem(DATA, TABLE, REWARD, BETA, eta),
        ctrl.DeterministicPolicy(linear_policy.linear_score(DATA, TABLE, GAIN, SHIFT)),
        point.contiguous(),
        sampler.grid,
        solver=sampler,
        noise=quadrature,
    )
    laws = linear_policy.moments(steps, Gaussian(START.mean, 0 * START.covariance))
    for k, law in enumerate(laws):
        x, weights = paths.states[:, k], quadrature.weights[:, None]
        mean = (weights * x).sum(0)
        torch.testing.assert_close(mean, law.mean, rtol=1e-11, atol=1e-11)
        spread = ((x - mean) * weights).T @ (x - mean)
        torch.testing.assert_close(spread, law.covariance, rtol=1e-11, atol=1e-11)


def test_forward_and_backward_recursions_agree_on_the_objective():
    steps = Steps.of(sampler_steps())
    moved = linear_policy.chain(DATA, TABLE, steps, GAIN, SHIFT)
    running = linear_policy.kl_cost(BETA * steps.cost, GAIN, SHIFT)
    laws = linear_policy.moments(moved, START)
    values = linear_policy.chain_values(moved, REWARD, running)
    paid = REWARD.expectation(laws[-1])
    for k, law in enumerate(laws[:-1]):
        change = Gaussian(GAIN @ law.mean + SHIFT, GAIN @ law.covariance @ GAIN.T)
        square = change.mean.square().sum() + change.covariance.trace()
        paid = paid - 0.5 * BETA * steps.cost[k] * square
        # at every node: what was paid so far, plus the value of the law there, is the objective
    for k in (0, 5):
        so_far = sum(running_at(running, j).expectation(laws[j]) for j in range(k))
        total = so_far + values[k].expectation(laws[k])
        torch.testing.assert_close(total, paid, rtol=1e-12, atol=1e-12)


def running_at(running, k):
    return Quadratic(running.curvature[k], running.slope[k], running.constant[k])


@pytest.mark.parametrize("eta", [0.6, 1.0])
def test_euler_steps_are_those_of_ctrl(eta, generator):
    times = tensor([0.9, 0.7, 0.4, 0.1])
    steps = Steps.of_euler(VP, times, eta)
    problem = linear_policy.problem(DATA, VP, REWARD, BETA, eta)
    x, score = torch.randn(2, 5, 2, dtype=torch.float64, generator=generator)
    for k in range(3):
        mean, std = ctrl.EulerMaruyama().transition(
            problem.sde, 1 - times[k], 1 - times[k + 1], x, score
        )
        torch.testing.assert_close(mean, steps.state_gain[k] * x + steps.score_gain[k] * score)
        torch.testing.assert_close(std, steps.std[k])
        paid = problem.running_reward(1 - times[k], x, score)
        reference = linear_policy.linear_score(DATA, VP, *NONE)(1 - times[k], x)
        cost = 0.5 * BETA * steps.cost[k] * (score - reference).square().sum(1)
        torch.testing.assert_close(-paid * (times[k] - times[k + 1]), cost)


# -- continuous time ------------------------------------------------------------------------------


def backward_value(gain, shift, kl_weight, s_from, s_to):
    """Value and gradient by theory's backward equations, in numpy: (J, dJ/dc, dJ/dD); eta = 1.

    P' = -(A'P + P A) - w D'D, e' = -A'e + P b + w D'c, dJ/dc = int g^2 E[grad V] - w E[D x + c] and
    dJ/dD the same with x' inside, V = -x'Px/2 + e'x, w = kl_weight g^2.
    """
    m, cov = DATA.mean.numpy(), DATA.covariance.numpy()
    gain, shift, unit = gain.numpy(), shift.numpy(), np.eye(2)

    def coefficients(s):
        beta, level = 0.1 + 19.9 * s, np.exp(-0.1 * s - 9.95 * s**2)
        precision = np.linalg.inv(level * cov + (1 - level) * unit)
        a = beta * (0.5 * unit - precision + gain)
        return beta, a, beta * (np.sqrt(level) * precision @ m + shift)

    def forward(u, y):
        beta, a, b = coefficients(s_from - u)
        mean, spread = y[:2], y[2:6].reshape(2, 2)
        leaving = gain @ mean + shift
        cost = 0.5 * kl_weight * beta * (leaving @ leaving + np.trace(gain @ spread @ gain.T))
        rates = a @ spread + spread @ a.T + beta * unit
        return np.concatenate([a @ mean + b, rates.ravel(), [cost]])

    start = np.concatenate([START.mean.numpy(), START.covariance.numpy().ravel(), [0.0]])
    options = {"rtol": 1e-11, "atol": 1e-12, "method": "DOP853", "dense_output": True}
    ahead = solve_ivp(forward, (0, s_from - s_to), start, **options)
    q, slope = REWARD.curvature.numpy(), REWARD.slope.numpy()
    mean, spread = ahead.y[:2, -1], ahead.y[2:6, -1].reshape(2, 2)
    objective = -0.5 * (mean @ q @ mean + np.trace(q @ spread)) + slope @ mean
    objective += REWARD.constant.item() - ahead.y[6, -1]

    def back(v, y):  # from the data end: v = s - s_to
        beta, a, b = coefficients(s_to + v)
        p, e = y[:4].reshape(2, 2), y[4:6]
        at = ahead.sol(s_from - s_to - v)
        mean, second = at[:2], at[2:6].reshape(2, 2) + np.outer(at[:2], at[:2])
        w = kl_weight * beta
        by_shift = beta * (e - p @ mean) - w * (gain @ mean + shift)
        by_gain = beta * (np.outer(e, mean) - p @ second)
        by_gain -= w * (gain @ second + np.outer(shift, mean))
        return np.concatenate(
            [
                (a.T @ p + p @ a + w * gain.T @ gain).ravel(),
                a.T @ e - p @ b - w * gain.T @ shift,
                by_shift,
                by_gain.ravel(),
            ]
        )

    end = np.concatenate([q.ravel(), slope, np.zeros(6)])
    behind = solve_ivp(back, (0, s_from - s_to), end, **options).y[:, -1]
    return objective, behind[6:8], behind[8:12].reshape(2, 2)


@pytest.mark.parametrize("kl_weight", [0.0, BETA])
def test_continuous_value_and_gradient_are_those_of_the_backward_equations(kl_weight):
    gain, shift = GAIN.clone().requires_grad_(), SHIFT.clone().requires_grad_()
    value = linear_policy.continuous_value(
        DATA, VP, START, 0.9, 0.1, gain, shift, REWARD, kl_weight
    )
    by_gain, by_shift = torch.autograd.grad(value, (gain, shift))
    objective, expected_shift, expected_gain = backward_value(GAIN, SHIFT, kl_weight, 0.9, 0.1)
    # Runge-Kutta: (rate * h)^4 with rate 20 and h = 0.002, times an order-one constant
    assert value.item() == pytest.approx(objective, abs=1e-6)
    np.testing.assert_allclose(by_shift.numpy(), expected_shift, atol=1e-6)
    np.testing.assert_allclose(by_gain.numpy(), expected_gain, atol=1e-6)


def test_the_integrators_error_is_of_fourth_order():
    objective = backward_value(GAIN, SHIFT, BETA, 0.9, 0.1)[0]
    errors = [
        linear_policy.continuous_value(
            DATA, VP, START, 0.9, 0.1, GAIN, SHIFT, REWARD, BETA, substeps=n
        ).item()
        - objective
        for n in (50, 100)
    ]
    assert 12 < errors[0] / errors[1] < 20


@pytest.mark.parametrize("substeps", [7, 20, 23])
def test_the_integrator_reaches_the_data_end(substeps):
    """Round-off of the last substep must not ask for a noise level before the data."""
    noisy = marginal(DATA, VP, tensor(0.9))
    value = linear_policy.continuous_value(
        DATA, VP, noisy, 0.9, 0.0, *NONE, REWARD, substeps=substeps
    )
    assert torch.isfinite(value)


def test_a_pure_shift_has_its_closed_form():
    s_from, s_to = tensor(0.9), tensor(0.1)
    step = transition(DATA, VP, s_from, s_to)
    arrived = step.after(START)
    response = shift_response(DATA, VP, s_from, s_to)
    moved = Gaussian(arrived.mean + response @ SHIFT, arrived.covariance)
    cost = 0.5 * BETA * SHIFT.square().sum() * VP.integrated_g2(s_to, s_from)
    value = linear_policy.continuous_value(DATA, VP, START, 0.9, 0.1, NONE[0], SHIFT, REWARD, BETA)
    torch.testing.assert_close(value, REWARD.expectation(moved) - cost, rtol=0, atol=1e-7)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_every_eta_carries_the_pretrained_model_to_its_marginal(eta):
    noisy, clean = (marginal(DATA, VP, tensor(s)) for s in (0.9, 0.1))
    value = linear_policy.continuous_value(
        DATA, VP, noisy, 0.9, 0.1, *NONE, REWARD, kl_weight=0.0, eta=eta
    )
    torch.testing.assert_close(value, REWARD.expectation(clean), rtol=0, atol=1e-7)


def test_the_reverse_sde_without_a_price_is_the_default():
    times = tensor([0.9, 0.5, 0.2])
    default, plain = Steps.of_euler(VP, times), Steps.of_euler(VP, times, 1.0)
    for name in vars(plain):
        torch.testing.assert_close(getattr(default, name), getattr(plain, name), rtol=0, atol=0)
    assert torch.equal(default.noising_times, times)
    problem = linear_policy.problem(DATA, VP, REWARD)
    t, x = tensor(0.3), tensor([[0.4, -0.7]])
    assert problem.running_reward is None
    torch.testing.assert_close(problem.terminal_reward(x), REWARD(x))
    torch.testing.assert_close(problem.sde.diffusion(t, x), VP.g2(1 - t).sqrt())
    arguments = (DATA, VP, START, 0.9, 0.2, GAIN, SHIFT, REWARD)
    found = linear_policy.continuous_value(*arguments)
    expected = linear_policy.continuous_value(*arguments, 0.0, 1.0, 400)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_score_is_as_precise_as_the_states_whatever_the_time_is_in():
    score = linear_policy.linear_score(DATA, VP, GAIN, SHIFT)
    x = tensor([[0.4, -0.7]])
    single = score(torch.tensor(0.3125), x)  # a time that float32 has exactly
    torch.testing.assert_close(single, score(tensor(0.3125), x), rtol=1e-14, atol=1e-14)
