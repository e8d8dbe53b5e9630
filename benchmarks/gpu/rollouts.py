"""Roll-outs and path KLs on the device, beside the CPU and beside plain torch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import ctrl
from benchmarks.gpu.timing import Device

SIZES = ((4096, 8, 200), (65536, 64, 100))  # paths, dimensions, steps
TINY = ((64, 8, 5),)
POLICY = ctrl.DeterministicPolicy(lambda t, x: -0.5 * x)
REFERENCE = ctrl.DeterministicPolicy(lambda t, x: 0.1 * x)
SDE = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.5)


def rows(where: Device) -> Iterator[dict[str, Any]]:
    """One line a case and size."""
    for paths, dim, steps in TINY if where.rehearsal else SIZES:
        size = {"paths": paths, "dim": dim, "steps": steps}
        for name, case in cases(where.device, paths, dim, steps).items():
            yield {"case": name, **size, **where.seconds(case)}
        if where.device.type == "cuda":
            # the CPU's own, on all of its threads, in the same run
            host = Device(torch.device("cpu"), where.rehearsal)
            for name, case in cases(host.device, paths, dim, steps).items():
                yield {"case": f"{name}, on the CPU", **size, **host.seconds(case, runs=2)}
            yield from captured(where, paths, dim, steps)


def cases(
    device: torch.device, paths: int, dim: int, steps: int
) -> dict[str, Callable[[], object]]:
    """What is timed, float32."""
    start = torch.zeros(paths, dim, device=device)
    generator = torch.Generator(device).manual_seed(0)
    grid = ctrl.uniform_grid(1.0, steps)
    problem = ctrl.ControlProblem(SDE, 1.0)
    network = _network(dim).to(device)
    learned = ctrl.DeterministicPolicy(lambda t, x: network(x))

    def rolled(policy: ctrl.Policy, **settings: Any) -> ctrl.Paths:
        return ctrl.simulate(problem, policy, start, grid, generator=generator, **settings)

    kept = rolled(POLICY)

    def plain() -> Tensor:
        states, x, h = [start], start, 1 / steps
        for _ in range(steps):
            noise = torch.randn(paths, dim, device=device, generator=generator)
            x = x + h * (-0.5 * x - x) + 0.5 * h**0.5 * noise
            states.append(x)
        return torch.stack(states)

    def plain_network() -> Tensor:
        x, h = start, 1 / steps
        with torch.no_grad():
            for _ in range(steps):
                noise = torch.randn(paths, dim, device=device, generator=generator)
                x = x + h * (network(x) - x) + 0.5 * h**0.5 * noise
        return x

    return {
        "simulate, states kept": lambda: rolled(POLICY, keep=("states",)),
        "simulate, everything kept": lambda: rolled(POLICY),
        "simulate_end, network as policy": lambda: ctrl.simulate_end(
            problem, learned, start, grid, generator=generator
        ),
        "path_kl": lambda: ctrl.girsanov.path_kl(SDE, POLICY, REFERENCE, kept),
        "plain loop, states kept": plain,
        "plain loop, network as policy": plain_network,
    }


def captured(where: Device, paths: int, dim: int, steps: int) -> Iterator[dict[str, Any]]:
    """The plain loop as one CUDA graph: what launches cost the others."""
    h, noise = 1 / steps, torch.empty(paths, dim, device=where.device)
    states = torch.zeros(steps + 1, paths, dim, device=where.device)
    graph = torch.cuda.CUDAGraph()

    def loop() -> None:
        for k in range(steps):
            noise.normal_()
            states[k + 1].copy_(states[k] * (1 - 1.5 * h) + 0.5 * h**0.5 * noise)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        loop()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        loop()
    size = {"paths": paths, "dim": dim, "steps": steps}
    yield {"case": "plain loop, one CUDA graph", **size, **where.seconds(graph.replay)}


def _network(dim: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(dim, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, dim)
    )
