import math

import pytest
import torch
from diffusers import DDPMScheduler
from scipy.optimize import brentq
from scipy.special import gammaln
from torch.distributions import Independent, Normal, kl_divergence

import ctrl
from diffusion_envs.noise_schedules import DDPMTable, FlowTable
from diffusion_envs.objectives.path_steps import transition_log_ratio
from diffusion_envs.samplers import DDIM, BoundFewSteps, EqualAngles, QuadraticVariances, Scheduler
from verification.problems.losses import rows_of_steps

EVENT = (2, 3, 5)
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
TABLE = DDPMTable((1 - BETAS).cumprod(0))
ETA = [1e-4, 0.01103, 0.04, 0.08703, 0.1521, 0.23523, 0.3364, 0.45563, 0.5929, 0.74823]
TIMESTEPS = [616.73, 493.98, 394.08, 308.87, 234.86, 170.30, 114.36, 66.87, 28.29, 0.0]
STD = [0.8372, 0.7177, 0.5987, 0.4847, 0.3773, 0.2765, 0.1819, 0.0937, 0.0100, 0.0010]


def published(**settings):
    return QuadraticVariances(**settings).bind(TABLE, 10)


def assert_printed(values, expected, digits):
    """``values`` print as ``expected``, with so many digits after the point."""
    assert (values - torch.tensor(expected, dtype=values.dtype)).abs().max() < 0.501 * 10**-digits


@pytest.mark.parametrize("stored", [torch.float64, torch.float32])
def test_the_published_numbers(stored):
    table = DDPMTable(TABLE.alphas_cumprod.to(stored).double())
    sampler = QuadraticVariances().bind(table, 10)
    assert_printed(sampler.variances.flip(0), ETA, 5)
    assert_printed(sampler.timesteps, TIMESTEPS, 2)
    assert_printed(sampler.std, STD, 4)
    assert_printed(sampler.alpha_bar[:1], [0.021], 3)
    assert sampler.steps == 10
    assert sampler.has_density
    assert isinstance(sampler, ctrl.TransitionSolver)


def test_a_table_of_diffusers_has_the_published_timesteps():
    scheduler = DDPMScheduler(1000, 1e-4, 0.02, "linear")
    table = DDPMTable(scheduler.alphas_cumprod.double())
    assert_printed(QuadraticVariances().bind(table, 10).timesteps, TIMESTEPS, 2)


def log_gamma_continuation(timestep):
    """log alpha-bar of Kong & Ping at a timestep, equation for linear betas; their own route."""
    step = (0.02 - 1e-4) / 999
    c = (1 - 1e-4) / step
    return (timestep + 1) * math.log(step) + gammaln(c + 1) - gammaln(c - timestep)


@pytest.mark.parametrize("sampler", [published(), EqualAngles().bind(TABLE, 4)], ids=["10", "4"])
def test_timesteps_are_those_of_the_log_gamma_continuation(sampler):
    expected = [
        brentq(lambda t, abar=abar: log_gamma_continuation(t) - math.log(abar), -0.5, 999)
        for abar in sampler.alpha_bar[:-1].tolist()
    ]
    # gammaln of 5e4 cancels to 2e-10, over a slope of 1e-4 a timestep at the data's end
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(sampler.timesteps, expected, rtol=0, atol=1e-5)
    between = torch.tensor([0.0, 0.25, 17.9, 616.7, 998.5], dtype=torch.float64)
    continued = torch.tensor([log_gamma_continuation(t) for t in between.tolist()])
    ours = TABLE.log_alpha_bar_at(between)
    torch.testing.assert_close(ours, continued.double(), rtol=0, atol=1e-8)


