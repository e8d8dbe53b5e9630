"""Roll-outs of a policy."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from ctrl.devices import as_like, require, together
from ctrl.drawn_ahead import threads
from ctrl.jumps import add_jumps
from ctrl.memory import AnyPolicy, PolicyWithMemory, for_roll_out
from ctrl.noise import Noise, PathStreams
from ctrl.noise_sources import Drawn, Silent, Source, Streamed, source_of
from ctrl.paths import NotFiniteError, Paths, TimeGrid
from ctrl.policy import Policy, mean_action
from ctrl.problem import UNKNOWN, ControlProblem
from ctrl.reused_memory import settle, uninitialised
from ctrl.sde import ControlledSDE
from ctrl.solvers import BlackBox, EulerMaruyama, InPlaceSolver, InteriorSolver, Solver
from ctrl.squashed_policy import SquashedGaussianPolicy
from ctrl.stopping import Step, Stopping, require_inside, stopping_rule
from ctrl.user_functions import like_states, takes

KEEP = ("states", "actions", "increments")


def simulate(
    problem: ControlProblem,
    policy: AnyPolicy,
    start: Float[Tensor, " paths *event"],
    grid: TimeGrid,
    solver: Solver | None = None,
    *,
    noise: Noise | None = None,
    generator: Generator | PathStreams | None = None,
    keep: Sequence[str] = KEEP,
    differentiable: bool = False,
    out: Paths | None = None,
    workers: int = 1,
    stopping: Stopping | None = None,
) -> Paths:
    """Sample paths of the controlled SDE under a policy.

    At every node the policy acts once; the action is held over the step. Where the problem has a
    domain, each path ends where it leaves (``Paths.ends``).

    Args:
        problem: whose ``sde`` is simulated.
        policy: acts at the left end of every step; one with memory begins anew.
        start: states at the first node; their dtype and device are the paths'.
        grid: the nodes, within the problem's horizon.
        solver: one-step map; ``EulerMaruyama()`` if not given.
        noise: explicit increments (and action noise), or
        generator: to draw them from, or ``noise.PathStreams``, whose paths do not depend on the
            batch; exactly one of noise and generator, except that a ``BlackBox`` brings its own
            noise and takes a generator only for a policy that draws its actions.
        keep: what to keep of "states", "actions", "increments". States are always whole; a
            ``BlackBox`` shows no increments.
        differentiable: keep the graph, so that gradients flow through the path.
        out: earlier paths of the same shapes that are no longer needed: their memory is used again,
            which spares large roll-outs the operating system's cost of fresh pages.
        workers: threads that draw ``noise.PathStreams``, the caller's own among them and no more
            than there are cores. The numbers are the same bits for any of them. Drift, diffusion,
            policy and solver are called in the caller's thread only, on all paths at once; with
            more than one worker torch computes in one thread meanwhile, so leave it at 1 where the
            time is that of a large network. A torch.Generator has its numbers one after the other
            and takes one worker.
        stopping: how exits from the problem's domain are seen; if not given
            ``stopping.BridgeCorrected()`` where the domain knows its walls and the solver the
            noise, else ``stopping.AtNodes()``.

    Returns:
        The paths. Without a graph their memory is that of what is kept, and a few states.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; a state or a kept action became infinite
            or NaN; both or neither of ``noise`` and ``generator`` are given; a start is outside of
            the domain; a differentiable roll-out has a domain.
        TypeError: ``start`` is not floating point, or an argument is not what its name says.
    """
    solver = solver or EulerMaruyama()
    _check_types(problem, policy, grid, solver, keep)
    _check_start_type(start)
    _check_end(problem, grid)
    _check_workers(workers, generator)
    with_graph = differentiable and torch.is_grad_enabled()
    rule = _stopping(problem, grid, start, solver, stopping, with_graph)
    if with_graph and out is not None:
        raise ValueError(
            "out must be None for a differentiable roll-out, whose graph owns its memory"
        )
    settle()
    try:
        with together(), threads(workers) as by:
            _check_start(start)
            acting = for_roll_out(policy, start)
            sde = _equation(problem, solver)
            source = source_of(sde, acting, start, grid, solver, noise, generator, by)
            with torch.set_grad_enabled(with_graph):
                if rule is not None:
                    absorbed = _absorbed(problem, acting, start, grid, solver, source, rule)
                    return _roll_out_to_exits(absorbed, start, grid, solver, source, keep, out)
                rolled_out = (sde, acting, start, grid, solver, source, keep)
                if with_graph:
                    return _roll_out_with_graph(*rolled_out)
                return _roll_out_in_place(*rolled_out, out)
    except NotFiniteError as fault:
        cause = _cause(fault, problem, policy)
        if cause is None:
            raise
        where = str(fault).partition(":")[0]
        raise ValueError(f"{where}: {cause}") from None


def _cause(fault: NotFiniteError, problem: ControlProblem, policy: AnyPolicy) -> str | None:
    """Which function was the first to return what is not finite; None where none is to blame."""
    paths = fault.paths
    k = max(0, fault.node - 1) if fault.name == "states" else fault.node
    x = paths.states.detach()[:, k]
    t = as_like(paths.grid.nodes[k], x)
    with torch.no_grad():
        try:
            for name, value in _asked(problem, policy, paths, k, t, x):
                bad = ~torch.isfinite(value).reshape(len(x), -1).all(1)
                if bool(bad.any()):
                    path = int(bad.nonzero()[0])
                    return (
                        f"{name} is {value[path].flatten()[:5].tolist()} on path {path} at t = "
                        f"{float(t):g}, in the state {x[path].flatten()[:5].tolist()}; let it be "
                        "finite there, or, where that state is far out already, refine the grid or "
                        "bound drift and diffusion"
                    )
        except (RuntimeError, TypeError, ValueError):  # the caller is told of a fault anyway
            return None
    return "solver.step returned them; let it be finite there" if paths.black_box else None


def _asked(
    problem: ControlProblem, policy: AnyPolicy, paths: Paths, k: int, t: Tensor, x: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """What every function returns at the left end of step k, in the order in which they act."""
    action = None if paths.actions is None else paths.actions.detach()[:, k]
    if isinstance(policy, Policy):
        mean = mean_action(policy, t, x)
        yield "policy.mean", mean
        action = mean if action is None else action
    if action is None:
        return
    yield "the action", action
    if paths.black_box:
        return
    sde = problem.dynamics
    yield "drift", sde.drift_at(t, x, action)
    sigma = as_like(sde.diffusion_at(t, x, action), x)
    yield "diffusion", sigma if sigma.ndim else sigma.expand(len(x))


def simulate_end(
    problem: ControlProblem,
    policy: AnyPolicy,
    start: Float[Tensor, " paths *event"],
    grid: TimeGrid,
    solver: Solver | None = None,
    *,
    noise: Noise | None = None,
    generator: Generator | PathStreams | None = None,
    differentiable: bool = False,
    workers: int = 1,
    stopping: Stopping | None = None,
) -> Float[Tensor, " paths *event"]:
    """States at the last node: ``simulate`` in constant memory, with the same numbers.

    Where the problem has a domain, those at each path's end.

    Args:
        problem: as in ``simulate``.
        policy: as in ``simulate``.
        start: as in ``simulate``.
        grid: as in ``simulate``.
        solver: as in ``simulate``.
        noise: as in ``simulate``.
        generator: as in ``simulate``.
        differentiable: keep the graph (whose memory grows with the steps).
        workers: as in ``simulate``.
        stopping: as in ``simulate``.

    Raises:
        ValueError: as ``simulate``, but that the first node of a fault is not told.
        TypeError: as ``simulate``.
    """
    solver = solver or EulerMaruyama()
    _check_types(problem, policy, grid, solver, ())
    _check_start_type(start)
    _check_end(problem, grid)
    _check_workers(workers, generator)
    with_graph = differentiable and torch.is_grad_enabled()
    rule = _stopping(problem, grid, start, solver, stopping, with_graph)
    settle()
    with together(), threads(workers) as by:
        _check_start(start)
        policy = for_roll_out(policy, start)
        sde = _equation(problem, solver)
        source = source_of(sde, policy, start, grid, solver, noise, generator, by)
        with torch.set_grad_enabled(with_graph):
            if rule is None:
                end = _last_states(sde, policy, start, grid, solver, source, with_graph)
            else:
                end = start
                for step in _absorbed(problem, policy, start, grid, solver, source, rule):
                    end = step.after
        require(torch.isfinite(end).all(), lambda: ValueError(_NOT_FINITE))
    return end


_NOT_FINITE = "states are not finite at the last node; simulate(...) tells from which node on"


def _last_states(
    sde: ControlledSDE,
    policy: Policy,
    start: Tensor,
    grid: TimeGrid,
    solver: Solver,
    source: Source,
    with_graph: bool,
) -> Tensor:
    """Two rows of memory, taken in turns; a new tensor for every step where a graph is kept."""
    in_place = isinstance(solver, InPlaceSolver) and not with_graph
    spare = in_place and sde.noise == "diagonal"
    x, after = start, torch.empty_like(start) if in_place else None
    for k, t, h, t0, t1 in _left_ends(grid, start):
        action = _act(policy, t, x, source, k)
        increment = source.increment(k, h, after if spare else None)
        if isinstance(solver, InPlaceSolver) and after is not None:
            solver.step_into(after, sde, t0, t1, x, action, increment)
            _jump(sde, solver, source, k, t, h, x, after, action, into=after)
            x, after = after, (x if k else torch.empty_like(start))
        else:
            moved = _step(solver, sde, t0, t1, x, action, increment, source)
            x, _ = _jump(sde, solver, source, k, t, h, x, moved, action)
    return x


def _equation(problem: ControlProblem, solver: Solver) -> ControlledSDE:
    """The dynamics, which a black box does not need."""
    if problem.sde is None and isinstance(solver, BlackBox):
        return UNKNOWN
    return problem.dynamics


def _jump(
    sde: ControlledSDE,
    solver: Solver,
    source: Source,
    k: int,
    t: Tensor,
    h: float,
    before: Tensor,
    after: Tensor,
    action: Tensor,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """States after the jumps of step k, and how many there were, [paths, kinds], if any may be."""
    if not sde.jump_kinds or isinstance(solver, BlackBox):
        return after, None
    assert not isinstance(source, Silent)
    after, counts = add_jumps(sde.jump_kinds, source, k, t, h, before, after, action)
    if into is not None:
        into.copy_(after)
    return after, counts


def _roll_out_in_place(
    sde: ControlledSDE,
    policy: Policy,
    start: Tensor,
    grid: TimeGrid,
    solver: Solver,
    source: Source,
    keep: Sequence[str],
    out: Paths | None,
) -> Paths:
    """Every step is written into its row of one buffer; nothing is stacked."""
    steps = len(grid.nodes) - 1
    states = _buffer(out, "states", (steps + 1, *start.shape), start)
    states[0] = start
    actions: Tensor | None = None  # one buffer, once the first action has shown its shape
    increments: Tensor | None = None
    if "increments" in keep and source.shows_noise:
        row = source.shape[:1] + source.shape[2:]
        increments = _buffer(out, "increments", (steps, *row), start)
        if isinstance(source, Drawn):
            source.kept = increments
    jumps: Tensor | None = None
    if sde.jump_kinds and "increments" in keep and source.shows_noise:
        row = (steps, len(start), len(sde.jump_kinds))
        jumps = _buffer(out, "jumps", row, start)
    in_place = isinstance(solver, InPlaceSolver)
    # normals that fit and are not kept are drawn into the path's own next row
    spare = in_place and sde.noise == "diagonal"
    if isinstance(source, Streamed) and (increments is not None or spare):
        source.draw_into(states[1:] if increments is None else increments)
    for k, t, h, t0, t1 in _left_ends(grid, start):
        x, after = states[k], states[k + 1]
        action = _act(policy, t, x, source, k)
        into = increments[k] if increments is not None else after if spare else None
        increment = source.increment(k, h, into)
        if in_place:
            solver.step_into(after, sde, t0, t1, x, action, increment)
        else:
            after.copy_(_step(solver, sde, t0, t1, x, action, increment, source))
        _, counts = _jump(sde, solver, source, k, t, h, x, after, action, into=after)
        if jumps is not None and counts is not None:
            jumps[k] = counts
        if "actions" in keep:
            if actions is None:
                actions = _buffer(out, "actions", (steps, *action.shape), action)
            actions[k] = action
    return Paths(
        states=states.movedim(0, 1),
        actions=None if actions is None else actions.movedim(0, 1),
        increments=None if increments is None else increments.movedim(0, 1),
        grid=grid,
        weights=source.weights,
        black_box=isinstance(solver, BlackBox),
        jumps=None if jumps is None else jumps.movedim(0, 1),
    )


class _AbsorbedStep(NamedTuple):
    """One step of paths that end where they leave a domain; rests are 0.

    Attributes:
        after: states at its right end.
        action: held over it.
        increment: of the Brownian motion.
        runs: which paths make it.
        leaves: which of them leave the domain in it.
        jumps: how many of each kind.
    """

    after: Tensor
    action: Tensor
    increment: Tensor
    runs: Tensor
    leaves: Tensor
    jumps: Tensor | None = None


def _absorbed(
    problem: ControlProblem,
    policy: Policy,
    start: Tensor,
    grid: TimeGrid,
    solver: Solver,
    source: Source,
    rule: Stopping,
) -> Iterator[_AbsorbedStep]:
    """Step after step, absorbed where they leave; coefficients are asked inside the domain only."""
    assert problem.domain is not None
    sde = _equation(problem, solver)
    x, runs = start, torch.ones(len(start), dtype=torch.bool, device=start.device)
    last: _AbsorbedStep | None = None
    for k, t, h, t0, t1 in _left_ends(grid, start):
        if last is not None and x.device.type == "cpu" and not bool(runs.any()):
            action, increment = torch.zeros_like(last.action), torch.zeros_like(last.increment)
            counts = None if last.jumps is None else torch.zeros_like(last.jumps)
            yield _AbsorbedStep(x, action, increment, runs, runs, counts)  # nobody is left
            continue
        inside = torch.where(_beside(runs, x), x, start)
        action = _act(policy, t, inside, source, k)
        increment = source.increment(k, h, None)
        proposed = _step(solver, sde, t0, t1, inside, action, increment, source)
        uniform = source.for_exits(k) if rule.draws else None
        step = Step(sde, t0, t1, inside, proposed, action, uniform)
        left, exits = rule.exits(problem.domain, step)
        jumped, counts = _jump(sde, solver, source, k, t, h, inside, proposed, action)
        if counts is not None:  # those that have not left before jump
            proposed = torch.where(_beside(left, x), proposed, jumped)
            counts = torch.where(runs[:, None], counts, 0)  # as drawn: likelihood ratios count them
            out = ~(problem.domain.signed_distance(as_like(t1, x), proposed) > 0) & ~left
            left, exits = left | out, torch.where(_beside(out, x), proposed, exits)
        leaves = left & runs
        after = torch.where(_beside(leaves, x), exits, proposed)
        after = torch.where(_beside(runs, x), after, x)
        if source.shows_noise:
            increment = torch.where(_beside(runs, increment), increment, 0)
        action = torch.where(_beside(runs, action), action, 0)
        last = _AbsorbedStep(after, action, increment, runs, leaves, counts)
        yield last
        x, runs = after, runs & ~leaves


def _beside(which: Tensor, value: Tensor) -> Tensor:
    return which.view(-1, *[1] * (value.ndim - 1))


def _roll_out_to_exits(
    absorbed: Iterator[_AbsorbedStep],
    start: Tensor,
    grid: TimeGrid,
    solver: Solver,
    source: Source,
    keep: Sequence[str],
    out: Paths | None,
) -> Paths:
    """Keep what is asked for of every step, and where each path ends."""
    steps = len(grid.nodes) - 1
    states = _buffer(out, "states", (steps + 1, *start.shape), start)
    states[0] = start
    kept: dict[str, Tensor] = {}
    names = [name for name in ("actions", "increments") if name in keep]
    ends = torch.zeros(len(start), dtype=torch.int64, device=start.device)
    left = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    for k, step in enumerate(absorbed):
        states[k + 1] = step.after
        ends, left = ends + step.runs, left | step.leaves
        for name, row in (("actions", step.action), ("increments", step.increment)):
            if name in names and (name == "actions" or source.shows_noise):
                if name not in kept:
                    kept[name] = _buffer(out, name, (steps, *row.shape), row)
                kept[name][k] = row
        if "increments" in names and step.jumps is not None:
            if "jumps" not in kept:
                kept["jumps"] = _buffer(out, "jumps", (steps, *step.jumps.shape), step.jumps)
            kept["jumps"][k] = step.jumps
    return Paths(
        states=states.movedim(0, 1),
        actions=kept["actions"].movedim(0, 1) if "actions" in kept else None,
        increments=kept["increments"].movedim(0, 1) if "increments" in kept else None,
        grid=grid,
        weights=source.weights,
        black_box=isinstance(solver, BlackBox),
        jumps=kept["jumps"].movedim(0, 1) if "jumps" in kept else None,
        ends=ends,
        terminated=left,
    )


def _buffer(out: Paths | None, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Time-major memory: of earlier paths, or what nobody refers to."""
    earlier = None if out is None else getattr(out, name)
    if earlier is None:
        return uninitialised(shape, like)
    memory = earlier.movedim(1, 0)
    fits = memory.shape == shape and memory.dtype == like.dtype and memory.device == like.device
    if not fits or not memory.is_contiguous() or memory.requires_grad:
        raise ValueError(
            f"out.{name} must be {[shape[1], shape[0], *shape[2:]]} in {like.dtype} on "
            f"{like.device}, made by simulate without a graph, got {list(earlier.shape)} in "
            f"{earlier.dtype} on {earlier.device}"
        )
    return memory


