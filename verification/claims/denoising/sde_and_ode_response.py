"""Fine-tuned with noise, sampled without: the same score, another law.

A change c of the score moves the mean of the data by 1.240 c under the SDE, by 3.665 c
under the ODE (data of variance 1/2, beta from 0.1 to 20): a score that is fine-tuned under
one sampler means another law under another. They agree exactly where the score is that of
a noised law.

A score that is off by a constant c moves the mean of the data by G_eta c,
    G_eta = int F_eta (1 + eta^2) / 2 g^2 ds,   F_eta the sensitivity of the end to the state at s,
and G differs between the SDE (eta = 1) and the ODE (eta = 0), the more the noisier the start.
The two agree on the score of a noised law, as that of the KL-regularised optimum.
"""

from collections.abc import Iterator

import numpy as np
import torch

from diffusion_envs.exact import gaussian, linear_policy
from diffusion_envs.exact.gaussian import Quadratic
from diffusion_envs.exact.linear_policy import Steps
from diffusion_envs.samplers import DDIM
from verification.claim import Check, Setting, expectation, limit, pathwise
from verification.closed_form import samplers
from verification.closed_form.gaussian_law import Normal
from verification.closed_form.samplers import Nodes, ddim_steps, whole
from verification.closed_form.vp_gaussian import VPGaussian
from verification.problems import gaussian_data, normal, table, vp_linear

SOURCE = "the setting of arXiv 2510.10767; integrals of the linear response, by hand"

DATA = Normal(np.array([0.8]), np.array([[0.5]]))
OTHER = Normal(np.array([1.3]), np.array([[0.8]]))  # the law that a model was moved to
MODEL = VPGaussian(*DATA)  # beta from 0.1 to 20: alpha_T = 0.0066
SHORT = VPGaussian(*DATA, 0.4, 2.6)
WIDE = VPGaussian(DATA.mean, np.array([[1.7]]), 0.4, 2.6)  # a variance above the noise's
ETAS = (0.0, 0.6, 1.0)
TABLES = Setting()  # samplers' tables are in double precision on the CPU, whatever runs


def value(
    setting: Setting, model: VPGaussian, eta: float, reward: Quadratic, shift: float, substeps: int
) -> float:
    """Mean reward at the data under score + shift, by production's moment equations."""
    data, schedule = gaussian_data(setting, Normal(model.mean, model.covariance)), vp_linear(model)
    start = gaussian.marginal(data, schedule, setting.tensor(model.horizon))
    gain, change = 0 * data.covariance, torch.full_like(data.mean, shift)
    return linear_policy.continuous_value(
        data, schedule, start, model.horizon, 0.0, gain, change, reward, eta=eta, substeps=substeps
    ).item()


def response(setting: Setting, model: VPGaussian, eta: float, substeps: int) -> float:
    """Shift of the mean by score + 1, with the leading error (of order 4) taken out."""
    zero = setting.tensor([[0.0]])
    mean = Quadratic(zero, zero[0] + 1, zero.sum())
    coarse, fine = (
        value(setting, model, eta, mean, 1.0, n) - float(model.mean[0])
        for n in (substeps, 2 * substeps)
    )
    return (16 * fine - coarse) / 15


def sampled(eta: float, shift: float) -> tuple[Normal, Normal]:
    """Law of production's DDIM chain at the last node under score + shift, and by recursion."""
    sampler = DDIM(eta).bind(table(SHORT, 6, spacing="trailing", final_is_one=True), 6)
    data = gaussian_data(TABLES, DATA)
    steps = Steps(
        sampler.noising_times, sampler.state_gain, sampler.score_gain, sampler.std, sampler.std
    )
    chain = linear_policy.chain(
        data, sampler.table, steps, 0 * data.covariance, torch.full_like(data.mean, shift)
    )
    start = SHORT.noised(1.0)
    law = linear_policy.moments(chain, gaussian_data(TABLES, start))[-1]
    nodes = Nodes.of(SHORT, sampler.noising_times.tolist())
    return normal(law), whole(ddim_steps(DATA, nodes, eta, shift)).of(start)


