"""Fine-tuning on a device: every objective, resumed; the exact problems; a whole run."""

import json

import pytest
import torch

from benchmarks.device import OBJECTIVES, model, one_update, trainer
from diffusion_envs import objectives, rewards, samplers
from diffusion_envs.exact.problems import GaussianProblem, MixtureProblem, table
from diffusion_envs.sd15 import finetune
from diffusion_envs.training import checkpoint, parallel
from diffusion_envs.training.evaluation import evaluate
from diffusion_envs.training.loop import Schedule, Trainer
from tests.device.counting import counting
from tests.device.memory import NAME
from verification.claims.training_loop import Process

SYNCHRONISATIONS = {
    "ScoreAsAction": 6,
    "ScoreAsActionSampled": 6,
    "ScoreAsActionReleased": 6,
    "DDPO": 5,
    "DDPOScoreFunction": 5,
    "DPOK": 6,
    "GRPO": 5,
    "TDPO": 6,
    "TDPOReset": 6,
    "D3PO": 5,
    "DenseReward": 5,
    "AdjointMatching": 4,
    "DxMI": 6,
    "ContinuousDxMI": 6,
    "ContinuousDxMIReleased": 6,
    "DiffusionNFT": 5,
    "ReinforceAdjointMatching": 5,
    "DistributionalOptimisation": 5,
    "ReFL": 4,
    "DRaFT": 4,
    "AlignProp": 4,
}  # of an update, without those of rewards; 159 for ScoreAsAction before they were counted


def told(numbers):
    """What an update says, without the clock."""
    return {k: v for k, v in numbers.items() if k not in ("seconds", "memory")}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_update_waits_no_more_than_it_must_and_is_resumed_bit_for_bit(name, tmp_path):
    objective = OBJECTIVES[name]
    built = model()
    run = trainer(objective, built)
    run.step()
    checkpoint.save(tmp_path, 1, run.state())
    update = one_update(run, built)
    lines = "\n".join(update.counts.lines())
    assert update.synchronised <= SYNCHRONISATIONS[name], lines
    assert SYNCHRONISATIONS[name] <= update.network_calls, lines
    again = model()
    resumed = trainer(objective, again)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    resumed.load_state(found.state)
    resumed.step()
    for one, other in zip(resumed.parameters, run.parameters, strict=True):
        assert one.device.type == NAME
        assert torch.equal(one, other)


def test_a_checkpoint_is_copied_at_once(tmp_path):
    run = trainer(objectives.ScoreAsAction(), model())
    run.step()
    with counting() as counts:
        checkpoint.save(tmp_path, 1, run.state())
    assert counts.synchronised <= 2  # a copy for each dtype
    found = checkpoint.latest(tmp_path)
    assert found is not None
    for stored, parameter in zip(found.state["adapter"], run.parameters, strict=True):
        assert torch.equal(stored, parameter.detach().cpu())


def exact_run(problem, objective, device):
    """Two updates of the loop on an exact problem: what they say, and the adapter."""
    sampler = samplers.DDIM().bind(table(), 4)
    environment, parameters = problem.environment(sampler, 5, device)
    schedule = Schedule(samples=12, batch=10, value_epochs=1)
    run = Trainer(environment, objective, schedule, parameters, accelerator=Process())
    said = [told(run.step()) for _ in range(2)]
    outcome = problem.evaluate(environment.score, sampler)
    return said, torch.cat([p.detach().flatten().cpu() for p in parameters]), outcome


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_learn_on_exact_problems_what_they_learn_on_the_cpu(name):
    objective = OBJECTIVES[name]
    (said, adapter, outcome), (expected, wanted, exact) = (
        exact_run(GaussianProblem(), objective, device) for device in (NAME, "cpu")
    )
    torch.testing.assert_close(adapter, wanted, rtol=1e-4, atol=1e-6)
    assert adapter.abs().max() > 0
    assert outcome.objective == pytest.approx(exact.objective, rel=1e-4)
    for one, other in zip(said, expected, strict=True):
        assert one.keys() == other.keys()
        assert one["reward"].mean == pytest.approx(other["reward"].mean, rel=1e-4)


def test_a_mixture_is_judged_wherever_it_was_trained():
    objective = objectives.ScoreAsAction()
    runs = [exact_run(MixtureProblem(points=101), objective, device) for device in (NAME, "cpu")]
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-4, atol=1e-6)
    assert runs[0][2].reward == pytest.approx(runs[1][2].reward, rel=1e-4)


def test_a_black_box_samples_on_the_device():
    built = model()
    sampler = built.bind(samplers.Scheduler("DPMSolverMultistepScheduler"), 3)
    built.environment.sampler = sampler
    found = evaluate(built.environment, 4)
    assert found.rewards.isfinite().all()


class OnDevice(Process):
    """One process whose device is the simulated accelerator."""

    device = torch.device(NAME)
    is_main_process = True

    def wait_for_everyone(self):
        """There is no one else."""


def test_a_whole_run_on_the_device_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "start", lambda device=None: OnDevice())
    arguments = {
        "reward": rewards.PromptAlignment("reward"),
        "judges": {"judge": rewards.PromptAlignment("judge")},
        "prompts": ["a photo of a cat", "a photo of a ship"],
        "steps": 3,
        "guidance": 2.0,
        "schedule": Schedule(samples=4, batch=4, value_epochs=1),
        "lora_rank": 2,
        "evaluation_samples": 4,
        "precision": "bfloat16",
        "gradient_checkpointing": True,
        "picture_every": 1,
        "progress": False,
    }
    whole = finetune(updates=2, output=tmp_path / "whole", **arguments)
    finetune(updates=1, output=tmp_path / "cut", **arguments)
    resumed = finetune(updates=2, output=tmp_path / "cut", resume=True, **arguments)
    assert resumed.lora.read_bytes() == whole.lora.read_bytes()
    lines = [
        [told(json.loads(line)) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, resumed)
    ]
    assert lines[0] == lines[1]
