"""Resuming by the command line: what is the run's, what may grow, what is refused by name."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_envs import objectives, rewards, samplers
from diffusion_envs.preferences import Recorded
from diffusion_envs.runs import command_line
from diffusion_envs.runs.command_line import CLASS_PROMPTS, Family, read
from diffusion_envs.runs.early_stopping import StopRule
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.run_folder import open_run
from diffusion_envs.runs.settings import describe
from diffusion_envs.sd15 import StableDiffusion
from diffusion_envs.sd15.__main__ import FAMILY
from diffusion_envs.training.kl_controller import TargetKL
from diffusion_envs.training.optimisers import NaturalGradient
from diffusion_envs.training.update_size import UpdateSize

RUN: dict[str, Any] = {  # as Python may start one, with defaults nowhere
    "model": StableDiffusion(guidance=1.0, lora_rank=2, device="cpu"),
    "reward": rewards.Colour("red"),
    "prompts": ("a photo of a cat", "a page of notes.txt"),
    "objective": objectives.GRPO(group=2, clip=0.3),
    "optimiser": NaturalGradient(nats=0.03, iterations=3),
    "sampler": samplers.DDIM(0.7),
    "steps": 3,
    "updates": 2,
    "size": UpdateSize(samples=4, batch=8),
    "options": RunOptions(
        evaluation_samples=4,
        judges={"blue": rewards.Colour("blue")},
        target_kl=TargetKL(0.5),
        stop=StopRule(z=2.5, max_path_kl=3.0, every=4, samples=4),
    ),
    "seed": 5,
}


def start(folder: Path, **change: Any) -> Path:
    """The folder of a run that has been started, without training one."""
    with open_run(folder, {k: describe(v) for k, v in (RUN | change).items()}, resume=False):
        return folder


def resumed(folder: Path, *words: str) -> dict[str, Any]:
    """The arguments that ``finetune`` gets."""
    arguments = read(FAMILY, ["--resume", str(folder), *words]).arguments()
    assert arguments.pop("output") == folder
    return arguments


def test_a_run_started_from_python_is_resumed_with_all_its_settings(tmp_path):
    assert resumed(start(tmp_path)) == RUN


def test_a_run_of_before_there_were_other_optimisers_is_one_of_adamw(tmp_path):
    assert resumed(start(tmp_path / "none", optimiser=None))["optimiser"] is None
    folder = start(tmp_path / "before", optimiser=None)
    stored = json.loads((folder / "config.json").read_text())
    del stored["settings"]["optimiser"], stored["sha256"]
    (folder / "config.json").write_text(json.dumps(stored))
    assert resumed(folder)["optimiser"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"objective": objectives.DiffusionNFT(), "sampler": samplers.DDIM(0.0)},
        {
            "objective": objectives.DiffusionNFT(),
            "sampler": samplers.Scheduler("UniPCMultistepScheduler", (("solver_order", 3),)),
        },
        {"options": RunOptions(), "prompts": CLASS_PROMPTS},
        {"objective": objectives.D3PO(), "options": RunOptions(preference=Recorded("c.jsonl"))},
    ],
)
def test_other_runs_too(change, tmp_path):
    assert resumed(start(tmp_path, **change)) == RUN | change


def test_what_equals_a_default_counts_as_said(tmp_path):
    """50 updates and a guidance of 3.0 are the defaults of a run that is not resumed."""
    folder = start(tmp_path)
    assert resumed(folder, "--updates", "50")["updates"] == 50
    with pytest.raises(ValueError, match=r"leave out --guidance 3\.0 \(it has 1\.0\)"):
        resumed(folder, "--guidance", "3.0")


SAME = (
    "--guidance 1 --steps 3 --updates 2 --reward red --group 2 --eta 0.7 --samples 4 --stop-z 2.5"
)
SAME += " --objective grpo --seed 5 --target-kl 0.5 --stop-every 4 --judges blue=blue"


@pytest.mark.parametrize("words", [SAME.split(), ["--steps=3"], ["--lora_rank", "2"]])
def test_options_that_are_the_runs_are_fine(words, tmp_path):
    assert resumed(start(tmp_path), *words) == RUN


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--updates 1", r"--updates 1 \(it has 2\); updates may grow only"),
        ("--steps 20", r"--steps 20 \(it has 3\)"),
        ("--steps=20", r"--steps 20 \(it has 3\)"),
        ("--samples 32", r"--samples 32 \(it has 4\)"),
        ("--lora-targets to_q", "--lora-targets to_q"),
        ("--clip 0.5 --group 4", r"--clip 0\.5 \(it has 0\.3\), --group 4 \(it has 2\)"),
        ("--objective ddpo", "--objective ddpo"),
        ("--reward green", r"--reward green \(it has red\)"),
        ("--reward jpeg-compressibility", "--reward jpeg-compressibility"),
        ("--prompts dogs", "--prompts dogs"),
        ("--eta 1", "--eta 1"),
        ("--sampler dpm++", "--sampler dpm"),
        ("--stop-z 3.5", r"--stop-z 3\.5 \(it has 2\.5\)"),
        ("--stop-path-kl 5", r"--stop-path-kl 5 \(it has 3\.0\)"),
        ("--target-kl 0.7", r"--target-kl 0\.7 \(it has 0\.5\)"),
        ("--judges blue=green", "--judges blue=green"),
        ("--picture-every 3", "--picture-every 3"),
        ("--output elsewhere", "--output elsewhere"),
        ("--preferences other.jsonl", "--preferences other.jsonl"),
    ],
)
def test_options_that_are_not_the_runs_are_refused_by_name(words, named, tmp_path):
    with pytest.raises(ValueError, match=f"leave out .*{named}"):
        resumed(start(tmp_path), *words.split())


def test_an_option_that_is_refused_is_named_once(tmp_path):
    with pytest.raises(ValueError, match="leave out") as refused:
        resumed(start(tmp_path), "--model", "words", "--eta", "0.3")
    said = str(refused.value).partition("leave out ")[2]
    assert said == "--model words (it has tiny), --eta 0.3 (it has 0.7)"


def test_where_and_how_loud_may_be_chosen_anew(tmp_path):
    folder = start(tmp_path, model=StableDiffusion(guidance=1.0, lora_rank=2, device="cuda"))
    arguments = resumed(folder, "--device", "cpu", "--no-progress", "--wandb")
    assert arguments["model"] == RUN["model"]
    assert not arguments["options"].progress
    assert arguments["options"].wandb


class Nameless:
    """Nobody knows how it was made."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        return torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "option", "word"),
    [
        ({"reward": lambda images, prompts: 0}, "--reward my_module:my_function", "--reward red"),
        (
            {"options": dataclasses.replace(RUN["options"], judges={"mine": Nameless()})},
            "--judges mine=my_module:my_function",
            "--judges mine=green",
        ),
        (
            {
                "objective": objectives.D3PO(),
                "options": dataclasses.replace(RUN["options"], preference=Nameless()),
            },
            "--preferences my_module:my_function",
            "--preferences torch:relu",
        ),
    ],
    ids=["reward", "judge", "preference"],
)
def test_what_has_no_name_is_asked_for_by_the_option_that_gives_it(change, option, word, tmp_path):
    folder = start(tmp_path, **change)
    with pytest.raises(ValueError, match=f"cannot|no name.* give it with {option}"):
        resumed(folder)
    assert resumed(folder, *word.split())["steps"] == 3


