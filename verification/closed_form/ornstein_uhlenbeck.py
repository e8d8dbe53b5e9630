"""Divergences of two Ornstein-Uhlenbeck laws: of the Euler chain, and in continuous time.

Law 1   dX = (shift - pull X) dt + noise dW,   law 0 with reference_shift, reference_pull
Start   N(mean, std^2) under both

Continuous time: with p, p_ref the densities of X_t under law 1 and 0, b, b_ref their drifts, a path
is its end and then its reversal, whose drift is -b + noise^2 grad log p. Hence
    KL(path) - KL(X_T) = 1/2 int E | (b - b_ref) / noise - noise grad log(p / p_ref) |^2 dt
(the time reversal of Anderson 1982 under Girsanov's theorem), with grad log p in closed form.
"""

from dataclasses import dataclass

import numpy as np
from scipy.integrate import quad

from verification.closed_form.gaussian_law import Normal, kl


@dataclass(frozen=True)
class OrnsteinUhlenbeck:
    """The numbers of both laws; no two of them equal, none 0 or 1."""

    pull: float = 1.3
    shift: float = 0.35
    reference_pull: float = 0.4
    reference_shift: float = -0.15
    noise: float = 0.7
    mean: float = 0.6
    std: float = 0.3


def euler_path_kl(p: OrnsteinUhlenbeck, nodes: np.ndarray) -> float:
    """KL of the Euler chains on these nodes, by a recursion of mean and variance, nats."""
    total, mean, variance = 0.0, p.mean, p.std**2
    slope, constant = p.reference_pull - p.pull, p.shift - p.reference_shift
    for h in np.diff(nodes):
        gap = (constant + slope * mean) ** 2 + slope**2 * variance
        total += gap * h / (2 * p.noise**2)
        mean = mean + h * (p.shift - p.pull * mean)
        variance = (1 - p.pull * h) ** 2 * variance + p.noise**2 * h
    return total


def euler_law(
    pull: float, shift: float | np.ndarray, noise: float, mean: float, std: float, nodes: np.ndarray
) -> Normal:
    """The joint law of an Euler chain at all nodes; ``shift`` one number, or one a step."""
    steps = np.diff(nodes)
    shifts = np.broadcast_to(shift, steps.shape)
    means = [mean]
    loads = [np.append(std, np.zeros(len(steps)))]  # on the normals of the start and the steps
    for k, h in enumerate(steps):
        load = (1 - pull * h) * loads[-1]
        load[k + 1] = noise * np.sqrt(h)
        means.append(means[-1] + h * (shifts[k] - pull * means[-1]))
        loads.append(load)
    matrix = np.array(loads)
    return Normal(np.array(means), matrix @ matrix.T)


def euler_laws(p: OrnsteinUhlenbeck, nodes: np.ndarray) -> tuple[Normal, Normal]:
    """The joint laws of both Euler chains at all nodes."""
    return (
        euler_law(p.pull, p.shift, p.noise, p.mean, p.std, nodes),
        euler_law(p.reference_pull, p.reference_shift, p.noise, p.mean, p.std, nodes),
    )


def _moments(p: OrnsteinUhlenbeck, pull: float, shift: float, t: float) -> tuple[float, float]:
    centre, stationary = shift / pull, p.noise**2 / (2 * pull)
    return (
        centre + (p.mean - centre) * np.exp(-pull * t),
        stationary + (p.std**2 - stationary) * np.exp(-2 * pull * t),
    )


def moments(p: OrnsteinUhlenbeck, t: float) -> tuple[float, float]:
    """Mean and variance of X_t under law 1, in continuous time."""
    return _moments(p, p.pull, p.shift, t)


def reference_moments(p: OrnsteinUhlenbeck, t: float) -> tuple[float, float]:
    """Mean and variance of X_t under law 0, in continuous time."""
    return _moments(p, p.reference_pull, p.reference_shift, t)


def path_kl(p: OrnsteinUhlenbeck, time: float) -> float:
    """KL of the paths on [0, time] in continuous time: integrals of exponentials, nats."""
    centre, stationary = p.shift / p.pull, p.noise**2 / (2 * p.pull)
    slope, constant = p.pull - p.reference_pull, p.shift - p.reference_shift
    once = (1 - np.exp(-p.pull * time)) / p.pull
    twice = (1 - np.exp(-2 * p.pull * time)) / (2 * p.pull)
    away = p.mean - centre
    first = centre * time + away * once
    square = centre**2 * time + 2 * centre * away * once + away**2 * twice
    variance = stationary * time + (p.std**2 - stationary) * twice
    energy = slope**2 * (variance + square) - 2 * slope * constant * first + constant**2 * time
    return energy / (2 * p.noise**2)


def terminal_kl(p: OrnsteinUhlenbeck, time: float) -> float:
    """KL of the laws of X at ``time``, nats."""
    (m, v), (m0, v0) = moments(p, time), reference_moments(p, time)
    return kl(Normal(np.array([m]), np.array([[v]])), Normal(np.array([m0]), np.array([[v0]])))


def reversal_kl(p: OrnsteinUhlenbeck, time: float) -> float:
    """E KL(path | X_time), by the drifts of the reversed equations and quadrature, nats."""

    def energy(t: float) -> float:
        (m, v), (m0, v0) = moments(p, t), reference_moments(p, t)
        # (b - b_ref) / noise - noise grad log(p / p_ref) = constant + slope x
        slope = (p.reference_pull - p.pull) / p.noise + p.noise * (1 / v - 1 / v0)
        constant = (p.shift - p.reference_shift) / p.noise + p.noise * (m0 / v0 - m / v)
        return 0.5 * ((constant + slope * m) ** 2 + slope**2 * v)

    return float(quad(energy, 0, time, epsabs=0, epsrel=1e-13)[0])
