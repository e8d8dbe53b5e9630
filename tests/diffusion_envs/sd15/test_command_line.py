"""The command line: names become objects, errors name the option, a stopped run goes on."""

import dataclasses
import itertools
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from diffusion_envs import objectives
from diffusion_envs.objectives import NearTarget
from diffusion_envs.rewards import __main__ as getters
from diffusion_envs.rewards import serve
from diffusion_envs.runs import command_line
from diffusion_envs.runs.command_line import OBJECTIVES, OPTIMISERS, Finetune
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.sd15 import StableDiffusion
from diffusion_envs.sd15.__main__ import FAMILY
from diffusion_envs.training.update_size import UpdateSize

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

SMALL = [
    *("--steps", "2", "--updates", "1", "--samples", "2", "--evaluation-samples", "2"),
    *("--lora-rank", "1", "--device", "cpu"),
]


def run(*arguments: str | Path) -> int:
    return command_line.main(FAMILY, once([str(a) for a in arguments]))


def once(words: list[str]) -> list[str]:
    """The last of an option's values only: on a command line it may stand once."""
    flags = [k for k, word in enumerate(words) if word.startswith("--")] + [len(words)]
    pieces = {words[a]: words[a:b] for a, b in itertools.pairwise(flags)}
    return words[: flags[0]] + [word for piece in pieces.values() for word in piece]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "jpeg-compresibility"], "jpeg-compressibility"),
        (["--reward", "no_such_module:f"], "no_such_module"),
        (["--reward", "math:no_such_function"], "no_such_function"),
        (["--objective", "score-as-acton"], "score-as-action"),
        (["--eta", "0"], "density"),
        (["--eta", "1.5"], "eta"),
        (["--steps", "0"], "steps"),
        (["--samples", "0"], "samples"),
        (["--kl-weight", "-1"], "kl_weight"),
        (["--target-kl", "0"], "nats"),
        (["--objective", "score-as-action-released", "--target-kl", "1"], "kl_weight"),
        (["--reward", "red", "--stop-z", "3"], "judge"),
        (["--stop-z", "-1"], "z must"),
        (["--stop-path-kl", "1", "--stop-every", "0"], "every"),
        (["--objective", "score-as-action-released", "--kl-weight", "1"], "--kl-weight 1;"),
        (["--objective", "grpo", "--gae-rate", "1"], "--gae-rate 1; its settings are --learning"),
        (["--objective", "grpo", "--gruop", "4"], "did you mean --group?"),
        (["--objective", "grpo", "--group", "1"], "group must be at least 2"),
        (["--objective", "grpo", "--group", "x"], "--group"),
        (["--objective", "distributional", "--first-variation", "far:1"], "near:REWARD"),
        (["--evaluation-sample", "3"], "did you mean --evaluation-samples?"),
        (["--optimiser", "adam"], "adamw"),
        (["--nats", "0.1"], "optimiser adamw has no setting --nats 0.1; it is one of bounded"),
        (["--optimiser", "natural-gradient", "--nats", "0"], "nats must be a positive finite"),
        (["--average", "1"], "average must be in [0, 1)"),
        (["--model", "./nowhere"], "nowhere"),
        (["--prompts", ""], "prompts"),
        (["--prompts", "a photo of a dragon"], "dragon"),
    ],
)
def test_bad_options_are_named(arguments, message, tmp_path, capsys):
    assert run("--output", tmp_path / "run", *SMALL, *arguments) == 2
    assert message in capsys.readouterr().err


def test_output_is_needed(capsys):
    assert run(*SMALL) == 2
    assert "output" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [["--steps", "many"], ["--stepz", "3"], ["--clip", "wide"], ["--clip"], ["stray"]]
)
def test_options_of_the_wrong_type_are_refused(option, tmp_path, capsys):
    assert run("--output", tmp_path / "run", *option) == 2
    captured = capsys.readouterr()
    assert option[0].strip("-") in captured.out + captured.err


