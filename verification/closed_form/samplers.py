"""Samplers of Gaussian data, step by step: what a chain does, and what is left as steps shrink.

A noising schedule is given by its numbers at the nodes, s_0 > s_1 > ... (noise to data):
    alpha, sigma      Y_s = alpha Y_0 + sigma eps
    k, g2             dY = k Y ds + sqrt(g2) dB
Data N(mean, covariance); score of Y_s:  -(alpha^2 covariance + sigma^2)^{-1} (x - alpha mean)

    Euler-Maruyama    X' = X + h (-k X + (1 + eta^2) / 2 g2 score) + eta sqrt(g2 h) z
    DDIM              X' = alpha' x0 + sqrt(sigma'^2 - c^2) eps + c z, x0 and eps predicted from X,
                      c = eta (sigma' / sigma) sqrt(1 - (alpha / alpha')^2)
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np
from scipy.integrate import solve_ivp

from verification.answers import remembered
from verification.closed_form.gaussian_law import Normal, Transition
from verification.closed_form.vp_gaussian import VPGaussian

EULER_GAMMA = 0.5772156649015329


def rates(model: VPGaussian, s: np.ndarray) -> np.ndarray:
    """beta at all these noising times."""
    return model.beta_start + (model.beta_end - model.beta_start) / model.horizon * s


def integrated_rates(model: VPGaussian, s: np.ndarray) -> np.ndarray:
    """Int of beta from 0 to each of these noising times: -log(alpha^2)."""
    return 0.5 * (model.beta_start + rates(model, s)) * s


@dataclass(frozen=True, eq=False)
class Nodes:
    """A schedule's numbers at the nodes of a sampler, largest noising time first, all [nodes]."""

    s: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    k: np.ndarray
    g2: np.ndarray

    @classmethod
    def of(cls, model: VPGaussian, s: Iterable[float]) -> "Nodes":
        """Those of a variance-preserving model."""
        times = np.array(list(s), dtype=np.float64)
        beta, exponent = rates(model, times), integrated_rates(model, times)
        alpha, sigma = np.exp(-0.5 * exponent), np.sqrt(-np.expm1(-exponent))
        return cls(times, alpha, sigma, -0.5 * beta, beta)


def uniform(model: VPGaussian, steps: int) -> Nodes:
    """So many equal steps from the horizon to the data."""
    return Nodes.of(model, np.linspace(model.horizon, 0.0, steps + 1))


def euler_steps(
    data: Normal, nodes: Nodes, eta: float = 1.0, shift: np.ndarray | float = 0.0
) -> Iterator[Transition]:
    """Each step of Euler-Maruyama under score + shift."""
    unit = np.eye(len(data.mean))
    for j, h in enumerate(-np.diff(nodes.s)):
        alpha, sigma, k, g2 = (v[j] for v in (nodes.alpha, nodes.sigma, nodes.k, nodes.g2))
        precision = np.linalg.inv(alpha**2 * data.covariance + sigma**2 * unit)
        push = 0.5 * (1 + eta**2) * g2 * h
        yield Transition(
            (1 - k * h) * unit - push * precision,
            push * (alpha * precision @ data.mean + shift),
            eta**2 * g2 * h * unit,
        )


def ddim_steps(
    data: Normal, nodes: Nodes, eta: float, shift: np.ndarray | float = 0.0
) -> Iterator[Transition]:
    """Each step of DDIM under score + shift, by way of the predictions x0 and eps."""
    unit = np.eye(len(data.mean))
    for j in range(len(nodes.s) - 1):
        a, after = nodes.alpha[j], nodes.alpha[j + 1]
        noise, noise_after = nodes.sigma[j], nodes.sigma[j + 1]
        precision = np.linalg.inv(a**2 * data.covariance + noise**2 * unit)
        # eps = -sigma score, as an affine function of x; then x0 = (x - sigma eps) / alpha
        eps = noise * precision, -noise * (a * precision @ data.mean + shift)
        x0 = (unit - noise * eps[0]) / a, -noise * eps[1] / a
        c = eta * noise_after / noise * np.sqrt(1 - (a / after) ** 2)
        direct = np.sqrt(max(noise_after**2 - c**2, 0.0))
        yield Transition(
            after * x0[0] + direct * eps[0], after * x0[1] + direct * eps[1], c**2 * unit
        )


def whole(steps: Iterable[Transition]) -> Transition:
    """All steps in a row."""
    return reduce(Transition.then, steps)


def eta_transition(model: VPGaussian, s_from: float, s_to: float, eta: float) -> Transition:
    """Transition of dX = (-k X + (1 + eta^2) / 2 g2 score) dt + eta sqrt(g2) dW on the data's axes.

    d log F = (beta / 2 - (1 + eta^2) / 2 beta / v) dt for an axis of noised variance v, and
    d log v = -(beta / v - beta) dt, d log alpha = beta / 2 dt; so
    F = (alpha_from / alpha_to)^(eta^2) (v_to / v_from)^((1 + eta^2) / 2).
    """
    values, axes = np.linalg.eigh(model.covariance)
    before, after = (model.alpha(s) ** 2 * values + model.sigma(s) ** 2 for s in (s_from, s_to))
    signal = model.alpha(s_from) / model.alpha(s_to)
    f = signal ** (eta**2) * (after / before) ** (0.5 * (1 + eta**2))
    F = axes @ np.diag(f) @ axes.T
    C = axes @ np.diag(after - f**2 * before) @ axes.T
    return Transition(F, model.noised(s_to).mean - F @ model.noised(s_from).mean, C)


