"""A roll-out of the environment: every number of it, by the model's and the sampler's formulas.

x_{k+1} = A_k x_k + G_k a_k + s_k z_k with a_k the drawn score, mean + std(sigma_k) z'_k; the
path KL of a step is (1 + eta^2)^2 / (8 eta^2) |mean - pretrained|^2 int g^2; values start from
r((x + sigma^2 score) / alpha), at the end from r(x_T). Each sample's noise is its own, by name;
a group may share its start. A black box is asked for its noise predictions -sigma score.

What objectives ask the model is checked too: the pretrained mean of the next state, and the reward's
gradient, against complex steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ctrl.noise import stream
from diffusion_envs import objectives
from diffusion_envs.samplers import BoundBlackBox
from verification.claim import Check, Setting, array, pathwise, rounding, stated
from verification.closed_form import objectives as exact
from verification.problems import losses as case

SOURCE = "arXiv 2010.02502 equation 12; arXiv 2502.01819, Theorem 3.1 and its value network"
WHY_DOUBLE = "a roll-out's noise, and so its states, are float32 whatever the setting"
PRECISION = torch.float32

EXPLORATION, SEED = 0.35, 7
SAMPLES = range(2, 2 + case.PATHS)
ASKED = np.array([3, 8, 5])  # timesteps of the black box
SHARES = np.array([0.7, 1.4, 0.4])


def named(what: str, samples: range, *shape: int) -> np.ndarray:
    """The normals of each sample, by their name."""
    each = [torch.randn(shape, generator=stream(SEED, "claim", what, i)) for i in samples]
    return array(torch.stack(each))


def numbers(values: Tensor | None) -> np.ndarray:
    """In double precision."""
    assert values is not None
    return array(values)


@dataclass
class Scheduler:
    """A scheduler in diffusers' form: x' = x - share * prediction, from pure noise of size 1.3."""

    init_noise_sigma: float = 1.3
    config: dict[str, Any] = field(default_factory=dict)
    timesteps: Tensor = field(default_factory=lambda: torch.tensor([]))

    def set_timesteps(self, steps: int, device: torch.device) -> None:
        """Those that it visits."""
        self.timesteps = torch.tensor(ASKED[:steps], device=device)

    def scale_model_input(self, states: Tensor, timestep: Tensor) -> Tensor:
        """0.8 times the states."""
        return 0.8 * states

    def step(self, prediction: Tensor, timestep: Tensor, states: Tensor) -> Any:
        """The next states."""
        share = float(SHARES[int((self.timesteps == timestep).nonzero())])
        return SimpleNamespace(prev_sample=states - share * prediction)


class Parts:
    """The reward as a weighted sum of two."""

    concurrent = False
    weights: ClassVar = {"first": 0.6, "whole": -0.4}

    def parts(self, images: Tensor, prompts: Sequence[str], ask: Any) -> dict[str, Tensor]:
        """The first coordinate, and all of the reward."""
        return {"first": images[:, 0], "whole": ask(self._whole, images, prompts)}

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Their sum."""
        return 0.6 * parts["first"] - 0.4 * parts["whole"]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As any reward."""
        return self.total(self.parts(images, prompts, lambda reward, x, p: reward(x, p)))

    @staticmethod
    def _whole(x: Tensor, prompts: Sequence[str]) -> Tensor:
        plain = x @ x.new_tensor([0.6, -0.9, 0.4]) - 0.3 * x[:, 1].square()
        return plain + (x[:, 0] * x[:, 2]).sin()


def checks(setting: Setting) -> Iterator[Check]:
    """A roll-out in groups that share their start; what objectives ask; a black box."""
    made = case.environment(setting)
    objective = objectives.ScoreAsActionSampled(exploration=EXPLORATION)
    condition = torch.as_tensor(case.PROMPTS, device=setting.device)
    options: dict[str, Any] = {"stream": "claim", "denoised": True, "group": 2}
    sample = made.sample(objective.policy, SAMPLES, condition, shared_start=True, **options)
    got = sample.rollout
    states, means, actions = (numbers(v) for v in (got.states, got.means, got.actions))
    start = np.repeat(named("start", range(1, 4), case.DIM), 2, axis=0)
    yield pathwise("starts, one a group", states[:, 0], start)
    noises = named("transition", SAMPLES, case.STEPS, case.DIM)
    yield pathwise("noises of transitions", numbers(got.noises), noises)
    step = np.tile(np.arange(case.STEPS), case.PATHS)
    before = states[:, :-1].reshape(-1, case.DIM)
    want = case.current(step, before).reshape(means.shape)
    yield pathwise("mean scores", means, want)
    drawn = (EXPLORATION / case.NODES.sigma[:-1])[:, None] * named(
        "action", SAMPLES, case.STEPS, case.DIM
    )
    yield pathwise("drawn scores", actions, means + drawn)
    A, G, s = (v[:, None] for v in (case.STATE_GAIN, case.SCORE_GAIN, case.STD))
    after = A * states[:, :-1] + G * actions + s * noises
    size = float(np.abs(A * states[:, :-1]).max() / np.abs(after).max())
    yield stated(pathwise("next states", states[:, 1:], after), units=rounding(3, 2 * size))
    reference = case.pretrained(step, before).reshape(means.shape)
    yield pathwise("pretrained scores", numbers(got.reference_scores), reference)
    gap = np.sum((means - numbers(got.reference_scores)) ** 2, axis=2)
    yield pathwise("path KL", numbers(got.costs), 0.5 * case.FACTOR * case.SIZES * gap)
    yield pathwise("clock", numbers(got.step_sizes), case.SIZES)
    alpha, sigma = (v[:-1, None] for v in (case.NODES.alpha, case.NODES.sigma))
    guesses = (states[:, :-1] + sigma**2 * means) / alpha
    denoised = np.concatenate([case.reward(guesses), case.reward(states[:, -1])[:, None]], axis=1)
    yield pathwise("rewards of denoised states", numbers(sample.denoised_rewards), denoised)
    yield pathwise("rewards", numbers(got.rewards), denoised[:, -1])
    alone = made.sample(objective.policy, SAMPLES, condition, stream="claim", reference=False)
    alone = alone.rollout
    start = named("start", SAMPLES, case.DIM)
    yield pathwise("starts, one a path", numbers(alone.states[:, 0]), start)
    unknown = float(alone.costs.isnan().all() and alone.reference_scores is None)
    yield pathwise("path KL is not known without the pretrained model", unknown, 1.0)

    x = torch.tensor(case.STATES[:, 1], dtype=torch.float32, device=setting.device)
    for k in (1, 3):
        mean = case.STATE_GAIN[k] * case.STATES[:, 1]
        mean = mean + case.SCORE_GAIN[k] * case.pretrained(
            np.full(case.PATHS, k), case.STATES[:, 1]
        )
        found = made.pretrained_mean(k, x, condition)
        yield pathwise(f"pretrained mean of step {k}", numbers(found), mean)
    slopes = exact.slope(case.reward, case.STATES[:, 1])
    yield pathwise("gradient of the reward", numbers(made.reward_gradient(x, condition)), slopes)
    yield pathwise("queries of the reward", made.reward_queries, case.PATHS * (case.STEPS + 3))

    late = replace(case.environment(setting), reward=Parts(), overlap=1, batch=4)
    other = late.sample(objective.policy, SAMPLES, condition, shared_start=True, **options)
    x, parts = numbers(other.rollout.states[:, -1]), other.rollout.reward_parts
    yield pathwise("parts of a reward", numbers(parts), np.stack([x[:, 0], case.reward(x)], axis=1))
    weights = list(other.rollout.part_weights.values())
    yield pathwise("weights of parts", weights, [0.6, -0.4])
    means = numbers(other.rollout.means)
    guesses = (numbers(other.rollout.states)[:, :-1] + sigma**2 * means) / alpha
    seen = np.concatenate([guesses, x[:, None]], axis=1)
    want = 0.6 * seen[:, :, 0] - 0.4 * case.reward(seen)
    found = numbers(other.denoised_rewards)
    yield pathwise("rewards that are asked for meanwhile", found, want)

    yield from _black_box(setting, objective, condition)


def _black_box(setting: Setting, objective: Any, condition: Tensor) -> Iterator[Check]:
    box = BoundBlackBox(Scheduler(), case.levels(), 3)
    boxed = case.environment(setting, box).sample(
        objective.policy, SAMPLES, condition, stream="claim"
    )
    x = 1.3 * named("start", SAMPLES, case.DIM)
    for timestep, share in zip(ASKED, SHARES, strict=True):
        abar = float(case.levels().alphas_cumprod[timestep])
        score = case.current(np.full(case.PATHS, abar), 0.8 * x)
        x = x + share * np.sqrt(1 - abar) * score
    yield pathwise("black box: data", numbers(boxed.rollout.states[:, 0]), x)
    yield pathwise("black box: rewards", numbers(boxed.rollout.rewards), case.reward(x))


MISTAKES = r"""
diffusion_envs.environment.Environment._simulated
    noise level of the step after | levels[len(means) - 1] => levels[len(means)]
    increments of unit variance | sampler.grid.steps, normals).sqrt() => sampler.grid.steps, normals)
    timestep of the step before | timestep = timesteps[len(means)] => timestep = timesteps[len(means) - 1]
