"""What the KL-regularised optimum generates: the tilt only where the start is forgotten.

The optimal score is that of the tilted data; but generation starts from p_T or N(0, I), not from
the tilt noised to T. So what comes out is not the tilt at finite alpha_T, and J* is not b log Z. It
is often said without that condition.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from ctrl import linear
from diffusion_envs.exact import gaussian
from verification.claim import Check, Setting, claim, expectation, limit, pathwise, wrong
from verification.closed_form import tilt as exact
from verification.closed_form.tilt import KL_WEIGHT, REWARD
from verification.closed_form.vp_gaussian import LONG, SHORT, Normal, VPGaussian, kl
from verification.gaussian_diffusion import (
    DATA,
    ONLY_DOUBLE,
    STANDARD,
    START,
    ctrl_normal,
    normal,
    quadratic,
    schedule,
)


def at_the_optimum(setting: Setting, p: VPGaussian, start: Normal) -> gaussian.Gaussian:
    """The law of X_T under the optimal score, from this start."""
    tilted = gaussian.tilt(normal(setting, DATA), quadratic(setting, REWARD), KL_WEIGHT)
    begin, end = setting.tensor(p.horizon), setting.tensor(0.0)
    whole = gaussian.transition(tilted, schedule(p), begin, end)
    return whole.after(normal(setting, start))


def best(setting: Setting, p: VPGaussian, start: Normal) -> torch.Tensor:
    """J* from this start."""
    begin, end = setting.tensor(p.horizon), setting.tensor(0.0)
    value = gaussian.optimal_value(
        normal(setting, DATA), schedule(p), quadratic(setting, REWARD), KL_WEIGHT, begin, end
    )
    return value.expectation(normal(setting, start))


def tilted_value(setting: Setting) -> torch.Tensor:
    """b log Z."""
    Q, slope, c = (setting.tensor(each) for each in REWARD)
    data = ctrl_normal(normal(setting, DATA))
    return KL_WEIGHT * linear.tilt(data, Q, slope, KL_WEIGHT, c).log_normaliser


@claim(
    statement="""
        Started from rho_0, the KL-optimal process ends in the law of p_pre(x_0, x_T) exp(r(x_T)/b)
        / E[exp(r/b) | x_0]: the tilt only if rho_0 is the tilt noised to T, or if X_0 and X_T are
        independent under the pretrained model (memoryless, alpha_T = 0). Its value falls short:
        b log Z - J* = b KL(p_T || p*_T) from p_T; from p*_T it exceeds it by b KL(p*_T || p_T).
        With alpha_T -> 0 the bias is b alpha_T^2 |m* - m|^2 / 2 and KL(generated || tilt) is
        alpha_T^4 (m - m*)'S*(m - m*)/2 from p_T, alpha_T^4 m*'S*m*/2 from N(0, I).
        That fine-tuning generates the tilt is false at finite alpha_T.
        """,
    source="Domingo-Enrich et al. 2024, arXiv 2409.08861, section 4 (value function bias)",
    why_double=ONLY_DOUBLE,
    wrongs=[
        wrong(
            "the tilt itself for what is generated",
            "verification.claims.value_function_bias.at_the_optimum",
            "return whole.after(normal(setting, start))",
            "return tilted",
        ),
        wrong(
            "noise to come, but no memory of the start",
            "diffusion_envs.exact.gaussian.Affine.after",
            "self.matrix @ law.covariance @ self.matrix.mT + self.covariance",
            "self.covariance",
        ),
        wrong(
            "X_T independent of X_0: the bias ignored",
            "diffusion_envs.exact.gaussian.optimal_value",
            "step = transition(data, schedule, s, s_end)",
            "step = Affine(0 * data.covariance, data.mean, data.covariance)",
        ),
        wrong(
            "initial law N(0, I) for p_T",
            "diffusion_envs.exact.gaussian._noised_spectrum",
            "alpha.square() * data.spectrum[0]",
            "alpha * data.spectrum[0]",
        ),
        wrong(
            "direction of the KL",
            "ctrl.linear.gaussian_kl",
            "m1, S1, m0, S0 = broadcast",
            "m0, S0, m1, S1 = broadcast",
        ),
        wrong(
            "KL in reward instead of nats",
            "ctrl.linear.tilt",
            "value(m) / b)",
            "value(m))",
        ),
        wrong(
            "deterministic sampler's map for the SDE's transition",
            "diffusion_envs.exact.gaussian.transition",
            "values = signal ** (eta**2) * (last / first) ** ((1 + eta**2) / 2)",
            "values = (last / first) ** 0.5",
        ),
        wrong(
            "log-partition term missing",
            "diffusion_envs.exact.gaussian.optimal_value",
            "- torch.linalg.slogdet(inner)[1]",
            "",
        ),
    ],
)
def value_function_bias(setting: Setting) -> Iterator[Check]:
    """From p_T, N(0, I), p*_T and another start; at two alpha_T; and in the limit."""
    tilted, _ = exact.tilt(DATA, REWARD, KL_WEIGHT)
    for name, p in (("alpha_T .0066", LONG), ("alpha_T .37", SHORT)):
        p_T, tilt_T = p.noised(p.horizon), p.with_data(tilted).noised(p.horizon)
        optimum = exact.optimum_from(p, REWARD, KL_WEIGHT, p.horizon)
        for start, law in (("p_T", p_T), ("N(0, I)", STANDARD), ("another start", START)):
            want, got = optimum.of(law), at_the_optimum(setting, p, law)
            both = torch.cat([got.mean, got.covariance.flatten()])
            yield expectation(
                f"{name}: law at the end from {start}, against conditional tilts",
                both,
                np.concatenate([want.mean, want.covariance.ravel()]),
            )
        got = at_the_optimum(setting, p, tilt_T)
        yield expectation(
            f"{name}: from p*_T the tilt is generated exactly",
            torch.cat([got.mean, got.covariance.flatten()]),
            np.concatenate([tilted.mean, tilted.covariance.ravel()]),
        )
        b_log_z = tilted_value(setting)
        yield expectation(
            f"{name}: b log Z - J* from p_T is b KL(p_T || p*_T)",
            b_log_z - best(setting, p, p_T),
            KL_WEIGHT * kl(p_T, tilt_T),
            scale=KL_WEIGHT,  # the bias is the difference of two numbers of this size
        )
        yield expectation(
            f"{name}: J* - b log Z from p*_T is b KL(p*_T || p_T)",
            best(setting, p, tilt_T) - b_log_z,
            KL_WEIGHT * kl(tilt_T, p_T),
            scale=KL_WEIGHT,
        )
    law = ctrl_normal(normal(setting, tilted))
    for start in (SHORT.noised(1.0), STANDARD):
        name = "N(0, I)" if start is STANDARD else "p_T"
        yield expectation(
            f"alpha_T .37: KL(generated || tilt) from {name}",
            linear.gaussian_kl(ctrl_normal(at_the_optimum(setting, SHORT, start)), law),
            kl(exact.optimum_from(SHORT, REWARD, KL_WEIGHT, 1.0).of(start), tilted),
        )
    gap = tilted.mean - DATA.mean
    yield limit(
        "alpha_T -> 0: bias / alpha_T^2",
        _extrapolated(lambda p: tilted_value(setting) - best(setting, p, p.noised(1.0)), 2),
        KL_WEIGHT * gap @ gap / 2,
    )
    for name, start, away in (("p_T", None, gap), ("N(0, I)", STANDARD, tilted.mean)):

        def divergence(p: VPGaussian, start: Normal | None = start) -> torch.Tensor:
            generated = at_the_optimum(setting, p, start or p.noised(1.0))
            return linear.gaussian_kl(ctrl_normal(generated), law)

        yield limit(
            f"alpha_T -> 0: KL(generated || tilt) from {name} / alpha_T^4",
            _extrapolated(divergence, 4),
            away @ tilted.covariance @ away / 2,
        )


def _extrapolated(quantity: Callable[[VPGaussian], torch.Tensor], power: int) -> torch.Tensor:
    """The limit of quantity / alpha_T^power, whose error is of the order alpha_T^2."""
    by_model = []
    for beta in (6.0, 6.0 + 2 * np.log(2)):  # alpha_T^2 = e^-beta: a quarter of it
        p = VPGaussian(DATA.mean, DATA.covariance, beta, beta)
        by_model.append(quantity(p) / p.alpha(1.0) ** power)
    return (4 * by_model[1] - by_model[0]) / 3


# Where the tilt begins to exist: b above EDGE.
EDGE = float(-np.linalg.eigvals(DATA.covariance @ REWARD.Q).real.min())
WEIGHTS = [0.4 * EDGE, 0.9 * EDGE, 1.1 * EDGE, 1.7 * EDGE]


def accepted(call: Callable[..., object], *arguments: object) -> float:
    """1 if the call returns, 0 if it refuses with a ValueError."""
    try:
        call(*arguments)
    except ValueError:
        return 0.0
    return 1.0


@claim(
    statement="""
        Where the reward is not concave (Q has a negative eigenvalue) the tilt exists if and only if
        S^-1 + Q/b > 0, and V* at noising time s if and only if C_s^-1 + Q/b > 0, C_s the covariance
        of the data given Y_s: a weaker condition, so that V* may exist at s and be infinite further
        from the data. Where they do not exist every function refuses them.
        """,
    source="Gaussian integrals; the blow-up of the Riccati equation of Dai Pra 1991",
    why_double=ONLY_DOUBLE,
    wrongs=[
        wrong(
            "no refusal",
            "diffusion_envs.exact.gaussian._require_finite_mass",
            "if not bool(least",
            "if False and not bool(least",
        ),
        wrong(
            "condition on the data's covariance, with b forgotten",
            "diffusion_envs.exact.gaussian._require_finite_mass",
            "curvature @ root / kl_weight",
            "curvature @ root",
        ),
        wrong(
            "only concave rewards accepted",
            "diffusion_envs.exact.gaussian._require_finite_mass",
            "torch.linalg.eigvalsh(inner)",
            "torch.linalg.eigvalsh(curvature)",
        ),
        wrong(
            "V* judged by the tilt's condition",
            "diffusion_envs.exact.gaussian.optimal_value",
            "torch.linalg.eigh(step.covariance.detach())",
            "data.spectrum",
        ),
        wrong(
            "condition on the determinant's sign alone",
            "diffusion_envs.exact.gaussian._require_finite_mass",
            "torch.linalg.eigvalsh(inner).min()",
            "torch.linalg.slogdet(inner)[1]",
        ),
        wrong(
            "ctrl: no refusal",
            "ctrl.linear.kl_control._require_tilt",
            "if not bool((least > margin(C.shape[-1], size)).all())",
            "if False",
        ),
        wrong(
            "ctrl: covariance not weighted",
            "ctrl.linear.kl_control._require_tilt",
            "root.mT @ weighted @ root)[..., 0] + 1",
            "weighted)[..., 0] + 1",
        ),
    ],
)
def existence_of_the_tilt(setting: Setting) -> Iterator[Check]:
    """Weights on both sides of the edge; times on both sides of the blow-up."""
    data, r = normal(setting, DATA), quadratic(setting, REWARD)
    want = [exists(DATA.covariance, b) for b in WEIGHTS]
    got = [accepted(gaussian.tilt, data, r, b) for b in WEIGHTS]
    yield pathwise("which weights have a tilt", got, want)
    Q, slope, _ = (setting.tensor(each) for each in REWARD)
    got = [accepted(linear.tilt, ctrl_normal(data), Q, slope, b) for b in WEIGHTS]
    yield pathwise("ctrl: which weights have a tilt", got, want)
    times, end = (0.1, 0.45, 0.7, 1.0), setting.tensor(0.0)
    got, want = [], []
    for b in WEIGHTS[:2]:
        for s in times:
            arguments = schedule(SHORT), r, b, setting.tensor(s), end
            got.append(accepted(gaussian.optimal_value, data, *arguments))
            want.append(exists(SHORT.posterior(s).C, b))
    yield pathwise("which times have a value", got, want)


def exists(covariance: np.ndarray, b: float) -> float:
    """1 if covariance^-1 + Q/b > 0, else 0."""
    return float((np.linalg.eigvalsh(np.linalg.inv(covariance) + REWARD.Q / b) > 0).all())
