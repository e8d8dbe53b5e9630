"""Command line of CIFAR-10's unconditional networks.

python -m diffusion_envs.cifar10 finetune --reward class-confidence --output runs/demo
python -m diffusion_envs.cifar10 finetune --sampler dxmi-10 --objective dxmi --output runs/dxmi
python -m diffusion_envs.cifar10 finetune --model google/ddpm-cifar10-32 --output runs/published
python -m diffusion_envs.cifar10 --resume runs/demo
python -m diffusion_envs.cifar10 evaluate runs/demo --steps 10 25 50 100 --samplers ddim dpm++ heun
python -m diffusion_envs.cifar10 export runs/demo --push USER/NAME
python -m diffusion_envs.cifar10 pretrain --data ../shared/data/cifar10 --output runs/pretraining
python -m diffusion_envs.cifar10 measure --data ../shared/data/cifar10 --output docs
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from diffusion_envs.cifar10.family import LEARNING_RATE, PROMPTS, REWARD, Cifar10Model
from diffusion_envs.cifar10.measure import measure
from diffusion_envs.cifar10.pretrain import RECIPES, pretrain
from diffusion_envs.models.adapters import PRECISIONS
from diffusion_envs.runs.command_line import Family, main
from diffusion_envs.runs.publishing import command


@dataclass(frozen=True)
class Pretrain:
    """Train a score network on CIFAR-10; the same command goes on from the newest checkpoint.

    Attributes:
        data: folder of CIFAR-10.
        output: of the checkpoints and of the pipeline with averaged weights.
        network: small, for CPUs, or published: the configuration of google/ddpm-cifar10-32.
        prediction: what the network predicts.
        updates: of the weights; those of the network if left out. They set the learning rate's
            decay: a run that goes on must have the same.
        batch: pictures an update and process; those of the network if left out.
        learning_rate: of AdamW at its largest; that of the network if left out.
        precision: of the arithmetic: float32 or bfloat16; that of the network if left out.
        seed: of all randomness.
    """

    data: Path
    output: Path
    network: Literal["small", "published"] = "small"
    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"
    updates: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    seed: int = 0


def run_pretrain(words: Sequence[str]) -> None:
    """Pretrain, as the words after the command say."""
    options = tyro.cli(Pretrain, args=list(words), prog=f"{PROGRAM} pretrain")
    named = {
        "updates": options.updates,
        "batch": options.batch,
        "learning_rate": options.learning_rate,
        "precision": None if options.precision is None else PRECISIONS[options.precision],
    }
    recipe = replace(
        RECIPES[options.network], **{k: value for k, value in named.items() if value is not None}
    )
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # several processes are faster than several threads
    try:
        folder = pretrain(
            options.data,
            options.output,
            options.network,
            prediction_type=options.prediction,
            recipe=recipe,
            seed=options.seed,
        )
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the newest checkpoint", file=sys.stderr)
        raise
    print(f"pipeline: {folder}")


@dataclass(frozen=True)
class Measure:
    """Judge samples of a network at several samplers; write cifar10.json and cifar10.png.

    Attributes:
        data: folder of CIFAR-10.
        output: folder of the results.
        model: small, a folder in diffusers' layout, or a hub id.
        samples: pictures of each sampler.
        seed: of the samples.
    """

    data: Path
    output: Path
    model: str = "small"
    samples: int = 400
    seed: int = 0


def run_measure(words: Sequence[str]) -> None:
    """Measure, as the words after the command say."""
    options = tyro.cli(Measure, args=list(words), prog=f"{PROGRAM} measure")
    model = Cifar10Model(options.model)
    measured = measure(model, options.data, options.output, options.samples, options.seed)
    print(json.dumps(measured, indent=1))


PROGRAM = "python -m diffusion_envs.cifar10"
FAMILY = Family(
    PROGRAM,
    Cifar10Model,
    defaults={"reward": REWARD, "prompts": PROMPTS},
    learning_rate=LEARNING_RATE,
    commands={"pretrain": run_pretrain, "measure": run_measure, "export": command(PROGRAM)},
)

if __name__ == "__main__":
    sys.exit(main(FAMILY, sys.argv[1:]))
