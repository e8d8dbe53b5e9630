"""Solvers that are one method have equal states on the same increments.

A BlackBox that is given Euler's step and its increments is EulerMaruyama; steps in place
are steps; simulate_end is the end of simulate.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import ctrl
from verification.claim import Check, Setting, pathwise

SOURCE = "definitions"

NODES = (0.0, 0.2, 0.5, 0.9)
ITO = ctrl.ControlledSDE(
    lambda t, x, a: x.sin() - 0.3 * t + a, lambda t, x: (0.5 + 0.3 * x.cos()) * (1 + 0.4 * t)
)
PLAIN = ctrl.ControlledSDE(ITO.drift, lambda t, x: 0.6)
SCALAR = ctrl.ControlledSDE(
    ITO.drift, lambda t, x: torch.stack([0.3 * x[:, 1], x[:, 0].cos()], 1), noise="scalar"
)


def checks(setting: Setting) -> Iterator[Check]:
    """Equal states on the same increments."""
    grid = ctrl.TimeGrid(setting.tensor(NODES))
    policy = ctrl.DeterministicPolicy(lambda t, x: 0.4 * x - 0.2 * t)
    generator = setting.generator("paths")
    many = ctrl.noise.brownian_increments(grid.steps, 5, (2,), generator=generator)
    start = setting.tensor([[0.8, -0.5]]) + many[:, 0]

    def stepped(solver: ctrl.Solver, sde: ctrl.ControlledSDE, increments: Tensor) -> Tensor:
        states = [start]
        for k, (t0, t1) in enumerate(zip(grid.nodes[:-1], grid.nodes[1:], strict=True)):
            action = policy.mean(t0, states[k])
            states.append(solver.step(sde, t0, t1, states[k], action, increments[:, k]))
        return torch.stack(states, dim=1)

    for name, solver, sde in (
        ("Euler-Maruyama", ctrl.EulerMaruyama(), ITO),
        ("Euler-Maruyama, a number as diffusion", ctrl.EulerMaruyama(), PLAIN),
        ("Euler-Maruyama, scalar noise", ctrl.EulerMaruyama(), SCALAR),
        ("Milstein", ctrl.Milstein(), ITO),
    ):
        increments = many[..., 0].contiguous() if sde.noise == "scalar" else many
        problem, noise = ctrl.ControlProblem(sde, NODES[-1]), ctrl.Noise(increments)
        whole = ctrl.simulate(problem, policy, start, grid, solver, noise=noise).states
        yield pathwise(f"{name}: in place and not", whole, stepped(solver, sde, increments))
        kept = start.clone()
        end = ctrl.simulate_end(problem, policy, kept, grid, solver, noise=noise)
        ends = torch.stack([end, kept])
        yield pathwise(f"{name}: the end alone", ends, torch.stack([whole[:, -1], start]))

    nodes = grid.nodes.tolist()

    def box(t0: Tensor, t1: Tensor, x: Tensor, action: Tensor) -> Tensor:
        k = nodes.index(float(t0))
        increment = many[:, k] if k < len(grid.steps) else 0 * x
        return ctrl.EulerMaruyama().step(ITO, t0, t1, x, action, increment)

    problem = ctrl.ControlProblem(ITO, NODES[-1])
    box_states = ctrl.simulate(problem, policy, start, grid, ctrl.BlackBox(box)).states
    yield pathwise(
        "a black box with Euler's step", box_states, stepped(ctrl.EulerMaruyama(), ITO, many)
    )


MISTAKES = """
ctrl.simulate._left_ends
    the policy acts at the right end's time | grid.nodes[:-1] => grid.nodes[1:]
ctrl.solvers.BlackBox.step
    action lost | states, action) => states, 0 * action)
    times exchanged | function(t0, t1, => function(t1, t0,
ctrl.solvers.EulerMaruyama.step_into
    in place: h for a number's increment | alpha=sigma, => alpha=float(t1 - t0),
    in place: drift without h | , alpha=float(t1 - t0)) => )
    in place: the states for the noise | states, sigma, increment => states, sigma, states
    in place: scalar noise twice | torch.add(states, sde.diffuse(t, states, increment, action), out=after)
        => torch.add(states, sde.diffuse(t, states, 2 * increment, action), out=after)
ctrl.solvers.Milstein.step_into
    Milstein in place without its term | after.add_(correction) => pass
ctrl.simulate._last_states
    the last step left out | in _left_ends(grid, start): => in list(_left_ends(grid, start))[:-1]:
    memory of the start written to | (x if k else torch.empty_like(start)) => x
shared
    drift of the next time in place
"""
