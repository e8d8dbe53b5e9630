"""How often does the verdict on over-optimisation name a fall that is not there?

Runs are simulated whose reward is pure noise: pictures, judges and rewards of every evaluation come
from the pretrained model's own law, or, "at the margin", from laws that differ by exactly what the
verdict calls too little to matter. They depend on the pretrained samples of their seeds (with the
correlation of the setting) and on the evaluations before, as in a real run; the path KL counts as
not known, so that it excuses nothing. The metrics and the verdict are those of every run:

    false alarms   share of runs in which the closing verdict names a fall; at most 5 %
    accusations    share in which it says over-optimisation
    ever           share in which a verdict asked after every evaluation named a fall at least once

with standard errors, one JSON line for each setting.

    python -m benchmarks.over_optimisation --runs 2000
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from diffusion_envs.runs import over_optimisation
from diffusion_envs.runs.evaluation import Evaluation

PICTURE = (3, 2, 2)


@dataclass(frozen=True)
class Setting:
    """What the simulated runs are like.

    Attributes:
        correlation: of a sample with the pretrained one of its seed; 0: another picture each time.
        tails: of the judges: normal, Student's with 4 degrees of freedom, or lognormal (skewed).
        evaluations: lines of a run.
        samples: of the last evaluation; the others have half of them.
        prompts: that samples take in turn.
        judges: how many.
        gain: of the reward from one evaluation to the next, in standard deviations.
        at_the_margin: judges and diversity of pixels have fallen by all that does not matter.
    """

    correlation: float = 0.9
    tails: Literal["normal", "student", "lognormal"] = "normal"
    evaluations: int = 4
    samples: int = 32
    prompts: int = 4
    judges: int = 2
    gain: float = 0.0
    at_the_margin: bool = False


SETTINGS = (
    Setting(),
    Setting(correlation=0.0),
    Setting(correlation=0.999),
    Setting(correlation=0.5, tails="student"),
    Setting(correlation=0.5, tails="lognormal"),
    Setting(correlation=0.5, tails="lognormal", gain=1.0),
    Setting(correlation=0.0, gain=1.0),
    Setting(correlation=0.5, evaluations=12, judges=3, gain=1.0),
    Setting(evaluations=1, samples=12, judges=1),
    Setting(samples=16, prompts=2),
    Setting(at_the_margin=True, gain=1.0),
    Setting(correlation=0.0, evaluations=1, at_the_margin=True),
    Setting(correlation=0.0, tails="student", evaluations=1, at_the_margin=True),
)


@dataclass(frozen=True)
class Options:
    """What to simulate.

    Attributes:
        runs: of each setting.
        seed: of all randomness.
    """

    runs: int = 2000
    seed: int = 0


class Projection:
    """An embedding of pictures: six fixed mixtures of the pixels."""

    def __init__(self) -> None:
        width = math.prod(PICTURE)
        self.matrix = torch.randn(width, 6, generator=torch.Generator().manual_seed(1))

    def embedding(self, images: Float[Tensor, " n *picture"]) -> Float[Tensor, "n width"]:
        """Six numbers of a picture."""
        return images.flatten(1).float() @ self.matrix


def lines(setting: Setting, generator: torch.Generator) -> list[dict[str, object]]:
    """The lines of ``over_optimisation.jsonl`` of one simulated run."""
    n, width = setting.samples, math.prod(PICTURE)
    rho = setting.correlation

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    asked = [str(i % setting.prompts) for i in range(n)]
    centres = normal(setting.prompts, width)[[int(name) for name in asked]]
    # judges share a cause with each other and with the pictures' first coordinate
    pretrained = normal(n, width + setting.judges)
    fresh = normal(n, width + setting.judges)
    before = _evaluation(setting, pretrained, centres, asked, normal(n), fallen=False)
    # scaled noise scales pixel distances as much, but not 1 - cosine
    spaces = {} if setting.at_the_margin else {"features": Projection()}
    written = []
    for k in range(setting.evaluations):
        fresh = 0.9 * fresh + math.sqrt(1 - 0.81) * normal(*fresh.shape)
        last = k == setting.evaluations - 1
        seen = rho * pretrained + math.sqrt(1 - rho**2) * fresh
        rewards = k * setting.gain + normal(n)
        after = _evaluation(setting, seen, centres, asked, rewards, setting.at_the_margin)
        after = after if last else after.first(n // 2)
        numbers = over_optimisation.metrics(before, after, spaces)
        plain = {name: value.as_dict() for name, value in numbers.items()}
        written.append({"update": 10 * (k + 1), **plain})
    return written


def _evaluation(
    setting: Setting,
    noise: Float[Tensor, "n all"],
    centres: Float[Tensor, "n width"],
    asked: list[str],
    rewards: Float[Tensor, " n"],
    fallen: bool,
) -> Evaluation:
    width = centres.shape[1]
    latent = math.sqrt(0.5) * (noise[:, width:] + noise[:, :1])
    match setting.tails:
        case "normal":
            judged, std = latent, 1.0
        case "lognormal":
            judged, std = latent.exp(), math.sqrt((math.e - 1) * math.e)
        case "student":
            judged, std = _student(torch.special.ndtr(latent)), math.sqrt(2.0)
    shift = over_optimisation.JUDGE_FALL * std if fallen else 0.0
    scale = 1 - over_optimisation.DIVERSITY_FALL if fallen else 1.0
    pictures = 0.5 + 0.1 * (0.3 * centres + scale * noise[:, :width])
    return Evaluation(
        rewards=rewards,
        judged={f"judge{j}": judged[:, j] - shift for j in range(setting.judges)},
        path_kl=torch.full((len(asked),), math.inf),
        chain_kl=torch.full((len(asked),), math.inf),
        images=pictures.reshape(-1, *PICTURE),
        prompts=asked,
    )


def _student(p: Tensor) -> Tensor:
    """Quantiles of Student's t with 4 degrees of freedom, which have a closed form."""
    root = (4 * p * (1 - p)).sqrt()
    squared = 4 * ((root.acos() / 3).cos() / root - 1)
    return (p - 0.5).sign() * squared.clamp_min(0).sqrt()


def simulate(setting: Setting, runs: int, seed: int = 0) -> dict[str, float]:
    """The share of runs with false alarms, accusations, and false alarms at any time."""
    generator = torch.Generator().manual_seed(seed)
    counts = {"false_alarms": 0, "accusations": 0, "ever": 0}
    for _ in range(runs):
        written = lines(setting, generator)
        verdicts = [over_optimisation.verdict(written[: k + 1]) for k in range(len(written))]
        fallen = [bool(said.fallen) for said in verdicts if said is not None]
        last = verdicts[-1]
        counts["false_alarms"] += fallen[-1]
        counts["accusations"] += last is not None and last.over_optimised
        counts["ever"] += any(fallen)
    return {name: count / runs for name, count in counts.items()}


def main(options: Options) -> None:
    """One JSON line for each setting."""
    for setting in SETTINGS:
        rates = simulate(setting, options.runs, options.seed)
        shown = {
            name: [rate, math.sqrt(rate * (1 - rate) / options.runs)]
            for name, rate in rates.items()
        }
        line = dataclasses.asdict(setting) | {"runs": options.runs, "seed": options.seed} | shown
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
