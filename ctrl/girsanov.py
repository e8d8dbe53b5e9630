"""Path-space likelihood ratios and divergences of controlled SDEs.

Setting      dX = b(t, X, a) dt + sigma(t, X) dW, the same sigma and initial law under both
             policies; a is the mean action of a policy.
             u = sigma^{-1} (b(t, X, a) - b(t, X, a_ref)), in units of the noise.
             Jumps: of the same sizes under both; their intensities l and l_ref may differ.
Conventions  paths sampled under the policy, not the reference; natural logarithms.
Sources      [SaA] "Score as Action", arXiv 2502.01819, Theorem 3.1.
             [KS91] Karatzas & Shreve, Brownian Motion and Stochastic Calculus, 3.5.
             [B81] Bremaud 1981, Point Processes and Queues, VI.2.
             [K92] Kong 1992, a note on importance sampling, University of Chicago TR 348.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import as_like, require, together
from ctrl.estimate import require_probabilities
from ctrl.jumps import Jumps, intensity_kl, intensity_log_ratio
from ctrl.memory import AnyPolicy, PolicyWithMemory
from ctrl.paths import (
    Paths,
    common_grid,
    in_order,
    ito_sum,
    require_dynamics,
    require_paths,
    time_integral,
    visited,
    while_running,
)
from ctrl.policy import Policy, mean_action, require_equal_actions
from ctrl.sde import ControlledSDE


def controls(
    sde: ControlledSDE, policy: AnyPolicy, reference: AnyPolicy, paths: Paths
) -> Float[Tensor, "paths steps noise"]:
    """u at the left end of every step: the drift's shift in units of noise, 1/sqrt(time).

    It is 0 after the end of a path: the laws that are compared are those of stopped paths.

    Args:
        sde: the dynamics, shared by both policies.
        policy: with the drift b(t, X, mean).
        reference: with the drift to compare with.
        paths: states at every node.

    Raises:
        ValueError: the diffusion is singular where the drifts differ, or a control is not finite;
            the two policies have actions of different shapes; a black box simulated the paths, or a
            policy has a memory that it does not declare.
        TypeError: an argument is not what its name says.
    """
    _require_kinds(sde, policy, reference)
    require_dynamics(paths)
    stopped, paths = paths, visited(paths)
    nodes = as_like(common_grid(paths).nodes[:-1], paths.states)
    with together():
        each = []
        policies = zip(in_order(policy, paths), in_order(reference, paths), strict=True)
        for k, (now, now_ref) in enumerate(policies):
            t = nodes[k]
            x = paths.states[:, k]
            a, a_ref = mean_action(now, t, x), mean_action(now_ref, t, x)
            require_equal_actions(a.shape[1:], a_ref.shape[1:])
            if sde.controls_diffusion:
                _require_equal_diffusions(sde, t, x, a, a_ref)
            shift = sde.drift_at(t, x, a) - sde.drift_at(t, x, a_ref)
            each.append(sde.whiten(t, x, shift, a))
        u = while_running(torch.stack(each, dim=1), stopped)
        finite = torch.isfinite(u).all(2).all(0)
        require(finite.all(), lambda: _not_finite(finite, nodes))
    return u


def _require_kinds(sde: ControlledSDE, policy: AnyPolicy, reference: AnyPolicy) -> None:
    if not isinstance(sde, ControlledSDE):
        raise TypeError(
            f"sde must be a ControlledSDE, got {type(sde).__name__}; problem.sde is that of a "
            "ControlProblem"
        )
    for name, each in (("policy", policy), ("reference", reference)):
        if not isinstance(each, Policy | PolicyWithMemory):
            raise TypeError(
                f"{name} must be a Policy, got {type(each).__name__}; wrap a function (t, states) "
                "-> actions as DeterministicPolicy"
            )


def _not_finite(finite: Tensor, nodes: Tensor) -> ValueError:
    k = int((~finite).nonzero()[0])
    return ValueError(
        f"controls are not finite at step {k} (t = {nodes[k]:g}): a drift is not finite there, "
        "or the diffusion is too small for this precision"
    )


def _require_equal_diffusions(
    sde: ControlledSDE, t: Tensor, x: Tensor, a: Tensor, a_ref: Tensor
) -> None:
    one, other = sde.columns(t, x, a), sde.columns(t, x, a_ref)
    gap = (one @ one.mT - other @ other.mT).abs().max()
    require(
        gap <= 1e-6 * other.square().sum((1, 2)).max(),
        lambda: ValueError(
            f"the two policies move the diffusion at t = {float(t):g}, by {float(gap):g} in sigma "
            "sigma': laws with different diffusions have no likelihood ratio and their KL is "
            "infinite; compare policies that differ in the drift alone"
        ),
    )


def path_kl(
    sde: ControlledSDE, policy: AnyPolicy, reference: AnyPolicy, paths: Paths
) -> Float[Tensor, " paths"]:
    """KL(P || P_ref) = E[ 1/2 int |u|^2 dt ], one value per path, nats ([SaA] Theorem 3.1).

    Every kind of jumps adds E int (l log(l / l_ref) - l + l_ref) dt ([B81]).

    The laws are those of the SDE with the mean action: the covariance of a random policy drops out
    in continuous time, and moves the value by O(step) where actions are drawn and held.

    Args:
        sde: the dynamics, shared by both policies.
        policy: under which the paths were sampled.
        reference: the law that the KL is from.
        paths: states at every node. The gradient of the KL in a policy's parameters goes through
            them too: simulate(..., differentiable=True), or it lacks the part that comes of the
            states.

    Returns:
        One value per path. Under a deterministic policy their mean is unbiased for the KL of the
        Euler scheme on the paths' grid, which differs from the continuous-time KL by O(largest
        step). Of its two unbiased forms this is the running one; the other, ``log_ratio``, has the
        same mean and more variance.

    Raises:
        ValueError: the diffusion is singular where the drifts differ, or a control is not finite;
            jumps differ in their sizes, or occur where the reference has none.
    """
    energy = controls(sde, policy, reference, paths).square().sum(-1)
    rates = 0.5 * energy
    for rate, rate_ref in intensities(sde, policy, reference, paths):
        rates = rates + intensity_kl(rate, rate_ref)
    return time_integral(rates, paths.grid)


def intensities(
    sde: ControlledSDE, policy: AnyPolicy, reference: AnyPolicy, paths: Paths
) -> list[tuple[Float[Tensor, "paths steps"], Float[Tensor, "paths steps"]]]:
    """l and l_ref of every kind of jumps at the left end of every step, 1/time.

    They are 0 after the end of a path.

    Args:
        sde: the dynamics, shared by both policies.
        policy: at whose mean action l is.
        reference: at whose mean action l_ref is.
        paths: states at every node.

    Raises:
        ValueError: an intensity is negative or not finite, or the sizes differ.
    """
    stopped, paths = paths, visited(paths)
    nodes = as_like(common_grid(paths).nodes[:-1], paths.states)
    both = list[tuple[Tensor, Tensor]]()
    for kind in sde.jump_kinds:
        each = list[Tensor](), list[Tensor]()
        policies = zip(nodes, in_order(policy, paths), in_order(reference, paths), strict=True)
        for k, (t, now, now_ref) in enumerate(policies):
            x = paths.states[:, k]
            a, a_ref = mean_action(now, t, x), mean_action(now_ref, t, x)
            _require_equal_sizes(kind, t, x, a, a_ref)
            each[0].append(kind.intensity_at(t, x, a))
            each[1].append(kind.intensity_at(t, x, a_ref))
        one, other = (while_running(torch.stack(rates, dim=1), stopped) for rates in each)
        both.append((one, other))
    return both


def _require_equal_sizes(kind: Jumps, t: Tensor, x: Tensor, a: Tensor, a_ref: Tensor) -> None:
    marks = kind.marks.rule(x)[1]
    for mark in marks[[0, len(marks) // 2, -1]]:
        z = mark.expand(len(x), -1)
        one, other = kind.sizes_at(t, x, a, z), kind.sizes_at(t, x, a_ref, z)
        require(
            ((one - other).abs() <= 1e-6 * other.abs().max()).all(),
            lambda: ValueError(
                f"the two policies move the sizes of jumps at t = {float(t):g}: their likelihood "
                "ratio is not computed here; compare policies that differ in intensities and drift"
            ),
        )


def log_ratio(
    sde: ControlledSDE, policy: AnyPolicy, reference: AnyPolicy, paths: Paths
) -> Float[Tensor, " paths"]:
    """log dP/dP_ref of each path: int u . dW + 1/2 int |u|^2 dt, nats ([KS91] 3.5.1).

    Every kind of jumps adds sum_k N_k log(l / l_ref) - int (l - l_ref) dt, N_k of each step.

    On every path it equals the difference of the Euler scheme's transition log-densities. A
    gradient in the policy holds dW; where the states are to be held, as in a likelihood-ratio
    gradient, use ``transitions.log_ratio``.

    Args:
        sde: the dynamics, shared by both policies.
        policy: under which the paths were sampled; deterministic.
        reference: the law in the denominator.
        paths: states at every node, and the increments that drove them.

    Raises:
        ValueError: the paths have not kept their increments (and jumps), the policy draws its
            actions (the increments are then not all that drove the states), or the diffusion is
            singular.
        TypeError: an argument is not what its name says.
    """
    _require_kinds(sde, policy, reference)
    require_paths(paths)
    if paths.increments is None:
        raise ValueError(
            'paths must have kept their increments: simulate(..., keep=("increments", ...))'
        )
    first = next(in_order(policy, paths))  # of one with memory: its policy at the first node
    if first.is_random:
        raise ValueError(
            "policy must be deterministic: where actions are drawn, W alone does not determine the "
            "path; use GaussianPolicy.log_prob of the kept actions"
        )
    u = controls(sde, policy, reference, paths)
    brownian = paths.increments.reshape(u.shape)
    jumped = _log_ratio_of_jumps(sde, policy, reference, paths)
    return ito_sum(u, brownian) + time_integral(0.5 * u.square().sum(-1), paths.grid) + jumped


def _log_ratio_of_jumps(
    sde: ControlledSDE, policy: AnyPolicy, reference: AnyPolicy, paths: Paths
) -> Float[Tensor, " paths"]:
    total = paths.states.new_zeros(len(paths.states))
    if not sde.jump_kinds:
        return total
    if paths.jumps is None or paths.jumps.shape[2] != len(sde.jump_kinds):
        raise ValueError(
            f"paths must have kept their jumps, of {len(sde.jump_kinds)} kinds: "
            'simulate(..., keep=("increments", ...)) keeps them'
        )
    h = as_like(paths.grid.steps, total)
    for i, (rate, rate_ref) in enumerate(intensities(sde, policy, reference, paths)):
        each = intensity_log_ratio(paths.jumps[..., i], rate, rate_ref, h)
        total = total + each.sum(1)
    return total


def terminal_kl_bound(
    sde: ControlledSDE,
    policy: AnyPolicy,
    reference: AnyPolicy,
    paths: Paths,
    initial_kl: float = 0.0,
) -> Float[Tensor, " paths"]:
    """An upper bound on KL(p_T || p_ref,T), one value per path, nats ([SaA] Theorem 3.1).

    Terminal states are a function of the path, so their KL is at most the path's (data processing);
    with different initial laws their KL is added. The gap is the KL of the two paths given where
    they end; it is positive unless the likelihood ratio is a function of X_T alone.
    ``ctrl.linear`` has the exact gap of linear equations.

    Args:
        sde: the dynamics, shared by both policies.
        policy: under which the paths were sampled.
        reference: the law that the KL is from.
        paths: states at every node.
        initial_kl: KL of the initial laws, nats.

    Raises:
        ValueError: as ``path_kl``; or ``initial_kl`` is negative or not finite.
    """
    if not 0 <= initial_kl < float("inf"):
        raise ValueError(f"initial_kl must be at least 0 and finite, got {initial_kl}")
    return path_kl(sde, policy, reference, paths) + initial_kl


def importance_weights(
    log_ratio: Float[Tensor, " paths"], weights: Float[Tensor, " paths"] | None = None
) -> Float[Tensor, " paths"]:
    """Weights that turn paths of a policy into paths of the reference; they sum to 1.

    dP_ref/dP = exp(-log_ratio), self-normalised: a weighted mean is biased by O(1/paths). Look at
    ``effective_sample_size`` before you trust one.

    Args:
        log_ratio: log dP/dP_ref of every path, nats.
        weights: that the paths have already (quadrature), non-negative.

    Raises:
        ValueError: a value is NaN or minus infinity, or the weights do not fit.
    """
    if log_ratio.ndim != 1 or not len(log_ratio) or not log_ratio.is_floating_point():
        raise ValueError(
            f"log_ratio must be [paths], floating point, got {log_ratio.dtype} "
            f"{list(log_ratio.shape)}"
        )
    if bool(torch.isnan(log_ratio).any()) or bool(torch.isneginf(log_ratio).any()):
        raise ValueError("log_ratio must be numbers, plus infinity allowed (weight 0)")
    logits = -log_ratio
    if weights is not None:
        if weights.shape != log_ratio.shape or not bool((weights >= 0).all()):
            raise ValueError(f"weights must be {list(log_ratio.shape)} and non-negative")
        logits = weights.log() - log_ratio
    if bool(torch.isneginf(logits).all()):
        raise ValueError(
            "log_ratio must be finite on some path of positive weight: the reference gives all of "
            "these paths probability 0"
        )
    return torch.softmax(logits, 0)


def effective_sample_size(weights: Float[Tensor, " paths"]) -> float:
    """1 / sum w^2 of weights that sum to 1: how many equal paths say as much ([K92]).

    Raises:
        ValueError: the weights are negative, not finite or do not sum to 1.
    """
    require_probabilities("weights", weights)
    return 1 / weights.double().square().sum().item()
