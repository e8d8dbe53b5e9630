"""Diffusion-DPO: direct preference optimisation of denoising errors, from pairs of one prompt.

Pairs        w preferred to l, data of one prompt by any sampler; both are re-noised to one level
             with one noise epsilon: x = alpha x_0 + sigma epsilon.
Loss         -log sigmoid(L_w - L_l) of each level,
                 L = -1/2 omega (|epsilon_th - epsilon|^2 - |epsilon_pre - epsilon|^2),
             squares summed over coordinates; that of a tie is 0.
Published    omega = 5000 / d at every level, d coordinates: 5000 on mean squares.
In nats      With omega = beta G / sigma^2, G = int g^2 over the timestep times the number of
             timesteps, the mean of L over levels and noise is beta times what th gains over pre in
             the bound of log p(x_0) by path KL (an error of epsilon over sigma is one of the score,
             and int g^2 / 2 |error|^2 a path KL): ``beta`` is logits per nat. The published omega
             is beta = sigma^2 omega / G: on Stable Diffusion's table, d = 4 x 64 x 64, 0.0003
             logits per nat at the first timestep, 0.041, 0.046, 0.036 at a quarter, half and three
             quarters of the table, 0.025 at its end. Where the odds of a choice are e to the
             difference of rewards over a temperature, temperature beta is the kl_weight.
At the start (th = pre, where L = 0) the expected gradient in epsilon_th at x is
             omega / 2 sigma grad_x E[2 P(preferred) - 1 | x] for either member, exactly, where
             epsilon_pre denoises the pairs' own law: ``ram``'s direction, with 2 P - 1 for reward.
Biased       (1) Every level alone has to explain the choices, though only their mean is a
             likelihood. With data N(0, 1), a reward a x_0 and choices of odds e^(difference) the
             loss of every pair is least at a score shifted by a / (beta alpha G), where the tilt
             pre exp(r / beta) has alpha a / beta: on Stable Diffusion's table 1.2 times as much
             at the first timestep, 0.6 at a quarter of it, 0.75 at half, 2.2 at three quarters, 18
             at its end. What is generated has the tilt's mean, for 2.4 times its path KL (66 times
             on ``exact.table``, as less signal is left at its end).
             (2) Elsewhere the noise does not cancel in a pair, and the logarithms of sigmoids are
             averaged, not the sigmoid's argument (Jensen): choices look random, and the
             minimum lies nearer to the pretrained model, as with ``d3po``.
             (3) If the larger reward always wins (``preferences.FromReward``, the default of runs)
             there is no tilt to come to. In (1) the loss then has no minimum at all: how far the
             model goes is a matter of rate and stopping. ``preferences.BradleyTerry`` has one.
             (4) With ``online`` epsilon_pre does not denoise the pairs' law, and the gap adds
             E[2 P - 1 | x] times itself to the gradient.
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
from diffusion_envs.ranges import require_count, require_numbers, require_positive
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
        require_numbers(self)
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
