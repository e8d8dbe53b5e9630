"""How well are a run's memory and time known before it begins? Estimates beside measurements.

Each row is a run in a process of its own: its estimate (``runs.estimate``, from shapes alone), then
the run. Peak memory is that of the process, beyond what the interpreter and the libraries take
before anything is loaded; seconds are those of the processor in the second update, on one thread.
Rows marked "held out" were in no adjustment of the estimate. On a machine with a GPU the rows for
CUDA run too (``torch.cuda.max_memory_allocated``, wall seconds).

    python -m benchmarks.run_cost [--rows tiny,words,...] [--to docs]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import full_size
from diffusion_envs import objectives, rewards, sd15
from diffusion_envs.runs import estimate as estimates
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.run_folder import versions
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

GIB = 2**30
MAPPED = 2**18  # bytes from which tensors are mapped, and so given back, in the column "mapped"


@dataclass(frozen=True)
class Row:
    """A run.

    Attributes:
        name: of the row.
        model: "tiny", "words", "middle" (a UNet of 55 M parameters, random weights) or "sd15"
            (Stable Diffusion 1.5's architecture, random weights).
        settings: of the model.
        size: of the update.
        steps: of the sampler.
        objective: the method.
        heavy: whether it takes many GiB or minutes.
        held_out: whether no adjustment looked at it.
        device: where.
    """

    name: str
    model: str = "tiny"
    settings: dict[str, Any] = field(default_factory=dict)
    size: dict[str, Any] = field(default_factory=dict)
    steps: int = 4
    objective: str = "DDPO"
    heavy: bool = False
    held_out: bool = False
    device: str = "cpu"

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Those of ``finetune``, and of ``estimate``, but the output."""
        place = self.model if self.model in ("tiny", "words") else folder / self.model
        return {
            "model": sd15.StableDiffusion(place, device=self.device, **self.settings),
            "reward": rewards.Colour("red"),
            "prompts": ["a photo of a cat", "a photo of a ship"],
            "objective": getattr(objectives, self.objective)(learning_rate=1e-5),
            "steps": self.steps,
            "updates": 2,
            "size": UpdateSize(**{"samples": 8, "batch": 8, "value_epochs": 1} | self.size),
            "options": RunOptions(evaluation_samples=4, progress=False),
        }


_ALL = {"trains": "all", "guidance": 1.0}
_AGAIN = {"gradient_checkpointing": True}
_256 = {"resolution": 256, "guidance": 3.0}
_FEW = {"samples": 2, "batch": 2}
ROWS = [
    Row("tiny"),
    Row("tiny, 32 rows at once", size={"samples": 32, "batch": 32}),
    Row("tiny, recomputed", settings=_AGAIN, size={"samples": 32, "batch": 32}),
    Row("tiny, ScoreAsAction", objective="ScoreAsAction", size={"samples": 16, "batch": 16}),
    Row("words", "words", size={"samples": 16, "batch": 16}),
    Row("words, all weights", "words", settings=_ALL, size={"samples": 16, "batch": 16}),
    Row("middle", "middle"),
    Row("middle, recomputed", "middle", settings=_AGAIN),
    Row("middle, all weights", "middle", settings=_ALL, held_out=True),
    Row(
        "middle, GRPO", "middle", objective="GRPO", size={"samples": 12, "batch": 6}, held_out=True
    ),
    Row("SD1.5, 256 x 256", "sd15", _256, _FEW, steps=2, heavy=True, held_out=True),
    Row("SD1.5, 256 x 256, recomputed", "sd15", _256 | _AGAIN, _FEW, steps=2, heavy=True),
    Row("SD1.5, 512 x 512", "sd15", {"resolution": 512}, _FEW, steps=4, device="cuda"),
    Row(
        "SD1.5, 512 x 512, bfloat16, recomputed",
        "sd15",
        {"resolution": 512, "precision": "bfloat16", **_AGAIN},
        {"samples": 16, "batch": 8},
        device="cuda",
    ),
    Row(
        "SD1.5, 512 x 512, all weights, bfloat16, recomputed",
        "sd15",
        {"resolution": 512, "precision": "bfloat16", **_ALL, **_AGAIN},
        {"samples": 8, "batch": 4},
        device="cuda",
    ),
]


def build_middle(folder: Path) -> None:
    """A pipeline with a UNet of 55 M parameters and a decoder of 3 M, random weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (32, 64, 128),
    }
    unet: dict[str, Any] = {
        "sample_size": 32,
        "block_out_channels": (96, 192, 384),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 256,
        "attention_head_dim": 8,
    }
    text = CLIPTextConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
    )
    full_size.StableDiffusionPipeline(
        unet=UNet2DConditionModel(**unet),
        vae=AutoencoderKL(**blocks, layers_per_block=1, latent_channels=4, sample_size=128),
        text_encoder=CLIPTextModel(text),
        tokenizer=full_size._tokenizer(folder),
        scheduler=full_size._scheduler(),
        safety_checker=full_size._ABSENT,
        feature_extractor=full_size._ABSENT,
        requires_safety_checker=False,
    ).save_pretrained(folder)


BUILDERS = {"middle": build_middle, "sd15": full_size.build_sd15}


# -- one row, in a process of its own --------------------------------------------------------------


def estimated(row: Row, folder: Path) -> dict[str, Any]:
    """What is said before."""
    clock = time.process_time if row.device == "cpu" else time.perf_counter
    started = time.monotonic()
    cost = estimates.estimate(**row.arguments(folder), clock=clock)
    base = cost.held.get(estimates.BASE, 0)
    heap = cost.at_peak.get(estimates.HEAP, 0)
    return {
        "gib": (cost.peak - base) / GIB,
        "mapped_gib": (cost.peak - base - heap) / GIB,
        "seconds": cost.seconds_of_an_update,
        "base": base / GIB,
        "phase": cost.phase,
        "phases": {name: round((size - base) / GIB, 4) for name, size in cost.phases.items()},
        "held": {name: round(size / GIB, 4) for name, size in cost.held.items()},
        "at_peak": {name: round(size / GIB, 4) for name, size in cost.at_peak.items()},
        "took": round(time.monotonic() - started, 1),
    }


def measured(row: Row, folder: Path) -> dict[str, Any]:
    """What it was."""
    arguments = row.arguments(folder)
    arguments["model"].load(device=torch.device("meta"), batch=1, seed=0)  # imports what is needed
    base = estimates.resident()
    times = list[float]()
    step = Trainer.step
    cuda = row.device == "cuda"
    clock = time.perf_counter if cuda else time.process_time

    def timed(trainer: Trainer) -> dict[str, Any]:
        if cuda:
            torch.cuda.synchronize()
        started = clock()
        numbers = step(trainer)
        if cuda:
            torch.cuda.synchronize()
        times.append(clock() - started)
        return numbers

    Trainer.step = timed
    with tempfile.TemporaryDirectory() as output:
        sd15.finetune(**arguments, output=Path(output) / "run")
    if cuda:
        base, peak = 0, torch.cuda.max_memory_allocated()
    else:
        peak = estimates.peak_resident()
    return {"gib": (peak - base) / GIB, "seconds": times[-1], "base": base / GIB}


def child(row: Row, folder: Path, what: str, **variables: str) -> dict[str, Any]:
    """One of both, in a fresh process with one thread."""
    words = [sys.executable, "-m", "benchmarks.run_cost", "--child", what]
    words += ["--rows", row.name, "--folder", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= variables
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{row.name}, {what}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# -- the table -------------------------------------------------------------------------------------


def compared(row: Row, folder: Path) -> dict[str, Any]:
    """A line of the table."""
    line: dict[str, Any] = {**asdict(row), "estimated": child(row, folder, "estimated")}
    line["measured"] = child(row, folder, "measured")
    said = line["estimated"]
    line["seconds_ratio"] = said["seconds"] / line["measured"]["seconds"]
    line["gib_ratio"] = said["gib"] / line["measured"]["gib"]
    if row.device == "cpu":
        line["mapped"] = child(row, folder, "measured", MALLOC_MMAP_THRESHOLD_=str(MAPPED))
        line["mapped_ratio"] = said["mapped_gib"] / line["mapped"]["gib"]
    return line


def table(lines: list[dict[str, Any]]) -> str:
    """For docs."""
    head = [
        "| run | peak, estimated (GiB) | measured | ratio | estimated, mapped | measured | ratio | "
        "seconds an update, estimated | measured | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def shown(line: dict[str, Any]) -> str:
        name = line["name"] + (" (held out)" if line["held_out"] else "")
        if "measured" not in line:
            return f"| {name} | | not run: no GPU | | | | | | | |"
        said, was, mapped = line["estimated"], line["measured"], line.get("mapped", {})
        cells = [f"{said['gib']:.3g}", f"{was['gib']:.3g}", f"{line['gib_ratio']:.2f}"]
        if mapped:
            cells += [f"{said['mapped_gib']:.3g}", f"{mapped['gib']:.3g}"]
            cells.append(f"{line['mapped_ratio']:.2f}")
        else:
            cells += [""] * 3
        cells += [f"{said['seconds']:.3g}", f"{was['seconds']:.3g}", f"{line['seconds_ratio']:.2f}"]
        return "| " + " | ".join([name, *cells]) + " |"

    return "\n".join([*head, *map(shown, lines)])


def main() -> None:
    """Print one JSON line a row, then the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", help="names, separated by ';'; all but heavy ones if left out")
    parser.add_argument("--folder", type=Path, help="of the models that are built (default: new)")
    parser.add_argument("--to", type=Path, help="folder that gets run_cost.json")
    parser.add_argument("--child", choices=["estimated", "measured"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    named = options.rows.split(";") if options.rows else [r.name for r in ROWS if not r.heavy]
    if unknown := set(named) - {row.name for row in ROWS}:
        parser.error(f"no such row: {unknown}; there are {'; '.join(row.name for row in ROWS)}")
    rows = [row for row in ROWS if row.name in named]
    if options.child:
        torch.set_num_threads(1)
        call = estimated if options.child == "estimated" else measured
        print(json.dumps(call(rows[0], options.folder)))
        return
    lines = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for row in rows:
            if row.device == "cuda" and not torch.cuda.is_available():
                lines.append(asdict(row))
                continue
            if row.model in BUILDERS and not (folder / row.model / "model_index.json").is_file():
                BUILDERS[row.model](folder / row.model)
            lines.append(compared(row, folder))
            print(json.dumps(lines[-1]), flush=True)
    print(table(lines))
    if options.to:
        record = {"rows": lines, "threads": 1, "versions": versions()}
        (options.to / "run_cost.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
