"""Figure 5: samples of the embedded Stable Diffusion model, fine-tuned by DDPO and Score as Action.

Both start from the same model with the same noise and make the same network calls; what is
maximised is the reward classifier's log-probability of the prompt's class, what judges is another
classifier that no method sees.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from matplotlib.figure import Figure as Picture

from benchmarks.figures import three
from benchmarks.figures.figure import Figure, Kept, interval, paired, row, table
from diffusion_envs import objectives, rewards, samplers
from diffusion_envs.objectives import Objective
from diffusion_envs.rewards.classifier import load_classifier
from diffusion_envs.runs.finetune import make_environment
from diffusion_envs.runs.method_names import CLASS_PROMPTS
from diffusion_envs.sd15 import StableDiffusion
from diffusion_envs.training import parallel
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

REWARD, JUDGE, RIGHT = "reward", "judge", "share that the judge assigns to the prompt's class"


@dataclass(frozen=True)
class Budget:
    """How much is run.

    Attributes:
        seeds: of training.
        network_calls: of every run.
        samples: an update.
        steps: of the sampler.
        judged: samples of every prompt.
        model: what is fine-tuned.
        guidance: of it.
    """

    seeds: int = 3
    network_calls: int = 24_000
    samples: int = 40
    steps: int = 10
    judged: int = 8
    model: str = "tiny"
    guidance: float = 1.0


BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "cpu": Budget(),
        "gpu": Budget(network_calls=2_000_000, steps=50, samples=256, judged=32),
    }
)
METHODS: Mapping[str, Callable[[], Objective]] = MappingProxyType(
    {
        "DDPO": lambda: objectives.DDPO(learning_rate=1e-3),
        "Score as Action": lambda: objectives.ScoreAsAction(learning_rate=1e-3),
    }
)


def trained(method: str | None, seed: int, budget: Budget) -> dict[str, Any]:
    """One run's held-out samples, judged; of the pretrained model if no method is named."""
    accelerator = parallel.start()
    named = StableDiffusion(budget.model, guidance=budget.guidance)
    environment = make_environment(
        named.load(device=accelerator.device, batch=128, seed=seed),
        sampler=samplers.DDIM(),
        steps=budget.steps,
        reward=rewards.PromptAlignment("reward"),
        prompts=CLASS_PROMPTS,
        seed=seed,
    )
    if method is not None:
        size = UpdateSize(samples=budget.samples, batch=128)
        trainer = Trainer(environment, METHODS[method](), size, accelerator=accelerator)
        while environment.model.calls < budget.network_calls:
            trainer.step()
    calls = environment.model.calls
    judge = dataclasses.replace(environment, seed=0)  # the noise is the same for all
    rows = range(budget.judged * len(CLASS_PROMPTS))
    wanted = torch.arange(len(rows)) % len(CLASS_PROMPTS)
    sample = judge.sample(objectives.DDPO().policy, rows, wanted, stream="judged", reference=False)
    pictures = sample.images.cpu()
    prompts = [CLASS_PROMPTS[k] for k in wanted.tolist()]
    certain = rewards.PromptAlignment("judge")(pictures, prompts)
    right = load_classifier("judge")(pictures).argmax(1) == wanted
    return {
        REWARD: float(sample.rollout.rewards.mean()),
        JUDGE: float(certain.mean()),
        RIGHT: float(right.float().mean()),
        "network_calls": calls,
        "sheet": three.sheet(pictures[:40]),
    }


def run(budget: Budget, output: Path, seeds: int) -> Figure:
    """Sheets of the first seed, and what all seeds gained."""
    kept = Kept(output)

    def get(method: str | None, seed: int) -> dict[str, Any]:
        settings = {k: v for k, v in dataclasses.asdict(budget).items() if k != "seeds"}
        key = {"figure": 5, "method": method or "pretrained", "seed": seed, **settings}
        return kept.get(key, lambda: trained(method, seed, budget))

    start = get(None, 0)
    results = {method: [get(method, seed) for seed in range(seeds)] for method in METHODS}
    picture = Picture(figsize=(10, 2.4 * 3), layout="constrained")
    sheets = {"pretrained": start} | {method: each[0] for method, each in results.items()}
    for axes, (name, result) in zip(picture.subplots(3, 1), sheets.items(), strict=True):
        three.shown(axes, result["sheet"], name)
    data, lines = list[dict[str, Any]](), list[list[str]]()
    measures = (REWARD, JUDGE, RIGHT)
    for method, each in results.items():
        gains = {m: interval([one[m] - start[m] for one in each]) for m in measures}
        calls = each[0]["network_calls"]
        data += [
            row(f"gain in {m}", gains[m], method=method, network_calls=calls) for m in measures
        ]
        lines.append([method, *(str(gains[m]) for m in measures)])
    ddpo, ours = results.values()
    differences = {
        m: paired(*({k: one[m] for k, one in enumerate(each)} for each in (ours, ddpo)))
        for m in measures
    }
    data += [row(f"{m}, Score as Action less DDPO", d) for m, d in differences.items()]
    return Figure(
        title="Samples of the embedded Stable Diffusion model",
        settings=dataclasses.asdict(budget) | {"pretrained": {m: start[m] for m in measures}},
        data=data,
        picture=picture,
        paragraph=f"""
The embedded model, {budget.steps} steps, guidance {budget.guidance:g}, one prompt for each class of
CIFAR-10 (a column each), {budget.network_calls} network calls, {seeds} seeds; the sheets are of the
first. The pretrained model has a reward of {start[REWARD]:.3f}, the judge's is {start[JUDGE]:.3f},
and the judge assigns {start[RIGHT]:.2f} of its samples to the prompt's class. Both methods charge
what their defaults charge and have one learning rate, 1e-3.

{table(["method", *(f"gain in {m}" for m in measures)], lines)}

Score as Action less DDPO, seed by seed on the same noise: reward {differences[REWARD]}
({differences[REWARD].verdict("more", "less", "not told apart")}), judge {differences[JUDGE]}
({differences[JUDGE].verdict("more", "less", "not told apart")}).
""",
    )