def _roll_out_with_graph(
    sde: ControlledSDE,
    policy: Policy,
    start: Tensor,
    grid: TimeGrid,
    solver: Solver,
    source: Source,
    keep: Sequence[str],
) -> Paths:
    """Every step is a new tensor: what the graph has saved must not be written to again."""
    states, actions, increments = [start], list[Tensor](), list[Tensor]()
    jumps = list[Tensor]()
    shown = "increments" in keep and source.shows_noise
    for k, t, h, t0, t1 in _left_ends(grid, start):
        actions.append(_act(policy, t, states[k], source, k))
        increment = source.increment(k, h, None)
        moved = _step(solver, sde, t0, t1, states[k], actions[k], increment, source)
        moved, counts = _jump(sde, solver, source, k, t, h, states[k], moved, actions[k])
        states.append(moved)
        increments.append(increment)
        if counts is not None:
            jumps.append(counts)
    return Paths(
        states=torch.stack(states, dim=1),
        actions=torch.stack(actions, dim=1) if "actions" in keep else None,
        increments=torch.stack(increments, dim=1) if shown else None,
        grid=grid,
        weights=source.weights,
        black_box=isinstance(solver, BlackBox),
        jumps=torch.stack(jumps, dim=1) if shown and jumps else None,
    )


class _Interval(NamedTuple):
    """Times and index of one step.

    Attributes:
        k: index of the step.
        t: its left end, in the dtype and on the device of the states.
        h: its size, in the grid's precision.
        t0: its left end, in the grid's precision on the CPU, where it is free to read.
        t1: its right end, the same.
    """

    k: int
    t: Tensor
    h: float
    t0: Tensor
    t1: Tensor


