"""Re-noised data in numpy: rows with the model's scores, and what is drawn between two levels."""

from dataclasses import dataclass

import numpy as np
import torch

from ctrl.noise import stream
from diffusion_envs.objectives.noised_data import NoisedLosses, drawn_levels, drawn_noise
from verification.claim import Setting, array
from verification.problems.losses import DIM, ENTRIES, PATHS, STATES, current, levels, pretrained

DRAWS = 4
ALPHA_BAR = levels().alphas_cumprod.numpy()
SIGNS = np.array([1.0, -1.0, -1.0, 1.0, 0.0, 0.0])  # of two pairs and a tie
DATA = STATES[:, -1]


@dataclass(frozen=True)
class Noised:
    """Rows, [n, dim] and [n], in numpy.

    Attributes:
        mean: current score, free.
        held: the same, fixed.
        timestep: of each row.
        x: noised state.
        data: that was noised.
        noise: epsilon.
        advantage: of the data.
        cost: to come, at a drawn state between; its score of the noised state.
    """

    mean: np.ndarray
    held: np.ndarray
    timestep: np.ndarray
    x: np.ndarray
    data: np.ndarray
    noise: np.ndarray
    advantage: np.ndarray
    cost: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def alpha(self) -> np.ndarray:
        """Signal, [n, 1]."""
        return np.sqrt(ALPHA_BAR[self.timestep])[:, None]

    @property
    def sigma(self) -> np.ndarray:
        """Noise, [n, 1]."""
        return np.sqrt(1 - ALPHA_BAR[self.timestep])[:, None]

    @property
    def pretrained(self) -> np.ndarray:
        """Its score."""
        return pretrained(ALPHA_BAR[self.timestep], self.x)

    def x0(self, score: np.ndarray) -> np.ndarray:
        """Expected data."""
        return (self.x + self.sigma**2 * score) / self.alpha

    def velocity(self, score: np.ndarray, data_share: np.ndarray | float = 1.0) -> np.ndarray:
        """epsilon - x0 of the rectified flow, or with other shares of the two."""
        return -self.sigma * score - data_share * self.x0(score)


def numbers(losses: NoisedLosses, pairs: np.ndarray, advantage: np.ndarray) -> Noised:
    """The rows of (path, draw) pairs, with what was drawn for them."""
    path = pairs[:, 0]
    timestep = losses.timestep.cpu().numpy()[tuple(pairs.T)]
    noise = array(losses.noise)[tuple(pairs.T)]
    abar = ALPHA_BAR[timestep][:, None]
    x = np.sqrt(abar) * DATA[path] + np.sqrt(1 - abar) * noise
    mean = current(abar[:, 0], x)
    return Noised(mean, mean, timestep, x, DATA[path], noise, advantage)


def between(setting: Setting, rows: Noised, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Path cost at a state drawn between, and the score of the noised state given that one."""
    generator = stream(setting.seed, "losses", "noise")
    drawn_levels(PATHS, DRAWS, 1, ENTRIES, generator)
    drawn_noise(PATHS, DRAWS, (DIM,), generator)
    shares = torch.rand(PATHS, DRAWS, generator=generator, dtype=torch.float64).numpy()
    normals = array(torch.randn(PATHS * DRAWS, DIM, generator=generator))
    depth = -np.log(ALPHA_BAR)
    aim = shares[tuple(pairs.T)] * depth[rows.timestep]
    before = np.array([max([j for j in range(ENTRIES) if depth[j] <= a], default=0) for a in aim])
    kept = ALPHA_BAR[before][:, None]  # alpha-bar of the state between, then of what follows it
    ratio = ALPHA_BAR[rows.timestep][:, None] / kept
    precision = 1 / (1 - kept) + ratio / (1 - ratio)
    pull = np.sqrt(kept) * rows.data / (1 - kept) + np.sqrt(ratio) * rows.x / (1 - ratio)
    y = pull / precision + normals.reshape(PATHS, DRAWS, DIM)[tuple(pairs.T)] / np.sqrt(precision)
    gap = current(kept[:, 0], y) - pretrained(kept[:, 0], y)
    cost = 0.5 * depth[rows.timestep] * np.sum(gap**2, axis=1)
    return cost, (np.sqrt(ratio) * y - rows.x) / (1 - ratio)
