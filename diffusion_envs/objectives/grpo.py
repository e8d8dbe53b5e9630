"""GRPO on DDIM: each path is compared with the others of its group, which share the prompt.

Objective    J(th) = E_th[ r(X_T, prompt) ] - kl_weight sum_k KL(p_th(. | x_k) || p_pre(. | x_k)).
Loss         of a step, to be minimised: kl_weight KL_k - min(rho_k A, clip(rho_k) A), where
             rho_k = p_th(x_{k+1} | x_k) / p_old(x_{k+1} | x_k) and A is the reward less the mean of
             its group, in standard deviations of the group, or of the whole roll-out. KL_k is
             that of the Gaussian transitions, |difference of means|^2 / (2 std^2), nats.
Two forms    DanceGRPO  group 16, the group's std, shared_start, kl_weight 0; learning rate 1e-5 for
                        all weights; UpdateSize(train_steps=29) of 50
             Flow-GRPO  group 24, whole_batch_std, kl_weight 0.004; learning rate 3e-4 for adapters
Exact        With whole_batch_std and one optimiser step a roll-out the reward term's gradient is (1
             - 1/group) / std times that of E r, but for the std's own randomness, whether or not a
             group shares its start: if so, its mean also removes what the start decides.
Biased       (1) The group's std weighs prompts, and starts if they are shared, by its inverse; in
             all sqrt(1 - 1/n) c4(n) / sigma for Gaussian rewards (see ``ddpo``). (2) The KL is
             differentiated at the states that were visited, not through them: on the
             linear-Gaussian model of the tests its gradient is off by 42 % of its size.
             ``ScoreAsAction`` charges it to the return, which has no such bias.
Advantages   "ranks" in place of rewards: the same for every increasing function of the reward; of n
             rewards without ties the gradient is sqrt(12 (n - 1) / (n + 1)) times that of
             P(r > r'), r' of another path of the old policy. "parts": sum_k w_k A_k / sqrt(sum_k
             w_k^2) over the parts of a ``rewards.Weighted``, each standardised by itself ([G],
             which divides by the sum's standard deviation over the batch instead); with one part
             it is the plain one.
Fixed point  On ``diffusion_envs.exact.GaussianProblem``, 20 steps, a kl_weight of 0.5 standard
             deviations of the reward (0.27 there) a nat converges to 79.4 percent of the gain that
             E[r] - 0.5 (path KL) allows, with large groups: 0.5 is then another weight, each step
             pays for itself alone, and the transitions' KL is not the path's (``dpok`` has each
             apart).
Published    (1) A standard deviation here is the population's (n in the denominator) plus 1e-4, as
             in Flow-GRPO; DanceGRPO's is the sample's plus 1e-8: advantages there are sqrt(1 - 1/n)
             of these, 0.968 at n = 16. (2) DanceGRPO trains 0.6 of the steps before the last, drawn
             again for every path: 29 of 50. ``UpdateSize(train_steps=29)`` is as many, shared by a
             group, the last among them like any other. Flow-GRPO trains all but the last, in order.
             On the linear-Gaussian model of the tests, 50 steps, the last has 1.6 % of the reward's
             gradient. (3) Flow-GRPO divides by a variance that lacks the step's length: its "KL" is
             the KL times the step, about a tenth of it, and its weight of 0.04 is 0.004 a nat. (4)
             Log-densities and KL are means over pixels, here sums; a clip of 1e-4 a pixel is 1.64
             nats a step at 4 x 64 x 64. (5) Flow-GRPO leaves out groups of equal rewards; here
             their advantage is 0, and the KL holds them. (6) Its SDE is that of a flow; here it is
             DDIM with eta. Near the data DDIM's variance is less than int g^2 dt: its KL, the one
             used here, is up to 21 times the path KL that is logged (last of 50 trailing steps of
             Stable Diffusion 1.5, eta = 1).

Sources      [D] Xue, Wu, Gao et al. 2025, DanceGRPO, arXiv 2505.07818. [L] Liu, Liu, Liang et al.
             2025, Flow-GRPO, arXiv 2505.05470, and issues 22 and 78 of its code. [S] Shao, Wang et
             al. 2024, DeepSeekMath, arXiv 2402.03300. [G] Liu, Dong, Lu et al. 2026, GDPO,
             arXiv 2601.05242. Settings: the two projects' code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.trust_region import clipped_surrogate
from diffusion_envs.objectives.path_steps import PathObjective, Rows, transition_kl, trusted_width
from diffusion_envs.objectives.protocol import per_prompt
from diffusion_envs.ranges import require_not_negative, require_numbers, require_positive
from diffusion_envs.rewards.rounding import floored_std, ranks, standardised
from diffusion_envs.rollout import Rollout

STD_OFFSET = 1e-4  # reward, added to a standard deviation before dividing; as in Flow-GRPO


def group_advantages(
    rewards: Float[Tensor, " paths"], group: int, *, whole_batch_std: bool
) -> Float[Tensor, " paths"]:
    """Rewards less their group's mean, in standard deviations of the group or of all."""
    if not whole_batch_std:
        return per_prompt(rewards, torch.arange(len(rewards)) // group, STD_OFFSET)
    by_group = rewards.view(-1, group)
    centred = (by_group - by_group.mean(1, keepdim=True)).flatten()
    # round-off of equal rewards must not be blown up
    scaled = centred / (floored_std(rewards) + STD_OFFSET)
    return scaled.where((rewards != rewards[0]).any(), 0.0)


def rank_advantages(rewards: Float[Tensor, " paths"], group: int) -> Float[Tensor, " paths"]:
    """Ranks in the group, of mean 0 and variance 1; ties, within rounding, get their mean rank."""
    return standardised(ranks(rewards.view(-1, group)), 0.0).flatten()


def part_advantages(
    parts: Float[Tensor, "paths parts"],
    weights: Sequence[float],
    group: int,
    *,
    whole_batch_std: bool,
) -> Float[Tensor, " paths"]:
    """sum_k w_k A_k / sqrt(sum_k w_k^2), A_k the ``group_advantages`` of part k ([G])."""
    total = torch.zeros_like(parts[:, 0])
    for part, weight in zip(parts.unbind(1), weights, strict=True):
        total += weight * group_advantages(part, group, whole_batch_std=whole_batch_std)
    return total / math.hypot(*weights)


@dataclass(frozen=True)
class GroupRelative(PathObjective):
    """What the methods that compare the paths of a group share: their advantage, and a KL.

    Attributes:
        group: paths that share a prompt.
        shared_start: whether the paths of a group share their starting noise too.
        advantage: "standardised" rewards; "ranks" in the group, for rewards with outliers or
            without a scale; or "parts", each part of a ``rewards.Weighted`` standardised by itself.
    """

    learning_rate: float = 3e-4  # of the adapter, AdamW
    # settings here, for which a field may take a property's place
    group: int = 16  # pyright: ignore[reportIncompatibleMethodOverride]
    shared_start: bool = False  # pyright: ignore[reportIncompatibleMethodOverride]
    whole_batch_std: bool = False  # rewards in standard deviations of all, not of their group
    kl_weight: float = 0.0  # standard deviations of the reward per nat of a transition's KL
    advantage_clip: float = 5.0  # in standard deviations of the reward
    advantage: Literal["standardised", "ranks", "parts"] = "standardised"

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(learning_rate=self.learning_rate, advantage_clip=self.advantage_clip)
        require_not_negative(kl_weight=self.kl_weight)
        if self.advantage not in ("standardised", "ranks", "parts"):
            raise ValueError(
                f"advantage must be 'standardised', 'ranks' or 'parts', got {self.advantage!r}"
            )
        if self.advantage == "ranks" and self.whole_batch_std:
            raise ValueError(
                "ranks are in standard deviations of their group: use whole_batch_std=False, or "
                "advantage='standardised'"
            )
        if self.group < 2:
            raise ValueError(
                f"group must be at least 2, as one path has none to be compared with, got "
                f"{self.group}"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether a KL is charged."""
        return self.kl_weight > 0

    @property
    def compares_parts(self) -> bool:
        """Whether each part of the reward is compared by itself."""
        return self.advantage == "parts"

    def advantages(self, rollout: Rollout) -> Float[Tensor, "paths steps"]:
        """The group's standardised reward, clipped, the same at every step."""
        clipped = self._of_groups(rollout).clamp(-self.advantage_clip, self.advantage_clip)
        return clipped[:, None].expand_as(rollout.costs)

    def _of_groups(self, rollout: Rollout) -> Float[Tensor, " paths"]:
        """The advantage before it is clipped."""
        if self.advantage == "ranks":
            return rank_advantages(rollout.rewards, self.group)
        whole = self.whole_batch_std
        if self.advantage == "standardised":
            return group_advantages(rollout.rewards, self.group, whole_batch_std=whole)
        assert rollout.reward_parts is not None  # requirements: the reward has parts
        weights = list(rollout.part_weights.values())
        return part_advantages(rollout.reward_parts, weights, self.group, whole_batch_std=whole)

    def kl_cost(self, rows: Rows) -> Float[Tensor, " rows"]:
        """kl_weight * KL of each row's transition from the pretrained one; 0 if none is charged."""
        if not self.needs_reference:
            return torch.zeros_like(rows.advantage)
        return self.kl_weight * transition_kl(rows)


@dataclass(frozen=True)
class GRPO(GroupRelative):
    """Clipped policy gradient with the group's own statistics for a baseline, and a KL.

    Attributes:
        group: paths that share a prompt.
        shared_start: whether the paths of a group share their starting noise too.
    """

    kl_weight: float = 0.004  # standard deviations of the reward per nat of a transition's KL
    clip: float = 1.64  # trusted |log-ratio| of a step, nats: 1e-4 a pixel of 4 x 64 x 64
    clip_per_pixel: float | None = None  # the published convention: times the coordinates

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(clip=self.clip)
        if self.clip_per_pixel is not None:
            require_positive(clip_per_pixel=self.clip_per_pixel)

    def half_width(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Half-width of the trusted log-ratios, the same at every step."""
        return trusted_width(rows, self.clip, self.clip_per_pixel)

    def loss(self, rows: Rows) -> Float[Tensor, " rows"]:
        """-min(ratio A, clipped ratio A) + kl_weight * KL, one number per row."""
        gain = clipped_surrogate(self.log_ratio(rows), rows.advantage, self.half_width(rows))
        return self.kl_cost(rows) - gain
