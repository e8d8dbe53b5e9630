import math
import types

import jaxtyping
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler

from diffusion_envs.noise_schedules import (
    VE,
    Cosine,
    DDPMTable,
    RectifiedFlow,
    Schedule,
    VPLinear,
)

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TABLE = DDPMTable.from_diffusers(
    DDIMScheduler(**SD15, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
)
SCHEDULES = {
    "linear": VPLinear(0.1, 20.0),
    "constant": VPLinear(2.0, 2.0, horizon=1.3),
    "cosine": Cosine(),
    "exploding": VE(0.05, 7.0),
    "flow": RectifiedFlow(),
    "table": TABLE,
}
# inside a timestep of the table, where beta is constant, and away from the ends
TIMES = torch.tensor([0.0614, 0.2173, 0.5237, 0.7861], dtype=torch.float64)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def derivative(function, s):
    s = s.clone().requires_grad_()
    return torch.autograd.grad(function(s).sum(), s)[0]


@each_schedule
def test_the_drift_is_that_of_the_signal(schedule):
    expected = derivative(lambda s: schedule.alpha(s).log() + 0 * s, TIMES)
    torch.testing.assert_close(schedule.drift_coefficient(TIMES), expected, rtol=1e-10, atol=1e-12)


@each_schedule
def test_signal_and_noise_obey_the_moment_equation_of_the_sde(schedule):
    growth = derivative(lambda s: schedule.sigma(s).square(), TIMES)
    expected = growth - 2 * schedule.drift_coefficient(TIMES) * schedule.sigma(TIMES).square()
    torch.testing.assert_close(schedule.g2(TIMES), expected, rtol=1e-10, atol=1e-12)


@each_schedule
def test_integrated_g2_is_the_integral_of_g2(schedule):
    low, high = 0.0614, 0.7861
    # split at the table's nodes, so that Gauss-Legendre sees smooth pieces; round-off sums to 1e-12
    cuts = np.unique(np.concatenate([[low, high], np.arange(62, 787) / 1000]))
    x, w = np.polynomial.legendre.leggauss(4)
    middle, half = (cuts[1:] + cuts[:-1]) / 2, (cuts[1:] - cuts[:-1]) / 2
    nodes = torch.from_numpy(middle[:, None] + half[:, None] * x)
    quadrature = (schedule.g2(nodes) * torch.from_numpy(half[:, None] * w)).sum()
    ends = torch.tensor([low, high], dtype=torch.float64)
    exact = schedule.integrated_g2(*ends)
    torch.testing.assert_close(exact, quadrature, rtol=1e-10, atol=0)
    torch.testing.assert_close(schedule.integrated_g2(*ends.flip(0)), -exact)


@each_schedule
def test_log_snr_and_the_data_end(schedule):
    alpha, sigma = schedule.alpha(TIMES), schedule.sigma(TIMES)
    torch.testing.assert_close(
        schedule.log_snr(TIMES), 2 * (alpha / sigma).log(), rtol=1e-10, atol=1e-12
    )
    zero = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(zero), zero + 1, rtol=0, atol=1e-15)
    torch.testing.assert_close(schedule.sigma(zero), zero, rtol=0, atol=1e-15)
    assert isinstance(schedule, Schedule)


