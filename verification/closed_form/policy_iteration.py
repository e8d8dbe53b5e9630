"""Newton's method on the Riccati equation, and soft policy iteration on a small chain by hand."""

import math
from dataclasses import dataclass

import numpy as np
import scipy.special

from verification.closed_form import complex_steps
from verification.closed_form.lq import LQ, Scalar, riccati_rate, solve_scalar


def newton(lq: LQ, y: np.ndarray) -> np.ndarray:
    """y - F'(y)^{-1} F(y), F the Riccati equation of (S, e, c); it knows of no policy."""
    slope = complex_steps.gradient(lambda moved: riccati_rate(lq, moved), y)
    return y - np.linalg.solve(slope.T, riccati_rate(lq, y))


def scalar_constant(p: Scalar) -> float:
    """lim e'/e^2 = F''/(2 F') at the root of F(k) = (k u - R)^2/(N - k D^2) - v k - M."""
    k, u, v = solve_scalar(p).k2, p.B + p.C * p.D, p.discount - 2 * p.A - p.C**2
    G, W, d = k * u - p.R, p.N - k * p.D**2, p.D**2
    first = 2 * u * G / W + d * G**2 / W**2 - v
    second = 2 * u**2 / W + 4 * u * d * G / W**2 + 2 * d**2 * G**2 / W**3
    return second / (2 * first)


@dataclass(frozen=True)
class Circle:
    """dX = (c cos x + a (1 + s sin x)) dt + noise dW on a circle, nothing linear or quadratic.

    Reward u cos x + w sin 2 x - price a^2, actions in [-most, most].
    """

    c: float = 0.5
    s: float = 0.4
    noise: float = 0.8
    u: float = 1.1
    w: float = 0.3
    price: float = 0.35
    most: float = 1.2
    actions: int = 3
    points: int = 24
    discount: float = 0.6
    temperature: float = 0.17


TIED = Circle(c=0.0, s=0.0, u=0.0, w=0.0, actions=2)
"""Two actions, right and left, that are equally good everywhere."""


@dataclass(frozen=True)
class Chain:
    """L [actions, points, points], r [actions, points], weights [actions]."""

    L: np.ndarray
    r: np.ndarray
    weights: np.ndarray
    discount: float
    temperature: float

    def rates(self, v: np.ndarray) -> np.ndarray:
        """r + L^a v, [actions, points]."""
        return self.r + self.L @ v

    def gibbs(self, v: np.ndarray) -> np.ndarray:
        """Masses of the Gibbs policy of a value, [actions, points]."""
        rates = self.rates(v)
        density = self.weights[:, None] * np.exp((rates - rates.max(0)) / self.temperature)
        return density / density.sum(0)

    def value(self, mass: np.ndarray) -> np.ndarray:
        """Value of a policy that is paid its entropy relative to the weights."""
        entropy = -scipy.special.rel_entr(mass, self.weights[:, None]).sum(0)
        paid = (mass * self.r).sum(0) + self.temperature * entropy
        return self.resolvent(mass, paid)

    def resolvent(self, mass: np.ndarray, source: np.ndarray) -> np.ndarray:
        """(discount - L)^{-1} source, L averaged over actions."""
        L = np.einsum("ax,axy->xy", mass, self.L)
        return np.linalg.solve(self.discount * np.eye(len(L)) - L, source)

    def optimum(self) -> np.ndarray:
        """By value iteration, a contraction that evaluates no policy."""
        rate = -np.einsum("axx->ax", self.L).min()
        v = np.zeros(self.r.shape[1])
        for _ in range(math.ceil(40 * (1 + rate / self.discount))):  # error e^{-40}
            rates = self.rates(v)
            top = rates.max(0)
            terms = self.weights[:, None] * np.exp((rates - top) / self.temperature)
            best = top + self.temperature * np.log(terms.sum(0))
            v = v + (best - self.discount * v) / (rate + self.discount)
        return v


def chain(p: Circle) -> Chain:
    """Central differences around the circle."""
    h = 2 * math.pi / p.points
    x = -math.pi + h * np.arange(p.points)
    nodes, weights = np.polynomial.legendre.leggauss(p.actions)
    nodes, weights = p.most * nodes, p.most * weights
    after, before = np.roll(np.eye(p.points), 1, axis=1), np.roll(np.eye(p.points), -1, axis=1)
    L, r = [], []
    for a in nodes:
        drift = p.c * np.cos(x) + a * (1 + p.s * np.sin(x))
        up, down = p.noise**2 / (2 * h * h) + drift / (2 * h), p.noise**2 / (2 * h * h)
        down = down - drift / (2 * h)
        L.append(up[:, None] * after + down[:, None] * before - np.diag(up + down))
        r.append(p.u * np.cos(x) + p.w * np.sin(2 * x) - p.price * a * a)
    return Chain(np.array(L), np.array(r), weights, p.discount, p.temperature)


def divergence(mass: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(mass || other) at every point, nats."""
    return scipy.special.rel_entr(mass, other).sum(0)
