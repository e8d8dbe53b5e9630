"""Gaussian steps on a rectified flow against published code, closed forms and training."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import ctrl
from diffusion_envs import objectives
from diffusion_envs.denoising import kl_factor
from diffusion_envs.exact import GaussianProblem, gaussian, table
from diffusion_envs.exact.problems import MixtureProblem
from diffusion_envs.models.protocol import Denoiser, Model
from diffusion_envs.noise_schedules import FlowTable, NoiseSchedule
from diffusion_envs.objectives.path_steps import transition_log_ratio
from diffusion_envs.samplers import CPS, DDIM, BoundFlowDDIM, FlowSDE, GaussianSteps
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from verification.problems.losses import rows_of_steps
from verification.problems.training_loop import Process

FLOW = FlowTable(shift=1.7, end=0.03)
TO_DATA = FlowTable(shift=2.2)
SAMPLERS = {
    "flow-sde": FlowSDE(0.9).bind(FLOW, 5),
    "flow-sde to data": FlowSDE(0.7).bind(TO_DATA, 4),
    "ddim": DDIM(1.0).bind(FLOW, 5),
    "ddim half": DDIM(0.6).bind(FLOW, 6),
    "cps": CPS(0.4).bind(FLOW, 5),
}
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
close = torch.testing.assert_close


def normals(generator, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def flow_grpo_step(s, u, second, x, velocity, a):
    """Mean and standard deviation of flow_grpo's sde_step_with_logprob, sde_type "sde"."""
    dt = u - s
    noise = a * math.sqrt(s / (1 - (second if s == 1 else s)))
    mean = x * (1 + noise**2 / (2 * s) * dt)
    mean = mean + velocity * (1 + noise**2 * (1 - s) / (2 * s)) * dt
    return mean, noise * math.sqrt(-dt)


def cps_step(s, u, second, x, velocity, a):
    """The same with sde_type "cps"."""
    std = u * math.sin(a * math.pi / 2)
    data, noise = x - s * velocity, x + velocity * (1 - s)
    return data * (1 - u) + noise * math.sqrt(u**2 - std**2), std


@pytest.mark.parametrize("flow", [FLOW, TO_DATA], ids=["noisy end", "clean end"])
@pytest.mark.parametrize(("kind", "theirs"), [(FlowSDE, flow_grpo_step), (CPS, cps_step)])
def test_every_step_is_that_of_the_published_code(flow, kind, theirs, generator):
    sampler = kind(0.63).bind(flow, 4)
    nodes = sampler.noising_times.tolist()
    assert nodes[0] == 1
    assert nodes[-1] == pytest.approx(flow.end, abs=1e-15)
    for k in range(4):
        x, velocity = normals(generator, 2, 3, 2)
        mean, std = theirs(nodes[k], nodes[k + 1], nodes[1], x, velocity, 0.63)
        which = torch.full((3,), k)
        close(sampler.mean(which, x, x - nodes[k] * velocity), mean, rtol=1e-12, atol=1e-12)
        assert float(sampler.std[k]) == pytest.approx(std, rel=1e-12, abs=1e-15)
    close(sampler.timesteps.double(), 1000 * sampler.noising_times[:-1], rtol=1e-6, atol=0)


@each_sampler
def test_densities_are_those_of_torch(sampler, generator):
    step = torch.tensor([0, 3, 1, 0, 2])
    x, z, new, old = normals(generator, 4, 5, 3)

    def law(action):
        wide = sampler.std[step][:, None].expand_as(x)
        return Independent(Normal(sampler.mean(step, x, action), wide), 1)

    after = law(old).mean + sampler.std[step][:, None] * z
    ratio = law(new).log_prob(after) - law(old).log_prob(after)
    close(transition_log_ratio(rows_of_steps(sampler, step, z, new, old)), ratio)
    close(sampler.transition_kl(step, new, old), kl_divergence(law(new), law(old)))