def _left_ends(grid: TimeGrid, start: Tensor) -> Iterator[_Interval]:
    """Every step's interval."""
    ends = grid.nodes.cpu().unbind()
    times = as_like(grid.nodes[:-1], start).unbind()
    steps = zip(range(len(times)), times, grid.steps.tolist(), ends[:-1], ends[1:], strict=True)
    return itertools.starmap(_Interval, steps)


def _act(policy: Policy, t: Tensor, x: Tensor, source: Source, k: int) -> Tensor:
    if isinstance(policy, SquashedGaussianPolicy):  # whose mean takes a quadrature
        return policy.squash(_act(policy.latent, t, x, source, k))
    mean = mean_action(policy, t, x)
    return policy.act(mean, t, source.for_action(k, mean) if policy.is_random else None, x)


def _step(
    solver: Solver,
    sde: ControlledSDE,
    t0: Tensor,
    t1: Tensor,
    x: Tensor,
    action: Tensor,
    increment: Tensor,
    source: Source,
) -> Tensor:
    moment = (sde, t0, t1, x, action, increment)
    if isinstance(source, Streamed) and isinstance(solver, InteriorSolver):
        after = solver.step_inside(*moment, source.interior)
    else:
        after = solver.step(*moment)
    return like_states("solver.step", after, x)


