"""Synchronisations and launches: what the host waits for and asks a GPU for, counted without one.

On the simulated accelerator (``tests/device``), whose rules are CUDA's. Prints a table of the
roll-outs and estimators, for every step, and of one fine-tuning update of every objective, beside
the network calls in it; with ``--lines`` each synchronisation's line too, with ``--to`` into
``device.json`` of a folder.

    python -m benchmarks.device [--lines] [--to docs]
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ctrl
from diffusion_envs import objectives, rewards, samplers
from diffusion_envs.environment import Environment
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.runs.run_folder import versions
from diffusion_envs.training import parallel
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from tests.device import accelerator
from tests.device.counting import Counts, counting
from tests.device.memory import NAME

ROOT = Path(__file__).parent.parent
OURS = (ROOT / "ctrl", ROOT / "diffusion_envs")
READING = ROOT / "ctrl" / "devices.py"  # its callers are who asks
STEPS, SAMPLES, BATCH = 3, 4, 4  # of an update; rows that go through a network at once
FEW, MANY = 4, 8  # steps of two roll-outs, whose difference is that of the steps between


# -- roll-outs and estimators, for every step ------------------------------------------------------

SDE = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.4)
VARYING = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.4 + 0.1 * x.sin())
POLICY = ctrl.DeterministicPolicy(lambda t, x: -0.6 * x)
REFERENCE = ctrl.DeterministicPolicy(lambda t, x: 0.1 * x)

Evaluated = Callable[[ctrl.Paths], Any]


def rolled_out(
    sde: ctrl.ControlledSDE, solver: ctrl.Solver, steps: int, policy: ctrl.Policy = POLICY
) -> ctrl.Paths:
    """A roll-out on the device, the grid where grids usually are, on the CPU."""
    start = torch.linspace(-1, 1, 32).view(16, 2).to(NAME)
    generator = torch.Generator(NAME).manual_seed(0)
    grid = ctrl.uniform_grid(0.8, steps)
    problem = ctrl.ControlProblem(sde, 0.8)
    return ctrl.simulate(problem, policy, start, grid, solver, generator=generator)


def _simulated(sde: ctrl.ControlledSDE, solver: ctrl.Solver) -> Callable[[int], Any]:
    return lambda steps: rolled_out(sde, solver, steps)


def _along(evaluated: Evaluated) -> Callable[[int], Any]:
    """Without the roll-out itself."""

    def run(steps: int) -> Any:
        with paused():
            paths = rolled_out(VARYING, ctrl.EulerMaruyama(), steps)
        return evaluated(paths)

    return run


ROLL_OUTS: dict[str, Callable[[int], Any]] = {
    "simulate, EulerMaruyama": _simulated(SDE, ctrl.EulerMaruyama()),
    "simulate, EulerMaruyama, state-dependent noise": _simulated(VARYING, ctrl.EulerMaruyama()),
    "simulate, Milstein": _simulated(VARYING, ctrl.Milstein()),
    "simulate, Heun": _simulated(SDE.to_stratonovich(), ctrl.Heun()),
    "simulate, TorchSDE euler": _simulated(VARYING, ctrl.TorchSDE("euler")),
    "simulate, TorchSDE srk": _simulated(VARYING, ctrl.TorchSDE("srk")),
    "path_kl": _along(lambda paths: ctrl.girsanov.path_kl(VARYING, POLICY, REFERENCE, paths)),
    "transitions.log_prob": _along(
        lambda paths: ctrl.transitions.log_prob(VARYING, ctrl.EulerMaruyama(), POLICY, paths)
    ),
}


# -- fine-tuning -----------------------------------------------------------------------------------

OBJECTIVES: dict[str, objectives.Objective] = {
    "ScoreAsAction": objectives.ScoreAsAction(),
    "ScoreAsActionSampled": objectives.ScoreAsActionSampled(),
    "ScoreAsActionReleased": objectives.ScoreAsActionReleased(),
    "DDPO": objectives.DDPO(),
    "DDPOScoreFunction": objectives.DDPOScoreFunction(),
    "DPOK": objectives.DPOK(),
    "GRPO": objectives.GRPO(group=2),
    "PCPO": objectives.PCPO(group=2),
    "FlowDPPO": objectives.FlowDPPO(group=2),
    "GRPOGuard": objectives.GRPOGuard(group=2),
    "TDPO": objectives.TDPO(),
    "TDPOReset": objectives.TDPOReset(),
    "D3PO": objectives.D3PO(),
    "DenseReward": objectives.DenseReward(members=2, compared=2),
    "DiffusionDPO": objectives.DiffusionDPO(),
    "AdjointMatching": objectives.AdjointMatching(),
    "TiltedRegression": objectives.TiltedRegression(),
    "DxMI": objectives.DxMI(),
    "ContinuousDxMI": objectives.ContinuousDxMI(),
    "ContinuousDxMIReleased": objectives.ContinuousDxMIReleased(),
    "DxMIFromData": objectives.DxMIFromData(learning_rate=1e-3, energy_width=8),
    "ContinuousDxMIFromData": objectives.ContinuousDxMIFromData(energy_width=8),
    "ContinuousDxMIReleasedFromData": objectives.ContinuousDxMIReleasedFromData(energy_width=8),
    "DiffusionNFT": objectives.DiffusionNFT(),
    "ReinforceAdjointMatching": objectives.ReinforceAdjointMatching(),
    "DistributionalOptimisation": objectives.DistributionalOptimisation(),
    "ReFL": objectives.ReFL(),
    "DRaFT": objectives.DRaFT(),
    "AlignProp": objectives.AlignProp(),
}


@dataclass(frozen=True)
class Normals:
    """Data for objectives that learn from it."""

    event: tuple[int, ...]

    def draw(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Standard normals."""
        return torch.randn(n, *self.event, generator=generator)


