"""Variances of likelihood-ratio gradients for a linear reward: sums and products of normals.

Dynamics   dX = (drift_slope X + push a) dt + noise dW, X_0 = start; Euler chain
Policy     a = offset + std z (view A), or a = offset and the next state is decided (view B)
Reward     weight X_T at the horizon, discounted; gradient in the offset

With m the mean of the discounted reward, y_k and w_k what a standard normal of the k-th action and
of the k-th Brownian step add to it, and u_k the k-th score per unit of its own normal:
    return             (u . z) (m + y . z + w . n)
    return less V      sum_k u_k z_k sum_{j >= k} (y_j z_j + w_j n_j)
    dV                 sum_k u_k z_k (y_k z_k + w_k n_k)
In view B the score's normals are the Brownian ones: y is empty and n is z.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LinearReward:
    """The numbers; no two equal, none 0 or 1."""

    drift_slope: float = -0.7
    push: float = 0.9
    noise: float = 0.6
    weight: float = 1.3
    discount: float = 0.35
    start: float = 0.75
    offset: float = 0.25
    std: float = 0.45


def growth(p: LinearReward, nodes: np.ndarray) -> np.ndarray:
    """d X_T / d X_k at every node of the chain."""
    factors = 1 + p.drift_slope * np.diff(nodes)
    return np.append(np.cumprod(factors[::-1])[::-1], 1.0)


def chain_value(p: LinearReward, nodes: np.ndarray) -> np.ndarray:
    """(slope, constant) of V at every node, [nodes, 2]."""
    grown, h = growth(p, nodes), np.diff(nodes)
    pushed = p.push * p.offset * np.append(np.cumsum((grown[1:] * h)[::-1])[::-1], 0.0)
    keep = p.weight * np.exp(-p.discount * (nodes[-1] - nodes))
    return np.stack([keep * grown, keep * pushed], axis=1)


def mean_reward(p: LinearReward, nodes: np.ndarray) -> float:
    """m."""
    slope, constant = chain_value(p, nodes)[0]
    return slope * p.start + constant


def _moves(p: LinearReward, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y and w."""
    h = np.diff(nodes)
    worth = p.weight * np.exp(-p.discount * nodes[-1]) * growth(p, nodes)[1:]
    return worth * p.push * p.std * h, worth * p.noise * np.sqrt(h)


def drawn(p: LinearReward, nodes: np.ndarray) -> np.ndarray:
    """View A: variances with the return, the return less V, and dV; u = 1 / std."""
    action, brownian = _moves(p, nodes)
    steps = len(action)
    level = mean_reward(p, nodes) ** 2 + action @ action + brownian @ brownian
    ahead = np.cumsum((action**2 + brownian**2)[::-1])[::-1]
    each = (
        steps * level + action.sum() ** 2,
        (ahead + action**2).sum(),  # the steps' parts are uncorrelated
        (2 * action**2 + brownian**2).sum(),
    )
    return np.array(each) / p.std**2


def transitions(p: LinearReward, nodes: np.ndarray) -> np.ndarray:
    """View B: the same; u_k = push sqrt(h_k) / noise."""
    _, brownian = _moves(p, nodes)
    score = p.push * np.sqrt(np.diff(nodes)) / p.noise
    ahead = np.cumsum((brownian**2)[::-1])[::-1]
    level = mean_reward(p, nodes) ** 2 + brownian @ brownian
    return np.array(
        [
            score @ score * level + (score @ brownian) ** 2,
            score**2 @ (ahead + brownian**2),
            2 * score**2 @ brownian**2,
        ]
    )


def limits(p: LinearReward, horizon: float) -> tuple[np.ndarray, np.ndarray]:
    """Limits of the variances as h -> 0: view A diverges, (return, return less V), times h; view B.

    dV has the variance int w(t)^2 dt / std^2 in view A, and 0 in view B.
    """
    a, T = p.drift_slope, horizon
    paid = p.weight * np.exp(-p.discount * T)
    flow = np.exp(a * T)
    level = (paid * (flow * p.start + p.push * p.offset * (flow - 1) / a)) ** 2
    noise_integral = (paid * p.noise) ** 2 * (flow**2 - 1) / (2 * a)  # int w^2 dt
    # int_0^T int_t^T w^2 ds dt, w(s)^2 ~ e^{2 a (T - s)}
    ahead = (paid * p.noise) ** 2 * ((flow**2 - 1) / (2 * a) - T) / (2 * a)
    slope = paid * p.push * (flow - 1) / a
    ratio = (p.push / p.noise) ** 2
    return (
        np.array([T * (level + noise_integral), ahead]) / p.std**2,
        np.array([ratio * T * (level + noise_integral) + slope**2, ratio * ahead]),
    )