def _check_types(
    problem: ControlProblem, policy: AnyPolicy, grid: TimeGrid, solver: Solver, keep: Sequence[str]
) -> None:
    if not isinstance(problem, ControlProblem):
        raise TypeError(
            f"problem must be a ControlProblem, got {type(problem).__name__}; of an SDE alone: "
            "ControlProblem(sde, horizon)"
        )
    if not isinstance(policy, Policy | PolicyWithMemory):
        raise TypeError(
            f"policy must be a Policy, got {type(policy).__name__}; wrap a function (t, states) -> "
            "actions as DeterministicPolicy or GaussianPolicy"
        )
    if isinstance(policy, Policy) and not takes(policy.act, 4):
        raise TypeError("policy.act must take (mean, t, noise, states)")
    if not isinstance(grid, TimeGrid):
        raise TypeError(
            f"grid must be a TimeGrid, got {type(grid).__name__}; uniform_grid(horizon, steps) or "
            "TimeGrid(nodes) makes one"
        )
    if isinstance(solver, type) or not isinstance(solver, Solver):
        raise TypeError(
            f"solver must be an object with a step, as EulerMaruyama() is, got {solver!r}"
        )
    if isinstance(keep, str) or not set(keep) <= set(KEEP):
        raise ValueError(f"keep must be a tuple of names out of {KEEP}, got {keep!r}")


