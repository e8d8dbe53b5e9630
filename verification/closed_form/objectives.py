"""The losses of fine-tuning methods, written out from their papers; a number each row.

Formulas take complex numbers too, so that slopes are complex steps: where a formula chooses between
two branches it does so by real parts. Rows of a group stand side by side.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Rows = np.ndarray  # [n]
_TINY = 1e-30


@dataclass(frozen=True)
class Steps:
    """Single steps x -> x' = (...) + gain score + std z, a row each: [n, dim] and [n].

    Attributes:
        mean: score of the policy in question.
        old: of the policy that sampled.
        pretrained: of the pretrained model.
        noise: that led to the next state.
        advantage: of the step.
        size: int g^2.
        horizon: of all steps of a path.
        gain: of the score.
        std: of the step.
        kl_factor: of the path KL.
    """

    mean: np.ndarray
    old: np.ndarray
    pretrained: np.ndarray
    noise: np.ndarray
    advantage: Rows
    size: Rows
    horizon: float
    gain: Rows
    std: Rows
    kl_factor: float

    def log_ratio(self, other: np.ndarray) -> Rows:
        """log N(x'; mean of the score) / N(x'; mean of the other score), summed."""
        after = self.gain[:, None] * self.old + self.std[:, None] * self.noise
        own, others = (
            (after - self.gain[:, None] * score) / self.std[:, None] for score in (self.mean, other)
        )
        return 0.5 * np.sum(others**2 - own**2, axis=1)

    def kl(self, other: np.ndarray) -> Rows:
        """KL of the two normal laws of x'."""
        shift = self.gain[:, None] * (self.mean - other)
        return np.sum(shift**2, axis=1) / (2 * self.std**2)

    @property
    def path_kl(self) -> Rows:
        """(1 + eta^2)^2 / (4 eta^2) 1/2 |score - pretrained|^2 int g^2."""
        gap = np.sum((self.mean - self.pretrained) ** 2, axis=1)
        return 0.5 * self.kl_factor * gap * self.size


def slope(
    loss: Callable[[np.ndarray], np.ndarray], at: np.ndarray, together: int | None = None
) -> np.ndarray:
    """Derivatives of the sum of all losses, by complex steps.

    Args:
        loss: a number each row.
        at: rows [n, dim], or any numbers.
        together: rows in a row on which a loss depends; None: on any.
    """
    if together is None:
        slopes = np.empty(at.size)
        for i in range(at.size):
            beside = at.astype(complex)
            beside.flat[i] += 1j * _TINY
            slopes[i] = np.imag(np.sum(loss(beside))) / _TINY
        return slopes.reshape(at.shape)
    slopes = np.empty(at.shape)
    for member, coordinate in itertools.product(range(together), range(at.shape[1])):
        beside = at.astype(complex)
        beside[member::together, coordinate] += 1j * _TINY
        each = np.reshape(np.imag(loss(beside)) / _TINY, (-1, together))
        slopes[member::together, coordinate] = each.sum(1)
    return slopes


def least(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smaller of two."""
    return np.where(np.real(a) < np.real(b), a, b)


def clip(x: np.ndarray, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    """What is within, or the end of the range."""
    return np.where(np.real(x) < low, low, np.where(np.real(x) > high, high, x))


def ppo(log_ratio: Rows, advantage: Rows, width: Rows | float) -> Rows:
    """min(rho A, clip(rho) A), the clip on log rho."""
    trusted = np.exp(clip(log_ratio, -width, width))
    return least(np.exp(log_ratio) * advantage, trusted * advantage)


def log_sigmoid(x: Any) -> Any:
    """log 1 / (1 + exp(-x))."""
    return -np.log(1 + np.exp(-x))


def masked_ratio(rows: Steps, divergence: Rows, most: float) -> Rows:
    """Flow-DPPO: rho A, but 0 where the divergence is large and A log rho > 0."""
    log_ratio = rows.log_ratio(rows.old)
    away = np.real(log_ratio) * rows.advantage > 0
    kept = ~((np.real(divergence) >= most) & away)
    return kept * np.exp(log_ratio) * rows.advantage


def preferred_pairs(log_ratio: Rows, preference: Rows, beta: float) -> Rows:
    """-log sigmoid(beta (L_winner - L_loser)), for both members; 0 for a tie."""
    losses = np.zeros(len(log_ratio), log_ratio.dtype)
    for i in range(0, len(losses), 2):
        a, b = (i, i + 1) if preference[i] > preference[i + 1] else (i + 1, i)
        if preference[i] != preference[i + 1]:
            losses[i : i + 2] = -log_sigmoid(beta * (log_ratio[a] - log_ratio[b]))
    return losses


def plackett_luce(logits: np.ndarray, preference: np.ndarray, compared: int) -> complex | float:
    """-log probability of the preferred order, averaged over all lists of so many items."""
    losses = []
    for some in itertools.combinations(range(len(logits)), compared):
        order = sorted(some, key=lambda i: -preference[i])
        tied = len({preference[i] for i in some}) < compared
        left = [np.log(sum(np.exp(logits[j]) for j in order[k:])) for k in range(compared)]
        losses.append(0.0 if tied else sum(left) - sum(logits[i] for i in order))
    return sum(losses) / len(losses)


# -- advantages ----------------------------------------------------------------------------------


def z_scores(x: np.ndarray, offset: float) -> np.ndarray:
    """(x - mean) / (population standard deviation + offset)."""
    mean = sum(x) / len(x)
    return (x - mean) / (math.sqrt(sum((x - mean) ** 2) / len(x)) + offset)


def in_groups(x: np.ndarray, members: np.ndarray, function: Callable) -> np.ndarray:
    """A function of the numbers of each group, in place."""
    result = np.zeros(len(x))
    for group in set(members.tolist()):
        result[members == group] = function(x[members == group])
    return result


def ranks(x: np.ndarray) -> np.ndarray:
    """How many others each exceeds, and half of those that it equals."""
    return np.array([sum(a > b for b in x) + 0.5 * (sum(a == b for b in x) - 1) for a in x])


def generalised_advantages(
    values: np.ndarray, rewards: np.ndarray, sizes: np.ndarray, rate: float
) -> np.ndarray:
    """sum_{j >= k} exp(-rate (t_j - t_k)) (r_j + V_{j+1} - V_j), [paths, steps]."""
    times = np.concatenate([[0.0], np.cumsum(sizes)])
    differences = rewards + values[:, 1:] - values[:, :-1]
    steps = differences.shape[1]
    each = [
        sum(np.exp(-rate * (times[j] - times[k])) * differences[:, j] for j in range(k, steps))
        for k in range(steps)
    ]
    return np.stack(each, axis=1)


def dual_averaging(
    rewards: np.ndarray, variation: Callable, kl_weight: float, rounds: int
) -> np.ndarray:
    """n q; q_{k+1} is tilted by the average of the variations so far, that at q_j j times."""
    weights, kept = np.full(len(rewards), 1 / len(rewards)), []
    for _ in range(rounds):
        kept.append(variation(rewards, weights))
        count = np.arange(1, len(kept) + 1)
        potential = count @ np.array(kept) / count.sum()
        unnormalised = np.exp(potential / kl_weight)
        weights = unnormalised / unnormalised.sum()
    return len(rewards) * weights
