"""Adjoint matching: the score is regressed on the reward's gradient, carried back along paths.

Setting      maximise E[r(X_T)] - kl_weight KL(P_th || P_pre). A sampler's step k is
             x' = mean_k(x) + std z, mean_k affine in the score with slope score_gain.
Adjoint      a_N = -grad r(x_N),  a_k = (d mean_k^pre / dx (x_k))' a_{k+1}: the lean adjoint, in the
             sign of the cost -r as published, carried by the *pretrained* model only. Given x_k, on
             paths of the optimum, its mean is -grad V*(x_k), V* the value of the chain.
Loss         1/2 sum_k |(mean_th - mean_pre) / std + std a_{k+1} / kl_weight|^2 along paths of the
             current policy, through which no gradient flows. Its one critical point is the optimal
             control of the chain, exactly, because the adjoint is that of the *next* node. With
             a_k, as in the published code, it is the optimum up to the step size.
Sampler      What is generated at the optimum is the pretrained law tilted by exp(r / kl_weight)
             only if that forgets its start: eta = 1 with little signal left at the horizon.

Sources      [AM] Domingo-Enrich, Drozdzal, Karrer & Chen 2024, adjoint matching, arXiv 2409.08861.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def lean_adjoint(
    pretrained_mean: Callable[[int, Tensor], Tensor],
    states: Float[Tensor, "paths nodes *event"],
    reward_gradient: Float[Tensor, " paths *event"],
) -> Float[Tensor, "paths nodes *event"]:
    """a at every node, reward/state: one vector-Jacobian product a step.

    Args:
        pretrained_mean: (k, states [paths, *event]) -> mean of the next state after step k under
            the pretrained model, each path by itself.
        states: of paths, sampled under any policy.
        reward_gradient: grad r at the last states.

    Raises:
        ValueError: ``reward_gradient`` does not fit the states.
    """
    if reward_gradient.shape != states[:, -1].shape:
        raise ValueError(
            f"reward_gradient must be {list(states[:, -1].shape)}, as the last states, got "
            f"{list(reward_gradient.shape)}"
        )
    adjoint = [-reward_gradient]
    for k in reversed(range(states.shape[1] - 1)):
        _, pull_back = torch.func.vjp(lambda x, k=k: pretrained_mean(k, x), states[:, k])
        adjoint.append(pull_back(adjoint[-1])[0])
    return torch.stack(adjoint[::-1], dim=1)


def matching_loss(
    scores: Float[Tensor, "paths steps *event"],
    reference_scores: Float[Tensor, "paths steps *event"],
    adjoint: Float[Tensor, "paths nodes *event"],
    score_gain: Float[Tensor, " steps"],
    std: Float[Tensor, " steps"],
    kl_weight: float,
) -> Float[Tensor, " paths"]:
    """1/2 sum_k |score_gain (score - reference) / std + std a_{k+1} / kl_weight|^2, nats.

    Args:
        scores: of the policy, at the left of each step; the only argument to differentiate.
        reference_scores: of the pretrained model.
        adjoint: by ``lean_adjoint``.
        score_gain: d mean / d score of each step; g^2 h for Euler-Maruyama.
        std: of each step's noise, positive; g sqrt(h) for Euler-Maruyama.
        kl_weight: reward per nat.

    Raises:
        ValueError: the shapes do not fit, ``std`` or ``kl_weight`` is not positive.
    """
    steps = scores.shape[1]
    if adjoint.shape[1] != steps + 1 or not len(score_gain) == len(std) == steps:
        raise ValueError(
            f"{steps} steps need {steps + 1} nodes of the adjoint and {steps} of score_gain and "
            f"std, got {adjoint.shape[1]}, {len(score_gain)} and {len(std)}"
        )
    if not kl_weight > 0:
        raise ValueError(f"kl_weight must be positive, got {kl_weight}")
    if not bool((std > 0).all()):
        raise ValueError("std must be positive: adjoint matching needs noise in every step")
    shape = (1, steps, *[1] * (scores.ndim - 2))
    control = (score_gain / std).view(shape) * (scores - reference_scores)
    target = std.view(shape) * adjoint[:, 1:] / kl_weight
    return 0.5 * (control + target).square().flatten(1).sum(1)
