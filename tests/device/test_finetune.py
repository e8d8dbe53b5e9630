"""Fine-tuning on a device: every objective, resumed; the exact problems; a whole run."""

import json

import pytest
import torch

from benchmarks.device import (
    OBJECTIVES,
    OURS,
    READING,
    Normals,
    model,
    one_update,
    trainer,
    without_rewards,
)
from diffusion_envs import objectives, rewards, samplers
from diffusion_envs.exact.problems import GaussianProblem, MixtureProblem, table
from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.evaluation import evaluate
from diffusion_envs.training import parallel
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from tests.device.counting import counting
from tests.device.memory import NAME
from tests.diffusion_envs.sd15.calling import finetune
from verification.problems.training_loop import Process

SYNCHRONISATIONS = {
    "ScoreAsAction": 6,
    "ScoreAsActionSampled": 6,
    "ScoreAsActionReleased": 6,
    "DDPO": 5,
    "DDPOScoreFunction": 5,
    "DPOK": 6,
    "GRPO": 5,
    "PCPO": 5,
    "FlowDPPO": 5,
    "GRPOGuard": 5,
    "TDPO": 6,
    "TDPOReset": 6,
    "D3PO": 5,
    "DenseReward": 5,
    "DiffusionDPO": 6,
    "AdjointMatching": 4,
    "TiltedRegression": 6,
    "DxMI": 6,
    "ContinuousDxMI": 6,
    "ContinuousDxMIReleased": 6,
    "DxMIFromData": 10,  # five are of the energy's optimiser, one a step
    "ContinuousDxMIFromData": 10,
    "ContinuousDxMIReleasedFromData": 10,
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


def exact_trainer(problem, objective, device):
    """The loop on an exact problem."""
    sampler = samplers.DDIM().bind(table(), 4)
    environment = problem.environment(sampler, 5, device)
    size = UpdateSize(samples=12, batch=10, value_epochs=1)
    data = Normals((2,)) if objective.needs_data else None
    return Trainer(environment, objective, size, accelerator=Process(), data=data)


def adapter(run):
    return torch.cat([p.detach().flatten().cpu() for p in run.parameters])


def assert_resumes(run, again, folder):
    """One more update of both is the same, bit for bit."""
    found = checkpoint.latest(folder)
    assert found is not None
    again.load_state(found.state)
    assert {p.device.type for p in again.parameters} == {NAME}
    again.step()
    assert torch.equal(adapter(again), adapter(run))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_learn_what_they_learn_on_the_cpu_and_wait_no_more_than_they_must(
    name, tmp_path
):
    objective, problem = OBJECTIVES[name], GaussianProblem()
    run, host = (exact_trainer(problem, objective, device) for device in (NAME, "cpu"))
    run.step()
    checkpoint.save(tmp_path, 1, run.state())
    calls, network = [], run.environment.model.exact
    run.environment.model.exact = lambda *inputs: calls.append(1) or network(*inputs)
    if run.critic is not None:
        run.critic.network.register_forward_pre_hook(lambda *_: calls.append(1))
    with counting(*OURS, passing_over=[READING]) as counts:
        said = run.step()
    lines = "\n".join(counts.lines())
    assert without_rewards(counts) <= min(SYNCHRONISATIONS[name], len(calls)), lines
    assert_resumes(run, exact_trainer(problem, objective, NAME), tmp_path)
    host.step()
    expected = host.step()
    assert said.keys() == expected.keys()
    assert said["reward"].mean == pytest.approx(expected["reward"].mean, rel=1e-4)
    torch.testing.assert_close(adapter(run), adapter(host), rtol=1e-4, atol=1e-6)
    assert adapter(run).abs().max() > 0
    here, there = (
        problem.evaluate(each.environment.model, each.environment.sampler) for each in (run, host)
    )
    assert here.objective == pytest.approx(there.objective, rel=1e-4)


@pytest.mark.parametrize("name", ["ScoreAsAction", "DiffusionNFT", "DRaFT"])  # one of each kind
def test_the_image_model_waits_no_more_than_it_must_and_is_resumed_bit_for_bit(name, tmp_path):
    built = model()
    run = trainer(OBJECTIVES[name], built)
    run.step()
    checkpoint.save(tmp_path, 1, run.state())
    update = one_update(run, built)
    lines = "\n".join(update.counts.lines())
    assert update.synchronised <= SYNCHRONISATIONS[name] <= update.network_calls, lines
    assert_resumes(run, trainer(OBJECTIVES[name], model()), tmp_path)


def test_a_checkpoint_is_copied_at_once(tmp_path):
    run = exact_trainer(GaussianProblem(), objectives.ScoreAsAction(), NAME)
    run.step()
    with counting() as counts:
        checkpoint.save(tmp_path, 1, run.state())
    assert counts.synchronised <= 2  # a copy for each dtype
    found = checkpoint.latest(tmp_path)
    assert found is not None
    for stored, parameter in zip(found.state["adapter"], run.parameters, strict=True):
        assert torch.equal(stored, parameter.detach().cpu())


def test_a_mixture_is_judged_wherever_it_was_trained():
    problem, objective = MixtureProblem(points=101), objectives.ScoreAsAction()
    runs = [exact_trainer(problem, objective, device) for device in (NAME, "cpu")]
    for run in runs:
        run.step()
    torch.testing.assert_close(adapter(runs[0]), adapter(runs[1]), rtol=1e-4, atol=1e-6)
    outcomes = [problem.evaluate(r.environment.model, r.environment.sampler) for r in runs]
    assert outcomes[0].reward == pytest.approx(outcomes[1].reward, rel=1e-4)


def test_a_black_box_samples_on_the_device():
    built = model()
    environment = trainer(objectives.DiffusionNFT(), built).environment
    environment.sampler = samplers.Scheduler("DPMSolverMultistepScheduler").bind(built.table, 2)
    found = evaluate(environment, 2)
    assert found.rewards.isfinite().all()


class OnDevice(Process):
    """One process whose device is the simulated accelerator."""

    device = torch.device(NAME)
    is_main_process = True

    def wait_for_everyone(self):
        """There is no one else."""


def test_a_whole_run_on_the_device_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "start", lambda *_: OnDevice())
    arguments = {
        "reward": rewards.PromptAlignment("reward"),
        "judges": {"judge": rewards.PromptAlignment("judge")},
        "prompts": ["a photo of a cat", "a photo of a ship"],
        "steps": 2,
        "guidance": 2.0,
        "size": UpdateSize(samples=2, value_epochs=1),
        "lora_rank": 2,
        "evaluation_samples": 2,
        "precision": "bfloat16",
        "gradient_checkpointing": True,
        "progress": False,
    }
    whole = finetune(updates=2, output=tmp_path / "whole", **arguments)
    finetune(updates=1, output=tmp_path / "cut", **arguments)
    resumed = finetune(updates=2, output=tmp_path / "cut", resume=True, **arguments)
    assert resumed.exported.read_bytes() == whole.exported.read_bytes()
    lines = [
        [told(json.loads(line)) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, resumed)
    ]
    assert lines[0] == lines[1]
