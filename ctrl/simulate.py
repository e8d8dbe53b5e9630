"""Roll-outs of a policy."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from ctrl.noise import Noise
from ctrl.paths import Paths, TimeGrid
from ctrl.policy import Policy
from ctrl.problem import ControlProblem
from ctrl.solvers import EulerMaruyama, Solver

KEEP = ("states", "actions", "increments")


def simulate(
    problem: ControlProblem,
    policy: Policy,
    start: Float[Tensor, " paths *event"],
    grid: TimeGrid,
    solver: Solver | None = None,
    *,
    noise: Noise | None = None,
    generator: Generator | None = None,
    keep: Sequence[str] = KEEP,
    differentiable: bool = False,
) -> Paths:
    """Sample paths of the controlled SDE under a policy.

    At every node the policy acts once; the action is held over the step.

    Args:
        problem: whose ``sde`` is simulated.
        policy: acts at the left end of every step.
        start: states at the first node; their dtype and device are the paths'.
        grid: the nodes.
        solver: one-step map; ``EulerMaruyama()`` if not given.
        noise: explicit increments (and action noise), or
        generator: to draw them from; exactly one of the two.
        keep: what to keep of "states", "actions", "increments". States are always whole.
        differentiable: keep the graph, so that gradients flow through the path.

    Returns:
        The paths.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; a state became infinite or NaN; both or
        neither of
            ``noise`` and ``generator`` are given.
        TypeError: ``start`` is not floating point.
    """
    solver = solver or EulerMaruyama()
    if (noise is None) == (generator is None):
        raise ValueError("give exactly one of noise and generator")
    if unknown := sorted(set(keep) - set(KEEP)):
        raise ValueError(f"keep must name some of {KEEP}, got {unknown}")
    if start.ndim < 1 or not len(start):
        raise ValueError(f"start must be [paths, *event] with paths, got {list(start.shape)}")
    if not start.is_floating_point():
        raise TypeError(f"start must be floating point, got {start.dtype}")
    if not bool(torch.isfinite(start).all()):
        raise ValueError("start must be finite")
    shape = (len(start), len(grid.steps), *problem.sde.noise_shape(tuple(start.shape[1:])))
    if noise is not None:
        _check(noise, shape, start)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        paths = _roll_out(problem, policy, start, grid, solver, noise, generator, shape, keep)
    final = paths.states[:, -1]
    if not bool(torch.isfinite(final).all()):
        finite = torch.isfinite(paths.states).flatten(2).all(2).all(0)
        node = int((~finite).nonzero()[0])
        raise ValueError(
            f"states are not finite from node {node} (t = {grid.nodes[node]:g}) on: drift, "
            f"diffusion, policy "
            "or start are too large for the step; refine the grid or bound them"
        )
    return paths


def _check(noise: Noise, shape: tuple[int, ...], start: Tensor) -> None:
    if noise.increments.shape != shape:
        raise ValueError(
            f"increments must be {list(shape)} to fit start and grid, got "
            f"{list(noise.increments.shape)}"
        )
    for name in ("increments", "actions", "weights"):
        value = getattr(noise, name)
        if value is not None and (value.dtype != start.dtype or value.device != start.device):
            raise ValueError(
                f"{name} must be {start.dtype} on {start.device}, as start is, got {value.dtype} "
                f"on "
                f"{value.device}"
            )


def _roll_out(
    problem: ControlProblem,
    policy: Policy,
    start: Tensor,
    grid: TimeGrid,
    solver: Solver,
    noise: Noise | None,
    generator: Generator | None,
    shape: tuple[int, ...],
    keep: Sequence[str],
) -> Paths:
    sde = problem.sde
    fused = type(solver) is EulerMaruyama and not torch.is_grad_enabled()
    plain = fused and sde.noise == "diagonal"
    times = grid.nodes.to(start)  # for drift and policy; step sizes keep the grid's precision
    sizes = grid.steps.tolist()
    steps = len(sizes)
    buffer = start.new_empty(steps + 1, *start.shape) if fused else None
    if buffer is not None:
        buffer[0] = start
    kept_noise = None
    if noise is None and "increments" in keep:
        kept_noise = start.new_empty(steps, shape[0], *shape[2:])
    states, x = [start], start
    actions: list[Tensor] = []
    kept_actions: Tensor | None = None  # one buffer, once the first action has shown its shape
    for k, h in enumerate(sizes):
        t = times[k]
        mean = policy.mean(t, x)
        action = policy.act(mean, t, _action_noise(policy, mean, k, noise, generator))
        if "actions" in keep and fused:
            if kept_actions is None:
                kept_actions = action.new_empty(steps, *action.shape)
            kept_actions[k] = action
        elif "actions" in keep:
            actions.append(action)
        if noise is not None:
            increment = noise.increments[:, k]
        else:
            into = kept_noise[k] if kept_noise is not None else None
            if into is None and plain and buffer is not None:
                into = buffer[k + 1]  # the path's own next row holds the normals first
            into = start.new_empty(shape[0], *shape[2:]) if into is None else into
            # normal_(std=...) is twice as slow as normal_() and a product
            increment = into.normal_(generator=generator).mul_(math.sqrt(h))
        if not fused or buffer is None:
            x = solver.step(sde, grid.nodes[k], grid.nodes[k + 1], x, action, increment)
            states.append(x)
            continue
        after = buffer[k + 1]
        sigma = sde.diffusion(t, x) if plain else None
        if isinstance(sigma, float | int):
            torch.add(x, increment, alpha=sigma, out=after)
        elif sigma is not None:
            torch.addcmul(x, sigma, increment, out=after)
        else:
            torch.add(x, sde.spread(t, x, increment), out=after)
        x = after.add_(sde.drift(t, x, action), alpha=h)
    if actions:
        kept_actions = torch.stack(actions)
    whole = buffer if buffer is not None else torch.stack(states)
    increments = noise.increments if noise is not None else None
    if kept_noise is not None:
        increments = kept_noise.movedim(0, 1)
    return Paths(
        states=whole.movedim(0, 1),
        actions=kept_actions.movedim(0, 1) if kept_actions is not None else None,
        increments=increments if "increments" in keep else None,
        grid=grid,
        weights=noise.weights if noise is not None else None,
    )


def _action_noise(
    policy: Policy, mean: Tensor, k: int, noise: Noise | None, generator: Generator | None
) -> Tensor | None:
    if not policy.is_random:
        return None
    if noise is None:
        return torch.empty_like(mean).normal_(generator=generator)
    if noise.actions is None:
        raise ValueError("noise must hold actions: the policy draws its actions")
    if noise.actions.shape[2:] != mean.shape[1:]:
        raise ValueError(
            f"noise.actions must be [paths, steps, *{list(mean.shape[1:])}] to fit the policy's "
            f"actions, got "
            f"{list(noise.actions.shape)}"
        )
    return noise.actions[:, k]
