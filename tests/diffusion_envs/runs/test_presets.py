"""Presets are files of options: the documented numbers, and errors that name what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffusion_envs import objectives, rewards, samplers, sd15
from diffusion_envs.runs import presets
from diffusion_envs.runs.command_line import main, read
from diffusion_envs.sd15.__main__ import FAMILY

COMMON = {
    "model": {"precision": "bfloat16"},
    "size": {"batch": 8},
    "sampler": samplers.DDIM(1.0),
}
DDPO = objectives.DDPO(learning_rate=3e-4, clip_per_pixel=1e-4, advantage_clip=5.0, min_count=2)
DDPO_SIZE = {"samples": 256, "weight_decay": 1e-4, "max_gradient_norm": 1.0, "train_steps": None}
SD14 = {"model": "CompVis/stable-diffusion-v1-4", "guidance": 5.0, "lora_rank": 4}
SD15 = {"model": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
DOCUMENTED = {
    "jpeg": {
        "objective": DDPO,
        "model": SD14,
        "size": DDPO_SIZE | {"minibatches": 4},
        "run": {"updates": 100, "steps": 50, "seed": 42},
    },
    "aesthetic": {
        "objective": DDPO,
        "model": SD14,
        "size": DDPO_SIZE | {"minibatches": 2},
        "run": {"updates": 200, "steps": 50, "seed": 42},
    },
    "imagereward": {
        "objective": objectives.DPOK(
            learning_rate=1e-5, reward_weight=10.0, kl_weight=0.01, clip_per_pixel=1e-4
        ),
        "model": SD15 | {"guidance": 7.5, "lora_rank": 4},
        "size": {"samples": 10, "minibatches": 5, "train_steps": 24}
        | {"weight_decay": 0.0, "max_gradient_norm": 0.1}
        | {"value_learning_rate": 1e-4, "value_batch": 256, "value_epochs": 5},
        "run": {"updates": 2000, "steps": 50, "prompts": ("A green colored rabbit.",)},
    },
    "pickscore": {
        "objective": objectives.GRPO(
            learning_rate=3e-4,
            group=24,
            whole_batch_std=True,
            kl_weight=0.001,
            advantage_clip=5.0,
            clip_per_pixel=1e-4,
        ),
        "model": SD15 | {"guidance": 4.5, "lora_rank": 32, "lora_alpha": 64.0},
        "size": {"samples": 1152, "minibatches": 2, "weight_decay": 1e-4, "average": 0.9},
        "run": {"updates": 100, "steps": 10},
    },
}
BUDGETS = {"jpeg": 25_600, "aesthetic": 51_200, "imagereward": 20_000, "pickscore": 115_200}
WITHOUT_WEIGHTS = ("--reward", "red")


def test_every_preset_is_documented():
    assert presets.shipped() == sorted(DOCUMENTED)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_preset_resolves_to_the_documented_numbers(name):
    made = sd15.preset(name, *([] if name == "jpeg" else WITHOUT_WEIGHTS))
    expected = DOCUMENTED[name]
    assert made["objective"] == expected["objective"]
    assert made["sampler"] == COMMON["sampler"]
    for part in ("model", "size"):
        wanted = COMMON[part] | expected[part]
        assert {field: getattr(made[part], field) for field in wanted} == wanted
    assert {field: made[field] for field in expected["run"]} == expected["run"]
    assert made["size"].samples * made["updates"] == BUDGETS[name]
    if "prompts" not in expected["run"]:
        assert len(made["prompts"]) == len(set(made["prompts"])) == 45
    text = presets.path_of(name).read_text(encoding="utf-8")
    assert "# Source" in text
    assert "Published:" in text


def test_the_rewards_are_those_that_the_presets_are_called_after():
    named = {name: presets.options(name)["--reward"][1] for name in presets.shipped()}
    assert named == {
        "jpeg": "jpeg-compressibility",
        "aesthetic": "aesthetic",
        "imagereward": "image-reward",
        "pickscore": "pick-score",
    }
    with pytest.raises(ValueError, match=r"reward aesthetic needs .* say --reward-model PLACE"):
        sd15.preset("aesthetic")


def mine(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def taken(path: Path, *words: str) -> Any:
    return read(FAMILY, ["--preset", str(path), "--output", "run", *words])


def test_options_of_the_command_line_win_over_the_preset(tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt,word\na sign,STOP\n")
    path = mine(
        tmp_path,
        'reward = "red"\nprompts = "@prompts.csv"\nguidance = 2\nprogress = false\nwandb = true\n'
        'objective = "grpo"\ngroup = 4\nlora_targets = ["to_q", "to_v"]\nupdates = 7\n'
        'optimiser = "bounded-adamw"\n',
    )
    options = taken(path, "--updates", "9", "--group=8", "--optimiser", "adamw")
    assert (options.updates, options.objective_settings.group) == (9, 8)
    assert options.model.lora_targets == ("to_q", "to_v")
    assert (options.model.guidance, options.options.progress) == (2.0, False)
    assert options.options.wandb is True
    assert options.reward == rewards.Colour("red")
    assert [dict(p.metadata) for p in options.prompts] == [{"word": "STOP"}]
    again = read(FAMILY, [f"--preset={path}", "--output", "run", "--reward", "green"])
    assert type(again.optimiser_settings).__name__ == "BoundedAdamW"
    assert type(options.optimiser_settings).__name__ == "AdamW"
    assert (again.updates, again.reward) == (7, rewards.Colour("green"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("updtes = 3", r"preset .*mine\.toml: there is no option --updtes 3 \(did you mean --upd"),
        ("group = 3", r"preset .*mine\.toml: objective score-as-action has no setting --group 3"),
        ("[size]\nsamples = 3", "size must be text, a number.* side by side, not in tables"),
        ("a-b = 1\na_b = 2", "--a-b is there twice"),
        ("updates = ", "must be TOML in UTF-8: Invalid value"),
    ],
)
def test_what_is_wrong_with_a_preset_is_named(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        taken(mine(tmp_path, text))


def test_a_preset_that_is_not_there_or_beside_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="did you mean 'jpeg'"):
        taken(Path("jpg"))
    with pytest.raises(ValueError, match="leave out --preset"):
        read(FAMILY, ["--resume", str(tmp_path), "--preset", "jpeg"])
    with pytest.raises(ValueError, match="one name or file"):
        read(FAMILY, ["--preset", "--output", "run"])


@pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely
def test_a_preset_runs_on_the_embedded_model_with_smaller_sizes(tmp_path):
    small = (
        "--model tiny --precision float32 --steps 3 --updates 2 --samples 4 --minibatches 2 "
        "--evaluation-samples 4 --no-progress --device cpu --prompts cat dog"
    )
    output = tmp_path / "run"
    assert main(FAMILY, ["--preset", "jpeg", "--output", str(output), *small.split()]) == 0
    stored = json.loads((output / "config.json").read_text())["settings"]
    assert stored["objective"]["clip_per_pixel"] == 1e-4
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2