diffusion_envs.environment.Environment._pretrained_scores
    the pretrained model is the policy | with self.model.pretrained(): => if True:
    steps in the order of paths | torch.arange(steps).repeat(paths) => torch.arange(steps).repeat_interleave(paths)
diffusion_envs.environment.Environment._costs
    costs of zero where they are not known | math.nan => 0.0
    costs of the policy from its own | self.steps.path_kl(scores, pretrained) => self.steps.path_kl(scores, 0 * pretrained)
diffusion_envs.environment.Environment._starts
    a start for every path | if shared == 1: => if True:
    groups counted from 0 | samples.start // shared => 0 * samples.start
diffusion_envs.environment.Environment._normals
    noises of every run alike | seed=self.seed => seed=0
diffusion_envs.environment.Environment.sample
    actions driven by the transitions' noise | (steps, *self.event), stream, "action" => (steps, *self.event), stream, "transition"
    the grid's steps for the clock | self.sampler.step_sizes => self.sampler.grid.steps
    the last reward for all | rewards=achieved => rewards=achieved[-1].expand(len(achieved))
    denoised by the drawn scores | self.sampler.denoised(before, paths.means) => self.sampler.denoised(before, paths.actions)
    reward of the denoised state at the end | achieved[:, None]], dim=1 => earlier.view(-1, steps)[:, -1:]], dim=1
