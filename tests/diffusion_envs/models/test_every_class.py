"""Pictures of SD1.x, SD2.x and SDXL are those of plain diffusers, whatever is varied.

Round-off: a float32 network that is called with other batch shapes answers to about 1e-6 of its
size, and a few steps with guidance 2.5 add up to some 1e-6 of a picture. The smallest mistake that
could be made here (another prompt, size or scale of guidance) changes a picture by 0.05 and more.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from torch import Tensor

from ctrl.noise import normals_by_sample
from diffusion_envs.environment import Environment
from diffusion_envs.models.latent_decoder import decode, decoder_precision
from diffusion_envs.models.noise_table import levels_and_prediction
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.rewards import Colour
from diffusion_envs.runs.evaluation import HELD_OUT, evaluate
from diffusion_envs.samplers import DDIM, Sampler, Scheduler
from tests.diffusion_envs.models.small_pipelines import (
    STABLE_DIFFUSION,
    small_2,
    small_pipeline,
    small_xl,
)

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

PROMPTS = ["a photo of a cat", "a ship"]
STEPS = 4
AS_OURS = {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
CLASSES = {
    "sd1": small_pipeline,
    "sd2": small_2,
    "sd2-zero-snr": partial(small_2, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    "xl": small_xl,
    "xl-no-zeros": partial(small_xl, force_zeros_for_empty_prompt=False),
    "xl-one-encoder": partial(
        small_xl, {"cross_attention_dim": 24}, text_encoder=None, tokenizer=None
    ),
    "xl-dpm": partial(
        small_xl,
        scheduler=diffusers.DPMSolverMultistepScheduler(**STABLE_DIFFUSION, steps_offset=0),
    ),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A class by name -> its folder, which is written once."""
    root = tmp_path_factory.mktemp("classes")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            CLASSES[name]().save_pretrained(root / name)
        return root / name

    return folder


def ours(model: TextToImageUNet, sampler: Sampler) -> Tensor:
    bound = sampler.bind(model.table, STEPS, model.prediction_type)
    return evaluate(Environment(model, bound, Colour(), PROMPTS, seed=0), len(PROMPTS)).images


