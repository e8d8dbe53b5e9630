"""Generation as a controlled SDE whose action is the score, and its distance from the pretrained model.

Time is RL time t = horizon - s: t = 0 is noise, the end is data. f = -g^2 y / 2, evaluated at noising time s.

Sources  "Score as Action" (arXiv 2502.01819), section 3; the eta family has the marginals of the noising process
         for every eta where the action is the exact score.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl import ControlledSDE
from diffusion_envs.schedule import Schedule


def generation_sde(schedule: Schedule, eta: float = 1.0) -> ControlledSDE:
    """dX = [ g^2 X / 2 + (1 + eta^2) / 2 g^2 a ] dt + eta g dW; eta = 0 is the probability-flow ODE.

    Args:
        schedule: variance-preserving.
        eta: stochasticity, at least 0.
    """
    if not 0 <= eta < float("inf"):
        raise ValueError(f"eta must be at least 0 and finite, got {eta}")

    def drift(t: Tensor, x: Tensor, score: Tensor) -> Tensor:
        g2 = schedule.g2(schedule.horizon - t)
        return g2 * (0.5 * x + 0.5 * (1 + eta**2) * score)

    def diffusion(t: Tensor, x: Tensor) -> Tensor:
        return eta * schedule.g2(schedule.horizon - t).sqrt()

    return ControlledSDE(drift, diffusion)


def kl_factor(eta: float) -> float:
    """((1 + eta^2) / (2 eta))^2: the eta family's path KL over that of eta = 1 at equal scores.

    Raises:
        ValueError: ``eta`` is 0: the laws of two ODEs are mutually singular and have no KL.
    """
    if not eta > 0:
        raise ValueError(
            f"eta must be positive for a path KL, got {eta}; use an SDE sampler, eta > 0"
        )
    return ((1 + eta**2) / (2 * eta)) ** 2


def path_kl_per_step(
    score: Float[Tensor, "paths steps *event"],
    reference_score: Float[Tensor, "paths steps *event"],
    integrated_g2: Float[Tensor, " steps"],
    *,
    factor: float = 1.0,
) -> Float[Tensor, "paths steps"]:
    """Theorem 3.1's path KL, step by step: factor / 2 * |score - reference|^2 * int g^2 dt, nats.

    Scores are taken at the left end of each step, along paths sampled under ``score``; the integral of g^2 is
    exact, not g^2 h. Sum over steps and average over paths for KL(P_th || P_pre).

    Args:
        score: of the policy.
        reference_score: of the pretrained model, same shape.
        integrated_g2: int g^2 dt over each step.
        factor: ``kl_factor(eta)``.
    """
    if score.shape != reference_score.shape or score.shape[1:2] != integrated_g2.shape:
        raise ValueError(
            f"scores must be [paths, steps, *event] alike with {len(integrated_g2)} steps, got "
            f"{list(score.shape)} and {list(reference_score.shape)}"
        )
    gap = (score - reference_score).square().flatten(2).sum(2)
    return 0.5 * factor * integrated_g2 * gap


def tweedie_mean(
    states: Float[Tensor, " *shape"],
    score: Float[Tensor, " *shape"],
    alpha: Float[Tensor, "..."],
    sigma: Float[Tensor, "..."],
) -> Float[Tensor, " *shape"]:
    """E[Y_0 | Y_s = x] = (x + sigma^2 score) / alpha, the denoised state (Tweedie's formula)."""
    return (states + sigma.square() * score) / alpha


def score_from_epsilon(states: Tensor, epsilon: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """-epsilon / sigma."""
    return -epsilon / sigma


def score_from_x0(states: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """(alpha x0 - x) / sigma^2."""
    return (alpha * x0 - states) / sigma.square()


def score_from_v(states: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = alpha epsilon - sigma x0, so epsilon = alpha v + sigma x."""
    return -(alpha * v + sigma * states) / sigma


def epsilon_from_score(score: Tensor, sigma: Tensor) -> Tensor:
    """-sigma score."""
    return -sigma * score
