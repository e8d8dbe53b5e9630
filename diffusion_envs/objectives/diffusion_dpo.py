"""Diffusion-DPO: direct preference optimisation of denoising errors, from pairs of one prompt.

Pairs        w preferred to l, data of one prompt by any sampler; both are re-noised to one level
             with one noise epsilon: x = alpha x_0 + sigma epsilon.
Loss         -log sigmoid(L_w - L_l) of each level,
                 L = -1/2 omega (|epsilon_th - epsilon|^2 - |epsilon_pre - epsilon|^2),
             squares summed over coordinates; that of a tie is 0.
Published    omega = 5000 / d at every level, d coordinates: 5000 on mean squares.
In nats      With omega = beta G / sigma^2, G = int g^2 over the timestep times the number of
             timesteps, the mean of L over levels and noise is beta times the bound of
             log p_th(x_0) - log p_pre(x_0) of which the gap is a path KL (epsilon's error over
             sigma is the score's, and int g^2 / 2 |score's error|^2 the path KL): ``beta`` is
             logits per nat. The published omega is the beta of sigma^2 omega / G at each level:
             on Stable Diffusion's table, 4 x 64 x 64 coordinates, 3e-4 logits per nat at
             the first timestep, 0.08, 0.045, 0.026 at a quarter, half and three quarters of the
             table and 0.025 at its end. Where choices are of odds e^(difference / temperature) to
             1, temperature beta is the kl_weight: a reward whose differences decide at the odds of
             one logit has a kl_weight of some hundredths there. On d = 2 it is 2500 per square.
At the start (th = pre, where L = 0) the expected gradient in epsilon_th at x is
             -omega / 2 sigma grad_x E[2 P(preferred) - 1 | x], if the score is that of the model's
             own noised data: the direction of ``ram`` with half the preference for a reward.
Biased       (1) The logarithm of each level's sigmoid is averaged, not the sigmoid's logarithm of
             the average (Jensen): if choices follow Bradley and Terry's law, the loss of whole
             log-likelihoods is least at the tilt pre * exp(r / (temperature beta)); here what the
             level and its noise leave open of r makes choices look random, and the loss is least
             at a smaller shift. On data N(0, 1) with a linear reward (``tests``), at a single level
             the shift is LEVELS. (2) L bounds each log-likelihood and the bounds' gaps need
             not cancel in a pair. (3) If the larger reward always wins (``preferences.FromReward``)
             there is no tilt to come to: E[2 P - 1 | x] takes the place of E[r | x].
             (4) With ``online`` pairs are of the policy as it is, whose noised data epsilon_pre
             does not denoise; the gap adds E[2 P - 1 | x] times itself, which pairs cancel only on
             average over x.
Differences  The published pairs are given, of other models too; here they are sampled, by the
             pretrained model unless ``online``, and the reward decides. The published noise levels
             are independent, here stratified, with pairs of opposite noise (``noised_data``).

Sources      Wallace et al. 2023, diffusion model alignment using direct preference optimization,
             arXiv 2311.12908 (equation 14); defaults of the authors' code.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from diffusion_envs.objectives.noised_data import NoisedObjective, NoisedRows
from diffusion_envs.objectives.protocol import require_count, require_positive
from diffusion_envs.rollout import Rollout


@dataclass(frozen=True)
class DiffusionDPO(NoisedObjective):
    """Direct preference optimisation of denoising errors."""

    beta_per_pixel: float = 5000.0  # logits for half a mean squared error of epsilon
    beta: float | None = None  # logits per nat of the path KL's bound, instead
    online: bool = False  # pairs of the policy as it is; False: of the pretrained model

    needs_preferences: ClassVar[bool] = True
    needs_old: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_positive(beta_per_pixel=self.beta_per_pixel, learning_rate=self.learning_rate)
        require_count(draws=self.draws)
        if self.beta is not None:
            require_positive(beta=self.beta)

    @property
    def group(self) -> int:
        """Two: a group is a pair."""
        return 2

    @property
    def on_policy(self) -> bool:
        """If pairs are of the policy as it is."""
        return self.online

    def old_decay(self, update: int) -> float:
        """One, where pairs are always the pretrained model's."""
        return 0.0 if self.online else 1.0

    def advantages(self, rollout: Rollout) -> Float[Tensor, " paths"]:
        """1 for what is preferred in its pair, -1 for the other, 0 for a tie."""
        assert rollout.preferences is not None  # needs_preferences
        first, second = rollout.preferences.view(-1, 2).unbind(1)
        sign = (first - second).sign()
        return torch.stack([sign, -sign], dim=1).flatten()

    def numbers(self, advantages: Float[Tensor, " paths"]) -> dict[str, float]:
        """The share of pairs of which nothing is learned."""
        return {"tied_fraction": (advantages == 0).double().mean().item()}

    def weight(self, rows: NoisedRows) -> Float[Tensor, " rows"]:
        """Logits for half a square of the score's error: sigma^2 omega."""
        if self.beta is None:
            return self.beta_per_pixel * rows.sigma.square() / rows.mean[0].numel()
        assert rows.path_kl_gain is not None  # of the loop
        return self.beta * rows.path_kl_gain

    def loss(self, rows: NoisedRows) -> Float[Tensor, " rows"]:
        """-log sigmoid(L_w - L_l) of each pair, for both of its members."""
        assert rows.reference_score is not None  # needs_reference
        target = -rows.noise / rows.sigma.view(-1, *[1] * (rows.noise.ndim - 1))
        own, pretrained = (
            (score - target).square().flatten(1).sum(1)
            for score in (rows.mean, rows.reference_score)
        )
        one, other = (-0.5 * self.weight(rows) * (own - pretrained)).view(-1, 2).unbind(1)
        sign = rows.advantage.view(-1, 2)[:, 0]
        loss = -functional.logsigmoid(sign * (one - other))
        return torch.where(sign == 0, 0 * loss, loss).repeat_interleave(2)
