"""DxMI: the sampler climbs a value network, one step at a time; and its continuous-time variant.

Setting      V(t, x) is a network, trained on the terminal rewards of sampled paths (at all nodes,
             the last included) without any further reward query. The next state is a function of
             the policy: x' = state_gain x + score_gain score(x) + std z, z kept from the roll-out.
DxMI         loss of a step = -V(t_{k+1}, x') + move_weight |x' - x|^2 / (2 q_k d)
                              - entropy_weight log std_k + kl_weight path KL,
             d coordinates, q_k = 2 (1 - exp(-h_k / 2)), h_k = int g^2 dt: how far the noising
             process moves a coordinate of data of unit power, squared.
Continuous   loss of a step = -<grad_x V(t_k, x_k), x' - x_k> + kl_weight path KL: the same to first
             order in the step, and the pathwise form of int g^2 (d score)' grad V dt.
Exact        If V is the policy's own value (charged with kl_weight), and the weights of moves and
             entropy are 0, DxMI's gradient is that of E[r] - kl_weight path KL of the sampler's own
             chain: it is the derivative of every step under the steps that follow.
Biased       By what V gets wrong: its gradient in x is learned from rewards, never from gradients.
             Moves are not charged to V (nor as published), so a step does not see what it costs
             later ones: in the test, 3 steps and rewards of order 1, 2.4 % of the gradient at the
             published weight, 26 % at ten times that. The continuous variant takes grad V before
             the step: off by 18 % at 10 steps of the test, 10 % at 20, 6 % at 40: first order.
Clips        ``ContinuousDxMIReleased`` has those of the code for CIFAR-10: next states to +-1,
             moves of a coordinate to +-0.1, a sample's product to +-1. Outside a clip the gradient
             is 0. On Stable Diffusion's schedule noise alone moves 75 % of coordinates further than
             0.1 at 20 steps (88 % in the first, half or more in all but the last), 69 % at 50.
Released     It also takes grad V(t_{k+1}, x_k): the value of the step's end at its beginning. With
             exact values and no clips its gradient has 1.062, 1.032, 1.014 of the exact size at 10,
             20, 50 steps of the test and is turned by 3.9, 2.1, 0.9 degrees; with V(t_k, x_k), as
             in ``ContinuousDxMI``, 0.820, 0.899, 0.957 and 5.6, 2.6, 1.0. The code's V does not see
             the time: the best such V (least squares over the states of all nodes) gives 1.315,
             1.459, 1.551 and 13 to 14 degrees. Here V sees it.
Here         The energy is the reward; ``dxmi_from_data`` learns it from data, as published. Where
             the sampler fixes std_k, the entropy's gradient is 0, and nothing but moves (and
             kl_weight, if not 0) holds the policy back; a sampler with learned standard deviations
             has it. Values are learned from the realised reward, published ones from the next
             state's value. Published rates, 1e-7 and 3e-7, are for all weights.

Sources      Yoon et al. 2024, "Maximum entropy inverse reinforcement learning of diffusion models
             with energy-based models", arXiv 2407.00626. Zhao et al. 2025, "Score as Action",
             arXiv 2502.01819, for the variant. Defaults of the authors' code at 10 steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_envs.objectives.path_steps import (
    PathObjective,
    Rows,
    Steps,
    coordinates,
    path_kl_rate,
)
from diffusion_envs.ranges import require_not_negative, require_numbers, require_positive
from diffusion_envs.rollout import Rollout


@dataclass(frozen=True, eq=False)
class ValueRows(Rows):
    """Rows with the step that they make, and the value network at both of its ends."""

    state: Float[Tensor, " rows *event"]  # at the left of the step
    next_mean: Float[Tensor, " rows *event"]  # of the next state; carries a gradient
    value: Callable[[Tensor], Tensor]  # V at any states at the left of each row's step
    next_value: Callable[[Tensor], Tensor]  # and at the right
    usual: Float[Tensor, " rows"] | None = None  # squared move that is usual; None: of noising


def next_state(rows: ValueRows) -> Float[Tensor, " rows *event"]:
    """The sampled next state as a function of the current policy, its noise kept."""
    std = rows.std.view(-1, *[1] * (rows.noise.ndim - 1))
    return rows.next_mean + std * rows.noise


def usual_move(step_size: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """E|x' - x|^2 of a coordinate of unit power under noising over a step: 2 (1 - exp(-h / 2))."""
    return -2 * torch.expm1(-0.5 * step_size)


