"""A guidance scale that trains: what it adds, when it is off, and plain diffusers with it."""

import json
import logging

import numpy as np
import pytest
import torch

from diffusion_envs.models.guidance_schedule import GUIDANCE_FILE, UNIT, GuidanceSchedule
from diffusion_envs.models.text_to_image_unet import TextToImageUNet

CAT = ["a photo of a cat"]


def test_it_is_linear_between_knots_and_nothing_at_first():
    schedule = GuidanceSchedule(1000, 4)
    assert not schedule(torch.tensor([0, 333, 999])).any()
    with torch.no_grad():
        schedule.offsets.copy_(torch.tensor([0.0, 0.02, -0.01, 0.03]))
    found = schedule(torch.tensor([0.0, 111.0, 333.0, 499.5, 666.0, 999.0]))
    expected = UNIT * torch.tensor([0.0, 0.02 / 3, 0.02, 0.005, -0.01, 0.03])
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_score_is_that_of_the_scale_at_each_row_and_off_that_of_the_pretrained(guidance):
    model = TextToImageUNet.load(guidance=guidance, lora_rank=0, guidance_knots=2)
    assert [p.shape for p in model.parameters] == [(2,)]
    normals = torch.Generator().manual_seed(0)
    states = torch.randn(3, *model.event, generator=normals)
    timesteps, context = torch.tensor([0, 250, 999]), model.condition(3 * CAT)
    fresh = model(states, timesteps, context)
    with torch.no_grad():
        model.parameters[0].copy_(torch.tensor([0.5, 1.5]) / UNIT)
    spent = model.calls
    trained = model(states, timesteps, context)
    assert model.calls == spent + 6  # two branches a row
    for k, more in enumerate((0.5, 0.5 + 250 / 999, 1.5)):
        fixed = TextToImageUNet.load(guidance=guidance + more)
        one = slice(k, k + 1)
        expected = fixed(states[one], timesteps[one], context[one])
        torch.testing.assert_close(trained[one], expected, rtol=1e-4, atol=1e-4)
    with model.pretrained():
        spent = model.calls
        torch.testing.assert_close(model(states, timesteps, context), fresh, rtol=0, atol=1e-4)
        assert model.calls == spent + (3 if guidance == 1 else 6)
    trained.square().sum().backward()
    gradient = model.parameters[0].grad
    assert gradient is not None
    assert bool((gradient != 0).all())


@pytest.mark.filterwarnings("default")
def test_plain_diffusers_makes_the_same_pictures_with_a_callback(tmp_path):
    model = TextToImageUNet.load(guidance=2.0, lora_rank=0, guidance_knots=3)
    with torch.no_grad():
        model.parameters[0].copy_(torch.tensor([0.3, 2.0, -0.5]) / UNIT)
    assert model.export(tmp_path).name == GUIDANCE_FILE
    steps, pipe = 4, model.pipe
    start = torch.randn(1, *model.event, generator=torch.Generator().manual_seed(1))

    schedule = json.loads((tmp_path / GUIDANCE_FILE).read_text())

    def scale(timestep):
        return float(np.interp(float(timestep), schedule["timestep"], schedule["scale"]))

    def next_scale(pipe, step, timestep, values):
        if step + 1 < pipe.num_timesteps:
            pipe._guidance_scale = scale(pipe.scheduler.timesteps[step + 1])
        return values

    pipe.scheduler.set_timesteps(steps)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        CAT,
        num_inference_steps=steps,
        guidance_scale=scale(pipe.scheduler.timesteps[0]),
        callback_on_step_end=next_scale,
        latents=start.clone(),
        output_type="latent",
    ).images
    context = model.condition(CAT)
    ours = start
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            predicted = model.prediction(ours, timestep.expand(1), context)
            ours = pipe.scheduler.step(predicted, timestep, ours).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    constant = pipe(
        CAT, num_inference_steps=steps, guidance_scale=2.0, latents=start, output_type="latent"
    ).images
    assert (constant - theirs).abs().max() > 0.05


@pytest.mark.filterwarnings("default")
def test_scales_that_diffusers_does_not_use_are_said(tmp_path, caplog):
    model = TextToImageUNet.load(guidance=1.0, lora_rank=2, guidance_knots=2)
    with torch.no_grad():
        model.parameters[-1].copy_(torch.tensor([-0.02, 0.02]))
    with caplog.at_level(logging.WARNING):
        path = model.export(tmp_path)
    assert path.name == "pytorch_lora_weights.safetensors"
    assert json.loads((tmp_path / GUIDANCE_FILE).read_text())["scale"][0] == pytest.approx(0.4)
    assert "trained to 0.4" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_rank": 0}, "lora_rank must be at least 1 where the guidance scale does not train"),
        ({"guidance_knots": 1}, "guidance_knots must be 0"),
        ({"guidance_knots": -2}, "guidance_knots must be 0"),
        ({"guidance_knots": True}, "guidance_knots must be 0"),
        ({"lora_rank": -1, "guidance_knots": 3}, "lora_rank must be an integer of at least 1"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        TextToImageUNet.load(**settings)
