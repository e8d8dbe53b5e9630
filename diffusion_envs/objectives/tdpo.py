"""TDPO: the reward of each denoising step less the value of its denoised image; and TDPO-R.

Objective    J(th) = E_th[ r(X_T, prompt) ]; nothing keeps the policy near the pretrained model.
Advantage    A_k = r - V(t_k, x0_hat_k), V a critic that sees the denoised state x0_hat(x_k); then
             standardised over all paths *and* steps of the roll-out.
Loss         of a step, to be minimised: -min(rho_k A_k, clip(rho_k) A_k),
             rho_k = p_th(x_{k+1} | x_k) / p_old(x_{k+1} | x_k).
TDPO-R       Every ``reset_every`` updates the critic forgets with its *active* neurons: those whose
             mean ReLU over the roll-out is more than ``dormant`` times their layer's mean. Weights
             into and out of them are drawn again from N(0, 1 / (fan-in + 1)^2), biases set to 0,
             and the optimiser's moments of all these too. With ``dormant`` 0, as published, a
             neuron is active that is ever positive: nearly all of them are.
Exact        With the roll-out's standard deviation s a constant and one optimiser step a roll-out
             the gradient is that of E r / s whatever V is, as x0_hat_k is a function of x_k. s is
             that of returns *minus values*: a better critic makes the same reward a longer step.
Samples      What makes the published runs use fewer rewards than DDPO is mostly their loop, not the
             critic: steps of the sampler outside, batches of paths inside, an optimiser step for
             each. From 256 images and 50 steps it takes 100 optimiser steps where DDPO takes 2 (the
             comment in its settings says 2 as well), on data that grows old meanwhile. That order
             is no part of an objective. The same number of optimiser steps, each of as many rows
             and at the cost of one pass, is UpdateSize(samples=256, epochs=50, minibatches=2,
             train_steps=1), which draws steps at random for each path; and
             UpdateSize(samples=256, minibatches=64) takes 64, of all steps of few paths. Compare
             methods at an equal number of optimiser steps.
Published    (1) Rewards are first standardised within prompts over a buffer of 32: prompts weigh by
             the inverse of their standard deviation. Here they are rewards. (2) V is a head on the
             reward model's own image embedding, without time, fitted with PPO's clipped loss (0.2)
             in the policy's loop; here it is the loop's value network on latents, with time and
             prompt, fitted after it. (3) The head has no non-linearity, and the reset applies a
             ReLU to judge it; ours has them, and the reset sees what the next layer sees (which is
             positive where its argument is). Weights that bring time and prompt to two layers are
             left. (4) Activity there is over the first ``batch_size`` samples at one of the steps
             (a random one, as steps are shuffled), here over all: with ``dormant`` 0 and a fresh
             critic one sample of 64 names 99 % of the neurons that all name. (5) The standard
             deviation of new weights there is 1/769 in all layers, and each reset draws the same
             numbers; here each draws its own. (6) Log-densities there are means over pixels: a clip
             of 1e-4 a pixel is 1.64 nats a step at 4 x 64 x 64. (7) The optional penalty by
             log-ratios (off in its runs) is left out.

Sources      [Z] Zhang, Zhang, Zhan, Luo, Wen & Tao 2024, arXiv 2402.08552. Settings: the authors'
             code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn

from ctrl.devices import as_like
from ctrl.trust_region import clipped_surrogate
from diffusion_envs.objectives.path_steps import PathObjective, Rows, trusted_width
from diffusion_envs.ranges import require_not_negative, require_numbers, require_positive
from diffusion_envs.rewards.rounding import all_alike, rounding
from diffusion_envs.rollout import Rollout


@dataclass(frozen=True)
class TDPO(PathObjective):
    """Clipped policy gradient with a critic of the denoised state."""

    learning_rate: float = 1e-4  # of the adapter, AdamW
    clip: float = 1.64  # trusted |log-ratio| of a step, nats: 1e-4 a pixel of 4 x 64 x 64
    clip_per_pixel: float | None = None  # the published convention: times the coordinates

    needs_value: ClassVar[bool] = True
    value_sees_denoised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(learning_rate=self.learning_rate, clip=self.clip)
        if self.clip_per_pixel is not None:
            require_positive(clip_per_pixel=self.clip_per_pixel)

    @property
    def needs_reference(self) -> bool:
        """False: no KL is charged."""
        return False

    def advantages(self, rollout: Rollout) -> Float[Tensor, "paths steps"]:
        """r - V at the left of every step, standardised over paths and steps."""
        assert rollout.values is not None  # needs_value
        gains = rollout.rewards[:, None] - rollout.values[:, :-1]
        std = torch.maximum(gains.std(), rounding(rollout.rewards))
        # where the rewards say nothing, the critic's noise must not be blown up
        return ((gains - gains.mean()) / std).where(~all_alike(rollout.rewards), 0.0)

    def half_width(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Half-width of the trusted log-ratios, the same at every step."""
        return trusted_width(rows, self.clip, self.clip_per_pixel)

    def loss(self, rows: Rows) -> Float[Tensor, " rows"]:
        """-min(ratio A, clipped ratio A), one number per row."""
        return -clipped_surrogate(self.log_ratio(rows), rows.advantage, self.half_width(rows))


