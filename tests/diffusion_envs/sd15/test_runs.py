"""Whole runs of the embedded model: ended by signals, resumed, judged as exported."""

import dataclasses
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion_envs import rewards, sd15
from diffusion_envs.models import text_to_image_unet
from diffusion_envs.runs import checkpoint, command_line
from diffusion_envs.runs import finetune as runs
from diffusion_envs.runs.early_stopping import StopRule
from diffusion_envs.runs.exported import load_exported
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.sd15.__main__ import FAMILY
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.sd15.calling import finetune

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

ADAPTER = "pytorch_lora_weights.safetensors"
SMALL: dict[str, Any] = {
    "prompts": ["a photo of a cat", "a photo of a ship"],
    "steps": 2,
    "updates": 3,
    "guidance": 1.0,
    "size": UpdateSize(samples=4, batch=8, value_epochs=1),
    "lora_rank": 1,
    "evaluation_samples": 4,
    "picture_every": 2,
    "checkpoint_every": 50,
    "progress": False,
    "device": "cpu",
}


class Red:
    """Redness, during whose n-th call the machine is told to shut down."""

    def __init__(self, at: int = -1) -> None:
        self.calls, self.at = 0, at

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return rewards.Colour("red")(images, prompts)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finetune(reward=Red(), output=folder, **SMALL)
    return folder


