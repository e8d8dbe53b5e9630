"""Noise schedules: signal and noise as functions of noising time s; s = 0 is data.

Forward (noising) process dY = f(s, Y) ds + g(s) dB with f = -g^2 y / 2 (variance preserving): Y_s is
alpha(s) Y_0 plus noise of standard deviation sigma(s), alpha^2 + sigma^2 = 1, and
int_{s0}^{s1} g^2 ds = log alpha(s0)^2 - log alpha(s1)^2 exactly. DDPM's "alpha-bar" is alpha^2.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Schedule(Protocol):
    """A variance-preserving schedule; everything else follows from ``log_alpha_bar``."""

    horizon: float  # largest noising time

    def log_alpha_bar(self, s: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """log alpha(s)^2."""
        ...

    def g2(self, s: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """g(s)^2 = beta(s), 1/time."""
        ...


def alpha(schedule: Schedule, s: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
    """Signal at noising time s."""
    return (0.5 * schedule.log_alpha_bar(s)).exp()


def sigma(schedule: Schedule, s: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
    """Standard deviation of the noise at noising time s."""
    return (-torch.expm1(schedule.log_alpha_bar(s))).sqrt()


def log_snr(schedule: Schedule, s: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
    """log (alpha^2 / sigma^2)."""
    level = schedule.log_alpha_bar(s)
    return level - (-torch.expm1(level)).log()


def integrated_g2(
    schedule: Schedule, s0: Float[Tensor, " *shape"], s1: Float[Tensor, " *shape"]
) -> Float[Tensor, " *shape"]:
    """int_{s0}^{s1} g^2 ds, exactly."""
    return schedule.log_alpha_bar(s0) - schedule.log_alpha_bar(s1)


@dataclass(frozen=True)
class VPLinear:
    """beta rises linearly from ``beta_start`` to ``beta_end`` over [0, horizon]; equal values: constant."""

    beta_start: float = 0.1
    beta_end: float = 20.0
    horizon: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beta_start", "beta_end", "horizon"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")

    def log_alpha_bar(self, s: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """-int_0^s beta."""
        slope = (self.beta_end - self.beta_start) / self.horizon
        return -(self.beta_start * s + 0.5 * slope * s.square())

    def g2(self, s: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """beta(s)."""
        return self.beta_start + (self.beta_end - self.beta_start) * s / self.horizon


@dataclass(frozen=True, eq=False)
class DDPMTable:
    """The table of a DDPM-type model as a continuous schedule on [0, 1].

    Timestep i of n stands at s = (i + 1) / n. Between entries log alpha-bar is interpolated linearly, so beta is
    piecewise constant and the integral of g^2 over a step is log(abar_{k+1} / abar_k). At s = 0
    alpha-bar is 1; a model whose final alpha-bar is that of timestep 0 simply stops at s = 1 / n.

    Attributes:
        alphas_cumprod: alpha-bar by timestep, decreasing, in (0, 1).
        final_is_one: whether sampling ends at alpha-bar 1 ("set_alpha_to_one").
        steps_offset: of diffusers' "leading" spacing.
        spacing: of the timesteps: "leading" or "trailing".
    """

    alphas_cumprod: Float[Tensor, " timesteps"]
    final_is_one: bool = False
    steps_offset: int = 1
    spacing: str = "leading"
    horizon: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"alphas_cumprod must be [at least 2], got {list(table.shape)}")
        if not bool(((table > 0) & (table < 1)).all() and (table.diff() < 0).all()):
            raise ValueError("alphas_cumprod must decrease strictly within (0, 1)")
        if self.spacing not in ("leading", "trailing"):
            raise ValueError(f"spacing must be 'leading' or 'trailing', got {self.spacing!r}")

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> Self:
        """The table of any diffusers scheduler that has one.

        Raises:
            ValueError: the scheduler has no table, or clips its samples (then steps are not Gaussian).
        """
        if getattr(scheduler, "alphas_cumprod", None) is None:
            raise ValueError(f"{type(scheduler).__name__} has no table of alphas_cumprod")
        config = scheduler.config
        if config.get("clip_sample", False) or config.get("thresholding", False):
            raise ValueError("the scheduler must not clip its samples; set clip_sample=False")
        spacing = config.get("timestep_spacing", "leading")
        return cls(
            scheduler.alphas_cumprod.double(),
            final_is_one=bool(config.get("set_alpha_to_one", False)),
            steps_offset=int(config.get("steps_offset", 0)),
            spacing=spacing if spacing == "trailing" else "leading",
        )

    def log_alpha_bar(self, s: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """Linear between the entries."""
        table = torch.cat([s.new_zeros(1), self.alphas_cumprod.to(s).log()])
        place = s * (len(table) - 1)
        low = place.floor().long().clamp(0, len(table) - 2)
        share = place - low
        return table[low] * (1 - share) + table[low + 1] * share

    def g2(self, s: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """Piecewise constant; at an entry, the value towards data (where a step of sampling goes)."""
        table = torch.cat([s.new_zeros(1), self.alphas_cumprod.to(s).log()])
        place = (s * (len(table) - 1)).ceil().long().clamp(1, len(table) - 1)
        return (table[place - 1] - table[place]) * (len(table) - 1)

    def timesteps(self, steps: int) -> tuple[int, ...]:
        """The timesteps of a sampler of so many steps, largest first, as diffusers chooses them.

        Raises:
            ValueError: ``steps`` is not between 1 and what the table can give.
        """
        count = len(self.alphas_cumprod)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= count:
            raise ValueError(f"steps must be an integer from 1 to {count}, got {steps!r}")
        if self.spacing == "trailing":
            marks = torch.arange(count, 0, -count / steps, dtype=torch.float64)[:steps]
            return tuple(int(m) - 1 for m in marks.round())
        ratio = count // steps
        found = tuple(k * ratio + self.steps_offset for k in reversed(range(steps)))
        if found[0] >= count:
            raise ValueError(
                f"steps = {steps} with steps_offset {self.steps_offset} passes the table's end; use at most "
                f"{count // (ratio + 1)} steps"
            )
        return found
