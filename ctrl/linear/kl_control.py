"""Control paid by its KL: a Gaussian process under a quadratic terminal reward.

    r(x) = -x'Qx/2 + l'x + c,   maximise E[r(X_T)] - b KL,   b = kl_weight

Sources  [DP91] Dai Pra 1991, a stochastic control approach to reciprocal diffusion processes,
         Applied Mathematics and Optimization 23 (the Cole-Hopf transform).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.linear.gaussian import Affine, Gaussian, Transition, require_float64, scalar
from ctrl.linear.lq import Quadratic, broadcast_batches, event_of, require_symmetric, times
from ctrl.linear.margin import margin, solve

_NO_TILT = (
    "Q must leave covariance^{-1} + Q / kl_weight positive definite, or the expectation of "
    "exp(reward / kl_weight) is infinite; a larger kl_weight helps"
)


@dataclass(frozen=True, eq=False)
class Tilted:
    """A Gaussian law reweighted by exp(reward / kl_weight).

    Attributes:
        law: N(m*, S*).
        log_normaliser: log Z = log E[exp(reward / kl_weight)], nats; times ``kl_weight`` it is the
            largest E[reward] - kl_weight KL.
    """

    law: Gaussian
    log_normaliser: Float[Tensor, " *batch"]


def tilt(
    law: Gaussian,
    Q: Float[Tensor, "*Q dim dim"],
    l: Float[Tensor, "*l dim"],  # noqa: E741  # the reward's name
    kl_weight: float | Float[Tensor, " *weight"],
    c: float | Float[Tensor, " *c"] = 0.0,
) -> Tilted:
    """The law that maximises E[r(X)] - kl_weight KL( . || law), r(x) = -x'Qx/2 + l'x + c.

    N(m, S) becomes S* = (S^{-1} + Q/b)^{-1}, m* = S* (S^{-1} m + l/b); S may be singular.

    Args:
        law: N(m, S).
        Q: symmetric; negative eigenvalues are allowed as far as S* is positive.
        l: linear part of the reward.
        kl_weight: b > 0, reward per nat.
        c: constant part of the reward.

    Raises:
        ValueError: S^{-1} + Q/b is not positive definite: the maximum is infinite.
    """
    tensors = require_float64(mean=law.mean, covariance=law.covariance, Q=Q, l=l)
    tensors |= require_float64(kl_weight=scalar(kl_weight, Q), c=scalar(c, Q))
    (n,) = event_of("mean", law.mean, 1)
    events = {"mean": (n,), "covariance": (n, n), "Q": (n, n), "l": (n,), "kl_weight": (), "c": ()}
    m, S, Qs, ls, b, cs = broadcast_batches(tensors, events).values()
    require_symmetric("covariance", S)
    identity = torch.eye(n).to(S)
    value = kl_optimal_value(Transition(identity.expand_as(S), 0 * m, S), Qs, ls, b, cs)
    covariance = solve(identity + S @ Qs / b[..., None, None], S, _NO_TILT)
    mean = m + times(S, value.gradient(m)) / b[..., None]
    return Tilted(Gaussian(mean, 0.5 * (covariance + covariance.mT)), value(m) / b)


def kl_optimal_value(
    base: Transition,
    Q: Float[Tensor, "*Q dim dim"],
    l: Float[Tensor, "*l dim"],  # noqa: E741  # the reward's name
    kl_weight: float | Float[Tensor, " *weight"],
    c: float | Float[Tensor, " *c"] = 0.0,
) -> Quadratic:
    """V*(t, x) = kl_weight log E[exp(r(X_T) / kl_weight) | X_t = x]  ([DP91]; Cole-Hopf).

    The largest E[r(X_T)] - kl_weight (path KL from the base), r(x) = -x'Qx/2 + l'x + c. With
    M = F x + f and K = (1 + C Q/b)^{-1}

        V* = -M'QK M/2 + l'K M + l'K C l/(2b) - b/2 logdet(1 + C Q/b) + c.

    Args:
        base: (F, f, C) of the uncontrolled process from t to T; C may be singular.
        Q: symmetric.
        l: linear part of the reward.
        kl_weight: b > 0, reward per nat.
        c: constant part of the reward.

    Raises:
        ValueError: C^{-1} + Q/b is not positive definite: the value is infinite.
    """
    tensors = require_float64(
        F=base.F, f=base.f, C=base.C, Q=Q, l=l, kl_weight=scalar(kl_weight, Q), c=scalar(c, Q)
    )
    n = event_of("F", tensors["F"], 2)[-1]
    events = {"F": (n, n), "f": (n,), "C": (n, n), "Q": (n, n), "l": (n,), "kl_weight": (), "c": ()}
    full = broadcast_batches(tensors, events)
    require_symmetric("C", full["C"])
    require_symmetric("Q", full["Q"])
    if not bool((full["kl_weight"] > 0).all()):
        raise ValueError(f"kl_weight must be positive, got {full['kl_weight'].tolist()}")
    return _cole_hopf(*full.values())


def _cole_hopf(
    F: Tensor,
    f: Tensor,
    C: Tensor,
    Q: Tensor,
    slope: Tensor,
    b: Tensor,
    c: Tensor,
) -> Quadratic:
    weighted = Q / b[..., None, None]
    _require_tilt(C.detach(), weighted.detach())
    grow = torch.eye(Q.shape[-1]).to(Q) + C @ weighted
    K = solve(grow, torch.eye(Q.shape[-1]).to(Q).expand_as(Q), _NO_TILT)
    kept = 0.5 * (Q @ K + (Q @ K).mT)  # symmetric but for round-off
    noise_term = (slope * times(K, times(C, slope))).sum(-1) / (2 * b)
    logdet = torch.linalg.slogdet(grow).logabsdet
    lean = times(K.mT, slope)
    return Quadratic(
        hessian=-F.mT @ kept @ F,
        slope=times(F.mT, lean - times(kept, f)),
        constant=c + noise_term - 0.5 * b * logdet + ((lean - 0.5 * times(kept, f)) * f).sum(-1),
    )


def kl_optimal_drift(
    value: Quadratic,
    G: Float[Tensor, "*G dim noise"],
    kl_weight: float | Float[Tensor, " *weight"],
) -> Affine:
    """Change of the drift by the optimal control: G G' grad V* / kl_weight, as a function of x.

    Args:
        value: V* at the same time, by ``kl_optimal_value``.
        G: diffusion.
        kl_weight: b > 0, reward per nat.
    """
    b = scalar(kl_weight, G)
    gain = G @ G.mT / b[..., None, None]
    return Affine(gain @ value.hessian, times(gain, value.slope))


def _require_tilt(C: Tensor, weighted: Tensor) -> None:
    """1 + C^{1/2} (Q/b) C^{1/2} > 0, which is C^{-1} + Q/b > 0 where C is not singular."""
    eigenvalues, vectors = torch.linalg.eigh(C)
    if bool((eigenvalues < -1e-10 * eigenvalues.abs().amax(-1, keepdim=True)).any()):
        raise ValueError(f"covariance must not be negative; its eigenvalues are {eigenvalues}")
    root = vectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(-2)
    size = 1 + eigenvalues.abs().amax(-1) * weighted.square().sum((-2, -1)).sqrt()
    if not bool(torch.isfinite(size).all()):
        raise ValueError(f"{_NO_TILT}; C Q / kl_weight overflows")
    least = torch.linalg.eigvalsh(root.mT @ weighted @ root)[..., 0] + 1
    if not bool((least > margin(C.shape[-1], size)).all()):
        raise ValueError(
            f"{_NO_TILT}; the least eigenvalue of 1 + C Q / kl_weight is {float(least.min()):g}, "
            "which is not positive beyond round-off"
        )
