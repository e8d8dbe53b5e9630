"""Trust regions: surrogates that stay near the old policy, and how near is near enough.

Four bounds on how far a surrogate can be from the performance that it stands for:

    gap = V^{new} - L(new) = int_0^T ( E_{p_new,t} h_t - E_{p_t} h_t ) dt,   h_t = E_{a ~ new} q
    K_t = KL(P_new,[0,t] || P_[0,t]) = 1/2 int_0^t |u|^2                 (``girsanov.controls``)

h and sqrt(K) are both of first order in the change of the policy, so every bound is of second: that
is what makes small steps safe ([SaA] Theorem 4.4). All are time integrals by the left end of each
step; leading dimensions are batches.

Sources  [SaA] Zhao, Chen, Zhang, Yao & Tang 2025, "Score as Action", arXiv 2502.01819.
         [ZTY] Zhao, Tang & Yao 2023, policy optimisation in continuous time, NeurIPS 36.
         [S17] Schulman et al. 2017, proximal policy optimisation, arXiv 1707.06347.
         [T96] Talagrand 1996, transportation cost for Gaussian measures, GAFA 6.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import as_like
from ctrl.paths import TimeGrid


def clipped_surrogate(
    log_ratio: Float[Tensor, " rows"],
    advantage: Float[Tensor, " rows"],
    half_width: Float[Tensor, " rows"],
) -> Float[Tensor, " rows"]:
    """min(ratio A, clip(ratio) A) of [S17], with the clip on the log-ratio of a whole step.

    Args:
        log_ratio: log density of the step's decision, new over old policy, summed over coordinates.
        advantage: of that decision, reward.
        half_width: trusted |log_ratio| of each row, nats. A step of size h has a log-ratio of
            standard deviation proportional to sqrt(h), so a range that is to mean the same on every
            grid scales so too.

    Returns:
        The surrogate gain of each row, reward. At equal policies its gradient is that of
        log_ratio times advantage.

    Raises:
        ValueError: the shapes differ.
    """
    if not log_ratio.shape == advantage.shape == half_width.shape:
        raise ValueError(
            "log_ratio, advantage and half_width must have one shape, got "
            f"{list(log_ratio.shape)}, {list(advantage.shape)} and {list(half_width.shape)}"
        )
    ratio = log_ratio.exp()
    trusted = torch.minimum(torch.maximum(log_ratio, -half_width), half_width).exp()
    return torch.minimum(ratio * advantage, trusted * advantage)


def penalised_surrogate(
    log_ratio: Float[Tensor, " rows"],
    advantage: Float[Tensor, " rows"],
    kl: Float[Tensor, " rows"],
    penalty: float,
) -> Float[Tensor, " rows"]:
    """ratio A - penalty sqrt(KL): the surrogate of CPPO with its penalty ([ZTY] section 4).

    The bound that justifies it is of first order in sqrt(KL), so the root is taken at every state,
    before the mean.

    Args:
        log_ratio: log density of the decision, new over old policy, nats.
        advantage: of that decision, reward.
        kl: of the two policies at that state (``policy_kl``) or step, nats.
        penalty: reward per sqrt(nat).

    Raises:
        ValueError: the shapes differ, the penalty is negative, or a KL is.
    """
    if not log_ratio.shape == advantage.shape == kl.shape:
        raise ValueError(
            "log_ratio, advantage and kl must have one shape, got "
            f"{list(log_ratio.shape)}, {list(advantage.shape)} and {list(kl.shape)}"
        )
    if not 0 <= penalty < math.inf:
        raise ValueError(f"penalty must be at least 0 and finite, got {penalty}")
    if bool((kl < 0).any()):
        raise ValueError(f"kl must be at least 0, the least is {float(kl.min()):g}")
    tiny = torch.finfo(kl.dtype).tiny  # the square root has no slope at 0
    return log_ratio.exp() * advantage - penalty * kl.clamp_min(tiny).sqrt()


def bounded(
    oscillation: Float[Tensor, "*batch steps"],
    path_kl: Float[Tensor, "*batch steps"],
    grid: TimeGrid,
) -> Float[Tensor, " *batch"]:
    """int osc(h_t) sqrt(K_t / 2) dt, by Pinsker's inequality; for bounded h.

    Args:
        oscillation: sup h_t - inf h_t at every step, reward/time.
        path_kl: K_t at every step, nats.
        grid: the nodes.

    Raises:
        ValueError: the shapes do not fit, or a number is negative or NaN.
    """
    _check(grid, oscillation=oscillation, path_kl=path_kl)
    return _integral(oscillation * (path_kl / 2).sqrt(), grid)


def transport(
    lipschitz: Float[Tensor, "*batch steps"],
    largest_variance: Float[Tensor, "*batch steps"],
    path_kl: Float[Tensor, "*batch steps"],
    grid: TimeGrid,
) -> Float[Tensor, " *batch"]:
    """int L_t sqrt(2 lambda_max(P_t) K_t) dt, by Talagrand's inequality; Gaussian states ([T96]).

    Args:
        lipschitz: constant L_t of h_t at every step, reward/time/state.
        largest_variance: largest eigenvalue of the old policy's state covariance, state^2.
        path_kl: K_t at every step, nats.
        grid: the nodes.

    Raises:
        ValueError: the shapes do not fit, or a number is negative or NaN.
    """
    _check(grid, lipschitz=lipschitz, largest_variance=largest_variance, path_kl=path_kl)
    return _integral(lipschitz * (2 * largest_variance * path_kl).sqrt(), grid)


def wasserstein(
    lipschitz: Float[Tensor, "*batch steps"],
    distance: Float[Tensor, "*batch steps"],
    grid: TimeGrid,
) -> Float[Tensor, " *batch"]:
    """int L_t W1(p_new,t, p_t) dt, by Kantorovich's duality.

    Args:
        lipschitz: constant L_t of h_t at every step, reward/time/state.
        distance: W1 of the two state laws, state.
        grid: the nodes.

    Raises:
        ValueError: the shapes do not fit, or a number is negative or NaN.
    """
    _check(grid, lipschitz=lipschitz, distance=distance)
    return _integral(lipschitz * distance, grid)


def chi_square(
    variance: Float[Tensor, "*batch steps"], chi2: Float[Tensor, "*batch steps"], grid: TimeGrid
) -> Float[Tensor, " *batch"]:
    """int sqrt(Var_{p_t} h_t chi2(p_new,t || p_t)) dt, by Cauchy and Schwarz; for unbounded h.

    Args:
        variance: of h_t under the old policy's states, (reward/time)^2.
        chi2: E_{p_t}[(dp_new,t / dp_t - 1)^2]; exp(m' P^{-1} m) - 1 for Gaussians of one covariance
            P whose means differ by m.
        grid: the nodes.

    Raises:
        ValueError: the shapes do not fit, or a number is negative or NaN.
    """
    _check(grid, variance=variance, chi2=chi2)
    return _integral((variance * chi2).sqrt(), grid)


def _integral(rates: Tensor, grid: TimeGrid) -> Tensor:
    return (rates * as_like(grid.steps, rates)).sum(-1)


def _check(grid: TimeGrid, **terms: Tensor) -> None:
    shapes = {name: tuple(value.shape) for name, value in terms.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{', '.join(shapes)} must have one shape, got {list(shapes.values())}")
    for name, value in terms.items():
        if value.ndim < 1 or value.shape[-1] != len(grid.steps):
            raise ValueError(
                f"{name} must end with {len(grid.steps)}, the grid's steps, got {list(value.shape)}"
            )
        if not bool((value >= 0).all()):
            raise ValueError(f"{name} must be at least 0 everywhere, got {float(value.min()):g}")