def theirs(folder: Path, event: tuple[int, ...], sampler: Sampler, **settings: Any) -> Tensor:
    """Pictures of the plain pipeline with the same starting noise."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    if isinstance(sampler, DDIM):
        spacing = "trailing" if config.timestep_spacing == "trailing" else "leading"
        pipe.scheduler = DDIMScheduler.from_config(config, **AS_OURS, timestep_spacing=spacing)
    else:
        kind = getattr(diffusers, sampler.name)
        pipe.scheduler = kind.from_config(config, timestep_spacing="trailing")
    latents = normals_by_sample(
        event, seed=0, name=(HELD_OUT, "start"), samples=range(len(PROMPTS))
    )
    if (negative := settings.pop("negative_prompt", None)) is not None:
        settings["negative_prompt"] = [negative] * len(PROMPTS)
    return pipe(
        PROMPTS, latents=latents, num_inference_steps=STEPS, output_type="pt", **settings
    ).images


@pytest.mark.parametrize(
    ("kind", "sampler", "guidance", "negative", "size"),
    [
        ("sd1", DDIM(0.0), 2.5, "a red dog", (8, 24)),
        ("sd1", Scheduler("DPMSolverMultistepScheduler"), 1.0, None, None),
        ("sd2", DDIM(0.0), 1.0, "a red dog", (24, 16)),
        ("sd2", Scheduler("UniPCMultistepScheduler"), 2.5, "a red dog", None),
        ("sd2-zero-snr", DDIM(0.0), 2.5, None, (16, 8)),
        ("xl", DDIM(0.0), 2.5, None, (8, 24)),
        ("xl", DDIM(0.0), 2.5, "", None),
        ("xl", Scheduler("EulerDiscreteScheduler"), 2.5, "a red dog", (24, 16)),
        ("xl", Scheduler("HeunDiscreteScheduler"), 1.0, None, None),
        ("xl-no-zeros", DDIM(0.0), 2.5, None, None),
        ("xl-one-encoder", DDIM(0.0), 2.5, "a red dog", None),
        ("xl-dpm", DDIM(0.0), 1.0, None, (8, 16)),
    ],
)
def test_pictures_are_those_of_the_plain_pipeline(
    folder_of, kind, sampler, guidance, negative, size
):
    folder = folder_of(kind)
    model = TextToImageUNet.load(
        folder, guidance=guidance, negative_prompt=negative, resolution=size
    )
    settings = {} if size is None else {"height": size[0], "width": size[1]}
    expected = theirs(
        folder,
        model.event,
        sampler,
        guidance_scale=guidance,
        negative_prompt=negative,
        **settings,
    )
    torch.testing.assert_close(ours(model, sampler), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05


@pytest.mark.parametrize("kind", ["sd1", "sd2", "xl"])
def test_what_is_varied_shows(folder_of, kind):
    """Or else the agreement above would mean nothing."""
    folder, sampler = folder_of(kind), DDIM(0.0)
    images = [
        ours(TextToImageUNet.load(folder, **settings), sampler)
        for settings in (
            {"guidance": 2.5},
            {"guidance": 1.0},
            {"guidance": 2.5, "negative_prompt": "a red dog"},
        )
    ]
    for k in (1, 2):
        assert (images[k] - images[0]).abs().max() > 0.05
    if kind == "xl":
        model = TextToImageUNet.load(folder, guidance=1.0)
        told = model.condition(PROMPTS)
        assert told.time_ids is not None
        assert told.time_ids.tolist() == 2 * [[16, 16, 0, 0, 16, 16]]
        assert told.pooled is not None
        states = torch.randn(2, *model.event, generator=torch.Generator().manual_seed(0))
        timesteps = torch.tensor([500, 100])
        for other in ({"time_ids": told.time_ids + 8}, {"pooled": told.pooled.flip(0)}):
            gap = model(states, timesteps, told) - model(
                states, timesteps, dataclasses.replace(told, **other)
            )
            assert gap.abs().max() > 0.05


def test_a_view_at_another_guidance_is_a_model_loaded_at_it(folder_of):
    folder, sampler = folder_of("xl"), DDIM(0.0)
    model = TextToImageUNet.load(folder, guidance=1.0, lora_rank=2)
    asked = torch.zeros(2, *model.event), torch.tensor([5, 9]), model.condition(PROMPTS)
    model.prediction(*asked)
    view = model.with_guidance(2.5)
    made = ours(view, sampler)
    loaded = TextToImageUNet.load(folder, guidance=2.5)
    torch.testing.assert_close(made, ours(loaded, sampler), rtol=0, atol=1e-5)
    view.prediction(*asked)
    assert (model.calls, view.calls) == (2, 4)  # evaluation is in no budget
    with torch.no_grad():
        for parameter in view.parameters:
            parameter.add_(0.1)
    assert all(a is b for a, b in zip(model.parameters, view.parameters, strict=True))
    with model.pretrained():  # one switch
        torch.testing.assert_close(ours(view, sampler), made, rtol=0, atol=1e-5)
    assert (ours(view, sampler) - made).abs().max() > 1e-3
    with pytest.raises(ValueError, match="guidance must be"):
        model.with_guidance(0.5)


def test_timesteps_may_be_fractional(folder_of):
    model = TextToImageUNet.load(folder_of("sd1"), guidance=1.0)
    states = torch.randn(1, *model.event, generator=torch.Generator().manual_seed(0))
    told, between = model.condition(PROMPTS[:1]), torch.tensor([400.5])
    whole = model(states, torch.tensor([400]), told)
    torch.testing.assert_close(model(states, torch.tensor([400.0]), told), whole)
    predicted = model.prediction(states, between, told)
    variance = -torch.expm1(model.table.log_alpha_bar_at(between.double()))
    expected = -predicted / variance.sqrt().float()
    torch.testing.assert_close(model(states, between, told), expected, rtol=1e-5, atol=1e-6)
    assert (expected - whole).abs().max() > 1e-3


def test_a_score_and_the_expected_data_say_the_same(folder_of):
    for kind in ("sd1", "sd2"):
        model = TextToImageUNet.load(folder_of(kind), guidance=1.0)
        states = torch.randn(2, *model.event, generator=torch.Generator().manual_seed(0))
        timesteps, told = torch.tensor([80, 600]), model.condition(PROMPTS)
        abar = model.table.alphas_cumprod[timesteps].float().view(-1, 1, 1, 1)
        score = model(states, timesteps, told)
        expected = (states + (1 - abar) * score) / abar.sqrt()
        denoised = model.denoised(states, timesteps, told)
        torch.testing.assert_close(denoised, expected, rtol=1e-4, atol=1e-5)


def test_latents_are_shifted_and_scaled_as_their_decoder_says(folder_of):
    vae = small_pipeline().vae
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.1, -0.3, 0.4, 0.2]), torch.tensor([1.5, 0.7, 2.0, 1.1])
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    wide = (1, -1, 1, 1)
    unscaled = latents * std.view(wide) / vae.config.scaling_factor + mean.view(wide)
    expected = (vae.decode(unscaled).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decode(vae, latents, 1), expected, rtol=0, atol=1e-5)


def test_a_decoder_that_overflows_in_half_precision_stays_in_float32():
    half, single = torch.float16, torch.float32
    assert decoder_precision({"force_upcast": True}, half) == single
    assert decoder_precision({}, half) == single  # as diffusers reads old folders
    assert decoder_precision({"force_upcast": False}, half) == half  # the fixed decoder
    assert decoder_precision({"force_upcast": True}, torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"unet": {"projection_class_embeddings_input_dim": 20 + 5 * 8}}, "is the refiner"),
        ({"unet": {"addition_embed_type": None}}, "addition_embed_type None.*six sizes"),
        ({"unet": {"cross_attention_dim": 24}}, "width 24, but its text encoders make .* 40"),
        ({"unet": {"class_embed_type": "timestep"}}, "reads a class .*supported are"),
        ({"unet": {"encoder_hid_dim_type": "ip_image_proj"}}, "reads an image embedding"),
        ({"unet": {"in_channels": 9}}, "9 input channels .*inpainting"),
        ({"text_encoder_2": {"projection_dim": 21}}, "pooled embedding and sizes of width 68"),
        ({"vae": {"latent_channels": 16}}, "for latents of 16"),
        ({"index": {"text_encoder_2": [None, None]}}, "has no text_encoder_2"),
        ({"index": {"_class_name": "StableDiffusionXLImg2ImgPipeline"}}, "refiner .*base model"),
        ({"index": {"_class_name": "StableDiffusionInpaintPipeline"}}, "mask"),
        ({"index": {"_class_name": "StableDiffusionXLControlNetPipeline"}}, "control picture"),
        ({"index": {"_class_name": "StableDiffusion3Pipeline"}}, "transformer"),
        ({"index": {"_class_name": "FluxPipeline"}}, "transformer"),
        ({"index": {"unet": ["diffusers", "UNetMotionModel"]}}, "UNetMotionModel as unet"),
        ({"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}}, "no table of alphas"),
        ({"scheduler": {"_class_name": "EDMEulerScheduler"}}, "no table of alphas"),
        ({"scheduler": {"_class_name": "NoScheduler"}}, "'NoScheduler', which diffusers does not"),
        ({"unet": {"sample_size": None}}, "names no size .*set resolution"),
    ],
)
def test_what_cannot_be_used_is_refused_before_weights_are_read(tmp_path, settings, words):
    """There are none here."""
    write_settings(tmp_path, settings)
    with pytest.raises(ValueError, match=words):
        TextToImageUNet.load(tmp_path)


@pytest.mark.parametrize("resolution", [(16, 7), 0, (-8, 8), 5])
def test_sizes_that_the_decoder_does_not_make_are_refused_before_weights_are_read(
    tmp_path, resolution
):
    write_settings(tmp_path, {})
    with pytest.raises(ValueError, match="resolution must be a positive multiple of 2"):
        TextToImageUNet.load(tmp_path, resolution=resolution)


def write_settings(folder: Path, changes: dict[str, dict[str, Any]]) -> None:
    """A folder of SDXL with settings and empty files of weights."""
    pipe = small_xl(scheduler=EulerDiscreteScheduler(**STABLE_DIFFUSION))
    index = {name: list(part) for name, part in pipe.config.items() if isinstance(part, tuple)}
    parts = {
        "index": {"_class_name": "StableDiffusionXLPipeline", **index},
        "scheduler": {"_class_name": "EulerDiscreteScheduler", **STABLE_DIFFUSION},
        "unet": dict(pipe.unet.config),
        "vae": dict(pipe.vae.config),
        "text_encoder": pipe.text_encoder.config.to_dict(),
        "text_encoder_2": pipe.text_encoder_2.config.to_dict(),
    }
    files = {"index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
    for name, settings in parts.items():
        path = folder / files.get(name, f"{name}/config.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(settings | changes.get(name, {})))
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir()
    for name, file in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        (folder / name / f"{file}.safetensors").touch()
    for name in ("text_encoder", "text_encoder_2"):
        (folder / name / "model.safetensors").touch()


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (DDIMScheduler(**STABLE_DIFFUSION, **AS_OURS), None),
        (DDIMScheduler(**STABLE_DIFFUSION), "set_alpha_to_one false, steps_offset 1, clip_sample"),
        (EulerDiscreteScheduler(**STABLE_DIFFUSION), "DDIM on the noise levels of its EulerDis"),
        (diffusers.PNDMScheduler(**STABLE_DIFFUSION, steps_offset=1), None),
    ],
)
def test_what_our_sampler_does_otherwise_than_the_folders_is_said_once(
    scheduler, words, caplog, request
):
    for _ in range(2):
        levels_and_prediction(request.node.name, scheduler)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (words is not None)
    assert words is None or words in said[0]
