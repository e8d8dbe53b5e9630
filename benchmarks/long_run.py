"""Does a run of thousands of updates stay as it began: its memory, its pace, what it writes?

The cheapest model that ``finetune`` takes (the exact score of normal pictures of 2 x 2 pixels, and
a linear correction that trains) or the smallest UNet is fine-tuned by ``finetune`` itself, with
everything that a run does: logs, TensorBoard, pictures, evaluations, checkpoints, an export, a card
and a report. Its reward is asked once an update, and looks at the process then. Printed are

    memory     resident, the mean of a window after warm-up and of the last one
    seconds    of the processor for an update, the median of the same windows
    sizes      of every file and folder of the run, and what an update adds to each

    python -m benchmarks.long_run [--updates 5000] [--prompts 200] [--unet] [--folder runs/long]
"""

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
import tyro
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from diffusion_envs.cifar10.family import Cifar10Model
from diffusion_envs.exact.problems import table as noise_levels
from diffusion_envs.models.exact import AffineCorrection, CorrectedScore
from diffusion_envs.objectives import DDPO
from diffusion_envs.runs.finetune import finetune
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.training.update_size import UpdateSize

SAMPLES, STEPS, SIDE = 4, 2, 8
EVALUATED = 3  # held-out samples, another number than an update's
WARM_UP = 0.1  # of the updates, before which memory still rises: libraries load, caches fill
WINDOW = 0.1  # of the updates, at either end
GROWTH = 0.01  # of memory that is allowed between the two
REPORT = 5 * 2**20  # bytes