diffusion_envs.environment.Environment._answers
    rewards of denoised states for those of samples | columns[: len(samples)], columns[len(samples) :, 0]
        => columns[-len(samples) :], columns[: -len(samples), 0]
    denoised states scored with the samples' own pictures | pictures = self._pictures(guesses[c])
        => pictures = self._pictures(2 * guesses[c])
diffusion_envs.environment.Environment.part_weights
    parts without weights | return self.reward.weights if => return dict.fromkeys(self.reward.weights, 1.0) if
diffusion_envs.environment.Environment._columns
    the first part for the total | torch.stack([total, *parts.values()], dim=1)
        => torch.stack([*parts.values(), total][: 1 + len(parts)], dim=1)
diffusion_envs.environment.Environment._score
    queries counted by the batch | self.reward_queries += len(images) => self.reward_queries += 1
diffusion_envs.environment.Environment.pretrained_mean
    mean of the trained model | with self.model.pretrained(): => if True:
    mean of another step | self.steps.mean(which => self.steps.mean(which - 1
diffusion_envs.environment.Environment.reward_gradient
    mean over paths differentiated | condition).sum() => condition).mean()
diffusion_envs.environment.Environment._black_box
    timesteps rounded up | sent(t, self.device) => (sent(t, self.device) + 1)
diffusion_envs.samplers.diffusers_scheduler.BlackBox.sample
    start not scaled | start * float(scheduler.init_noise_sigma) => start
    states not scaled | predict(scaled, timestep) => predict(states, timestep)
diffusion_envs.models.exact.CorrectedScore.prediction
    sign of the noise | -sigma[:, None] => sigma[:, None]
diffusion_envs.samplers.ddim.BoundDDIM.path_kl
    path KL at eta 1 | factor=self.kl_factor => factor=1.0
diffusion_envs.samplers.gaussian_steps.GaussianSteps.denoised
    levels of the step after | as_like(level[:-1], states) => as_like(level[1:], states)
shared
    timestep of another step
"""
