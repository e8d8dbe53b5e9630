"""What an update learns from a roll-out: one class for each kind of objective.

A lesson is made once an update, before the weights move; it then turns any of the roll-out's groups
of paths into losses, in pieces that fit into memory. The sum of their gradients is the gradient of
the mean loss of a path. What is random is drawn from the generator that is given.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor

from ctrl.devices import as_like, read, sent
from diffusion_envs.denoising import noising_bridge, path_kl_per_step, tweedie_mean
from diffusion_envs.environment import Environment
from diffusion_envs.objectives import (
    BackpropObjective,
    NoisedObjective,
    NoisedRows,
    PathObjective,
    Rollout,
    Rows,
)

Values = Callable[[Tensor, Tensor, Tensor], Tensor]  # (node, states, path) -> value, a row each


@runtime_checkable
class Lesson(Protocol):
    """Losses of groups of paths."""

    def losses(self, groups: Int64[Tensor, " groups"], generator: Generator) -> Iterator[Tensor]:
        """Scalars, the sum of which is the mean loss of these groups' paths."""
        ...

    def numbers(self) -> dict[str, float]:
        """What was seen while the losses were made, to log."""
        ...


class PathSteps:
    """Single steps of the sampled paths.

    Args:
        environment: that made the roll-out.
        objective: that learns.
        rollout: to learn from.
        advantages: of every decision.
        values: V at any states of a node, with a gradient in the states.
        train_steps: of each path that are used, drawn without replacement; None for all.
        batch: rows that go through the network at once.
    """

    def __init__(
        self,
        environment: Environment,
        objective: PathObjective,
        rollout: Rollout,
        advantages: Float[Tensor, "paths steps"],
        values: Values | None,
        *,
        train_steps: int | None,
        batch: int,
    ) -> None:
        self.environment, self.objective, self.rollout = environment, objective, rollout
        self.advantages, self.values = advantages, values
        self.train_steps, self.batch = train_steps, batch
        sampler = environment.sampler
        self._tables = as_like(
            torch.stack([sampler.score_gain, sampler.std, sampler.sigma[:-1], sampler.state_gain]),
            rollout.means,
        )  # sent once, not for every row
        self._timesteps = sent(sampler.timesteps, environment.device)
        self._log_ratios: list[Tensor] = []
        self._clipped: list[Tensor] = []

    def losses(self, groups: Int64[Tensor, " groups"], generator: Generator) -> Iterator[Tensor]:
        """Mean over the rows that are used, times the steps of a path if rows are single steps."""
        size, steps = self.rollout.group, self.rollout.costs.shape[1]
        used = min(self.train_steps or steps, steps)
        joined = used if self.objective.joins_steps else 1
        chosen = self._steps(len(groups), used, generator)  # [groups, used]: shared by a group
        path = groups[:, None, None] * size + torch.arange(size)
        shape = (len(groups), used, size)
        which = torch.stack(
            [path.expand(shape).flatten(), chosen[:, :, None].expand(shape).flatten()], dim=1
        )  # [rows, (path, step)]
        if self.objective.joins_steps:
            steps = 1
        together = size * joined
        for piece in which.split(max(1, self.batch // together) * together):
            rows = self.rows(piece, joined)
            # rows are a uniform draw from paths x steps: mean x steps estimates the path's sum
            yield self.objective.loss(rows).sum() * steps / len(which)
            with torch.no_grad():
                self._log_ratios.append(self.objective.log_ratio(rows).detach())
                self._clipped.append(self.objective.clipped(rows).detach())

    def _steps(self, groups: int, used: int, generator: Generator) -> Int64[Tensor, "groups used"]:
        """Steps of each group, without replacement if all are equally probable."""
        steps = self.rollout.costs.shape[1]
        weights = self.objective.step_probabilities(steps)
        if weights is None:
            return torch.rand(groups, steps, generator=generator).argsort(1)[:, :used]
        return torch.multinomial(
            weights.expand(groups, -1), used, replacement=True, generator=generator
        )

    def rows(self, which: Int64[Tensor, "rows 2"], steps: int = 1) -> Rows:
        """(path, step) pairs as rows, with the current policy's score; ``steps`` come together."""
        environment, rollout = self.environment, self.rollout
        sampler = environment.sampler
        context = environment.context_of(rollout.condition[which[:, 0]])
        path, step = sent(which, environment.device).unbind(1)
        states = rollout.states[path, step]
        mean = environment.score(states, self._timesteps[step], context)
        score_gain, std, sigma, state_gain = self._tables[:, step]

        def wide(each: Tensor) -> Tensor:
            return each.view(-1, *[1] * (mean.ndim - 1))

        def value_at(offset: int) -> Callable[[Tensor], Tensor] | None:
            values = self.values
            return None if values is None else lambda x: values(step + offset, x, path)

        targets, preferences = rollout.targets, rollout.preferences
        return Rows(
            mean=mean,
            old_mean=rollout.means[path, step],
            reference_score=rollout.reference_scores[path, step],
            action=rollout.actions[path, step],
            noise=rollout.noises[path, step],
            advantage=self.advantages[path, step].to(mean),
            step_size=rollout.step_sizes[step].to(mean),
            horizon=rollout.step_sizes.sum().to(mean),
            score_gain=score_gain,
            std=std,
            action_std=self.objective.action_std(sigma),
            kl_factor=sampler.kl_factor,
            sigma=sigma,
            state=states,
            next_mean=wide(state_gain) * states + wide(score_gain) * mean,
            next_state=rollout.states[path, step + 1],
            target=None if targets is None else targets[path, step],
            preference=None if preferences is None else preferences[path].to(mean),
            value=value_at(0),
            next_value=value_at(1),
            steps=steps,
        )

    def numbers(self) -> dict[str, float]:
        """Range of the ratios, and the share that the clip touches."""
        ratio = torch.cat(self._log_ratios).exp()
        clipped = torch.cat(self._clipped).mean()
        names = ("ratio_min", "ratio_max", "clipped_fraction")
        return dict(zip(names, read(ratio.min(), ratio.max(), clipped), strict=True))


def drawn_levels(
    paths: int, draws: int, first: int, end: int, generator: Generator
) -> Int64[Tensor, "paths draws"]:
    """Timesteps from ``first`` to before ``end``, each with equal probability, evenly spread.

    One falls into each of as many equal intervals as are drawn. The two draws of a pair (first half
    and second half of a path's) share theirs; an odd one has its own.
    """
    own = -(-draws // 2)
    place = torch.randperm(paths * own, generator=generator).double()
    place = (place + torch.rand(paths * own, generator=generator, dtype=torch.float64)) / len(place)
    found = (first + (end - first) * place).long().clamp(max=end - 1).view(paths, own)
    return torch.cat([found, found[:, : draws - own]], dim=1)


def drawn_noise(
    paths: int, draws: int, event: Sequence[int], generator: Generator
) -> Float[Tensor, "paths draws *event"]:
    """Standard normals, the second half of a path's draws opposite to the first half.

    What is odd in the noise, such as most of the pull that a sample exerts near the data, then adds
    no variance: averages keep their expectation.
    """
    own = -(-draws // 2)
    found = torch.randn(paths, own, *event, generator=generator)
    return torch.cat([found, -found[:, : draws - own]], dim=1)


class NoisedData:
    """The samples themselves, noised anew; what made them does not matter.

    Args:
        environment: that made the roll-out.
        objective: that learns.
        rollout: to learn from.
        advantages: of every sample.
        generator: draws noise levels and noise.
        old: a context within which the environment's score is that of the policy that sampled;
            None if that is the current one and all of the roll-out is gone through before the
            weights move: what a row's score is when it is first asked for is then the old one.
        batch: rows that go through the network at once.
    """

    def __init__(
        self,
        environment: Environment,
        objective: NoisedObjective,
        rollout: Rollout,
        advantages: Float[Tensor, " paths"],
        generator: Generator,
        old: Callable[[], Any] | None,
        *,
        batch: int,
    ) -> None:
        self.environment, self.objective, self.rollout = environment, objective, rollout
        self.advantages, self.batch = advantages, batch
        data = rollout.states[:, -1]
        log_abar = environment.sampler.table.alphas_cumprod.double().log()
        shape = (len(data), objective.draws)
        first = 1 if objective.needs_bridge else 0  # no state lies before the first timestep
        self.timestep = drawn_levels(*shape, first, len(log_abar), generator)
        self.noise = as_like(drawn_noise(*shape, data.shape[1:], generator), data)
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
                with environment.score.pretrained():
                    self.reference = self._scores(everything)
            if objective.needs_bridge:
                self.bridge = self._bridge(everything, log_abar, generator)

    def _levels(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        like = self.rollout.states
        abar = as_like(self.environment.sampler.table.alphas_cumprod[timestep], like)
        return abar.sqrt(), (1 - abar).sqrt()

    def _states(self, which: Int64[Tensor, "rows 2"]) -> Tensor:
        levels = self._levels(self.timestep[tuple(which.T)])
        alpha, sigma = (_wide(v, self.noise.ndim - 1) for v in levels)
        path, draw = sent(which, self.environment.device).unbind(1)
        return alpha * self.rollout.states[path, -1] + sigma * self.noise[path, draw]

    def _score(self, states: Tensor, timestep: Tensor, path: Tensor) -> Tensor:
        environment = self.environment
        context = environment.context_of(self.rollout.condition[path])
        return environment.score(states, sent(timestep, environment.device), context)

    def _scores(self, which: Int64[Tensor, "rows 2"]) -> Float[Tensor, "paths draws *event"]:
        found = [
            self._score(self._states(piece), self.timestep[tuple(piece.T)], piece[:, 0])
            for piece in which.split(self.batch)
        ]
        return torch.cat(found).view_as(self.noise)

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
        aim = torch.rand(len(which), generator=generator, dtype=torch.float64) * depth
        between = torch.searchsorted(-log_abar, aim, right=True).sub(1).clamp(min=0)
        ends = self.rollout.states[:, -1]
        data, noised = ends[sent(path, ends.device)], self._states(which)
        kept = log_abar[timestep] - log_abar[between]
        ratio, spread = (
            _wide(as_like(v, noised), noised.ndim) for v in ((0.5 * kept).exp(), -kept.expm1())
        )
        alpha, sigma = (_wide(v, noised.ndim) for v in self._levels(between))
        mean, std = noising_bridge(data, noised, alpha, sigma, ratio)
        states = mean + std * as_like(torch.randn(data.shape, generator=generator), data)
        gaps = []
        pieces = (each.split(self.batch) for each in (states, between, path))
        for seen in zip(*pieces, strict=True):
            own = self._score(*seen)
            with self.environment.score.pretrained():
                gaps.append((own - self._score(*seen)).square().flatten(1).sum(1))
        cost = 0.5 * as_like(depth, noised) * torch.cat(gaps)
        score = -(noised - ratio * states) / spread
        return cost.view_as(self.timestep), score.view_as(self.noise)

    def losses(self, groups: Int64[Tensor, " groups"], generator: Generator) -> Iterator[Tensor]:
        """Mean over all noised states of these groups."""
        size, draws = self.rollout.group, self.objective.draws
        path = (groups[:, None] * size + torch.arange(size)).flatten()
        which = torch.cartesian_prod(path, torch.arange(draws))
        for piece in which.split(self.batch):
            rows = self.rows(piece)
            yield self.objective.loss(rows).sum() / len(which)
            if rows.reference_score is not None:
                gap = (rows.mean.detach() - rows.reference_score).square().flatten(1).mean(1)
                self._gaps.append(rows.sigma.square() * gap)

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

    def numbers(self) -> dict[str, float]:
        """What the objective tells; and mean squared epsilon away from the pretrained model.

        The latter as the losses saw it, where they need the pretrained model: it costs nothing.
        """
        found = {"epsilon_gap": torch.cat(self._gaps).mean().item()} if self._gaps else {}
        return found | self.objective.numbers(self.advantages)


class LastSteps:
    """The end of the sampler, run again with a gradient, and the reward at its end.

    Args:
        environment: that made the roll-out.
        objective: that learns.
        rollout: to learn from: starts and noises of the differentiated steps.
        batch: paths that are differentiated at once.
    """

    def __init__(
        self,
        environment: Environment,
        objective: BackpropObjective,
        rollout: Rollout,
        *,
        batch: int,
    ) -> None:
        self.environment, self.objective, self.rollout = environment, objective, rollout
        self.batch = batch
        self._seen: list[Tensor] = []

    def losses(self, groups: Int64[Tensor, " groups"], generator: Generator) -> Iterator[Tensor]:
        """Mean over these groups' paths."""
        size, steps = self.rollout.group, self.rollout.costs.shape[1]
        paths = (groups[:, None] * size + torch.arange(size)).flatten()
        for piece in paths.split(self.batch):
            first, last = self.objective.cut(steps, generator)
            rewards, nats = self._finish(piece, first, last)
            self._seen.append(rewards.detach())
            yield self.objective.loss(rewards, nats).sum() / len(paths)

    def _finish(self, paths: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Reward and path KL of steps ``first`` to ``last``, differentiable; no KL, no nats."""
        environment, rollout = self.environment, self.rollout
        sampler, condition = environment.sampler, rollout.condition[paths]
        context = environment.context_of(condition)
        paths = sent(paths, environment.device)
        states = rollout.states[paths, first]
        nats = states.new_zeros(len(paths))
        for k in range(first, last):
            timestep = sent(sampler.timesteps[k], environment.device).expand(len(paths))
            score = environment.score(states, timestep, context)
            if k == last - 1 and last < rollout.costs.shape[1]:
                alpha, sigma = (as_like(v[k], states) for v in (sampler.alpha, sampler.sigma))
                states = tweedie_mean(states, score, alpha, sigma)
                break
            if self.objective.needs_reference:
                # with its gradient: the state is that of this policy, and the KL moves with it
                with environment.score.pretrained():
                    reference = environment.score(states, timestep, context)
                width = as_like(sampler.integrated_g2[k : k + 1], states)
                nats = nats + path_kl_per_step(
                    score[:, None], reference[:, None], width, factor=sampler.kl_factor
                ).sum(1)
            gains = (sampler.state_gain, sampler.score_gain, sampler.std)
            state_gain, score_gain, std = (as_like(table[k], states) for table in gains)
            states = state_gain * states + score_gain * score + std * rollout.noises[paths, k]
        return environment.differentiable_reward(states, condition), nats

    def numbers(self) -> dict[str, float]:
        """Rewards at the differentiated end."""
        return {"differentiated_reward": torch.cat(self._seen).mean().item()}


def _wide(values: Tensor, ndim: int) -> Tensor:
    return values.view(*values.shape, *[1] * (ndim - values.ndim))
