"""DiffusionNFT: good samples pull the denoiser, bad ones push it; any sampler, no likelihoods.

Maximised    E[reward], in steps of old policy -> new policy; no term of it is a KL.
Data         x_0 from the *old* policy by any sampler, re-noised: x = alpha x_0 + sigma epsilon.
             Its optimality r = 1/2 + clip(A, +-c) / (2 c) in [0, 1], A the reward less its prompt's
             mean, over the population standard deviation of all rewards plus 1e-4.
Loss         c [r w+ |x+ - x_0|^2 + (1 - r) w- |x- - x_0|^2] / beta + velocity_weight |v - v_ref|^2,
             means over coordinates, with the implicit positive and negative denoisers
                x+ = beta x_th + (1 - beta) x_old,     x- = (1 + beta) x_old - beta x_th,
             x_th = (x + sigma^2 score) / alpha, and w+- = 1 / mean |x+- - x_0|, held fixed. At a
             given x velocity, epsilon and score are affine in x_th, so that mixing them is the same
             whichever a model predicts; written in x_0 the loss is the published one.
Fixed point  Without weights, if x_old is the posterior mean of the data that it made, it is
                score = score_old + (2 / beta) grad_x E_old[r | x]
             for every x and noise level: to first order the old law tilted by exp(2 r / beta),
             noised. It is the policy gradient's direction, so E[reward] rises. No policy is fixed
             under repetition but one whose E[r | x] is flat: how far the model goes is a matter of
             learning rate and of stopping, not of a regularisation parameter.
Biased       (1) The weights multiply errors x_0 - x_old by the inverse of their own size. The
             direction E[w (2 r - 1) (x_0 - x_old) | x] still rises, but less along coordinates in
             which the posterior is wide: on the two-dimensional Gaussian model of the tests it is
             off by 0.7 degrees at little noise and by 5 to 7.5 degrees from middling noise on; with
             many coordinates the mean size hardly varies, and the weights do no more than set the
             step. ``weighted=False`` has no such bias. (2) Centring by a group of n multiplies the
             step by 1 - 1/n. (3) velocity_weight is of a mean squared velocity, alike at all noise
             levels; it is not a KL in nats, that is the sum over coordinates of
             int g^2 / 2 |score - reference|^2.
Published    (1) The decay of the old policy counts optimiser steps, here updates: the same with one
             step an update, 0.001 after the first. With UpdateSize(epochs=e, minibatches=m) set
             ``old_decay_rate`` to 0.001 e m. (2) Noise levels are the sampler's, here all of the
             table's, uniformly: either way every level has its own, and the same, fixed point. (3)
             The velocity there is the network's own, a flow's; here v = alpha epsilon - sigma x_0,
             as variance-preserving models have it.

Sources      [NFT] Zheng et al. 2025, DiffusionNFT, arXiv 2509.16117. Settings: the authors' code.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import sent
from diffusion_envs.denoising import tweedie_mean, v_from_score
from diffusion_envs.objectives.noised_data import NoisedObjective, NoisedRows
from diffusion_envs.ranges import (
    require_count,
    require_not_negative,
    require_numbers,
    require_positive,
)
from diffusion_envs.rewards.rounding import floored_std
from diffusion_envs.rollout import Rollout

STD_OFFSET = 1e-4  # reward, added to a standard deviation before dividing; as published
LEAST_ERROR = 1e-5  # of a prediction, below which weights grow no further; as published


def optimality(advantage: Float[Tensor, " n"], advantage_clip: float) -> Float[Tensor, " n"]:
    """r = 1/2 + clip(A, +-c) / (2 c), in [0, 1]."""
    return 0.5 + advantage.clamp(-advantage_clip, advantage_clip) / (2 * advantage_clip)


@dataclass(frozen=True)
class DiffusionNFT(NoisedObjective):
    """Negative-aware fine-tuning on the forward process ([NFT])."""

    learning_rate: float = 3e-4  # of the adapter, AdamW
    beta: float = 1.0  # how far implicit positive and negative lie from the old denoiser
    advantage_clip: float = 5.0  # c, in standard deviations of the reward
    velocity_weight: float = 1e-4  # of the mean squared velocity away from the pretrained one
    most_old_decay: float = 0.5  # that the sampling policy keeps of itself, at most
    old_decay_rate: float = 1e-3  # by which it grows, an update of one optimiser step
    weighted: bool = True  # errors by the inverse of their size; False: the fixed point is exact

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(
            learning_rate=self.learning_rate,
            beta=self.beta,
            advantage_clip=self.advantage_clip,
        )
        require_count(draws=self.draws)
        require_not_negative(
            velocity_weight=self.velocity_weight, old_decay_rate=self.old_decay_rate
        )
        if not 0 <= self.most_old_decay < 1:
            raise ValueError(f"most_old_decay must be in [0, 1), got {self.most_old_decay}")

    @property
    def needs_reference(self) -> bool:
        """If a distance from the pretrained velocity is charged."""
        return self.velocity_weight > 0

    def old_decay(self, update: int) -> float:
        """min(rate * updates done, most): nearly on-policy at first, then ever slower."""
        return min(self.old_decay_rate * (update + 1), self.most_old_decay)

    def advantages(self, rollout: Rollout) -> Float[Tensor, " paths"]:
        """Reward less its prompt's mean, in standard deviations of all; 0 if all are equal."""
        rewards, condition = rollout.rewards.cpu(), rollout.condition.cpu()  # read once
        centred = torch.zeros_like(rewards)
        for prompt in condition.unique():
            one = condition == prompt
            centred[one] = rewards[one] - rewards[one].mean()
        if bool((rewards == rewards[0]).all()):
            return torch.zeros_like(rollout.rewards)
        return sent(centred / (floored_std(rewards) + STD_OFFSET), rollout.rewards.device)

    def loss(self, rows: NoisedRows) -> Float[Tensor, " rows"]:
        """c [r w+ |x+ - x_0|^2 + (1 - r) w- |x- - x_0|^2] / beta + weight |v - v_ref|^2."""
        assert rows.old_mean is not None  # needs_old
        shape = (-1, *[1] * (rows.state.ndim - 1))
        levels = rows.alpha.view(shape), rows.sigma.view(shape)
        new = tweedie_mean(rows.state, rows.mean, *levels)
        old = tweedie_mean(rows.state, rows.old_mean, *levels)
        positive = self.beta * new + (1 - self.beta) * old
        negative = (1 + self.beta) * old - self.beta * new
        r = optimality(rows.advantage, self.advantage_clip)
        pulled = r * self._error(positive, rows.data)
        pushed = (1 - r) * self._error(negative, rows.data)
        gain = self.advantage_clip * (pulled + pushed) / self.beta
        if not self.needs_reference:
            return gain
        assert rows.reference_score is not None  # needs_reference
        velocity = v_from_score(rows.state, rows.mean, *levels)
        reference = v_from_score(rows.state, rows.reference_score, *levels)
        distance = (velocity - reference).square().flatten(1).mean(1)
        return gain + self.velocity_weight * distance

    def _error(
        self, prediction: Float[Tensor, " rows *event"], data: Float[Tensor, " rows *event"]
    ) -> Float[Tensor, " rows"]:
        """Mean square error, over the mean size of the error, which carries no gradient."""
        error = (prediction - data).flatten(1)
        if not self.weighted:
            return error.square().mean(1)
        size = error.detach().abs().mean(1).clamp(min=LEAST_ERROR)
        return error.square().mean(1) / size