@remembered
def shift_response(model: VPGaussian, eta: float) -> float:
    """Shift of the mean of one-dimensional data by score + 1, int F (1 + eta^2) / 2 beta ds.

    By quadrature in log(alpha), where the integrand is tame at both ends.
    """
    variance = float(model.covariance[0, 0])
    nodes, weights = np.polynomial.legendre.leggauss(400)
    low = np.log(model.alpha(model.horizon))
    log_alpha = 0.5 * low * (1 - nodes)  # beta ds = -2 d log(alpha)
    alpha = np.exp(log_alpha)
    noised_variance = alpha**2 * variance + 1 - alpha**2
    F = alpha ** (eta**2) * (variance / noised_variance) ** (0.5 * (1 + eta**2))
    return float(-0.5 * low * (weights @ (F * (1 + eta**2))))


def sde_response(variance: float, alpha: float) -> float:
    """``shift_response`` at eta = 1: an arcus tangens, hyperbolic for variances below 1."""
    r = np.sqrt(abs(variance - 1))
    arc = np.arctan if variance > 1 else np.arctanh
    return float(2 * variance / r * (arc(r) - arc(r * alpha)))


def ode_response(variance: float, alpha: float) -> float:
    """``shift_response`` at eta = 0: grows like log(1 / alpha)."""

    def primitive(a: float) -> float:
        return float(np.log(a / (1 + np.sqrt(1 + (variance - 1) * a**2))))

    return float(np.sqrt(variance)) * (primitive(1.0) - primitive(alpha))


