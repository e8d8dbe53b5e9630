"""Recorded data: episodes of different length, each with its own observation times; replay.

    Episode: X observed at t_0 < ... < t_n, the action a_k held from t_k to t_{k+1}, and what it
    earned there. Many of them become one ``Paths`` with ``ends`` and own times, along which every
    estimator that needs no dynamics is the same sum over steps as along simulated paths.

A problem for them has no ``sde``. What is off-policy by nature takes them as they are
(``q_learning.orthogonality_loss``, ``martingale`` conditions of a pair); ``ctrl.off_policy`` has
what must know how probable an action was under the policy that was recorded.

Sources  [JZ23] Jia & Zhou 2023, q-learning in continuous time, JMLR 24 (off-policy data);
         [L92] Lin 1992, self-improving reactive agents (experience replay), Machine Learning 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from ctrl.paths import OwnTimes, Paths, TimeGrid

Numbers = Tensor | np.ndarray | Sequence[Any]
"""A tensor, an array or nested lists of numbers."""


@dataclass(frozen=True, eq=False, init=False)
class Episode:
    """One recorded path.

    Attributes:
        times: of the observations, strictly increasing, [n + 1].
        states: observed at them, [n + 1, *event].
        actions: held from each observation to the next, [n, *action].
        rewards: earned from each observation to the next, reward (not a rate), [n]; None where
            ``problem.running_reward`` says what is paid.
        terminated: whether it is over at its last observation, so that what is paid there is all
            that is left; if not, the record breaks off and a value function stands for the rest.
    """

    times: Float[Tensor, " nodes"]
    states: Float[Tensor, " nodes *event"]
    actions: Float[Tensor, " steps *action"]
    rewards: Float[Tensor, " steps"] | None
    terminated: bool

    def __init__(
        self,
        times: Numbers,
        states: Numbers,
        actions: Numbers,
        rewards: Numbers | None = None,
        *,
        terminated: bool,
    ) -> None:
        """An episode, of tensors, arrays or lists, in the precision of the states.

        Raises:
            ValueError: lengths do not fit, times do not increase, or a number is not finite.
            TypeError: something is not numbers, or ``terminated`` no truth value.
        """
        if not isinstance(terminated, bool | np.bool_):
            raise TypeError(f"terminated must be True or False, got {terminated!r}")
        x = _tensor("states", states)
        known = {"times": _tensor("times", times, x, exact=True), "states": x}
        known["actions"] = _tensor("actions", actions, x)
        if rewards is not None:
            known["rewards"] = _tensor("rewards", rewards, x)
        _check_lengths(known)
        _check_times(known["times"])
        for name, value in known.items():
            object.__setattr__(self, name, value)
        if rewards is None:
            object.__setattr__(self, "rewards", None)
        object.__setattr__(self, "terminated", bool(terminated))

    def __len__(self) -> int:
        """How many steps it has."""
        return len(self.actions)


def paths_of(episodes: Sequence[Episode]) -> Paths:
    """All episodes as one ``Paths``: at rest after their ends, on a grid of own times.

    Where all have the same times, it is their common ``TimeGrid``.

    Raises:
        ValueError: there is none, or they differ in shapes, precision, device or in whether their
            rewards are recorded.
    """
    episodes = list(episodes)
    if not episodes:
        raise ValueError("episodes must have at least one episode, got none")
    first = episodes[0]
    for i, one in enumerate(episodes):
        if not isinstance(one, Episode):
            raise TypeError(f"episodes must be Episodes, but [{i}] is {type(one).__name__}")
        if _kind(one) != _kind(first):
            raise ValueError(
                f"episodes must be of one kind (event, action, rewards or none, precision, "
                f"device), but episode 0 has {_kind(first)} and episode {i} has {_kind(one)}"
            )
    steps = max(map(len, episodes))
    ends = torch.tensor([len(one) for one in episodes], device=first.states.device)
    nodes = torch.stack([_rest(one.times, steps + 1) for one in episodes])
    rewards = None
    if first.rewards is not None:
        rewards = _time_major(
            [_zeros(one.rewards, steps) for one in episodes if one.rewards is not None]
        )
    common = bool((ends == steps).all()) and bool((nodes == nodes[0]).all())
    return Paths(
        states=_time_major([_rest(one.states, steps + 1) for one in episodes]),
        actions=_time_major([_zeros(one.actions, steps) for one in episodes]),
        increments=None,
        grid=TimeGrid(nodes[0]) if common else OwnTimes(nodes),
        rewards=rewards,
        black_box=True,
        ends=ends,
        terminated=torch.tensor([one.terminated for one in episodes], device=ends.device),
    )


def paths_of_arrays(
    times: Numbers,
    states: Numbers,
    actions: Numbers,
    rewards: Numbers | None = None,
    *,
    observed: Bool[Tensor, "paths nodes"] | np.ndarray | Sequence[Sequence[bool]] | None = None,
    terminated: Bool[Tensor, " paths"] | np.ndarray | Sequence[bool] | bool,
) -> Paths:
    """Padded arrays as one ``Paths``; what is not observed may hold anything, NaN too.

    Args:
        times: of the observations, [paths, nodes], or [nodes] for all.
        states: [paths, nodes, *event].
        actions: [paths, nodes - 1, *action].
        rewards: [paths, nodes - 1], or none.
        observed: which nodes are; True up to each path's end and False after it. All if not given.
        terminated: whether each path is over at its end (``Episode.terminated``), or all.

    Raises:
        ValueError: shapes do not fit, the mask has a hole or fewer than two observations, times do
            not increase, or an observed number is not finite.
    """
    x = torch.as_tensor(states)
    if x.ndim < 2:
        raise ValueError(f"states must be [paths, nodes, *event], got {list(x.shape)}")
    paths, nodes = x.shape[:2]
    t = torch.as_tensor(times)
    t = t.expand(paths, nodes) if t.shape == (nodes,) else t
    a = torch.as_tensor(actions)
    r = None if rewards is None else torch.as_tensor(rewards)
    wanted = {"times": (t, nodes), "actions": (a, nodes - 1)}
    for name, (value, count) in (
        wanted | ({} if r is None else {"rewards": (r, nodes - 1)})
    ).items():
        if tuple(value.shape[:2]) != (paths, count):
            raise ValueError(
                f"{name} must begin with {[paths, count]} to fit states {list(x.shape)}, got "
                f"{list(value.shape)}"
            )
    mask = (
        torch.ones(paths, nodes, dtype=torch.bool)
        if observed is None
        else torch.as_tensor(observed)
    )
    counts = _observations(mask, paths, nodes)
    over = torch.as_tensor(terminated).expand(paths)
    if over.dtype != torch.bool:
        raise TypeError(f"terminated must be True or False for each path, got {over.dtype}")
    return paths_of(
        [
            Episode(
                t[i, :n],
                x[i, :n],
                a[i, : n - 1],
                None if r is None else r[i, : n - 1],
                terminated=bool(over[i]),
            )
            for i, n in enumerate(counts.tolist())
        ]
    )


class Replay:
    """The last episodes, to learn from again ([L92]); the oldest leave when it is full.

    Nothing is corrected for the policies that made them: it is for losses that are off-policy.
    """

    def __init__(self, capacity: int) -> None:
        """A replay memory.

        Args:
            capacity: how many episodes it holds.

        Raises:
            ValueError: it is not a positive integer.
        """
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"capacity must be an integer of at least 1, got {capacity!r}")
        self._capacity, self._episodes = capacity, list[Episode]()

    def __len__(self) -> int:
        """How many episodes there are."""
        return len(self._episodes)

    @property
    def steps(self) -> int:
        """How many steps there are in them."""
        return sum(map(len, self._episodes))

    def add(self, episodes: Sequence[Episode]) -> None:
        """Append episodes; the oldest leave."""
        for one in episodes:
            if self._episodes and _kind(one) != _kind(self._episodes[0]):
                raise ValueError(
                    f"episodes must be of one kind, but the replay has {_kind(self._episodes[0])} "
                    f"and got {_kind(one)}"
                )
            self._episodes.append(one)
        del self._episodes[: -self._capacity]

    def sample(self, paths: int, generator: Generator) -> Paths:
        """Whole episodes, each as probable as any other, with replacement.

        Raises:
            ValueError: the replay is empty, or ``paths`` no positive integer.
        """
        self._require(paths)
        chosen = torch.randint(len(self), (paths,), generator=generator)
        return paths_of([self._episodes[i] for i in chosen.tolist()])

    def sample_steps(self, paths: int, generator: Generator) -> Paths:
        """Paths of one step, each step of every episode as probable as any other.

        For online losses. Their discounting begins at each step's own time.

        Raises:
            ValueError: the replay is empty, or ``paths`` no positive integer.
        """
        self._require(paths)
        lengths = torch.tensor([len(one) for one in self._episodes])
        chosen = torch.randint(int(lengths.sum()), (paths,), generator=generator)
        upto = lengths.cumsum(0)
        which = torch.searchsorted(upto, chosen, right=True)
        k = chosen - (upto - lengths)[which]
        rows = [(self._episodes[i], j) for i, j in zip(which.tolist(), k.tolist(), strict=True)]
        rewards = [one.rewards[j : j + 1] for one, j in rows if one.rewards is not None]
        over = [one.terminated and j == len(one) - 1 for one, j in rows]
        states = _time_major([one.states[j : j + 2] for one, j in rows])
        return Paths(
            states=states,
            actions=_time_major([one.actions[j : j + 1] for one, j in rows]),
            increments=None,
            grid=OwnTimes(torch.stack([one.times[j : j + 2] for one, j in rows])),
            rewards=_time_major(rewards) if rewards else None,
            black_box=True,
            ends=torch.ones(paths, dtype=torch.int64, device=states.device),
            terminated=torch.tensor(over, device=states.device),
        )

    def _require(self, paths: int) -> None:
        if not self._episodes:
            raise ValueError("the replay must have episodes to sample from, got none: add(...)")
        if isinstance(paths, bool) or not isinstance(paths, int) or paths < 1:
            raise ValueError(f"paths must be an integer of at least 1, got {paths!r}")


def episodes_of(paths: Paths) -> list[Episode]:
    """Every path as an episode: of roll-outs, for a ``Replay`` or to be stored.

    Raises:
        ValueError: the paths have not kept their actions.
    """
    if paths.actions is None:
        raise ValueError("paths must have kept their actions")
    count, nodes = paths.states.shape[:2]
    ends = [nodes - 1] * count if paths.ends is None else paths.ends.tolist()
    over = paths.terminated
    times = paths.grid.nodes.expand(count, nodes)
    episodes: list[Episode] = []
    for i, n in enumerate(ends):
        early = n < nodes - 1 if paths.ends is not None else False
        episodes.append(
            Episode(
                times[i, : n + 1],
                paths.states[i, : n + 1],
                paths.actions[i, :n],
                None if paths.rewards is None else paths.rewards[i, :n],
                terminated=early if over is None else bool(over[i]),
            )
        )
    return episodes


def _tensor(
    name: str, value: Numbers, like: Tensor | None = None, *, exact: bool = False
) -> Tensor:
    """Floating point numbers; all but times in the precision of the states."""
    try:
        numbers = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as fault:
        raise TypeError(f"{name} must be numbers: {fault}") from fault
    if numbers.dtype == torch.bool or numbers.is_complex():
        raise TypeError(f"{name} must be real numbers, got {numbers.dtype}")
    if not numbers.is_floating_point():
        numbers = numbers.double()
    if not bool(torch.isfinite(numbers).all()):
        k = int((~torch.isfinite(numbers)).reshape(len(numbers), -1).any(1).nonzero()[0])
        raise ValueError(f"{name} must be finite, but {name}[{k}] is not")
    if like is None:
        return numbers
    return numbers.to(like.device) if exact else numbers.to(like)


def _check_lengths(known: dict[str, Tensor]) -> None:
    times, states, actions = known["times"], known["states"], known["actions"]
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must be [at least 2], got {list(times.shape)}")
    if states.ndim < 1 or len(states) != len(times):
        raise ValueError(
            f"states must begin with [{len(times)}], one for each time, got {list(states.shape)}"
        )
    for name in ("actions", "rewards"):
        value = known.get(name)
        if value is not None and (value.ndim < 1 or len(value) != len(times) - 1):
            raise ValueError(
                f"{name} must begin with [{len(times) - 1}], one for each step between times, got "
                f"{list(value.shape)}"
            )
    rewards = known.get("rewards")
    if rewards is not None and rewards.ndim != 1:
        raise ValueError(f"rewards must be [{len(times) - 1}], got {list(rewards.shape)}")
    assert actions.ndim >= 1


def _check_times(times: Float[Tensor, " nodes"]) -> None:
    if bool((bad := times.diff() <= 0).any()):
        k = int(bad.nonzero()[0])
        raise ValueError(
            f"times must increase strictly, but times[{k}] = {float(times[k]):g} and "
            f"times[{k + 1}] = {float(times[k + 1]):g}"
        )


def _observations(mask: Tensor, paths: int, nodes: int) -> Int[Tensor, " paths"]:
    """How many nodes of each path are observed; refused where others come after them."""
    if mask.dtype != torch.bool or mask.shape != (paths, nodes):
        raise ValueError(
            f"observed must be boolean, {[paths, nodes]}, got {mask.dtype} {list(mask.shape)}"
        )
    counts = mask.sum(1)
    holes = mask != (torch.arange(nodes, device=mask.device) < counts.unsqueeze(1))
    if bool(holes.any()):
        path, k = (int(each) for each in holes.nonzero()[0])
        raise ValueError(
            f"observed must be True up to each path's end and False after it, but path {path} "
            f"has a hole at node {k}; leave unobserved times out: paths may have their own times"
        )
    if bool((counts < 2).any()):
        path = int((counts < 2).nonzero()[0])
        raise ValueError(
            f"observed must have at least 2 nodes of each path, got {int(counts[path])} of path "
            f"{path}"
        )
    return counts


def _kind(one: Episode) -> tuple[object, ...]:
    recorded = "recorded rewards" if one.rewards is not None else "no rewards"
    x, a = one.states, one.actions
    return list(x.shape[1:]), list(a.shape[1:]), recorded, x.dtype, x.device  # pyright: ignore[reportReturnType]  # a tuple


def _rest(values: Tensor, count: int) -> Tensor:
    """``values`` and then its last one again and again."""
    return torch.cat([values, values[-1:].expand(count - len(values), *values.shape[1:])])


def _zeros(values: Tensor, count: int) -> Tensor:
    """``values`` and then zeros."""
    return torch.cat([values, values.new_zeros(count - len(values), *values.shape[1:])])


def _time_major(each: list[Tensor]) -> Tensor:
    return torch.stack(each, dim=1).movedim(0, 1)
