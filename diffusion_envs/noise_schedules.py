"""Noise schedules: how much signal and noise is left at a noising time.

Setting      dY = k(s) Y ds + g(s) dB,  Y_s = alpha(s) Y_0 + sigma(s) eps,  s in [0, horizon];
             s = 0 is data.  k = d log alpha / ds,  g^2 = d sigma^2 / ds - 2 k sigma^2.
             Variance preserving: k = -beta / 2, g^2 = beta, alpha^2 = exp(-B), B(s) = int_0^s beta.
Conventions  Functions of a tensor of times, elementwise. RL time (``denoising``) runs backwards.
Sources      [S21] Song et al. 2021, score-based generative modeling through SDEs, arXiv 2011.13456.
             [ND21] Nichol & Dhariwal 2021, improved DDPM, arXiv 2102.09672.
             [L22] Liu, Gong & Liu 2022, rectified flow, arXiv 2209.03003.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Times: TypeAlias = Float[Tensor, " *shape"]
_ROUNDING = 1e-3  # of a timestep: how far round-off may carry a time past a node of a table


@runtime_checkable
class NoiseSchedule(Protocol):
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
    """beta grows linearly over [0, horizon] ([S21] appendix B); with equal ends it is constant."""

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
        """Signal 1 at every time."""
        return torch.ones_like(s)

    def sigma(self, s: Times) -> Times:
        """low sqrt(exp(rate s) - 1)."""
        return self.low * (self._rate * s).expm1().sqrt()

    def drift_coefficient(self, s: Times) -> Times:
        """No drift."""
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
    """alpha = 1 - s, sigma = s ([L22]), as the SDE with these marginals; it ends before s = 1."""

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
        """Noise s: the time itself."""
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


@dataclass(frozen=True)
class FlowTable(RectifiedFlow):
    """A trained rectified flow: x = (1 - s) x0 + s eps on all of [0, 1], pure noise at s = 1.

    At s = 1 no signal is left: the drift coefficient and g^2 are infinite there, the log-SNR minus
    infinity; alpha, sigma and the expected data are finite. The network is told 1000 s, as those of
    diffusers are.

    Attributes:
        shift: nodes stand at shift u / (1 + (shift - 1) u) for equally spaced u (Esser et al. 2024,
            arXiv 2403.03206, equation 23): above 1 more of them are noisy. Stable Diffusion 3: 3.
        end: noising time where sampling ends, 0 for clean data.
        num_train_timesteps: what the network is told at s = 1.
    """

    horizon: float = field(default=1.0, init=False)
    shift: float = 1.0
    end: float = 0.0
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        _check_positive(
            shift=float(self.shift), num_train_timesteps=float(self.num_train_timesteps)
        )
        if not 0 <= self.end < 1:
            raise ValueError(f"end must be in [0, 1), got {self.end}: 0 is clean data")

    def nodes(self, steps: int) -> Float[Tensor, " nodes"]:
        """Noising times of a sampler of so many steps, from 1 to ``end``, float64.

        diffusers' FlowMatchEulerDiscreteScheduler spaces ``steps`` of them between 1 and (shifted)
        1 / num_train_timesteps, and ends at 0 after those.

        Raises:
            ValueError: ``steps`` is not an integer of at least 2.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
            raise ValueError(
                f"steps must be an integer of at least 2, got {steps!r}: one step from pure noise "
                "has no path KL"
            )
        first = self.end / (self.shift - (self.shift - 1) * self.end)  # shifted to ``end``
        u = torch.linspace(1.0, first, steps + 1, dtype=torch.float64)
        return self.shift * u / (1 + (self.shift - 1) * u)


