"""First exits of Brownian motion with drift, and of a plain loop over the steps of Euler's scheme.

dX = a dt + s dW on (-1, 1):  u(x) = e^{-2 a x / s^2} is harmonic, X - a t a martingale
P(leave upwards) = (u(-1) - u(x)) / (u(-1) - u(1)),   E tau = (E X_tau - x) / a
dX = a dt + dW, cost a^2 / 2 + w^2 / 2 until the exit: phi = exp(-V) solves phi'' = w^2 phi,
phi = 1 at the walls, so V = -log(cosh(w x) / cosh(w)) and a* = -V' = w tanh(w x)
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm


@dataclass(frozen=True)
class Motion:
    """dX = a dt + s dW."""

    drift: float
    noise: float

    def upwards(self, x: np.ndarray) -> np.ndarray:
        """Probability to leave (-1, 1) at 1."""
        rate = 2 * self.drift / self.noise**2
        return (np.exp(rate) - np.exp(-rate * x)) / (np.exp(rate) - np.exp(-rate))

    def exit_time(self, x: np.ndarray) -> np.ndarray:
        """E tau, by Wald's identity."""
        return (2 * self.upwards(x) - 1 - x) / self.drift

    def survival(self, distance: float, time: float) -> float:
        """P(no visit to a wall at this distance below, by this time): Bachelier's reflection."""
        spread, way = self.noise * math.sqrt(time), self.drift * time
        mirrored = math.exp(-2 * self.drift * distance / self.noise**2)
        return float(
            norm.cdf((distance + way) / spread) - mirrored * norm.cdf((way - distance) / spread)
        )

    def density(self, x: np.ndarray, y: np.ndarray, time: float) -> np.ndarray:
        """Of X_{t + time} = y given X_t = x."""
        return norm.pdf(y, x + self.drift * time, self.noise * math.sqrt(time))


@dataclass(frozen=True)
class Well:
    """dX = -pull X dt + s(X) dW, s = noise + bend X^2: scale density p, speed 2 / (s^2 p)."""

    pull: float
    noise: float
    bend: float

    def s(self, x: np.ndarray) -> np.ndarray:
        """The diffusion."""
        return self.noise + self.bend * x**2

    def density(self, x: np.ndarray, y: np.ndarray, time: float) -> np.ndarray:
        """Of Euler's next state y, given x."""
        return norm.pdf(y, x - self.pull * x * time, self.s(x) * math.sqrt(time))

    def exit_time(self) -> float:
        """E tau from 0: int_0^1 p(y) int_0^y 2 / (s^2 p) dz dy, as both sides are alike."""
        points, weights = np.polynomial.legendre.leggauss(40)
        y, w = (points + 1) / 2, weights / 2
        z = y[:, None] * y  # the inner integral's, [outer, inner]

        def scale(x: np.ndarray) -> np.ndarray:
            return np.exp(self.pull / self.bend * (1 / self.noise - 1 / self.s(x)))

        inner = (2 / (self.s(z) ** 2 * scale(z)) * w).sum(1) * y
        return float((w * scale(y) * inner).sum())


def fleming(x: np.ndarray, w: float) -> np.ndarray:
    """The value of the exit problem, a reward: -V = log(cosh(w x) / cosh(w))."""
    return np.log(np.cosh(w * x) / np.cosh(w))


@dataclass(frozen=True)
class Stopped:
    """Paths of Euler's scheme that end at the walls of (-1, 1), [paths, nodes] and [paths]."""

    states: np.ndarray
    ends: np.ndarray
    left: np.ndarray


def stopped(
    motion: Motion, start: np.ndarray, times: np.ndarray, dw: np.ndarray, uniform: np.ndarray
) -> Stopped:
    """One path and one step after the other."""
    paths, steps = dw.shape
    states = np.zeros((paths, steps + 1))
    ends, left = np.full(paths, steps), np.zeros(paths, dtype=bool)
    for i in range(paths):
        x = states[i, 0] = start[i]
        for k, h in enumerate(np.diff(times)):
            y = x + motion.drift * h + motion.noise * dw[i, k]
            touch = [
                1.0 if d1 <= 0 else math.exp(-2 * d0 * d1 / (motion.noise**2 * h))
                for d0, d1 in ((1 + x, 1 + y), (1 - x, 1 - y))
            ]
            either = touch[0] + touch[1] - touch[0] * touch[1]
            if uniform[i, k] < either:
                low = uniform[i, k] / either < touch[0] / (touch[0] + touch[1])
                x = -1.0 if low else 1.0
                ends[i], left[i] = k + 1, True
                states[i, k + 1 :] = x
                break
            x = states[i, k + 1] = y
    return Stopped(states, ends, left)


def worth(
    stop: Stopped, times: np.ndarray, discount: float, rate: np.ndarray, paid: np.ndarray
) -> np.ndarray:
    """Discounted reward of each path: rate [paths, steps] until its end, then what is paid."""
    total = np.zeros(len(stop.ends))
    for i, end in enumerate(stop.ends):
        for k in range(end):
            total[i] += math.exp(-discount * times[k]) * rate[i, k] * (times[k + 1] - times[k])
        total[i] += math.exp(-discount * times[end]) * paid[i]
    return total


def log_ratio(
    motion: Motion, other: float, stop: Stopped, times: np.ndarray, dw: np.ndarray
) -> np.ndarray:
    """log dP/dP' of the increments up to the exit, P' with another drift, by densities."""
    total = np.zeros(len(stop.ends))
    for i, end in enumerate(stop.ends):
        for k in range(end):
            h = times[k + 1] - times[k]
            step = motion.drift * h + motion.noise * dw[i, k]
            near, far = step - motion.drift * h, step - other * h
            total[i] += (far**2 - near**2) / (2 * motion.noise**2 * h)  # of two normal densities
    return total
