"""The eta family of samplers: one marginal law, many path laws.

dX = (-k X + (1 + eta^2) / 2 g^2 grad log p) dt + eta g dW has the noised marginals for
every eta in [0, 1]; its transitions are not the same: their slope along an axis of the data
is (alpha/alpha')^(eta^2) (v'/v)^((1 + eta^2) / 2), so the less noise, the more is kept of a
start that is not the noised law. A change c of the score costs
(1 + eta^2)^2 / (8 eta^2) |c|^2 int g^2 nats, least at eta = 1.

    dX = (-k X + (1 + eta^2) / 2 g^2 a) dt + eta g dW
With the exact score as action a every eta has the noising process's marginals; how much of the
start is remembered, and what leaving the score costs in path KL, depend on eta.
"""

from collections.abc import Iterator

import numpy as np
import torch

import ctrl
from diffusion_envs import denoising
from diffusion_envs.exact import gaussian
from verification.claim import Check, Setting, bound, expectation, limit, pathwise
from verification.closed_form.extrapolation import extrapolated
from verification.closed_form.gaussian_law import Normal, Transition
from verification.closed_form.samplers import Nodes, eta_transition, euler_steps, whole
from verification.closed_form.vp_gaussian import COVARIANCE, MEAN, VPGaussian
from verification.cubature import affine_end
from verification.problems import gaussian_data, generation, vp_linear

SOURCE = "Song et al. 2021, arXiv 2011.13456; Zhang & Chen 2022, arXiv 2204.13902"

MODEL = VPGaussian(MEAN, COVARIANCE, 0.4, 2.6, 1.1)
DATA = Normal(MEAN, COVARIANCE)
UNEVEN = (0.0, 0.13, 0.4, 0.55, 0.9)  # RL time
ETAS = (0.0, 0.3, 0.7, 1.0)
FROM, TO = 0.85, 0.2  # noising times
SHIFT = np.array([0.7, -0.4])  # of the score


def chain(setting: Setting, eta: float, nodes: torch.Tensor) -> Transition:
    """Transition of production's Euler chain from the first node to the last."""
    data = gaussian_data(setting, DATA)
    problem, policy = generation(data, vp_linear(MODEL), eta)
    return affine_end(problem, policy, ctrl.TimeGrid(nodes), data.mean)


def shift_kl(setting: Setting, eta: float) -> float:
    """Path KL of score + SHIFT from score, by ctrl, which sees two drifts and no schedule."""
    data = gaussian_data(setting, DATA)
    schedule = vp_linear(MODEL)
    problem, policy = generation(data, schedule, eta, shift=setting.tensor(SHIFT))
    reference = generation(data, schedule, eta)[1]
    grid = ctrl.TimeGrid(torch.tensor(UNEVEN, dtype=torch.float64))
    still = ctrl.Noise(setting.tensor(np.zeros((1, len(grid.steps), 2))))
    paths = ctrl.simulate(problem, policy, setting.tensor([[0.4, -0.9]]), grid, noise=still)
    return ctrl.girsanov.path_kl(problem.dynamics, policy, reference, paths).item()