def test_schedules_are_their_sources_formulas():
    s = TIMES
    angle = torch.cos((s + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    torch.testing.assert_close(Cosine().alpha(s), angle)
    brownian = 0.05**2 * ((7 / 0.05) ** (2 * s) - 1)
    torch.testing.assert_close(VE(0.05, 7.0).sigma(s).square(), brownian)
    torch.testing.assert_close(RectifiedFlow().sigma(s), s)
    torch.testing.assert_close(RectifiedFlow().alpha(s), 1 - s)
    torch.testing.assert_close(
        VPLinear(0.1, 20.0).alpha(torch.ones(1).double()),
        torch.tensor([math.exp(-20.1 / 4)]).double(),
    )


def test_the_table_is_met_at_its_timesteps_and_log_linear_between():
    timesteps = torch.arange(1000)
    s = (timesteps.double() + 1) / 1000
    # interpolation weights carry round-off of 1000 eps, and B reaches 5.4
    torch.testing.assert_close(TABLE.alpha(s).square(), TABLE.alphas_cumprod, rtol=1e-12, atol=0)
    between = TABLE.alpha(s[:-1] + 0.3 / 1000).square().log()
    low, high = TABLE.alphas_cumprod.log()[:-1], TABLE.alphas_cumprod.log()[1:]
    torch.testing.assert_close(between, 0.7 * low + 0.3 * high, rtol=1e-11, atol=1e-13)


def test_the_tables_beta_is_the_models_and_points_towards_data_at_nodes():
    betas = -torch.log1p(-DDIMScheduler(**SD15).betas.double())
    at_nodes = torch.arange(1, 1001).double() / 1000
    # betas come in float32, alphas_cumprod is their running float32 product
    torch.testing.assert_close(TABLE.g2(at_nodes) / 1000, betas, rtol=2e-3, atol=0)
    torch.testing.assert_close(TABLE.g2(at_nodes), TABLE.g2(at_nodes - 0.5 / 1000))
    in_float32 = TABLE.g2(at_nodes.float())
    torch.testing.assert_close(in_float32.double(), TABLE.g2(at_nodes), rtol=1e-6, atol=0)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_are_those_of_diffusers_at_every_step_count(spacing, offset):
    scheduler = DDIMScheduler(
        **SD15, clip_sample=False, timestep_spacing=spacing, steps_offset=offset
    )
    table = DDPMTable.from_diffusers(scheduler)
    for steps in [*range(1, 130), 250, 333, 500, 501, 999, 1000]:
        scheduler.set_timesteps(steps)
        theirs = tuple(scheduler.timesteps.tolist()[:steps])  # its arange may add a timestep -1
        if theirs[0] > 999:  # diffusers fails later, when it looks the timestep up
            with pytest.raises(ValueError, match="beyond the table's last, 999"):
                table.timesteps(steps)
        else:
            assert table.timesteps(steps) == theirs


def test_the_end_of_sampling_is_the_schedulers():
    assert not TABLE.final_is_one
    assert TABLE.last_noising_time(50) == 1 / 1000
    to_one = DDPMTable(TABLE.alphas_cumprod, final_is_one=True)
    assert to_one.last_noising_time(50) == 0
    assert to_one.last_noising_time(600) == 1 / 1000  # timestep 1 leads to timestep 0, not beyond


def test_any_scheduler_with_a_table_will_do():
    stable_diffusion = PNDMScheduler(**SD15, set_alpha_to_one=False, steps_offset=1)
    table = DDPMTable.from_diffusers(stable_diffusion)
    assert (table.spacing, table.steps_offset, table.final_is_one) == ("leading", 1, False)
    torch.testing.assert_close(table.alphas_cumprod, TABLE.alphas_cumprod)
    assert DDPMTable.from_diffusers(DDPMScheduler(**SD15, clip_sample=False)).final_is_one
    euler = EulerDiscreteScheduler(**SD15, timestep_spacing="linspace")
    assert DDPMTable.from_diffusers(euler).spacing == "leading"


def test_what_is_no_schedule_is_refused_by_name():
    for build, message in [
        (lambda: VPLinear(-1.0), "beta_start must be a positive finite number, got -1.0"),
        (lambda: VPLinear(horizon=math.nan), "horizon must be a positive"),
        (lambda: Cosine(horizon=1.0), "horizon must be below 1"),
        (lambda: RectifiedFlow(horizon=1.0), "horizon must be below 1"),
        (lambda: VE(2.0, 1.0), "high must be finite and above low = 2.0, got 1.0"),
        (lambda: DDPMTable(torch.tensor([0.9, 0.95])), "must decrease strictly"),
        (lambda: DDPMTable(torch.tensor([0.9, 0.0])), "rescale_betas_zero_snr"),
        (lambda: DDPMTable(torch.tensor([0.9, math.nan])), "must decrease strictly"),
        (lambda: DDPMTable(torch.tensor([0.9])), "at least 2"),
        (lambda: DDPMTable(torch.tensor([0.9, 0.8]), spacing="linspace"), "spacing must be"),
        (lambda: DDPMTable(torch.tensor([0.9, 0.8]), steps_offset=-1), "steps_offset must be"),
        (lambda: DDPMTable.from_diffusers(DDIMScheduler(**SD15)), '"clip_sample": false'),
        (lambda: DDPMTable.from_diffusers(object()), "object has no table of alphas_cumprod"),
        (lambda: TABLE.timesteps(0), "steps must be an integer from 1 to 1000, got 0"),
        (lambda: TABLE.timesteps(True), "got True"),
        (lambda: TABLE.timesteps(1001), "got 1001"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(TypeError, match="steps_offset must be an int, got True"):
        DDPMTable(torch.tensor([0.9, 0.8]), steps_offset=True)


def test_schedules_begin_with_their_sources_numbers():
    assert VPLinear() == VPLinear(beta_start=0.1, beta_end=20.0, horizon=1.0)
    assert Cosine() == Cosine(offset=0.008, horizon=0.999)
    assert VE() == VE(low=0.01, high=50.0, horizon=1.0)
    assert RectifiedFlow() == RectifiedFlow(horizon=0.999)
    table = DDPMTable(torch.tensor([0.9, 0.8]))
    assert (table.final_is_one, table.steps_offset, table.spacing) == (False, 1, "leading")
    assert table.horizon == 1
    with pytest.raises(TypeError):
        DDPMTable(torch.tensor([0.9, 0.8]), horizon=2.0)  # a table's time is its own


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_no_setting_of_a_schedule_is_zero_or_infinite(bad):
    for kind, name in (
        (VPLinear, "beta_start"), (VPLinear, "beta_end"), (VPLinear, "horizon"),
        (Cosine, "offset"), (Cosine, "horizon"), (VE, "low"), (VE, "horizon"),
        (RectifiedFlow, "horizon"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must be a positive finite number"):
            kind(**{name: bad})
    for high in (bad, 0.01):
        with pytest.raises(ValueError, match="high must be finite and above low"):
            VE(low=0.01, high=high)


def test_a_longer_horizon_stretches_the_slope_of_beta():
    s = torch.tensor([0.0, 1.3, 2.6], dtype=torch.float64)
    beta = VPLinear(0.2, 3.0, horizon=2.6).g2(s)
    torch.testing.assert_close(beta, torch.tensor([0.2, 1.6, 3.0]).double())


@pytest.mark.parametrize(
    "table",
    [
        torch.tensor([[0.9, 0.8]]), torch.tensor([0.9, 0.9]), torch.tensor([1.0, 0.9]),
        torch.tensor([0.9, 0.8, 0.0]), torch.tensor([0.9, 0.95, 0.3]),
    ],
    ids=str,
)  # fmt: skip
def test_tables_that_do_not_fall_within_the_unit_interval_are_refused(table, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    with pytest.raises(ValueError, match="alphas_cumprod must"):
        DDPMTable(table)


def test_a_scheduler_that_says_little_is_read_as_diffusers_would():
    table = torch.linspace(0.99, 0.1, 10, requires_grad=True)
    bare = types.SimpleNamespace(alphas_cumprod=table, config={})
    found = DDPMTable.from_diffusers(bare)
    assert (found.final_is_one, found.steps_offset, found.spacing) == (True, 0, "leading")
    assert found.alphas_cumprod.dtype == torch.float64
    assert not found.alphas_cumprod.requires_grad
    trailing = types.SimpleNamespace(
        alphas_cumprod=table, config={"timestep_spacing": "trailing", "clip_sample": False}
    )
    assert DDPMTable.from_diffusers(trailing).spacing == "trailing"
    for option in ("clip_sample", "thresholding"):
        clipping = types.SimpleNamespace(alphas_cumprod=table, config={option: True})
        with pytest.raises(ValueError, match=f"{option} is true"):
            DDPMTable.from_diffusers(clipping)


def test_a_sampler_ends_one_stride_below_its_last_timestep():
    """As far as "leading" spacing leaves an entry there, else at the end of the table."""
    table = torch.linspace(0.99, 0.1, 10, dtype=torch.float64)
    for offset, steps, end in ((0, 10, 0.0), (1, 6, 0.1), (2, 6, 0.2), (3, 3, 0.1), (2, 3, 0.0)):
        leading = DDPMTable(table, final_is_one=True, steps_offset=offset)
        assert leading.last_noising_time(steps) == pytest.approx(end)
        trailing = DDPMTable(table, final_is_one=False, steps_offset=offset, spacing="trailing")
        assert trailing.last_noising_time(steps) == pytest.approx(0.1)


def test_tables_answer_in_the_precision_of_the_times():
    s = torch.tensor([0.05, 0.0, 1.0], dtype=torch.float32)
    assert TABLE.g2(s).dtype == TABLE.alpha(s).dtype == TABLE.sigma(s).dtype == torch.float32
    torch.testing.assert_close(
        TABLE.g2(s[1:2]), TABLE.g2(torch.tensor([0.0005]))
    )  # the first piece
    torch.testing.assert_close(TABLE.g2(torch.tensor([1.1])), TABLE.g2(s[2:]))  # and the last