@each_sampler
def test_everything_is_finite_where_no_signal_is_left(sampler):
    assert sampler.alpha[0] == 0
    assert sampler.action == "denoised"
    tables = ("state_gain", "gain", "std", "step_sizes", "path_kl_gain", "kl_factor")
    for name in tables:
        assert bool(torch.isfinite(getattr(sampler, name)).all()), name
        assert getattr(sampler, name).shape == (sampler.steps,)
    assert bool((sampler.step_sizes > 0).all())
    end = float(sampler.noising_times[-1])
    total = math.atan2(1 - end, end)
    assert float(sampler.step_sizes.sum()) == pytest.approx(total, rel=1e-12)


def test_the_path_kl_is_half_the_increase_of_the_snr(generator):
    """Against the integral of g^2 |change of the score|^2 by quadrature, x0_hat held."""
    sampler = FlowSDE(0.8).bind(FLOW, 5)
    change = normals(generator, 1, 5, 2)
    nodes = sampler.noising_times
    w, weight = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(60))
    s = (nodes[1:, None] + nodes[:-1, None]) / 2 + (nodes[:-1] - nodes[1:])[:, None] / 2 * w
    g2, score = 2 * s / (1 - s), (1 - s) / s**2
    factor = ((1 + 0.32) ** 2) / (4 * 0.32)  # eta^2 = 0.8^2 / 2
    rates = g2 * score.square() * (nodes[:-1] - nodes[1:])[:, None] / 2 * weight
    expected = 0.5 * factor * rates.sum(1) * change.square().sum(2)
    found = sampler.path_kl(change, 0 * change)
    close(found, expected, rtol=1e-9, atol=0)
    whole = 0.5 * factor * (0.97 / 0.03) ** 2  # of all steps at a constant unit change
    close(
        sampler.path_kl_gain.sum() / 2,
        whole * torch.ones((), dtype=torch.float64),
        rtol=1e-12,
        atol=0,
    )


def test_with_eta_1_the_chain_costs_what_the_sde_does():
    """With exact posteriors of a constant x0_hat both are half the increase of the SNR."""
    sampler = DDIM(1.0).bind(FLOW, 7)
    close((sampler.gain / sampler.std).square(), sampler.path_kl_gain, rtol=1e-10, atol=0)
    free = DDIM(0.6).bind(FLOW, 7)
    assert bool(((free.gain / free.std).square() > sampler.path_kl_gain).all())


def test_the_last_step_to_clean_data_holds_the_score():
    sampler = FlowSDE(0.7).bind(TO_DATA, 4)
    s = float(sampler.noising_times[-2])
    exact = kl_factor(0.7 / math.sqrt(2)) * (-2 * s - 2 * math.log(1 - s)) * ((1 - s) / s**2) ** 2
    assert float(sampler.path_kl_gain[-1]) == pytest.approx(exact, rel=1e-10)
    assert sampler.has_density


@pytest.mark.parametrize("steps", [5, 400])
def test_what_the_code_of_flow_grpo_does_at_pure_noise_does_not_shrink_with_the_step(steps):
    """The variance after its first step, x0_hat the data's mean, against the marginal's."""
    a, spread = 0.7, 0.4
    sampler = FlowSDE(a).bind(FlowTable(), steps)
    h = 1 / steps
    after = sampler.state_gain[0].square() + sampler.std[0].square()
    marginal = (1 - h) ** 2 + h**2 * spread
    assert float(sampler.std[0]) == pytest.approx(a)
    assert float(after) - marginal == pytest.approx(a**4 / 4 + a**2 * h - h**2 * spread)
    assert float(sampler.gain[0]) == pytest.approx(h)  # of the mean: exact


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_exact_for_data_at_a_point(eta):
    """x0_hat is constant there: one step or many lead to the same law, from pure noise on."""
    point = 1.3
    for steps in (2, 9):
        sampler = DDIM(eta).bind(FLOW, steps)
        mean, variance = torch.zeros(()).double(), torch.ones(()).double()
        for k in range(steps):
            mean = sampler.state_gain[k] * mean + sampler.gain[k] * point
            variance = sampler.state_gain[k].square() * variance + sampler.std[k].square()
        close(mean, torch.tensor(0.97 * point).double())
        close(variance.sqrt(), torch.tensor(0.03).double())


