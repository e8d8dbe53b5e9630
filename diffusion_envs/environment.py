"""A diffusion model as an environment: model, sampler, reward, prompts; roll-outs and costs.

Three cost measures are kept: reward queries, network calls (one a row and guidance branch),
seconds. Noise is drawn from streams named by the global index of a sample, so a sample is the same
in any batch and on any process.

Source      [NS] Nesterov & Spokoiny 2017, "Random gradient-free minimization of convex functions",
            Foundations of Computational Mathematics 17.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

import ctrl
from ctrl.devices import as_like, sent, together
from ctrl.noise import normals_by_sample
from diffusion_envs import rewards
from diffusion_envs.models.kept_conditions import KeptConditions
from diffusion_envs.models.protocol import Condition, Denoiser, Model, PromptReader
from diffusion_envs.rollout import Rollout
from diffusion_envs.samplers import BoundBlackBox, GaussianSteps
from diffusion_envs.training import memory
from diffusion_envs.training.phase import phase

T = TypeVar("T")
_Row = TypeVar("_Row")
Mean = Callable[[Tensor, Tensor], Tensor]  # (time, states) -> action
Level = Callable[[Tensor], Tensor]  # time -> sigma


@dataclass(frozen=True, eq=False)
class Sample:
    """A roll-out with its decoded images."""

    rollout: Rollout
    images: Float[Tensor, " paths *picture"]
    denoised_rewards: Float[Tensor, "paths nodes"] | None  # r(x0_hat) at every node
    prompts: list[str]


@dataclass
class Environment:
    """A generation SDE driven by a model, and the reward that scores its images.

    The action is the model's score, or its expected data where the sampler starts without signal
    (``samplers.gaussian_steps``).

    Attributes:
        model: the network; its adapter is the policy.
        sampler: transitions on a grid, or a black box.
        reward: what the pictures are scored by.
        prompts: what to ask for.
        seed: of the run.
        score_images: how a reward is asked: (reward, pictures, prompts) -> [n], checked.
        batch: pictures that are decoded and scored at once; memory, not mathematics, and fewer from
            then on where it runs out (``training.memory``).
        reward_timeout: seconds that one call of a reward may take; None for any.
        overlap: calls of the reward that may go on while more is sampled, and while the pretrained
            model is asked; 0: they are waited for. What is sampled and scored is the same.
        reward_queries: so far.
        monitoring_calls: of the network, so far, that no method needs: they are in no budget.
        judged: pictures that a judge gets at once.
    """

    model: Model
    sampler: GaussianSteps | BoundBlackBox
    reward: rewards.Reward
    prompts: Sequence[str]
    seed: int
    score_images: rewards.Scorer = rewards.score
    batch: int = 64
    reward_timeout: float | None = None
    overlap: int = 0
    reward_queries: int = field(default=0)
    monitoring_calls: int = field(default=0)
    judged: memory.AtOnce = field(default_factory=memory.AtOnce)

    def __post_init__(self) -> None:
        rewards.require_seconds(self.reward_timeout)
        rewards.require_calls(self.overlap, self.reward)
        shown = self.sampler if isinstance(self.sampler, GaussianSteps) else None
        self._denoises = shown is not None and shown.action == "denoised"
        if self._denoises and not isinstance(self.model, Denoiser):
            raise TypeError(
                "the sampler starts where no signal is left, and there a score has no information; "
                f"model must return the expected data, but {type(self.model).__name__} has no "
                "method 'denoised': add it, or use a table whose last entry has some signal"
            )
        if isinstance(self.model, PromptReader):
            self.model.require_prompts(self.prompts)
        self._conditions = KeptConditions(self.model.condition, self.device)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of a state."""
        return self.model.event

    @property
    def problem(self) -> ctrl.ControlProblem:
        """Generation as a control problem: terminal reward only, the action is the sampler's."""
        return ctrl.ControlProblem(self.steps.sde, horizon=self.steps.schedule.horizon)

    @property
    def steps(self) -> GaussianSteps:
        """The sampler, where it shows its steps.

        Raises:
            TypeError: the sampler is a black box.
        """
        if not isinstance(self.sampler, GaussianSteps):
            raise TypeError(
                "sampler must show its steps, but this one is a black box: use DDIM(eta)"
            )
        return self.sampler

    @property
    def part_weights(self) -> Mapping[str, float]:
        """Weight of each part of the reward, by name; empty of a reward without parts."""
        return self.reward.weights if isinstance(self.reward, rewards.InParts) else {}

    def condition_of(self, prompt: Int64[Tensor, " rows"]) -> Condition:
        """What the model is conditioned on in each row, by the index of its prompt."""
        return self._conditions.of(self.prompts_of(prompt))

    def prompts_of(self, condition: Int64[Tensor, " rows"]) -> list[str]:
        """The prompt of each row, by its index."""
        return [self.prompts[int(k)] for k in condition.tolist()]

    def features_of(self, prompt: Int64[Tensor, " rows"]) -> Float[Tensor, "rows width"]:
        """The same as one vector a row, for a value network."""
        return self.model.features(self.condition_of(prompt))

    def action(
        self,
        states: Float[Tensor, " rows *event"],
        step: Int64[Tensor, " rows"] | int,
        prompt: Int64[Tensor, " rows"],
    ) -> Float[Tensor, " rows *event"]:
        """The policy's mean action at the left of a step: one step for all rows, or of each."""
        if isinstance(step, int):
            timesteps = sent(self.steps.timesteps[step], self.device).expand(len(states))
        else:
            timesteps = sent(self.steps.timesteps, self.device)[sent(step, self.device)]
        return self._act(states, timesteps, self.condition_of(prompt))

    def _act(self, states: Tensor, timesteps: Tensor, conditions: Condition) -> Tensor:
        if self._denoises:
            assert isinstance(self.model, Denoiser)
            return self.model.denoised(states, timesteps, conditions)
        return self.model(states, timesteps, conditions)

    @torch.no_grad()
    @together()
    def sample(
        self,
        policy: Callable[[Mean, Level], ctrl.Policy],
        samples: range,
        condition: Int64[Tensor, " paths"],
        *,
        stream: str,
        denoised: bool = False,
        group: int = 1,
        shared_start: bool = False,
        reference: bool = True,
        count_reference: bool = True,
    ) -> Sample:
        """Roll out one path for every global sample index.

        Args:
            policy: how to act, from the network's action and the noise level at a time.
            samples: global indices; each names its own noise.
            condition: index of each path's prompt.
            stream: names the noise, so that evaluation never sees training's.
            denoised: also reward the denoised image at every node (as the value network needs).
            group: paths in a row that are scored together.
            shared_start: whether they share their starting noise.
            reference: whether the pretrained model's actions, and so the path KL, are computed; the
                KL is NaN otherwise.
            count_reference: whether these calls are part of the method's cost; where they only
                serve to report the path KL, they are counted apart.
        """
        start = self._starts(stream, samples, group if shared_start else 1)
        if isinstance(self.sampler, BoundBlackBox):
            return self._black_box(self.sampler, start, samples, condition, stream, group)
        steps, prompts = len(self.sampler.timesteps), self.prompts_of(condition)
        normals = self._normals((steps, *self.event), stream, "transition", samples)
        drawn = self._normals((steps, *self.event), stream, "action", samples)
        made, images, pretrained, guesses = list[_Paths](), list[Tensor](), None, None
        with rewards.Overlapped(self.overlap, self.device) as asked:
            for c in self._pieces(len(samples)):
                piece = self._simulated(policy, start[c], normals[c], drawn[c], condition[c])
                made.append(piece)
                if self.overlap:
                    images.append(self._pictures(piece.states[:, -1]))
                    self._hand_over(asked, images[-1], prompts[c], samples[c])
            paths = _joined(made)
            before = paths.states[:, :-1]
            if reference:
                pretrained = self._pretrained_scores(before, condition, counted=count_reference)
            if denoised:
                guesses = self.sampler.denoised(before, paths.means).flatten(0, 1)
            if self.overlap:
                columns, earlier = self._answers(asked, guesses, prompts, samples)
            else:
                images.append(self._pictures(paths.states[:, -1]))
                columns = self._scored(images[-1], prompts, samples)
                earlier = None
                if guesses is not None:
                    earlier = self._rewards(guesses, _each(prompts, steps), _each(samples, steps))
        achieved, parts = columns[:, 0], columns[:, 1:] if columns.shape[1] > 1 else None
        denoised_rewards = None
        if earlier is not None:
            denoised_rewards = torch.cat([earlier.view(-1, steps), achieved[:, None]], dim=1)
        rollout = Rollout(
            states=paths.states,
            means=paths.means,
            actions=paths.actions,
            noises=normals,
            reference_scores=pretrained,
            costs=self._costs(paths.means, pretrained),
            values=None,
            rewards=achieved,
            step_sizes=as_like(self.sampler.step_sizes, paths.means),
            condition=condition,
            group=group,
            reward_parts=parts,
            part_weights=self.part_weights,
        )
        return Sample(rollout, torch.cat(images), denoised_rewards, prompts)

    def _pieces(self, samples: int) -> list[slice]:
        """What is sampled together: all, or so many that some can be scored meanwhile."""
        size = self.batch if self.overlap else samples
        return [slice(k, min(k + size, samples)) for k in range(0, samples, size)]

    def _simulated(
        self,
        policy: Callable[[Mean, Level], ctrl.Policy],
        start: Tensor,
        normals: Tensor,
        drawn: Tensor,
        condition: Int64[Tensor, " paths"],
    ) -> "_Paths":
        """Paths by their noise."""
        sampler, conditions = self.steps, self.condition_of(condition)
        timesteps, levels = sent(sampler.timesteps, self.device), as_like(sampler.sigma, normals)
        means: list[Tensor] = []

        def mean(t: Tensor, states: Tensor) -> Tensor:
            timestep = timesteps[len(means)]
            means.append(self._act(states, timestep.expand(len(states)), conditions))
            return means[-1]

        widths = as_like(sampler.grid.steps, normals).sqrt().view(1, -1, *[1] * len(self.event))
        paths = ctrl.simulate(
            self.problem,
            policy(mean, lambda t: levels[len(means) - 1]),
            start,
            sampler.grid,
            solver=sampler,
            noise=ctrl.Noise(increments=normals * widths, actions=drawn),
            keep=("states", "actions"),
        )
        assert paths.actions is not None  # they are kept
        return _Paths(paths.states, paths.actions, torch.stack(means, dim=1))

    @property
    def spent(self) -> tuple[int, int, int]:
        """Reward queries, network calls and those for monitoring so far; can be set."""
        return self.reward_queries, self.model.calls, self.monitoring_calls

    @spent.setter
    def spent(self, costs: tuple[int, int, int]) -> None:
        self.reward_queries, self.model.calls, self.monitoring_calls = costs

    def in_pieces(
        self, ask: Callable[[slice], T], pieces: memory.Batched, what: str, *, rows: int
    ) -> list[T]:
        """What ``ask`` says of each piece of so many rows; of one that memory ran out in, again.

        What an attempt that failed has cost is not counted.
        """

        def counted(piece: slice) -> T:
            spent = self.spent
            try:
                return ask(piece)
            except Exception:
                self.spent = spent
                raise

        return memory.in_pieces(counted, pieces, what, rows=rows)

    def uncount(self, calls: int) -> None:
        """Take the network calls since there were so many for monitoring: they are in no budget."""
        self.monitoring_calls += self.model.calls - calls
        self.model.calls = calls

    def _pretrained_scores(
        self,
        states: Float[Tensor, "paths steps *event"],
        condition: Int64[Tensor, " paths"],
        *,
        counted: bool,
    ) -> Float[Tensor, "paths steps *event"]:
        paths, steps = states.shape[:2]
        spent = self.model.calls
        with self.model.pretrained():
            scores = self.action(
                states.flatten(0, 1),
                torch.arange(steps).repeat(paths),
                condition.repeat_interleave(steps),
            )
        if not counted:
            self.uncount(spent)
        return scores.view_as(states)

    def _black_box(
        self,
        sampler: BoundBlackBox,
        start: Tensor,
        samples: range,
        condition: Int64[Tensor, " paths"],
        stream: str,
        group: int,
    ) -> Sample:
        """The end of every path; the intermediate states are not exposed."""
        generators = [ctrl.noise.stream(self.seed, stream, "scheduler", i) for i in samples]
        prompts, made, images = self.prompts_of(condition), list[Tensor](), list[Tensor]()
        with rewards.Overlapped(self.overlap, self.device) as asked:
            for c in self._pieces(len(samples)):
                conditions = self.condition_of(condition[c])

                def predicted(x: Tensor, t: Tensor, conditions: Condition = conditions) -> Tensor:
                    return self.model.prediction(x, sent(t, self.device).expand(len(x)), conditions)

                made.append(sampler.sample(predicted, start[c], generators[c]))
                images.append(self._pictures(made[-1]))
                if self.overlap:
                    self._hand_over(asked, images[-1], prompts[c], samples[c])
            if self.overlap:
                columns, _ = self._answers(asked, None, prompts, samples)
            else:
                columns = self._scored(images[-1], prompts, samples)
        data = torch.cat(made)
        achieved, parts = columns[:, 0], columns[:, 1:] if columns.shape[1] > 1 else None
        none = data.new_empty(len(data), 0, *data.shape[1:])
        rollout = Rollout(
            states=data[:, None],
            means=none,
            actions=none,
            noises=none,
            reference_scores=none,
            costs=none.new_empty(len(data), 0),
            values=None,
            rewards=achieved,
            step_sizes=none.new_empty(0),
            condition=condition,
            group=group,
            reward_parts=parts,
            part_weights=self.part_weights,
        )
        return Sample(rollout, torch.cat(images), None, prompts)

    # -- what an objective may ask of the model ---------------------------------------------------

    def pretrained(self) -> AbstractContextManager[None]:
        """Within this context the model is the pretrained one."""
        return self.model.pretrained()

    def pretrained_mean(
        self, step: int, states: Tensor, condition: Int64[Tensor, " paths"]
    ) -> Tensor:
        """Mean of the next state after this step under the pretrained model; differentiable."""
        which = torch.full((len(states),), step, device=self.device)
        with self.model.pretrained():
            action = self.action(states, which, condition)
        return self.steps.mean(which, states, action)

    def differentiable_reward(
        self, states: Tensor, condition: Int64[Tensor, " paths"]
    ) -> Float[Tensor, " paths"]:
        """Rewards of decoded states, with their gradient.

        Raises:
            RewardError: the reward raised, or did not return one finite number with a gradient for
                each state.
        """
        prompts = self.prompts_of(condition)
        self.reward_queries += len(states)
        images = self.model.decode(states)
        assert images.requires_grad or not (states.requires_grad and torch.is_grad_enabled())
        ask = rewards.limited(self.reward_timeout, rewards.differentiable_score)
        return ask(self.reward, images, prompts)

    def reward_gradient(self, states: Tensor, condition: Int64[Tensor, " paths"]) -> Tensor:
        """Gradient of the reward with respect to the states, which are decoded."""
        with torch.enable_grad():
            leaf = states.detach().requires_grad_()
            total = self.differentiable_reward(leaf, condition).sum()
            return torch.autograd.grad(total, leaf)[0]

    @torch.no_grad()
    def reward_gradient_by_queries(
        self,
        states: Float[Tensor, " paths *event"],
        condition: Int64[Tensor, " paths"],
        *,
        pairs: int,
        width: float,
        generator: torch.Generator,
    ) -> Float[Tensor, " paths *event"]:
        """Gradient of the reward with respect to the states, from rewards of others near them.

        The mean of z (r(x + width z) - r(x - width z)) / (2 width) over pairs, z standard normal,
        is without bias that of the reward smoothed by N(0, width^2) ([NS] section 3).

        Args:
            states: are decoded.
            condition: index of each state's prompt.
            pairs: of reward queries, for each state.
            width: of the perturbations, in the states' units.
            generator: of the perturbations, on the CPU.
        """
        prompts = self.prompts_of(condition)
        slope = torch.zeros_like(states)
        # path by path, so that a path's does not depend on how many are asked for at once
        drawn = [torch.randn(pairs, *self.event, generator=generator) for _ in prompts]
        for noise in as_like(torch.stack(drawn), states).unbind(1):
            above, below = (
                self._rewards(states + s * width * noise, prompts, range(len(states)))
                for s in (1, -1)
            )
            difference = as_like(above - below, states).view(-1, *[1] * len(self.event))
            slope += difference / (2 * width * pairs) * noise
        return slope

    def _costs(self, scores: Tensor, pretrained: Tensor | None) -> Float[Tensor, "paths steps"]:
        """Path KL of every step, nats; NaN without the pretrained model's actions."""
        if pretrained is None:
            return scores.new_full(scores.shape[:2], math.nan)
        return self.steps.path_kl(scores, pretrained)

    def ask(
        self,
        reward: rewards.Reward,
        images: Float[Tensor, " n *picture"],
        prompts: Sequence[str],
        pictures: Sequence[int],
    ) -> Float[Tensor, " n"]:
        """Scores of a reward or a judge, checked and in time; they are not counted.

        Args:
            reward: to ask.
            images: to score.
            prompts: one for each.
            pictures: index of each, for messages.

        Raises:
            RewardError: it raised, returned something unusable, or is late.
        """
        return rewards.limited(self.reward_timeout, self.score_images, pictures)(
            reward, images, prompts
        )

    def _pictures(self, states: Tensor) -> Float[Tensor, " n *picture"]:
        decoded = self.in_pieces(
            lambda c: self.model.decode(states[c]), self, "the decoder", rows=len(states)
        )
        return torch.cat(decoded)

    def _rewards(
        self, states: Tensor, prompts: Sequence[str], samples: Sequence[int]
    ) -> Float[Tensor, " n"]:
        """Rewards of many states, of which few pictures are held at once."""
        parts = self.in_pieces(
            lambda c: self._score(self.model.decode(states[c]), prompts[c], samples[c])[:, 0],
            self,
            f"the decoder or {self._reward_name}",
            rows=len(states),
        )
        return torch.cat(parts)

    @property
    def _reward_name(self) -> str:
        return f"the reward {rewards.reward_name(self.reward)}"

    def _scored(
        self, images: Tensor, prompts: Sequence[str], samples: Sequence[int]
    ) -> Float[Tensor, "n columns"]:
        """The reward of each picture, then its parts; asked in pieces."""
        parts = self.in_pieces(
            lambda c: self._score(images[c], prompts[c], samples[c]),
            self,
            self._reward_name,
            rows=len(images),
        )
        return torch.cat(parts)

    def _hand_over(
        self,
        asked: rewards.Overlapped,
        images: Tensor,
        prompts: Sequence[str],
        samples: Sequence[int],
        *,
        bounded: bool = False,
    ) -> None:
        """The same pieces as of ``_scored``, from threads; costs are counted here, not there."""
        self.reward_queries += len(images)

        def ask() -> Tensor:
            columns = memory.in_pieces(
                lambda c: self._columns(images[c], prompts[c], samples[c]),
                self,
                self._reward_name,
                rows=len(images),
            )
            return torch.cat(columns)

        asked.submit(ask, bounded=bounded)

    def _answers(
        self,
        asked: rewards.Overlapped,
        guesses: Tensor | None,
        prompts: Sequence[str],
        samples: Sequence[int],
    ) -> tuple[Float[Tensor, "n columns"], Float[Tensor, " guesses"] | None]:
        """Rewards of all samples with their parts, and those of the denoised states."""
        if guesses is not None:
            steps = len(guesses) // len(samples)
            words, which = _each(prompts, steps), _each(samples, steps)
            for c in self._pieces(len(guesses)):
                pictures = self._pictures(guesses[c])
                self._hand_over(asked, pictures, words[c], which[c], bounded=True)
        with phase("rewards"):
            columns = sent(torch.cat(asked.answers()), self.device)
        first, others = columns[: len(samples)], columns[len(samples) :, 0]
        return first, others if guesses is not None else None

    def _score(
        self, images: Tensor, prompts: Sequence[str], samples: Sequence[int]
    ) -> Float[Tensor, "n columns"]:
        """The reward of each picture, then its parts."""
        self.reward_queries += len(images)
        return sent(self._columns(images, prompts, samples), self.device)

    @phase("rewards")
    def _columns(
        self, images: Tensor, prompts: Sequence[str], samples: Sequence[int]
    ) -> Float[Tensor, "n columns"]:
        ask = rewards.limited(self.reward_timeout, self.score_images, samples)
        total, parts = rewards.score_in_parts(self.reward, images, prompts, ask)
        return torch.stack([total, *parts.values()], dim=1)

    def _starts(self, stream: str, samples: range, shared: int) -> Float[Tensor, " paths *event"]:
        """Starting noise of every path: its own, or that of every ``shared`` paths in a row."""
        if shared == 1:
            return self._normals(self.event, stream, "start", samples)
        groups = range(samples.start // shared, samples.stop // shared)
        return self._normals(self.event, stream, "start", groups).repeat_interleave(shared, 0)

    def _normals(self, shape: tuple[int, ...], stream: str, what: str, samples: range) -> Tensor:
        return normals_by_sample(
            shape, seed=self.seed, name=(stream, what), samples=samples, device=self.device
        )


class _Paths(NamedTuple):
    """What is kept of paths that are sampled together."""

    states: Float[Tensor, "paths nodes *event"]
    actions: Float[Tensor, "paths steps *event"]
    means: Float[Tensor, "paths steps *event"]


def _joined(pieces: Sequence[_Paths]) -> _Paths:
    """All paths; in memory as if they had been sampled together, step after step."""
    if len(pieces) == 1:
        return pieces[0]
    states, actions, means = zip(*pieces, strict=True)

    def by_step(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.transpose(0, 1) for part in parts], dim=1).transpose(0, 1)

    return _Paths(by_step(states), by_step(actions), torch.cat(means))


def _each(rows: Iterable[_Row], times: int) -> list[_Row]:
    """Every row so many times."""
    return [row for row in rows for _ in range(times)]