def model(device: str = NAME) -> TextToImageUNet:
    """The embedded image model on the device."""
    return TextToImageUNet.load(guidance=1.0, batch=BATCH, lora_rank=2, device=device)


def trainer(objective: objectives.Objective, built: TextToImageUNet) -> Trainer:
    """A fresh trainer of a model."""
    size = UpdateSize(samples=SAMPLES, batch=BATCH, value_epochs=1)
    environment = Environment(
        model=built,
        sampler=samplers.DDIM().bind(built.table, STEPS),
        reward=rewards.Colour("red"),
        prompts=["a photo of a cat", "a photo of a ship"],
        seed=0,
        batch=BATCH,
    )
    data = Normals(built.event) if objective.needs_data else None
    return Trainer(environment, objective, size, accelerator=parallel.start(), data=data)


def without_rewards(counts: Counts) -> int:
    """Synchronisations but those of rewards, which are the user's."""
    sites = counts.synchronisations
    return sum(
        n for (_, site), n in sites.items() if not site.startswith("diffusion_envs/rewards/")
    )


@dataclass(frozen=True)
class Update:
    """One update, counted.

    Attributes:
        counts: of all of it.
        network_calls: of UNet, autoencoder and value network.
    """

    counts: Counts
    network_calls: int

    @property
    def synchronised(self) -> int:
        """Without what the reward asked for."""
        return without_rewards(self.counts)


def one_update(run: Trainer, built: TextToImageUNet) -> Update:
    """One update of a trainer, its network calls counted."""
    calls = Counter[str]()
    networks: dict[str, nn.Module] = {"unet": built.pipe.unet}
    if run.critic is not None:
        networks["value"] = run.critic.network
    hooks = [
        network.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        for name, network in networks.items()
    ]
    decode = built.pipe.vae.decode

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.update(["vae"])
        return decode(*args, **kwargs)

    built.pipe.vae.decode = counted
    try:
        with counting(*OURS, passing_over=[READING]) as counts:
            run.step()
    finally:
        built.pipe.vae.decode = decode
        for hook in hooks:
            hook.remove()
    return Update(counts, calls.total())


# -- counting --------------------------------------------------------------------------------------


@contextmanager
def paused() -> Iterator[None]:
    """Do not count what runs inside."""
    from tests.device import counting as module

    watching, module._counting[:] = list(module._counting), []
    try:
        yield
    finally:
        module._counting[:] = watching


def per_step(case: Callable[[int], Any]) -> tuple[float, float, Counts]:
    """Synchronisations and launches of one step more, and all lines of the longer run."""
    case(FEW)  # what is made at the first call only is nobody's
    totals = []
    for steps in (FEW, MANY):
        with counting(*OURS, passing_over=[READING]) as counts:
            case(steps)
        totals.append(counts)
    few, many = totals
    more = MANY - FEW
    waits = (many.synchronised - few.synchronised) / more
    return waits, (many.launched - few.launched) / more, many


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", action="store_true", help="of every synchronisation")
    parser.add_argument("--to", type=Path, help="folder of device.json (default: print only)")
    options = parser.parse_args()
    lines, steps, updates = options.lines, {}, {}
    accelerator.install()
    torch.set_num_threads(1)
    print("| for every step | synchronisations | launches |\n| --- | --- | --- |")
    for name, case in ROLL_OUTS.items():
        waits, launches, counts = per_step(case)
        steps[name] = {"synchronised": waits, "launched": launches}
        print(f"| {name} | {waits:g} | {launches:g} |")
        if lines:
            print("\n".join(counts.lines()))
    print(
        "\n| an update | synchronisations without rewards | network calls | launches |\n"
        "| --- | --- | --- | --- |"
    )
    for name, objective in OBJECTIVES.items():
        built = model()
        run = trainer(objective, built)
        run.step()  # the preflight belongs to the first update only
        update = one_update(run, built)
        calls, launches = update.network_calls, update.counts.launched
        updates[name] = {"synchronised": update.synchronised, "network_calls": calls}
        updates[name]["launched"] = launches
        print(f"| {name} | {update.synchronised} | {calls} | {launches} |", flush=True)
        if lines:
            print("\n".join(update.counts.lines()))
    if options.to is not None:
        measured = {"versions": versions(), "steps": steps, "updates": updates}
        (options.to / "device.json").write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