def test_timesteps_invert_levels_on_any_table(generator):
    rough = torch.rand(30, dtype=torch.float64, generator=generator).mul(0.3).add(0.01)
    table = DDPMTable((1 - rough).cumprod(0))
    asked = torch.linspace(0, 29, 401, dtype=torch.float64)
    levels = table.log_alpha_bar_at(asked)
    assert (levels.diff() < 0).all()
    torch.testing.assert_close(table.timesteps_of(levels), asked, rtol=0, atol=1e-9)
    whole = torch.arange(30)
    torch.testing.assert_close(
        table.log_alpha_bar_at(whole.double()), table.alphas_cumprod.log(), rtol=1e-12, atol=0
    )
    beta = table.integrated_beta(torch.linspace(0.01, 1, 57, dtype=torch.float64))
    again = table.integrated_beta(table.noising_times_of(beta))
    torch.testing.assert_close(again, beta, rtol=1e-12, atol=1e-12)


def test_levels_of_the_nodes_are_the_schedules():
    sampler = published()
    times = sampler.noising_times
    assert float(times[-1]) == 0
    # the schedule may take a time up to 1e-3 of a timestep beyond a node: 1e-8 of log alpha-bar
    torch.testing.assert_close(sampler.schedule.alpha(times), sampler.alpha, rtol=1e-7, atol=0)
    assert (sampler.grid.steps > 0).all()


def test_equal_angles_turn_equally_between_the_published_ends():
    sampler = EqualAngles().bind(TABLE, 4)
    angles = torch.rad2deg(sampler.alpha.arccos())[:-1]
    assert_printed(angles[[0, -1]], [81.7, 0.57], 1)
    assert_printed(angles.diff(), [-27.0] * 3, 1)
    torch.testing.assert_close(sampler.alpha_bar[[0, -2]], published().alpha_bar[[0, -2]])
    assert_printed(sampler.alpha_bar, [0.0208, 0.3346, 0.7851, 0.9999, 1.0], 4)
    turned = -torch.rad2deg(published().alpha.arccos())[:-1].diff()
    assert_printed(torch.stack([turned.min(), turned.max()]), [5.5, 10.9], 1)


