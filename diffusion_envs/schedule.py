"""Noise schedules: how much signal and noise is left at a noising time.

Setting      dY = k(s) Y ds + g(s) dB,  Y_s = alpha(s) Y_0 + sigma(s) eps,  s in [0, horizon]; s = 0 is data.
             k = d log alpha / ds;  g^2 = d sigma^2 / ds - 2 k sigma^2;  log SNR = 2 log(alpha / sigma).
             Variance preserving: k = -beta / 2, g^2 = beta, alpha^2 = exp(-B), B(s) = int_0^s beta.
Conventions  Functions of a tensor of times, elementwise. RL time runs the other way (``denoising``).
Sources      [S21] Song et al. 2021, score-based generative modeling through SDEs, arXiv 2011.13456.
             [ND21] Nichol & Dhariwal 2021, improved DDPM, arXiv 2102.09672.
             [L22] Liu, Gong & Liu 2022, rectified flow, arXiv 2209.03003.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Times = Float[Tensor, " *shape"]
_ROUNDING = 1e-3  # of a timestep: how far round-off may carry a time past a node of a table


@runtime_checkable
class Schedule(Protocol):
    """Signal, noise and their dynamics as functions of noising time."""

    @property
    def horizon(self) -> float:
        """Largest noising time."""
        ...

    def alpha(self, s: Times) -> Times:
        """Signal left: E[Y_s | Y_0] = alpha Y_0."""
        ...

    def sigma(self, s: Times) -> Times:
        """Standard deviation of Y_s given Y_0."""
        ...

    def drift_coefficient(self, s: Times) -> Times:
        """k: the noising drift is k(s) y; 1/time."""
        ...

    def g2(self, s: Times) -> Times:
        """Squared diffusion, state^2/time."""
        ...

    def log_snr(self, s: Times) -> Times:
        """Log of the signal-to-noise ratio alpha^2 / sigma^2."""
        ...

    def integrated_g2(self, s0: Times, s1: Times) -> Times:
        """Int of g^2 from s0 to s1, exact; positive if s0 < s1."""
        ...


def _check_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a positive finite number, got {value}")


class _VariancePreserving(ABC):
    """alpha^2 + sigma^2 = 1: everything follows from beta and its integral."""

    @abstractmethod
    def g2(self, s: Times) -> Times:
        """beta."""

    @abstractmethod
    def integrated_beta(self, s: Times) -> Times:
        """B(s) = int_0^s beta = -log(alpha^2)."""

    def alpha(self, s: Times) -> Times:
        """exp(-B / 2)."""
        return (-0.5 * self.integrated_beta(s)).exp()

    def sigma(self, s: Times) -> Times:
        """sqrt(1 - exp(-B)), without cancellation near the data."""
        return (-(-self.integrated_beta(s)).expm1()).sqrt()

    def drift_coefficient(self, s: Times) -> Times:
        """-beta / 2."""
        return -0.5 * self.g2(s)

    def log_snr(self, s: Times) -> Times:
        """-log(exp(B) - 1)."""
        return -self.integrated_beta(s).expm1().log()

    def integrated_g2(self, s0: Times, s1: Times) -> Times:
        """B(s1) - B(s0) = log(alpha(s0)^2 / alpha(s1)^2)."""
        return self.integrated_beta(s1) - self.integrated_beta(s0)


@dataclass(frozen=True)
class VPLinear(_VariancePreserving):
    """beta grows linearly from ``beta_start`` to ``beta_end`` ([S21] appendix B); equal ends: constant."""

    beta_start: float = 0.1  # 1/time
    beta_end: float = 20.0
    horizon: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(beta_start=self.beta_start, beta_end=self.beta_end, horizon=self.horizon)

    def g2(self, s: Times) -> Times:
        """beta_start + slope s."""
        return self.beta_start + (self.beta_end - self.beta_start) / self.horizon * s

    def integrated_beta(self, s: Times) -> Times:
        """beta_start s + slope s^2 / 2."""
        return self.beta_start * s + 0.5 * (self.beta_end - self.beta_start) / self.horizon * s**2


@dataclass(frozen=True)
class Cosine(_VariancePreserving):
    """alpha = cos of an angle that grows linearly ([ND21] eq. 17), scaled to 1 at the data.

    alpha would reach 0, and beta infinity, at s = 1; so the horizon lies before it.
    """

    offset: float = 0.008
    horizon: float = 0.999

    def __post_init__(self) -> None:
        _check_positive(offset=self.offset, horizon=self.horizon)
        if not self.horizon < 1:
            raise ValueError(
                f"horizon must be below 1, where no signal is left, got {self.horizon}"
            )

    def _angle(self, s: Times) -> Times:
        return 0.5 * math.pi * (s + self.offset) / (1 + self.offset)

    def g2(self, s: Times) -> Times:
        """-d log(alpha^2) / ds = pi / (1 + offset) tan(angle)."""
        return math.pi / (1 + self.offset) * self._angle(s).tan()

    def integrated_beta(self, s: Times) -> Times:
        """-2 log(cos(angle(s)) / cos(angle(0)))."""
        return -2 * (self._angle(s).cos().log() - self._angle(torch.zeros_like(s)).cos().log())


@dataclass(frozen=True)
class VE:
    """Variance exploding ([S21] eq. 30): no drift, sigma^2 = low^2 ((high / low)^(2s) - 1).

    That is the kernel of the SDE started at s = 0, exactly ([S21] eq. 29 for it); others drop the
    1, which reads the data as already noised by ``low``.
    """

    low: float = 0.01  # state
    high: float = 50.0
    horizon: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(low=self.low, horizon=self.horizon)
        if not self.low < self.high < math.inf:
            raise ValueError(f"high must be finite and above low = {self.low}, got {self.high}")

    @property
    def _rate(self) -> float:
        return 2 * math.log(self.high / self.low)

    def alpha(self, s: Times) -> Times:
        """One."""
        return torch.ones_like(s)

    def sigma(self, s: Times) -> Times:
        """low sqrt(exp(rate s) - 1)."""
        return self.low * (self._rate * s).expm1().sqrt()

    def drift_coefficient(self, s: Times) -> Times:
        """Zero."""
        return torch.zeros_like(s)

    def g2(self, s: Times) -> Times:
        """d sigma^2 / ds."""
        return self.low**2 * self._rate * (self._rate * s).exp()

    def log_snr(self, s: Times) -> Times:
        """-2 log sigma."""
        return -2 * self.sigma(s).log()

    def integrated_g2(self, s0: Times, s1: Times) -> Times:
        """sigma(s1)^2 - sigma(s0)^2, without cancellation."""
        return self.low**2 * (self._rate * s0).exp() * (self._rate * (s1 - s0)).expm1()


@dataclass(frozen=True)
class RectifiedFlow:
    """alpha = 1 - s, sigma = s ([L22]), as the SDE with these marginals; the horizon lies before 1."""

    horizon: float = 0.999

    def __post_init__(self) -> None:
        _check_positive(horizon=self.horizon)
        if not self.horizon < 1:
            raise ValueError(
                f"horizon must be below 1, where no signal is left, got {self.horizon}"
            )

    def alpha(self, s: Times) -> Times:
        """1 - s."""
        return 1 - s

    def sigma(self, s: Times) -> Times:
        """The time itself."""
        return s

    def drift_coefficient(self, s: Times) -> Times:
        """-1 / (1 - s)."""
        return -1 / (1 - s)

    def g2(self, s: Times) -> Times:
        """2 s / (1 - s)."""
        return 2 * s / (1 - s)

    def log_snr(self, s: Times) -> Times:
        """2 log((1 - s) / s)."""
        return 2 * ((-s).log1p() - s.log())

    def integrated_g2(self, s0: Times, s1: Times) -> Times:
        """[-2 s - 2 log(1 - s)] between s0 and s1."""
        return 2 * (s0 - s1) + 2 * ((-s0).log1p() - (-s1).log1p())


@dataclass(frozen=True, eq=False)
class DDPMTable(_VariancePreserving):
    """A trained model's table of alpha^2 ("alpha-bar"), in continuous time.

    Forward step i of the table leads from s = i / timesteps to s = (i + 1) / timesteps, so timestep i of the network
    sits at s = (i + 1) / timesteps, and s = 0 is clean data. Between nodes log(alpha^2) is linear:
    beta is piecewise constant, and its integral over any step is log(alpha_bar(s0) / alpha_bar(s1)) exactly.

    Attributes:
        alphas_cumprod: alpha^2 of each timestep, strictly decreasing in (0, 1).
        final: alpha^2 where sampling ends: ``alphas_cumprod[0]`` (diffusers' set_alpha_to_one=False, as
            Stable Diffusion has it), or 1 (True), where the last step has no noise, hence no density.
        timestep_spacing: which timesteps a sampler of few steps visits: "leading" or "trailing".
        steps_offset: added to the timesteps of "leading".
    """

    alphas_cumprod: Float[Tensor, " timesteps"]
    final: float
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(
                "alphas_cumprod must have one dimension and two entries or more, "
                f"got {list(table.shape)}"
            )
        if not (bool((table > 0).all()) and bool((table < 1).all())):
            raise ValueError(
                f"alphas_cumprod must lie in (0, 1), got values from {table.min():g} to "
                f"{table.max():g}; at 0 (rescale_betas_zero_snr) predicted noise says nothing about the image"
            )
        if not bool((table.diff() < 0).all()):
            raise ValueError("alphas_cumprod must decrease strictly: noise grows with the timestep")
        if self.final not in (1.0, float(table[0])):
            raise ValueError(
                f"final must be alphas_cumprod[0] = {float(table[0])} or 1, got {self.final}"
            )
        if isinstance(self.steps_offset, bool) or not isinstance(self.steps_offset, int):
            raise TypeError(f"steps_offset must be an int, got {self.steps_offset!r}")
        if self.steps_offset < 0:
            raise ValueError(f"steps_offset must be at least 0, got {self.steps_offset}")

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> Self:
        """The table of a diffusers scheduler, whatever sampler it stands for.

        Raises:
            TypeError: ``scheduler`` has no ``alphas_cumprod``.
            ValueError: it clips its predictions, which a Gaussian transition cannot express.
        """
        table = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(table, Tensor):
            raise TypeError(
                f"scheduler must be a diffusers scheduler with alphas_cumprod, got {type(scheduler).__name__}; "
                "flow-matching models have none"
            )
        for option in ("clip_sample", "thresholding"):
            if scheduler.config.get(option, False):
                raise ValueError(
                    f"the scheduler has {option}=True, and clipped transitions are not Gaussian; "
                    f'set "{option}": false in its scheduler_config.json'
                )
        to_one = scheduler.config.get("set_alpha_to_one", True)  # diffusers' own default
        table = table.detach().double().cpu()
        return cls(
            alphas_cumprod=table,
            final=1.0 if to_one else float(table[0]),
            timestep_spacing=scheduler.config.get("timestep_spacing", "leading"),
            steps_offset=scheduler.config.get("steps_offset", 0),
        )

    @property
    def horizon(self) -> float:
        """One: the last timestep."""
        return 1.0

    @cached_property
    def _nodes(self) -> Float[Tensor, " nodes"]:
        """B at s = 0, 1/timesteps, ..., 1."""
        return torch.cat([self.alphas_cumprod.new_zeros(1), -self.alphas_cumprod.log()])

    def _interval(self, s: Times) -> Tensor:
        """Index of the piece (i, i + 1] / timesteps that holds s: at a node, the one towards the data."""
        count = len(self.alphas_cumprod)
        return (s * count - _ROUNDING).ceil().long().sub(1).clamp(0, count - 1)

    def g2(self, s: Times) -> Times:
        """Slope of B over the timestep that holds s; at a node, of the timestep towards the data."""
        slopes = len(self.alphas_cumprod) * self._nodes.diff()
        return slopes.to(s)[self._interval(s)]

    def integrated_beta(self, s: Times) -> Times:
        """-log(alpha^2), linear between the table's entries."""
        nodes, piece = self._nodes.to(s), self._interval(s)
        within = s * len(self.alphas_cumprod) - piece
        return nodes[piece] + within * (nodes[piece + 1] - nodes[piece])

    def times(self, timesteps: Tensor) -> Float[Tensor, " *shape"]:
        """Noising times of the network's timesteps, float64."""
        return (timesteps.double() + 1) / len(self.alphas_cumprod)