@dataclass(frozen=True)
class TDPOReset(TDPO):
    """TDPO-R: the weights of the critic's active neurons are drawn again from time to time."""

    reset_every: int = 10  # updates
    dormant: float = 0.0  # share of a layer's mean activity up to which a neuron is dormant

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(dormant=self.dormant)
        if self.reset_every < 1:
            raise ValueError(f"reset_every must be at least 1, got {self.reset_every}")

    def maintain(
        self,
        value: Any,
        optimiser: torch.optim.Optimizer,
        shown: Callable[[], tuple[Tensor, ...]],
        update: int,
        generator: Generator,
    ) -> None:
        """Reset the active neurons after every ``reset_every``-th update."""
        if (update + 1) % self.reset_every == 0:
            active = active_neurons(value, shown(), self.dormant)
            reset_neurons(value.chain, active, optimiser, generator)


@torch.no_grad()
def active_neurons(
    value: Any, shown: tuple[Tensor, ...], dormant: float
) -> list[Bool[Tensor, " neurons"]]:
    """Which neurons of every layer but the last are active on these arguments.

    Args:
        value: a network with a ``chain`` of layers, each of which reads the one before.
        shown: its arguments.
        dormant: share of the layer's mean activity up to which a neuron is dormant.
    """
    active: list[Tensor] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        activity = inputs[0].relu().transpose(0, 1).flatten(1).mean(1)
        active.append(activity > dormant * activity.mean())

    handles = [layer.register_forward_pre_hook(record) for layer in value.chain[1:]]
    try:
        value(*shown)
    finally:
        for handle in handles:
            handle.remove()
    return active


@torch.no_grad()
def reset_neurons(
    chain: list[nn.Module],
    chosen: list[Bool[Tensor, " neurons"]],
    optimiser: torch.optim.Optimizer,
    generator: Generator,
) -> None:
    """Draw weights into and out of the chosen neurons again, and set their moments to 0.

    Args:
        chain: linear and convolutional layers, each of which reads the one before.
        chosen: neurons of every layer but the last.
        optimiser: Adam, or one of its kind.
        generator: draws the new weights.
    """
    for layer, following, neurons in zip(chain, chain[1:], chosen, strict=False):
        for weights, axis in ((layer.weight, 0), (layer.bias, 0), (following.weight, 1)):
            assert isinstance(weights, nn.Parameter)
            fresh = torch.zeros_like(weights)
            if weights.ndim > 1:
                drawn = torch.randn(weights.shape, generator=generator, dtype=weights.dtype)
                fresh = as_like(drawn, weights) / (weights[0].numel() + 1)
            # not weights[neurons] = ...: the host would have to count them
            where = neurons.view(*[1] * axis, -1, *[1] * (weights.ndim - axis - 1))
            weights.copy_(torch.where(where, fresh, weights))
            for moment in optimiser.state[weights].values() if weights in optimiser.state else ():
                if isinstance(moment, Tensor) and moment.shape == weights.shape:
                    moment.masked_fill_(where, 0)
