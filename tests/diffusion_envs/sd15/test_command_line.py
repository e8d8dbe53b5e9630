"""The command line: names become objects, errors name the option, a stopped run goes on."""

import json
from pathlib import Path

import pytest

from diffusion_envs.sd15.__main__ import Finetune, main

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

SMALL = [
    *("--steps", "2", "--updates", "1", "--samples", "2", "--evaluation-samples", "2"),
    *("--lora-rank", "1", "--device", "cpu"),
]


def run(*arguments: str | Path) -> int:
    return main([str(a) for a in arguments])


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
        (["--objective", "score-as-action-released", "--kl-weight", "1"], "kl_weight"),
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


@pytest.mark.parametrize("option", [["--steps", "many"], ["--stepz", "3"]])
def test_options_of_the_wrong_type_are_refused(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--output", tmp_path / "run", *option)
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


def test_every_option_has_a_description(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("--kl-weight", "--train-steps", "--value-learning-rate", "--guidance"):
        assert name in shown
    assert Finetune().model == "tiny"
