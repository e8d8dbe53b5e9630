"""Objectives that learn from the samples themselves, re-noised; what made them does not matter."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor

from ctrl.devices import as_like, sent
from diffusion_envs.denoising import noising_bridge
from diffusion_envs.environment import Environment
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.objectives.protocol import Objective, Update
from diffusion_envs.rollout import Rollout


@dataclass(frozen=True, eq=False)
class NoisedRows:
    """Data that a policy made, re-noised: state = alpha data + sigma noise.

    Only ``mean`` carries a gradient. Scores that the objective does not need are None. The members
    of a group stand side by side, at the same noise level and with the same noise:
    ``view(-1, group, ...)``.
    """

    mean: Float[Tensor, " rows *event"]  # current score at the noised state
    old_mean: Float[Tensor, " rows *event"] | None  # of the policy that made the data
    reference_score: Float[Tensor, " rows *event"] | None  # pretrained
    state: Float[Tensor, " rows *event"]
    data: Float[Tensor, " rows *event"]
    noise: Float[Tensor, " rows *event"]
    alpha: Float[Tensor, " rows"]
    sigma: Float[Tensor, " rows"]
    reward: Float[Tensor, " rows"]
    advantage: Float[Tensor, " rows"]
    # At a state drawn between the noised state and the data, given both: path KL from the noised
    # state on, nats, as one unbiased estimate; and the score of the noised state given that state.
    bridge_cost: Float[Tensor, " rows"] | None = None
    bridge_score: Float[Tensor, " rows *event"] | None = None
    # int g^2 over the row's timestep, times the number of timesteps: the mean over rows of its half
    # times a square of the score's change is a path KL, nats
    path_kl_gain: Float[Tensor, " rows"] | None = None


@dataclass(frozen=True)
class NoisedObjective(Objective):
    """Learns from data that the model made with any sampler, re-noised."""

    draws: int = 4  # noised states of each sample: pairs of one noise level and opposite noise

    needs_steps: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = True
    needs_old: ClassVar[bool] = True  # the scores of the policy that sampled enter the loss

    @property
    def needs_bridge(self) -> bool:
        """Whether the rows are to know what the path from the noised state to the data costs."""
        return False

    @abstractmethod
    def advantages(self, rollout: Rollout) -> Float[Tensor, " paths"]:
        """What each sample was worth."""

    def numbers(self, advantages: Float[Tensor, " paths"]) -> dict[str, float]:
        """What to log of the advantages."""
        return {}

    @abstractmethod
    def loss(self, rows: NoisedRows) -> Float[Tensor, " rows"]:
        """Loss of each row; its mean estimates the loss of a sample."""

    def losses_of(self, update: Update) -> "NoisedLosses":
        """Losses of re-noised samples, after advantages, noise levels and noise are drawn."""
        return NoisedLosses(
            update.environment,
            self,
            update.rollout,
            update.advantages(self.advantages),
            update.stream("noise"),
            update.old_policy,
            batch=update.batch,
        )


def drawn_levels(
    paths: int, draws: int, first: int, end: int, generator: Generator
) -> Int64[Tensor, "paths draws"]:
    """Timesteps from ``first`` to before ``end``, each with equal probability, stratified.

    One falls into each of as many equal intervals as are drawn. The two draws of a pair (first half
    and second half of a path's) share theirs; an odd one has its own.
    """
    own = -(-draws // 2)
    place = torch.randperm(paths * own, generator=generator).double()
    place = (place + torch.rand(paths * own, generator=generator, dtype=torch.float64)) / len(place)
    timesteps = (first + (end - first) * place).long().clamp(max=end - 1).view(paths, own)
    return torch.cat([timesteps, timesteps[:, : draws - own]], dim=1)


def drawn_noise(
    paths: int, draws: int, event: Sequence[int], generator: Generator
) -> Float[Tensor, "paths draws *event"]:
    """Standard normals, the second half of a path's draws opposite to the first half.

    What is odd in the noise, such as most of the pull that a sample exerts near the data, then adds
    no variance: averages keep their expectation.
    """
    own = -(-draws // 2)
    noise = torch.randn(paths, own, *event, generator=generator)
    return torch.cat([noise, -noise[:, : draws - own]], dim=1)


class NoisedLosses:
    """Losses of the samples themselves, re-noised; what made them does not matter.

    Args:
        environment: that made the roll-out.
        objective: that learns.
        rollout: to learn from.
        advantages: of every sample of all processes.
        generator: draws noise levels and noise, the same on all processes.
        old: a context within which the environment's score is that of the policy that sampled;
            None if that is the current one and all of the roll-out is used before the weights
            change: what a row's score is when it is first asked for is then the old one.
        batch: rows that go through the network at once.
    """

    def __init__(
        self,
        environment: Environment,
        objective: NoisedObjective,
        rollout: Rollout,
        advantages: Float[Tensor, " paths"],
        generator: Generator,
        old: Callable[[], AbstractContextManager[Any]] | None,
        *,
        batch: int,
    ) -> None:
        self.environment, self.objective, self.rollout = environment, objective, rollout
        self.place, self.batch = rollout.place, batch
        self.advantages = self.place.own(advantages)
        self._numbers = objective.numbers(advantages)
        data = rollout.states[:, -1]
        log_abar = _table(environment).alphas_cumprod.double().log()
        shape = (len(data), objective.draws)
        every = (self.place.of, objective.draws)  # the members of a group share theirs
        own = slice(self.place.groups.start, self.place.groups.stop)
        first = 1 if objective.needs_bridge else 0  # no state lies before the first timestep
        timestep = drawn_levels(*every, first, len(log_abar), generator)[own]
        noise = as_like(drawn_noise(*every, data.shape[1:], generator)[own], data)
        self.timestep = timestep.repeat_interleave(rollout.group, 0)
        self.noise = noise.repeat_interleave(rollout.group, 0)
        # as the log of alpha^2 is minus int g^2
        self.path_kl_gain = -len(log_abar) * torch.cat([log_abar[:1], log_abar.diff()])
        everything = torch.cartesian_prod(torch.arange(len(data)), torch.arange(shape[1]))
        self.bridge: tuple[Tensor, Tensor] | None = None  # cost and score, for every draw
        self.old_mean: Tensor | None = None
        self.reference: Tensor | None = None
        self._old_known = torch.full(shape, old is not None)
        self._gaps: list[Tensor] = []
        with torch.no_grad():
            if objective.needs_old and old is None:
                self.old_mean = torch.zeros_like(self.noise)
            elif objective.needs_old and old is not None:
                with old():
                    self.old_mean = self._scores(everything)
            if objective.needs_reference:
                with environment.pretrained():
                    self.reference = self._scores(everything)
            if objective.needs_bridge:
                self.bridge = self._bridge(everything, log_abar, generator)

    def _levels(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        like = self.rollout.states
        abar = as_like(_table(self.environment).alphas_cumprod[timestep], like)
        return abar.sqrt(), (1 - abar).sqrt()

    def _states(self, which: Int64[Tensor, "rows 2"]) -> Tensor:
        levels = self._levels(self.timestep[tuple(which.T)])
        alpha, sigma = (_wide(v, self.noise.ndim - 1) for v in levels)
        path, draw = sent(which, self.environment.device).unbind(1)
        return alpha * self.rollout.states[path, -1] + sigma * self.noise[path, draw]

    def _score(self, states: Tensor, timestep: Tensor, path: Tensor) -> Tensor:
        environment = self.environment
        condition = environment.condition_of(self.rollout.condition[path])
        return environment.model(states, sent(timestep, environment.device), condition)

    def _scores(self, which: Int64[Tensor, "rows 2"]) -> Float[Tensor, "paths draws *event"]:
        def score(c: slice) -> Tensor:
            piece = which[c]
            return self._score(self._states(piece), self.timestep[tuple(piece.T)], piece[:, 0])

        scores = self.environment.in_pieces(score, self, "scores of noised data", rows=len(which))
        return torch.cat(scores).view_as(self.noise)

    def _bridge(
        self, which: Int64[Tensor, "rows 2"], log_abar: Tensor, generator: Generator
    ) -> tuple[Float[Tensor, "paths draws"], Float[Tensor, "paths draws *event"]]:
        """Unbiased estimate of the path KL between the noised state and the data, nats.

        The time between is drawn in proportion to g^2 and rounded to the timestep before it,
        towards the data (to the first, where there is none); the state there from its law given
        both ends. The second answer is the score of the noised state given that state.
        """
        path, draw = which.unbind(1)
        timestep = self.timestep[path, draw]
        depth = -log_abar[timestep]  # int of g^2 from the data
        shape = (self.place.of * self.place.size, self.objective.draws)  # drawn for all processes
        aim = torch.rand(shape, generator=generator, dtype=torch.float64)
        aim = self.place.own(aim).flatten() * depth
        between = torch.searchsorted(-log_abar, aim, right=True).sub(1).clamp(min=0)
        ends = self.rollout.states[:, -1]
        data, noised = ends[sent(path, ends.device)], self._states(which)
        kept = log_abar[timestep] - log_abar[between]
        ratio, variance = (
            _wide(as_like(v, noised), noised.ndim) for v in ((0.5 * kept).exp(), -kept.expm1())
        )
        alpha, sigma = (_wide(v, noised.ndim) for v in self._levels(between))
        mean, std = noising_bridge(data, noised, alpha, sigma, ratio)
        normals = torch.randn(*shape, *data.shape[1:], generator=generator)
        states = mean + std * as_like(self.place.own(normals).flatten(0, 1), data)

        def gap(c: slice) -> Tensor:
            seen = states[c], between[c], path[c]
            own = self._score(*seen)
            with self.environment.pretrained():
                return (own - self._score(*seen)).square().flatten(1).sum(1)

        gaps = self.environment.in_pieces(gap, self, "scores of noised data", rows=len(path))
        cost = 0.5 * as_like(depth, noised) * torch.cat(gaps)
        score = -(noised - ratio * states) / variance
        return cost.view_as(self.timestep), score.view_as(self.noise)

    def losses(self, groups: Int64[Tensor, " groups"], generator: Generator) -> Iterator[Tensor]:
        """Mean over all noised states of these groups."""
        size, draws = self.rollout.group, self.objective.draws
        each = torch.cartesian_prod(groups, torch.arange(draws), torch.arange(size))
        group, draw, member = each.view(-1, 3).unbind(1)
        which = torch.stack([group * size + member, draw], dim=1)
        mine = which[self.place.has(which[:, 0])] - torch.tensor([self.place.paths.start, 0])
        if not len(mine):
            return
        gaps = list[Tensor]()
        for piece in mine.split(max(1, self.batch // size) * size):
            rows = self.rows(piece)
            yield self.objective.loss(rows).sum() / len(which)
            if rows.reference_score is not None:
                gap = (rows.mean.detach() - rows.reference_score).square().flatten(1).mean(1)
                gaps.append(rows.sigma.square() * gap)
        self._gaps += gaps

    def rows_of(self, groups: Int64[Tensor, " groups"]) -> tuple[int, int]:
        """The noised states of these groups, and those of a group's members."""
        size = self.rollout.group
        return int(self.place.has(groups * size).sum()) * self.objective.draws * size, size

    def rows(self, which: Int64[Tensor, "rows 2"]) -> NoisedRows:
        """(path, draw) pairs as rows, with the current policy's score."""
        states, timestep = self._states(which), self.timestep[tuple(which.T)]
        alpha, sigma = self._levels(timestep)
        mean = self._score(states, timestep, which[:, 0])
        path, draw = sent(which, self.environment.device).unbind(1)
        cost, score = self.bridge or (None, None)
        return NoisedRows(
            mean=mean,
            old_mean=self._old(which, mean.detach()),
            reference_score=None if self.reference is None else self.reference[path, draw],
            state=states,
            data=self.rollout.states[path, -1],
            noise=self.noise[path, draw],
            alpha=alpha,
            sigma=sigma,
            reward=self.rollout.rewards[path],
            advantage=self.advantages[path].to(mean),
            bridge_cost=None if cost is None else cost[path, draw],
            bridge_score=None if score is None else score[path, draw],
            path_kl_gain=as_like(self.path_kl_gain[timestep], mean),
        )

    def _old(self, which: Int64[Tensor, "rows 2"], current: Tensor) -> Tensor | None:
        """Scores of the policy that sampled: the current ones, while the weights did not move."""
        if self.old_mean is None:
            return None
        path, draw = sent(which, self.environment.device).unbind(1)
        places = tuple(which.T)
        unknown = ~self._old_known[places]  # on the CPU
        if bool(unknown.any()):
            new = _wide(sent(unknown, current.device), current.ndim)
            self.old_mean[path, draw] = torch.where(new, current, self.old_mean[path, draw])
            self._old_known[places] = True
        return self.old_mean[path, draw]

    def check_fresh(self) -> None:
        """Nothing: no ratio and no path KL is known."""

    def numbers(self) -> dict[str, float]:
        """Numbers of the objective; and mean squared epsilon away from the pretrained model.

        The latter as the losses saw it, where they need the pretrained model: it costs nothing.
        """
        gap = {"epsilon_gap": torch.cat(self._gaps).mean().item()} if self._gaps else {}
        return gap | self._numbers


def _wide(values: Tensor, ndim: int) -> Tensor:
    return values.view(*values.shape, *[1] * (ndim - values.ndim))


def _table(environment: Environment) -> DDPMTable:
    """The noise levels of a model whose action is the score."""
    table = environment.model.table
    assert isinstance(table, DDPMTable)  # needs_scores
    return table
