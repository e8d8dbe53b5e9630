"""Unconditional networks end to end: every kind of objective, resumed, exported, evaluated."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline

from diffusion_envs import cifar10, objectives, rewards, samplers
from diffusion_envs.cifar10 import family, networks
from diffusion_envs.models.unconditional_unet import UnconditionalUNet
from diffusion_envs.runs.exported import load_exported
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.transfer import transfer
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.models.conftest import save_pixels

__all__ = ["save_pixels"]
pytestmark = pytest.mark.filterwarnings("default")  # diffusers deprecates freely

WATCH = RunOptions(evaluation_samples=4, progress=False)
SMALL: dict[str, Any] = {
    "reward": rewards.JpegCompressibility(),
    "size": UpdateSize(samples=4, batch=16, value_epochs=1),
    "options": WATCH,
    "updates": 2,
}


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "memory")} for line in logged]


def network_of(folder: Path) -> dict[str, torch.Tensor]:
    return DDPMPipeline.from_pretrained(folder).unet.state_dict()


CASES = {
    "score-as-action": (objectives.ScoreAsAction(learning_rate=1e-3), samplers.DDIM(), 3),
    "ddpo": (objectives.DDPO(learning_rate=1e-3), samplers.QuadraticVariances(), None),
    "grpo": (objectives.GRPO(learning_rate=1e-3, group=2), samplers.EqualAngles(), None),
    "dxmi": (objectives.DxMI(learning_rate=1e-3), samplers.EqualAngles(), None),
    "nft": (
        objectives.DiffusionNFT(learning_rate=1e-3),
        samplers.Scheduler("DPMSolverMultistepScheduler"),
        3,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_resumed_to_the_same_numbers_and_exported(name, save_pixels, tmp_path):
    objective, sampler, steps = CASES[name]
    model = cifar10.Cifar10Model(save_pixels(), device="cpu")
    settings = SMALL | {"objective": objective, "sampler": sampler}
    if steps is not None:
        settings["steps"] = steps
    whole = cifar10.finetune(model, output=tmp_path / "whole", **settings)
    cut = settings | {"updates": 1}
    cifar10.finetune(model, output=tmp_path / "cut", **cut)
    again = cifar10.finetune(model, output=tmp_path / "cut", resume=True, **settings)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert len(lines(tmp_path / "whole")) == 2
    one, other = network_of(whole.exported), network_of(again.exported)
    before = network_of(Path(model.model))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert any(not torch.equal(one[key], before[key]) for key in one)
    assert whole.report.is_file()
    stored = json.loads((whole.folder / "config.json").read_text())["settings"]
    usual = samplers.usual_steps(sampler)
    assert stored["steps"] == (steps if usual is None else usual)
    assert stored["prompts"] == ["a picture"]


def test_rewards_are_back_propagated_into_the_published_chain(save_pixels, tmp_path):
    run = cifar10.finetune(
        cifar10.Cifar10Model(save_pixels(), device="cpu"),
        output=tmp_path / "run",
        **SMALL
        | {
            "reward": rewards.ClassConfidence(),
            "objective": objectives.DRaFT(learning_rate=1e-3),
            "sampler": samplers.EqualAngles(),
        },
    )
    assert all(math.isfinite(line["reward"]["mean"]) for line in lines(run.folder))
    assert run.path_kl is not None
    assert run.path_kl.mean > 0


def test_an_adapter_is_merged_into_the_export(save_pixels, tmp_path):
    folder = save_pixels()
    model = cifar10.Cifar10Model(folder, lora_rank=2, device="cpu")
    objective = objectives.ScoreAsAction(learning_rate=1e-2)
    run = cifar10.finetune(
        model, output=tmp_path / "run", **SMALL | {"objective": objective, "steps": 3, "updates": 1}
    )
    before, after = network_of(folder), network_of(run.exported)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all("attentions" in key for key in changed)


def test_a_run_is_evaluated_with_other_samplers(save_pixels, tmp_path):
    model = cifar10.Cifar10Model(save_pixels(), device="cpu")
    objective = objectives.ScoreAsAction(learning_rate=1e-3)
    run = cifar10.finetune(
        model, output=tmp_path / "run", **SMALL | {"objective": objective, "steps": 3}
    )
    loaded = model.load(device=torch.device("cpu"), batch=16, seed=0)
    kinds = [
        samplers.DDIM(),
        samplers.QuadraticVariances(),
        samplers.EqualAngles(),
        samplers.Scheduler("UniPCMultistepScheduler"),
    ]
    rows = transfer(
        run.folder,
        loaded,
        reward=SMALL["reward"],
        prompts=family.PROMPTS,
        seed=0,
        steps=[10, 12],
        samplers=kinds,
        samples=2,
    )
    assert [(row.sampler, row.steps) for row in rows] == [
        (kind.label, steps) for kind in kinds for steps in (10, 12)
    ]
    assert all(math.isfinite(row.after.mean) for row in rows)
    assert any(row.difference.mean != 0 for row in rows)
    assert len(json.loads((run.folder / "transfer.json").read_text())) == 8


def test_learned_standard_deviations_are_evaluated_as_learned(save_pixels, tmp_path):
    model = cifar10.Cifar10Model(save_pixels(), device="cpu")
    learned = samplers.EqualAngles(learned_std=True)
    objective = objectives.DxMI(learning_rate=0.1, entropy_weight=1.0)
    red = rewards.Colour("red")
    settings = SMALL | {"objective": objective, "sampler": learned, "reward": red}
    run = cifar10.finetune(model, output=tmp_path / "run", **settings)
    arguments = {"reward": red, "prompts": family.PROMPTS, "seed": 0, "samples": 4}

    def after(sampler: samplers.Sampler, steps: int = 4) -> tuple[float, float]:
        loaded = model.load(device=torch.device("cpu"), batch=16, seed=0)
        rows = transfer(run.folder, loaded, steps=[steps], samplers=[sampler], **arguments)
        return rows[0].before.mean, rows[0].after.mean

    # the run's own evaluation, of the same held-out samples
    assert after(learned) == pytest.approx((run.reward_before.mean, run.reward.mean), abs=1e-6)
    assert after(samplers.EqualAngles())[1] != after(learned)[1]
    with pytest.raises(ValueError, match=r"of 5 steps, and run .* learned those of 4 steps"):
        after(learned, 5)


def test_the_export_is_the_trained_network(save_pixels, tmp_path):
    model = cifar10.Cifar10Model(save_pixels(), device="cpu")
    run = cifar10.finetune(
        model,
        output=tmp_path / "run",
        **SMALL | {"objective": objectives.ScoreAsAction(learning_rate=1e-3), "steps": 3},
    )
    loaded = model.load(device=torch.device("cpu"), batch=16, seed=0)
    assert isinstance(loaded, UnconditionalUNet)
    load_exported(loaded, run.folder)
    exported = network_of(run.exported)
    assert all(torch.equal(t, exported[key]) for key, t in loaded.network.state_dict().items())
    pipe = DDPMPipeline.from_pretrained(run.exported)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(batch_size=2, num_inference_steps=2, output_type="np").images) == 2


class Asked(Exception):
    """What ``runs.finetune.finetune`` was asked."""


def test_the_reward_and_its_judge_if_none_is_named(save_pixels, tmp_path, monkeypatch):
    def record(model: Any, **arguments: Any) -> None:
        raise Asked(arguments | {"model": model})

    def asked(*model: Path, **arguments: Any) -> dict[str, Any]:
        with pytest.raises(Asked) as stopped:
            cifar10.finetune(*model, output=tmp_path, **arguments)
        return stopped.value.args[0]

    monkeypatch.setattr(family, "_finetune", record)
    usual = asked(save_pixels())
    assert usual["reward"] == rewards.ClassConfidence("reward")
    assert usual["options"] == RunOptions(judges={"judge": rewards.ClassConfidence("judge")})
    assert usual["prompts"] == ("a picture",)
    assert "steps" not in usual
    sampler = samplers.QuadraticVariances()
    red = asked(reward=rewards.Colour("red"), sampler=sampler)
    assert "options" not in red
    assert red["steps"] == 10
    assert red["model"] == cifar10.Cifar10Model("small")
    own = asked(sampler=sampler, steps=11, options=WATCH)
    assert own["steps"] == 11
    assert own["options"] == WATCH


def test_a_small_model_that_is_not_there_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(family, "small_folder", lambda: tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match=r"model 'small'.*cifar10 pretrain --data"):
        cifar10.finetune(output=tmp_path / "run")


def test_the_embedded_model_is_small_and_loads():
    files = [file for file in family.small_folder().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 10e6
    model = cifar10.Cifar10Model().load(device=torch.device("cpu"), batch=4, seed=0)
    assert model.event == (3, 32, 32)
    assert model.prediction_type == "v_prediction"
    assert sum(p.numel() for p in model.parameters) == sum(
        p.numel() for p in networks.small().parameters()
    )


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("lora_rank", r"cifar10\.Cifar10Model\(\.\.\.\), Cifar10Model\(lora_rank=3\)"),
        ("samples", "size=UpdateSize"),
        ("evaluation_samples", "options=RunOptions"),
    ],
)
def test_arguments_of_a_dataclass_say_where_they_go(name, place, tmp_path):
    with pytest.raises(TypeError, match=f"^{name} is no argument of finetune: .*{place}"):
        cifar10.finetune(output=tmp_path, **{name: 3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "half"}, "precision must be one of.*'half'"),
        ({"lora_rank": 0}, "lora_rank must be an integer of at least 1, got 0"),
        ({"lora_rank": True}, "lora_rank must be an integer"),
    ],
)
def test_bad_settings_of_the_model_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        cifar10.Cifar10Model(**settings)


def test_a_folder_is_remembered_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    model = cifar10.Cifar10Model("mine")
    assert model.model == str(tmp_path / "mine")
    assert model.label == model.model
    assert replace(model, lora_targets=["to_q"]).lora_targets == ("to_q",)
    assert cifar10.Cifar10Model().model == "small"
    assert {f.name for f in fields(model)} >= {"device", "precision", "gradient_checkpointing"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": rewards.PromptAlignment()}, "'a picture' must name exactly one"),
        ({"sampler": samplers.QuadraticVariances(), "steps": 4}, r"alpha-bar 0\.343"),
        (
            {"objective": objectives.DRaFT(), "reward": rewards.JpegCompressibility()},
            "differentiable",
        ),
        ({"sampler": samplers.FlowSDE(), "steps": 3}, "FlowSDE needs"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_update(
    settings, message, save_pixels, tmp_path
):
    model = cifar10.Cifar10Model(save_pixels(), device="cpu")
    arguments = SMALL | {"steps": 3} | settings
    with pytest.raises((ValueError, TypeError, rewards.RewardError), match=message):
        cifar10.finetune(model, output=tmp_path / "run", **arguments)
    assert not any(path.read_text() for path in tmp_path.glob("run/metrics.jsonl"))


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'tune'"):
        cifar10.tune  # noqa: B018  # reading it is the test
