"""Schedulers of diffusers by name, on a model's own noise levels."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_envs.denoising import v_from_score
from diffusion_envs.environment import Environment
from diffusion_envs.exact import GaussianProblem, table
from diffusion_envs.objectives import DiffusionNFT
from diffusion_envs.runs.evaluation import evaluate
from diffusion_envs.samplers import DDIM, Sampler, Scheduler
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

pytestmark = pytest.mark.filterwarnings("default")  # diffusers deprecates freely

NAMES = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler")
PROBLEM = GaussianProblem()


def exact_model(kind: Sampler, steps: int, seed: int = 0) -> Environment:
    """The exact problem's model, sampled by any sampler."""
    environment = PROBLEM.environment(DDIM(1.0).bind(table(), 5), seed)
    return replace(environment, sampler=kind.bind(table(), steps))


def affine_map(name: str, steps: int) -> tuple[Tensor, Tensor]:
    """What a deterministic sampler makes of standard normals where the score is affine."""
    sampler = Scheduler(name).bind(table(), steps)
    environment = PROBLEM.environment(DDIM(1.0).bind(table(), 5), seed=0)
    start = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    with torch.no_grad():
        ends = sampler.sample(
            lambda x, t: environment.model.prediction(x, t.expand(len(x))), start
        ).double()
    return (ends[1:] - ends[0]).T, ends[0]


@pytest.mark.parametrize("name", NAMES)
def test_what_it_generates_tends_to_the_data(name):
    """Mean and covariance, exactly: no sample is drawn. The table ends a little before the data."""
    data, gaps = PROBLEM.data, []
    for steps in (10, 40):
        matrix, shift = affine_map(name, steps)
        spread = (matrix @ matrix.T - data.covariance).abs().max()
        gaps.append(max(spread, (shift - data.mean).abs().max()).item())
    assert gaps[1] < 0.02
    assert gaps[1] < 0.6 * gaps[0] or gaps[0] < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_the_kind_of_prediction_does_not_matter(name):
    environment = PROBLEM.environment(DDIM(1.0).bind(table(), 5), seed=0)
    score, abar = environment.model, table().alphas_cumprod
    start = torch.tensor([[0.3, -0.8], [1.4, 0.2]])

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        own = abar[t.long()].to(x)
        alpha, sigma = own.sqrt(), (1 - own).sqrt()
        return v_from_score(x, -score.prediction(x, t.expand(len(x))) / sigma, alpha, sigma)

    with torch.no_grad():
        by_noise = (
            Scheduler(name)
            .bind(table(), 20)
            .sample(lambda x, t: score.prediction(x, t.expand(len(x))), start)
        )
        by_velocity = Scheduler(name).bind(table(), 20, "v_prediction").sample(velocity, start)
    torch.testing.assert_close(by_noise, by_velocity, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_those_of_every_other_sampler(name, monkeypatch):
    """A sample begins with the same noise whatever the sampler, in whatever batch."""
    starts = {}
    for kind in (DDIM(1.0), Scheduler(name)):
        environment = exact_model(kind, 5, seed=3)
        found: list[Tensor] = []
        normals = environment._starts
        monkeypatch.setattr(
            environment, "_starts", lambda *a, n=normals, f=found: f.append(n(*a)) or f[-1]
        )
        evaluate(environment, 6, batch=4)
        starts[kind.label] = torch.cat(found)
    one, other = starts.values()
    assert torch.equal(one, other)


def test_the_path_kl_of_a_black_box_is_not_known():
    environment = exact_model(Scheduler(NAMES[0]), 5)
    assert bool(evaluate(environment, 4).path_kl.isnan().all())


def test_a_black_box_trains_what_learns_from_data(generator):
    """On the exact problem the expected reward rises; it is judged on the ODE that sampled."""
    environment = exact_model(Scheduler(NAMES[0]), 10)
    before = evaluate(environment, 1024, batch=1024).rewards
    trainer = Trainer(
        environment,
        DiffusionNFT(learning_rate=1e-2),
        UpdateSize(samples=128, batch=1024, weight_decay=0.0),
        accelerator=Accelerator(cpu=True),
    )
    for numbers in trainer.updates(12):
        assert "path_kl" not in numbers
    gain = evaluate(environment, 1024, batch=1024).rewards - before
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5


@pytest.mark.parametrize(
    "name", ["NoSuchScheduler", "FlowMatchEulerDiscreteScheduler", "UNet2DModel"]
)
def test_what_takes_no_table_is_refused(name):
    with pytest.raises(ValueError, match=r"table of betas .*got"):
        Scheduler(name)


@pytest.mark.parametrize("steps", [0, 2000])
def test_step_counts_out_of_range_are_refused(steps):
    with pytest.raises(ValueError, match="steps must be"):
        Scheduler(NAMES[0]).bind(table(), steps)


def test_labels_tell_samplers_apart():
    assert Scheduler(NAMES[0]).label == "DPMSolverMultistep"
    assert (
        Scheduler(NAMES[0], (("solver_order", 3),)).label == "DPMSolverMultistep (solver_order=3)"
    )
    assert DDIM(0.5).label == "DDIM eta 0.5"
