"""Flow-DPPO: a mask by the exact KL of old to new transition, in place of a clip on their ratio.

Loss         of a step, to be minimised: kl_weight KL_k - m_k rho_k A, with rho_k, A and KL_k (to
             the pretrained model) as in ``grpo``. With D_k = KL(p_old(. | x_k) || p_th(. | x_k)),
             |difference of means|^2 / (2 std^2) nats, m_k is 0 where both
                 D_k >= max_kl   and   A log rho_k > 0:
             too far, and the gradient leads further away; else 1. What leads back passes at any
             distance.
Per path     With ``per_path`` D is that of the whole path, sum_k D_k, all steps of which are masked
             together, each where its own gradient leads away. Its mean over paths is KL(P_old ||
             P_th) of the chains, exactly; of the used steps (``UpdateSize.train_steps``) it is an
             unbiased estimate. All used steps of a group then go through the network at once.
Exact        At the sampling policy nothing is masked, and the gradient is GRPO's. ``max_kl`` thus
             acts from the second optimiser step of a roll-out on.
Biased       (1) Per step, the path KL of what is trusted grows with the number of steps: a policy
             all of whose steps are just inside is N max_kl nats from the old one, 8 at 50 steps;
             per path it is ``max_kl`` at any N. (2) Outside, next to nothing of the gradient is
             left: along a linear reward -0.6 % of it where a step's mean has shifted by 0.57
             standard deviations, which is 0.16 nats; PPO's clip of 1.64 nats has 94 % of it there.
             (3) Inside, ratios are not clipped: their variance is exp(2 D) - 1, 0.38 at 0.16 nats.
             (4) As DDPO's (2) and GRPO's (1) and (2).
Fixed point  That of ``grpo``, as the gradient there is the same.
Published    (1) There D is a mean over coordinates, with a threshold of 1e-5: 0.66 nats at
             16 x 64 x 64, 0.16 at 4 x 64 x 64, the default here (``max_kl_per_pixel`` is theirs).
             ``per_path`` is ours. (2) Log-densities there are means over pixels too, so that rho is
             the d-th root of ours, with 1/d of the gradient. (3) Three of the first five of ten
             steps are sampled with noise and trained. (4) Groups of 16, two optimiser steps a
             roll-out, rewards in standard deviations of the whole batch, no KL to the pretrained
             model in the released recipe. (5) Its SDE is a flow's.

Sources      [P] Ping, Zhou, Qi, Luo, Bo & Pang 2026, Flow-DPPO, arXiv 2606.11025: the abstract was
             read, the paper was not. Formulas and settings: its released code,
             github.com/Tencent-Hunyuan/UniRL, unirl/algorithms/flowdppo.py and FlowDPPO/, which
             cite the paper's equations 14 and 18.
"""

import math
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from diffusion_envs.objectives.grpo import GroupRelative
from diffusion_envs.objectives.path_steps import Rows, Steps, trusted_width
from diffusion_envs.ranges import require_positive


@dataclass(frozen=True, eq=False)
class PathRows(Rows):
    """Rows of which ``joined`` of the ``steps`` of each path of a group come together."""

    joined: int
    steps: int


@dataclass(frozen=True)
class FlowDPPO(GroupRelative):
    """Importance-weighted policy gradient, masked where it leads further out of a KL ball."""

    whole_batch_std: bool = True  # rewards in standard deviations of all, not of their group
    max_kl: float = 0.16  # trusted KL of a step (or path), nats: 1e-5 a pixel of 4 x 64 x 64
    max_kl_per_pixel: float | None = None  # the published convention: times the coordinates
    per_path: bool = False  # the KL of the whole path, so that the number of steps has no say

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(max_kl=self.max_kl)
        if self.max_kl_per_pixel is not None:
            require_positive(max_kl_per_pixel=self.max_kl_per_pixel)

    # decided by a setting: whether the steps of a path come together
    @property
    def joins_steps(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the used steps of a path come together: their KLs are summed."""
        return self.per_path

    def rows(self, common: Rows, steps: Steps) -> PathRows:
        """Rows, and how many of a path's steps stand together."""
        every = len(steps.rollout.step_sizes)
        return PathRows(**vars(common), joined=steps.joined, steps=every)

    def divergence(self, rows: PathRows) -> Float[Tensor, " rows"]:
        """KL(p_old || p_th) of each row's transition, or estimate of its path's, nats."""
        shift = (rows.mean - rows.old_mean).flatten(1) * (rows.score_gain / rows.std)[:, None]
        kl = 0.5 * shift.square().sum(1)
        if not self.per_path:
            return kl
        of_paths = kl.view(-1, rows.joined, self.group)
        path = rows.steps * of_paths.mean(1, keepdim=True)
        return path.expand_as(of_paths).flatten()

    def masked(self, rows: PathRows) -> Bool[Tensor, " rows"]:
        """Where the divergence is not trusted and the gradient would increase it."""
        far = self.divergence(rows) >= trusted_width(rows, self.max_kl, self.max_kl_per_pixel)
        return far & (self.log_ratio(rows) * rows.advantage > 0)

    def clipped(self, rows: Rows) -> Float[Tensor, " rows"]:
        """1 where a row is masked."""
        assert isinstance(rows, PathRows)
        return self.masked(rows).to(rows.step_size)

    def loss(self, rows: PathRows) -> Float[Tensor, " rows"]:
        """-(ratio A where it is not masked) + kl_weight * KL, one number per row."""
        ratio = self.log_ratio(rows).masked_fill(self.masked(rows), -math.inf).exp()
        return self.kl_cost(rows) - ratio * rows.advantage
