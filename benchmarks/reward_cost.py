"""What does a learned reward of full size cost on a CPU: seconds, and memory of its weights?

CLIP of the published sizes with random weights, through the rewards that run it: one picture of
512 x 512 pixels without a prompt's embedding (``Aesthetic`` asks for no more), one prompt, and both
with the picture's gradient; and the recogniser of text, where rapidocr is installed. Processor
time, one thread, the median of the rounds after one that does not count.

    python -m benchmarks.reward_cost --to docs
"""

import argparse
import importlib.util
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from ctrl.noise import stream
from diffusion_envs import rewards
from diffusion_envs.models.folders import tiny_folder
from diffusion_envs.runs.run_folder import versions

VISION = {"image_size": 224, "patch_size": 14, "hidden_act": "gelu"}
SIZES = {  # width, MLP, layers, heads of the vision and of the text network; the embedding's width
    "ViT-L/14": ((1024, 4096, 24, 16), (768, 3072, 12, 12), 768),
    "ViT-H/14": ((1280, 5120, 32, 16), (1024, 4096, 24, 16), 1024),
}
VOCABULARY = 49_408
SIDE = 512  # pixels of a picture
PROMPTS = ("a photo of a cat", "a photo of a dog on a red sofa")
TEXT_SIDES = (32, 128, 512)


def write_clip(folder: Path, size: str) -> int:
    """A folder with a network of a published size and random weights; returns its parameters."""
    eyes, words, width = SIZES[size]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = CLIPConfig(
        vision_config=VISION | dict(zip(names, eyes, strict=True)) | {"projection_dim": width},
        text_config=dict(zip(names, words, strict=True))
        | {"projection_dim": width, "vocab_size": VOCABULARY},
        projection_dim=width,
    )
    network = CLIPModel(config)
    network.save_pretrained(folder)
    tokens = json.loads((tiny_folder() / "tokenizer" / "vocab.json").read_text())
    rest = range(len(tokens), VOCABULARY)  # the network has a row for each
    tokens |= {f"token {k}": k for k in rest}
    (folder / "vocab.json").write_text(json.dumps(tokens))
    shutil.copy(tiny_folder() / "tokenizer" / "merges.txt", folder / "merges.txt")
    return sum(parameter.numel() for parameter in network.parameters())


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Median of the processor's seconds that a call takes."""
    call()
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def with_gradient(reward: rewards.CLIPScore, pictures: torch.Tensor, prompt: str) -> None:
    """A score and its gradient with respect to the picture."""
    pictures = pictures.clone().requires_grad_()
    reward(pictures, [prompt]).sum().backward()


def clip_row(size: str, rounds: int) -> dict[str, Any]:
    """One network: its parameters, and seconds of a picture, of a prompt and of a gradient."""
    pictures = torch.rand(1, 3, SIDE, SIDE, generator=stream(0, "reward_cost"))
    with tempfile.TemporaryDirectory() as temporary:
        parameters = write_clip(Path(temporary), size)
        reward = rewards.CLIPScore(Path(temporary))
        with torch.no_grad():
            both = seconds(lambda: reward(pictures, PROMPTS[:1]), rounds)
            picture = seconds(lambda: reward.embedding(pictures), rounds)
        gradient = seconds(lambda: with_gradient(reward, pictures, PROMPTS[1]), rounds)
    return {
        "network": size,
        "parameters": parameters,
        "picture": picture,
        "prompt": max(0.0, both - picture),
        "with gradient": gradient,
    }


def text_row(side: int, rounds: int) -> dict[str, Any]:
    """The recogniser of text on a picture of some size: read as one line, or searched first."""
    pictures = torch.rand(1, 3, side, side, generator=stream(0, "reward_cost"))
    reward = rewards.TextInPicture()
    return {"side": side, "picture": seconds(lambda: reward(pictures, ['"CAT"']), rounds)}


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--to", type=Path, help="folder of reward_cost.json (default: print only)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "avx512": "AVX512" in torch.backends.cpu.get_cpu_capability(),
        "side": SIDE,
        "rounds": options.rounds,
        "networks": [],
        "text": [],
    }
    for size in SIZES:
        measured["networks"].append(clip_row(size, options.rounds))
        print(json.dumps(measured["networks"][-1]), flush=True)
    if importlib.util.find_spec("rapidocr") is not None:
        for side in TEXT_SIDES:
            measured["text"].append(text_row(side, options.rounds))
            print(json.dumps(measured["text"][-1]), flush=True)
    if options.to is not None:
        record = {"versions": versions()} | measured
        (options.to / "reward_cost.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
