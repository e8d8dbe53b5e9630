"""Losses that differentiate the end of the sampler with the reward, against complex steps.

From the state of a roll-out on, the steps are run again with its noise: x' = A x + G score_th(x)
+ s z. DRaFT pays b KL - r(x_T), AlignProp scale (|r - target| + b KL), ReFL scale
relu(enough - r) of the denoised state (x + sigma^2 score) / alpha after one step, or of the
last; KL is that of the differentiated steps, along the states that the policy itself makes.

The gradient in the adapter is taken through all steps of a model that is not linear; in numpy by
perturbing each of its numbers along the imaginary axis.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctrl.noise import stream
from diffusion_envs import objectives
from verification.claim import Check, Setting, pathwise
from verification.closed_form import objectives as exact
from verification.problems import losses as case

SOURCE = "arXiv 2304.05977 (ReFL), 2309.17400 (DRaFT), 2310.03739 (AlignProp)"

B = 0.35
ADAPTER = np.concatenate([case.GAIN.ravel(), case.SHIFT])


def finished(adapter: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Reward and path KL of the steps ``first`` to ``last``, with this adapter."""
    gain, shift = adapter[: case.DIM**2].reshape(case.DIM, case.DIM), adapter[case.DIM**2 :]
    x, nats = case.STATES[:, first].astype(adapter.dtype), np.zeros(case.PATHS, adapter.dtype)
    for k in range(first, last):
        change = x @ gain.T + shift
        score = case.pretrained(np.full(case.PATHS, k), x) + change
        if k == last - 1 and last < case.STEPS:
            x = (x + case.NODES.sigma[k] ** 2 * score) / case.NODES.alpha[k]
            break
        nats = nats + 0.5 * case.FACTOR * case.SIZES[k] * np.sum(change**2, axis=1)
        x = case.STATE_GAIN[k] * x + case.SCORE_GAIN[k] * score + case.STD[k] * case.NOISES[:, k]
    return case.reward(x), nats


def refl(rewards: np.ndarray, nats: np.ndarray) -> np.ndarray:
    """scale relu(enough - r)."""
    short = 0.4 - rewards
    return 0.7 * np.where(np.real(short) > 0, short, 0 * short)


def draft(rewards: np.ndarray, nats: np.ndarray) -> np.ndarray:
    """-r + b KL."""
    return B * nats - rewards


def align_prop(rewards: np.ndarray, nats: np.ndarray) -> np.ndarray:
    """scale (|r - target| + b KL)."""
    away = rewards - 0.25
    return 0.7 * (np.where(np.real(away) > 0, away, -away) + B * nats)


REFL = objectives.ReFL(earliest=0.5, enough=0.4, scale=0.7)
COMPARED: dict[str, tuple[Any, Any, str]] = {
    "ReFL, the denoised state": (REFL, refl, "one"),
    "ReFL, the last step": (REFL, refl, "two"),
    "DRaFT": (objectives.DRaFT(last=3, kl_weight=B), draft, ""),
    "DRaFT, more steps than there are": (objectives.DRaFT(last=9, kl_weight=B), draft, ""),
    "AlignProp": (
        objectives.AlignProp(place=0.3, place_std=0.0, target=0.25, scale=0.7, kl_weight=B),
        align_prop,
        "",
    ),
}
CUTS = {  # first step that is differentiated, and where the reward is
    "ReFL, the denoised state": (2, 3),
    "ReFL, the last step": (3, 4),
    "DRaFT": (1, 4),
    "DRaFT, more steps than there are": (0, 4),
    "AlignProp": (1, 4),
}


def shipped(setting: Setting, objective: Any, name: str) -> Tensor:
    """Mean loss of all paths, in pieces, and its slope in the adapter."""
    made = case.update(setting, objective, batch=4)
    losses = objective.losses_of(made).losses(torch.arange(case.PATHS), stream(setting.seed, name))
    total = sum(losses)
    assert isinstance(total, Tensor)
    slopes = torch.autograd.grad(total, made.environment.model.parameters)
    return torch.cat([total.detach()[None], *(slope[0].flatten() for slope in slopes)])