def test_the_sde_is_that_of_the_source(generator):
    """Drift of [FG] equation 8 between the nodes, with the velocity of the expected data."""
    sampler = FlowSDE(0.8).bind(FLOW, 4)
    x, x0 = normals(generator, 2, 3, 2)
    s = 0.37
    velocity, noise = (x - x0) / s, 0.8 * math.sqrt(s / (1 - s))
    drift = -(velocity + noise**2 / (2 * s) * (x + (1 - s) * velocity))
    t = torch.tensor(1 - s, dtype=torch.float64)
    close(sampler.sde.drift(t, x, x0), drift, rtol=1e-10, atol=1e-12)
    close(torch.as_tensor(sampler.sde.diffusion(t, x)), torch.tensor(noise, dtype=torch.float64))


@pytest.mark.parametrize("sampler", [FlowSDE(0.8), DDIM(0.5), DDIM(1.0)], ids=lambda s: s.label)
def test_chains_tend_to_the_data_and_their_optima_to_the_tilt(sampler):
    """At first order; Flow-GRPO's first steps never shrink, but all noise forgets a pure start."""
    problem = GaussianProblem()
    tilted = gaussian.tilt(problem.data, problem.quadratic, problem.kl_weight)
    zero = torch.zeros(100, 2, 2, dtype=torch.float64)
    misses, of_optima = [], []
    for steps in (25, 100):
        bound = sampler.bind(FlowTable(shift=3.0, end=1e-3), steps)
        law = problem.law_of(zero[:steps], zero[:steps, 0], bound)
        misses.append(float((law.covariance - problem.data.covariance).abs().max()))
        close(law.mean, 0.999 * problem.data.mean, rtol=1e-9, atol=0)
        of_optima.append(float((problem.best_law(bound).mean - tilted.mean).norm()))
    assert misses[1] < 0.4 * misses[0]
    assert of_optima[1] < 0.4 * of_optima[0]
    assert of_optima[1] < 0.06


def trainer(objective: objectives.Objective, sampler: Any, **size: Any) -> Trainer:
    environment = GaussianProblem().environment(sampler, 5)
    settings = {"samples": 12, "batch": 4096, "value_epochs": 1} | size
    return Trainer(environment, objective, UpdateSize(**settings), accelerator=Process())


def test_the_model_tells_the_exact_expected_data_and_its_score():
    sampler = SAMPLERS["ddim"]
    problem = GaussianProblem()
    model = problem.environment(sampler, 0).model
    assert isinstance(model, Denoiser)
    assert isinstance(model, Model)
    x = torch.tensor([[0.3, -0.8], [1.4, 0.2]])
    for k, s in enumerate(sampler.noising_times[:-1]):
        timesteps = sampler.timesteps[k].expand(2)
        matrix, shift = gaussian.denoised_coefficients(problem.data, FLOW, s)
        expected = (x.double() @ matrix.T + shift).float()
        close(model.denoised(x, timesteps, None), expected, rtol=1e-4, atol=1e-5)
        score = (1 - s) / s**2 * expected - x / s**2
        close(model(x, timesteps, None), score.float(), rtol=1e-3, atol=1e-3)
        close(
            model.prediction(x, timesteps, None), ((x - expected) / s).float(), rtol=1e-3, atol=1e-3
        )
    pure = gaussian.denoised_coefficients(problem.data, FLOW, torch.tensor(1.0).double())
    close(pure[0], 0 * pure[0])
    close(pure[1], problem.data.mean)