@dataclass(frozen=True)
class _ByValue(PathObjective):
    """What the two variants share: a value network that is trained on terminal rewards alone."""

    kl_weight: float = 0.0  # reward per nat of path KL from the pretrained model

    needs_value: ClassVar[bool] = True
    fits_end: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_numbers(self)
        require_not_negative(kl_weight=self.kl_weight)
        require_positive(learning_rate=self.learning_rate)

    @property
    def needs_reference(self) -> bool:
        """Where the KL has a weight."""
        return self.kl_weight > 0

    @property
    def cost_weight(self) -> float:
        """The KL, if it has a weight, is charged to the value too."""
        return self.kl_weight

    def charge(self, rows: Rows) -> Tensor | float:
        """kl_weight * path KL, reward."""
        return self.kl_weight * path_kl_rate(rows) if self.needs_reference else 0.0

    def rows(self, common: Rows, steps: Steps) -> ValueRows:
        """With the next state's mean, and the values."""
        assert steps.values is not None  # needs_value
        values, path, step = steps.values, steps.path, steps.step
        state = steps.rollout.at("states", path, step)
        shape = (-1, *[1] * (state.ndim - 1))
        gain = steps.at_step(steps.sampler.state_gain).view(shape)
        return ValueRows(
            **vars(common),
            state=state,
            next_mean=gain * state + common.score_gain.view(shape) * common.mean,
            value=lambda x: values(step, x, path),
            next_value=lambda x: values(step + 1, x, path),
            usual=None if steps.usual_moves is None else steps.at_step(steps.usual_moves),
        )

    def advantages(self, rollout: Rollout) -> Float[Tensor, "paths steps"]:
        """Zeros: the loss reads the value's gradient only."""
        return torch.zeros_like(rollout.costs)


@dataclass(frozen=True)
class DxMI(_ByValue):
    """The value of the next state, differentiated through the step."""

    entropy_weight: float = 0.1  # tau1, reward per nat of a coordinate's transition
    move_weight: float = 0.01  # tau2, reward per half squared move, relative to the usual one
    std_rate: float = 1e-5  # learning rate of the sampler's log std, where that is learned

    needs_scores: ClassVar[bool] = True  # moves are compared by int g^2, the clock of scores
    learns_std: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(entropy_weight=self.entropy_weight, move_weight=self.move_weight)
        require_not_negative(std_rate=self.std_rate)

    @property
    def rates(self) -> tuple[float, float]:
        """Those that were set."""
        return self.learning_rate, self.std_rate

    def loss(self, rows: ValueRows) -> Float[Tensor, " rows"]:
        """-V(x') + moves - entropy + kl_weight * path KL, reward."""
        after = next_state(rows)
        usual = usual_move(rows.step_size) if rows.usual is None else rows.usual
        moves = (after - rows.state).square().flatten(1).mean(1) / (2 * usual)
        entropy = self.entropy_weight * rows.std.log()
        cost = self.move_weight * moves + self.charge(rows)
        return cost - entropy - rows.next_value(after)


@dataclass(frozen=True)
class ContinuousDxMI(_ByValue):
    """The value's gradient before the step, times the move: DxMI to first order in the step."""

    move_clip: float = math.inf  # largest move of a coordinate that is learned from
    state_clip: float = math.inf  # next states are brought within, before the move is taken
    gain_clip: float = math.inf  # largest gain of a sample that is learned from, reward

    value_of_next_node: ClassVar[bool] = False  # V(t_{k+1}, .), not V(t_k, .), at x_k

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("move_clip", "state_clip", "gain_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def _moves(self, rows: ValueRows) -> Tensor:
        return next_state(rows).clamp(-self.state_clip, self.state_clip) - rows.state

    def clipped(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Share of each row's coordinates that have no gradient, by the clips of moves, states."""
        assert isinstance(rows, ValueRows)
        outside = next_state(rows).abs() > self.state_clip
        outside |= self._moves(rows).abs() > self.move_clip
        return outside.flatten(1).sum(1).to(rows.step_size) / coordinates(rows)

    def loss(self, rows: ValueRows) -> Float[Tensor, " rows"]:
        """-<grad V(x), x' - x> + kl_weight * path KL, reward; with its clips."""
        value = rows.next_value if self.value_of_next_node else rows.value
        with torch.enable_grad():
            before = rows.state.detach().requires_grad_()
            slope = torch.autograd.grad(value(before).sum(), before)[0]
        moves = self._moves(rows).clamp(-self.move_clip, self.move_clip)
        gain = (slope * moves).flatten(1).sum(1).clamp(-self.gain_clip, self.gain_clip)
        return self.charge(rows) - gain


@dataclass(frozen=True)
class ContinuousDxMIReleased(ContinuousDxMI):
    """The continuous variant as in the authors' code, with clips made for pixels in [-1, 1]."""

    move_clip: float = 0.1  # largest move of a coordinate that is learned from
    state_clip: float = 1.0  # next states are brought within, before the move is taken
    gain_clip: float = 1.0  # largest gain of a sample that is learned from, reward

    value_of_next_node: ClassVar[bool] = True
