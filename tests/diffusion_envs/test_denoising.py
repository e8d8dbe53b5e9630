import math

import jaxtyping
import pytest
import torch
from diffusers import DDIMScheduler

import ctrl
from diffusion_envs.denoising import (
    epsilon_from_score,
    generation_sde,
    kl_factor,
    kl_running_reward,
    noising_bridge,
    path_kl_per_step,
    score_from_epsilon,
    score_from_v,
    score_from_x0,
    tweedie_mean,
    v_from_score,
    x0_from_score,
)
from diffusion_envs.noise_schedules import VE, Cosine, DDPMTable, RectifiedFlow, VPLinear

SCHEDULES = {
    "linear": VPLinear(0.1, 20.0, horizon=1.2),
    "cosine": Cosine(),
    "exploding": VE(0.05, 7.0),
    "flow": RectifiedFlow(),
    "table": DDPMTable.from_diffusers(DDIMScheduler(clip_sample=False)),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
MEAN, VARIANCE = 0.8, 0.35  # of Gaussian data


def marginal(schedule, s):
    alpha, sigma = schedule.alpha(s), schedule.sigma(s)
    return alpha * MEAN, alpha.square() * VARIANCE + sigma.square()


@each_schedule
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 1.7])
def test_every_eta_keeps_the_marginals_of_the_noising_process(schedule, eta):
    """The moment equations of the generation SDE hold along the noised law of Gaussian data."""
    sde = generation_sde(schedule, eta)
    t = torch.tensor(0.4321, dtype=torch.float64)  # inside a timestep of the table
    s = (schedule.horizon - t).requires_grad_()
    mean, variance = marginal(schedule, s)
    # RL time runs backwards; without drift the mean does not depend on s at all
    mean_rate = -torch.autograd.grad(mean + 0 * s, s, retain_graph=True)[0]
    variance_rate = -torch.autograd.grad(variance, s)[0]
    mean, variance = mean.detach(), variance.detach()

    def drift(x):
        return sde.drift(t, x, -(x - mean) / variance)

    slope = drift(mean.view(1, 1) + 1) - drift(mean.view(1, 1))
    diffusion = torch.as_tensor(sde.diffusion(t, mean.view(1, 1)))
    torch.testing.assert_close(drift(mean.view(1, 1)).view(()), mean_rate, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        (2 * slope * variance + diffusion.square()).view(()), variance_rate, rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("eta", [0.3, 1.0, 1.6])
def test_path_kl_is_girsanovs(eta, generator):
    """Against ctrl's path KL of the same SDE, whose drifts it sees but no schedule."""
    schedule = VPLinear(2.0, 2.0)  # constant, so that g^2 h is its integral
    sde = generation_sde(schedule, eta)
    grid = ctrl.TimeGrid(torch.tensor([0.0, 0.2, 0.5, 0.6, 0.95], dtype=torch.float64))
    policy = ctrl.DeterministicPolicy(lambda t, x: -1.3 * x + 0.2 * t)
    reference = ctrl.DeterministicPolicy(lambda t, x: -x - 0.1)
    start = torch.randn(8, 2, 3, dtype=torch.float64, generator=generator)
    problem = ctrl.ControlProblem(sde, horizon=1.0)
    paths = ctrl.simulate(problem, policy, start, grid, generator=generator)
    expected = ctrl.girsanov.path_kl(sde, policy, reference, paths)

    before = paths.states[:, :-1]
    times = grid.nodes[:-1].view(1, -1, 1, 1)
    scores, reference_scores = -1.3 * before + 0.2 * times, -before - 0.1
    steps = schedule.integrated_g2(1 - grid.nodes[1:], 1 - grid.nodes[:-1])
    each = path_kl_per_step(scores, reference_scores, steps, factor=kl_factor(eta))
    torch.testing.assert_close(each.sum(1), expected, rtol=1e-12, atol=0)

    pay = kl_running_reward(schedule, reference.mean, 0.7, eta)
    priced = ctrl.running_rewards(ctrl.ControlProblem(sde, horizon=1.0, running_reward=pay), paths)
    torch.testing.assert_close(priced, -0.7 * each, rtol=1e-12, atol=1e-15)


def test_predictions_and_scores_are_two_names_of_one_thing(generator):
    x0, epsilon = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=generator)
    sigma = torch.tensor([0.2, 0.5, 0.7, 0.9, 0.99], dtype=torch.float64).view(-1, 1, 1)
    for alpha in (1 - sigma.square()).sqrt(), 1 - sigma, torch.ones_like(sigma):
        x, v = alpha * x0 + sigma * epsilon, alpha * epsilon - sigma * x0
        score = -epsilon / sigma
        exact = {"rtol": 1e-10, "atol": 1e-10}
        for there, back, prediction in [
            (score_from_epsilon, epsilon_from_score, epsilon),
            (score_from_x0, x0_from_score, x0),
            (score_from_v, v_from_score, v),
        ]:
            torch.testing.assert_close(there(x, prediction, alpha, sigma), score, **exact)
            torch.testing.assert_close(back(x, score, alpha, sigma), prediction, **exact)


def test_tweedie_mean_is_the_posterior_mean_of_gaussian_data():
    schedule, s = VPLinear(0.1, 20.0), torch.tensor(0.37, dtype=torch.float64)
    alpha, sigma = schedule.alpha(s), schedule.sigma(s)
    mean, variance = marginal(schedule, s)
    x = torch.tensor([[-1.0], [0.3], [2.0]], dtype=torch.float64)
    precision = 1 / VARIANCE + alpha.square() / sigma.square()  # Bayes
    posterior = (MEAN / VARIANCE + alpha * x / sigma.square()) / precision
    torch.testing.assert_close(tweedie_mean(x, -(x - mean) / variance, alpha, sigma), posterior)


