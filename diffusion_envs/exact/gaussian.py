"""Exactly solvable diffusion models: Gaussian data, and rewards that are quadratic.

Setting      Data N(m, S), noised N(alpha m, v) with v = alpha^2 S + sigma^2; its score is affine.
             Rewards r(x) = -x'Qx/2 + l'x + const, paid at the end; kl_weight per nat of path KL.
Conventions  Noising times s; a sampler runs from larger to smaller ones; eta as in ``denoising``.
             Leading dimensions are batches. For round-off's sake, float64.
Sources      Bayes' rule and Ito's formula. That the KL-regularised optimum tilts the data:
             Uehara et al. 2024, fine-tuning as entropy-regularised control, arXiv 2402.15194.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.linear.margin import margin, solve
from diffusion_envs.noise_schedules import NoiseSchedule

Vector: TypeAlias = Float[Tensor, "*batch dim"]
Matrix: TypeAlias = Float[Tensor, "*batch dim dim"]


def _quadratic_form(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("...i,...ij,...j->...", x, matrix, x)


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("...ij,...j->...i", matrix, x)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, covariance)."""

    mean: Vector
    covariance: Matrix

    def __post_init__(self) -> None:
        if self.covariance.shape != (*self.mean.shape, self.mean.shape[-1]):
            raise ValueError(
                f"covariance must be [*batch, dim, dim] to fit mean {list(self.mean.shape)}, got "
                f"{list(self.covariance.shape)}"
            )

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors (columns) of the covariance."""
        if not bool(torch.isfinite(self.covariance).all()):
            raise ValueError(f"covariance must be finite, got {self.covariance.tolist()}")
        values, vectors = torch.linalg.eigh(self.covariance)
        size = values.detach().abs().amax(-1, keepdim=True)
        if not bool((values >= -margin(values.shape[-1], size)).all()):
            raise ValueError(
                f"covariance must be positive semidefinite, got eigenvalues {values.tolist()}"
            )
        return values.clamp(min=0), vectors  # round-off of a singular one


@dataclass(frozen=True, eq=False)
class Quadratic:
    """x -> -x' curvature x / 2 + slope' x + constant: rewards and values."""

    curvature: Matrix
    slope: Vector
    constant: Float[Tensor, "*batch"]

    def __call__(self, x: Vector) -> Float[Tensor, "*batch"]:
        """Its value at x."""
        linear = (self.slope * x).sum(-1)
        return -0.5 * _quadratic_form(self.curvature, x) + linear + self.constant

    def gradient(self, x: Vector) -> Vector:
        """Its gradient at x."""
        return self.slope - _apply(self.curvature, x)

    def expectation(self, law: Gaussian) -> Float[Tensor, "*batch"]:
        """E[self(X)], X of this law."""
        variance = torch.einsum("...ij,...ji->...", self.curvature, law.covariance)
        return self(law.mean) - 0.5 * variance

    def before(self, step: "Affine") -> "Quadratic":
        """x -> E[self(X')], X' one step after x."""
        carried = self.slope - _apply(self.curvature, step.shift)
        variance = torch.einsum("...ij,...ji->...", self.curvature, step.covariance)
        return Quadratic(
            step.matrix.mT @ self.curvature @ step.matrix,
            _apply(step.matrix.mT, carried),
            self(step.shift) - 0.5 * variance,
        )

    def __add__(self, other: "Quadratic") -> "Quadratic":
        return Quadratic(
            self.curvature + other.curvature,
            self.slope + other.slope,
            self.constant + other.constant,
        )


@dataclass(frozen=True, eq=False)
class Affine:
    """A Gaussian step: X' = matrix X + shift + N(0, covariance)."""

    matrix: Matrix
    shift: Vector
    covariance: Matrix

    def after(self, law: Gaussian) -> Gaussian:
        """The law of X' if X has this one."""
        return Gaussian(
            _apply(self.matrix, law.mean) + self.shift,
            self.matrix @ law.covariance @ self.matrix.mT + self.covariance,
        )

    def __getitem__(self, index: int) -> "Affine":
        return Affine(self.matrix[index], self.shift[index], self.covariance[index])


# -- the pretrained model -------------------------------------------------------------------------


def _noised_spectrum(data: Gaussian, schedule: NoiseSchedule, s: Tensor) -> Tensor:
    """Eigenvalues of the noised covariance, [*times, dim]."""
    alpha, sigma = schedule.alpha(s)[..., None], schedule.sigma(s)[..., None]
    return alpha.square() * data.spectrum[0] + sigma.square()


def _with_spectrum(data: Gaussian, values: Tensor) -> Tensor:
    """The matrix that has the data's eigenvectors and these eigenvalues."""
    vectors = data.spectrum[1]
    return (vectors * values[..., None, :]) @ vectors.mT


def marginal(data: Gaussian, schedule: NoiseSchedule, s: Float[Tensor, "*times"]) -> Gaussian:
    """Law of the data noised to s."""
    mean = schedule.alpha(s)[..., None] * data.mean
    return Gaussian(mean, _with_spectrum(data, _noised_spectrum(data, schedule, s)))


def score_coefficients(
    data: Gaussian, schedule: NoiseSchedule, s: Float[Tensor, "*times"]
) -> tuple[Float[Tensor, "*times dim dim"], Float[Tensor, "*times dim"]]:
    """(matrix, shift) of the score x -> matrix x + shift of the data noised to s."""
    matrix = _with_spectrum(data, -1 / _noised_spectrum(data, schedule, s))
    return matrix, -_apply(matrix, schedule.alpha(s)[..., None] * data.mean)


def denoised_coefficients(
    data: Gaussian, schedule: NoiseSchedule, s: Float[Tensor, "*times"]
) -> tuple[Float[Tensor, "*times dim dim"], Float[Tensor, "*times dim"]]:
    """(matrix, shift) of the expected data x -> matrix x + shift given the data noised to s.

    Finite where no signal is left: the data's mean, whatever x.
    """
    alpha = schedule.alpha(s)[..., None]
    gains = alpha * data.spectrum[0] / _noised_spectrum(data, schedule, s)
    matrix = _with_spectrum(data, gains)
    return matrix, data.mean - _apply(matrix, alpha * data.mean)


def score(
    data: Gaussian, schedule: NoiseSchedule, s: Float[Tensor, ""], x: Float[Tensor, "paths dim"]
) -> Float[Tensor, "paths dim"]:
    """Score of the data noised to s, 1/state."""
    matrix, shift = score_coefficients(data, schedule, s)
    return _apply(matrix, x) + shift


def transition(
    data: Gaussian,
    schedule: NoiseSchedule,
    s_from: Float[Tensor, "*times"],
    s_to: Float[Tensor, "*times"],
    eta: float = 1.0,
) -> Affine:
    """The generation SDE's exact transition under the exact score; eta = 0: probability flow.

    Along each eigenvector of S the matrix is
        (alpha_from / alpha_to)^(eta^2) (v_to / v_from)^((1 + eta^2) / 2),
    and mean and covariance are what carries one marginal to the other. With ``s_to`` = 0 and
    eta = 1 it is the posterior of the data, whose mean is Tweedie's.
    """
    first, last = (_noised_spectrum(data, schedule, s) for s in (s_from, s_to))
    signal = (schedule.alpha(s_from) / schedule.alpha(s_to))[..., None]
    values = signal ** (eta**2) * (last / first) ** ((1 + eta**2) / 2)
    matrix = _with_spectrum(data, values)
    carried = _apply(matrix, schedule.alpha(s_from)[..., None] * data.mean)
    return Affine(
        matrix,
        schedule.alpha(s_to)[..., None] * data.mean - carried,
        _with_spectrum(data, last - values.square() * first),
    )


def shift_response(
    data: Gaussian, schedule: NoiseSchedule, s_from: Float[Tensor, ""], s_to: Float[Tensor, ""]
) -> Float[Tensor, "dim dim"]:
    """d(mean at s_to) / dc if score + c is played from s_from on; eta = 1, variance preserving.

    Along an eigenvector of S with eigenvalue w it is the integral of F g^2, by da = -beta a / 2 ds
        (v_to / alpha_to) int_{alpha_from}^{alpha_to} 2 da / (1 + (w - 1) a^2).
    """
    values = data.spectrum[0]
    root = (values - 1).abs().sqrt()
    safe = torch.where(root == 0, torch.ones_like(root), root)

    def primitive(a: Tensor) -> Tensor:
        inside = torch.where(values > 1, (safe * a).atan(), (root * a).atanh()) / safe
        return 2 * torch.where(root == 0, a * torch.ones_like(root), inside)

    low, high = schedule.alpha(s_from), schedule.alpha(s_to)
    gain = _noised_spectrum(data, schedule, s_to) / high
    return _with_spectrum(data, gain * (primitive(high) - primitive(low)))


# -- the KL-regularised optimum -------------------------------------------------------------------


_NO_MASS = "the tilt has no finite mass, the reward grows faster than the law's tails fall"


def _require_finite_mass(root: Tensor, curvature: Tensor, kl_weight: float) -> None:
    """1 + root (Q / kl_weight) root > 0, root the square root of a law's covariance."""
    if not 0 < kl_weight < math.inf:
        raise ValueError(f"kl_weight must be positive and finite, got {kl_weight}")
    inner = torch.eye(len(root)).to(root) + root @ curvature @ root / kl_weight
    size = 1 + root.square().sum() * curvature.square().sum().sqrt() / kl_weight
    if not bool(torch.isfinite(size)):
        raise ValueError(f"covariance, curvature / kl_weight = {kl_weight} must not overflow")
    least = torch.linalg.eigvalsh(inner).min()
    if not bool(least > margin(len(root), size)):
        raise ValueError(f"{_NO_MASS}; raise kl_weight, got {kl_weight}")


def tilt(data: Gaussian, reward: Quadratic, kl_weight: float) -> Gaussian:
    """The law proportional to data * exp(reward / kl_weight).

    Raises:
        ValueError: ``kl_weight`` is not positive, or the tilt cannot be normalised.
    """
    values, vectors = data.spectrum
    root = (vectors * values.sqrt()) @ vectors.mT
    _require_finite_mass(root, reward.curvature, kl_weight)
    inner = torch.eye(len(values)).to(values) + root @ reward.curvature @ root / kl_weight
    covariance = root @ solve(inner, root, _NO_MASS)
    # S^{-1} m without inverting S: m* = m + S* gradient(m) / kl_weight
    mean = data.mean + _apply(covariance, reward.gradient(data.mean)) / kl_weight
    return Gaussian(mean, 0.5 * (covariance + covariance.mT))


def optimal_value(
    data: Gaussian,
    schedule: NoiseSchedule,
    reward: Quadratic,
    kl_weight: float,
    s: Float[Tensor, ""],
    s_end: Float[Tensor, ""],
) -> Quadratic:
    """V* at s: kl_weight log E[exp(reward(X_end) / kl_weight)] under the pretrained model, eta = 1.

    The optimal score is score + gradient V* / kl_weight, that of the noised tilt if ``s_end`` is 0.

    Raises:
        ValueError: ``kl_weight`` is not positive, or the value is infinite: the reward grows faster
            than the tails of X_end given X_s fall. It may be finite where the tilt is not.
    """
    step = transition(data, schedule, s, s_end)
    variances, vectors = torch.linalg.eigh(step.covariance.detach())
    root = (vectors * variances.clamp(min=0).sqrt()) @ vectors.mT
    _require_finite_mass(root, reward.curvature.detach(), kl_weight)
    curvature, slope = reward.curvature / kl_weight, reward.slope / kl_weight
    inner = torch.eye(len(slope)).to(slope) + step.covariance @ curvature
    solved = solve(inner, torch.eye(len(slope)).to(slope), _NO_MASS)
    bent = curvature @ solved
    ahead = Quadratic(  # in the mean of X_end given x
        kl_weight * bent,
        kl_weight * _apply(solved.mT, slope),
        reward.constant
        + kl_weight
        * 0.5
        * (_quadratic_form(solved @ step.covariance, slope) - torch.linalg.slogdet(inner)[1]),
    )
    return ahead.before(Affine(step.matrix, step.shift, torch.zeros_like(step.covariance)))
