"""A text-to-image model as an environment: roll-outs, rewards, and what they cost.

Costs are counted in three currencies: reward queries, network calls (one per row and guidance
branch), seconds. Noise is drawn from streams named by the global index of a sample, so a sample is
the same in any batch and on any process.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

import ctrl
from ctrl.devices import as_like, sent, together
from ctrl.noise import normals_by_sample
from diffusion_envs import rewards
from diffusion_envs.denoising import path_kl_per_step, tweedie_mean
from diffusion_envs.rollout import Rollout
from diffusion_envs.samplers import BoundBlackBox, BoundDDIM

Mean = Callable[[Tensor, Tensor], Tensor]  # (time, states) -> score
Level = Callable[[Tensor], Tensor]  # time -> sigma
Judge = Callable[[rewards.Reward, Tensor, Sequence[str]], Tensor]


@runtime_checkable
class ScoreNetwork(Protocol):
    """A network with an adapter, as a function from noisy states to scores (``GuidedScore``)."""

    calls: int
    precision: torch.dtype

    def __call__(self, states: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Scores, float32."""
        ...

    def prediction(self, states: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """What the network itself predicts, for black-box samplers."""
        ...

    def pretrained(self) -> AbstractContextManager[None]:
        """Within this context the adapter is off."""
        ...


@dataclass(frozen=True, eq=False)
class Sample:
    """A roll-out with its pictures, for the loop's eyes."""

    rollout: Rollout
    images: Float[Tensor, " paths *picture"]
    denoised_rewards: Float[Tensor, "paths nodes"] | None  # r(x0_hat) at every node
    prompts: list[str]


@dataclass
class Environment:
    """A generation SDE driven by a network's score, and the reward that judges its images.

    Attributes:
        score: the network; its adapter is the policy.
        sampler: transitions on a grid.
        decode: latents to pictures in [0, 1].
        reward: judges the pictures.
        prompts: what to ask for.
        context: the prompts' embeddings, [prompts, tokens, width].
        event: shape of a latent.
        seed: of the run.
        device: of the network.
        judge: how a reward is asked: (reward, pictures, prompts) -> [n], checked.
        reward_queries: so far.
        monitoring_calls: of the network, so far, that no method needs: they are in no budget.
    """

    score: ScoreNetwork
    sampler: BoundDDIM | BoundBlackBox
    decode: Callable[[Tensor], Tensor]
    reward: rewards.Reward
    prompts: Sequence[str]
    context: Float[Tensor, "prompts tokens width"]
    event: tuple[int, ...]
    seed: int
    device: torch.device
    judge: Judge = rewards.score
    reward_queries: int = field(default=0)
    monitoring_calls: int = field(default=0)

    @property
    def problem(self) -> ctrl.ControlProblem:
        """Generation as a control problem: terminal reward only, the action is the score."""
        return ctrl.ControlProblem(self.sampler.sde, horizon=self.sampler.table.horizon)

    def context_of(self, condition: Int64[Tensor, " rows"]) -> Float[Tensor, "rows tokens width"]:
        """The embedding of each row's prompt, on the device."""
        return sent(self.context, self.device)[sent(condition, self.device)]

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
        count_reference: bool = True,
    ) -> Sample:
        """Roll out one path for every global sample index.

        Args:
            policy: how to act, given the network's score and the noise level at a time.
            samples: global indices; each names its own noise.
            condition: index of each path's prompt.
            stream: names the noise, so that evaluation never sees training's.
            denoised: also reward the denoised image at every node (as the value network needs).
            group: paths in a row that are judged together.
            shared_start: whether they share their starting noise.
            count_reference: whether the pretrained model's scores are part of the method's cost;
                where they only serve to report the path KL, they are counted apart.
        """
        start = self._starts(stream, samples, group if shared_start else 1)
        if isinstance(self.sampler, BoundBlackBox):
            return self._black_box(self.sampler, start, samples, condition, stream, group)
        sampler, steps = self.sampler, len(self.sampler.timesteps)
        context = self.context_of(condition)
        normals = self._normals((steps, *self.event), stream, "transition", samples)
        drawn = self._normals((steps, *self.event), stream, "action", samples)
        timesteps, levels = sent(sampler.timesteps, self.device), as_like(sampler.sigma, normals)
        means: list[Tensor] = []

        def mean(t: Tensor, states: Tensor) -> Tensor:
            timestep = timesteps[len(means)]
            means.append(self.score(states, timestep.expand(len(states)), context))
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
        before = paths.states[:, :-1]
        spent = self.score.calls
        with self.score.pretrained():
            reference = self.score(
                before.flatten(0, 1),
                timesteps.repeat(len(start)),
                context.repeat_interleave(steps, 0),
            ).view_as(before)
        if not count_reference:
            self.monitoring_calls += self.score.calls - spent
            self.score.calls = spent
        scores = torch.stack(means, dim=1)
        images = self.decode(paths.states[:, -1])
        prompts = [self.prompts[k] for k in condition.tolist()]
        achieved = self._judge(images, prompts)
        denoised_rewards = None
        if denoised:
            alpha, sigma = (
                as_like(level[:-1], scores).view(1, -1, *[1] * len(self.event))
                for level in (sampler.alpha, sampler.sigma)
            )
            guesses = tweedie_mean(before, scores, alpha, sigma).flatten(0, 1)
            repeated = [prompt for prompt in prompts for _ in range(steps)]
            judged = self._judge(self.decode(guesses), repeated).view(-1, steps)
            denoised_rewards = torch.cat([judged, achieved[:, None]], dim=1)
        rollout = Rollout(
            states=paths.states,
            means=scores,
            actions=paths.actions,
            noises=normals,
            reference_scores=reference,
            costs=self._costs(scores, reference),
            values=None,
            rewards=achieved,
            step_sizes=as_like(sampler.integrated_g2, scores),
            condition=condition,
            group=group,
        )
        return Sample(rollout, images, denoised_rewards, prompts)

    def _black_box(
        self,
        sampler: BoundBlackBox,
        start: Tensor,
        samples: range,
        condition: Int64[Tensor, " paths"],
        stream: str,
        group: int,
    ) -> Sample:
        """The end of every path; what led there is the scheduler's own affair."""
        context = self.context_of(condition)
        generators = [ctrl.noise.stream(self.seed, stream, "scheduler", i) for i in samples]
        data = sampler.sample(
            lambda x, t: self.score.prediction(x, sent(t, self.device).expand(len(x)), context),
            start,
            generators,
        )
        images, prompts = self.decode(data), [self.prompts[k] for k in condition.tolist()]
        none = data.new_empty(len(data), 0, *data.shape[1:])
        rollout = Rollout(
            states=data[:, None],
            means=none,
            actions=none,
            noises=none,
            reference_scores=none,
            costs=none.new_empty(len(data), 0),
            values=None,
            rewards=self._judge(images, prompts),
            step_sizes=none.new_empty(0),
            condition=condition,
            group=group,
        )
        return Sample(rollout, images, None, prompts)

    # -- what an objective may ask of the model ---------------------------------------------------

    def pretrained(self) -> AbstractContextManager[None]:
        """Within this context the model is the pretrained one."""
        return self.score.pretrained()

    def pretrained_mean(
        self, step: int, states: Tensor, condition: Int64[Tensor, " paths"]
    ) -> Tensor:
        """Mean of the next state after this step under the pretrained model; differentiable."""
        assert isinstance(self.sampler, BoundDDIM)
        which = torch.full((len(states),), step, device=self.device)
        context = self.context_of(condition)
        timesteps = sent(self.sampler.timesteps, self.device)[which]
        with self.score.pretrained():
            score = self.score(states, timesteps, context)
        return self.sampler.mean(which, states, score)

    def differentiable_reward(
        self, states: Tensor, condition: Int64[Tensor, " paths"]
    ) -> Float[Tensor, " paths"]:
        """Rewards of decoded states, with their gradient.

        Raises:
            RewardError: the reward raised, or did not return one finite number with a gradient for
                each state.
        """
        prompts = [self.prompts[k] for k in condition.tolist()]
        self.reward_queries += len(states)
        images = self.decode(states)
        assert images.requires_grad or not (states.requires_grad and torch.is_grad_enabled())
        return rewards.differentiable_score(self.reward, images, prompts)

    def reward_gradient(self, states: Tensor, condition: Int64[Tensor, " paths"]) -> Tensor:
        """Gradient of the reward with respect to the states, which are decoded."""
        with torch.enable_grad():
            asked = states.detach().requires_grad_()
            total = self.differentiable_reward(asked, condition).sum()
            return torch.autograd.grad(total, asked)[0]

    def _costs(self, scores: Tensor, reference: Tensor) -> Float[Tensor, "paths steps"]:
        """Path KL of every step, nats; infinite for an ODE, whose laws are mutually singular."""
        assert isinstance(self.sampler, BoundDDIM)
        if self.sampler.eta == 0:
            return scores.new_full(scores.shape[:2], math.inf)
        widths = as_like(self.sampler.integrated_g2, scores)
        return path_kl_per_step(scores, reference, widths, factor=self.sampler.kl_factor)

    def _judge(self, images: Tensor, prompts: list[str]) -> Float[Tensor, " n"]:
        self.reward_queries += len(images)
        return sent(self.judge(self.reward, images, prompts), self.device)

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