def test_levels_are_never_broadcast_in_silence():
    x, levels = torch.zeros(4, 4), torch.full((4,), 0.5)  # [rows] would broadcast over columns
    for convert in (tweedie_mean, score_from_epsilon, score_from_x0, score_from_v, v_from_score):
        with pytest.raises(ValueError, match="alpha and sigma must have no dimensions, or the 2"):
            convert(x, x, levels, levels)


def test_bad_input_is_refused_by_name(monkeypatch):
    schedule = VPLinear()
    for eta in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="eta must be at least 0 and finite"):
            generation_sde(schedule, eta)
    for eta in (0.0, math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="eta must be positive for a path KL"):
            kl_factor(eta)
    with pytest.raises(ValueError, match="weight must be at least 0 and finite, got nan"):
        kl_running_reward(schedule, lambda t, x: x, math.nan)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    with pytest.raises(ValueError, match=r"alike with 2 steps, got \[5, 3, 1\]"):
        path_kl_per_step(torch.zeros(5, 3, 1), torch.zeros(5, 3, 1), torch.ones(2))


def test_kl_factor_is_least_for_the_reverse_sde():
    assert kl_factor(1.0) == 1
    assert kl_factor(0.5) == pytest.approx(1.25**2)
    assert min(kl_factor(eta) for eta in (0.2, 0.9, 0.99, 1.01, 1.1, 5.0)) > 1


def test_the_reverse_sde_and_its_divergence_are_the_defaults():
    schedule, t = VPLinear(0.1, 20.0), torch.tensor(0.4, dtype=torch.float64)
    x, score = torch.tensor([[0.7, -0.2]]).double(), torch.tensor([[-0.3, 1.1]]).double()
    s = 1 - t
    sde = generation_sde(schedule)
    drift = schedule.g2(s) * (score + 0.5 * x)
    torch.testing.assert_close(sde.drift(t, x, score), drift)
    torch.testing.assert_close(sde.diffusion(t, x), schedule.g2(s).sqrt())
    pay = kl_running_reward(schedule, lambda t, x: (1 + t) * x, 0.7)
    gap = (score - 1.4 * x).square().sum(1)
    torch.testing.assert_close(pay(t, x, score), -0.35 * schedule.g2(s) * gap)
    assert not kl_running_reward(schedule, lambda t, x: x, 0.0)(t, x, score).any()
    with pytest.raises(ValueError, match="weight must be at least 0 and finite"):
        kl_running_reward(schedule, lambda t, x: x, math.inf)
    scores = torch.stack([score, score], 1)
    each = path_kl_per_step(scores, 0 * scores, torch.tensor([0.3, 0.2]).double())
    torch.testing.assert_close(each, 0.5 * 1.3 * torch.tensor([[0.3, 0.2]]).double())


def test_the_generation_sde_keeps_the_precision_of_the_states():
    sde, t = generation_sde(VPLinear(), 0.4), torch.tensor(0.4, dtype=torch.float64)
    x = torch.ones(2, 3)
    assert sde.drift(t, x, x).dtype == sde.diffusion(t, x).dtype == torch.float32


def test_each_level_of_each_conversion_is_checked():
    x, bad, good = torch.ones(2, 3), torch.full((3,), 0.5), torch.tensor(0.5)
    for convert in (
        tweedie_mean, score_from_epsilon, score_from_x0, score_from_v, epsilon_from_score,
        v_from_score,
    ):  # fmt: skip
        for levels in ((bad, good), (good, bad)):
            with pytest.raises(ValueError, match=r"the 2 of states \[2, 3\]; got \[3\]"):
                convert(x, x, *levels)


def test_scores_and_steps_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    scores = torch.zeros(5, 3, 2)
    for other, steps in ((scores, torch.ones(1)), (scores[:1], torch.ones(3))):
        with pytest.raises(ValueError, match="scores must be"):
            path_kl_per_step(scores, other, steps)


def test_the_noising_bridge_is_the_conditional_law_of_a_gaussian_pair():
    alpha, ratio = torch.tensor([0.8, 0.35]).double(), torch.tensor([0.6, 0.9]).double()
    sigma = (1 - alpha.square()).sqrt()
    data, noised = torch.tensor([[0.7], [-1.1]]).double(), torch.tensor([[-0.4], [0.9]]).double()
    rows = (-1, 1)
    mean, std = noising_bridge(data, noised, alpha.view(rows), sigma.view(rows), ratio.view(rows))
    for k in range(2):
        # (noise of Y', noise of the step) -> (Y', Y)
        root = torch.tensor([[sigma[k], 0], [ratio[k] * sigma[k], (1 - ratio[k] ** 2).sqrt()]])
        joint = root @ root.T
        centre = torch.stack([alpha[k], ratio[k] * alpha[k]]) * data[k]
        expected = centre[0] + joint[0, 1] / joint[1, 1] * (noised[k] - centre[1])
        torch.testing.assert_close(mean[k], expected)
        variance = joint[0, 0] - joint[0, 1] ** 2 / joint[1, 1]
        torch.testing.assert_close(std[k].square(), variance[None])
    bad, good = torch.full((3,), 0.5), torch.tensor(0.5)
    x = torch.ones(2, 3)
    for levels in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=r"the 2 of states \[2, 3\]; got \[3\]"):
            noising_bridge(x, x, *levels, good)