@dataclass
class Watched:
    """How red pictures are; and memory and processor time whenever an update's are judged."""

    resident: list[int] = field(default_factory=list, repr=False)
    seconds: list[float] = field(default_factory=list, repr=False)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Mean red less the mean of the other colours."""
        if len(images) == SAMPLES:
            self.resident.append(resident())
            self.seconds.append(time.process_time())
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def resident() -> int:
    """Bytes of this process that are in memory now; not the most that ever were."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class _Pictures(CorrectedScore):
    """States that are pictures of 2 x 2 pixels, normal around grey."""

    def decode(self, states: Tensor) -> Tensor:
        """Values in [0, 1]."""
        return (states.view(-1, 3, 2, 2) / 6 + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class ExactPictures:
    """The exact score of normal pictures, to be loaded by ``finetune``."""

    device: str | None = "cpu"

    def load(self, *, device: torch.device, batch: int, seed: int) -> CorrectedScore:
        """The score with a linear correction, zero at first."""

        def score(states: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
            return -states  # noised data of variance 1 has variance 1

        return _Pictures(score, AffineCorrection(12), noise_levels(), 12, device)


def save_smallest(folder: Path) -> Path:
    """The smallest pipeline, with random weights."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = UNet2DModel(
            sample_size=SIDE,
            block_out_channels=(4,),
            layers_per_block=1,
            norm_num_groups=2,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            add_attention=False,
        )
    DDPMPipeline(unet=network, scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class LongRun:
    """What a run was like early and late.

    Attributes:
        updates: of the run.
        memory: resident bytes, the means of a window after warm-up and of the last one.
        growth: of memory from the first to the last, relative.
        tenths: resident bytes, the mean of each tenth of the updates: does growth come to an end?
        bytes_an_update: slope of memory against updates after warm-up, by least squares.
        seconds: of the processor for an update, the medians of the two windows.
        report: bytes.
        sizes: bytes of each file and folder at the top of the run's.
        files: number of files in each folder.
    """

    updates: int
    memory: tuple[int, int]
    growth: float
    tenths: tuple[int, ...]
    bytes_an_update: float
    seconds: tuple[float, float]
    report: int
    sizes: dict[str, int]
    files: dict[str, int]

    @property
    def flat(self) -> bool:
        """Whether memory is flat and the report small."""
        return self.growth <= GROWTH and self.report <= REPORT


def run(
    folder: Path, updates: int, prompts: int, *, unet: bool = False, picture_every: int = 10
) -> LongRun:
    """Fine-tune in ``folder`` and measure.

    Args:
        folder: for the run.
        updates: of it.
        prompts: that take turns.
        unet: the smallest UNet instead of the exact score.
        picture_every: updates between pictures.
    """
    reward, model = Watched(), ExactPictures()
    if unet:
        model = Cifar10Model(save_smallest(folder / "model"), device="cpu")
    gc.collect()
    finetune(
        model,
        reward=reward,
        prompts=[f"picture number {k}" for k in range(prompts)],
        objective=DDPO(learning_rate=1e-4),
        output=folder / "run",
        steps=STEPS,
        updates=updates,
        size=UpdateSize(samples=SAMPLES, batch=64),
        options=RunOptions(
            evaluation_samples=EVALUATED,
            picture_every=picture_every,
            progress=False,
            log_path_kl=True,
        ),
    )
    return measured(folder / "run", reward)


def measured(folder: Path, reward: Watched) -> LongRun:
    """Numbers of a finished run."""
    resident, n = reward.resident, len(reward.resident)
    seconds = [after - before for before, after in pairwise(reward.seconds)]
    first, width = round(WARM_UP * n), round(WINDOW * n)
    early, late = slice(first, first + width), slice(n - 1 - width, n - 1)
    start, end = (statistics.fmean(resident[part]) for part in (early, late))
    after = resident[first:]
    edges = [round(k * n / 10) for k in range(11)]
    tenths = [resident[i:j] for i, j in pairwise(edges)]
    slope = statistics.linear_regression(range(len(after)), after).slope
    tops = sorted(folder.iterdir())
    below = {path.name: [p for p in path.rglob("*") if p.is_file()] for path in tops}
    return LongRun(
        updates=n,
        memory=(round(start), round(end)),
        growth=end / start - 1,
        tenths=tuple(round(statistics.fmean(part)) for part in tenths if part),
        bytes_an_update=slope,
        seconds=(statistics.median(seconds[early]), statistics.median(seconds[late])),
        report=(folder / "report.html").stat().st_size,
        sizes={p.name: sum(f.stat().st_size for f in below[p.name] or [p]) for p in tops},
        files={name: len(files) for name, files in below.items() if files},
    )


def table(long: LongRun) -> str:
    """The numbers as a table of Markdown."""
    start, end = long.memory
    early, late = (1e3 * each for each in long.seconds)
    lines = [
        f"{long.updates:,} updates",
        "",
        "| what | early | late | |",
        "| --- | --- | --- | --- |",
        f"| resident memory (MB) | {start / 1e6:.1f} | {end / 1e6:.1f} | "
        f"{100 * long.growth:+.2f} %, {long.bytes_an_update:+.0f} bytes an update |",
        f"| milliseconds of the processor for an update | {early:.1f} | {late:.1f} | "
        f"{100 * (late / early - 1):+.0f} % |",
        "",
        f"memory of each tenth (MB): {', '.join(f'{each / 1e6:.1f}' for each in long.tenths)}",
        "",
        "| file or folder | bytes | files | bytes an update |",
        "| --- | --- | --- | --- |",
    ]
    for name, size in long.sizes.items():
        each = size / long.updates
        files = long.files.get(name, 1)
        lines.append(f"| `{name}` | {size:,} | {files} | {each:,.0f} |")
    return "\n".join(lines)


def main(
    updates: int = 5000, prompts: int = 200, folder: Path | None = None, unet: bool = False
) -> int:
    """Make a long run, print its numbers; the exit code says whether they are flat.

    Args:
        updates: of the run.
        prompts: that take turns.
        folder: to keep the run in; forgotten if left out.
        unet: the smallest UNet instead of the exact score.
    """
    with tempfile.TemporaryDirectory() as other:
        place = folder or Path(other)
        place.mkdir(parents=True, exist_ok=True)
        long = run(place, updates, prompts, unet=unet)
    print(table(long))
    print(json.dumps(asdict(long)), file=sys.stderr)
    return 0 if long.flat else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