def test_an_objective_without_a_name_is_asked_for(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Local(objectives.GRPO):
        """A class inside a function."""

    folder = start(tmp_path, objective=Local(group=2))
    with pytest.raises(ValueError, match=r"no name.* give it with --objective my_mod"):
        resumed(folder)
    arguments = resumed(folder, "--objective", "grpo", "--group", "2")
    assert arguments["objective"] == objectives.GRPO(group=2)


def test_a_run_of_another_family_is_refused(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Other:
        """A model of another family."""

    with pytest.raises(ValueError, match="holds a run of StableDiffusion, and other is for Other"):
        read(Family("other", Other), ["--resume", str(start(tmp_path))])


@pytest.mark.parametrize(
    "words", [["--reward", "red", "--reward", "green"], ["--steps=2", "--steps=3"]]
)
def test_an_option_that_stands_twice_is_refused(words):
    with pytest.raises(ValueError, match=f"{words[0].partition('=')[0]} stands .* twice"):
        read(FAMILY, ["--output", "run", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ema 0.9", r"there is no option --ema 0.9 \(did you mean --eta\?\)"),
        ("--learnin-rate 1", r"there is no option .*did you mean --learning-rate\?"),
        ("--objective ddpo --group 3", "objective ddpo has no setting --group 3"),
        ("--eta 0.5 --sampler dpm++", "eta is for the sampler ddim"),
        ("--judges red", "NAME=REWARD, got 'red'"),
        ("--judges a=nothing", "judge must be one of"),
        ("--objective nowhere:Mine", "objective 'nowhere:Mine': cannot import nowhere"),
        ("--preferences nowhere:mine", "preferences 'nowhere:mine': cannot import nowhere"),
    ],
)
def test_what_is_wrong_is_said(words, message, capsys):
    try:
        read(FAMILY, ["--output", "run", *words.split()]).arguments()
    except (ValueError, SystemExit) as error:
        shown = capsys.readouterr()
        said = " ".join((str(error) + shown.out + shown.err).replace("│", " ").split())
        assert re.search(message, said), said
    else:
        pytest.fail("nothing was refused")


def test_prompts_come_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("one\ntwo\n")
    Path("mine.json").write_text(json.dumps(["one", "two"]))
    for word in ("mine.txt", "@mine.txt", "mine.json"):
        options = read(FAMILY, ["--output", "run", "--prompts", word])
        assert options.arguments()["prompts"] == ("one", "two")


def test_the_judge_of_the_default_reward_is_there_unless_others_are_named():
    def judges(*words: str) -> Any:
        return read(FAMILY, ["--output", "run", *words]).arguments()["options"].judges

    assert judges() == {"judge": rewards.PromptAlignment("judge")}
    assert judges("--reward", "red") == {}
    assert judges("--judges", "a=red", "b=blue") == {
        "a": rewards.Colour("red"),
        "b": rewards.Colour("blue"),
    }


def test_the_device_that_is_asked_for_is_passed_on_or_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = ["--output", str(tmp_path / "run"), "--device", "cuda"]
    assert command_line.main(FAMILY, small) == 2
    assert "device 'cuda' is not there" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    folder = start(tmp_path / "made")
    assert command_line.main(FAMILY, ["evaluate", str(folder), "--device", "cuda"]) == 2
    assert "device 'cuda' is not there" in capsys.readouterr().err
