"""How fast is ``ctrl.simulate`` beside torchsde, diffrax, a plain loop, and its normals alone?

Ornstein-Uhlenbeck, 4096 paths of dimension 8, float32; a roll-out with drawn actions and rewards;
a small network as drift, with and without gradient. All cases alternate within each round: in
processor time for one thread, in wall time for more. Ratios are within a round. Prints one JSON
line a case. Memory (of 200 steps) is the growth of the peak resident set while the case runs alone
in a fresh process.

    python -m benchmarks.simulate --steps 200 1000 --threads 1 --diffrax /path/to/python
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchsde
from torch import Tensor, nn

import ctrl
from diffusion_envs.runs.run_folder import versions

PATHS, DIM = 4096, 8
START = torch.zeros(PATHS, DIM)
GENERATOR = torch.Generator().manual_seed(0)
ZERO = torch.zeros(())
SDE = ctrl.ControlledSDE(drift=lambda t, x, a: -x, diffusion=lambda t, x: 0.5)
PROBLEM = ctrl.ControlProblem(SDE, 1.0)
POLICY = ctrl.DeterministicPolicy(lambda t, x: ZERO.expand(len(x), 1))
FEEDBACK = ctrl.DeterministicPolicy(lambda t, x: -0.5 * x)
DRAWING = ctrl.GaussianPolicy(lambda t, x: -0.5 * x, 0.3)
PAID = ctrl.ControlProblem(
    ctrl.ControlledSDE(drift=lambda t, x, a: a - x, diffusion=lambda t, x: 0.5),
    1.0,
    running_reward=lambda t, x, a: -x.square().sum(1) - 0.1 * a.square().sum(1),
    terminal_reward=lambda x: -x.square().sum(1),
)
NET = nn.Sequential(
    nn.Linear(DIM + 1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, DIM)
)


def network(t: Tensor, x: Tensor) -> Tensor:
    return NET(torch.cat([x, t.expand(len(x), 1)], dim=1))


NETWORK = ctrl.ControlProblem(
    ctrl.ControlledSDE(drift=lambda t, x, a: network(t, x), diffusion=lambda t, x: 0.5), 1.0
)


class TorchSDE(nn.Module):
    """The same equation as torchsde wants it."""

    noise_type, sde_type = "diagonal", "ito"

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return -y

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(y, 0.5)


def hand_torchsde(steps: int, method: str, hint: bool) -> object:
    times = torch.linspace(0, 1, steps + 1)
    brownian = None
    if hint:
        area = "space-time" if method == "srk" else "none"
        brownian = torchsde.BrownianInterval(
            0.0, 1.0, size=(PATHS, DIM), dt=1 / steps, levy_area_approximation=area
        )
    with torch.no_grad():
        return torchsde.sdeint(TorchSDE(), START, times, method=method, dt=1 / steps, bm=brownian)


def our_torchsde(steps: int, method: str) -> object:
    return ctrl.simulate(
        PROBLEM, POLICY, START, ctrl.uniform_grid(1.0, steps), ctrl.TorchSDE(method),
        generator=GENERATOR, keep=("states",),
    )  # fmt: skip


def plain_loop(steps: int) -> object:
    x, states, h = START, [START], 1 / steps
    for _ in range(steps):
        x = x - h * x + 0.5 * h**0.5 * torch.randn(PATHS, DIM, generator=GENERATOR)
        states.append(x)
    return torch.stack(states)


def normals(steps: int) -> object:
    buffer = torch.empty(PATHS, DIM)
    for _ in range(steps):
        buffer.normal_(generator=GENERATOR)
    return buffer


def simulated(problem: ctrl.ControlProblem, policy: ctrl.Policy, **settings: Any) -> Any:
    def run(steps: int) -> object:
        grid = ctrl.uniform_grid(1.0, steps)
        return ctrl.simulate(problem, policy, START, grid, generator=GENERATOR, **settings)

    return run


def reusing_memory() -> Callable[[int], object]:
    earlier: dict[int, ctrl.Paths] = {}

    def run(steps: int) -> object:
        earlier[steps] = ctrl.simulate(
            PROBLEM, FEEDBACK, START, ctrl.uniform_grid(1.0, steps), generator=GENERATOR,
            out=earlier.get(steps),
        )  # fmt: skip
        return earlier[steps]

    return run


def end_only(problem: ctrl.ControlProblem) -> Callable[[int], object]:
    return lambda steps: ctrl.simulate_end(
        problem, POLICY, START, ctrl.uniform_grid(1.0, steps), generator=GENERATOR
    )


def streams(steps: int) -> object:
    return ctrl.simulate(
        PROBLEM, POLICY, START, ctrl.uniform_grid(1.0, steps), keep=("states",),
        generator=ctrl.noise.PathStreams(0, ("benchmark",)),
    )  # fmt: skip


def roll_out(steps: int) -> object:
    grid, keep = ctrl.uniform_grid(1.0, steps), ("states", "actions")
    paths = ctrl.simulate(PAID, DRAWING, START, grid, generator=GENERATOR, keep=keep)
    return ctrl.returns_to_go(PAID, paths)


def network_end(steps: int) -> object:
    return end_only(NETWORK)(steps)


def network_calls(steps: int) -> object:
    """The network and the normals that such a roll-out cannot do without."""
    x, t, noise = START, torch.zeros(()), torch.empty(PATHS, DIM)
    with torch.no_grad():
        for _ in range(steps):
            noise.normal_(generator=GENERATOR)
            x = network(t, x)
    return x


def network_gradient(steps: int) -> object:
    grid = ctrl.uniform_grid(1.0, steps)
    end = ctrl.simulate_end(NETWORK, POLICY, START, grid, generator=GENERATOR, differentiable=True)
    return torch.autograd.grad(end.square().sum(1).mean(), list(NET.parameters()))


def network_gradient_calls(steps: int) -> object:
    """The same graph without an SDE: the network called in a row, and one backward pass."""
    x, t, noise = START, torch.zeros(()), torch.empty(PATHS, DIM)
    for _ in range(steps):
        noise.normal_(generator=GENERATOR)
        x = network(t, x)
    return torch.autograd.grad(x.square().sum(1).mean(), list(NET.parameters()))


CASES: dict[str, Callable[[int], object]] = {
    "simulate: states": simulated(PROBLEM, POLICY, keep=("states",)),
    "simulate_end": end_only(PROBLEM),
    "simulate: states, actions, increments": simulated(PROBLEM, FEEDBACK),
    "simulate: the same, memory reused": reusing_memory(),
    "simulate: states, streams by path": streams,
    "roll-out: drawn actions, rewards, returns": roll_out,
    "normals alone": normals,
    "normals of the roll-out": lambda steps: normals(2 * steps),
    "plain torch loop": plain_loop,
    "torchsde euler, default": lambda steps: hand_torchsde(steps, "euler", hint=False),
    "torchsde euler, told its dt": lambda steps: hand_torchsde(steps, "euler", hint=True),
    "ctrl.TorchSDE euler": lambda steps: our_torchsde(steps, "euler"),
    "torchsde milstein, told its dt": lambda steps: hand_torchsde(steps, "milstein", hint=True),
    "ctrl.TorchSDE milstein": lambda steps: our_torchsde(steps, "milstein"),
    "torchsde srk, told its dt": lambda steps: hand_torchsde(steps, "srk", hint=True),
    "ctrl.TorchSDE srk": lambda steps: our_torchsde(steps, "srk"),
    "simulate_end: network": network_end,
    "network and normals alone": network_calls,
    "simulate_end: network, gradient": network_gradient,
    "network and normals alone, gradient": network_gradient_calls,
}
DIFFRAX = ("diffrax batch", "diffrax vmap", "diffrax batch, end", "diffrax vmap, end", "scan")
PEER = {  # what each of ours is measured against
    "simulate: states": (
        "torchsde euler, default",
        "torchsde euler, told its dt",
        "plain torch loop",
        "normals alone",
        "diffrax batch",
        "diffrax vmap",
        "scan",
    ),
    "simulate_end": ("normals alone", "diffrax batch, end", "diffrax vmap, end"),
    "simulate: states, actions, increments": ("torchsde euler, default", "normals alone"),
    "simulate: the same, memory reused": ("torchsde euler, default", "normals alone"),
    "simulate: states, streams by path": ("simulate: states",),
    "roll-out: drawn actions, rewards, returns": ("normals of the roll-out",),
    "ctrl.TorchSDE euler": ("torchsde euler, told its dt",),
    "ctrl.TorchSDE milstein": ("torchsde milstein, told its dt",),
    "ctrl.TorchSDE srk": ("torchsde srk, told its dt",),
    "simulate_end: network": ("network and normals alone",),
    "simulate_end: network, gradient": ("network and normals alone, gradient",),
}
SLOW = ("srk", "gradient")  # at 200 steps only


class Diffrax:
    """Cases that another Python runs."""

    def __init__(self, python: str, threads: int) -> None:
        one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        settings = {"JAX_PLATFORMS": "cpu"} | ({"XLA_FLAGS": one} if threads == 1 else {})
        self.process = subprocess.Popen(
            [python, str(Path(__file__).parent / "diffrax_peer.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | settings,
        )  # fmt: skip

    def seconds(self, case: str, steps: int, threads: int) -> float:
        """Processor time for one thread, wall time for more."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(case, steps, file=self.process.stdin, flush=True)
        cpu, wall = self.process.stdout.readline().split()
        return float(cpu if threads == 1 else wall)


