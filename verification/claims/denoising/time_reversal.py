"""Time reversal: generation with the exact score is the noising process, seen backwards.

The time reversal of dY = k Y ds + g dB is dX = (-k X + g^2 grad log p) dt + g dW from the
noised law p_T: its marginals and its transitions are those of Y backwards. Started from
N(0, I) at a finite horizon it is not.

For dY = k Y ds + g dB with Y_0 ~ data and t = horizon - s, the SDE
    dX = (-k X + g^2 grad log p_s(X)) dt + g dW,   X_0 ~ p_horizon,
has the law of Y backwards: not only its marginals, also its transitions. The scheme's own answer
on a coarse grid is compared with the same recursion in numpy, which sees mistakes that vanish as
steps shrink; the limit with the closed form, which sees the others.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from diffusion_envs.exact import gaussian
from diffusion_envs.exact.gaussian import Gaussian
from diffusion_envs.noise_schedules import VE, NoiseSchedule
from verification.claim import Check, Setting, expectation, limit
from verification.closed_form.extrapolation import extrapolated
from verification.closed_form.gaussian_law import Normal, Transition
from verification.closed_form.samplers import Nodes, euler_steps, whole
from verification.closed_form.vp_gaussian import COVARIANCE, MEAN, VPGaussian
from verification.cubature import affine_end
from verification.problems import gaussian_data, generation, normal, vp_linear

SOURCE = "Anderson 1982; Song et al. 2021, arXiv 2011.13456, equation 6"

MODEL = VPGaussian(MEAN, COVARIANCE, 0.4, 2.6, 1.1)  # alpha_T = .44: the start is far from N(0, I)
DATA = Normal(MEAN, COVARIANCE)
UNEVEN = (0.0, 0.13, 0.4, 0.55, 0.9)  # RL time
LOW, HIGH = 0.3, 2.2  # of the variance-exploding schedule


def start(data: Gaussian, schedule: NoiseSchedule, s: Tensor) -> Gaussian:
    """Law of the first state: the data's, noised to s."""
    return gaussian.marginal(data, schedule, s)


def generated(
    setting: Setting, schedule: NoiseSchedule, nodes: Tensor
) -> tuple[Transition, Normal]:
    """Transition and law at the last node of production's Euler chain with the exact score."""
    data = gaussian_data(setting, DATA)
    problem, policy = generation(data, schedule)
    step = affine_end(problem, policy, ctrl.TimeGrid(nodes), data.mean)
    return step, step.of(normal(start(data, schedule, setting.tensor(schedule.horizon))))


def exploding_nodes() -> Nodes:
    """The variance-exploding schedule where the uneven grid needs it, by its formulas."""
    s = 1.0 - np.array(UNEVEN)
    ratio = (HIGH / LOW) ** (2 * s)
    rate = 2 * np.log(HIGH / LOW)
    return Nodes(s, 1 + 0 * s, LOW * np.sqrt(ratio - 1), 0 * s, LOW**2 * rate * ratio)


def checks(setting: Setting) -> Iterator[Check]:
    """Euler chains against the same recursion in numpy; their limit against the closed form."""
    schedule = vp_linear(MODEL)
    nodes = torch.tensor(UNEVEN, dtype=torch.float64)
    step, law = generated(setting, schedule, nodes)
    want = whole(euler_steps(DATA, Nodes.of(MODEL, MODEL.horizon - np.array(UNEVEN))))
    noised = MODEL.noised(MODEL.horizon)
    yield expectation("four uneven steps: mean", law.mean, want.of(noised).mean)
    yield expectation("four uneven steps: covariance", law.covariance, want.of(noised).covariance)
    yield expectation("four uneven steps: slope of the transition", step.F, want.F)

    exploding = exploding_nodes()
    step, law = generated(setting, VE(LOW, HIGH), nodes)
    want = whole(euler_steps(DATA, exploding)).of(
        Normal(MEAN, COVARIANCE + LOW**2 * ((HIGH / LOW) ** 2 - 1) * np.eye(2))
    )
    yield expectation("variance exploding, four uneven steps: mean", law.mean, want.mean)
    yield expectation(
        "variance exploding, four uneven steps: covariance", law.covariance, want.covariance
    )

    ends = [
        generated(setting, schedule, torch.linspace(0, MODEL.horizon, n + 1, dtype=torch.float64))
        for n in (10, 20, 40, 80)
    ]
    exact = MODEL.transition(MODEL.horizon, 0.0)
    mean = extrapolated([law.mean for _, law in ends])
    yield limit("many steps: mean of the data", mean, MEAN)
    covariance = extrapolated([law.covariance for _, law in ends])
    yield limit("many steps: covariance of the data", covariance, COVARIANCE)
    slope = extrapolated([step.F for step, _ in ends])
    yield limit("many steps: slope of the posterior", slope, exact.F)
    covariance_limit = extrapolated([step.C for step, _ in ends])
    yield limit("many steps: covariance of the posterior", covariance_limit, exact.C)


MISTAKES = """
diffusion_envs.denoising.generation_sde
    noise dropped | return eta * schedule => return 0 * schedule
    g^2 for g in the noise | (schedule, t, x)).sqrt() => (schedule, t, x))
diffusion_envs.exact.gaussian.score_coefficients
    sign of the score | -1 / => 1 /
diffusion_envs.exact.gaussian._noised_spectrum
    sigma for sigma^2 | + sigma.square() => + sigma
    alpha for alpha-bar | alpha.square() => alpha
diffusion_envs.noise_schedules._VariancePreserving.drift_coefficient
    variance-exploding drift in a variance-preserving process | -0.5 * self.g2(s) => 0.0 * self.g2(s)
diffusion_envs.denoising._noising_time
    time index not reversed | schedule.horizon - => ``
diffusion_envs.exact.linear_policy.linear_score
    time index not reversed | schedule.horizon - => ``
    time index of the score not reversed | schedule.horizon - => ``
ctrl.simulate._left_ends
    reverse time shifted by one step | grid.nodes[:-1] => grid.nodes[1:]
ctrl.solvers.EulerMaruyama.step_into
    reverse time shifted by one step | t = as_like(t0 => t = as_like(t1
verification.claims.denoising.time_reversal.start
    stationary start | gaussian.marginal(data, schedule, s) => Gaussian(0 * data.mean, torch.eye(2).to(data.mean))
shared
    g for g^2
    drift of the flow whatever eta is
    drift of the noising process not reversed
    score off by 1 %
    alpha-bar for alpha
    exploding: drift of a variance-preserving process
    exploding: data already noised
"""