def checks(setting: Setting) -> Iterator[Check]:
    """Responses in continuous time and of DDIM, against integrals and recursions in numpy."""
    ends = setting.tensor(1.0), setting.tensor(0.0)
    laws = [sampled(eta, 0.7) for eta in ETAS]
    name = "DDIM, six steps, score + c, each eta: "
    yield expectation(name + "mean", [law.mean for law, _ in laws], [law.mean for _, law in laws])
    yield expectation(
        name + "variance",
        [law.covariance for law, _ in laws],
        [law.covariance for _, law in laws],
    )

    other_model = SHORT.with_data(OTHER)
    # from the pretrained start they differ by what is remembered of it
    steps = [
        gaussian.transition(gaussian_data(setting, OTHER), vp_linear(SHORT), *ends, eta)
        for eta in ETAS
    ]
    began = gaussian_data(setting, SHORT.noised(1.0))
    unlike = [normal(step.after(began)) for step in steps]
    exact = [
        samplers.eta_transition(other_model, 1.0, 0.0, eta).of(SHORT.noised(1.0)) for eta in ETAS
    ]
    name = "the same from another start, each eta: "
    yield pathwise(name + "mean", [law.mean for law in unlike], [law.mean for law in exact])
    yield pathwise(
        name + "variance", [law.covariance for law in unlike], [law.covariance for law in exact]
    )

    for model, name in ((SHORT, "variance below 1"), (WIDE, "variance above 1")):
        variance, alpha = float(model.covariance[0, 0]), model.alpha(1.0)
        data = gaussian_data(setting, Normal(model.mean, model.covariance))
        sde_response = gaussian.shift_response(data, vp_linear(model), *ends)
        exact = samplers.sde_response(variance, alpha)
        yield pathwise(f"{name}: response of the SDE, closed form", sde_response, [[exact]])
        ode_response = response(setting, model, 0.0, 8)
        exact = samplers.ode_response(variance, alpha)
        yield limit(f"{name}: response of the ODE, closed form", ode_response, exact)
    responses = [response(setting, SHORT, eta, 8) for eta in ETAS]
    values = [samplers.shift_response(SHORT, eta) for eta in ETAS]
    yield limit("response, each eta, against quadrature", responses, values)
    if setting.full:
        published = [response(setting, MODEL, eta, 100) for eta in (0.0, 1.0)]
        yield limit("published instance: response of ODE and SDE", published, [3.665, 1.240])

    reward = Quadratic(setting.tensor([[1.4]]), setting.tensor([0.6]), setting.tensor(0.2))
    played = [value(setting, other_model, eta, reward, 0.0, 16) for eta in ETAS]
    mean, variance = float(OTHER.mean[0]), float(OTHER.covariance[0, 0])
    exact = -0.7 * (mean**2 + variance) + 0.6 * mean + 0.2
    yield limit("score of a noised law: its mean reward, each eta", played, [exact] * 3)


MISTAKES = """
diffusion_envs.exact.linear_policy.continuous_value
    drift of the SDE whatever eta is | 0.5 * (1 + eta**2) => 1.0
    shift not scaled by g^2 | push * g2 * (offset + shift) => push * (g2 * offset + shift)
diffusion_envs.exact.gaussian.shift_response
    response without 2 | return 2 * => return 1 *
    response: signal at the wrong end | / high => / low
    response: noised variance ignored | gain * ( => 0 * gain + 1.01 * (
diffusion_envs.exact.linear_policy.chain
    chain: score's change not passed on | score_gain * (offset + shift) => score_gain * offset + shift
shared
    score's gain of the eta family without its 1/2
    full noise whatever eta is
    atan for atanh
    transition of the SDE
    transition of the reversal
    DDIM: eta ignored
    mean: noise not taken out of the direction
"""
