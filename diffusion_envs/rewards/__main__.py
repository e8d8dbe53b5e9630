"""Get the weights of learned rewards, or see what rewards there are.

python -m diffusion_envs.rewards list
python -m diffusion_envs.rewards fetch image-reward --output reward-models/image-reward
python -m diffusion_envs.rewards convert image-reward ImageReward.pt reward-models/image-reward
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from diffusion_envs.rewards.fetching import convert, fetch
from diffusion_envs.rewards.preprocessing import Preprocessing
from diffusion_envs.rewards.registry import REWARDS, named
from diffusion_envs.rewards.weights import Weights

PROGRAM = "python -m diffusion_envs.rewards"
LEARNED = {name: entry for name, entry in REWARDS.items() if entry.weights is not None}


@dataclass(frozen=True)
class Fetch:
    """Download the weights of a reward into one folder; the same command goes on where it stopped.

    Attributes:
        name: of the reward, such as image-reward.
        output: folder for the files; reward-models/NAME if left out.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
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

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]

    def __call__(self) -> None:
        """Convert, and say what was written."""
        for path in convert(_weights(self.name), self.source, self.folder):
            print(path)


@dataclass(frozen=True)
class List:
    """Show every reward: version, licence, scale, how pictures are prepared, files."""

    def __call__(self) -> None:
        """Print the table."""
        table = Table("name", "what it is", title="Rewards", show_lines=True)
        for name, entry in REWARDS.items():
            hub = next(iter(entry.weights.repositories)) if entry.weights else None
            if entry.judges_only or (entry.model and hub is None):
                continue
            reward: Any = entry.make(hub)  # nothing is read
            table.add_row(name, "\n".join(_said(reward, entry.weights)))
        Console().print(table)


def _said(reward: Any, weights: Weights | None) -> list[str]:
    """What a reward says of itself, in lines."""
    says = reward.declaration
    gradient = "with a gradient" if reward.differentiable else "without a gradient"
    lines = [f"{says.version}; {says.licence}; {gradient}", says.scale]
    lines.append(f"pictures: {_in_words(says.preprocessing)}")
    for repository, files in {} if weights is None else weights.repositories.items():
        lines.append(f"{repository}: {', '.join(files)}")
    return [*lines, says.source]


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
    weights = named("reward", name, LEARNED).weights
    assert weights is not None  # of all that are LEARNED
    return weights


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
