"""Reward back-propagation: ReFL, DRaFT and AlignProp differentiate the end of the sampler.

Objective    J(th) = E_th[ r(X_T) ], less kl_weight times the path KL of the differentiated steps
             (no published method has that term). The reward must be differentiable.
Gradient     The noise of a roll-out is kept, the steps from ``cut`` on are run again with a
             gradient, and r is differentiated through them: with respect to the state that was
             reached before, nothing. They differ in where they cut and in what is made of r:
                 ReFL       one step, at a random late place; r of the denoised image; relu(2 - r)
                 DRaFT-K    the last K steps; -r
                 AlignProp  from a random place to the end; |r - target|
Exact        With all steps it is the derivative of E[r] - kl_weight path KL of the sampler's own
             chain, with no score function, ratio or value in it.
Biased       A shorter cut gives the derivative with respect to what the policy does in the last K
             steps. On the test's model, quadratic reward, Stable Diffusion's schedule, 20 steps and
             all times sharing their parameters, that is off by 97, 80, 55 and 27 % of the gradient
             with K = 1, 5, 10, 15. ReFL moreover takes the reward of the mean image for the mean
             reward of the image: at 40 steps its gradient is turned by 25 degrees and has 17 % of
             the size; back-propagation from its first place on is turned by 19 and has 28 %.
Beware       No method here has a limit to how far it goes: AlignProp's authors stop early. Decoders
             clamp pictures to [0, 1]; a saturated pixel has no gradient.
Differences  One cut is drawn for all paths of a gradient, in however many pieces. AlignProp's
             place is the integer part of N(42, 5), drawn again until it is one of the 50 steps, as
             in the authors' trainer: the last step is alone with probability 0.027. (TRL's port
             draws uniformly, and the authors' first code drew for every step whether it has a
             gradient.)
             Every sample is rewarded twice, without a gradient after the roll-out and with one at
             the cut, and both are counted. DRaFT-LV (several noises for the last step) is not here,
             nor are ReFL's pre-training loss and moving average of weights. Learning rates are for
             adapters; ReFL's own, 1e-5, is for all weights.

Sources      Xu et al. 2023, ImageReward (ReFL), arXiv 2304.05977. Clark et al. 2023, DRaFT,
             arXiv 2309.17400. Prabhudesai et al. 2023, AlignProp, arXiv 2310.03739. Defaults of the
             authors' code; ReFL's places are 30 to 39 of 40, AlignProp's N(42, 5) of 50.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from diffusion_envs.objectives.last_steps import BackpropObjective
from diffusion_envs.ranges import require_not_negative, require_numbers, require_positive


@dataclass(frozen=True)
class ReFL(BackpropObjective):
    """Reward feedback learning: one step with a gradient, at a random late place."""

    earliest: float = 0.75  # place of the first step that may be chosen, as a share of the path
    enough: float = 2.0  # reward from which on the loss is 0
    scale: float = 1e-3  # of the loss

    def __post_init__(self) -> None:
        require_numbers(self)
        if not 0 <= self.earliest < 1:
            raise ValueError(f"earliest must be in [0, 1), got {self.earliest}")
        if math.isnan(self.enough):
            raise ValueError(f"enough must be a number, got {self.enough}")
        require_positive(scale=self.scale, learning_rate=self.learning_rate)

    @property
    def needs_reference(self) -> bool:
        """False: no KL is charged."""
        return False

    def cut(self, steps: int, generator: Generator) -> tuple[int, int]:
        """One step; then the denoised image, or the finished one after the last step."""
        least = int(self.earliest * steps)
        first = int(torch.randint(least, steps, (), generator=generator))
        return first, first + 1

    def loss(
        self, rewards: Float[Tensor, " paths"], path_kl: Float[Tensor, " paths"]
    ) -> Float[Tensor, " paths"]:
        """scale * relu(enough - r)."""
        return self.scale * (self.enough - rewards).relu()


@dataclass(frozen=True)
class DRaFT(BackpropObjective):
    """Direct reward fine-tuning: back-propagation through the last steps."""

    last: int = 1  # steps with a gradient; all of them where there are fewer
    kl_weight: float = 0.0  # reward per nat of path KL over these steps

    def __post_init__(self) -> None:
        require_numbers(self)
        if isinstance(self.last, bool) or self.last < 1:
            raise ValueError(f"last must be at least 1, got {self.last}")
        require_not_negative(kl_weight=self.kl_weight)
        require_positive(learning_rate=self.learning_rate)

    @property
    def reward_per_nat(self) -> float | None:
        """``kl_weight``, if the differentiated steps are charged."""
        return self.kl_weight or None

    @property
    def needs_reference(self) -> bool:
        """Whether a KL is charged."""
        return self.kl_weight > 0

    def cut(self, steps: int, generator: Generator) -> tuple[int, int]:
        """The last ``last`` steps."""
        return max(0, steps - self.last), steps

    def loss(
        self, rewards: Float[Tensor, " paths"], path_kl: Float[Tensor, " paths"]
    ) -> Float[Tensor, " paths"]:
        """-r + kl_weight KL."""
        return self.kl_weight * path_kl - rewards


@dataclass(frozen=True)
class AlignProp(BackpropObjective):
    """Back-propagation from a random place to the end, towards a target reward."""

    place: float = 0.84  # mean of the first step with a gradient, as a share of the path
    place_std: float = 0.1  # its standard deviation; 0 for a fixed place
    target: float = 10.0  # reward to reach, not to exceed
    scale: float = 0.01  # of the loss
    kl_weight: float = 0.0  # reward per nat of path KL over the differentiated steps

    def __post_init__(self) -> None:
        require_numbers(self)
        if not 0 <= self.place <= 1:
            raise ValueError(f"place must be in [0, 1], got {self.place}")
        if not math.isfinite(self.target):
            raise ValueError(f"target must be finite, got {self.target}")
        require_not_negative(place_std=self.place_std, kl_weight=self.kl_weight)
        require_positive(scale=self.scale, learning_rate=self.learning_rate)

    @property
    def reward_per_nat(self) -> float | None:
        """``kl_weight``, if the differentiated steps are charged."""
        return self.kl_weight or None

    @property
    def needs_reference(self) -> bool:
        """Whether a KL is charged."""
        return self.kl_weight > 0

    def cut(self, steps: int, generator: Generator) -> tuple[int, int]:
        """The integer part of N(place, place_std) * steps, drawn again until it is a step."""
        while True:
            drawn = self.place + self.place_std * float(torch.randn((), generator=generator))
            first = math.floor(drawn * steps + 1e-9)  # 0.58 * 50 is 28.999999999999996
            if 0 <= first < steps:
                return first, steps
            if self.place_std == 0:  # a fixed place of 1: the last step
                return steps - 1, steps

    def loss(
        self, rewards: Float[Tensor, " paths"], path_kl: Float[Tensor, " paths"]
    ) -> Float[Tensor, " paths"]:
        """scale * (|r - target| + kl_weight KL)."""
        return self.scale * ((rewards - self.target).abs() + self.kl_weight * path_kl)
