"""How fast is ``ctrl.simulate`` beside torchsde, a plain loop, and its normals alone?

Ornstein-Uhlenbeck, 4096 paths of dimension 8, 200 steps, float32, one thread. All cases alternate
within each round, in
processor time; ratios are within a round. Prints one JSON line a case. Memory is the growth of the
peak resident set
while the case runs alone in a fresh process.

    python -m benchmarks.simulate
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchsde

import ctrl
from diffusion_envs.training.run_folder import versions

PATHS, DIM, STEPS, ROUNDS = 4096, 8, 200, 9
START = torch.zeros(PATHS, DIM)
GRID = ctrl.uniform_grid(1.0, STEPS)
GENERATOR = torch.Generator().manual_seed(0)
ZERO = torch.zeros(())
SDE = ctrl.ControlledSDE(drift=lambda t, x, a: -x, diffusion=lambda t, x: 0.5)
PROBLEM = ctrl.ControlProblem(SDE, 1.0)
POLICY = ctrl.DeterministicPolicy(lambda t, x: ZERO.expand(len(x), 1))
FEEDBACK = ctrl.DeterministicPolicy(lambda t, x: -0.5 * x)


class TorchSDE(torch.nn.Module):
    """The same equation as torchsde wants it."""

    noise_type, sde_type = "diagonal", "ito"

    def f(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -y

    def g(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.full_like(y, 0.5)


def ours_all() -> object:
    return ctrl.simulate(PROBLEM, FEEDBACK, START, GRID, generator=GENERATOR)


def ours_states() -> object:
    return ctrl.simulate(PROBLEM, POLICY, START, GRID, generator=GENERATOR, keep=("states",))


TIMES = torch.linspace(0, 1, STEPS + 1)


def torchsde_default() -> object:
    with torch.no_grad():
        return torchsde.sdeint(TorchSDE(), START, TIMES, method="euler", dt=1 / STEPS)


def torchsde_hinted() -> object:
    brownian = torchsde.BrownianInterval(0.0, 1.0, size=(PATHS, DIM), dt=1 / STEPS)
    with torch.no_grad():
        return torchsde.sdeint(TorchSDE(), START, TIMES, method="euler", dt=1 / STEPS, bm=brownian)


def plain_loop() -> object:
    x, states = START, [START]
    h = 1 / STEPS
    for _ in range(STEPS):
        x = x - h * x + 0.5 * h**0.5 * torch.randn(PATHS, DIM, generator=GENERATOR)
        states.append(x)
    return torch.stack(states)


def normals_alone() -> object:
    buffer = torch.empty(PATHS, DIM)
    for _ in range(STEPS):
        buffer.normal_(generator=GENERATOR)
    return buffer


CASES: dict[str, Callable[[], object]] = {
    "simulate: states, actions, increments": ours_all,
    "simulate: states": ours_states,
    "torchsde euler, default": torchsde_default,
    "torchsde euler, told its dt": torchsde_hinted,
    "plain torch loop": plain_loop,
    "normals alone": normals_alone,
}


def peak_growth(name: str) -> float:
    """MiB by which one case raises the peak resident set of a fresh process."""
    code = (
        "import torch; torch.set_num_threads(1); from benchmarks import simulate as s; "
        f"print(s.grow({name!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def grow(name: str) -> float:
    """Within the fresh process (Linux: the peak resident set is reset, then read)."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    reset.write_text("5")
    before = _peak(status.read_text())
    result = CASES[name]()
    growth = _peak(status.read_text()) - before
    del result
    return growth


def _peak(status: str) -> float:
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for call in CASES.values():
        call()
    for _ in range(ROUNDS):
        for name, call in CASES.items():
            started = time.process_time()
            call()
            seconds[name].append(time.process_time() - started)
    print(json.dumps({"threads": 1, "rounds": ROUNDS, "versions": versions()}))
    for name, times in seconds.items():
        line: dict[str, Any] = {
            "case": name,
            "cpu_ms_median": round(1e3 * statistics.median(times), 1),
            "cpu_ms_range": [round(1e3 * min(times), 1), round(1e3 * max(times), 1)],
            "million_path_steps_per_second": round(
                PATHS * STEPS / statistics.median(times) / 1e6, 1
            ),
            "peak_growth_mib": round(peak_growth(name), 1),
        }
        for peer in ("torchsde euler, default", "torchsde euler, told its dt", "normals alone"):
            ratios = [b / a for a, b in zip(times, seconds[peer], strict=True)]
            line[f"times faster than {peer}"] = round(statistics.median(ratios), 2)
        print(json.dumps(line))


if __name__ == "__main__":
    main()
