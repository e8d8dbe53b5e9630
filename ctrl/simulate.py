"""Roll-outs of a policy."""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from ctrl.noise import Noise
from ctrl.paths import Paths, TimeGrid
from ctrl.policy import Policy
from ctrl.problem import ControlProblem
from ctrl.sde import ControlledSDE
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
        grid: the nodes, within the problem's horizon.
        solver: one-step map; ``EulerMaruyama()`` if not given.
        noise: explicit increments (and action noise), or
        generator: to draw them from; exactly one of the two.
        keep: what to keep of "states", "actions", "increments". States are always whole.
        differentiable: keep the graph, so that gradients flow through the path.

    Returns:
        The paths. Without a graph their memory is that of what is kept, and a few states.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; a state or a kept action became infinite
            or NaN; both or neither of ``noise`` and ``generator`` are given.
        TypeError: ``start`` is not floating point, or an argument is not what its name says.
    """
    solver = solver or EulerMaruyama()
    _check_types(problem, policy, grid, solver, keep)
    _check_start(start)
    if (end := float(grid.nodes[-1])) > problem.horizon * (1 + 1e-6):  # grids may be float32
        raise ValueError(f"grid must end by the horizon {problem.horizon:g}, got {end:g}")
    shape = (len(start), len(grid.steps), *problem.sde.noise_shape(tuple(start.shape[1:])))
    with_graph = differentiable and torch.is_grad_enabled()
    if noise is not None and generator is None:
        source = _Given(noise, shape, start)
    elif generator is not None and noise is None:
        source = _Drawn(generator, shape, start, buffered="increments" in keep and not with_graph)
    else:
        raise ValueError("give exactly one of noise and generator")
    roll_out = _roll_out_with_graph if with_graph else _roll_out_in_place
    with torch.set_grad_enabled(with_graph):
        paths = roll_out(problem.sde, policy, start, grid, solver, source, keep)
    _check_finite(paths)
    return paths


class _Given:
    """Noise that the caller brings."""

    def __init__(self, noise: Noise, shape: tuple[int, ...], start: Tensor) -> None:
        if noise.increments.shape != shape:
            raise ValueError(
                f"increments must be {list(shape)} to fit start and grid, got "
                f"{list(noise.increments.shape)}"
            )
        for name in ("increments", "actions", "weights"):
            value = getattr(noise, name)
            if value is not None and (value.dtype != start.dtype or value.device != start.device):
                raise ValueError(
                    f"{name} must be {start.dtype} on {start.device}, as start is, got "
                    f"{value.dtype} on {value.device}"
                )
        self.noise, self.weights, self.increments = noise, noise.weights, noise.increments

    def increment(self, k: int, h: float, into: Tensor | None) -> Tensor:
        """W(t + h) - W(t) of step k."""
        return self.noise.increments[:, k]

    def for_action(self, k: int, mean: Tensor) -> Tensor:
        """Standard normals for the actions of step k."""
        if self.noise.actions is None:
            raise ValueError("noise must hold actions: the policy draws its actions")
        if self.noise.actions.shape[2:] != mean.shape[1:]:
            raise ValueError(
                f"noise.actions must be [paths, steps, *{list(mean.shape[1:])}] to fit the "
                f"policy's actions, got {list(self.noise.actions.shape)}"
            )
        return self.noise.actions[:, k]


class _Drawn:
    """Noise from a generator, drawn as it is needed."""

    weights = None

    def __init__(
        self, generator: Generator, shape: tuple[int, ...], start: Tensor, buffered: bool
    ) -> None:
        if generator.device.type != start.device.type:
            raise ValueError(
                f"generator must be on {start.device}, as start is, got {generator.device}"
            )
        paths, steps, *noise = shape
        self.generator, self.row, self.like = generator, (paths, *noise), start
        self.buffer = start.new_empty(steps, paths, *noise) if buffered else None
        self.increments = None if self.buffer is None else self.buffer.movedim(0, 1)

    def increment(self, k: int, h: float, into: Tensor | None) -> Tensor:
        """W(t + h) - W(t) of step k, in the kept buffer, else in ``into``, else in new memory."""
        into = into if self.buffer is None else self.buffer[k]
        into = self.like.new_empty(self.row) if into is None else into
        # normal_(std=...) is twice as slow as normal_() and a product
        return into.normal_(generator=self.generator).mul_(math.sqrt(h))

    def for_action(self, k: int, mean: Tensor) -> Tensor:
        """Standard normals for the actions of step k."""
        return torch.empty_like(mean).normal_(generator=self.generator)


def _roll_out_in_place(
    sde: ControlledSDE,
    policy: Policy,
    start: Tensor,
    grid: TimeGrid,
    solver: Solver,
    source: _Given | _Drawn,
    keep: Sequence[str],
) -> Paths:
    """Every step is written into its row of one buffer; nothing is stacked."""
    states = start.new_empty(len(grid.nodes), *start.shape)
    states[0] = start
    actions: Tensor | None = None  # one buffer, once the first action has shown its shape
    euler = type(solver) is EulerMaruyama
    for k, t, h in _left_ends(grid, start):
        x, after = states[k], states[k + 1]
        action = _act(policy, t, x, source, k)
        if euler:
            # normals that fit and are not kept are drawn into the path's own next row
            increment = source.increment(k, h, after if sde.noise == "diagonal" else None)
            _euler_maruyama(after, sde, t, h, x, action, increment)
        else:
            after.copy_(_step(solver, sde, grid, k, x, action, source.increment(k, h, None)))
        if "actions" in keep:
            actions = (
                action.new_empty(len(states) - 1, *action.shape) if actions is None else actions
            )
            actions[k] = action
    return Paths(
        states=states.movedim(0, 1),
        actions=None if actions is None else actions.movedim(0, 1),
        increments=source.increments if "increments" in keep else None,
        grid=grid,
        weights=source.weights,
    )


def _roll_out_with_graph(
    sde: ControlledSDE,
    policy: Policy,
    start: Tensor,
    grid: TimeGrid,
    solver: Solver,
    source: _Given | _Drawn,
    keep: Sequence[str],
) -> Paths:
    """Every step is a new tensor: what the graph has saved must not be written to again."""
    states, actions, increments = [start], list[Tensor](), list[Tensor]()
    for k, t, h in _left_ends(grid, start):
        actions.append(_act(policy, t, states[k], source, k))
        increments.append(source.increment(k, h, None))
        states.append(_step(solver, sde, grid, k, states[k], actions[k], increments[k]))
    return Paths(
        states=torch.stack(states, dim=1),
        actions=torch.stack(actions, dim=1) if "actions" in keep else None,
        increments=torch.stack(increments, dim=1) if "increments" in keep else None,
        grid=grid,
        weights=source.weights,
    )


def _left_ends(grid: TimeGrid, start: Tensor) -> Iterator[tuple[int, Tensor, float]]:
    """Index, time (in the states' precision) and size (in the grid's) of every step."""
    times = grid.nodes[:-1].to(start).unbind()
    return zip(range(len(times)), times, grid.steps.tolist(), strict=True)


def _act(policy: Policy, t: Tensor, x: Tensor, source: _Given | _Drawn, k: int) -> Tensor:
    mean = policy.mean(t, x)
    if not isinstance(mean, Tensor):
        raise TypeError(f"policy.mean must return a tensor, got {type(mean).__name__}")
    if mean.ndim < 1 or len(mean) != len(x):
        raise ValueError(
            f"policy.mean must return [{len(x)}, *action], one action a path, got "
            f"{list(mean.shape)}"
        )
    return policy.act(mean, t, source.for_action(k, mean) if policy.is_random else None)


def _euler_maruyama(
    after: Tensor,
    sde: ControlledSDE,
    t: Tensor,
    h: float,
    x: Tensor,
    action: Tensor,
    increment: Tensor,
) -> None:
    """``EulerMaruyama.step`` into ``after``, which may hold the increment of diagonal noise."""
    sigma = sde.diffusion_at(t, x) if sde.noise == "diagonal" else None
    if sigma is None:
        torch.add(x, sde.spread(t, x, increment), out=after)
    elif isinstance(sigma, Tensor):
        torch.addcmul(x, sigma, increment, out=after)
    else:
        torch.add(x, increment, alpha=sigma, out=after)
    after.add_(sde.drift_at(t, x, action), alpha=h)


def _step(
    solver: Solver,
    sde: ControlledSDE,
    grid: TimeGrid,
    k: int,
    x: Tensor,
    action: Tensor,
    increment: Tensor,
) -> Tensor:
    after = solver.step(sde, grid.nodes[k], grid.nodes[k + 1], x, action, increment)
    if after.shape != x.shape or after.dtype != x.dtype:
        raise ValueError(
            f"solver.step must return states {list(x.shape)} in {x.dtype}, got "
            f"{list(after.shape)} in {after.dtype}"
        )
    return after


def _check_types(
    problem: ControlProblem, policy: Policy, grid: TimeGrid, solver: Solver, keep: Sequence[str]
) -> None:
    if not isinstance(problem, ControlProblem):
        raise TypeError(f"problem must be a ControlProblem, got {type(problem).__name__}")
    if not isinstance(policy, Policy):
        raise TypeError(
            f"policy must be a Policy, got {type(policy).__name__}; wrap a function (t, states) -> "
            "actions as DeterministicPolicy or GaussianPolicy"
        )
    if not isinstance(grid, TimeGrid):
        raise TypeError(f"grid must be a TimeGrid, got {type(grid).__name__}")
    if isinstance(solver, type) or not isinstance(solver, Solver):
        raise TypeError(f"solver must be an object with a step, got {solver!r}")
    if isinstance(keep, str) or not set(keep) <= set(KEEP):
        raise ValueError(f"keep must be a tuple of names out of {KEEP}, got {keep!r}")


def _check_start(start: Tensor) -> None:
    if not isinstance(start, Tensor) or not start.is_floating_point():
        kind = start.dtype if isinstance(start, Tensor) else type(start).__name__
        raise TypeError(f"start must be a floating point tensor, got {kind}")
    if start.ndim < 1 or not len(start):
        raise ValueError(f"start must be [paths, *event] with paths, got {list(start.shape)}")
    if not bool(torch.isfinite(start).all()):
        raise ValueError("start must be finite")


def _check_finite(paths: Paths) -> None:
    for name, values in (("states", paths.states), ("actions", paths.actions)):
        # a sum of finite numbers may overflow, so it only acquits
        if values is None or bool(torch.isfinite(values.detach().sum())):
            continue
        whole = torch.isfinite(values).reshape(*values.shape[:2], -1).all(2).all(0)
        if bool(whole.all()):
            continue
        k = int((~whole).nonzero()[0])
        raise ValueError(
            f"{name} are not finite from node {k} (t = {paths.grid.nodes[k]:g}) on: drift, "
            "diffusion, policy or start are too large for the step; refine the grid or bound them"
        )
