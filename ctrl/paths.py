"""Time grids, sampled paths, and functions and integrals along them."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from numbers import Real

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctrl.devices import as_like, require
from ctrl.estimate import require_probabilities
from ctrl.memory import AnyPolicy, PolicyWithMemory, memories, with_memory
from ctrl.policy import Policy, RandomPolicy, mean_action
from ctrl.problem import ControlProblem
from ctrl.user_functions import all_finite, call


@dataclass(frozen=True, eq=False)
class TimeGrid:
    """Nodes t_0 < ... < t_steps of a discretisation, validated once, here, for everyone.

    Attributes:
        nodes: in time, strictly increasing; one more than there are steps.
    """

    nodes: Float[Tensor, " nodes"]

    def __post_init__(self) -> None:
        if not isinstance(self.nodes, Tensor) or not self.nodes.is_floating_point():
            kind = self.nodes.dtype if isinstance(self.nodes, Tensor) else type(self.nodes).__name__
            raise TypeError(f"nodes must be a floating point tensor, got {kind}")
        if self.nodes.ndim != 1 or len(self.nodes) < 2:
            raise ValueError(f"nodes must be [at least 2], got {list(self.nodes.shape)}")
        if not bool(torch.isfinite(self.nodes).all()):
            raise ValueError(f"nodes must be finite, got {self.nodes.tolist()}")
        if (bad := self.nodes.diff() <= 0).any():
            k = int(bad.nonzero()[0])
            raise ValueError(
                f"nodes must increase strictly, but nodes[{k}] = {self.nodes[k]:g} and "
                f"nodes[{k + 1}] = {self.nodes[k + 1]:g}; to run backwards in noise time, "
                "reverse the schedule, not the grid"
            )

    @property
    def steps(self) -> Float[Tensor, " steps"]:
        """Step sizes, time."""
        return self.nodes.diff()

    def __repr__(self) -> str:
        least, most = float(self.steps.min()), float(self.steps.max())
        even = most - least <= 1e-6 * most  # grids may be float32
        size = f"{most:g} each" if even else f"{least:g} to {most:g} long"
        count = len(self.nodes) - 1
        steps = "1 step" if count == 1 else f"{count} steps"
        return f"TimeGrid({steps} from {self.nodes[0]:g} to {self.nodes[-1]:g}, {size})"


@dataclass(frozen=True, eq=False)
class OwnTimes:
    """Nodes of every path's own, as recorded data have; each path's end is repeated to the last.

    Attributes:
        nodes: strictly increasing along each path up to its end, and constant from there on.
    """

    nodes: Float[Tensor, "paths nodes"]

    def __post_init__(self) -> None:
        if not isinstance(self.nodes, Tensor) or not self.nodes.is_floating_point():
            kind = self.nodes.dtype if isinstance(self.nodes, Tensor) else type(self.nodes).__name__
            raise TypeError(f"nodes must be a floating point tensor, got {kind}")
        if self.nodes.ndim != 2 or self.nodes.shape[1] < 2 or not len(self.nodes):
            raise ValueError(
                f"nodes must be [paths, at least 2 nodes], got {list(self.nodes.shape)}"
            )
        if not bool(torch.isfinite(self.nodes).all()):
            raise ValueError("nodes must be finite; after the end of a path its last time is kept")
        steps = self.steps
        ends = (steps != 0).sum(1, keepdim=True)  # of a path that increases and then rests
        index = torch.arange(steps.shape[1], device=steps.device)
        bad = ((index < ends) & (steps <= 0)) | (ends == 0)
        if bool(bad.any()):
            path, k = (int(each) for each in bad.nonzero()[0])
            raise ValueError(
                f"nodes must increase strictly to a path's end and stay there, but path {path} has "
                f"nodes[{k}] = {self.nodes[path, k]:g} and "
                f"nodes[{k + 1}] = {self.nodes[path, k + 1]:g}"
            )

    @property
    def steps(self) -> Float[Tensor, "paths steps"]:
        """Step sizes, time; 0 after a path's end."""
        return self.nodes.diff(dim=1)


