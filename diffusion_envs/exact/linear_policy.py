"""Linear policies of a Gaussian model: score + D x + c, on a grid and in continuous time.

Setting      The model, its rewards and conventions are those of ``gaussian``. Under such a policy
             states stay Gaussian and values quadratic: moments by a forward recursion, values by a
             backward one. On a grid both are exact for the sampler's own chain.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl import ControlProblem
from diffusion_envs.denoising import Score, generation_sde, kl_factor, kl_running_reward
from diffusion_envs.exact.gaussian import Affine, Gaussian, Quadratic, score, score_coefficients
from diffusion_envs.noise_schedules import NoiseSchedule
from diffusion_envs.samplers import GaussianSteps

# -- on a grid ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Steps:
    """A sampler's steps: x' = state_gain x + score_gain a + std z, from noising_times[k].

    The action a is the score, but for samplers that act by the expected data.
    """

    noising_times: Float[Tensor, " nodes"]
    state_gain: Float[Tensor, " steps"]
    score_gain: Float[Tensor, " steps"]
    std: Float[Tensor, " steps"]
    cost: Float[Tensor, " steps"]  # path KL of a step per half square of the action's change, nats

    @classmethod
    def of(cls, sampler: GaussianSteps) -> "Steps":
        """Coefficients of a sampler with noise."""
        return cls(
            sampler.noising_times,
            sampler.state_gain,
            sampler.gain,
            sampler.std,
            sampler.path_kl_gain,
        )

    @classmethod
    def of_euler(
        cls, schedule: NoiseSchedule, noising_times: Float[Tensor, " nodes"], eta: float = 1.0
    ) -> "Steps":
        """Those of Euler-Maruyama for the generation SDE; its path KL is left-point too."""
        s, h = noising_times[:-1], -noising_times.diff()
        g2 = schedule.g2(s)
        return cls(
            noising_times,
            1 - schedule.drift_coefficient(s) * h,
            0.5 * (1 + eta**2) * g2 * h,
            eta * (g2 * h).sqrt(),
            kl_factor(eta) * g2 * h,
        )


def chain(
    data: Gaussian,
    schedule: NoiseSchedule,
    steps: Steps,
    gain: Float[Tensor, "dim dim"],
    shift: Float[Tensor, " dim"],
    action_std: Float[Tensor, " steps"] | None = None,
) -> Affine:
    """The steps of a sampler whose action is score + gain x + shift, batched over the steps.

    Args:
        data: that the score belongs to.
        schedule: of the noise.
        steps: of the sampler.
        gain: D.
        shift: c.
        action_std: if the score is drawn around its mean: its standard deviation at each step.
    """
    slope, offset = score_coefficients(data, schedule, steps.noising_times[:-1])
    state_gain, score_gain = steps.state_gain[:, None, None], steps.score_gain[:, None]
    unit = torch.eye(gain.shape[-1]).to(gain)
    variance = steps.std.square()
    if action_std is not None:
        variance = variance + (steps.score_gain * action_std).square()
    return Affine(
        state_gain * unit + score_gain[..., None] * (slope + gain),
        score_gain * (offset + shift),
        variance[:, None, None] * unit,
    )


def moments(steps: Affine, start: Gaussian) -> list[Gaussian]:
    """The law of the state at every node."""
    laws = [start]
    for k in range(len(steps.shift)):
        laws.append(steps[k].after(laws[-1]))
    return laws


def kl_cost(
    cost: Float[Tensor, " steps"],
    gain: Float[Tensor, "dim dim"],
    shift: Float[Tensor, " dim"],
) -> Quadratic:
    """Minus cost/2 |gain x + shift|^2 of every step: what leaving the pretrained score costs."""
    return Quadratic(
        cost[:, None, None] * (gain.mT @ gain),
        -cost[:, None] * (gain.mT @ shift),
        -0.5 * cost * shift.square().sum(),
    )


def chain_values(steps: Affine, reward: Quadratic, running: Quadratic) -> list[Quadratic]:
    """V at every node: expected reward at the end plus that of every step to go.

    Args:
        steps: of the chain.
        reward: at the last node.
        running: of the state at the left of every step, batched over the steps.
    """
    values = [reward]
    for k in reversed(range(len(steps.shift))):
        now = Quadratic(running.curvature[k], running.slope[k], running.constant[k])
        values.append(values[-1].before(steps[k]) + now)
    return values[::-1]


# -- in continuous time ---------------------------------------------------------------------------


def continuous_value(
    data: Gaussian,
    schedule: NoiseSchedule,
    start: Gaussian,
    s_from: float,
    s_to: float,
    gain: Float[Tensor, "dim dim"],
    shift: Float[Tensor, " dim"],
    reward: Quadratic,
    kl_weight: float = 0.0,
    eta: float = 1.0,
    substeps: int = 400,
) -> Float[Tensor, ""]:
    """E[reward] - kl_weight path KL of playing score + gain x + shift, in continuous time.

    The moment equations m' = A m + b, P' = A P + P A' + eta^2 g^2 are integrated by the classical
    Runge-Kutta method: error O(substeps^-4). Differentiable in ``gain`` and ``shift``.
    """
    unit = torch.eye(gain.shape[-1]).to(gain)
    push, weight = 0.5 * (1 + eta**2), kl_weight * (kl_factor(eta) if kl_weight else 0.0)

    def rates(s: Tensor, m: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g2 = schedule.g2(s)
        slope, offset = score_coefficients(data, schedule, s)
        a = push * g2 * (slope + gain) - schedule.drift_coefficient(s) * unit
        b = push * g2 * (offset + shift)
        leaving = (gain @ m + shift).square().sum() + torch.trace(gain @ p @ gain.mT)
        return a @ m + b, a @ p + p @ a.mT + eta**2 * g2 * unit, -0.5 * weight * g2 * leaving

    h = (s_from - s_to) / substeps
    state = (start.mean, start.covariance, gain.new_zeros(()))
    for k in range(substeps):
        # counted from the data end, which round-off must not overstep: sigma is NaN below 0
        s, middle, end = (gain.new_tensor(s_to + (substeps - k - u) * h) for u in (0, 0.5, 1))
        now = rates(s, *state[:2])
        half = rates(middle, *_moved(state, now, 0.5 * h)[:2])
        again = rates(middle, *_moved(state, half, 0.5 * h)[:2])
        full = rates(end, *_moved(state, again, h)[:2])
        slopes = (
            (a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(now, half, again, full, strict=True)
        )
        state = _moved(state, tuple(slopes), h)
    mean, covariance, paid = state
    return reward.expectation(Gaussian(mean, covariance)) + paid


def _moved(
    state: tuple[Tensor, ...], slopes: tuple[Tensor, ...], h: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, covariance, paid = (x + h * slope for x, slope in zip(state, slopes, strict=True))
    return mean, covariance, paid


# -- as a control problem -------------------------------------------------------------------------


def linear_score(
    data: Gaussian,
    schedule: NoiseSchedule,
    gain: Float[Tensor, "dim dim"],
    shift: Float[Tensor, " dim"],
) -> Score:
    """(RL time, states) -> score + gain x + shift."""

    def mean(t: Tensor, states: Tensor) -> Tensor:
        s = schedule.horizon - torch.as_tensor(t).to(states)
        return score(data, schedule, s, states) + states @ gain.mT + shift

    return mean


def problem(
    data: Gaussian,
    schedule: NoiseSchedule,
    reward: Quadratic,
    kl_weight: float = 0.0,
    eta: float = 1.0,
) -> ControlProblem:
    """Fine-tuning the exact model of Gaussian data: terminal reward, path KL as running cost."""
    zero = torch.zeros_like(data.mean)
    pretrained = linear_score(data, schedule, torch.zeros_like(data.covariance), zero)
    running = kl_running_reward(schedule, pretrained, kl_weight, eta) if kl_weight else None
    return ControlProblem(
        generation_sde(schedule, eta),
        horizon=schedule.horizon,
        running_reward=running,
        terminal_reward=reward,
    )