def test_a_run_can_be_made_longer_and_evaluated(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run("--output", folder, "--reward", "red", *SMALL) == 0
    assert run("--output", folder, "--reward", "red", *SMALL) == 2  # holds another run
    assert "--resume" in capsys.readouterr().err
    assert run("--resume", folder, "--updates", "3") == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert run("--resume", folder, "--steps", "7") == 2
    assert "steps" in capsys.readouterr().err
    assert run("evaluate", folder, "--steps", "2", "3", "--samples", "2") == 0
    assert [row["steps"] for row in json.loads((folder / "transfer.json").read_text())] == [2, 3]
    assert run("evaluate", folder, "--samplers", "dim", "--samples", "2") == 2
    assert "ddim" in capsys.readouterr().err


def test_a_run_that_goes_too_far_is_stopped_and_stays_stopped(tmp_path, capsys):
    folder = tmp_path / "run"
    limits = ["--stop-path-kl", "1e-9", "--stop-every", "1", "--target-kl", "1", "--updates", "3"]
    assert run("--output", folder, "--reward", "red", *SMALL, *limits) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "stopped: the path KL" in said
    assert "exported: the model of update 0" in said
    assert run("--resume", folder, "--updates", "5") == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert json.loads((folder / "summary.json").read_text())["stop"]["update"] == 1


def test_a_truncated_checkpoint_is_passed_over(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run("--output", folder, "--reward", "red", *SMALL) == 0
    assert run("--resume", folder, "--updates", "2") == 0
    newest = folder / "checkpoints" / "step-000002" / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert run("--resume", folder, "--updates", "2") == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    for step in folder.glob("checkpoints/step-*"):
        (step / "manifest.json").write_text("{")
    assert run("--resume", folder, "--updates", "2") == 2
    assert "manifest.json" in capsys.readouterr().err


def test_every_option_has_a_description(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")  # one column: two would run into one another
    assert run("--help") == 0
    shown = capsys.readouterr().out.partition("Every objective")[0]
    structs = ("model", "size", "options", "stop", "objective_settings", "optimiser_settings")
    names = [f.name for f in dataclasses.fields(Finetune) if f.name not in structs]
    for kind in (UpdateSize, StableDiffusion, RunOptions):
        names += [f.name for f in dataclasses.fields(kind) if f.name not in ("stop", "preference")]
    for name in (*names, "preferences", "stop_z", "stop_path_kl", "stop_every"):
        flag = "--" + name.replace("_", "-")
        found = re.search(rf"{flag}[ ,](.*?)\(default: ", shown, re.DOTALL)
        assert found, f"{flag} is not listed"
        said = re.sub(r"\{.*?\}|--[a-z-]+", "", found[1])  # choices, and the flag that says no
        assert re.search("[a-z]{3}", said), f"{flag} has no help"


@pytest.mark.parametrize(
    ("module", "words", "names"),
    [
        ("sd15", ["evaluate"], ["RUN"]),
        ("sd15", ["export"], ["RUN"]),
        ("rewards", ["fetch"], ["NAME"]),
        ("rewards", ["convert"], ["NAME", "SOURCE", "FOLDER"]),
        ("rewards.serve", [], ["REWARD"]),
    ],
)
def test_what_stands_without_a_flag_has_a_name_of_its_own(
    module, words, names, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    program = f"python -m diffusion_envs.{module}"
    mains = {"sd15": run, "rewards": lambda *a: getters.main(a), "rewards.serve": served}
    assert mains[module](*words, "--help") == 0
    usage, _, rest = capsys.readouterr().out.partition("\n")
    assert usage.startswith(" ".join(["usage:", program, *words]))
    assert [word for word in usage.split() if word in ("STR", "PATH", *names)] == names
    listed = rest.partition("positional arguments")[2].partition("options")[0]
    assert re.findall(r"^\W+([A-Z]+) ", listed, re.MULTILINE) == names


def served(*words: str) -> int:
    """The command that serves a reward, of which help is an exit."""
    with pytest.raises(SystemExit) as ended:
        serve.main(words)
    return int(ended.value.code or 0)


@pytest.mark.parametrize("begun", [True, False])
def test_the_command_that_goes_on_can_be_pasted(begun, tmp_path, capsys, monkeypatch):
    def interrupted(**_: Any) -> Any:
        raise KeyboardInterrupt

    folder = tmp_path / "my run"
    monkeypatch.setattr(command_line, "finetune", interrupted)
    if begun:
        folder.mkdir()
        (folder / "config.json").touch()
    assert run("--output", folder, "--reward", "red", *SMALL) == 130
    said = capsys.readouterr().err.strip()
    if not begun:
        assert said == "stopped; it had not begun: start it again"
        return
    start = "stopped; go on with: python -m diffusion_envs.sd15 "
    assert said.startswith(start)
    assert shlex.split(said.removeprefix(start)) == ["--resume", str(folder)]


def options(*arguments: str) -> objectives.Objective:
    return command_line.read(FAMILY, ["--output", "run", *arguments]).objective_settings


def another(value: Any) -> Any:
    """A value of the same type as a setting's default."""
    if value is None:
        return 0.25
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return 0.75 if value == math.inf or value == 0 else 0.9 * value


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_setting_of_every_objective_can_be_given(name):
    kind = OBJECTIVES[name]
    assert options("--objective", name) == kind()
    assert options("--updates", "3", "--objective", name, "--steps", "7") == kind()
    for field in dataclasses.fields(kind):
        if field.name == "first_variation":
            value, words = NearTarget(5.5), ["--first-variation", "near:5.5"]
        elif field.name == "advantage":
            value, words = "parts", ["--advantage", "parts"]
        else:
            value = another(getattr(kind(), field.name))
            flag = field.name.replace("_", "-")
            no = "no-" if value is False else ""
            words = [f"--{no}{flag}", *([] if isinstance(value, bool) else [repr(value)])]
        changed = options("--updates", "3", *words, "--objective", name, "--epochs", "2")
        assert changed == dataclasses.replace(kind(), **{field.name: value})


def test_no_setting_of_an_objective_is_an_option_of_every_run():
    kinds = (Finetune, UpdateSize, StableDiffusion, RunOptions)
    common = {f.name for kind in kinds for f in dataclasses.fields(kind)}
    steps = {f.name for kind in OPTIMISERS.values() for f in dataclasses.fields(kind)}
    assert not common & steps
    for kind in OBJECTIVES.values():
        assert not (common | steps) & {f.name for f in dataclasses.fields(kind)}


def test_every_setting_of_every_optimiser_can_be_given():
    for name, kind in OPTIMISERS.items():
        for field in dataclasses.fields(kind):
            value = another(getattr(kind(), field.name))
            no = "no-" if value is False else ""
            flag = f"--{no}{field.name}"
            words = [flag, *([] if isinstance(value, bool) else [repr(value)])]
            words = ["--output", "run", "--optimiser", name, *words]
            made = command_line.read(FAMILY, words).arguments()["optimiser"]
            assert made == dataclasses.replace(kind(), **{field.name: value})
    assert command_line.read(FAMILY, ["--output", "run"]).arguments()["optimiser"] is None


@pytest.mark.parametrize("name", OBJECTIVES)
def test_help_explains_every_setting_of_the_objective(name, capsys, monkeypatch):
    monkeypatch.setattr(
        command_line, "OBJECTIVES", {name: OBJECTIVES[name]}
    )  # only its own in a list
    monkeypatch.setenv("COLUMNS", "100")  # one column, so that explanations are not interleaved
    assert run("--objective", name, "--help") == 0
    shown = capsys.readouterr().out
    explained, _, listed = shown.partition("objective-settings")[2].partition("Every objective")
    assert "pyright" not in explained
    for field in dataclasses.fields(OBJECTIVES[name]):
        flag = "--" + field.name.replace("_", "-")
        assert flag in listed
        said = explained[explained.index(flag) :].partition("(default:")
        assert re.search("[a-z]{3}", said[0].removeprefix(flag)), f"{name} {flag} has no help"


def test_help_lists_every_objective(capsys):
    assert run("--help") == 0
    listed = capsys.readouterr().out.partition("Every objective")[2]
    assert all(f" {name} " in listed for name in OBJECTIVES)


@pytest.mark.parametrize(
    "settings",
    [
        ["--objective", "dxmi-continuous", "--gain-clip", "inf", "--kl-weight", "0.5"],
        ["--objective", "distributional", "--first-variation", "near:0.5", "--draws", "2"],
    ],
)
def test_a_run_goes_on_with_the_settings_of_its_objective(settings, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run("--output", folder, "--reward", "red", *SMALL, *settings) == 0
    assert run("--resume", folder, "--learning-rate", "0.5") == 2
    assert "leave out --learning-rate 0.5" in capsys.readouterr().err
    assert run("--resume", folder, "--updates", "2") == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    stored = json.loads((folder / "config.json").read_text())
    again = command_line.rebuild(stored["settings"])["objective"]
    assert again == options(*settings)


def test_evaluation_prompts_are_words_or_a_file_and_part_of_the_run(tmp_path):
    (tmp_path / "held-out.txt").write_text("a dog\na truck\n")
    words = ["--output", "run", "--evaluation-prompts"]
    from_file = command_line.read(FAMILY, [*words, str(tmp_path / "held-out.txt")])
    said = command_line.read(FAMILY, [*words, "a dog", "a truck"])
    assert from_file.options.evaluation_prompts == ("a dog", "a truck")
    assert said.arguments()["options"] == from_file.arguments()["options"]
    assert command_line.read(FAMILY, ["--output", "run"]).options.evaluation_prompts is None
