"""Fine-tuning the embedded model on the device, stopped and resumed: the same bits or not."""

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.timing import Device
from diffusion_envs import rewards, sd15
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.training.update_size import UpdateSize

UPDATES = 4


def rows(where: Device) -> Iterator[dict[str, Any]]:
    """Two whole runs and one that is resumed half-way; a line each, and what they agree in."""
    samples, steps = (4, 2) if where.rehearsal else (32, 10)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in ("whole", "again", "resumed")}

        def run(name: str, updates: int, resume: bool = False) -> dict[str, Any]:
            began = time.perf_counter()
            done = sd15.finetune(
                sd15.StableDiffusion("tiny", guidance=1.0, device=where.device.type),
                reward=rewards.Colour("red"),
                prompts=["a photo of a cat", "a photo of a ship"],
                output=folders[name],
                steps=steps,
                updates=updates,
                size=UpdateSize(samples=samples, batch=64),
                options=RunOptions(evaluation_samples=samples, progress=False),
                resume=resume,
            )
            assert done.path_kl is not None  # DDIM has noise in every step
            return {
                "case": f"{name}, to update {updates}",
                "seconds": time.perf_counter() - began,
                "reward_before": done.reward_before.mean,
                "reward": done.reward.mean,
                "path_kl": done.path_kl.mean,
            }

        yield run("whole", UPDATES)
        yield run("again", UPDATES)
        yield run("resumed", UPDATES // 2)
        yield run("resumed", UPDATES, resume=True)
        found = {name: _left_behind(folder) for name, folder in folders.items()}
        for name in ("again", "resumed"):
            adapter, metrics = (found[name][i] == found["whole"][i] for i in range(2))
            yield {
                "case": f"{name}, against whole",
                "same_adapter_bits": adapter,
                "same_metrics": metrics,
            }


def _left_behind(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """The adapter's digest, and the numbers of every update that are no times."""
    adapter = (folder / "pytorch_lora_weights.safetensors").read_bytes()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "memory", "time")
    kept = [{k: v for k, v in line.items() if k not in times} for line in lines]
    return hashlib.sha256(adapter).hexdigest(), kept
