"""The probability-flow ODE: no noise, half the score, and the same marginals.

The ODE dX = (-k X + g^2 / 2 grad log p) dt carries p_s to p_s'. For Gaussian data its map
is x -> alpha' m + Sig'^{1/2} Sig^{-1/2} (x - alpha m), of which DDIM with eta = 0 is a
first-order scheme. With g^2 in place of g^2 / 2 it does not.

    dX = (-k X + g^2 / 2 grad log p) dt
For Gaussian data its map whitens and colours, Sig_s'^{1/2} Sig_s^{-1/2}; DDIM with eta = 0 is a
scheme for it.
"""

from collections.abc import Iterator

import numpy as np
import torch

import ctrl
from diffusion_envs.exact import gaussian
from diffusion_envs.samplers import DDIM
from verification.claim import Check, Setting, expectation, limit, pathwise
from verification.closed_form.extrapolation import extrapolated
from verification.closed_form.gaussian_law import Normal, Transition
from verification.closed_form.samplers import Nodes, ddim_steps, euler_steps, whole
from verification.closed_form.vp_gaussian import COVARIANCE, MEAN, VPGaussian
from verification.cubature import affine_end
from verification.problems import gaussian_data, generation, table, vp_linear

SOURCE = "Song et al. 2021, arXiv 2011.13456, equation 13; arXiv 2010.02502, equation 14"

MODEL = VPGaussian(MEAN, COVARIANCE, 0.4, 2.6)
DATA = Normal(MEAN, COVARIANCE)
UNEVEN = (0.0, 0.13, 0.4, 0.55, 0.9)  # RL time
FROM, TO = 0.85, 0.2  # noising times


def euler(setting: Setting, nodes: torch.Tensor) -> Transition:
    """Transition of production's Euler steps of the flow from the first node to the last."""
    data = gaussian_data(setting, DATA)
    problem, policy = generation(data, vp_linear(MODEL), eta=0.0)
    return affine_end(problem, policy, ctrl.TimeGrid(nodes), data.mean)


def ddim(setting: Setting, steps: int) -> tuple[Transition, Nodes]:
    """Transition of production's DDIM with eta = 0, and its nodes."""
    data = gaussian_data(setting, DATA)
    sampler = DDIM(0.0).bind(table(MODEL, steps, spacing="trailing", final_is_one=True), steps)
    problem, policy = generation(data, sampler.table, eta=0.0)
    end = affine_end(problem, policy, sampler.grid, data.mean, sampler)
    return end, Nodes.of(MODEL, np.linspace(1, 0, steps + 1))


def checks(setting: Setting) -> Iterator[Check]:
    """Euler and DDIM steps against the same recursions in numpy; their limits, and the map."""
    euler_end = euler(setting, torch.tensor(UNEVEN, dtype=torch.float64))
    want = whole(euler_steps(DATA, Nodes.of(MODEL, 1 - np.array(UNEVEN)), eta=0.0))
    yield expectation("Euler, four uneven steps: slope", euler_end.F, want.F)
    yield expectation("Euler, four uneven steps: offset", euler_end.f, want.f)
    yield expectation("Euler, four uneven steps: no noise", euler_end.C, want.C, scale=1.0)

    flow = MODEL.flow(FROM, TO)
    step = gaussian.transition(
        gaussian_data(setting, DATA),
        vp_linear(MODEL),
        setting.tensor(FROM),
        setting.tensor(TO),
        eta=0.0,
    )
    yield pathwise("closed-form map: slope", step.matrix, flow.F)
    yield pathwise("closed-form map: offset", step.shift, flow.f)
    yield pathwise("closed-form map: no noise", step.covariance, flow.C, scale=1.0)

    ddim_end, nodes = ddim(setting, 5)
    want = whole(ddim_steps(DATA, nodes, 0.0))
    yield expectation("DDIM, five steps: slope", ddim_end.F, want.F)
    yield expectation("DDIM, five steps: offset", ddim_end.f, want.f)
    yield expectation("DDIM, five steps: no noise", ddim_end.C, want.C, scale=1.0)

    counts, flow = (10, 20, 40, 80), MODEL.flow(1.0, 0.0)
    chains = [euler(setting, torch.linspace(0, 1, n + 1, dtype=torch.float64)) for n in counts]
    yield limit("Euler, many steps: slope", extrapolated([c.F for c in chains]), flow.F)
    yield limit("Euler, many steps: offset", extrapolated([c.f for c in chains]), flow.f)
    chains = [ddim(setting, n)[0] for n in counts]
    yield limit("DDIM, many steps: slope", extrapolated([c.F for c in chains]), flow.F)
    yield limit("DDIM, many steps: offset", extrapolated([c.f for c in chains]), flow.f)


MISTAKES = """
diffusion_envs.denoising.generation_sde
    factor 1/2 dropped | 0.5 * (1 + eta**2) => (1 + eta**2)
    half of the noising drift too | score - sch => score - 0.5 * sch
diffusion_envs.exact.gaussian.transition
    mean not carried along | * data.mean - carried => * data.mean
diffusion_envs.samplers.BoundDDIM.score_gain
    DDIM: sigma missing in the direction | direct * self.sigma[:-1] => direct
diffusion_envs.exact.linear_policy.linear_score
    DDIM: score of the next noise level | schedule.horizon - torch.as_tensor(t)
        => schedule.horizon - 0.05 - 0.9 * torch.as_tensor(t)
shared
    g for g^2
    eta ignored in the noise
    transition of the reversal
    transition of the SDE
    DDIM: eta ignored
    DDIM: sigma for sigma^2
    DDIM: alpha-bar for alpha
"""
