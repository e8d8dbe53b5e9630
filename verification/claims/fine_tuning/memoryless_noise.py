"""Memoryless noise: adjoint matching generates the tilt only if trained with full noise.

The law that adjoint matching generates depends on the noise it is trained with. With full
noise (eta = 1) and little signal left (alpha_T = .0066) it is the tilt up to 1e-9 nats;
with eta = .5 on the same schedule, the same reward and the same b, the optimum of
E[r] - b KL is another law, 2e-3 nats away, because X_T remembers X_0. A score that was
trained with full noise generates the tilt with any eta, up to what the start does.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ctrl import linear
from diffusion_envs.exact import gaussian
from diffusion_envs.samplers import DDIM
from verification.claim import Check, Setting, expectation
from verification.closed_form import tilt as exact
from verification.closed_form.gaussian_law import kl
from verification.closed_form.samplers import ddim_steps, eta_transition, uniform, whole
from verification.closed_form.tilt import KL_WEIGHT, REWARD
from verification.closed_form.vp_gaussian import LONG
from verification.cubature import affine_end
from verification.problems import gaussian_diffusion as case
from verification.problems import generation, table

SOURCE = "Domingo-Enrich et al. 2024, arXiv 2409.08861, memoryless noise schedule"
WHY_DOUBLE = "ctrl.linear solves in float64 only, and says so"

STEPS = 20  # of a sampler


def generated(setting: Setting, eta: float) -> gaussian.Gaussian:
    """Law of X_T under the optimal control of the eta family, from p_T."""
    data, rate = case.normal(setting, case.DATA), case.schedule(LONG)
    begin, end = setting.tensor(1.0), setting.tensor(0.0)
    base = gaussian.transition(data, rate, begin, end, eta)
    Q, slope, c = (setting.tensor(each) for each in REWARD)

    def tilted(x: Tensor) -> linear.Gaussian:
        law = linear.Gaussian(base.matrix @ x + base.shift, base.covariance)
        return linear.tilt(law, Q, slope, KL_WEIGHT, c).law

    origin = tilted(setting.tensor([0.0, 0.0]))
    columns = [tilted(x).mean - origin.mean for x in setting.tensor([[1.0, 0.0], [0.0, 1.0]])]
    start = gaussian.marginal(data, rate, begin)
    return gaussian.Affine(torch.stack(columns, 1), origin.mean, origin.covariance).after(start)


def checks(setting: Setting) -> Iterator[Check]:
    """eta = 1 and eta = .5 on the long schedule."""
    tilted, _ = exact.tilt(case.DATA, REWARD, KL_WEIGHT)
    reference = case.ctrl_normal(case.normal(setting, tilted))
    for eta in (1.0, 0.5):
        base = eta_transition(LONG, LONG.horizon, 0.0, eta)
        want = exact.tilted_transition(base, REWARD, KL_WEIGHT).of(LONG.noised(1.0))
        got = generated(setting, eta)
        yield expectation(
            f"eta {eta}: law of X_T at the optimum",
            torch.cat([got.mean, got.covariance.flatten()]),
            np.concatenate([want.mean, want.covariance.ravel()]),
        )
        yield expectation(
            f"eta {eta}: KL(generated || tilt)",
            linear.gaussian_kl(case.ctrl_normal(got), reference),
            kl(want, tilted),
            scale=1.0 if eta == 1 else None,  # of 1e-10 nats few digits are left
        )
    model, start = case.normal(setting, tilted), case.normal(setting, LONG.noised(1.0))
    begin, end = setting.tensor(1.0), setting.tensor(0.0)
    for eta in (0.5, 0.0):
        got = gaussian.transition(model, case.schedule(LONG), begin, end, eta).after(start)
        want = eta_transition(LONG.with_data(tilted), LONG.horizon, 0.0, eta).of(LONG.noised(1.0))
        yield expectation(
            f"trained with full noise, sampled with eta {eta}: law of X_T",
            torch.cat([got.mean, got.covariance.flatten()]),
            np.concatenate([want.mean, want.covariance.ravel()]),
        )
        yield expectation(
            f"trained with full noise, sampled with eta {eta}: KL(generated || tilt)",
            linear.gaussian_kl(case.ctrl_normal(got), reference),
            kl(want, tilted),
        )
    for eta in (1.0, 0.5):  # as a run samples it
        sampler = DDIM(eta).bind(table(LONG, STEPS, spacing="trailing", final_is_one=True), STEPS)
        problem, policy = generation(model, sampler.table, eta)
        steps = affine_end(problem, policy, sampler.grid, model.mean, sampler)
        got = steps.of(LONG.noised(1.0))
        want = whole(ddim_steps(tilted, uniform(LONG, STEPS), eta)).of(LONG.noised(1.0))
        yield expectation(
            f"trained with full noise, {STEPS} steps of DDIM with eta {eta}: law of X_T",
            np.concatenate([got.mean, got.covariance.ravel()]),
            np.concatenate([want.mean, want.covariance.ravel()]),
        )


MISTAKES = """
diffusion_envs.exact.gaussian.transition
    transition of the full-noise SDE for every eta | values = signal ** (eta**2) * (last / first) ** ((1 + eta**2) / 2)
        => values = signal * (last / first)
    noise of the eta family without the square | ((1 + eta**2) / 2) => ((1 + eta) / 2)
verification.claims.fine_tuning.memoryless_noise.generated
    the joint law tilted, with the start's law tilted too | start = gaussian.marginal(data, rate, begin)
        => start = gaussian.marginal(gaussian.tilt(data, case.quadratic(setting, REWARD), KL_WEIGHT), rate, begin)
shared
    the start forgotten
    b for 1/b
    direction of the KL
    DDIM: eta ignored
    DDIM: alpha-bar for alpha
    mean: noise not taken out of the direction
"""