def checks(setting: Setting) -> Iterator[Check]:
    """Losses and gradients; and where methods cut."""
    for name, (objective, paid, seed) in COMPARED.items():

        def loss(adapter: np.ndarray, paid: Any = paid, cut: Any = CUTS[name]) -> np.ndarray:
            return paid(*finished(adapter, *cut)) / case.PATHS

        want = [np.sum(loss(ADAPTER)), *exact.slope(loss, ADAPTER)]
        yield pathwise(name, shipped(setting, objective, seed), want)

    generator = stream(setting.seed, "cuts")
    first, last = np.array([REFL.cut(40, generator) for _ in range(400)]).T
    found = [first.min(), first.max(), (last - first).min(), (last - first).max()]
    yield pathwise("ReFL: places that it cuts at", found, [20, 39, 1, 1])
    method, generator = objectives.AlignProp(), stream(setting.seed, "cuts")
    cuts = [method.cut(50, generator)[0] for _ in range(40)]
    generator = stream(setting.seed, "cuts")
    drawn = [42 + 5 * float(torch.randn((), generator=generator)) for _ in range(60)]
    places = [int(x) for x in drawn if 0 <= x < 50][:40]
    yield pathwise("AlignProp: integer part of N(42, 5), drawn again", cuts, places)


MISTAKES = r"""
diffusion_envs.objectives.last_steps.LastLosses._finish
    noise of another step | rollout.noises[paths, k] => rollout.noises[paths, k - 1]
    state after the first step | rollout.states[paths, first] => rollout.states[paths, first + 1]
    gradient of the last step alone | state_gain * states + gain => state_gain * states.detach() + gain
    KL without 1/2 | 0.5 * as_like => as_like
    KL of the policy from itself | with environment.pretrained(): => if True:
    KL of another step | sampler.path_kl_gain[k] => sampler.path_kl_gain[0]
    state not carried on | states = state_gain * states + => states = states +
diffusion_envs.objectives.last_steps.LastLosses.losses
    sum over paths for the mean | .sum() / len(paths) => .sum()
    mean of pieces summed | .sum() / len(paths) => .mean()
diffusion_envs.environment.Environment.differentiable_reward
    reward doubled | return ask(self.reward, images, prompts) => return 2 * ask(self.reward, images, prompts)
diffusion_envs.samplers.gaussian_steps.GaussianSteps.denoised_at
    denoised by the levels of the step after | as_like(level[step], states) => as_like(level[step + 1], states)
diffusion_envs.objectives.reward_backpropagation.ReFL.loss
    ReFL: rewards above enough punished too | (self.enough - rewards).relu() => (self.enough - rewards)
    ReFL: not scaled | self.scale * => ``
diffusion_envs.objectives.reward_backpropagation.ReFL.cut
    ReFL: any step | int(self.earliest * steps) => 0
    ReFL: the finished image always | return first, first + 1 => return first, steps
diffusion_envs.objectives.reward_backpropagation.DRaFT.loss
    DRaFT: reward paid for, not earned | - rewards => + rewards
    DRaFT: KL not weighed | self.kl_weight * path_kl => path_kl
diffusion_envs.objectives.reward_backpropagation.DRaFT.cut
    DRaFT: one step fewer | steps - self.last => steps - self.last + 1
diffusion_envs.objectives.reward_backpropagation.AlignProp.loss
    AlignProp: the more the better | (rewards - self.target).abs() => (self.target - rewards)
    AlignProp: KL not scaled | self.scale * ((rewards => ((self.scale * rewards
diffusion_envs.objectives.reward_backpropagation.AlignProp.cut
    AlignProp: rounded | math.floor(drawn * steps + 1e-9) => round(drawn * steps)
    AlignProp: standard deviation halved | self.place_std * float => 0.5 * self.place_std * float
shared
    sigma for sigma^2 in the denoised state
    signal not divided out in Tweedie's formula
"""
