import copy
import math
import types

import diffusers
import jaxtyping
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch.distributions import Independent, Normal, kl_divergence

import ctrl
from diffusion_envs.denoising import generation_sde, path_kl_per_step
from diffusion_envs.noise_schedules import DDPMTable, FlowTable, VPLinear
from diffusion_envs.objectives.path_steps import transition_log_ratio
from diffusion_envs.samplers import DDIM, BlackBox, Scheduler
from verification.problems.losses import rows_of_steps

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EVENT = (4, 3, 5)  # an image, no two sides alike


def scheduler(dtype=torch.float64, **settings):
    made = DDIMScheduler(
        **SD15, clip_sample=False, **{"set_alpha_to_one": False, "steps_offset": 1} | settings
    )
    made.alphas_cumprod = made.alphas_cumprod.to(dtype)
    made.final_alpha_cumprod = made.final_alpha_cumprod.to(dtype)
    return made


TABLE = DDPMTable.from_diffusers(scheduler())


def normals(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=generator)


def bernoulli_steps(generator, sampler, rows):
    return torch.randint(len(sampler.std), (rows,), generator=generator)


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 7), ("leading", 600), ("trailing", 50)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_step_is_diffusers(to_one, spacing, steps, eta, generator):
    theirs = scheduler(set_alpha_to_one=to_one, timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    sampler = DDIM(eta).bind(DDPMTable.from_diffusers(theirs), steps)
    assert torch.equal(sampler.timesteps, theirs.timesteps)
    for k, timestep in enumerate(theirs.timesteps.tolist()):
        x, epsilon, z = normals(generator, 3, 2, *EVENT)
        expected = theirs.step(epsilon, timestep, x, eta=eta, variance_noise=z).prev_sample
        t0, t1 = sampler.grid.nodes[k], sampler.grid.nodes[k + 1]
        score = -epsilon / sampler.sigma[k]
        mean, std = sampler.transition(sampler.sde, t0, t1, x, score)
        # round-off of x / alpha, which reaches 15 at the noise end: some 100 eps
        torch.testing.assert_close(mean + std * z, expected, rtol=1e-12, atol=1e-12)
        moved = sampler.step(sampler.sde, t0, t1, x, score, z * (t1 - t0).sqrt())
        torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)


def test_single_precision_agrees_to_its_rounding(generator):
    theirs = scheduler(torch.float32)
    theirs.set_timesteps(20)
    sampler = DDIM(1.0).bind(DDPMTable.from_diffusers(theirs), 20)
    for k, timestep in enumerate(theirs.timesteps.tolist()):
        x, epsilon, z = normals(generator, 3, 2, *EVENT, dtype=torch.float32)
        expected = theirs.step(epsilon, timestep, x, eta=1.0, variance_noise=z).prev_sample
        node = sampler.grid.nodes[k].to(torch.float32)
        mean, std = sampler.transition(
            sampler.sde, node, sampler.grid.nodes[k + 1], x, -epsilon / sampler.sigma[k].float()
        )
        assert mean.dtype == torch.float32
        # they subtract terms of up to 15 x in float32, whose eps is 6e-8
        torch.testing.assert_close(mean + std * z, expected, rtol=1e-5, atol=2e-5)


def test_where_trailing_steps_of_diffusers_do_not_meet_ours_do():
    table = DDPMTable(TABLE.alphas_cumprod, spacing="trailing")
    sampler = DDIM().bind(table, 7)
    torch.testing.assert_close(
        sampler.alpha_bar[:-1], TABLE.alphas_cumprod[sampler.timesteps], rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        sampler.state_gain, (sampler.alpha_bar[1:] / sampler.alpha_bar[:-1]).sqrt()
    )


def test_tables_of_a_sampler_are_those_of_its_schedule():
    sampler = DDIM(1.0).bind(TABLE, 25)
    timesteps = sampler.timesteps
    abar = torch.cat([TABLE.alphas_cumprod[timesteps], TABLE.alphas_cumprod[:1]])
    exact = {"rtol": 1e-11, "atol": 1e-14}
    torch.testing.assert_close(sampler.alpha_bar, abar, **exact)
    torch.testing.assert_close(sampler.integrated_g2, (abar[1:] / abar[:-1]).log(), **exact)
    torch.testing.assert_close(sampler.sigma.square() + sampler.alpha.square(), 0 * abar + 1)
    torch.testing.assert_close(sampler.grid.steps, -sampler.noising_times.diff())
    torch.testing.assert_close(sampler.noising_times[:-1], (timesteps + 1.0).double() / 1000)
    assert isinstance(sampler, ctrl.TransitionSolver)