def checks(setting: Setting) -> Iterator[Check]:
    """Steps at four values of eta and the path KL of a shift; then chains of many steps."""
    nodes = torch.tensor(UNEVEN, dtype=torch.float64)
    levels = Nodes.of(MODEL, MODEL.horizon - np.array(UNEVEN))
    steps = [chain(setting, eta, nodes) for eta in ETAS]
    want = [whole(euler_steps(DATA, levels, eta)) for eta in ETAS]
    name = "four uneven steps, each eta: "
    yield expectation(name + "slope", [step.F for step in steps], [step.F for step in want])
    yield expectation(name + "offset", [step.f for step in steps], [step.f for step in want])
    yield expectation(name + "noise", [step.C for step in steps], [step.C for step in want])

    production = [
        gaussian.transition(
            gaussian_data(setting, DATA),
            vp_linear(MODEL),
            setting.tensor(FROM),
            setting.tensor(TO),
            eta,
        )
        for eta in ETAS
    ]
    exact = [eta_transition(MODEL, FROM, TO, eta) for eta in ETAS]
    slopes = torch.stack([step.matrix for step in production])
    yield pathwise("closed-form transition, each eta: slope", slopes, [step.F for step in exact])
    covariances_of_steps = torch.stack([step.covariance for step in production])
    yield pathwise(
        "closed-form transition, each eta: noise", covariances_of_steps, [step.C for step in exact]
    )

    noisy = ETAS[1:]
    energy = float(SHIFT @ SHIFT) * float(levels.g2[:-1] @ -np.diff(levels.s))
    costs = [(1 + eta**2) ** 2 / (8 * eta**2) * energy for eta in noisy]
    yield pathwise("path KL of a shift, each eta", [shift_kl(setting, e) for e in noisy], costs)
    exact_g2 = setting.tensor([MODEL.integrated_beta(FROM, TO)])
    shift = setting.tensor(SHIFT)[None, None]
    found_costs = [
        denoising.path_kl_per_step(
            shift, 0 * shift, exact_g2, factor=denoising.kl_factor(eta)
        ).item()
        for eta in noisy
    ]
    whole_step = float(SHIFT @ SHIFT) * MODEL.integrated_beta(FROM, TO)
    costs = [(1 + eta**2) ** 2 / (8 * eta**2) * whole_step for eta in noisy]
    yield pathwise("path KL of a shift, g^2 integrated exactly, each eta", found_costs, costs)
    at_one = denoising.kl_factor(1.0)
    yield bound(
        "path KL is least at eta = 1",
        [1.0] * 4 + [at_one],
        [*map(denoising.kl_factor, (0.97, 1.03, 0.3, 1.7)), 1.0],
    )

    start = MODEL.noised(MODEL.horizon)
    ends = [
        [
            chain(setting, eta, torch.linspace(0, MODEL.horizon, n + 1, dtype=torch.float64))
            for n in (6, 12, 24, 48)
        ]
        for eta in ETAS
    ]
    means = [extrapolated([step.of(start).mean for step in one]) for one in ends]
    yield limit("many steps, each eta: mean of the data", means, [MEAN] * len(ETAS))
    covariances = [extrapolated([step.of(start).covariance for step in one]) for one in ends]
    yield limit(
        "many steps, each eta: covariance of the data", covariances, [COVARIANCE] * len(ETAS)
    )
    limits = [extrapolated([step.F for step in one]) for one in ends]
    exact = [eta_transition(MODEL, MODEL.horizon, 0.0, eta) for eta in ETAS]
    yield limit("many steps, each eta: slope", limits, [step.F for step in exact])

    ideal = Normal(0 * MEAN, np.eye(2))
    name = "many steps, each eta, from N(0, I): "
    means = [extrapolated([step.of(ideal).mean for step in one]) for one in ends]
    yield limit(name + "mean", means, [step.of(ideal).mean for step in exact])
    ideal_covariances = [extrapolated([step.of(ideal).covariance for step in one]) for one in ends]
    yield limit(
        name + "covariance", ideal_covariances, [step.of(ideal).covariance for step in exact]
    )


MISTAKES = r"""
diffusion_envs.denoising.generation_sde
    eta ignored in the drift | 0.5 * (1 + eta**2) => 1.0
    eta for eta^2 in the drift | (1 + eta**2) => (1 + eta)
    eta^2 for eta in the noise | return eta * sch => return eta**2 * sch
diffusion_envs.exact.gaussian.transition
    eta for eta^2 in the transition | signal ** (eta**2) => signal**eta
diffusion_envs.denoising.kl_factor
    path KL of the reversal | ** 2\n => ** 0\n
    path KL: not squared | (2 * eta)) ** 2 => (2 * eta)) ** 1
    path KL: noise alone | ((1 + eta**2) / (2 * eta)) => ((1 + 1) / (2 * eta))
    path KL: drift alone | ((1 + eta**2) / (2 * eta)) => ((1 + eta**2) / 2)
diffusion_envs.denoising.path_kl_per_step
    path KL without 1/2 | 0.5 * fac => fac
shared
    drift of the flow whatever eta is
    eta ignored in the noise
    score of the data's mean
    transition of the reversal
"""
