"""Flow-DPPO: a mask by the exact KL of old to new transition, in place of a clip on their ratio."""

import math
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from diffusion_envs.objectives.grpo import GroupRelative
from diffusion_envs.objectives.path_steps import Rows, Steps, trusted_width
from diffusion_envs.objectives.protocol import require_positive


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