@dataclass(frozen=True, eq=False)
class DDPMTable(_VariancePreserving):
    """A trained model's table of alpha^2 ("alpha-bar"), in continuous time on [0, 1].

    Forward step i of n leads from s = i / n to s = (i + 1) / n, so timestep i of the network stands
    at s = (i + 1) / n, and s = 0 is clean data. Between nodes log(alpha^2) is linear: beta is
    piecewise constant, its integral over any step log(alpha_bar(s0) / alpha_bar(s1)) exactly.

    Attributes:
        alphas_cumprod: alpha^2 by timestep, strictly decreasing in (0, 1).
        final_is_one: sampling ends at s = 0, where alpha^2 = 1 and the last transition has no
            noise, hence no density (diffusers' set_alpha_to_one); if false at s = 1 / n, as Stable
            Diffusion does.
        steps_offset: added to the timesteps of "leading" spacing.
        spacing: which timesteps a sampler of few steps visits, "leading" or "trailing".
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
            raise ValueError(
                "alphas_cumprod must decrease strictly within (0, 1); a table that ends at 0 "
                "(rescale_betas_zero_snr) has no score at its last timestep"
            )
        if self.spacing not in ("leading", "trailing"):
            raise ValueError(f"spacing must be 'leading' or 'trailing', got {self.spacing!r}")
        if isinstance(self.steps_offset, bool) or not isinstance(self.steps_offset, int):
            raise TypeError(f"steps_offset must be an int, got {self.steps_offset!r}")
        if self.steps_offset < 0:
            raise ValueError(f"steps_offset must be at least 0, got {self.steps_offset}")

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> "DDPMTable":
        """The table of any diffusers scheduler that has one, as its DDIM would read it.

        "linspace" spacing is read as "leading": with it the steps of diffusers' DDIM do not meet.

        Raises:
            ValueError: the scheduler has no table, or clips its predictions.
        """
        table = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(table, Tensor):
            raise ValueError(
                f"{type(scheduler).__name__} has no table of alphas_cumprod; it must be the "
                "scheduler of a model trained with one (DDIM, DDPM, PNDM, DPM++, ...), not of flow "
                "matching"
            )
        config = scheduler.config
        for option in ("clip_sample", "thresholding"):
            if config.get(option, False):
                raise ValueError(
                    f"the scheduler must not clip: {option} is true, and a clipped transition is "
                    f'not Gaussian; set "{option}": false in scheduler_config.json'
                )
        spacing = config.get("timestep_spacing", "leading")
        return cls(
            table.detach().double().cpu(),
            final_is_one=bool(config.get("set_alpha_to_one", True)),  # diffusers' default
            steps_offset=int(config.get("steps_offset", 0)),
            spacing=spacing if spacing == "trailing" else "leading",
        )

    @cached_property
    def _nodes(self) -> Float[Tensor, " nodes"]:
        """B at s = 0, 1 / n, ..., 1."""
        return torch.cat([self.alphas_cumprod.new_zeros(1), -self.alphas_cumprod.log()])

    def _piece(self, s: Times) -> Tensor:
        """Index i of the piece (i / n, (i + 1) / n] that holds s."""
        count = len(self.alphas_cumprod)
        return (s * count - _ROUNDING).ceil().long().sub(1).clamp(0, count - 1)

    def g2(self, s: Times) -> Times:
        """Piecewise constant; at a node, the value towards data (where a step of sampling goes)."""
        slopes = len(self.alphas_cumprod) * self._nodes.diff()
        return slopes.to(s)[self._piece(s)]

    def integrated_beta(self, s: Times) -> Times:
        """-log(alpha^2), linear between the table's entries."""
        nodes, piece = self._nodes.to(s), self._piece(s)
        share = s * len(self.alphas_cumprod) - piece
        return nodes[piece] * (1 - share) + nodes[piece + 1] * share

    @cached_property
    def _bends(self) -> Float[Tensor, " pieces"]:
        """Half of the second difference of log(alpha^2) in every piece between two timesteps."""
        logs = self.alphas_cumprod.log()
        second = logs.diff(n=2)
        if len(second) == 0:
            return torch.zeros_like(logs[1:])
        mean = 0.5 * (torch.cat([second[:1], second]) + torch.cat([second, second[-1:]]))
        limit = 0.5 * logs.diff().abs()  # so that it decreases between timesteps, on any table
        return torch.clamp(0.5 * mean, -limit, limit)

    def log_alpha_bar_at(self, timesteps: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """log(alpha^2) at timesteps that need not be integers, in their dtype.

        It is the table's at integers and smooth between them (cubic through four entries). Where
        betas grow linearly it is the log-Gamma continuation of Kong & Ping 2021 (arXiv 2106.00132,
        section 3.1) to 1e-8, without its cancellation; it is also what a network interpolates,
        whose timesteps are embedded smoothly. ``integrated_beta`` is linear between the entries.
        Values of ``timesteps`` are not checked; beyond the table the outer pieces go on.
        """
        logs, bends = self.alphas_cumprod.log().to(timesteps), self._bends.to(timesteps)
        piece = timesteps.floor().long().clamp(0, len(bends) - 1)
        share = timesteps - piece
        return (
            (1 - share) * logs[piece]
            + share * logs[piece + 1]
            - (bends[piece] * share * (1 - share))
        )

    def timesteps_of(self, log_alpha_bar: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The inverse of ``log_alpha_bar_at``: timesteps, not integers, of noise levels.

        Raises:
            ValueError: a level is noisier than the table's last entry, or less noisy than its first
                (by more than 1 % of the noise there, which float32 tables need).
        """
        logs, bends = self.alphas_cumprod.log().to(log_alpha_bar), self._bends.to(log_alpha_bar)
        inside = (log_alpha_bar >= logs[-1] - 1e-6) & (log_alpha_bar <= 0.99 * logs[0])
        if not bool(inside.all()):
            worst = float(log_alpha_bar[~inside][0].exp())
            raise ValueError(
                f"alpha-bar {worst:.6g} is not between the table's last entry, "
                f"{float(logs[-1].exp()):.6g}, and its first, {float(logs[0].exp()):.6g}: the "
                "network was not trained at that amount of noise; use DDIM, or a model with betas "
                "from 1e-4 to 0.02"
            )
        piece = torch.searchsorted(-logs, -log_alpha_bar).sub(1).clamp(0, len(bends) - 1)
        bend = bends[piece]  # level = logs + slope share + bend share^2, slope below zero
        slope, drop = logs[piece + 1] - logs[piece] - bend, logs[piece] - log_alpha_bar
        root = (slope.square() - 4 * bend * drop).clamp(min=0).sqrt()
        return (piece + 2 * drop / (root - slope)).clamp(0, len(bends))

    def noising_times_of(self, integrated_beta: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The inverse of ``integrated_beta``, for values within the table's."""
        nodes = self._nodes.to(integrated_beta)
        piece = torch.searchsorted(nodes, integrated_beta).sub(1).clamp(0, len(nodes) - 2)
        share = (integrated_beta - nodes[piece]) / (nodes[piece + 1] - nodes[piece])
        return (piece + share) / len(self.alphas_cumprod)

    def timesteps(self, steps: int) -> tuple[int, ...]:
        """The timesteps of a sampler of so many steps, largest first, as diffusers chooses them.

        Raises:
            ValueError: ``steps`` is not between 1 and what the table can give.
        """
        count = len(self.alphas_cumprod)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= count:
            raise ValueError(f"steps must be an integer from 1 to {count}, got {steps!r}")
        if self.spacing == "trailing":
            # numpy's arange and rounding, as in diffusers: elsewhere ties fall otherwise
            marks = np.arange(count, 0, -count / steps).round()[:steps]
            return tuple(int(mark) - 1 for mark in marks)
        ratio = count // steps
        largest = (steps - 1) * ratio + self.steps_offset
        if largest >= count:
            raise ValueError(
                f"steps = {steps} with steps_offset = {self.steps_offset} would begin at timestep "
                f"{largest}, beyond the table's last, {count - 1}; use fewer steps, or "
                "steps_offset = 0"
            )
        return tuple(range(largest, self.steps_offset - 1, -ratio))

    def last_noising_time(self, steps: int) -> float:
        """Where a sampler of so many steps ends, as in diffusers: the end of the table.

        With "leading" spacing and timesteps one apart, the offset leaves an entry before it.
        """
        count = len(self.alphas_cumprod)
        beyond = self.timesteps(steps)[-1] - count // steps
        if self.spacing == "leading" and beyond >= 0:
            return (beyond + 1) / count
        return 0.0 if self.final_is_one else 1 / count