@pytest.mark.parametrize("name", ["flow-sde", "cps"])
def test_the_exact_judgement_is_that_of_samples(name, generator):
    problem, sampler = GaussianProblem(), SAMPLERS[name]
    environment = problem.environment(sampler, 3)
    with torch.no_grad():
        for p in environment.model.parameters:
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    exact = problem.evaluate(environment.model, sampler)
    drawn = environment.sample(
        lambda mean, level: ctrl.DeterministicPolicy(mean),
        range(4000),
        torch.zeros(4000, dtype=torch.long),
        stream="judge",
    ).rollout
    for values, expected in ((drawn.rewards, exact.reward), (drawn.costs.sum(1), exact.path_kl)):
        error = float(values.std() / len(values) ** 0.5)
        assert abs(float(values.mean()) - expected) < 5 * error + 1e-5
    assert exact.path_kl > 0


def test_nothing_beats_the_optimum(generator):
    problem, sampler = GaussianProblem(), SAMPLERS["flow-sde"]
    environment = problem.environment(sampler, 0)
    start, best = problem.evaluate(environment.model, sampler), problem.optimum(sampler)
    assert start.path_kl == pytest.approx(0, abs=1e-12)
    assert best.kl_to_optimum == pytest.approx(0, abs=1e-9)
    assert start.objective < best.objective
    gain, shift = problem.best_correction(sampler)
    for _ in range(5):
        moved = problem.outcome_of(
            gain + 0.05 * normals(generator, 5, 2, 2),
            shift + 0.05 * normals(generator, 5, 2),
            sampler,
        )
        assert moved.objective < best.objective
        assert moved.kl_to_optimum > 0


LEARNERS = [
    objectives.ScoreAsAction(kl_weight=0.5, learning_rate=0.02),
    objectives.DDPO(learning_rate=0.02),
    objectives.GRPO(learning_rate=0.02),
    objectives.FlowDPPO(learning_rate=0.02, per_path=True),
    objectives.GRPOGuard(learning_rate=0.02),
    objectives.AdjointMatching(kl_weight=0.5, learning_rate=0.02),
    objectives.DRaFT(last=2, kl_weight=0.5, learning_rate=0.02),
    objectives.ReFL(learning_rate=0.02),
]


@pytest.mark.parametrize("objective", LEARNERS, ids=lambda o: type(o).__name__)
def test_it_is_fine_tuned_by_the_same_trainer(objective):
    run = trainer(
        objective,
        SAMPLERS["flow-sde"],
        samples=16 * objective.group // math.gcd(16, objective.group),
    )
    for numbers in run.updates(2):
        assert math.isfinite(numbers["reward"].mean)
        assert math.isfinite(numbers["gradient_norm"])
    assert any(bool(p.any()) for p in run.parameters)


def test_it_comes_near_the_optimum():
    """50 updates of adjoint matching: from the start at least 90 % of the way to the optimum."""
    problem = GaussianProblem()
    sampler = FlowSDE(0.9).bind(FlowTable(shift=1.7, end=0.1), 5)
    objective = objectives.AdjointMatching(
        kl_weight=problem.kl_weight, learning_rate=0.03, path_kl=True
    )
    run = trainer(objective, sampler, samples=64)
    start = problem.evaluate(run.environment.model, sampler).objective
    best = problem.optimum(sampler).objective
    for _ in run.updates(50):
        pass
    reached = problem.evaluate(run.environment.model, sampler).objective
    assert start < reached < best
    assert best - reached < 0.1 * (best - start)