# Calls: one of the pretrained model's evaluation, two an update (images, and denoised ones), and
# one of the pictures after the second update and of the last evaluation. An update is whole when
# its pictures are made, too.
@pytest.mark.parametrize(("at", "kept"), [(1, 0), (2, 0), (5, 1), (6, 1), (8, 2), (9, 3)])
def test_a_signal_at_any_time_loses_no_whole_update(at, kept, whole, tmp_path):
    folder = tmp_path / "cut"
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        finetune(reward=Red(at), output=folder, **SMALL)
    assert signal.getsignal(signal.SIGTERM) is former
    assert not (folder / "run.lock").exists()
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None
    assert found.step == kept
    finetune(reward=Red(), output=folder, resume=True, **SMALL)
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k not in ("seconds", "memory")}
            for line in (each / "metrics.jsonl").read_text().splitlines()
        ]
        for each in (whole, folder)
    ]
    assert lines[0] == lines[1]
    one, other = (load_file(each / ADAPTER) for each in (whole, folder))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_run_from_python_goes_on_and_is_evaluated_by_the_command_line(
    tmp_path, capsys, monkeypatch
):
    """The sequence of the README; an extension that is stopped ends at the extended number."""
    folder = tmp_path / "mine"
    finetune(reward=rewards.Colour("red"), output=folder, **SMALL | {"updates": 1})
    called = rewards.Colour.__call__

    def interrupted(self: Any, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if (folder / "metrics.jsonl").read_text().count("\n") == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return called(self, images, prompts)

    monkeypatch.setattr(rewards.Colour, "__call__", interrupted)
    assert command_line.main(FAMILY, ["--resume", str(folder), "--updates", "4"]) == 130
    monkeypatch.setattr(rewards.Colour, "__call__", called)
    said = capsys.readouterr().err
    assert said.endswith(f"go on with: python -m diffusion_envs.sd15 --resume {folder}\n")
    monkeypatch.chdir(tmp_path)
    assert command_line.main(FAMILY, ["--resume", "mine"]) == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
    words = ["evaluate", "mine", "--steps", "2", "--samples", "4"]
    assert command_line.main(FAMILY, words) == 0


def test_what_is_stopped_before_it_begins_is_not_said_to_go_on(tmp_path, capsys, monkeypatch):
    def load(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sd15.StableDiffusion, "load", load)
    assert command_line.main(FAMILY, ["--output", str(tmp_path / "run"), "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "\nstopped; it had not begun: start it again\n"


def test_a_command_that_is_stopped_while_it_is_read_says_so(tmp_path, capsys, monkeypatch):
    def read(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(command_line, "read", read)
    assert command_line.main(FAMILY, ["--output", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "\nstopped: give the command again\n"


def test_evaluate_judges_what_was_exported_after_a_stop(tmp_path):
    """The rule stops at update 2 and exports update 0, the pretrained model: its gain is 0."""
    folder = tmp_path / "stopped"
    rule = StopRule(z=None, max_path_kl=1e-9, every=2, samples=2)
    run = finetune(reward=rewards.Colour("red"), output=folder, stop=rule, **SMALL)
    assert (run.update, run.reward_gain.mean) == (0, 0.0)
    newest = checkpoint.latest(folder / "checkpoints")
    assert newest is not None
    assert newest.step == 2
    assert any(tensor.abs().max() > 0 for tensor in newest.state["adapter"][1::2])
    words = ["evaluate", str(folder), "--steps", "2", "3", "--samples", "4"]
    assert command_line.main(FAMILY, words) == 0
    rows = json.loads((folder / "transfer.json").read_text())
    assert [row["difference"]["mean"] for row in rows] == [0.0, 0.0]
    assert [path.name for path in (folder / "exported").iterdir()] == ["step-000000"]


def test_the_exported_parameters_are_those_of_the_exported_file(whole):
    model = sd15.StableDiffusion(guidance=1.0, lora_rank=1).load(
        device=torch.device("cpu"), batch=8, seed=3
    )
    assert load_exported(model, whole) == 3
    stored = sorted(load_file(whole / ADAPTER).values(), key=lambda t: t.double().sum().item())
    ours = sorted(model.parameters, key=lambda t: t.double().sum().item())
    assert all(torch.equal(a.float(), b) for a, b in zip(stored, ours, strict=True))


def test_a_run_that_has_exported_nothing_is_not_evaluated(whole, tmp_path, capsys):
    folder = tmp_path / "unfinished"
    with pytest.raises(KeyboardInterrupt):
        finetune(reward=Red(4), output=folder, **SMALL)
    words = ["evaluate", str(folder), "--steps", "2", "--samples", "4"]
    assert command_line.main(FAMILY, [*words, "--reward", "red"]) == 2
    assert "has exported no model yet; let it finish, or resume it" in capsys.readouterr().err


def test_a_reward_of_a_script_is_asked_for_and_another_one_is_noticed(whole, capsys):
    words = ["evaluate", str(whole), "--steps", "2", "--samples", "4"]
    assert command_line.main(FAMILY, words) == 2
    assert "give it with --reward my_module:my_function" in capsys.readouterr().err
    assert command_line.main(FAMILY, ["--resume", str(whole), "--updates", "4"]) == 2
    assert "give it with --reward my_module:my_function" in capsys.readouterr().err
    for command in (words, ["--resume", str(whole)]):
        assert command_line.main(FAMILY, [*command, "--reward", "green"]) == 2
        assert "reward is not the one that this run was started with" in capsys.readouterr().err
    assert command_line.main(FAMILY, [*words, "--reward", "red"]) == 0


def test_an_export_that_fails_leaves_the_checkpoint(tmp_path, monkeypatch):
    def lossy(*_: Any) -> None:
        raise ValueError("loaded back, 0.029 a pixel differs")

    monkeypatch.setattr(text_to_image_unet.TextToImageUNet, "export", lossy)
    with pytest.raises(ValueError, match="loaded back"):
        finetune(reward=rewards.Colour("red"), output=tmp_path / "run", **SMALL)
    found = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.step == 3
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_loaded_model_trains_alike_and_its_run_belongs_to_python(whole, tmp_path, capsys):
    named = sd15.StableDiffusion(guidance=1.0, lora_rank=1)
    model = named.load(device=torch.device("cpu"), batch=8, seed=0)
    of_model = ("guidance", "lora_rank", "device")
    settings = {name: value for name, value in SMALL.items() if name not in of_model}
    names = [f.name for f in dataclasses.fields(RunOptions)]
    options = RunOptions(**{name: settings.pop(name) for name in names if name in settings})
    folder = tmp_path / "loaded"
    runs.finetune(model, reward=Red(), output=folder, options=options, **settings)
    one, other = (load_file(each / ADAPTER) for each in (whole, folder))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert command_line.main(FAMILY, ["--resume", str(folder), "--reward", "red"]) == 2
    assert "resume it where it was started" in capsys.readouterr().err


def test_prompts_of_a_generator_are_used_up_once(tmp_path):
    prompts = (f"a photo of a {name}" for name in ("cat", "ship"))
    few = SMALL | {"updates": 0, "prompts": prompts}
    finetune(reward=rewards.Colour("red"), output=tmp_path / "run", **few)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert stored["prompts"] == ["a photo of a cat", "a photo of a ship"]
