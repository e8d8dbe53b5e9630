"""E X_T^2 of one-step schemes on a linear equation, and its derivatives by complex steps.

    dX = (pull X + a) dt + noise X dW (Ito),   a = gain X at the left end of each step, held
Each scheme multiplies X by a polynomial R(w), w ~ N(0, h); so E X_T^2 = start^2 prod E R^2, which
is analytic in the numbers: the derivative in p is Im f(p + i eps) / eps.
"""

import numpy as np

from verification.closed_form import complex_steps


def second_moment(scheme: str, numbers: np.ndarray, steps: np.ndarray) -> complex:
    """E X_T^2, for (pull, gain, noise, start), real or complex."""
    pull, gain, noise, start = numbers
    moment = start**2
    for h in steps:
        if scheme == "Euler-Maruyama":
            r = np.array([1 + (pull + gain) * h, noise])
        elif scheme == "Milstein":
            r = np.array([1 + (pull + gain) * h - noise**2 * h / 2, noise, noise**2 / 2])
        elif scheme == "Heun":  # of the drift less noise^2 X / 2, the action held
            free = (pull - noise**2 / 2) * h
            there = np.array([1 + free + gain * h, noise])
            again = free * np.append(there, 0) + noise * np.append(0, there)
            r = (
                np.append(there, 0) + np.array([1.0, 0, 0]) + np.array([gain * h, 0, 0]) + again
            ) / 2
        else:
            raise ValueError(f"there is no scheme {scheme!r} here")
        square = np.convolve(r, r)
        moments = np.array([1, 0, h, 0, 3 * h**2])[: len(square)]
        moment = moment * (square @ moments)
    return complex(moment)


def gradient(scheme: str, numbers: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Its derivatives in all four numbers."""
    return complex_steps.gradient(lambda moved: second_moment(scheme, moved, steps), numbers)
