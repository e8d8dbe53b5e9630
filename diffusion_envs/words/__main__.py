"""Train the words model again, or measure it.

    python -m diffusion_envs.words train --output DIR
    python -m diffusion_envs.words measure --output docs

``train`` makes everything that ``diffusion_envs/words/weights`` holds: the autoencoder, then UNet
and text encoder. Both resume from their newest checkpoint. It needs no data: signs are drawn.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from diffusion_envs.words import train_autoencoder, train_denoiser
from diffusion_envs.words.measure import measure


@dataclass(frozen=True)
class Train:
    """Train autoencoder and denoiser.

    Attributes:
        output: where checkpoints, samples and the finished parts go.
        seed: of all randomness.
    """

    output: Path
    seed: int = 0


@dataclass(frozen=True)
class Measure:
    """Measure a model, the shipped one if no other is named, and draw its grid of samples.

    Attributes:
        output: folder for words.json and words.png.
        model: folder of the model.
        samples: pictures a setting.
        seed: of the words and samples.
    """

    output: Path
    model: str = "words"
    samples: int = 100
    seed: int = 0


def main(arguments: list[str]) -> int:
    """Run one command."""
    options = tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Measure, tyro.conf.subcommand("measure")],
        args=arguments,
        prog="python -m diffusion_envs.words",
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    try:
        if isinstance(options, Measure):
            measured = measure(options.output, options.model, options.samples, options.seed)
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
    if not (options.output / "model" / "vae").is_dir():
        train_autoencoder.train(options.output, seed=options.seed)
    train_denoiser.train(options.output, seed=options.seed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
