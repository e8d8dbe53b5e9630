"""Get the weights of learned rewards, or see what rewards there are.

python -m diffusion_envs.rewards list
python -m diffusion_envs.rewards fetch image-reward --output reward-models/image-reward
python -m diffusion_envs.rewards convert image-reward ImageReward.pt reward-models/image-reward
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from diffusion_envs.rewards import aesthetic, clip_score, hps, image_reward, pick_score
from diffusion_envs.rewards.declaration import Declaring
from diffusion_envs.rewards.fetching import convert, fetch
from diffusion_envs.rewards.preprocessing import Preprocessing
from diffusion_envs.rewards.registry import REWARDS, named
from diffusion_envs.rewards.weights import Weights

PROGRAM = "python -m diffusion_envs.rewards"
LEARNED: Mapping[str, tuple[Weights, Callable[[str], Any]]] = {
    weights.reward: (weights, make)
    for weights, make in (
        (image_reward.WEIGHTS, image_reward.ImageReward),
        (hps.WEIGHTS, hps.HPS),
        (hps.WEIGHTS_2_0, lambda model: hps.HPS(model, version="2.0")),
        (pick_score.WEIGHTS, pick_score.PickScore),
        (clip_score.WEIGHTS, clip_score.CLIPScore),
        (aesthetic.WEIGHTS, aesthetic.Aesthetic),
        (aesthetic.WEIGHTS_V1, lambda model: aesthetic.Aesthetic(model, version="v1")),
    )
}


@dataclass(frozen=True)
class Fetch:
    """Download the weights of a reward into one folder; the same command goes on where it stopped.

    Attributes:
        name: of the reward, such as image-reward.
        output: folder for the files; reward-models/NAME if left out.
    """

    name: tyro.conf.Positional[str]
    output: Path | None = None

    def __call__(self) -> None:
        """Fetch, and say what is where."""
        folder = self.output or Path("reward-models") / self.name
        for role, path in fetch(_weights(self.name), folder).items():
            print(f"{role}: {path}")
        print(f"use it with: --reward {self.name} --reward-model {folder}")


@dataclass(frozen=True)
class Convert:
    """Write published .pt, .pth or .bin files as safetensors, once; nothing in them is executed.

    Attributes:
        name: of the reward, such as image-reward.
        source: folder, file or hub id of the published weights.
        folder: for the new files; nothing in it is overwritten.
    """

    name: tyro.conf.Positional[str]
    source: tyro.conf.Positional[str]
    folder: tyro.conf.Positional[Path]

    def __call__(self) -> None:
        """Convert, and say what was written."""
        for path in convert(_weights(self.name), self.source, self.folder):
            print(path)


@dataclass(frozen=True)
class List:
    """Show every reward that declares itself: version, licence, scale, pictures, files."""

    def __call__(self) -> None:
        """Print the table."""
        made = {  # from a hub id, so that nothing is read
            name: make(next(iter(weights.repositories)))
            for name, (weights, make) in LEARNED.items()
        }
        plain = {name: entry.make(None) for name, entry in REWARDS.items() if entry.model is None}
        table = Table(title="Rewards", show_lines=True)
        for heading in ("name", "version", "licence", "scale", "pictures", "gradient", "files"):
            table.add_column(heading, overflow="fold")
        for name, reward in {**made, **plain}.items():
            if not isinstance(reward, Declaring):
                continue
            says, repositories = reward.declaration, {}
            if name in LEARNED:
                repositories = LEARNED[name][0].repositories
            files = "\n".join(f"{', '.join(f)} of {where}" for where, f in repositories.items())
            gradient = "yes" if getattr(reward, "differentiable", False) else "no"
            pictures = _in_words(says.preprocessing)
            table.add_row(name, says.version, says.licence, says.scale, pictures, gradient, files)
        Console().print(table)


def _in_words(preprocessing: Preprocessing | str) -> str:
    if isinstance(preprocessing, str):
        return preprocessing
    fit = {
        "crop": "shortest side resized, centre cropped",
        "pad": "longest side resized, padded with black",
        "stretch": "resized, whatever its proportions",
    }[preprocessing.fit]
    return f"{preprocessing.size} x {preprocessing.size}: {fit}"


def _weights(name: str) -> Weights:
    return named("reward", name, LEARNED)[0]


def main(arguments: Sequence[str]) -> int:
    """Run one command; the verdict is the exit code."""
    commands = {"fetch": Fetch, "convert": Convert, "list": List}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, args=list(arguments), prog=PROGRAM)()
    except SystemExit as ended:  # help, or a wrong word: it is printed
        return int(ended.code or 0)
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on\n")
        return 130
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
