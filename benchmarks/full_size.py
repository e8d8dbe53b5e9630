"""Does the code run Stable Diffusion 1.5 and XL themselves, not only small ones? One update.

Builds a pipeline folder of the exact architecture with random weights (SD1.5: UNet 860 M
parameters, VAE 84 M, CLIP-L text encoder 123 M; SDXL: UNet 2,567 M, VAE 84 M, text encoders 123 M
and 695 M) and fine-tunes it for one update. On a CPU in bfloat16 at 256 x 256; on a GPU at 512 x
512 (SDXL: 1024 x 1024). Prints one JSON line: parameters, seconds, peak memory.
Needs 8 GiB of memory and 2.5 GB of disk on a CPU (SDXL: 16 GiB and 7 GB).
    python -m benchmarks.full_size [--model sdxl] [--folder DIR]
"""

import argparse
import gc
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion_envs import rewards, sd15
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.run_folder import versions
from diffusion_envs.tiny.captions import write_tokenizer
from diffusion_envs.tiny.train_denoiser import scheduler
from diffusion_envs.training.update_size import UpdateSize

# settings of stabilityai/stable-diffusion-xl-base-1.0; diffusers annotates tuples of any length as
# tuples of one
XL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}


def build_sd15(folder: Path) -> None:
    """Write the pipeline."""
    torch.set_default_dtype(torch.bfloat16)
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(cross_attention_dim=768, sample_size=64, attention_head_dim=8),
        "vae": _decoder(sample_size=512, scaling_factor=0.18215),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
    }
    torch.set_default_dtype(torch.float32)
    pipe = StableDiffusionPipeline(
        **parts,
        tokenizer=_tokenizer(folder),
        scheduler=_scheduler(),
        safety_checker=_ABSENT,
        feature_extractor=_ABSENT,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)


def build_sdxl(folder: Path) -> None:
    """Write the pipeline."""
    torch.set_default_dtype(torch.bfloat16)
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(**XL_UNET),
        "vae": _decoder(sample_size=1024, scaling_factor=0.13025),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIG_G)),
    }
    torch.set_default_dtype(torch.float32)
    tokenizer = _tokenizer(folder)
    pipe = StableDiffusionXLPipeline(
        **parts,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=_scheduler(),
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)


_ABSENT: Any = None  # diffusers takes it, its annotations do not


def _decoder(**settings: Any) -> AutoencoderKL:
    levels = 4
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (128, 256, 512, 512),
    }
    return AutoencoderKL(**blocks, layers_per_block=2, latent_channels=4, **settings)


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Its ids are a subset of those that the text encoders know."""
    write_tokenizer(folder / "tokenizer")
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def _scheduler() -> Any:  # diffusers annotates it as an enumeration
    return scheduler()


def millions(folder: Path) -> dict[str, int]:
    """Numbers of parameters of a pipeline's parts, in millions."""
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            sizes = [math.prod(file.get_slice(name).get_shape()) for name in names]
        counts[path.parent.name] = counts.get(path.parent.name, 0) + sum(sizes)
    return {name: round(count / 1e6) for name, count in counts.items()}


BUILDERS: dict[str, Callable[[Path], None]] = {"sd15": build_sd15, "sdxl": build_sdxl}


def main() -> None:
    """Build, fine-tune for one update, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, help="of the run, and of the model, if it is there (default: new)"
    )
    parser.add_argument("--model", choices=list(BUILDERS), default="sd15")
    parser.add_argument("--samples", type=int, help="of the update (default: 2, on a GPU 8)")
    parser.add_argument("--precision", default="bfloat16", help="of the network")
    parser.add_argument("--guidance", type=float, default=3.0, help="1 is none (default: 3)")
    parser.add_argument("--steps", type=int, default=2, help="of the sampler (default: 2)")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    samples = options.samples or (8 if gpu else 2)
    side = 256 if not gpu else 512 if options.model == "sd15" else 1024
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "model" / "model_index.json").is_file():
            BUILDERS[options.model](folder / "model")
        gc.collect()
        started = time.monotonic()
        sd15.finetune(
            sd15.StableDiffusion(
                folder / "model",
                guidance=options.guidance,
                precision=options.precision,
                resolution=side,
                gradient_checkpointing=True,
            ),
            reward=rewards.JpegCompressibility(),
            prompts=["a photo of a cat", "a photo of a ship"],
            output=folder / "run",
            steps=options.steps,
            updates=1,
            size=UpdateSize(samples=samples, batch=4 if gpu else 2, value_epochs=1),
            options=RunOptions(evaluation_samples=2),
        )
        seconds = time.monotonic() - started
        parameters = millions(folder / "model")
        line = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    print(
        json.dumps(
            {
                "model": options.model,
                "millions_of_parameters": parameters,
                "device": torch.cuda.get_device_name() if gpu else "cpu",
                "threads": torch.get_num_threads(),
                "resolution": side,
                "precision": options.precision,
                "guidance": options.guidance,
                "samples": samples,
                "steps": options.steps,
                "seconds_of_first_evaluation_and_update": round(line["seconds"], 1),
                "whole_run_seconds": round(seconds, 1),
                "peak_memory_gib": round(line["memory"] / 2**30, 2),
                "network_calls": line["network_calls"],
                "gradient_norm": line["gradient_norm"],
                "versions": versions(),
            }
        )
    )


if __name__ == "__main__":
    main()
