"""The value of a noisy state: V(t, x, c) = c_skip(t) r(x0_hat, c) + c_out(t) F(t, x, c).

The first term is the reward itself, applied to the denoised image; the second a small trained
network. With c_skip = cos(pi s / 2) and c_out = sin(pi s / 2) at noising time s in [0, 1] the
terminal condition V = r holds exactly at the data end, whatever the network says. So it does with
the other weights that were published, ``linear_weights`` and ``cosine_weights``.

Source  "Score as Action" (arXiv 2502.01819), section on the value network; in the Gaussian case the
        residual c_out F has a closed form (``diffusion_envs.exact.gaussian``).
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from diffusion_envs.rewards.rounding import rounding

Weights: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]  # noising time -> (c_skip, c_out)


def skip_weights(
    noising_time: Float[Tensor, " *shape"],
) -> tuple[Float[Tensor, " *shape"], Float[Tensor, " *shape"]]:
    """(c_skip, c_out) at noising times in [0, 1]: cosine and sine of a quarter turn."""
    angle = 0.5 * math.pi * noising_time
    return angle.cos(), angle.sin()


def linear_weights(
    noising_time: Float[Tensor, " *shape"],
) -> tuple[Float[Tensor, " *shape"], Float[Tensor, " *shape"]]:
    """(c_skip, c_out) = (1 - s, s) at noising times s in [0, 1]."""
    return 1 - noising_time, noising_time


def cosine_weights(
    noising_time: Float[Tensor, " *shape"],
) -> tuple[Float[Tensor, " *shape"], Float[Tensor, " *shape"]]:
    """(c_skip, c_out) = (cos(pi s / 2), 1 - cos(pi s / 2)): a mean of the two terms."""
    skip, _ = skip_weights(noising_time)
    return skip, 1 - skip


def constant_weights(
    noising_time: Float[Tensor, " *shape"],
) -> tuple[Float[Tensor, " *shape"], Float[Tensor, " *shape"]]:
    """(c_skip, c_out) = (1, 1): the network learns what r(x0_hat) is off by; V is not r at s = 0.

    ``Critic.values`` sets V = r at the last node whatever the weights.
    """
    return torch.ones_like(noising_time), torch.ones_like(noising_time)


def combine(
    noising_time: Float[Tensor, "*#shape"],
    denoised_reward: Float[Tensor, " *shape"],
    residual: Float[Tensor, " *shape"],
    weights: Weights | None = None,
) -> Float[Tensor, " *shape"]:
    """V = c_skip r(x0_hat) + c_out F: the denoised image's reward and the network's residual.

    Args:
        noising_time: s in [0, 1].
        denoised_reward: r(x0_hat).
        residual: F, in reward.
        weights: of the two; ``skip_weights`` if not given.
    """
    skip, out = (weights or skip_weights)(noising_time)
    return skip * denoised_reward + out * residual


class _Residual(nn.Module):
    """What both networks share: the units of their answer, and how they are told the time.

    The answer is ``location + scale * network``; the two are set once, by ``calibrate``, from the
    first rewards seen, so that rewards of any size are learned at the same rate.
    """

    location: Tensor
    scale: Tensor
    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("location", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("frequencies", 2 * math.pi * torch.arange(1.0, 5.0) / 4)

    def calibrate(self, rewards: Float[Tensor, " n"]) -> None:
        """Set location and scale from rewards, once, before training."""
        self.location.copy_(rewards.mean())
        if len(rewards) > 1 and (std := rewards.std()) > rounding(rewards)[0]:
            self.scale.copy_(std)

    def clock(self, noising_time: Float[Tensor, " n"]) -> Float[Tensor, "n 9"]:
        """The time itself, sines and cosines of it."""
        phases = noising_time[:, None] * self.frequencies
        return torch.cat([noising_time[:, None], phases.sin(), phases.cos()], dim=1)

    def rewarded(self, answer: Float[Tensor, "n 1"]) -> Float[Tensor, " n"]:
        """The network's last neuron, in reward."""
        return self.location + self.scale * answer[:, 0]


