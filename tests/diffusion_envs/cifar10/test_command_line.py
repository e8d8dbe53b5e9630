"""The command line of CIFAR-10's networks: the same as Stable Diffusion's, and pretraining."""

import json
from pathlib import Path

import pytest

from diffusion_envs import rewards, samplers
from diffusion_envs.cifar10 import Cifar10Model, pretrain
from diffusion_envs.cifar10.__main__ import FAMILY
from diffusion_envs.runs import command_line
from tests.diffusion_envs.cifar10.few_pictures import write_pictures
from tests.diffusion_envs.models.conftest import save_pixels

__all__ = ["save_pixels"]
pytestmark = pytest.mark.filterwarnings("default")  # diffusers deprecates freely

SMALL = ["--updates", "1", "--samples", "2", "--evaluation-samples", "2", "--device", "cpu"]


def run(*words: str | Path) -> int:
    return command_line.main(FAMILY, [str(word) for word in words])


def read(*words: str) -> command_line.Finetune:
    return command_line.read(FAMILY, ["--output", "run", *words])


def test_options_that_are_left_out_are_the_familys():
    options = read()
    assert options.model == Cifar10Model()
    assert options.reward == rewards.ClassConfidence("reward")
    assert options.prompts == ("a picture",)
    assert dict(options.options.judges) == {"judge": rewards.ClassConfidence("judge")}
    assert options.steps == 20


@pytest.mark.parametrize(
    ("word", "sampler", "steps"),
    [
        ("dxmi-10", samplers.QuadraticVariances(), 10),
        ("dxmi-10-learned", samplers.QuadraticVariances(learned_std=True), 10),
        ("ours-4", samplers.EqualAngles(), 4),
        ("ours-4-learned", samplers.EqualAngles(learned_std=True), 4),
        ("ddim", samplers.DDIM(), 20),
        ("DEISMultistepScheduler", samplers.Scheduler("DEISMultistepScheduler"), 20),
    ],
)
def test_samplers_are_named_and_bring_their_steps(word, sampler, steps):
    assert (read("--sampler", word).sampler, read("--sampler", word).steps) == (sampler, steps)
    assert read("--sampler", word, "--steps", "11").steps == 11


def test_a_run_is_made_longer_and_evaluated(save_pixels, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["--model", save_pixels(), "--reward", "jpeg-compressibility", "--sampler", "ours-4"]
    assert run("finetune", *words, "--objective", "dxmi", "--output", folder, *SMALL) == 0
    assert "exported" in capsys.readouterr().out
    assert (folder / "pipeline" / "model_index.json").is_file()
    assert json.loads((folder / "config.json").read_text())["settings"]["steps"] == 4
    assert run("--resume", folder, "--updates", "2") == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert run("--resume", folder, "--sampler", "dxmi-10") == 2
    assert "sampler" in capsys.readouterr().err
    words = ["--steps", "10", "--samples", "2", "--samplers", "ours-4", "dxmi-10"]
    assert run("evaluate", folder, *words, "PNDMScheduler") == 0
    labels = [row["sampler"] for row in json.loads((folder / "transfer.json").read_text())]
    assert labels == ["equal angles", "DxMI", "PNDM"]


def test_a_scheduler_of_diffusers_trains_what_learns_from_data(save_pixels, tmp_path):
    folder = tmp_path / "run"
    words = ["--model", save_pixels(), "--objective", "nft", "--steps", "2"]
    assert run(*words, "--sampler", "EulerDiscreteScheduler", "--output", folder, *SMALL) == 0
    assert run("--resume", folder, "--updates", "2") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampler", "dxmi"], "did you mean 'dxmi-10'?"),
        (["--sampler", "NoSuchScheduler"], "scheduler of diffusers that takes a table"),
        (["--sampler", "dxmi-10", "--steps", "4"], "alpha-bar 0.343"),
        (["--sampler", "dxmi-10", "--eta", "0.5"], "eta is for the sampler ddim"),
        (["--reward", "class-confidenc"], "did you mean 'class-confidence'?"),
        (["--reward", "prompt-alignment"], "'a picture' must name exactly one"),
        (["--guidance", "2"], "no option --guidance"),
        (["--lora-rank", "0"], "lora_rank must be"),
        (["--model", "./nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_options_are_named(words, message, save_pixels, tmp_path, capsys):
    model = [] if "--model" in words else ["--model", save_pixels()]
    steps = [] if "--steps" in words else ["--steps", "3"]
    assert run(*model, *steps, "--output", tmp_path / "run", *SMALL, *words) == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())


def test_the_run_of_another_family_is_not_resumed(save_pixels, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run("--model", save_pixels(), "--steps", "2", "--output", folder, *SMALL) == 0
    from diffusion_envs.sd15.__main__ import FAMILY as STABLE_DIFFUSION

    assert command_line.main(STABLE_DIFFUSION, ["--resume", str(folder)]) == 2
    assert "resume it where it was started" in capsys.readouterr().err


def test_pretraining_is_a_command(tmp_path, capsys, monkeypatch):
    asked = {}

    def record(data: Path, output: Path, network: str, **settings: object) -> Path:
        asked.update(settings, data=data, output=output, network=network)
        return output / "pipeline"

    monkeypatch.setattr("diffusion_envs.cifar10.__main__.pretrain", record)
    words = ["--data", "pictures", "--output", tmp_path, "--network", "published"]
    words += ["--updates", "7", "--precision", "float32", "--prediction", "epsilon"]
    assert run("pretrain", *words) == 0
    assert f"pipeline: {tmp_path / 'pipeline'}" in capsys.readouterr().out
    assert asked["data"] == Path("pictures")
    assert asked["network"] == "published"
    assert asked["prediction_type"] == "epsilon"
    recipe = asked["recipe"]
    assert (recipe.updates, str(recipe.precision)) == (7, "torch.float32")
    assert (recipe.batch, recipe.learning_rate) == (128, 2e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--network", "large"], "network"),
        (["--updates", "0"], "updates must be"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_of_pretraining_are_named(words, message, tmp_path, capsys):
    data = [] if "--data" in words else ["--data", write_pictures(tmp_path / "data", 4)]
    assert run("pretrain", *data, "--output", tmp_path / "out", *words) == 2
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


def test_recipes_are_those_of_the_networks():
    assert pretrain.RECIPES["published"].updates == 800_000
    assert set(pretrain.RECIPES) == {"small", "published"}