def own_seconds(case: str, steps: int, threads: int) -> float:
    """Processor time for one thread, wall time for more."""
    clock = time.process_time if threads == 1 else time.perf_counter
    started = clock()
    CASES[case](steps)
    return clock() - started


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
    result = CASES[name](200)
    growth = _peak(status.read_text()) - before
    del result
    return growth


def _peak(status: str) -> float:
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(
    steps: int, threads: int, rounds: int, diffrax: Diffrax | None
) -> dict[str, list[float]]:
    """Seconds of every case in every round, after one round that does not count."""
    cases = [name for name in CASES if steps <= 200 or not any(slow in name for slow in SLOW)]
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    if diffrax is not None:
        seconds |= {name: [] for name in DIFFRAX}
    for turn in range(rounds + 1):
        for name in seconds:
            if name in DIFFRAX:
                assert diffrax is not None
                took = diffrax.seconds(name, steps, threads)
            else:
                took = own_seconds(name, steps, threads)
            if turn:
                seconds[name].append(took)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[200])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--diffrax", help="a Python that has diffrax")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    diffrax = Diffrax(chosen.diffrax, chosen.threads) if chosen.diffrax else None
    print(json.dumps({"threads": chosen.threads, "rounds": chosen.rounds, "versions": versions()}))
    for steps in chosen.steps:
        seconds = measure(steps, chosen.threads, chosen.rounds, diffrax)
        for name, times in seconds.items():
            line: dict[str, Any] = {
                "steps": steps,
                "case": name,
                "ms_median": round(1e3 * statistics.median(times), 1),
                "ms_range": [round(1e3 * min(times), 1), round(1e3 * max(times), 1)],
                "million_path_steps_per_second": round(
                    PATHS * steps / statistics.median(times) / 1e6, 1
                ),
            }
            for peer in PEER.get(name, ()):
                if peer in seconds:
                    ratios = [b / a for a, b in zip(times, seconds[peer], strict=True)]
                    line[f"times faster than {peer}"] = round(statistics.median(ratios), 2)
            if steps == 200 and chosen.threads == 1 and "simulate" in name:
                line["peak_growth_mib"] = round(peak_growth(name), 1)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
