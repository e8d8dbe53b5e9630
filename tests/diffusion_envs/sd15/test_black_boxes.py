"""Fine-tuning and evaluation with samplers that show nothing of their steps."""

import json
from typing import Any

import pytest

from diffusion_envs import objectives, rewards, samplers
from diffusion_envs.runs import command_line
from diffusion_envs.runs.early_stopping import StopRule
from diffusion_envs.sd15.__main__ import FAMILY
from diffusion_envs.training.kl_controller import TargetKL
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.sd15.calling import finetune

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

DPM = samplers.Scheduler("DPMSolverMultistepScheduler")
SMALL: dict[str, Any] = {
    "reward": rewards.Colour("red"),
    "prompts": ["a photo of a cat", "a photo of a ship"],
    "steps": 3,
    "updates": 2,
    "size": UpdateSize(samples=4, batch=8),
    "lora_rank": 2,
    "evaluation_samples": 4,
    "progress": False,
    "device": "cpu",
}


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [
        (objectives.DiffusionNFT(), DPM),
        (objectives.ReinforceAdjointMatching(path_cost=True), samplers.DDIM(0.0)),
        (objectives.DistributionalOptimisation(), samplers.Scheduler("HeunDiscreteScheduler")),
    ],
    ids=["dpm++", "ode", "heun"],
)
def test_what_learns_from_data_learns_from_any_sampler(objective, sampler, tmp_path):
    folder = tmp_path / "run"
    run = finetune(objective=objective, sampler=sampler, output=folder, **SMALL)
    assert run.path_kl is None
    assert run.reward_gain.standard_error > 0  # it moved
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2]
    assert [line["reward_queries"] for line in lines] == [4, 8]
    summary = json.loads((folder / "summary.json").read_text())
    for shown in (*lines, summary, run.metrics):
        assert "path_kl" not in shown
    report = (folder / "report.html").read_text()
    assert "path KL" not in report
    assert "Infinity" not in json.dumps(summary)  # which is no JSON


def test_a_cut_run_of_a_black_box_goes_on_to_the_same_numbers(tmp_path):
    settings = SMALL | {"objective": objectives.DiffusionNFT(draws=2), "sampler": DPM}
    whole = finetune(output=tmp_path / "whole", **settings)
    finetune(output=tmp_path / "cut", **settings | {"updates": 1})
    for name in (
        "summary.json",
        "over_optimisation.jsonl",
        "report.html",
    ):  # as if it had been stopped
        (tmp_path / "cut" / name).unlink(missing_ok=True)
    cut = finetune(output=tmp_path / "cut", resume=True, **settings)
    assert cut.reward == whole.reward


@pytest.mark.parametrize("sampler", [DPM, samplers.DDIM(0.0)], ids=["dpm++", "ode"])
def test_what_learns_from_steps_is_refused(sampler, tmp_path):
    with pytest.raises(ValueError, match=r"density, .* ScoreAsAction learns; .*DiffusionNFT"):
        finetune(
            objective=objectives.ScoreAsAction(), sampler=sampler, output=tmp_path / "no", **SMALL
        )
    assert not (tmp_path / "no").exists()


def test_what_steers_by_the_path_kl_is_refused(tmp_path):
    settings = SMALL | {"sampler": DPM, "output": tmp_path / "no"}
    ram = objectives.ReinforceAdjointMatching()
    with pytest.raises(ValueError, match="target_kl needs a path KL"):
        finetune(objective=ram, target_kl=TargetKL(1.0), **settings)
    with pytest.raises(ValueError, match="max_path_kl needs a path KL"):
        finetune(objective=ram, stop=StopRule(max_path_kl=1.0), **settings)
    assert not (tmp_path / "no").exists()


def test_the_command_line_trains_and_transfers(tmp_path, capsys):
    folder = tmp_path / "run"
    small = ["--steps", "3", "--updates", "1", "--samples", "2", "--evaluation-samples", "2"]
    small += ["--prompts", "a photo of a cat", "--device", "cpu", "--lora-rank", "2"]
    small += ["--reward", "red", "--objective", "nft", "--sampler", "dpm++"]
    assert command_line.main(FAMILY, ["--output", str(folder), *small]) == 0
    assert "path KL" not in capsys.readouterr().out
    assert command_line.main(FAMILY, ["--resume", str(folder), "--updates", "2"]) == 0
    kinds = ["ddim", "ddim-ode", "dpm++", "unipc", "heun"]
    arguments = ["--steps", "2", "3", "--samplers", *kinds, "--samples", "2"]
    assert command_line.main(FAMILY, ["evaluate", str(folder), *arguments]) == 0
    shown = capsys.readouterr().out
    labels = ["DDIM eta 1", "DDIM eta 0", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete"]
    rows = json.loads((folder / "transfer.json").read_text())
    assert [(row["sampler"], row["steps"]) for row in rows] == [
        (label, n) for label in labels for n in (2, 3)
    ]
    report = (folder / "report.html").read_text()
    for label in labels:
        assert label in report
        assert label in shown
    assert command_line.main(FAMILY, ["--output", str(tmp_path / "no"), *small[:-1], "dpm+"]) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())  # lines of a box
    assert "did you mean 'dpm++'" in said
