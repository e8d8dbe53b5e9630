"""Loading a Stable Diffusion pipeline, attaching a LoRA adapter, exporting it for diffusers."""

import os
from importlib import resources
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from jaxtyping import Float
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

TINY = "tiny"
_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def tiny_folder() -> Path:
    """Where the embedded tiny Stable Diffusion lies: a folder in diffusers' own layout."""
    return Path(str(resources.files("diffusion_envs.tiny"))) / "weights" / "model"


def load_pipeline(
    model: str | Path,
    *,
    precision: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StableDiffusionPipeline:
    """Load a text-to-image pipeline, everything frozen and in evaluation mode.

    Args:
        model: "tiny", a folder in diffusers' layout, or an id on the Hugging Face hub.
        precision: of the weights. float16 is refused on a CPU, where it is 7 to 230 times slower.
        device: where the networks go.

    Raises:
        FileNotFoundError: ``model`` is a folder that lacks parts, or neither a folder nor to be had
            from the hub; the message says what is missing.
        ValueError: ``model`` is empty, or float16 is asked for on a CPU.
    """
    if not str(model).strip():
        raise ValueError("model must be 'tiny', a folder or a hub id, got an empty name")
    if precision == torch.float16 and torch.device(device).type == "cpu":
        raise ValueError("precision float16 is not for CPUs; use float32 or bfloat16")
    source = tiny_folder() if str(model) == TINY else Path(model)
    if source.is_dir():
        _check_folder(source)
        pipe = StableDiffusionPipeline.from_pretrained(
            source,
            dtype=precision,
            local_files_only=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    elif source.exists():
        raise FileNotFoundError(
            f"model must be a folder in diffusers' layout, but {source} is a file"
        )
    else:
        pipe = _from_hub(str(model), precision)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval().to(device)
    return pipe


def _check_folder(folder: Path) -> None:
    missing = [name for name in _PARTS if not (folder / name).is_dir()]
    if not (folder / "model_index.json").is_file():
        missing.insert(0, "model_index.json")
    if missing:
        raise FileNotFoundError(
            f"model {folder} is not a Stable Diffusion pipeline in diffusers' layout: it lacks "
            f"{', '.join(missing)}"
        )


def _from_hub(model: str, precision: torch.dtype) -> StableDiffusionPipeline:
    if os.sep + os.sep in model or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"model folder {model} does not exist")
    try:
        return StableDiffusionPipeline.from_pretrained(
            model,
            dtype=precision,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise FileNotFoundError(
            f"model {model!r} is neither 'tiny' nor a local folder, and it could not be loaded "
            f"from the hub: "
            f"{reason[0] if reason else type(error).__name__}. Without a network, download the "
            f"repository "
            "where there is one and pass its folder"
        ) from error


def attach_lora(
    unet: UNet2DConditionModel,
    *,
    rank: int,
    targets: tuple[str, ...],
    seed: int,
) -> list[torch.nn.Parameter]:
    """Add a trainable LoRA adapter, in float32, that starts as the identity.

    Args:
        unet: frozen; changed in place.
        rank: of the update of every target layer; its scale is 1.
        targets: names of the layers, as peft matches them.
        seed: of the initial weights.

    Returns:
        The trainable parameters.
    """
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {rank}")
    devices = [unet.device] if unet.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # peft draws from the global stream
        torch.manual_seed(seed)
        unet.add_adapter(
            LoraConfig(
                r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=list(targets)
            )
        )
    parameters = [p for p in unet.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"lora_targets {targets} match no layer of the model")
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def export_lora(unet: UNet2DConditionModel, folder: Path) -> Path:
    """Write ``folder/pytorch_lora_weights.safetensors``, for ``pipe.load_lora_weights``."""
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    layers = {name: tensor.detach().cpu().contiguous() for name, tensor in layers.items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


@torch.no_grad()
def embed_prompts(
    pipe: StableDiffusionPipeline, prompts: list[str]
) -> Float[Tensor, "prompts tokens width"]:
    """Text embeddings of the prompts, as the pipeline computes them.

    Raises:
        ValueError: a prompt is longer than the text encoder reads.
    """
    tokenizer = pipe.tokenizer
    limit = tokenizer.model_max_length
    for prompt in prompts:
        if (length := len(tokenizer(prompt).input_ids)) > limit:
            raise ValueError(f"prompt {prompt!r} has {length} tokens; the model reads {limit}")
    tokens = tokenizer(
        prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
    ).input_ids
    return pipe.text_encoder(tokens.to(pipe.text_encoder.device))[0].float()


def decode(
    vae: AutoencoderKL, latents: Float[Tensor, "n c h w"], batch: int
) -> Float[Tensor, "n 3 height width"]:
    """Pictures in [0, 1], float32, from scaled latents; ``batch`` at a time; differentiable."""
    parts = [
        vae.decode((part / vae.config.scaling_factor).to(vae.dtype)).sample.float()
        for part in latents.split(batch)
    ]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)