Grid = TimeGrid | OwnTimes


def uniform_grid(
    horizon: float,
    steps: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> TimeGrid:
    """``steps`` equal steps from 0 to ``horizon``.

    Nodes are double precision unless asked otherwise: in float32 a step loses digits.

    Raises:
        ValueError: ``steps`` is not a positive integer or ``horizon`` not positive and finite.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    if not isinstance(horizon, Real) or not 0 < horizon < float("inf"):
        raise ValueError(f"horizon must be a positive, finite number, got {horizon!r}")
    return TimeGrid(torch.linspace(0, horizon, steps + 1, dtype=dtype, device=device))


@dataclass(frozen=True, eq=False)
class Paths:
    """Sampled paths; parts that were not kept are None.

    Stored time-major, viewed path-major. Paths of different length have ``ends``: after its end a
    path rests. Its states repeat the one at the end; actions, increments and rewards are 0
    (``stop`` makes them so). Every estimator counts only the steps that are ``running``.

    Attributes:
        states: X at every node.
        actions: a at the left end of every step, held over it.
        increments: W(t + h) - W(t), sqrt(time).
        grid: the nodes, common to all paths; or ``OwnTimes`` (which need ``ends``).
        weights: of the paths, non-negative, summing to 1, where they are not equal: of a
            quadrature rule, or ``girsanov.importance_weights``.
        rewards: running reward of every step, integrated over it, where the simulator pays it
            rather than the problem.
        black_box: whether a simulator computed the states, and not the problem's ``sde``: then what
            needs the dynamics (q-rates, path likelihoods) refuses the paths.
        ends: index of each path's last node, from 1 to the number of steps; None where all paths
            end at the last node.
        terminated: whether each path is over at its end, so that what is paid there is all that is
            left; if not, its record breaks off, and a value function stands for the rest. If
            None: those that end before the last node are over, and at the horizon all are.
        jumps: how many of each kind every step drew; in the step of an exit too, where a path that
            has left by diffusion does not make them: likelihood ratios need what was drawn.
    """

    states: Float[Tensor, "paths nodes *event"]
    actions: Float[Tensor, "paths steps *action"] | None
    increments: Float[Tensor, "paths steps *noise"] | None
    grid: TimeGrid | OwnTimes
    weights: Float[Tensor, " paths"] | None = None
    rewards: Float[Tensor, "paths steps"] | None = None
    black_box: bool = False
    ends: Int[Tensor, " paths"] | None = None
    terminated: Bool[Tensor, " paths"] | None = None
    jumps: Float[Tensor, "paths steps kinds"] | None = None

    def __post_init__(self) -> None:
        for name in ("states", "actions", "increments", "weights", "rewards", "jumps"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) and (value is not None or name == "states"):
                raise TypeError(
                    f"{name} must be a torch tensor, got {type(value).__name__}; "
                    "torch.as_tensor(...) makes one of an array or a list"
                )
        if not isinstance(self.grid, TimeGrid | OwnTimes):
            raise TypeError(
                f"grid must be a TimeGrid (or OwnTimes), got {type(self.grid).__name__}; "
                "TimeGrid(nodes) makes one of times"
            )
        paths, nodes = len(self.states), self.grid.nodes.shape[-1]
        if isinstance(self.grid, OwnTimes) and (self.ends is None or len(self.grid.nodes) != paths):
            raise ValueError(
                f"a grid of own times must have one row for each of {paths} paths and come with "
                f"their ends, got {list(self.grid.nodes.shape)} and ends {self.ends}; "
                "ctrl.recorded.paths_of(episodes) makes both"
            )
        begins = {"states": (paths, nodes), "weights": (paths,)}
        begins |= dict.fromkeys(("actions", "increments", "rewards", "jumps"), (paths, nodes - 1))
        for name, begin in begins.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape[: len(begin)]) != begin:
                raise ValueError(
                    f"{name} must begin with {list(begin)} to fit the states and the grid, got "
                    f"{list(value.shape)}"
                )
            if value is None:
                continue
            if not value.is_floating_point():
                raise TypeError(f"{name} must be floating point, got {value.dtype}")
            if name in ("weights", "rewards") and value.ndim != len(begin):
                raise ValueError(f"{name} must be {list(begin)}, got {list(value.shape)}")
            if name != "weights":
                self._require_finite(name, value.detach())
        if self.weights is not None:
            require_probabilities("weights", self.weights)
        self._check_ends()

    def __repr__(self) -> str:
        """What there is and its shapes, not the numbers, of which there are too many to read."""
        names = ("states", "actions", "increments", "weights", "rewards", "jumps")
        parts = [(name, getattr(self, name)) for name in (*names, "ends", "terminated")]
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in parts if x is not None)
        origin = ", from a black box" if self.black_box else ""
        grid = self.grid if isinstance(self.grid, TimeGrid) else "times of their own"
        return f"Paths({shapes}, {grid}, {self.states.dtype} on {self.states.device}{origin})"

    @property
    def running(self) -> Bool[Tensor, "paths steps"]:
        """Which steps a path makes: those before its end."""
        paths, steps = len(self.states), self.states.shape[1] - 1
        if self.ends is None:
            return torch.ones(paths, steps, dtype=torch.bool, device=self.states.device)
        # time-major, as simulated states are
        return (torch.arange(steps, device=self.ends.device).unsqueeze(1) < self.ends).T

    def _check_ends(self) -> None:
        if self.ends is None:
            if self.terminated is not None:
                raise ValueError("terminated must be None where ends is, which it belongs to")
            return
        _require_ends(self.ends, self.states)
        if (end := self.terminated) is not None and (
            not isinstance(end, Tensor)
            or end.dtype != torch.bool
            or end.shape != self.ends.shape
            or end.device != self.ends.device
        ):
            raise ValueError(
                f"terminated must be boolean, {list(self.ends.shape)}, as ends, got {end}"
            )
        rests = ~self.running
        if isinstance(self.grid, OwnTimes):
            fits = ((self.grid.steps > 0).to(rests.device) == ~rests).all()
            require(
                fits,
                lambda: ValueError(
                    "grid must end where the paths do: own times increase up to each path's end "
                    "and repeat it from there on"
                ),
            )
        for name in ("states", "actions", "increments", "rewards", "jumps"):
            value = getattr(self, name)
            if value is not None:
                changes = value.detach().diff(dim=1) if name == "states" else value.detach()
                still = ~((changes != 0) & _beside(rests, changes)).any()
                require(still, lambda name=name: ValueError(_NO_REST.format(name)))

    def _require_finite(self, name: str, values: Tensor) -> None:
        total = values.sum()
        if values.device.type == "cpu" and bool(torch.isfinite(total)):
            return  # a sum of finite numbers may overflow, so it only acquits
        whole = torch.isfinite(values).reshape(*values.shape[:2], -1).all(2).all(0)
        require(whole.all(), lambda: self._not_finite(name, whole))

    def _not_finite(self, name: str, whole: Tensor) -> ValueError:
        k = int((~whole).nonzero()[0])
        fault = NotFiniteError(
            f"{name} are not finite from node {k}{_at(self.grid, k)} on: drift, "
            "diffusion, policy or start are too large for the step; refine the grid or bound them"
        )
        fault.name, fault.node, fault.paths = name, k, self
        return fault


class NotFiniteError(ValueError):
    """States or actions of paths are not finite.

    Attributes:
        name: of the part of the paths.
        node: the first at which it is not.
        paths: as far as they were made.
    """

    name: str
    node: int
    paths: Paths


def _at(grid: TimeGrid | OwnTimes, k: int) -> str:
    """Words for the time of a node, which paths with own times do not share."""
    return "" if isinstance(grid, OwnTimes) else f" (t = {grid.nodes[k]:g})"


def _require_ends(ends: Tensor, states: Tensor) -> None:
    """Refuse what are no indices of last nodes."""
    paths, steps = len(states), states.shape[1] - 1
    kinds = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if not isinstance(ends, Tensor) or ends.dtype not in kinds:
        kind = ends.dtype if isinstance(ends, Tensor) else type(ends).__name__
        raise TypeError(f"ends must be a tensor of integers, got {kind}")
    if ends.shape != (paths,):
        raise ValueError(f"ends must be [{paths}], one for each path, got {list(ends.shape)}")
    if ends.device != states.device:
        raise ValueError(f"ends must be on {states.device}, as states are, got {ends.device}")
    require(
        ((ends >= 1) & (ends <= steps)).all(),
        lambda: ValueError(
            f"ends must be from 1 to {steps}, the index of each path's last node, got "
            f"{int(ends.min())} to {int(ends.max())}"
        ),
    )


_NO_REST = (
    "{} must rest after the paths' ends (states repeat, all else is 0); ctrl.paths.stop(paths, "
    "ends) makes them so"
)


def stop(
    paths: Paths,
    ends: Int[Tensor, " paths"],
    terminated: Bool[Tensor, " paths"] | None = None,
) -> Paths:
    """The paths up to earlier ends, at rest from there on.

    Args:
        paths: that end later, or nowhere before the last node.
        ends: index of each path's last node.
        terminated: whether each is over there (``Paths.terminated``).

    Raises:
        ValueError: an end is not one of the steps, or after that of ``paths``.
        TypeError: ``ends`` are no integers.
    """
    _require_ends(ends, paths.states)
    if paths.ends is not None:
        require(
            (ends <= paths.ends).all(),
            lambda: ValueError("ends must not be after those that the paths have already"),
        )
    nodes = torch.arange(paths.states.shape[1], device=ends.device)
    last = torch.minimum(nodes, ends.unsqueeze(1).to(nodes))
    each = torch.arange(len(last), device=ends.device).unsqueeze(1)
    states, grid = paths.states[each, last], paths.grid
    if isinstance(grid, OwnTimes):
        where = grid.nodes.device
        grid = OwnTimes(grid.nodes[each.to(where), last.to(where)])
    runs = nodes[:-1] < ends.unsqueeze(1)

    def while_running(value: Tensor | None) -> Tensor | None:
        return None if value is None else torch.where(_beside(runs, value), value, 0)

    return replace(
        paths,
        states=states,
        actions=while_running(paths.actions),
        increments=while_running(paths.increments),
        rewards=while_running(paths.rewards),
        jumps=while_running(paths.jumps),
        grid=grid,
        ends=ends,
        terminated=terminated,
    )


def _beside(runs: Bool[Tensor, "paths steps"], value: Tensor) -> Tensor:
    return runs[(..., *[None] * (value.ndim - 2))]


def while_running(
    each: Float[Tensor, "paths steps *one"], paths: Paths
) -> Float[Tensor, "paths steps *one"]:
    """What belongs to the steps, 0 for those that a path does not make."""
    return each if paths.ends is None else torch.where(_beside(paths.running, each), each, 0)


def visited(paths: Paths) -> Paths:
    """The paths without rests: after its end each is at its start again, with its first action.

    That is where functions of (t, x, a) can be called for all paths at once: at the end of a path,
    on the wall of a domain say, they need not be finite.
    """
    if paths.ends is None:
        return paths
    common_grid(paths)
    runs = paths.running
    whole = torch.nn.functional.pad(runs, (0, 1))
    states, actions = paths.states, paths.actions
    return replace(
        paths,
        states=torch.where(_beside(whole, states), states, states[:, :1]),
        actions=None
        if actions is None
        else torch.where(_beside(runs, actions), actions, actions[:, :1]),
        ends=None,
        terminated=None,
    )


def ends_at_horizon(problem: ControlProblem, grid: TimeGrid | OwnTimes) -> bool:
    """Whether the last node (of every path) is the horizon, where the terminal reward is paid."""
    gap = float((grid.nodes[..., -1] - problem.horizon).abs().max())
    return math.isfinite(problem.horizon) and gap <= 1e-6 * problem.horizon  # float32 grids


def finished(problem: ControlProblem, paths: Paths) -> Bool[Tensor, " paths"]:
    """Which paths are over at their end: what is paid there is their value."""
    if isinstance(paths.grid, OwnTimes):
        gap = (paths.grid.nodes[:, -1] - problem.horizon).abs().to(paths.states.device)
        over = gap <= (1e-6 * problem.horizon if math.isfinite(problem.horizon) else -1)
        return over if paths.terminated is None else over | paths.terminated
    last = ends_at_horizon(problem, paths.grid)
    over = torch.full((len(paths.states),), last, device=paths.states.device)
    if paths.ends is None:
        return over
    early = paths.ends < paths.states.shape[1] - 1
    if paths.terminated is None:
        return over | early
    return paths.terminated | (over & ~early)


def require_kinds(problem: ControlProblem, paths: Paths) -> None:
    """Refuse a problem or paths that are something else, two arguments in the wrong order say.

    Raises:
        TypeError: one is.
    """
    if not isinstance(problem, ControlProblem):
        raise TypeError(f"problem must be a ControlProblem, got {type(problem).__name__}")
    require_paths(paths)


def require_paths(paths: Paths) -> None:
    """Refuse what are no ``Paths``.

    Raises:
        TypeError: they are something else.
    """
    if not isinstance(paths, Paths):
        raise TypeError(
            f"paths must be Paths, got {type(paths).__name__}; ctrl.simulate makes them, and "
            "ctrl.Paths(states, actions, increments, grid) of tensors that are there already"
        )


def require_dynamics(paths: Paths) -> None:
    """Refuse paths that were not simulated by the problem's ``sde``, where its coefficients count.

    Raises:
        ValueError: a black box simulated them, or they were recorded.
        TypeError: they are no ``Paths``.
    """
    require_paths(paths)
    if paths.black_box:
        raise ValueError(
            "paths must be those of problem.sde, whose coefficients are needed here, but a black "
            "box simulated them, or they were recorded; use what learns from paths alone: "
            "ctrl.martingale, the losses of ctrl.q_learning, policy_gradient.return_gradient or "
            "temporal_difference_gradient"
        )


def common_grid(paths: Paths) -> TimeGrid:
    """The nodes of all paths.

    Raises:
        ValueError: every path has its own.
    """
    if isinstance(paths.grid, OwnTimes):
        raise ValueError(
            "paths must have one grid of times here, but every path has its own (OwnTimes)"
        )
    return paths.grid


def require_memoryless(policy: Policy, paths: Paths) -> None:
    """Refuse a policy whose mean action depends on more than (t, x).

    Along stored paths a policy is evaluated at many steps at once, in no order: the probability of
    an action would silently be that of other inputs. Costs three evaluations of one step: twice at
    the first, and elsewhere in between.

    Raises:
        ValueError: the same (t, x) had two mean actions, or one that is not finite.
    """
    times, states = as_like(paths.grid.nodes, paths.states), paths.states.detach()
    times = times if times.ndim == 1 else times[0]  # any will do
    elsewhere = (times[-2], states[:, -2]) if len(times) > 2 else (times[0], states[:, -1])
    with torch.no_grad():
        first = mean_action(policy, times[0], states[:, 0]).clone()
        mean_action(policy, *elsewhere)
        again = mean_action(policy, times[0], states[:, 0])
    # the same kernels on the same numbers; some of a GPU's sum in no fixed order
    slack = 1e3 * torch.finfo(first.dtype).eps * first.abs().max()
    all_finite("policy.mean", first)  # NaN is not equal to itself, which is no memory
    if first.shape != again.shape:
        raise ValueError(_MEMORY)
    require(((again - first).abs() <= slack).all(), lambda: ValueError(_MEMORY))


_MEMORY = (
    "policy.mean must be a function of (t, x) alone, but it gave two actions for the same (t, x): "
    "it has a memory (or draws random numbers, as dropout does). Make what it remembers part of "
    "the state or declare it (ctrl.PolicyWithMemory), and switch dropout off (module.eval())"
)


def kept_actions(paths: Paths) -> Float[Tensor, "paths steps *action"]:
    """The actions of the paths.

    Raises:
        ValueError: they were not kept.
    """
    if paths.actions is None:
        raise ValueError('paths must have kept their actions: simulate(..., keep=("actions", ...))')
    return paths.actions


def over_steps(
    function: Callable[..., Tensor],
    paths: Paths,
    *more: Float[Tensor, "paths steps ..."],
    copies: int = 1,
) -> Float[Tensor, "paths steps *result"]:
    """function(t, x, ...) at the left end of every step; 0 for steps that a path does not make.

    Many steps at once where ``torch.func.vmap`` can; one after the other where it cannot (control
    flow that depends on values).

    Args:
        function: of (t [], states [paths, *event], one slice [paths, *one] of each of ``more``);
            without side effects.
        paths: whose states and times it is given.
        more: what else, for every step; the actions, say.
        copies: how many tensors of the states' size the function has in memory at a time; the
            more, the fewer steps are taken at once.

    Raises:
        ValueError: the function writes into what it is given, which are the stored paths.
    """
    times, states = as_like(paths.grid.nodes[..., :-1], paths.states), paths.states[:, :-1]
    if paths.ends is not None:  # in its rest each path is asked at its start again
        runs = paths.running
        times = torch.where(runs, times, times[:, :1]) if times.ndim == 2 else times
        states, *rest = (
            torch.where(_beside(runs, one), one, one[:, :1]) for one in (states, *more)
        )
        more = tuple(rest)
    return while_running(_along(function, times, states, *more, copies=copies), paths)


def over_nodes(
    function: Callable[[Tensor, Tensor], Tensor], paths: Paths
) -> Float[Tensor, "paths nodes *result"]:
    """function(t, x) at every node, the last one too; else as ``over_steps``."""
    return _along(function, as_like(paths.grid.nodes, paths.states), paths.states)


def in_order(policy: AnyPolicy, paths: Paths) -> Iterator[Policy]:
    """The ordinary policy of every step, in order, with the memory that it had there.

    Raises:
        ValueError: the policy has a memory that it does not declare, or has one and the paths have
            not kept their actions.
    """
    if not isinstance(policy, PolicyWithMemory):
        require_memoryless(policy, paths)
        return itertools.repeat(policy, paths.grid.steps.shape[-1])
    return (with_memory(policy, memory) for memory in memories_along(policy, paths).unbind(1))


def memories_along(policy: PolicyWithMemory, paths: Paths) -> Float[Tensor, "paths steps *memory"]:
    """The policy's memory at the left end of every step, computed in order.

    Raises:
        ValueError: the paths have not kept their actions.
    """
    times, actions = as_like(paths.grid.nodes[..., :-1], paths.states), kept_actions(paths)
    if times.ndim == 1:
        return memories(policy, times, paths.states[:, :-1], actions)
    alone = [
        memories(policy, t, x.unsqueeze(0), a.unsqueeze(0))
        for t, x, a in zip(times, paths.states[:, :-1], actions, strict=True)
    ]
    return torch.cat(alone)


def over_policy_steps(
    function: Callable[..., Tensor],
    policy: AnyPolicy,
    paths: Paths,
    *more: Float[Tensor, "paths steps ..."],
) -> Float[Tensor, "paths steps *result"]:
    """function(policy, t, x, ...) at every step, the policy with the memory that it had there.

    Args:
        function: of (policy, t [], states [paths, *event], one slice of each of ``more``).
        policy: of (t, x); or with memory, which is then computed first, in order.
        paths: whose states and times it is given; with their actions, for a memory.
        more: as for ``over_steps``.

    Raises:
        ValueError: the policy has a memory that it does not declare; or the actions are missing.
    """
    if isinstance(policy, PolicyWithMemory):
        past = memories_along(policy, paths)

        def remembering(t: Tensor, x: Tensor, m: Tensor, *rest: Tensor) -> Tensor:
            return function(policy.at(m), t, x, *rest)

        return over_steps(remembering, paths, past, *more)
    require_memoryless(policy, paths)

    def ordinary(t: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
        return function(policy, t, x, *rest)

    return over_steps(ordinary, paths, *more)


def log_probs(policy: AnyPolicy, paths: Paths) -> Float[Tensor, "paths steps"]:
    """log pi of the action of every step, nats, given the path so far.

    Raises:
        ValueError: the policy does not draw its actions, or has a memory that it does not declare;
            or the paths have not kept their actions.
    """

    def at(now: Policy, t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        if not isinstance(now, RandomPolicy):
            raise ValueError(
                "policy must be one that draws its actions and knows their density, got "
                f"{type(now).__name__}"
            )
        return now.log_prob(t, x, a)

    each = over_policy_steps(at, policy, paths, kept_actions(paths))
    require(~torch.isnan(each).any(), lambda: ValueError(_NO_DENSITY))
    return each


_NO_DENSITY = (
    "log_prob must be numbers along the paths, but some are NaN: the policy's std (or scale_tril) "
    "must be positive and finite at every step"
)


_CHUNK = 2**22  # bytes of states at a time: what a step makes of them should stay in cache


def _along(
    function: Callable[..., Tensor], times: Tensor, *rows: Tensor, copies: int = 1
) -> Tensor:
    def along(times: Tensor, *rows: Tensor) -> Tensor:
        if times.ndim == 2:
            return _along_own_times(function, times, *rows, copies=copies)
        widest = max(row[:, 0].numel() * row.element_size() for row in rows)
        chunk = max(1, _CHUNK // max(1, copies * widest))
        in_dims = (0, *[1] * len(rows))
        try:
            at_once = torch.func.vmap(function, in_dims, out_dims=1, chunk_size=chunk)
            return at_once(times, *rows)
        except RuntimeError:  # not vectorisable; a real fault is raised again by the loop
            moments = zip(times, *[each.unbind(1) for each in rows], strict=True)
            return torch.stack([function(*moment) for moment in moments], dim=1)

    return call("a function of (t, x) along paths", along, times, *rows, noted=False)


def _along_own_times(
    function: Callable[..., Tensor], times: Tensor, *rows: Tensor, copies: int = 1
) -> Tensor:
    """Every step of every path by itself, since each has its own t []."""

    def alone(t: Tensor, *one: Tensor) -> Tensor:
        return function(t, *(each.unsqueeze(0) for each in one)).squeeze(0)

    flat = [row.reshape(-1, *row.shape[2:]) for row in rows]
    widest = max(row[0].numel() * row.element_size() for row in flat)
    chunk = max(1, _CHUNK // max(1, copies * widest))
    try:
        each = torch.func.vmap(alone, chunk_size=chunk)(times.reshape(-1), *flat)
    except RuntimeError:  # not vectorisable; a real fault is raised again by the loop
        each = torch.stack([alone(*one) for one in zip(times.reshape(-1), *flat, strict=True)])
    return each.view(*times.shape, *each.shape[1:])


def ito_sum(
    integrand: Float[Tensor, "paths steps *noise"], increments: Float[Tensor, "paths steps *noise"]
) -> Float[Tensor, " paths"]:
    """Ito integral int f . dW along each path, the integrand at the left end of each step.

    Raises:
        ValueError: the shapes differ.
    """
    if integrand.shape != increments.shape:
        raise ValueError(
            f"integrand must have the increments' shape {list(increments.shape)}, got "
            f"{list(integrand.shape)}"
        )
    return (integrand * increments).flatten(1).sum(1)


def time_integral(
    rates: Float[Tensor, "paths steps"], grid: TimeGrid | OwnTimes
) -> Float[Tensor, " paths"]:
    """Time integral int f dt along each path, f at the left end of each step (error O(h)).

    Raises:
        ValueError: ``rates`` has not one entry for each step of ``grid``.
    """
    steps = grid.steps.shape[-1]
    if rates.ndim != 2 or rates.shape[1] != steps:
        raise ValueError(f"rates must be [paths, {steps}] to fit the grid, got {list(rates.shape)}")
    return (rates * as_like(grid.steps, rates)).sum(1)