class ResidualValue(_Residual):
    """F(t, x, c): a small convolutional network on noisy states, in units of reward.

    Args:
        channels: of the state, for events [channels, height, width].
        context: width of the condition vector (the mean of the prompt's embedding).
        width: of the hidden layers.
        generator: draws the initial weights.
    """

    def __init__(
        self, channels: int, context: int, *, generator: torch.Generator, width: int = 64
    ) -> None:
        super().__init__()
        self.condition = nn.Linear(context + 2 * 4 + 1, width)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.deepen = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.hidden = nn.Linear(width, width)
        self.leave = nn.Linear(width, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                assert layer.bias is not None
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.leave.weight)

    @property
    def chain(self) -> list[nn.Module]:
        """The layers on the states' way, each of which reads the neurons of the one before."""
        return [self.enter, self.deepen, self.middle, self.hidden, self.leave]

    def forward(
        self,
        noising_time: Float[Tensor, " n"],
        states: Float[Tensor, "n channels h w"],
        context: Float[Tensor, "n context"],
    ) -> Float[Tensor, " n"]:
        """F at each state, in reward."""
        shift = self.condition(torch.cat([context, self.clock(noising_time)], dim=1))
        shift = shift[:, :, None, None]
        x = functional.silu(self.enter(states) + shift)
        x = functional.silu(self.deepen(x) + shift)
        x = functional.silu(self.middle(x) + x).mean((2, 3))
        return self.rewarded(self.leave(functional.silu(self.hidden(x))))


class ResidualValueOfVectors(_Residual):
    """F(t, x, c) for vectors: a small multilayer perceptron; otherwise as ``ResidualValue``.

    Args:
        dim: of the state.
        context: width of the condition vector.
        width: of the hidden layers.
        generator: draws the initial weights.
    """

    def __init__(
        self, dim: int, context: int, *, generator: torch.Generator, width: int = 64
    ) -> None:
        super().__init__()
        self.enter = nn.Linear(dim + context + 2 * 4 + 1, width)
        self.hidden = nn.Linear(width, width)
        self.leave = nn.Linear(width, 1)
        for layer in (self.enter, self.hidden, self.leave):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.leave.weight)

    @property
    def chain(self) -> list[nn.Module]:
        """The layers on the states' way, each of which reads the neurons of the one before."""
        return [self.enter, self.hidden, self.leave]

    def forward(
        self,
        noising_time: Float[Tensor, " n"],
        states: Float[Tensor, "n dim"],
        context: Float[Tensor, "n context"],
    ) -> Float[Tensor, " n"]:
        """F at each state, in reward."""
        seen = torch.cat([states, context, self.clock(noising_time)], dim=1)
        x = functional.silu(self.enter(seen))
        x = functional.silu(self.hidden(x) + x)
        return self.rewarded(self.leave(x))


def value_network(
    event: tuple[int, ...], context: int, *, generator: torch.Generator
) -> ResidualValue | ResidualValueOfVectors:
    """The residual value network for states of this shape: images or vectors.

    Raises:
        ValueError: states are neither [channels, height, width] nor [dim].
    """
    if len(event) == 3:
        return ResidualValue(event[0], context, generator=generator)
    if len(event) == 1:
        return ResidualValueOfVectors(event[0], context, generator=generator)
    raise ValueError(f"states must be [channels, height, width] or [dim], got {list(event)}")


def martingale_loss(
    values: Float[Tensor, "paths nodes"],
    returns: Float[Tensor, "paths nodes"],
    step_sizes: Float[Tensor, " steps"],
) -> Float[Tensor, " paths"]:
    """Jia & Zhou's martingale loss (JMLR 2022a): int |G_t - V(t, X_t)|^2 dt along each path.

    Minimised where M_t = V(t, X_t) + accrued reward is closest to a martingale, that is by the
    projection of the true value function. G is the realised return to go, evaluated at the left of
    each step.
    """
    return ((returns - values)[:, :-1].square() * step_sizes).sum(1)
