"""The KL-regularised optimum is a tilt, and its value a logarithm of an expectation.

maximise E[r(X_T)] - b KL: over laws (``tilt``), over controls of a linear SDE (``cole_hopf``), over
scores of a diffusion model (``optimal_score``). b is reward per nat. Each answer is held against
completed squares in precisions, against Bayes' rule, and against the Riccati equation.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ctrl import linear
from diffusion_envs.exact import gaussian
from verification.claim import Check, Setting, claim, expectation, pathwise, wrong
from verification.closed_form import tilt as exact
from verification.closed_form.tilt import KL_WEIGHT, REWARD
from verification.closed_form.vp_gaussian import LONG, SHORT, VPGaussian, kl
from verification.gaussian_diffusion import (
    DATA,
    ONLY_DOUBLE,
    START,
    STATES,
    normal,
    quadratic,
    schedule,
)

TIME = 0.37  # noising time where values are compared


def coefficients(Q: Tensor, slope: Tensor, constant: Tensor) -> Tensor:
    """Coefficients of a quadratic, in one vector."""
    return torch.cat([Q.flatten(), slope, constant.reshape(1)])


def expected(value: exact.Quadratic) -> np.ndarray:
    """The same of a closed form."""
    return np.concatenate([value.Q.ravel(), value.l, [value.c]])


@claim(
    statement="""
        The law that maximises E[r(X)] - b KL(. || P) is P exp(r / b) / Z, and the maximum is
        b log Z = b log E[exp(r / b)] under P. For P = N(m, S) and r = -x'Qx/2 + l'x + c it is
        N(m*, S*), S* = (S^-1 + Q/b)^-1, m* = S* (S^-1 m + l/b).
        """,
    source="Gibbs' variational principle (Donsker & Varadhan 1975); Dai Pra 1991",
    why_double=ONLY_DOUBLE,
    wrongs=[
        wrong(
            "b for 1/b in the tilted mean",
            "diffusion_envs.exact.gaussian.tilt",
            "reward.gradient(data.mean)) / kl_weight",
            "reward.gradient(data.mean)) * kl_weight",
        ),
        wrong(
            "b for 1/b in the tilted covariance",
            "diffusion_envs.exact.gaussian.tilt",
            "@ root / kl_weight",
            "@ root * kl_weight",
        ),
        wrong(
            "precision of the data for its covariance",
            "diffusion_envs.exact.gaussian.tilt",
            "covariance = root @ solve(inner, root, _NO_MASS)",
            "covariance = torch.linalg.inv(root @ solve(inner, root, _NO_MASS))",
        ),
        wrong(
            "the mean is shifted by the data's covariance instead of the tilt's",
            "diffusion_envs.exact.gaussian.tilt",
            "_apply(covariance, reward",
            "_apply(data.covariance, reward",
        ),
        wrong(
            "b for 1/b in ctrl's tilted covariance",
            "ctrl.linear.tilt",
            "S @ Qs / b[..., None, None]",
            "S @ Qs * b[..., None, None]",
        ),
        wrong(
            "outer b missing: log-normaliser in reward instead of nats",
            "ctrl.linear.tilt",
            "value(m) / b)",
            "value(m))",
        ),
        wrong(
            "gradient of the value not divided by b",
            "ctrl.linear.tilt",
            "times(S, value.gradient(m)) / b[..., None]",
            "times(S, value.gradient(m))",
        ),
        wrong(
            "direction of the KL",
            "ctrl.linear.gaussian_kl",
            "m1, S1, m0, S0 = broadcast",
            "m0, S0, m1, S1 = broadcast",
        ),
        wrong(
            "log-partition term missing: seen in the value, not in its gradient",
            "ctrl.linear.kl_control._cole_hopf",
            "- 0.5 * b * logdet",
            "",
        ),
    ],
)
def tilt(setting: Setting) -> Iterator[Check]:
    """Both production tilts, and the maximum that they attain."""
    b, (tilted, log_z) = KL_WEIGHT, exact.tilt(DATA, REWARD, KL_WEIGHT)
    law = gaussian.tilt(normal(setting, DATA), quadratic(setting, REWARD), b)
    yield expectation("mean of the tilt, against completed squares", law.mean, tilted.mean)
    yield expectation(
        "covariance of the tilt, against completed squares", law.covariance, tilted.covariance
    )
    data = linear.Gaussian(setting.tensor(DATA.mean), setting.tensor(DATA.covariance))
    Q, slope, c = (setting.tensor(each) for each in REWARD)
    tilted_law = linear.tilt(data, Q, slope, b, c)
    yield expectation("ctrl: mean, against completed squares", tilted_law.law.mean, tilted.mean)
    yield expectation(
        "ctrl: covariance, against completed squares", tilted_law.law.covariance, tilted.covariance
    )
    yield expectation("ctrl: log Z, against completed squares", tilted_law.log_normaliser, log_z)
    value = linear.Quadratic(-Q, slope, c)
    gain = value(tilted_law.law.mean) - 0.5 * (Q * tilted_law.law.covariance).sum()
    divergence = linear.gaussian_kl(tilted_law.law, data)
    yield expectation("its E[r] - b KL is b log Z", gain - b * divergence, b * log_z)
    yield expectation("its KL from the data, against another formula", divergence, kl(tilted, DATA))


def ou_value(setting: Setting, time_to_go: float | Tensor) -> linear.Quadratic:
    """V* of the Ornstein-Uhlenbeck base at some time to go."""
    A, b, G = (setting.tensor(each) for each in BASE)
    base = linear.transition(A, b, G, time_to_go)
    Q, slope, c = (setting.tensor(each) for each in REWARD)
    return linear.kl_optimal_value(base, Q, slope, KL_WEIGHT, c)


# dX = (A X + a) dt + G dW: rotating, not symmetric, more noise than coordinates
BASE = (
    [[-0.7, 0.45], [-0.2, 0.15]],
    [0.25, -0.4],
    [[0.8, 0.3, -0.2], [0.15, 0.5, 0.4]],
)
TO_GO = 0.85


@claim(
    statement="""
        The value of maximising E[r(X_T)] - b (path KL) over controls of dX = (AX + a)dt + G dW is
        V* = b log E[exp(r(X_T) / b) | X_t = x] (Cole-Hopf). It solves the HJB equation
        d_t V + (Ax + a).grad V + tr(GG' Hess V)/2 + |G' grad V|^2 / (2b) = 0, that is a Riccati
        equation, and the optimal control adds GG' grad V* / b to the drift.
        """,
    source="Dai Pra 1991, Cole-Hopf transform; Kappen 2005",
    why_double=ONLY_DOUBLE,
    wrongs=[
        wrong(
            "log-partition term missing: seen in the value, not in its gradient",
            "ctrl.linear.kl_control._cole_hopf",
            "- 0.5 * b * logdet",
            "",
        ),
        wrong(
            "outer b missing in the log-partition term",
            "ctrl.linear.kl_control._cole_hopf",
            "- 0.5 * b * logdet",
            "- 0.5 * logdet",
        ),
        wrong(
            "1/2 missing in the log-partition term",
            "ctrl.linear.kl_control._cole_hopf",
            "- 0.5 * b * logdet",
            "- b * logdet",
        ),
        wrong(
            "b for 1/b in the exponent",
            "ctrl.linear.kl_control._cole_hopf",
            "weighted = Q / b",
            "weighted = Q * b",
        ),
        wrong(
            "b inverted in the linear term's spread",
            "ctrl.linear.kl_control._cole_hopf",
            ".sum(-1) / (2 * b)",
            ".sum(-1) * b / 2",
        ),
        wrong(
            "transpose missing on K",
            "ctrl.linear.kl_control._cole_hopf",
            "lean = times(K.mT, slope)",
            "lean = times(K, slope)",
        ),
        wrong(
            "expected reward for its exponential average (noise to come ignored)",
            "ctrl.linear.kl_control._cole_hopf",
            "+ C @ weighted",
            "+ 0 * C @ weighted",
        ),
        wrong(
            "sign of the reward's curvature",
            "ctrl.linear.kl_control._cole_hopf",
            "hessian=-F.mT",
            "hessian=F.mT",
        ),
        wrong(
            "drift change not divided by b",
            "ctrl.linear.kl_optimal_drift",
            "G @ G.mT / b[..., None, None]",
            "G @ G.mT",
        ),
        wrong(
            "control in place of drift change: no GG'",
            "ctrl.linear.kl_optimal_drift",
            "G @ G.mT / b[..., None, None]",
            "torch.eye(2).to(G) / b[..., None, None]",
        ),
        wrong(
            "noise G'G for GG' in the transition's covariance",
            "ctrl.linear.gaussian._transition",
            "G @ G.mT",
            "G[:, :2].mT @ G[:, :2]",
        ),
    ],
)
def cole_hopf(setting: Setting) -> Iterator[Check]:
    """One value by three routes, and the drift that belongs to it."""
    A, a, G = (np.array(each) for each in BASE)
    value = ou_value(setting, TO_GO)
    got = coefficients(-value.hessian, value.slope, value.constant)
    riccati = exact.linear_riccati(A, a, G, REWARD, KL_WEIGHT, TO_GO)
    yield expectation("V*, against the Riccati equation", got, expected(riccati))
    x = setting.tensor(STATES)
    logs = exact.log_average(A, a, G, REWARD, KL_WEIGHT, TO_GO, np.array(STATES))
    yield expectation("V*, against b log E[exp(r / b)] by quadrature", value(x), logs)
    drift = linear.kl_optimal_drift(value, setting.tensor(G), KL_WEIGHT)
    steps = G @ G.T @ (riccati.l - np.array(STATES) @ riccati.Q)[..., None] / KL_WEIGHT
    yield pathwise("drift change, against GG' grad V* / b", drift(x), steps[..., 0])
    left = setting.tensor(TO_GO)
    rate = torch.func.jvp(lambda u: ou_value(setting, u)(x), (left,), (torch.ones_like(left),))[1]
    slope, noise_covariance = value.gradient(x), setting.tensor(G @ G.T)
    transport = (slope * (x @ setting.tensor(A).mT + setting.tensor(a))).sum(-1)
    curved = 0.5 * (noise_covariance * value.hessian).sum()
    best = 0.5 * (slope * drift(x)).sum(-1)  # |G' grad V|^2 / (2b)
    yield pathwise(
        "HJB: what V* loses per time to go, against the rest", rate, transport + curved + best
    )


@claim(
    statement="""
        For data N(m, S) and a quadratic reward the optimal score is a* = s_pre + grad V* / b (not
        g^2 grad V*/b), and it is the score of the tilted data noised to the same time. V* solves
        d_t V + b_pre.grad V + g^2/2 Lap V + g^2/(2b) |grad V|^2 = 0, and its mean over any start
        is E[r] - b (path KL) of the optimal process.
        """,
    source="Uehara et al. 2024, arXiv 2402.15194; Dai Pra 1991",
    wrongs=[
        wrong(
            "log-partition term missing: seen in the value, not in its gradient",
            "diffusion_envs.exact.gaussian.optimal_value",
            "- torch.linalg.slogdet(inner)[1]",
            "",
        ),
        wrong(
            "outer b missing in the quadratic part",
            "diffusion_envs.exact.gaussian.optimal_value",
            "kl_weight * bent",
            "bent",
        ),
        wrong(
            "1/2 missing in the constant",
            "diffusion_envs.exact.gaussian.optimal_value",
            "* 0.5",
            "* 1.0",
        ),
        wrong(
            "b for 1/b in the reward's curvature",
            "diffusion_envs.exact.gaussian.optimal_value",
            "reward.curvature / kl_weight",
            "reward.curvature * kl_weight",
        ),
        wrong(
            "expected reward for its exponential average (noise to come ignored)",
            "diffusion_envs.exact.gaussian.optimal_value",
            "+ step.covariance @ curvature",
            "",
        ),
        wrong(
            "normaliser under the controlled law",
            "diffusion_envs.exact.gaussian.optimal_value",
            "transition(data, schedule",
            "transition(tilt(data, reward, kl_weight), schedule",
        ),
        wrong(
            "transition of the probability flow for that of the SDE",
            "diffusion_envs.exact.gaussian.optimal_value",
            "schedule, s, s_end)",
            "schedule, s, s_end, 0.0)",
        ),
        wrong(
            "transpose missing on the solved matrix",
            "diffusion_envs.exact.gaussian.optimal_value",
            "_apply(solved.mT, slope)",
            "_apply(solved, slope)",
        ),
        wrong(
            "sign of the gradient",
            "diffusion_envs.exact.gaussian.Quadratic.gradient",
            "self.slope - _apply",
            "self.slope + _apply",
        ),
        wrong(
            "g^2 grad V*/b added to the score, which belongs in the drift",
            "verification.claims.tilt.optimal_action",
            "grad / KL_WEIGHT",
            "grad * schedule(p).g2(s) / KL_WEIGHT",
        ),
        wrong(
            "grad V* not divided by b",
            "verification.claims.tilt.optimal_action",
            "grad / KL_WEIGHT",
            "grad",
        ),
        wrong(
            "1/2 missing before the Laplacian in the HJB equation",
            "verification.claims.tilt.hjb_residual",
            "- 0.5 * g2 * value.curvature.trace()",
            "- g2 * value.curvature.trace()",
        ),
    ],
)
def optimal_score(setting: Setting) -> Iterator[Check]:
    """V* and a* of a long and of a short schedule."""
    data, x = normal(setting, DATA), setting.tensor(STATES)
    for name, p in (("beta .1 to 20", LONG), ("beta 2", SHORT)):
        s, end = setting.tensor(TIME), setting.tensor(0.0)
        value = gaussian.optimal_value(
            data, schedule(p), quadratic(setting, REWARD), KL_WEIGHT, s, end
        )
        got = coefficients(value.curvature, value.slope, value.constant)
        bayes = expected(exact.optimal_value(p, REWARD, KL_WEIGHT, TIME))
        yield expectation(f"{name}: V*, against Z p*_s / p_s", got, bayes)
        riccati = expected(exact.riccati_value(p, REWARD, KL_WEIGHT, TIME))
        yield expectation(f"{name}: V*, against the Riccati equation", got, riccati)
        tilted, _ = exact.tilt(DATA, REWARD, KL_WEIGHT)
        matrix, vector = p.with_data(tilted).score(TIME)
        action = optimal_action(setting, p, s, value.gradient(x), x)
        yield pathwise(
            f"{name}: a*, against the score of the noised tilt",
            action,
            np.array(STATES) @ matrix.T + vector,
        )
        yield pathwise(f"{name}: HJB equation", *hjb_residual(setting, p, x))
        first = gaussian.optimal_value(
            data, schedule(p), quadratic(setting, REWARD), KL_WEIGHT, setting.tensor(p.horizon), end
        )
        gain = REWARD.expectation(exact.optimum_from(p, REWARD, KL_WEIGHT, p.horizon).of(START))
        cost = exact.optimal_path_kl(p, REWARD, KL_WEIGHT, START)
        yield expectation(
            f"{name}: E V* at the start, against E[r] - b (path KL)",
            first.expectation(normal(setting, START)),
            gain - KL_WEIGHT * cost,
        )


def optimal_action(setting: Setting, p: VPGaussian, s: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """s_pre + grad V* / b."""
    return gaussian.score(normal(setting, DATA), schedule(p), s, x) + grad / KL_WEIGHT


def hjb_residual(setting: Setting, p: VPGaussian, x: Tensor) -> tuple[Tensor, Tensor]:
    """d_s V*, and what the HJB equation says it is: everything else."""
    data, end = normal(setting, DATA), setting.tensor(0.0)
    s = setting.tensor(TIME).requires_grad_()
    value = gaussian.optimal_value(data, schedule(p), quadratic(setting, REWARD), KL_WEIGHT, s, end)
    rate = torch.stack([torch.autograd.grad(v, s, retain_graph=True)[0] for v in value(x)])
    g2, slope = schedule(p).g2(s), value.gradient(x)
    drift = g2 * (0.5 * x + gaussian.score(data, schedule(p), s, x))
    rest = (drift * slope).sum(-1) - 0.5 * g2 * value.curvature.trace()
    return rate, rest + 0.5 * g2 / KL_WEIGHT * slope.square().sum(-1)