@pytest.mark.parametrize("sampler", [published(), EqualAngles().bind(TABLE, 4)], ids=["10", "4"])
def test_transitions_are_the_posterior_of_the_chain_at_the_denoised_picture(sampler, generator):
    """q(x_{i-1} | x_i, x0_hat) by Bayes' rule from the forward chain: another parametrisation."""
    abar = sampler.alpha_bar
    for k in range(sampler.steps - 1):
        x, score = torch.randn(2, 3, *EVENT, dtype=torch.float64, generator=generator)
        x0 = (x + (1 - abar[k]) * score) / abar[k].sqrt()
        kept = abar[k] / abar[k + 1]  # x = sqrt(kept) x' + sqrt(1 - kept) noise
        precision = 1 / (1 - abar[k + 1]) + kept / (1 - kept)
        mean = (abar[k + 1].sqrt() * x0 / (1 - abar[k + 1]) + kept.sqrt() * x / (1 - kept)) / (
            precision
        )
        t0, t1 = sampler.grid.nodes[k], sampler.grid.nodes[k + 1]
        ours, std = sampler.transition(sampler.sde, t0, t1, x, score)
        torch.testing.assert_close(ours, mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(std, precision.rsqrt(), rtol=1e-10, atol=0)
    x, score = torch.randn(2, 3, *EVENT, dtype=torch.float64, generator=generator)
    last = torch.full((3,), sampler.steps - 1)
    denoised = sampler.denoised_at(sampler.steps - 1, x, score)
    torch.testing.assert_close(sampler.mean(last, x, score), denoised, rtol=1e-10, atol=1e-12)
    assert sampler.std.tolist()[-1] == 0.001


def test_it_is_ddim_with_eta_1_where_ddim_has_the_same_levels(generator):
    ddim = DDIM().bind(DDPMTable(TABLE.alphas_cumprod, final_is_one=True, steps_offset=0), 20)
    sampler = BoundFewSteps(ddim.table, ddim.alpha_bar[:-1])
    for name in ("state_gain", "gain", "step_sizes", "path_kl_gain"):
        ours, theirs = getattr(sampler, name), getattr(ddim, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=0)
    torch.testing.assert_close(sampler.std[:-1], ddim.std[:-1], rtol=1e-8, atol=0)
    torch.testing.assert_close(sampler.timesteps, ddim.timesteps.double(), rtol=0, atol=1e-6)
    a, b = torch.randn(2, 3, 20, *EVENT, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(sampler.path_kl(a, b), ddim.path_kl(a, b), rtol=1e-8, atol=0)
    assert sampler.kl_factor == 1


def test_the_end_law_of_gaussian_data_is_exact():
    """Moments under the exact score, by another formula for every step than the sampler's."""
    mean, variance = 0.3, 0.16
    sampler = published()
    ours = theirs = (torch.zeros(()).double(), torch.ones(()).double())
    eta = torch.tensor([1e-4 * (1 + 9.5 * i) ** 2 for i in range(9, -1, -1)], dtype=torch.float64)
    for k in range(10):
        # the sampler at two states gives its affine map
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        alpha, sigma = sampler.alpha[k], sampler.sigma[k]
        score = -(x - alpha * mean) / (alpha**2 * variance + sigma**2)
        at_0, at_1 = sampler.mean(torch.full((2,), k), x, score)[:, 0]
        m, v = ours
        ours = (at_0 + (at_1 - at_0) * m, (at_1 - at_0) ** 2 * v + sampler.std[k] ** 2)
        # x0 given x is Gaussian with this mean; the next state is the bridge between the two
        level, before = (1 - eta[k:]).prod(), (1 - eta[k + 1 :]).prod()
        kalman = level.sqrt() * variance / (level * variance + 1 - level)
        keep = (1 - eta[k]).sqrt() * (1 - before) / (1 - level)
        reach = before.sqrt() * eta[k] / (1 - level)
        gain = keep + reach * kalman
        shift = reach * (mean - kalman * level.sqrt() * mean)
        added = eta[k] * (1 - before) / (1 - level) if k < 9 else 1e-6
        m, v = theirs
        theirs = (gain * m + shift, gain**2 * v + added)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    # ten steps, a start without the data's mean: that is 0.4 % short, the deviation 23 %
    m, v = ours
    assert float(m) == pytest.approx(0.2990, abs=1e-4)
    assert float(v.sqrt()) == pytest.approx(0.307, abs=1e-3)  # of 0.4


def test_more_steps_start_at_the_tables_end_and_reach_the_law():
    end = float(TABLE.alphas_cumprod[-1])
    for steps, edge in [(9, True), (10, True), (20, True), (50, False)]:
        sampler = QuadraticVariances().bind(TABLE, steps)
        assert float(sampler.variances[-1]) == pytest.approx(1e-4)
        growth = (sampler.variances.flip(0) / 1e-4).sqrt().sub(1)[1:]
        torch.testing.assert_close(growth, growth[0] * torch.arange(1.0, steps).double())
        if edge:
            assert float(growth[0]) == pytest.approx(95 / steps)
        else:
            assert float(growth[0]) < 95 / steps
            assert float(sampler.alpha_bar[0]) == pytest.approx(end, rel=1e-6)
            assert float(sampler.timesteps[0]) == pytest.approx(999, abs=1e-3)


def test_the_bias_of_the_start_is_what_the_docstring_says():
    level = float(published().alpha_bar[0])
    unit = Normal(level**0.5, (1 - level) ** 0.5)  # a coordinate 1 of the data, noised
    nats = float(kl_divergence(unit, Normal(0.0, 1.0)))
    assert nats == pytest.approx(-0.5 * math.log(1 - level), rel=1e-6)
    assert f"{nats:.4f}" == "0.0105"
    assert round(3072 * nats) == 32
    assert f"{level**0.5:.3f}" == "0.144"


def test_transition_kl_and_log_ratio_are_those_of_the_gaussians(generator):
    sampler = published(learned_std=True)
    with torch.no_grad():
        sampler.log_std.add_(torch.randn(10, dtype=torch.float64, generator=generator), alpha=0.1)
    rows = torch.arange(10)
    x, new, old, z = torch.randn(4, 10, *EVENT, dtype=torch.float64, generator=generator)
    wide = (-1, *[1] * len(EVENT))

    def law(action, std):
        mean = sampler.mean(rows, x, action)
        return Independent(Normal(mean, std.view(wide).expand_as(mean)), len(EVENT))

    std, initial = sampler.std.detach(), published().std
    exact = kl_divergence(law(new, std), law(old, initial))
    torch.testing.assert_close(
        sampler.transition_kl(rows, new, old).detach(), exact, rtol=1e-9, atol=0
    )
    after = sampler.mean(rows, x, old) + std.view(wide) * z
    expected = law(new, std).log_prob(after) - law(old, std).log_prob(after)
    ratio = transition_log_ratio(rows_of_steps(sampler, rows, z, new, old)).detach()
    torch.testing.assert_close(ratio, expected, rtol=1e-9, atol=1e-9)
    paths = sampler.path_kl(new[None], old[None]).detach()
    means = published().path_kl(new[None], old[None])
    width = kl_divergence(Normal(0.0 * std, std), Normal(0.0 * std, initial))
    torch.testing.assert_close(paths - means, 30 * width[None], rtol=1e-7, atol=1e-7)


def test_learned_std_is_read_anew_and_carries_gradients(generator):
    fixed, sampler = published(), published(learned_std=True)
    assert fixed.parameters == []
    assert fixed.log_std is None
    assert [p is sampler.log_std for p in sampler.parameters] == [True]
    torch.testing.assert_close(sampler.log_std.detach(), fixed.std.log())
    torch.testing.assert_close(sampler.std.detach(), fixed.std)
    x, score = torch.randn(2, 1, *EVENT, dtype=torch.float64, generator=generator)
    t0, t1 = sampler.grid.nodes[:2]
    before = sampler.transition(sampler.sde, t0, t1, x, score)[1].detach().clone()
    sampler.std.log().sum().backward()
    expected = torch.tensor([1.0] * 9 + [0.0], dtype=torch.float64)  # the last is fixed
    torch.testing.assert_close(sampler.log_std.grad, expected)
    with torch.no_grad():
        sampler.log_std.add_(0.25)
    torch.testing.assert_close(sampler.std[:-1].detach(), fixed.std[:-1] * math.exp(0.25))
    assert sampler.std.tolist()[-1] == 0.001
    with torch.no_grad():
        after = sampler.transition(sampler.sde, t0, t1, x, score)[1]
    torch.testing.assert_close(after, before * math.exp(0.25))
    assert not after.requires_grad
    torch.testing.assert_close(sampler.initial_std, fixed.std)


def test_samplers_without_parameters_say_so():
    assert DDIM().bind(TABLE, 5).parameters == []
    assert DDIM().bind(FlowTable(), 5).parameters == []
    assert Scheduler("DPMSolverMultistepScheduler").bind(TABLE, 5).parameters == []


def test_names():
    assert QuadraticVariances().label == "DxMI"
    assert QuadraticVariances(learned_std=True).label == "DxMI learned std"
    assert EqualAngles().label == "equal angles"
    assert (QuadraticVariances().usual_steps, EqualAngles().usual_steps) == (10, 4)


SD15 = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: QuadraticVariances().bind(TABLE, 4), ValueError, "0.343.*EqualAngles"),
        (lambda: QuadraticVariances().bind(TABLE, 1), ValueError, "steps must be.*got 1"),
        (lambda: EqualAngles().bind(TABLE, True), ValueError, "steps must be.*got True"),
        (lambda: EqualAngles().bind(FlowTable(), 4), TypeError, "EqualAngles.*FlowTable"),
        (
            lambda: QuadraticVariances().bind(DDPMTable((1 - SD15).cumprod(0)), 10),
            ValueError,
            "0.9999 is not between.*0.99915.*use DDIM",
        ),
        (
            lambda: EqualAngles().bind(DDPMTable(TABLE.alphas_cumprod[:500]), 4),
            ValueError,
            "0.0208098 is not between.*0.0785872",
        ),
        (
            lambda: BoundFewSteps(TABLE, torch.tensor([0.02, 0.5, 0.4])),
            ValueError,
            "levels must increase strictly",
        ),
        (
            lambda: BoundFewSteps(TABLE, torch.tensor([0.02, math.nan])),
            ValueError,
            "levels must increase strictly",
        ),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
