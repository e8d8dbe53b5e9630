"""Generation as a controlled SDE whose action is the score, and the price of leaving a pretrained one.

Setting      Noising time s, RL time t = start - s: t = 0 is noise. For any eta >= 0
                dX = (-k X + (1 + eta^2) / 2 g^2 a) dt + eta g dW,   k, g at noising time s
             has the marginals of the noising process if the action a is their score: eta = 1 is its
             time reversal, eta = 0 the probability flow.
Conventions  alpha and sigma broadcast against states: 0-dimensional or with as many dimensions.
             Natural logarithms. A prediction is what a network was trained on: epsilon, x0, or
             v = alpha epsilon - sigma x0, of the state x = alpha x0 + sigma epsilon.
Sources      [S21] Song et al. 2021, arXiv 2011.13456. [SaA] "Score as Action", arXiv 2502.01819.
             [SH22] Salimans & Ho 2022 (v prediction), arXiv 2202.00512.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

import ctrl
from diffusion_envs.schedule import Schedule

Score = Callable[[Tensor, Tensor], Tensor]  # (RL time, states [paths, *event]) -> same


def check_eta(eta: float) -> None:
    """Refuse an eta that is not a finite number of at least 0."""
    if isinstance(eta, bool) or not isinstance(eta, int | float):
        raise TypeError(f"eta must be a number, got {eta!r}")
    if not (eta >= 0 and math.isfinite(eta)):
        raise ValueError(f"eta must be finite and at least 0, got {eta}")


def _clock(schedule: Schedule, start: float | None) -> Callable[[Tensor | float, Tensor], Tensor]:
    """(RL time, states) -> noising time, in the dtype and on the device of the states."""
    first = schedule.horizon if start is None else start
    if not 0 < first <= schedule.horizon:
        raise ValueError(
            f"start must be a noising time in (0, {schedule.horizon}], the schedule's range, got {start}"
        )
    return lambda t, states: first - torch.as_tensor(t, dtype=states.dtype, device=states.device)


def generation_sde(
    schedule: Schedule, eta: float = 1.0, *, start: float | None = None
) -> ctrl.ControlledSDE:
    """The generation SDE of the eta family, in RL time ([S21] eq. 6 and 13 are eta = 1 and 0).

    Args:
        schedule: of the noise.
        eta: stochasticity; 1 reverses the noising SDE, 0 is the probability flow.
        start: noising time of t = 0; the schedule's horizon if not given.

    Returns:
        drift(t, x, a) = -k x + (1 + eta^2) / 2 g^2 a, diffusion(t, x) = eta g.

    Raises:
        ValueError: ``eta`` or ``start`` is out of range.
    """
    check_eta(eta)
    noising_time = _clock(schedule, start)

    def drift(t: Tensor, states: Tensor, action: Tensor) -> Tensor:
        s = noising_time(t, states)
        return (
            -schedule.drift_coefficient(s) * states + 0.5 * (1 + eta**2) * schedule.g2(s) * action
        )

    def diffusion(t: Tensor, states: Tensor) -> Tensor:
        return eta * schedule.g2(noising_time(t, states)).sqrt()

    return ctrl.ControlledSDE(drift=drift, diffusion=diffusion)


def kl_weight(eta: float) -> float:
    """((1 + eta^2) / (2 eta))^2: path KL of the eta family in units of that of eta = 1; infinite at 0."""
    check_eta(eta)
    return math.inf if eta == 0 else ((1 + eta**2) / (2 * eta)) ** 2


def path_kl_per_step(
    score: Float[Tensor, "paths steps *event"],
    reference_score: Float[Tensor, "paths steps *event"],
    integrated_g2: Float[Tensor, " steps"],
    eta: float = 1.0,
) -> Float[Tensor, "paths steps"]:
    """Path KL of every step, kl_weight(eta) / 2 |score - reference|^2 int g^2 dt, nats ([SaA] Thm 3.1).

    The scores are held over the step, g^2 is integrated exactly; the mean over paths sampled under
    ``score`` of the sum over steps is the KL of the path laws up to O(largest step).

    Args:
        score: of the sampling policy, at the left of each step.
        reference_score: of the pretrained model, at the same states.
        integrated_g2: int g^2 dt of each step, ``log(alpha_bar_{k+1} / alpha_bar_k)`` if variance preserving.
        eta: of the sampler. At 0 the laws are singular: infinite wherever the scores differ.

    Raises:
        ValueError: the shapes do not fit.
    """
    if score.shape != reference_score.shape or integrated_g2.shape != score.shape[1:2]:
        raise ValueError(
            "score and reference_score must have one shape [paths, steps, ...] and integrated_g2 one entry "
            f"per step, got {list(score.shape)}, {list(reference_score.shape)} and "
            f"{list(integrated_g2.shape)}"
        )
    energy = (score - reference_score).square().flatten(2).sum(2) * integrated_g2
    weight = kl_weight(eta)
    if math.isinf(weight):
        return torch.where(energy == 0, energy, torch.full_like(energy, math.inf))
    return 0.5 * weight * energy


def kl_running_reward(
    schedule: Schedule,
    reference: Score,
    weight: float,
    eta: float = 1.0,
    *,
    start: float | None = None,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """-weight * (path KL per unit of time), as a running reward (t, x, a) -> [paths]; reward/time.

    Args:
        schedule: of the noise.
        reference: the pretrained score, of (RL time, states).
        weight: reward per nat.
        eta: of the sampler, positive.
        start: noising time of t = 0; the schedule's horizon if not given.

    Raises:
        ValueError: ``eta`` is 0 (the KL is infinite), ``weight`` is negative or not finite.
    """
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"weight must be finite and at least 0, got {weight}")
    if math.isinf(factor := kl_weight(eta)):
        raise ValueError(
            "eta must be positive for a KL cost: at eta = 0 sampling is deterministic and the path KL infinite"
        )
    noising_time = _clock(schedule, start)

    def running_reward(t: Tensor, states: Tensor, action: Tensor) -> Tensor:
        gap = (action - reference(t, states)).square().flatten(1).sum(1)
        return -0.5 * weight * factor * schedule.g2(noising_time(t, states)) * gap

    return running_reward


def _check_levels(states: Tensor, *levels: Tensor) -> None:
    for level in levels:
        if level.ndim not in (0, states.ndim):
            raise ValueError(
                f"alpha and sigma must be 0-dimensional or have the {states.ndim} dimensions of the states "
                f"{list(states.shape)}, got {list(level.shape)}; use .view(-1, 1, ...) for one level per row"
            )


State = Float[Tensor, "*state"]
Level = Float[Tensor, "*#state"]


def tweedie_mean(states: State, score: State, alpha: Level, sigma: Level) -> State:
    """E[Y_0 | Y_s = x] = (x + sigma^2 score) / alpha: the denoised state (x0_hat)."""
    _check_levels(states, alpha, sigma)
    return (states + sigma**2 * score) / alpha


def score_from_epsilon(states: State, epsilon: State, alpha: Level, sigma: Level) -> State:
    """-epsilon / sigma."""
    _check_levels(states, alpha, sigma)
    return -epsilon / sigma


def score_from_x0(states: State, x0: State, alpha: Level, sigma: Level) -> State:
    """(alpha x0 - x) / sigma^2: the inverse of ``tweedie_mean``."""
    _check_levels(states, alpha, sigma)
    return (alpha * x0 - states) / sigma**2


def score_from_v(states: State, v: State, alpha: Level, sigma: Level) -> State:
    """-epsilon / sigma with epsilon = (alpha v + sigma x) / (alpha^2 + sigma^2) ([SH22] appendix D)."""
    _check_levels(states, alpha, sigma)
    return -(alpha * v + sigma * states) / (sigma * (alpha**2 + sigma**2))


def epsilon_from_score(states: State, score: State, alpha: Level, sigma: Level) -> State:
    """-sigma score."""
    _check_levels(states, alpha, sigma)
    return -sigma * score


def v_from_score(states: State, score: State, alpha: Level, sigma: Level) -> State:
    """Alpha epsilon - sigma x0."""
    denoised = tweedie_mean(states, score, alpha, sigma)
    return -alpha * sigma * score - sigma * denoised


x0_from_score = tweedie_mean
