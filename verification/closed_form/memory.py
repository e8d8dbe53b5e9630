"""A linear policy of an exponential memory: exact second moments of state and memory together.

x' = x + h (A x + a) + SIGMA dW,   a = -g m + STD z,   m' = m + h (LEAK (x - m) + HEARD a)
"""

import numpy as np

A, SIGMA, STD, LEAK, HEARD = 0.4, 0.7, 0.35, 1.3, -0.25
GAIN, REFERENCE, COST, TEMPERATURE = 1.1, -0.3, 0.2, 0.15
START, START_STD, MEMORY = 0.6, 0.5, 0.8  # m_0 = MEMORY x_0
NODES = np.array([0.0, 0.3, 0.4, 0.75, 1.1])


def second_moments(gain: float | complex) -> list[np.ndarray]:
    """E of the products of (x, m) at every node."""
    first = np.array([1.0, MEMORY])
    now = np.outer(first, first) * (START**2 + START_STD**2) + 0j
    each = [now]
    for h in np.diff(NODES):
        step = np.array([[1 + h * A, -h * gain], [h * LEAK, 1 - h * LEAK - h * HEARD * gain]])
        drawn = h * STD * np.array([1.0, HEARD])
        noise = np.outer(drawn, drawn) + np.diag([SIGMA**2 * h, 0.0])
        now = step @ now @ step.T + noise
        each.append(now)
    return each


def expected_return(gain: float | complex) -> complex:
    """E sum_k h (-x^2 - COST a^2 + TEMPERATURE entropy) - E x_end^2."""
    entropy = 0.5 * np.log(2 * np.pi * np.e * STD**2)
    moments, total = second_moments(gain), 0j
    for h, s in zip(np.diff(NODES), moments, strict=False):
        total += h * (-s[0, 0] - COST * (gain**2 * s[1, 1] + STD**2) + TEMPERATURE * entropy)
    return total - moments[-1][0, 0]


def slope() -> float:
    """d E return / d gain, by a complex step."""
    return float(expected_return(GAIN + 1e-30j).imag / 1e-30)


def path_kl() -> float:
    """1/2 E sum_k h (-g m - REFERENCE x)^2 / SIGMA^2, nats: from a policy without memory."""
    total, gap = 0.0, np.array([-REFERENCE, -GAIN])
    for h, s in zip(np.diff(NODES), second_moments(GAIN), strict=False):
        total += 0.5 * h * float(np.real(gap @ s @ gap)) / SIGMA**2
    return total


def log_densities(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """log pi of every action along every path, nats: the memory by a loop over its past."""
    each = np.empty(actions.shape)
    for path in range(len(states)):
        m = MEMORY * states[path, 0]
        for k, h in enumerate(np.diff(NODES)):
            z = (actions[path, k] + GAIN * m) / STD
            each[path, k] = -0.5 * z**2 - np.log(STD * np.sqrt(2 * np.pi))
            m += h * (LEAK * (states[path, k] - m) + HEARD * actions[path, k])
    return each