def test_simulate_drives_the_chain(generator):
    sampler = DDIM(0.7).bind(TABLE, 6)
    start, z = normals(generator, 3, *EVENT), normals(generator, 3, 6, *EVENT)
    widths = sampler.grid.steps.sqrt().view(1, -1, 1, 1, 1)
    paths = ctrl.simulate(
        ctrl.ControlProblem(sampler.sde, horizon=1.0),
        ctrl.DeterministicPolicy(lambda t, x: -1.2 * x + t),
        start,
        sampler.grid,
        solver=sampler,
        noise=ctrl.Noise(increments=z * widths),
    )
    x = start
    for k in range(6):
        score = -1.2 * x + sampler.grid.nodes[k]
        step = torch.full((3,), k)
        x = sampler.mean(step, x, score) + sampler.std[k] * z[:, k]
        torch.testing.assert_close(paths.states[:, k + 1], x)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_rows_of_mixed_steps_have_the_densities_of_their_transitions(eta, generator):
    sampler = DDIM(eta).bind(TABLE, 10)
    step = bernoulli_steps(generator, sampler, 16)
    x, new, old, z = normals(generator, 4, 16, *EVENT)
    new = old + 0.1 * new

    def law(score):
        std = sampler.std[step].view(-1, 1, 1, 1).expand_as(x)
        return Independent(Normal(sampler.mean(step, x, score), std), 3)

    after = law(old).mean + sampler.std[step].view(-1, 1, 1, 1) * z
    # log-densities of 60 coordinates near 1e3 cancel: 1e3 * 60 * eps * 1 / std
    expected = law(new).log_prob(after) - law(old).log_prob(after)
    found = transition_log_ratio(rows_of_steps(sampler, step, z, new, old))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        sampler.transition_kl(step, new, old), kl_divergence(law(new), law(old)), rtol=1e-9, atol=0
    )


def test_the_gradient_of_the_log_ratio_is_that_of_the_transition(generator):
    """The score function of view B, by the chain rule through the mean."""
    sampler = DDIM(1.0).bind(TABLE, 10)
    step = bernoulli_steps(generator, sampler, 8)
    old, z = normals(generator, 2, 8, 3)
    score = old.clone().requires_grad_()
    ratio = transition_log_ratio(rows_of_steps(sampler, step, z, score, old))
    found = torch.autograd.grad(ratio.sum(), score)[0]
    torch.testing.assert_close(found, (sampler.score_gain / sampler.std)[step][:, None] * z)


def test_the_chains_kl_nears_the_path_kl_away_from_the_data_end(generator):
    """Transition over path KL of a step tends to 1 where a step is short beside the noise left."""
    score, reference = normals(generator, 2, 4, 1, 3)
    gaps = []
    for steps in (100, 200, 400):
        sampler = DDIM(1.0).bind(TABLE, steps)
        k = steps // 2
        chain = sampler.transition_kl(torch.full((4,), k), score[:, 0], reference[:, 0])
        path = path_kl_per_step(score, reference, sampler.integrated_g2[k : k + 1])[:, 0]
        gaps.append((chain / path - 1).abs().max().item())
    # first order; the middle step's timestep moves a little with the count, hence 20 %
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.2)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.2)


def test_a_sampler_without_density_says_what_to_do(generator):
    x = normals(generator, 2, 3)
    step = torch.tensor([0, 9])
    for sampler, remedy in [
        (DDIM(0.0).bind(TABLE, 10), "use eta > 0"),
        (
            DDIM(1.0).bind(DDPMTable(TABLE.alphas_cumprod, final_is_one=True), 10),
            '"set_alpha_to_one": false',
        ),
    ]:
        assert not sampler.has_density
        assert torch.isfinite(sampler.mean(step, x, x)).all()  # sampling goes on
        with pytest.raises(ValueError, match=remedy):
            sampler.transition_kl(step, x, x)
    assert DDIM(1.0).bind(TABLE, 10).has_density
    assert DDIM(0.1).has_density
    assert not DDIM(0.0).has_density
    with pytest.raises(ValueError, match="eta must be positive for a path KL"):
        DDIM(0.0).bind(TABLE, 10).kl_factor  # noqa: B018  # reading it is the test


def test_bad_input_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    for eta in (-0.1, 1.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"eta must be in \[0, 1\]"):
            DDIM(eta)
    for eta in ("1", None, True):
        with pytest.raises(TypeError, match="eta must be a number"):
            DDIM(eta)
    for steps in (0, -1, 2.0, True, 1001):
        with pytest.raises(ValueError, match="steps must be an integer from 1 to 1000"):
            DDIM().bind(TABLE, steps)
    with pytest.raises(ValueError, match="last step does not move"):
        DDIM().bind(DDPMTable(TABLE.alphas_cumprod, steps_offset=0), 10)
    sampler, x = DDIM().bind(TABLE, 10), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"time 0.5 begins no step"):
        sampler.transition(sampler.sde, torch.tensor(0.5), torch.tensor(0.6), x, x)
    with pytest.raises(ValueError, match="time nan begins no step"):
        sampler.transition(sampler.sde, torch.tensor(math.nan), torch.tensor(0.6), x, x)
    with pytest.raises(ValueError, match=r"score of the states' shape \[2, 3\], got \[2, 1\]"):
        sampler.transition(sampler.sde, *sampler.grid.nodes[:2], x, x[:, :1])


