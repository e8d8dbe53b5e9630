"""Folders of text-to-image models: loaded as plain diffusers does, or refused by name."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctrl.noise import normals_by_sample
from diffusion_envs.environment import Environment
from diffusion_envs.models.folders import tiny_folder
from diffusion_envs.models.protocol import Model
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.rewards import Colour
from diffusion_envs.runs.evaluation import HELD_OUT, evaluate
from diffusion_envs.samplers import DDIM
from tests.diffusion_envs.models.small_pipelines import STABLE_DIFFUSION, small_pipeline

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

PROMPTS = ["a photo of a cat", "a ship"]
STEPS = 4
AS_OURS = {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
LEADING = {"timestep_spacing": "leading"}  # diffusers' DDIM leaves gaps with "linspace"


def ours(model: TextToImageUNet, prompts: list[str] = PROMPTS) -> Tensor:
    """Images of our DDIM without noise."""
    sampler = DDIM(0.0).bind(model.table, STEPS)
    environment = Environment(model, sampler, Colour(), prompts, seed=0)
    return evaluate(environment, len(prompts)).images


def theirs(
    folder: Path,
    event: tuple[int, ...],
    guidance: float,
    prompts: list[str] = PROMPTS,
    spacing: dict[str, str] = LEADING,
    **settings,
) -> Tensor:
    """Images of the plain pipeline, with DDIM on the noise levels of its scheduler."""
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False, **settings
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **AS_OURS, **spacing)
    latents = normals_by_sample(
        event, seed=0, name=(HELD_OUT, "start"), samples=range(len(prompts))
    )
    return pipe(
        prompts,
        latents=latents,
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        output_type="pt",
    ).images


def assert_same_images(folder: Path, guidance: float = 2.5, **settings) -> TextToImageUNet:
    model = TextToImageUNet.load(folder, guidance=guidance)
    assert isinstance(model, Model)
    expected = theirs(folder, model.event, guidance, **settings)
    # float32 networks called with other batch shapes agree to about 1e-6 a call
    torch.testing.assert_close(ours(model), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.01
    return model


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_images_are_those_of_the_plain_pipeline(save_small, guidance):
    assert_same_images(save_small(), guidance)


@pytest.mark.parametrize(
    "name",
    [
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "LCMScheduler",
        "HeunDiscreteScheduler",
        "DDPMScheduler",
        "LMSDiscreteScheduler",
    ],
)
def test_a_folder_with_any_scheduler_has_its_noise_levels_and_densities(save_small, name):
    scheduler = getattr(diffusers, name)(**STABLE_DIFFUSION | {"beta_end": 0.011})
    model = assert_same_images(save_small(scheduler=scheduler))
    assert torch.equal(model.table.alphas_cumprod, scheduler.alphas_cumprod.double())
    sampler = DDIM(1.0).bind(model.table, STEPS)
    assert bool((sampler.std > 0).all())  # every transition has a density, the last one too


def test_a_scheduler_without_a_table_is_named(save_small):
    folder = save_small(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscrete.*supported are"):
        TextToImageUNet.load(folder)


TRAILING = {"timestep_spacing": "trailing"}


def test_a_table_that_ends_without_signal_starts_from_the_expected_data(save_small):
    """Zero terminal SNR: no score says anything at the first step."""
    zero = {"rescale_betas_zero_snr": True, **TRAILING}
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, **AS_OURS, **zero, prediction_type="v_prediction")
    model = assert_same_images(save_small(scheduler=scheduler), spacing=TRAILING)
    sampler = DDIM(1.0).bind(model.table, STEPS)
    assert sampler.action == "denoised"
    assert sampler.has_density
    assert sampler.alpha[0] < 1e-8


def test_what_predicts_epsilon_without_signal_is_refused(save_small):
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, **AS_OURS, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"rescale_betas_zero_snr.*predicts epsilon"):
        TextToImageUNet.load(save_small(scheduler=scheduler))


def test_stable_diffusion_2_predicts_v_and_has_a_wider_text_encoder(save_small):
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, **AS_OURS, prediction_type="v_prediction")
    unet = {"use_linear_projection": True, "attention_head_dim": (2, 4)}
    model = assert_same_images(save_small(unet, scheduler, width=40))
    assert model.prediction_type == "v_prediction"
    assert model.features(model.condition(PROMPTS)).shape == (2, 40)


def test_latents_need_not_be_square(save_small):
    folder = save_small({"sample_size": [8, 16]})
    assert assert_same_images(folder).event == (4, 8, 16)
    assert TextToImageUNet.load(folder, resolution=(24, 8)).event == (4, 12, 4)
    with pytest.raises(ValueError, match=r"resolution must be a positive multiple of 2.*\(24, 7\)"):
        TextToImageUNet.load(folder, resolution=(24, 7))


def test_inpainting_models_are_named(save_small):
    with pytest.raises(ValueError, match=r"9 input channels.*inpainting.*supported are"):
        TextToImageUNet.load(save_small({"in_channels": 9}))


@pytest.mark.parametrize("kind", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_other_classes_are_named_with_those_that_are_supported(save_small, kind):
    folder = save_small()
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": kind}))
    with pytest.raises(ValueError, match=rf"{kind}, which is not supported.*StableDiffusionPipe"):
        TextToImageUNet.load(folder)


def test_networks_that_need_more_inputs_are_named(save_small):
    unet = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 72,
    }
    with pytest.raises(ValueError, match=r"addition_embed_type 'text_time'.*supported are"):
        TextToImageUNet.load(save_small(unet))


def test_files_of_half_precision_are_loaded_where_there_are_no_others(tmp_path):
    pipe = small_pipeline().to(torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    model = TextToImageUNet.load(tmp_path, guidance=2.5)
    assert model.score.unet.dtype == model.pipe.text_encoder.dtype == torch.float32
    expected = theirs(tmp_path, model.event, 2.5, variant="fp16", dtype=torch.float32)
    torch.testing.assert_close(ours(model), expected, rtol=0, atol=1e-4)


def test_a_text_encoder_whose_weights_have_other_names_is_refused(tmp_path):
    """Transformers leaves what it misses at random."""
    small_pipeline().save_pretrained(tmp_path)
    file = tmp_path / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    assert "embeddings.token_embedding.weight" in {k.removeprefix("text_model.") for k in weights}
    TextToImageUNet.load(tmp_path, guidance=2.5)
    renamed = {key.replace("final_layer_norm", "last_norm"): v for key, v in weights.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"text_encoder was not read .* 2 of \d+ vectors"):
        TextToImageUNet.load(tmp_path, guidance=2.5)
    prefixed = {f"text_model.{key.removeprefix('text_model.')}": v for key, v in weights.items()}
    save_file(prefixed, file, metadata={"format": "pt"})
    model = TextToImageUNet.load(tmp_path, guidance=2.5)
    key = "embeddings.token_embedding.weight"
    assert torch.equal(model.pipe.text_encoder.state_dict()[key], prefixed[f"text_model.{key}"])


def test_plain_weights_win_over_variants_and_missing_ones_are_named(tmp_path):
    pipe = small_pipeline()
    pipe.save_pretrained(tmp_path)
    pipe.unet.requires_grad_(False)
    for parameter in pipe.unet.parameters():
        parameter.zero_()
    pipe.save_pretrained(tmp_path, variant="fp16")
    model = TextToImageUNet.load(tmp_path)
    assert any(bool(p.any()) for p in model.score.unet.parameters() if not p.requires_grad)
    for file in (tmp_path / "vae").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no weights in vae"):
        TextToImageUNet.load(tmp_path)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_networks_that_read_the_scale_of_guidance_are_told_it(save_small, guidance):
    """Latent consistency models: one call, and the scale as an embedding, of odd width too."""
    folder = save_small({"time_cond_proj_dim": 13}, LCMScheduler(**STABLE_DIFFUSION))
    model = assert_same_images(folder, guidance)
    before = model.calls
    model.prediction(torch.zeros(2, *model.event), torch.tensor([1, 2]), model.condition(PROMPTS))
    assert model.calls == before + 2  # no second branch


def test_the_embedded_scale_matters(save_small):
    folder = save_small({"time_cond_proj_dim": 13})
    images = [ours(TextToImageUNet.load(folder, guidance=scale)) for scale in (1.0, 3.5)]
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_tokens_of_several_vectors_are_embedded_as_by_the_pipeline(tmp_path):
    pipe = small_pipeline()
    tokens = ["<zebra>", "<zebra>_1", "<zebra>_2"]
    vectors = torch.randn(3, 24, generator=torch.Generator().manual_seed(3))
    pipe.load_textual_inversion(vectors, token="<zebra>")
    assert all(token in pipe.tokenizer.get_vocab() for token in tokens)
    pipe.save_pretrained(tmp_path)
    model = TextToImageUNet.load(tmp_path, guidance=2.5)
    prompts = ["a photo of <zebra>", "a ship and <zebra>"]
    expected = theirs(tmp_path, model.event, 2.5, prompts)
    torch.testing.assert_close(ours(model, prompts), expected, rtol=0, atol=1e-4)
    embedded = model.condition(["<zebra>", "a"])
    plain, _ = pipe.encode_prompt(["<zebra>", "a"], "cpu", 1, False)
    torch.testing.assert_close(embedded.tokens, plain, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="35 tokens"):  # 3 a word, and 2 at the ends
        model.condition(["<zebra> " * 11])


@pytest.mark.parametrize("guidance", [0.0, 0.7, float("nan"), float("inf"), -1.0])
def test_scales_that_diffusers_does_not_use_are_refused(save_small, guidance):
    with pytest.raises(ValueError, match=f"guidance .*at least 1, got {guidance}"):
        TextToImageUNet.load(save_small(), guidance=guidance)


@pytest.mark.parametrize(("precision", "word"), [("float8", "float8"), ("float16", "CPUs")])
def test_precisions_that_cannot_be_had_are_refused(precision, word):
    with pytest.raises(ValueError, match=f"precision.*{word}"):
        TextToImageUNet.load(precision=precision)


def test_plain_diffusers_runs_the_embedded_model_with_its_default_types():
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder())
    pipe.set_progress_bar_config(disable=True)
    assert pipe.text_encoder.dtype == pipe.unet.dtype == pipe.vae.dtype == torch.float32
    images = pipe("a cat", num_inference_steps=2, output_type="pt").images
    assert bool(torch.isfinite(images).all())


def test_gradients_are_the_same_with_activations_computed_again(save_small):
    folder = save_small()
    gradients = []
    for again in (False, True):
        model = TextToImageUNet.load(folder, gradient_checkpointing=again)
        generator = torch.Generator().manual_seed(2)
        states = torch.randn(2, *model.event, generator=generator)
        words = model.condition(PROMPTS)
        for parameter in model.parameters:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        model(states, torch.tensor([4, 90]), words).square().sum().backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters if p.grad is not None])
        )
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
    assert gradients[0].abs().max() > 0
