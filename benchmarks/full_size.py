"""Does the code run Stable Diffusion 1.5 itself, not only the tiny model? One full-size update.

Builds a pipeline folder of SD1.5's exact architecture with random weights (UNet 860 M parameters,
VAE 84 M, CLIP-L text encoder 123 M) and fine-tunes it for one update. On a CPU in bfloat16 at 256 x
256; on a GPU at 512 x 512. Prints one JSON line: parameters, seconds, peak memory, images per
second. Needs 8 GiB of memory and 2.5 GB of disk on a CPU.
    python -m benchmarks.full_size [--folder DIR]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion_envs import rewards, sd15
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.run_folder import versions
from diffusion_envs.tiny.captions import write_tokenizer
from diffusion_envs.tiny.train_denoiser import scheduler
from diffusion_envs.training.update_size import UpdateSize


def build(folder: Path) -> dict[str, int]:
    """Write the pipeline and return its numbers of parameters, in millions."""
    torch.set_default_dtype(torch.bfloat16)
    unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64, attention_head_dim=8)
    levels = 4
    # diffusers annotates these as tuples of one
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (128, 256, 512, 512),
    }
    vae = AutoencoderKL(
        **blocks,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=0.18215,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            projection_dim=768,
            num_hidden_layers=12,
            num_attention_heads=12,
        )
    )
    torch.set_default_dtype(torch.float32)
    write_tokenizer(folder / "tokenizer")  # a subset of the ids that the text encoder knows
    absent: Any = None  # diffusers takes it, its annotations do not
    sampler: Any = scheduler()  # annotated as an enumeration
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=sampler,
        safety_checker=absent,
        feature_extractor=absent,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    return {k: round(sum(p.numel() for p in v.parameters()) / 1e6) for k, v in parts.items()}


def main() -> None:
    """Build, fine-tune for one update, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, help="where to put model and run (default: temporary)"
    )
    parser.add_argument("--steps", type=int, default=2, help="of the sampler (default: 2)")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    samples = 8 if gpu else 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        millions = build(folder / "model")
        started = time.monotonic()
        sd15.finetune(
            sd15.StableDiffusion(
                folder / "model",
                precision="bfloat16",
                resolution=512 if gpu else 256,
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
        line = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    print(
        json.dumps(
            {
                "millions_of_parameters": millions,
                "device": torch.cuda.get_device_name() if gpu else "cpu",
                "threads": torch.get_num_threads(),
                "resolution": 512 if gpu else 256,
                "steps": options.steps,
                "update_seconds": round(line["seconds"], 1),
                "images_per_second": round(samples / line["seconds"], 4),
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