# -- black boxes ----------------------------------------------------------------------------------

MEAN, DEVIATION = 0.8, 0.6  # of one-dimensional Gaussian data


def epsilon_of_gaussian_data(table):
    """(states, timestep) -> the exact noise prediction; timesteps may be fractional."""

    def predict(states, timestep):
        s = (torch.as_tensor(timestep).to(states) + 1) / len(table.alphas_cumprod)
        alpha, sigma = table.alpha(s), table.sigma(s)
        return sigma * (states - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)

    return predict


def flow(table, start):
    """The probability flow from the last timestep to (nearly) data, in closed form."""
    noisy = table.alpha(torch.ones(()).double())
    spread = (noisy**2 * DEVIATION**2 + 1 - noisy**2).sqrt()
    return MEAN + DEVIATION / spread * (start - noisy * MEAN)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        (DDIMScheduler, 200),  # first order
        (EulerDiscreteScheduler, 200),  # first order
        (DPMSolverMultistepScheduler, 50),
        (UniPCMultistepScheduler, 50),
        (HeunDiscreteScheduler, 200),  # its last step is one of Euler
    ],
)
def test_any_scheduler_follows_the_probability_flow(kind, steps):
    settings = {"clip_sample": False} if kind is DDIMScheduler else {}
    theirs = kind(**SD15, **settings, timestep_spacing="trailing")
    start = torch.linspace(-2, 2, 9)[:, None]
    sample = BlackBox(theirs, steps).sample(epsilon_of_gaussian_data(TABLE), start)
    expected = flow(TABLE, start.double()).float()
    assert (sample - expected).abs().max() < 0.03  # a wrong scale or shifted timesteps cost 0.1


