"""Runs of SD1.x, SD2.x and SDXL: two updates, a stop, an export, other samplers."""

import json
from pathlib import Path

import jaxtyping
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from ctrl.noise import normals_by_sample
from diffusion_envs.rewards import Colour
from diffusion_envs.runs.command_line import main
from diffusion_envs.runs.evaluation import HELD_OUT, evaluate
from diffusion_envs.runs.exported import load_exported
from diffusion_envs.runs.finetune import make_environment
from diffusion_envs.runs.run_folder import read_settings
from diffusion_envs.samplers import DDIM
from diffusion_envs.sd15 import StableDiffusion
from diffusion_envs.sd15.__main__ import FAMILY
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.models.small_pipelines import small_2, small_pipeline, small_xl
from tests.diffusion_envs.sd15.calling import finetune

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

PROMPTS = ["a photo of a cat", "a ship"]
AS_OURS = {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
MODEL = {"guidance": 2.0, "negative_prompt": "a red dog", "resolution": (8, 24), "lora_rank": 2}
SETTINGS = {
    **MODEL,
    "reward": Colour("red"),
    "prompts": PROMPTS,
    "steps": 3,
    "size": UpdateSize(samples=4, batch=8, value_epochs=1),
    "evaluation_samples": 2,
    "picture_every": 2,
    "progress": False,
}
CLASSES = {"sd1": small_pipeline, "sd2": small_2, "xl": small_xl}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_a_run_resumes_and_plain_diffusers_makes_what_it_exports(tmp_path, kind):
    folder, run = tmp_path / "model", tmp_path / "run"
    CLASSES[kind]().save_pretrained(folder)
    whole = finetune(folder, output=tmp_path / "whole", updates=2, **SETTINGS)
    finetune(folder, output=run, updates=1, **SETTINGS)
    done = finetune(folder, output=run, updates=2, resume=True, **SETTINGS)
    files = [made.folder / "pytorch_lora_weights.safetensors" for made in (whole, done)]
    assert files[0].read_bytes() == files[1].read_bytes()  # as if it had not stopped

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, **AS_OURS, timestep_spacing="leading"
    )
    model = StableDiffusion(folder, **MODEL).load(device=torch.device("cpu"), batch=8, seed=0)
    latents = normals_by_sample(model.event, seed=0, name=(HELD_OUT, "start"), samples=range(2))
    settings = {
        "latents": latents,
        "negative_prompt": ["a red dog"] * 2,
        "height": 8,
        "width": 24,
        "guidance_scale": 2.0,
        "num_inference_steps": 3,
        "output_type": "pt",
    }
    pipe.load_lora_weights(str(run))
    theirs = pipe(PROMPTS, **settings).images
    environment = make_environment(
        model, sampler=DDIM(0.0), steps=3, reward=Colour("red"), prompts=PROMPTS, seed=0
    )
    untouched = evaluate(environment, 2).images
    load_exported(model, run)
    ours = evaluate(environment, 2).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - untouched).abs().max() > 1e-3  # ten times what agrees

    words = ["evaluate", run, "--steps", "2", "5", "--samplers", "ddim", "dpm++", "--samples", "2"]
    assert main(FAMILY, [str(word) for word in words]) == 0
    rows = json.loads((run / "transfer.json").read_text())
    assert [row["steps"] for row in rows] == [2, 5, 2, 5]
    assert len({row["sampler"] for row in rows}) == 2


def test_a_run_may_start_where_no_signal_is_left(tmp_path):
    small_2(**ZERO_SNR).save_pretrained(tmp_path / "model")
    run = finetune(tmp_path / "model", output=tmp_path / "run", updates=2, **SETTINGS)
    log = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert log[0]["path_kl"]["mean"] == pytest.approx(0, abs=1e-6)  # a fresh adapter
    assert 0 < log[1]["path_kl"]["mean"] < 100


def test_resolution_may_be_two_words_of_the_command_line(tmp_path: Path):
    words = f"--output {tmp_path / 'run'} --resolution 32 64 --updates 1 --samples 2 --steps 2"
    words += " --evaluation-samples 2 --guidance 1 --reward red --prompts cat --no-progress"
    assert main(FAMILY, words.split()) == 0
    stored = read_settings(tmp_path / "run")
    assert stored["model"]["resolution"] == [32, 64]
    assert main(FAMILY, ["--resume", str(tmp_path / "run"), "--updates", "2"]) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"resolution": (512,)}, "resolution must be"),
        ({"resolution": (512, 512, 3)}, "resolution must be"),
        ({"resolution": 512.0}, "resolution must be"),
        ({"resolution": True}, "resolution must be"),
        ({"resolution": (0, 64)}, "resolution must be"),
        ({"guidance": 0.5}, "guidance must be .*at least 1"),
        ({"negative_prompt": 3}, "negative_prompt must be"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(settings, words, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    with pytest.raises((ValueError, TypeError), match=words):
        StableDiffusion("nowhere", **settings)