def test_it_resumes_bit_for_bit():
    def fresh() -> Trainer:
        return trainer(
            objectives.ScoreAsAction(kl_weight=0.3, learning_rate=0.05), SAMPLERS["flow-sde"]
        )

    def numbers(run: Trainer, updates: int) -> list[dict[str, Any]]:
        clock = ("seconds", "memory")
        return [{k: v for k, v in n.items() if k not in clock} for n in run.updates(updates)]

    whole, first, second = fresh(), fresh(), fresh()
    log = numbers(whole, 4)
    numbers(first, 2)
    second.load_state(first.state())
    assert numbers(second, 4) == log[2:]
    for one, other in zip(second.parameters, whole.parameters, strict=True):
        assert (one == other).all()


@pytest.mark.parametrize(
    "objective",
    [
        objectives.ScoreAsActionSampled(),
        objectives.DPOK(),
        objectives.PCPO(group=4),
        objectives.DxMI(),
        objectives.DiffusionNFT(),
    ],
    ids=lambda o: type(o).__name__,
)
def test_objectives_that_read_scores_are_refused_by_name(objective):
    name = type(objective).__name__
    with pytest.raises(
        ValueError, match=f"{name} takes the sampler's action for a score.*BoundFlowSDE"
    ):
        trainer(objective, SAMPLERS["flow-sde"])
    trainer(objective, DDIM(1.0).bind(table(), 4), samples=24)


def test_a_model_that_tells_only_scores_is_refused():
    environment = GaussianProblem().environment(DDIM(1.0).bind(table(), 4), 0)
    with pytest.raises(TypeError, match="CorrectedScore has no method 'denoised'"):
        dataclasses.replace(environment, sampler=SAMPLERS["ddim"])
    with pytest.raises(TypeError, match="use GaussianProblem for a flow"):
        MixtureProblem().environment(SAMPLERS["ddim"], 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowSDE(-0.1), "noise_level must be at least 0 and finite, got -0.1"),
        (lambda: FlowSDE(math.inf), "noise_level must be at least 0 and finite, got inf"),
        (lambda: CPS(1.2), "noise_level must be at least 0 and at most 1, got 1.2"),
        (lambda: FlowTable(end=1.0), r"end must be in \[0, 1\), got 1.0"),
        (lambda: FlowTable(shift=0.0), "shift must be a positive finite number"),
        (lambda: FlowSDE().bind(FLOW, 1), "steps must be an integer of at least 2, got 1"),
        (
            lambda: (
                CPS()
                .bind(FlowTable(), 3)
                .transition_kl(torch.tensor([0]), *[torch.tensor([[1.0]])] * 2)
            ),
            "step 2 of this sampler has no noise",
        ),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types_are_named():
    for kind in (FlowSDE, CPS):
        with pytest.raises(TypeError, match="noise_level"):
            kind("0.7")
    with pytest.raises(TypeError, match=r"FlowSDE needs the table of a rectified flow.*DDPMTable"):
        FlowSDE().bind(table(), 4)


def test_the_table_of_a_flow():
    assert isinstance(FLOW, NoiseSchedule)
    assert FLOW.horizon == 1
    nodes = FlowTable(shift=3.0).nodes(4)
    u = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]).double()
    close(nodes, 3 * u / (1 + 2 * u))
    assert isinstance(DDIM(0.3).bind(FLOW, 3), BoundFlowDDIM)
    ode = DDIM(0.0).bind(FLOW, 3)
    assert ode.deterministic
    assert not ode.has_density
    assert isinstance(ode, GaussianSteps)
    assert math.isinf(float(ode.path_kl(torch.ones(1, 3, 2), torch.zeros(1, 3, 2))[0, 0]))
    paths = ctrl.simulate(
        ctrl.ControlProblem(ode.sde, horizon=1.0),
        ctrl.DeterministicPolicy(lambda t, x: 0 * x + 0.8),
        torch.ones(2, 1, dtype=torch.float64),
        ode.grid,
        solver=ode,
        noise=ctrl.Noise(torch.zeros(2, 3, 1, dtype=torch.float64)),
    )
    close(paths.states[:, -1], torch.full((2, 1), 0.97 * 0.8 + 0.03).double())