def test_a_black_box_ddim_is_the_bound_one(generator):
    theirs = scheduler()
    before = copy.deepcopy(vars(theirs))
    start = normals(generator, 5, 2)
    predict = epsilon_of_gaussian_data(TABLE)
    found = BlackBox(theirs, 12).sample(predict, start)
    sampler = DDIM(0.0).bind(TABLE, 12)
    x = start
    for k, timestep in enumerate(sampler.timesteps):
        score = -predict(x, timestep) / sampler.sigma[k]
        x = sampler.mean(torch.full((5,), k), x, score)
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)
    assert vars(theirs).keys() == before.keys()
    assert theirs.num_inference_steps is None  # the caller's scheduler is left alone


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_a_random_scheduler_needs_a_generator_and_repeats_with_it():
    box = BlackBox(EulerAncestralDiscreteScheduler(**SD15), 5)
    predict, start = epsilon_of_gaussian_data(TABLE), torch.ones(3, 2)
    with pytest.raises(ValueError, match="EulerAncestralDiscreteScheduler draws noise"):
        box.sample(predict, start)
    once, again = (box.sample(predict, start, torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(once, again, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_a_black_box_says_that_it_has_no_density(monkeypatch):
    box = BlackBox(DPMSolverMultistepScheduler(**SD15), 5)
    assert not box.has_density
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    for steps in (0, 1.5, True):
        with pytest.raises(ValueError, match="steps must be an integer of at least 1"):
            BlackBox(DPMSolverMultistepScheduler(**SD15), steps)
    with pytest.raises(TypeError, match="scheduler must be a diffusers scheduler, got VPLinear"):
        BlackBox(VPLinear(), 5)


# --- schedulers by name, and what a bound sampler keeps


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_scheduler_by_name_is_that_class_on_the_models_table(name):
    start = torch.linspace(-2, 2, 6).view(3, 2)
    predict = epsilon_of_gaussian_data(TABLE)

    def streams():
        return [torch.Generator().manual_seed(k) for k in range(3)]

    bound = Scheduler(name).bind(TABLE, 8)
    theirs = getattr(diffusers, name)(**SD15, timestep_spacing="trailing")
    expected = BlackBox(theirs, 8).sample(predict, start, streams())
    # the table's noise levels are theirs but for float32
    torch.testing.assert_close(
        bound.sample(predict, start, streams()), expected, rtol=2e-3, atol=2e-3
    )
    assert (bound.table, bound.steps) == (TABLE, 8)
    assert not bound.has_density
    assert not Scheduler(name).has_density


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_a_schedulers_options_replace_trailing_steps():
    options = {
        "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False,
        "clip_sample": False,
    }  # fmt: skip
    predict, start = epsilon_of_gaussian_data(TABLE), torch.linspace(-2, 2, 5)[:, None]
    found = Scheduler("DDIMScheduler", tuple(options.items())).bind(TABLE, 12)
    expected = BlackBox(scheduler(torch.float32), 12).sample(predict, start)
    torch.testing.assert_close(found.sample(predict, start), expected, rtol=1e-4, atol=1e-4)


def test_a_scheduler_on_a_flow_is_refused_by_name():
    with pytest.raises(TypeError, match=r"Scheduler\('DDIMScheduler'\) needs .* use DDIM, FlowSDE"):
        Scheduler("DDIMScheduler").bind(FlowTable(), 12)


def test_a_name_that_is_none_of_diffusers_is_refused():
    with pytest.raises(ValueError, match="name must be a scheduler of diffusers"):
        Scheduler("Euler")


def test_whatever_a_scheduler_remembers_is_its_callers():
    class Remembering:
        init_noise_sigma, timesteps, config = 1.0, (2, 1), {}

        def __init__(self):
            self.seen = []

        def set_timesteps(self, steps, device):
            self.seen.append(steps)

        def scale_model_input(self, states, timestep):
            return states

        def step(self, prediction, timestep, states):
            self.seen.append(timestep)
            return types.SimpleNamespace(prev_sample=states + prediction)

    theirs = Remembering()
    found = BlackBox(theirs, 1).sample(lambda x, t: t * torch.ones_like(x), torch.zeros(2, 1))
    assert found.tolist() == [[3.0], [3.0]]
    assert theirs.seen == []


def test_a_bound_sampler_knows_its_equation_and_its_nodes():
    sampler = DDIM(0.4).bind(TABLE, 12)
    expected = generation_sde(TABLE, 0.4)
    t, x = sampler.grid.nodes[3], torch.ones(2, 3, dtype=torch.float64)
    torch.testing.assert_close(sampler.sde.drift(t, x, 2 * x), expected.drift(t, x, 2 * x))
    torch.testing.assert_close(sampler.sde.diffusion(t, x), expected.diffusion(t, x))
    near, far = t + 0.2 / 1000, t + 0.3 / 1000
    sampler.transition(sampler.sde, near, sampler.grid.nodes[4], x, x)
    with pytest.raises(ValueError, match="begins no step of this sampler"):
        sampler.transition(sampler.sde, far, sampler.grid.nodes[4], x, x)


def test_a_bound_sampler_keeps_the_precision_of_the_states():
    sampler = DDIM(0.4).bind(TABLE, 12)
    x, k = torch.ones(2, 3), torch.tensor([3, 5])
    assert sampler.mean(k, x, x).dtype == torch.float32
    nodes = sampler.grid.nodes
    for each in sampler.transition(sampler.sde, nodes[3], nodes[4], x, x):
        assert each.dtype == torch.float32


@pytest.mark.parametrize("word", ["Ancestral", "SDE", "DDPM", "LCM", "TCD", "sde", ""])
def test_schedulers_that_draw_noise_are_known_by_name_or_setting(word):
    config = {"algorithm_type": "sde-dpmsolver++" if word == "sde" else "dpmsolver++"}
    fields = {
        "config": config if word else {},
        "init_noise_sigma": 1.0,
        "timesteps": (),
        "set_timesteps": lambda self, steps, device: None,
        "step": lambda self, prediction, timestep, states: states,
    }
    name = "Some" + word.removeprefix("sde") + "Scheduler"
    box = BlackBox(type(name, (), fields)(), 1)
    start = torch.ones(2, 1)
    if word:
        with pytest.raises(ValueError, match=f"{name} draws noise"):
            box.sample(epsilon_of_gaussian_data(TABLE), start)
    assert torch.equal(box.sample(epsilon_of_gaussian_data(TABLE), start, torch.Generator()), start)


def test_a_scheduler_fits_a_table_of_any_length_to_its_last_entry():
    short = DDPMTable(torch.linspace(0.98, 0.05, 12, dtype=torch.float64))
    options = (("clip_sample", False), ("set_alpha_to_one", False))
    sampler = Scheduler("DDIMScheduler", options)
    assert sampler.label == "DDIM (clip_sample=False, set_alpha_to_one=False)"
    bound = sampler.bind(short, 12)
    assert bound.scheduler.config.num_train_timesteps == 12
    found = bound.scheduler.alphas_cumprod.double()
    torch.testing.assert_close(found, short.alphas_cumprod, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="steps must be at most the table's 12 entries, got 13"):
        sampler.bind(short, 13)
