"""What the shipped model can do: reconstruction, class agreement of samples, a grid of pictures."""

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from ctrl import Estimate
from diffusion_envs.cifar10.data import CLASSES, load
from diffusion_envs.rewards.classifier import load_classifier
from diffusion_envs.runs.contact_sheet import grid
from diffusion_envs.runs.run_folder import write_json
from diffusion_envs.tiny.captions import with_article
from diffusion_envs.tiny.train_autoencoder import psnr, reconstruct
from diffusion_envs.tiny.train_classifier import accuracy
from diffusion_envs.tiny.train_denoiser import sample

STEPS = 50
WEIGHTS = Path(__file__).parent / "weights"


def measure(data: Path, output: Path, samples: int, seed: int) -> dict[str, Any]:
    """Measure everything that ``docs/tiny.md`` publishes; write ``tiny.json`` and ``tiny.png``.

    Args:
        data: folder of CIFAR-10's parquet files.
        output: folder of the results.
        samples: pictures for each guidance and eta.
        seed: of the samples.
    """
    pipe = StableDiffusionPipeline.from_pretrained(
        WEIGHTS / "model",
        dtype=torch.float32,
        use_safetensors=True,
        safety_checker=None,
        requires_safety_checker=False,
    )
    judge, reward = load_classifier("judge"), load_classifier("reward")
    images, labels = load(data, "test")
    few, few_labels = images[:2000], labels[:2000]
    decoded = reconstruct(pipe.vae, few)
    measured: dict[str, Any] = {
        "bytes": sum(f.stat().st_size for f in (WEIGHTS / "model").rglob("*") if f.is_file()),
        "classifier_test_accuracy": {
            "reward": accuracy(reward, images, labels),
            "judge": accuracy(judge, images, labels),
        },
        "reconstruction_psnr_db": psnr(few, decoded),
        "judge_accuracy_on_reconstructions": accuracy(judge, decoded, few_labels),
        "samples": samples,
        "steps": STEPS,
        "agreement": [],
    }
    wanted = torch.arange(samples) % len(CLASSES)
    prompts = [with_article(f"a photo of a {CLASSES[k]}") for k in wanted.tolist()]
    for guidance in (1.0, 3.0, 5.0):
        for eta in (0.0, 1.0):
            pictures = sample(pipe, prompts, steps=STEPS, guidance=guidance, eta=eta, seed=seed)
            right = (judge(pictures).argmax(-1) == wanted).float()
            by_class = {
                name: round(float(right[wanted == k].mean()), 2) for k, name in enumerate(CLASSES)
            }
            share = Estimate.of(right).as_dict()
            measured["agreement"].append(
                {"guidance": guidance, "eta": eta, "share": share, "by_class": by_class}
            )
            if (guidance, eta) == (3.0, 1.0):
                shown = [k + 10 * j for k in range(10) for j in range(8)]
                sheet = grid(pictures[shown], [prompts[k] for k in shown], columns=16)
                sheet.save(output / "tiny.png")
    write_json(output / "tiny.json", measured)
    return measured
