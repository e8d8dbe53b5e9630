"""A diffusion on the circle, and E f(X_T) by its two Kolmogorov equations.

    dX = b(t, X) dt + s(t, X) dW  (Ito),   X_0 ~ p,   both periodic
    b = (lift + bend t) + steer cos x + pull sin x,   s = (noise + swing cos x) (1 + growth t)
    f = exp(sin x),   p proportional to exp(peak cos(x - centre))

Backward     u_t + b u_x + s^2 / 2 u_xx = 0, u(T) = f; on grid points, derivatives by the discrete
             Fourier transform.
Forward      p_t = -(b p)_x + (s^2 p / 2)_xx; for its Fourier coefficients, where sines and cosines
             shift the index.
"""

from dataclasses import dataclass

import numpy as np
from scipy.integrate import solve_ivp
from scipy.special import iv, ive

from verification.answers import remembered

_EXACT = {"method": "DOP853", "rtol": 1e-13, "atol": 1e-14}


@dataclass(frozen=True)
class Circle:
    """The numbers; no two of them equal, none 0 or 1."""

    lift: float = -0.2
    bend: float = 0.35
    steer: float = 0.4
    pull: float = 0.5
    noise: float = 0.55
    swing: float = 0.3
    growth: float = 0.45
    peak: float = 1.4
    centre: float = 4.3
    horizon: float = 0.5


@remembered
def backward(c: Circle, points: int = 48) -> float:
    """E f(X_T), by the backward equation."""
    x = 2 * np.pi * np.arange(points) / points
    waves = 1j * np.fft.fftfreq(points, 1 / points)

    def past(reversed_time: float, u: np.ndarray) -> np.ndarray:
        t = c.horizon - reversed_time
        hat = np.fft.fft(u)
        first, second = np.fft.ifft(waves * hat).real, np.fft.ifft(waves**2 * hat).real
        drift = c.lift + c.bend * t + c.steer * np.cos(x) + c.pull * np.sin(x)
        diffusion = (c.noise + c.swing * np.cos(x)) * (1 + c.growth * t)
        return drift * first + 0.5 * diffusion**2 * second

    u = solve_ivp(past, (0, c.horizon), np.exp(np.sin(x)), **_EXACT).y[:, -1]
    density = np.exp(c.peak * np.cos(x - c.centre))
    return float(u @ density / density.sum())


@remembered
def forward(c: Circle, waves: int = 20) -> float:
    """E f(X_T), by the forward equation, E exp(i k X_t) for k = -waves .. waves."""
    k = np.arange(-waves, waves + 1)
    up, down = np.eye(len(k), k=1), np.eye(len(k), k=-1)  # E exp(i (k +- 1) X) from E exp(i k X)
    cosine, sine = (up + down) / 2, (up - down) / 2j
    shape = c.noise * np.eye(len(k)) + c.swing * cosine
    square = shape @ shape

    def rate(t: float, moments: np.ndarray) -> np.ndarray:
        drift = (c.lift + c.bend * t) * moments + c.steer * (cosine @ moments)
        drift = drift + c.pull * (sine @ moments)
        return 1j * k * drift - 0.5 * k**2 * (1 + c.growth * t) ** 2 * (square @ moments)

    start = iv(abs(k), c.peak) / iv(0, c.peak) * np.exp(1j * k * c.centre)
    end = solve_ivp(rate, (0, c.horizon), start.astype(complex), **_EXACT).y[:, -1]
    # exp(sin x) = sum_k I_k(1) exp(i k (x - pi / 2))
    return float((np.e * ive(abs(k), 1.0) * np.exp(-1j * k * np.pi / 2) @ end).real)
