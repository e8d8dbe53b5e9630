"""How fast is an update, beside plain diffusers calls of the same number and a plain DDPO loop?

Three ways to spend the same network calls on the same model, in turns, in one process:

    ours     an update of ``Trainer`` with DDPO
    floor    plain diffusers: the pipeline itself samples, then the UNet is called with a gradient
             as often as an update needs, on the same rows; nothing is learned
    rival    DDPO as one would write it on diffusers and peft (``benchmarks.gpu.plain_ddpo``)

and, of an update, its own calls of UNet, autoencoder and reward alone, replayed. Medians of rounds
in which all alternate, with the range; ratios are within a round; processor time on a CPU, since
the machine is shared. The model is the embedded one, or Stable Diffusion 1.5's architecture
("full": random weights, 128 x 128 on a CPU).

    python -m benchmarks.update_speed [--model tiny|full] [--network] [--to docs]

``--network`` times the UNet alone instead: channels-last, bfloat16, ``torch.compile``, more rows.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size import build_sd15
from benchmarks.gpu.plain_ddpo import PlainDDPO
from benchmarks.pages import filled
from benchmarks.update import record
from diffusion_envs import objectives, rewards, samplers
from diffusion_envs.environment import Environment
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.runs.run_folder import versions
from diffusion_envs.training import parallel
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

PROMPTS = ["a photo of a cat"]
REWARD = rewards.Colour("red")
OBJECTIVES: dict[str, Callable[[], objectives.Objective]] = {
    "DDPO": objectives.DDPO,
    "GRPO": lambda: objectives.GRPO(group=2),
    "ScoreAsAction": objectives.ScoreAsAction,
    "DiffusionNFT": objectives.DiffusionNFT,
}


@dataclass(frozen=True)
class Setting:
    """What is timed: the model and the sizes of an update."""

    model: str | Path = "tiny"
    samples: int = 8
    steps: int = 5
    batch: int = 8
    guidance: float = 3.0
    resolution: int | None = None

    def load(self, **changes: Any) -> TextToImageUNet:
        """The model with a fresh adapter."""
        return TextToImageUNet.load(
            self.model,
            **{"guidance": self.guidance, "resolution": self.resolution, "batch": self.batch}
            | changes,
        )

    def trainer(self, model: TextToImageUNet, objective: objectives.Objective) -> Trainer:
        """Our loop, as after its first update: the preflight belongs to that one only."""
        made = Trainer(
            Environment(
                model=model,
                sampler=samplers.DDIM(eta=1.0).bind(model.table, self.steps),
                reward=REWARD,
                prompts=PROMPTS,
                seed=0,
                batch=self.batch,
            ),
            objective,
            UpdateSize(samples=self.samples, batch=self.batch, value_epochs=1),
            accelerator=parallel.start("cpu"),
        )
        made.update = 1
        return made

    def plain(self, model: TextToImageUNet) -> PlainDDPO:
        """The rival."""
        levels = len(model.table.alphas_cumprod)
        spaced = torch.linspace(levels - 1, levels / self.steps - 1, self.steps)
        return PlainDDPO(
            unet=model.pipe.unet,
            alphas_cumprod=model.pipe.scheduler.alphas_cumprod,
            timesteps=spaced.long().tolist(),
            context=model.condition(PROMPTS).tokens,
            event=model.event,
            reward=lambda latents: REWARD(model.decode(latents), PROMPTS * len(latents)),
            optimiser=torch.optim.AdamW(model.parameters, lr=1e-4),
            batch=self.batch,
            dtype=model.precision,
            empty=model.condition([""]).tokens,
            guidance=self.guidance,
        )


@dataclass(frozen=True, eq=False)
class PlainCalls:
    """The floor: as many calls by plain diffusers, of the same shapes."""

    setting: Setting
    model: TextToImageUNet

    def update(self) -> None:
        """Sample by the pipeline; then call the UNet with a gradient on every row of a path."""
        setting, pipe = self.setting, self.model.pipe
        pieces = [self.setting.batch] * (setting.samples // setting.batch)
        height, width = (side * pipe.vae_scale_factor for side in self.model.event[1:])
        for rows in pieces:
            pipe(
                PROMPTS * rows,
                num_inference_steps=setting.steps,
                guidance_scale=setting.guidance,
                eta=1.0,
                height=height,
                width=width,
                output_type="pt",
            )
        for _ in range(setting.steps):
            for rows in pieces:
                branches = rows * (1 if setting.guidance == 1 else 2)
                states = torch.randn(branches, *self.model.event)
                context = self.model.condition(PROMPTS).tokens.expand(branches, -1, -1)
                times = torch.full((branches,), 500)
                out = pipe.unet(states, times, encoder_hidden_states=context).sample
                out.square().mean().backward()
        pipe.unet.zero_grad(set_to_none=True)


def replayed(trainer: Trainer) -> tuple[Callable[[], None], dict[str, int]]:
    """The calls of an update alone, and how many of each kind."""
    calls: list[tuple[str, Callable[[], Any]]] = []
    environment: Any = trainer.environment
    record(environment.model, environment.reward, environment, calls)
    trainer.step()
    taken = list(calls)
    for part, name in (
        (environment.model.pipe.unet, "forward"),
        (environment.model.pipe.vae, "decode"),
    ):
        delattr(part, name)  # nothing is noted any more
    environment.reward = REWARD
    counts: dict[str, int] = {}
    for name, _ in taken:
        counts[name] = counts.get(name, 0) + 1

    def alone() -> None:
        for _, again in taken:
            again()

    return alone, counts


def update_rows(setting: Setting, rounds: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """One line a method, and the floor and the rival with the first."""
    generator, model = torch.Generator().manual_seed(0), setting.load()
    for name in names:
        trainer = setting.trainer(model, OBJECTIVES[name]())
        calls = model.calls
        alone, counts = replayed(trainer)
        calls = model.calls - calls
        timed: dict[str, Callable[[], Any]] = {"ours": trainer.step, "calls": alone}
        if name == "DDPO":
            timed["floor"] = PlainCalls(setting, model).update
            timed["rival"] = partial(setting.plain(model).update, setting.samples, generator)
        seconds = in_turns(timed, rounds)
        row: dict[str, Any] = {"method": name, "network_rows": calls, "calls": counts}
        row["seconds"] = {k: summary(v) for k, v in seconds.items()}
        row["images_per_second"] = {
            k: summary([setting.samples / s for s in v]) for k, v in seconds.items()
        }
        row["ours_over"] = {
            k: summary([a / b for a, b in zip(seconds["ours"], v, strict=True)])
            for k, v in seconds.items()
            if k != "ours"
        }
        yield row


WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "channels_last": {"channels_last": True},
    "bfloat16": {"precision": "bfloat16"},
    "compile": {"compile": True},
    "compile, channels_last": {"compile": True, "channels_last": True},
}


def network_rows(setting: Setting, rounds: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """The UNet alone: ways to run it, and how many rows at once pay."""
    ways = {name: setting.load(**WAYS[name]) for name in ["float32", *names]}
    plain = ways["float32"]
    rows = setting.batch
    states = torch.randn(rows, *plain.event, generator=torch.Generator().manual_seed(0))
    times = torch.arange(rows) % 1000
    context = plain.condition(PROMPTS)[torch.zeros(rows, dtype=torch.int64)]
    timed: dict[str, Callable[[], Any]] = {}
    for name, model in ways.items():
        timed[name] = partial(forward, model, states, times, context)
        timed[f"{name}, with gradient"] = partial(backward, model, states, times, context)
    first = in_turns(timed, 1)
    seconds = in_turns(timed, rounds)
    for name in timed:
        gradient = ", with gradient" if name.endswith("gradient") else ""
        base = seconds[f"float32{gradient}"]
        yield {
            "way": name,
            "rows": rows,
            "first_call_seconds": round(first[name][0], 2),
            "seconds": summary(seconds[name]),
            "times_as_fast": summary([a / b for a, b in zip(base, seconds[name], strict=True)]),
        }
    few = {
        k: partial(forward, plain, states[:k], times[:k], context[:k])
        for k in (1, 2, 4, 8, 16, 32)
        if k < rows
    }
    seconds = in_turns({str(k): f for k, f in few.items()} | {str(rows): timed["float32"]}, rounds)
    for k, values in seconds.items():
        yield {"way": "rows at once", "rows": int(k), "rows_per_second": rate(int(k), values)}


def forward(model: TextToImageUNet, *inputs: Any) -> None:
    """One call without a gradient."""
    with torch.no_grad():
        model(*inputs)


def backward(model: TextToImageUNet, *inputs: Any) -> None:
    """One call with its gradient."""
    model(*inputs).square().mean().backward()
    model.pipe.unet.zero_grad(set_to_none=True)


def in_turns(timed: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each, once in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, function in timed.items():
            began = time.process_time()
            function()
            seconds[name].append(time.process_time() - began)
    return seconds


def summary(values: list[float]) -> list[float]:
    """Median, least, most."""
    return [float(f"{v:.4g}") for v in (statistics.median(values), min(values), max(values))]


def rate(rows: int, seconds: list[float]) -> list[float]:
    """Rows a second: median, least, most."""
    return summary([rows / s for s in seconds])


# -- pages ---------------------------------------------------------------------------------------


def write(folder: Path, name: str, measured: dict[str, Any]) -> None:
    """Into ``speed.json``, and as a table into its place in ``speed.md``."""
    file, page = folder / "speed.json", folder / "speed.md"
    whole = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(whole | {name: measured}, indent=1) + "\n")
    if page.exists() and f"<!-- {name} -->" in page.read_text():
        page.write_text(filled(page.read_text(), name, table(measured)))


def table(measured: dict[str, Any]) -> str:
    """Markdown; each number with its range over the rounds."""
    rows = measured["rows"]
    if "method" in rows[0]:
        lines = [
            "| method | images a second | network rows | over its own calls | over plain calls | "
            "over plain DDPO |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row in rows:
            over = row["ours_over"]
            cells = [_cell(over[k]) if k in over else "" for k in ("calls", "floor", "rival")]
            speed = _cell(row["images_per_second"]["ours"])
            cells = [row["method"], speed, str(row["network_rows"]), *cells]
            lines.append(f"| {' | '.join(cells)} |")
        for k, name in (("floor", "plain diffusers calls"), ("rival", "plain DDPO")):
            lines.append(f"| {name} | {_cell(rows[0]['images_per_second'][k])} | | | | |")
        return "\n".join(lines)
    lines = ["| the network | rows | seconds | times as fast |", "| --- | --- | --- | --- |"]
    for row in rows:
        if "seconds" in row:
            cells = [row["way"], str(row["rows"])]
            cells += [_cell(row["seconds"]), _cell(row["times_as_fast"])]
            lines.append(f"| {' | '.join(cells)} |")
    batches = "; ".join(
        f"{row['rows']} at once {_cell(row['rows_per_second'])}"
        for row in rows
        if "rows_per_second" in row
    )
    return "\n".join([*lines, "", f"Rows a second in float32: {batches}."])


def _cell(values: list[float]) -> str:
    middle, least, most = (f"{v:.3g}" for v in values)
    return f"{middle} ({least} to {most})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--network", action="store_true", help="the UNet alone")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS)[1:])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--to", type=Path, help="folder with speed.md (default: print only)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        setting, names = Setting(), list(OBJECTIVES)
        if options.network:
            setting = Setting(batch=64, guidance=1.0)
        if options.model == "full":
            build_sd15(Path(temporary) / "model")
            setting, names = (
                Setting(Path(temporary) / "model", 2, 2, 2, guidance=1.0, resolution=128),
                ["DDPO"],
            )
        rows = (
            network_rows(setting, options.rounds, options.ways)
            if options.network
            else update_rows(setting, options.rounds, names)
        )
        measured: dict[str, Any] = {
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "rounds": options.rounds,
            "samples": setting.samples,
            "steps": setting.steps,
            "guidance": setting.guidance,
            "resolution": setting.resolution,
            "rows": [],
        }
        for row in rows:
            print(json.dumps(row), flush=True)
            measured["rows"].append(row)
    measured["versions"] = versions()
    if options.to is not None:
        write(options.to, f"{'network' if options.network else 'update'} {options.model}", measured)


if __name__ == "__main__":
    main()
