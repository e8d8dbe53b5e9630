"""Runs of all weights, and from an existing LoRA: their start, resumed, exported, evaluated."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from ctrl.noise import normals_by_sample
from diffusion_envs import rewards, samplers
from diffusion_envs.models.trainable import Trainable
from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.command_line import main, read
from diffusion_envs.runs.evaluation import HELD_OUT, evaluate
from diffusion_envs.runs.exported import load_exported
from diffusion_envs.runs.finetune import make_environment
from diffusion_envs.sd15 import StableDiffusion
from diffusion_envs.sd15.__main__ import FAMILY
from diffusion_envs.training.optimisers import AdamW
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.models.small_pipelines import small_pipeline
from tests.diffusion_envs.sd15.calling import finetune
from tests.diffusion_envs.sd15.test_finetune import Interrupted, lines

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

PROMPTS = ["a photo of a cat", "a photo of a ship"]
RUN: dict[str, Any] = {
    "prompts": PROMPTS,
    "updates": 3,
    "steps": 3,
    "guidance": 2.0,
    "evaluation_samples": 4,
    "picture_every": 2,
    "progress": False,
    "device": "cpu",
    "optimiser": AdamW(fused=True),
}
SIZE = UpdateSize(
    samples=4,
    batch=8,
    value_epochs=1,
    average=0.5,
    warm_up=2,
    schedule="linear",
    schedule_updates=4,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small model."""
    folder = tmp_path_factory.mktemp("base")
    small_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """A LoRA of it, in kohya's layout."""
    folder = tmp_path_factory.mktemp("lora")
    unet = small_pipeline().unet.requires_grad_(False)
    attached = Trainable(rank=3, alpha=1.5, targets=["to_q", "to_out.0"]).attach(unet, seed=2)
    generator = torch.Generator().manual_seed(3)
    for parameter in attached.parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    attached.write(folder, lambda network: next(network.parameters()))
    return folder / "lora_kohya.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["offloaded", "lora"])
def test_a_run_starts_at_its_reference_resumes_and_is_what_diffusers_loads(
    what, base, lora, tmp_path
):
    named = {"lora": lora} if what == "lora" else {"trains": "all", "reference": what}
    settings = RUN | {"size": SIZE} | named
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finetune(base, output=whole, reward=Interrupted(at=-1), **settings)
    with pytest.raises(KeyboardInterrupt):  # in the second update, in its warm-up
        finetune(base, output=cut, reward=Interrupted(at=5), **settings)
    finetune(base, output=cut, reward=Interrupted(at=-1), resume=True, **settings)
    log = lines(whole)
    assert lines(cut) == log
    # the same layers have the same numbers; only how many rows a call has may differ, so that
    # scores differ by 1e-6 of their size at most, and the path KL by the square of it
    assert log[0]["path_kl"]["mean"] == pytest.approx(0, abs=1e-9)
    assert [log[0][name] for name in ("ratio_min", "ratio_max")] == pytest.approx([1, 1], abs=1e-3)
    assert log[-1]["path_kl"]["mean"] > 0
    ends = [checkpoint.latest(folder / "checkpoints") for folder in (whole, cut)]
    parts = [end.state[part] for end in ends if end for part in ("adapter", "mean")]
    for one, other in zip(parts[:2], parts[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    pipe = StableDiffusionPipeline.from_pretrained(
        base if what == "lora" else whole / "pipeline", safety_checker=None
    )
    if what == "lora":  # onto the model without the LoRA that it started from
        pipe.load_lora_weights(whole)
    pipe.set_progress_bar_config(disable=True)
    latents = normals_by_sample((4, 8, 8), seed=0, name=(HELD_OUT, "start"), samples=range(2))
    asked = {"guidance_scale": 2.0, "num_inference_steps": 3, "eta": 0.0, "output_type": "pt"}
    theirs = pipe(PROMPTS, latents=latents, **asked).images
    named = StableDiffusion(base, guidance=2.0, device="cpu", **named)
    model = named.load(device=torch.device("cpu"), batch=8, seed=0)
    environment = make_environment(
        model,
        sampler=samplers.DDIM(0.0),
        steps=3,
        reward=rewards.Colour("red"),
        prompts=PROMPTS,
        seed=0,
        batch=8,
    )
    load_exported(model, whole)
    ours = evaluate(environment, 2).images
    # float32 networks called with other batch shapes agree to about 1e-6 a call
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    words = [
        "evaluate",
        str(whole),
        "--steps",
        "2",
        "--samplers",
        "dpm++",
        "--samples",
        "2",
        "--reward",
        "red",
    ]
    assert main(FAMILY, [*words, "--samples", "2"]) == 0
    assert (whole / "transfer.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora-alpha", "-1"], "lora_alpha must be a positive finite number"),
        (["--trains", "all", "--lora-rank", "4"], "lora_rank must be left out where all weights"),
        (["--reference", "offloaded"], "reference must be left out where a LoRA trains"),
        (["--lora", "no-such-lora"], "no-such-lora does not exist"),
        (["--average", "1"], "average must be in"),
        (["--schedule", "cosine"], "schedule_updates must be the number of updates"),
        (
            ["--schedule", "cosine", "--schedule-updates", "3", "--updates", "4"],
            "updates must be at most schedule_updates",
        ),
        (["--optimiser", "adamw-8bit"], "pip install bitsandbytes"),
    ],
)
def test_bad_options_are_refused_by_name(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    output = tmp_path / "run"
    asked = ["--reward", "red", "--prompts", "a cat", "--output", str(output), "--device", "cpu"]
    assert main(FAMILY, [*asked, *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def test_all_weights_have_a_learning_rate_of_their_own_if_none_is_named():
    for words, rate in (
        ([], 3e-3),
        (["--trains", "all"], 1e-5),
        (["--trains=all", "--objective", "ddpo"], 1e-5),
        (["--trains", "all", "--learning-rate", "2e-4"], 2e-4),
    ):
        made = read(FAMILY, ["--reward", "red", "--output", "run", *words])
        assert made.objective_settings.learning_rate == rate, words


def test_a_lora_is_the_same_file_in_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert StableDiffusion(lora="some.safetensors").lora == str(tmp_path / "some.safetensors")