def _check_workers(workers: int, generator: Generator | PathStreams | None) -> None:
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise TypeError(f"workers must be an int, got {workers!r}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if workers > 1 and not isinstance(generator, PathStreams):
        raise ValueError(
            f"workers must be 1 unless generator is noise.PathStreams, got {workers}: the numbers "
            "of a torch.Generator come one after the other, and explicit noise is not drawn. "
            'ctrl.noise.PathStreams(seed, ("name of the roll-out",)) draws in parallel'
        )


def _check_end(problem: ControlProblem, grid: TimeGrid) -> None:
    if (begin := float(grid.nodes[0])) < 0:
        raise ValueError(
            f"grid must begin at 0 or later, got {begin:g}: a problem's time is from 0 to its "
            "horizon"
        )
    if (end := float(grid.nodes[-1])) > problem.horizon * (1 + 1e-6):  # grids may be float32
        raise ValueError(f"grid must end by the horizon {problem.horizon:g}, got {end:g}")


def _stopping(
    problem: ControlProblem,
    grid: TimeGrid,
    start: Tensor,
    solver: Solver,
    stopping: Stopping | None,
    with_graph: bool,
) -> Stopping | None:
    """The rule by which paths leave the problem's domain; None where it has none."""
    rule = stopping_rule(problem.domain, stopping, black_box=isinstance(solver, BlackBox))
    if problem.domain is None:
        return None
    if with_graph:
        raise ValueError(
            "differentiable must be False for a problem with a domain: which paths leave it, and "
            "when, jumps with the parameters, so a gradient through paths would be wrong; use the "
            "gradients of ctrl.policy_gradient"
        )
    _check_start(start)
    require_inside(problem.domain, grid.nodes[0], start)
    return rule


def _check_start_type(start: Tensor) -> None:
    if not isinstance(start, Tensor) or not start.is_floating_point():
        kind = start.dtype if isinstance(start, Tensor) else type(start).__name__
        raise TypeError(f"start must be a floating point tensor, got {kind}")
    if start.ndim < 1 or not len(start):
        raise ValueError(f"start must be [paths, *event] with paths, got {list(start.shape)}")


def _check_start(start: Tensor) -> None:
    if start.device.type == "cpu" and math.isfinite(float(start.detach().sum())):
        return  # a sum of finite numbers may overflow, so it only acquits
    require(torch.isfinite(start).all(), lambda: _not_finite_start(start))


def _not_finite_start(start: Tensor) -> ValueError:
    path = int((~torch.isfinite(start)).reshape(len(start), -1).any(1).nonzero()[0])
    return ValueError(
        f"start must be finite, but start[{path}] is {start[path].flatten()[:5].tolist()}"
    )
