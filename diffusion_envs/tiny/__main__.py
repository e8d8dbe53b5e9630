"""Train the tiny model again, or measure it.

    python -m diffusion_envs.tiny train --data ../shared/data/cifar10 --output DIR
    python -m diffusion_envs.tiny measure --data ../shared/data/cifar10 --output docs

``train`` makes everything that ``diffusion_envs/tiny/weights`` holds, in order: the two
classifiers, the autoencoder, then UNet and text encoder. Every stage resumes from its newest
checkpoint. On several CPU cores use one single-threaded process a core: ``OMP_NUM_THREADS=1
torchrun --nproc_per_node 2 -m diffusion_envs.tiny train ...``.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from diffusion_envs.tiny import train_autoencoder, train_classifier, train_denoiser
from diffusion_envs.tiny.measure import measure
from diffusion_envs.training import parallel


@dataclass(frozen=True)
class Train:
    """Train classifiers, autoencoder and denoiser.

    Attributes:
        data: folder of CIFAR-10's parquet files.
        output: where checkpoints, samples and the finished parts go.
        seed: of all randomness.
    """

    data: Path
    output: Path
    seed: int = 0


@dataclass(frozen=True)
class Measure:
    """Measure the shipped model and draw its grid of samples.

    Attributes:
        data: folder of CIFAR-10's parquet files.
        output: folder for tiny.json and tiny.png.
        samples: pictures a setting.
        seed: of the samples.
    """

    data: Path
    output: Path
    samples: int = 200
    seed: int = 0


def main(arguments: list[str]) -> int:
    """Run one command."""
    options = tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Measure, tyro.conf.subcommand("measure")],
        args=arguments,
        prog="python -m diffusion_envs.tiny",
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if isinstance(options, Measure):
            measured = measure(options.data, options.output, options.samples, options.seed)
            print(json.dumps(measured, indent=1))
        else:
            _train(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


def _train(options: Train) -> None:
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    world = parallel.start()
    for which in ("reward", "judge"):
        if not (options.output / f"classifier_{which}.safetensors").is_file():
            share = train_classifier.train(options.data, options.output, which, seed=options.seed)
            world.print(f"classifier {which}: {share:.3f} of the test set")
        world.wait_for_everyone()
    if not (options.output / "model" / "vae").is_dir():
        train_autoencoder.train(options.data, options.output, seed=options.seed)
    world.wait_for_everyone()
    train_denoiser.train(options.data, options.output, seed=options.seed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
