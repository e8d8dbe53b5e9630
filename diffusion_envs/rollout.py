"""What sampled paths hold: states, scores, noises, path KL, rewards, condition."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ctrl.devices import sent


@dataclass(frozen=True)
class Share:
    """Which groups of paths are this process's, of those of all processes.

    Attributes:
        groups: by their place among all.
        of: how many there are.
        size: paths of a group.
    """

    groups: range
    of: int
    size: int

    @classmethod
    def even(cls, groups: int, size: int, process: int, processes: int) -> "Share":
        """That of one process; shares differ by one group at most."""
        first, end = (groups * k // processes for k in (process, process + 1))
        return cls(range(first, end), groups, size)

    @property
    def paths(self) -> range:
        """Their paths, by their place among those of all processes."""
        return range(self.groups.start * self.size, self.groups.stop * self.size)

    @property
    def weight(self) -> float:
        """Their share of all paths."""
        return len(self.groups) / self.of

    def has(self, paths: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which of some paths, by their place among those of all processes, are this process's."""
        return (paths >= self.paths.start) & (paths < self.paths.stop)

    def own(self, everyone: Float[Tensor, " all *shape"]) -> Float[Tensor, " paths *shape"]:
        """This process's rows of what has one for every path of all processes."""
        return everyone[self.paths.start : self.paths.stop]


@dataclass(frozen=True, eq=False)
class Rollout:
    """Paths sampled from one policy, with their scores, costs, values and rewards.

    Time is RL time: step k leads from node k to node k + 1; node 0 is noise, the last node is data.
    Actions are scores, or expected data where the sampler starts without signal.
    Of a black-box sampler only the last node is known: nodes is 1 and steps 0.
    """

    states: Float[Tensor, "paths nodes *event"]
    means: Float[Tensor, "paths steps *event"]  # the policy's mean action at the left of each step
    actions: Float[Tensor, "paths steps *event"]  # the one that was used; means, if not drawn
    noises: Float[Tensor, "paths steps *event"]  # standard normals that drove the transitions
    reference_scores: Float[Tensor, "paths steps *event"] | None  # None: they were not asked for
    # path KL of each step from the pretrained model, nats; NaN where its scores were not asked for
    costs: Float[Tensor, "paths steps"]
    values: Float[Tensor, "paths nodes"] | None  # reward; the last column is the terminal reward
    rewards: Float[Tensor, " paths"]
    step_sizes: Float[Tensor, " steps"]  # the sampler's clock; DDIM's is int g^2 dt
    condition: Int64[Tensor, " paths"]  # index of the prompt
    group: int = 1  # paths in a row that share a prompt, and are compared together
    preferences: Float[Tensor, " paths"] | None = None  # larger is preferred within a group
    reward_parts: Float[Tensor, "paths parts"] | None = None  # None: the reward has none
    part_weights: Mapping[str, float] = field(default_factory=dict)  # of them, by name, in order
    share: Share | None = None  # of several processes' paths; None: these are all

    @property
    def place(self) -> Share:
        """Where these paths stand among those of all processes."""
        groups = len(self.rewards) // self.group
        return self.share or Share(range(groups), groups, self.group)

    def at(
        self, name: str, path: Int64[Tensor, " rows"], step: Int64[Tensor, " rows"]
    ) -> Float[Tensor, " rows *event"]:
        """One of what is kept of each step, of (path, step) pairs, on the rewards' device."""
        values: Tensor = getattr(self, name)
        device = values.device
        return sent(values[sent(path, device), sent(step, device)], self.rewards.device)

    def on_host(self) -> "Rollout":
        """The same roll-out, with what is kept of each step in the CPU's memory.

        ``at`` and ``chosen`` bring the rows that are asked for to the device.
        """
        return dataclasses.replace(self, **{name: _on_host(v) for name, v in self._large()})

    def here(self) -> "Rollout":
        """The same roll-out, all of it on the rewards' device."""
        device = self.rewards.device
        return dataclasses.replace(self, **{name: sent(v, device) for name, v in self._large()})

    def _large(self) -> list[tuple[str, Tensor]]:
        """What is kept of each step, as large as its state."""
        names = ("states", "means", "actions", "noises", "reference_scores")
        values = [(name, getattr(self, name)) for name in names]
        return [(name, value) for name, value in values if value is not None]

    def chosen(self, rows: Int64[Tensor, " rows"]) -> "Rollout":
        """The same roll-out, some of its paths only, on the rewards' device."""
        here = sent(rows, self.rewards.device)
        fields = {
            f.name: value[here if value.device == here.device else rows]
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and f.name != "step_sizes"
        }
        return dataclasses.replace(self, **fields, share=None).here()


def _on_host(value: Tensor) -> Tensor:
    if value.device.type == "cpu":
        return value
    pinned = value.device.type == "cuda"  # so that no copy of its rows waits
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned).copy_(value)
