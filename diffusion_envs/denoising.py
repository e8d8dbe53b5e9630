"""Generation as a controlled SDE whose action is the score, and what leaving a model costs.

Setting      RL time t = horizon - s: t = 0 is noise, the end is data. With the noising process's
             drift k(s) y and diffusion g(s), for every eta >= 0,
                dX = (-k X + (1 + eta^2) / 2 g^2 a) dt + eta g dW
             has the noising process's marginals if the action a is their score: eta = 1 is its
             time reversal, eta = 0 the probability flow.
Conventions  A prediction is what a network was trained on: epsilon, x0, or
             v = alpha epsilon - sigma x0, of the state x = alpha x0 + sigma epsilon.
             alpha and sigma have no dimensions, or as many as the states.
Sources      [S21] Song et al. 2021, score-based generative modeling through SDEs, arXiv 2011.13456.
             [SaA] Zhao et al. 2025, "Score as Action", arXiv 2502.01819.
             [SH22] Salimans & Ho 2022 (v prediction), arXiv 2202.00512.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl import ControlledSDE
from diffusion_envs.noise_schedules import NoiseSchedule

Score = Callable[[Tensor, Tensor], Tensor]
"""(RL time [], states [paths, *event]) -> [paths, *event], 1/state."""
State: TypeAlias = Float[Tensor, "*state"]
Level: TypeAlias = Float[Tensor, "*#state"]


def _noising_time(schedule: NoiseSchedule, t: Tensor | float, states: Tensor) -> Tensor:
    return schedule.horizon - torch.as_tensor(t, dtype=states.dtype, device=states.device)


def generation_sde(schedule: NoiseSchedule, eta: float = 1.0) -> ControlledSDE:
    """The generation SDE of the eta family ([S21] equation 6 is eta = 1, equation 13 eta = 0).

    Args:
        schedule: of the noise.
        eta: stochasticity, at least 0.

    Raises:
        ValueError: ``eta`` is negative or not finite.
    """
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta must be at least 0 and finite, got {eta}")

    def drift(t: Tensor, x: Tensor, score: Tensor) -> Tensor:
        s = _noising_time(schedule, t, x)
        return 0.5 * (1 + eta**2) * schedule.g2(s) * score - schedule.drift_coefficient(s) * x

    def diffusion(t: Tensor, x: Tensor) -> Tensor:
        return eta * schedule.g2(_noising_time(schedule, t, x)).sqrt()

    return ControlledSDE(drift, diffusion)


def denoised_sde(schedule: NoiseSchedule, eta: float = 1.0) -> ControlledSDE:
    """``generation_sde`` with the expected data for its action: score = (alpha a - x) / sigma^2.

    Its drift is infinite where no signal is left and eta > 0.

    Raises:
        ValueError: ``eta`` is negative or not finite.
    """
    sde = generation_sde(schedule, eta)

    def drift(t: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        s = _noising_time(schedule, t, x)
        return sde.drift(t, x, score_from_x0(x, x0, schedule.alpha(s), schedule.sigma(s)))

    return ControlledSDE(drift, sde.diffusion)


def kl_factor(eta: float) -> float:
    """((1 + eta^2) / (2 eta))^2: the eta family's path KL over that of eta = 1 at equal scores.

    Raises:
        ValueError: ``eta`` is 0: the laws of two ODEs are mutually singular and have no KL.
    """
    if not 0 < eta < math.inf:
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
    """Path KL of every step, nats: factor / 2 |score - reference|^2 int g^2 dt ([SaA] Theorem 3.1).

    The scores are held over a step, g^2 is integrated exactly. Summed over steps and averaged over
    paths sampled under ``score`` this is KL(P_th || P_pre) of the path laws, up to O(largest step).

    Args:
        score: of the policy, at the left end of each step.
        reference_score: of the pretrained model, at the same states.
        integrated_g2: int g^2 dt over each step: log(abar_{k+1} / abar_k).
        factor: ``kl_factor(eta)``.

    Raises:
        ValueError: the shapes do not fit.
    """
    if score.shape != reference_score.shape or score.shape[1:2] != integrated_g2.shape:
        raise ValueError(
            f"scores must be [paths, steps, *event] alike with {len(integrated_g2)} steps, got "
            f"{list(score.shape)} and {list(reference_score.shape)}"
        )
    gap = (score - reference_score).square().flatten(2).sum(2)
    return 0.5 * factor * integrated_g2 * gap


def kl_running_reward(
    schedule: NoiseSchedule, reference: Score, weight: float, eta: float = 1.0
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """-weight * (path KL per unit of time): a running reward (t, x, a) -> [paths], reward/time.

    Args:
        schedule: of the noise.
        reference: the pretrained score.
        weight: reward per nat.
        eta: of the sampler, positive.

    Raises:
        ValueError: ``weight`` is negative or not finite, or ``eta`` is 0.
    """
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be at least 0 and finite, got {weight}")
    factor = kl_factor(eta)

    def running_reward(t: Tensor, x: Tensor, score: Tensor) -> Tensor:
        gap = (score - reference(t, x)).square().flatten(1).sum(1)
        return -0.5 * weight * factor * schedule.g2(_noising_time(schedule, t, x)) * gap

    return running_reward


def _check_levels(states: Tensor, *levels: Tensor) -> None:
    for level in levels:
        if level.ndim not in (0, states.ndim):
            raise ValueError(
                f"alpha and sigma must have no dimensions, or the {states.ndim} of states "
                f"{list(states.shape)}; got {list(level.shape)}: for one level a row use "
                ".view(-1, 1, ...)"
            )


def tweedie_mean(states: State, score: State, alpha: Level, sigma: Level) -> State:
    """E[Y_0 | Y_s = x] = (x + sigma^2 score) / alpha, the denoised state (Tweedie's formula)."""
    _check_levels(states, alpha, sigma)
    return (states + sigma.square() * score) / alpha


x0_from_score = tweedie_mean


def noising_bridge(
    data: State, noised: State, alpha: Level, sigma: Level, ratio: Level
) -> tuple[State, Level]:
    """Mean and standard deviation of a state between data and a more noised one, given both.

    By Bayes' rule from Y' = alpha Y_0 + N(0, sigma^2) and Y = ratio Y' + N(0, 1 - ratio^2), which
    variance-preserving noising does from one level to the next.

    Args:
        data: Y_0.
        noised: Y.
        alpha: signal left in Y'.
        sigma: noise in Y', sqrt(1 - alpha^2).
        ratio: signal left in Y of that in Y'.
    """
    _check_levels(noised, alpha, sigma)
    added = 1 - ratio.square()  # variance
    total = ratio.square() * sigma.square() + added  # variance of Y given the data
    mean = alpha * data + ratio * sigma.square() / total * (noised - ratio * alpha * data)
    return mean, sigma * (added / total).sqrt()


def score_from_epsilon(states: State, epsilon: State, alpha: Level, sigma: Level) -> State:
    """-epsilon / sigma."""
    _check_levels(states, alpha, sigma)
    return -epsilon / sigma


def score_from_x0(states: State, x0: State, alpha: Level, sigma: Level) -> State:
    """(alpha x0 - x) / sigma^2."""
    _check_levels(states, alpha, sigma)
    return (alpha * x0 - states) / sigma.square()


def score_from_v(states: State, v: State, alpha: Level, sigma: Level) -> State:
    """-(alpha v + sigma x) / (sigma (alpha^2 + sigma^2)) ([SH22] appendix D)."""
    _check_levels(states, alpha, sigma)
    return -(alpha * v + sigma * states) / (sigma * (alpha.square() + sigma.square()))


def epsilon_from_score(states: State, score: State, alpha: Level, sigma: Level) -> State:
    """-sigma score."""
    _check_levels(states, alpha, sigma)
    return -sigma * score


def v_from_score(states: State, score: State, alpha: Level, sigma: Level) -> State:
    """Alpha epsilon - sigma x0."""
    epsilon = epsilon_from_score(states, score, alpha, sigma)
    return alpha * epsilon - sigma * tweedie_mean(states, score, alpha, sigma)