@dataclass(frozen=True, eq=False)
class Chain:
    """A chain in one dimension: x' = slope x + offset + N(0, variance), all [steps]."""

    slope: np.ndarray
    offset: np.ndarray
    variance: np.ndarray

    def moments(self, law: Normal) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance at every node, [nodes]."""
        means, variances = [float(law.mean[0])], [float(law.covariance[0, 0])]
        for f, g, c in zip(*(v.tolist() for v in vars(self).values()), strict=True):
            means.append(f * means[-1] + g)
            variances.append(f**2 * variances[-1] + c)
        return np.array(means), np.array(variances)

    def kl(self, reference: "Chain", law: Normal) -> float:
        """KL of this chain from another with the same start: of all states together, nats."""
        means, variances = (v[:-1] for v in self.moments(law))
        ratio = self.variance / reference.variance
        slope, offset = self.slope - reference.slope, self.offset - reference.offset
        gap = (slope * means + offset) ** 2 + slope**2 * variances
        return float(0.5 * np.sum(ratio - 1 - np.log(ratio) + gap / reference.variance))


def exact_chain(model: VPGaussian, s: np.ndarray) -> Chain:
    """The generation SDE at these noising times: conditioning in the noising process."""
    alpha = np.exp(-0.5 * integrated_rates(model, s))
    data_mean, data_variance = float(model.mean[0]), float(model.covariance[0, 0])
    variance = alpha**2 * data_variance + 1 - alpha**2
    slope = alpha[:-1] / alpha[1:] * variance[1:] / variance[:-1]
    offset = (alpha[1:] - slope * alpha[:-1]) * data_mean
    return Chain(slope, offset, variance[1:] - slope**2 * variance[:-1])


def ddpm_chain(model: VPGaussian, s: np.ndarray) -> Chain:
    """DDPM: the posterior q(x' | x, x0) at the predicted x0, with its variance beta-tilde."""
    alpha_bar = np.exp(-integrated_rates(model, s))
    data_mean, data_variance = float(model.mean[0]), float(model.covariance[0, 0])
    before, after = alpha_bar[:-1], alpha_bar[1:]
    beta = 1 - before / after
    by_x0 = np.sqrt(after) * beta / (1 - before)
    by_x = np.sqrt(1 - beta) * (1 - after) / (1 - before)
    share = np.sqrt(before) * data_variance / (before * data_variance + 1 - before)
    x0_offset = data_mean * (1 - np.sqrt(before) * share)
    tilde = (1 - after) / (1 - before) * beta
    return Chain(by_x + by_x0 * share, by_x0 * x0_offset, tilde)


def euler_chain(model: VPGaussian, s: np.ndarray) -> Chain:
    """Euler-Maruyama of the generation SDE."""
    h, s = -np.diff(s), s[:-1]
    beta, alpha = rates(model, s), np.exp(-0.5 * integrated_rates(model, s))
    variance = alpha**2 * float(model.covariance[0, 0]) + 1 - alpha**2
    slope = 1 + h * beta * (0.5 - 1 / variance)
    return Chain(slope, h * beta * alpha * float(model.mean[0]) / variance, h * beta)


def response_of_steps(model: VPGaussian, steps: int, trained: int) -> float:
    """Shift of the data's mean under Euler steps, the score shifted by 1 at some nodes.

    Those of the grid of ``trained`` steps, which a table with one entry a step knows; elsewhere the
    score is the pretrained one.
    """
    s = np.linspace(1.0, 0.0, steps + 1)
    slopes, pushes = euler_chain(model, s).slope, -np.diff(s) * rates(model, s[:-1])
    response = 0.0
    for k in range(steps):
        known = (k * trained) % steps == 0
        response = slopes[k] * response + pushes[k] * known
    return float(response)


def best_euler_shift(
    model: VPGaussian, steps: int, curvature: float, slope: float, kl_weight: float
) -> tuple[float, float]:
    """The constant shift c of the score that is best for Euler steps, and -d^2 J / dc^2.

    J(c) = E[-curvature X^2 / 2 + slope X] - kl_weight c^2 / 2 sum beta h, quadratic in c, and the
    mean of X is linear in it.
    """
    s = np.linspace(1.0, 0.0, steps + 1)
    mean = euler_chain(model, s).moments(model.noised(1.0))[0][-1]
    response = response_of_steps(model, steps, steps)
    cost = kl_weight * float(-np.diff(s) @ rates(model, s[:-1]))
    bend = curvature * response**2 + cost
    return (slope - curvature * mean) * response / bend, bend


def drawn_steps(
    data: Normal, nodes: Nodes, std: float, eta: float | None = None
) -> Iterator[Transition]:
    """Each step if the score is drawn, N(score, std^2): of Euler-Maruyama, or of DDIM at eta.

    The score enters a step linearly; how much so is read off a shift of 1.
    """
    one = np.ones(len(data.mean))
    pairs = (
        zip(euler_steps(data, nodes), euler_steps(data, nodes, shift=one), strict=True)
        if eta is None
        else zip(ddim_steps(data, nodes, eta), ddim_steps(data, nodes, eta, one), strict=True)
    )
    for plain, shifted in pairs:
        gain = shifted.f - plain.f
        yield Transition(plain.F, plain.f, plain.C + np.diag((gain * std) ** 2))


def inflation(model: VPGaussian, std: float) -> float:
    """Int F g^4 std^2 F' dt of one-dimensional data, F from noising time s to the data."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    total = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        s = 0.5 * model.horizon * (1 + node)
        F = model.transition(s, 0.0).F[0, 0]
        total += 0.5 * model.horizon * weight * (F * model.beta(s) * std) ** 2
    return total


def ddim_law(
    nodes: Nodes, eta: float, step: np.ndarray, x: np.ndarray, score: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of DDIM's next state of each row, whose step is ``step[row]``."""
    a, after = nodes.alpha[step][:, None], nodes.alpha[step + 1][:, None]
    noise, noise_after = nodes.sigma[step][:, None], nodes.sigma[step + 1][:, None]
    eps = -noise * score
    x0 = (x - noise * eps) / a
    c = eta * noise_after / noise * np.sqrt(1 - (a / after) ** 2)
    return after * x0 + np.sqrt(noise_after**2 - c**2) * eps, c + 0 * x


def guided_law(model: VPGaussian, conditional: Normal, scale: float, start: Normal) -> Normal:
    """Law at the data of one-dimensional generation under guidance, by its moment equations.

    Score: that of the model's data plus ``scale`` times what the conditional one's adds to it.
    """
    laws = (Normal(model.mean, model.covariance), conditional)
    means, variances = (np.array(v).reshape(2) for v in zip(*laws, strict=True))
    weights = np.array([1 - scale, scale])

    def slopes(t: float, y: np.ndarray) -> list[float]:
        s = model.horizon - t
        beta = model.beta_start + (model.beta_end - model.beta_start) * s / model.horizon
        alpha = np.exp(-0.25 * (model.beta_start + beta) * s)
        precisions = weights / (alpha**2 * variances + 1 - alpha**2)
        a, b = 0.5 - precisions.sum(), alpha * (precisions @ means)
        return [beta * (a * y[0] + b), beta * (2 * a * y[1] + 1)]

    began = [start.mean[0], start.covariance[0, 0]]
    end = solve_ivp(slopes, (0, model.horizon), began, rtol=1e-11, atol=1e-12, method="DOP853").y[
        :, -1
    ]
    return Normal(end[:1], end[1:, None])


def power_law(unconditional: Normal, conditional: Normal, scale: float) -> Normal:
    """The law proportional to p(x)^(1 - scale) p(x | c)^scale, in one dimension."""
    first, second = (1 / law.covariance[0, 0] for law in (unconditional, conditional))
    precision = (1 - scale) * first + scale * second
    pull = (1 - scale) * first * unconditional.mean + scale * second * conditional.mean
    return Normal(pull / precision, np.array([[1 / precision]]))
