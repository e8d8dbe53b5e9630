"""Advantages of the decisions along a path, by a rate that does not depend on the grid.

Sources  [SaA] Zhao, Chen, Zhang, Yao & Tang 2025, "Score as Action", arXiv 2502.01819.
         [S16] Schulman et al. 2016, generalised advantage estimation, arXiv 1506.02438.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def temporal_differences(
    values: Float[Tensor, "paths nodes"],
    rewards: Float[Tensor, "paths steps"],
    step_sizes: Float[Tensor, "*paths steps"],
    discount: float | Float[Tensor, "paths steps"] = 0.0,
    running: Bool[Tensor, "paths steps"] | None = None,
) -> Float[Tensor, "paths steps"]:
    """exp(-discount h_k) V_{k+1} - V_k + r_k: [SaA] Theorem 4.1's integrand over a step.

    Args:
        values: V at every node; the last column is the terminal reward.
        rewards: the running reward integrated over each step (not its rate).
        step_sizes: h_k, time; of every path, where they have their own.
        discount: a rate, 1/time; of every step where it differs.
        running: which steps are made, of paths of different length (``Paths.running``); the
            differences of others are 0. All of them if not given.

    Raises:
        ValueError: the shapes do not fit one another.
    """
    paths, steps = rewards.shape
    own = step_sizes.ndim == 2 and step_sizes.shape == rewards.shape
    if values.shape != (paths, steps + 1) or not (own or step_sizes.shape == (steps,)):
        raise ValueError(
            f"values must be [{paths}, {steps + 1}] and step_sizes [{steps}] to fit rewards, got "
            f"{list(values.shape)} and {list(step_sizes.shape)}"
        )
    differences = torch.exp(-discount * step_sizes) * values[:, 1:] - values[:, :-1] + rewards
    if running is None:
        return differences
    if running.shape != rewards.shape or running.dtype != torch.bool:
        raise ValueError(
            f"running must be boolean, {[paths, steps]}, as rewards are, got {running.dtype} "
            f"{list(running.shape)}"
        )
    return torch.where(running, differences, 0)


def continuous_gae(
    values: Float[Tensor, "paths nodes"],
    rewards: Float[Tensor, "paths steps"],
    step_sizes: Float[Tensor, "*paths steps"],
    rate: float,
    discount: float | Float[Tensor, "paths steps"] = 0.0,
    running: Bool[Tensor, "paths steps"] | None = None,
) -> Float[Tensor, "paths steps"]:
    """Generalised advantages: A_k = sum_l exp(-(discount + rate) (t_l - t_k)) delta_l.

    ``rate`` plays the role of [S16]'s lambda = exp(-rate h), so that refining the grid does not
    change the estimator. 0 gives the return minus V (unbiased whatever V is), infinity the one-step
    temporal difference (least variance; its bias is that of V).

    Args:
        values: V at every node, reward; the last column is the terminal reward.
        rewards: the running reward integrated over each step, reward.
        step_sizes: h_k, time; of every path, where they have their own.
        rate: of forgetting, 1/time; non-negative, may be infinite.
        discount: a rate, 1/time; of every step where it differs.
        running: as for ``temporal_differences``.

    Returns:
        One advantage per path and step, in reward (integrated over the step, not a rate).

    Raises:
        ValueError: ``rate`` is negative or NaN, or the shapes do not fit.
    """
    if not rate >= 0:
        raise ValueError(f"rate must be at least 0 (it may be infinite), got {rate}")
    deltas = temporal_differences(values, rewards, step_sizes, discount, running)
    if math.isinf(rate):
        return deltas
    keep = torch.exp(-(discount + rate) * step_sizes)  # [steps] or [paths, steps]
    advantages = [deltas[:, -1]]
    for k in range(deltas.shape[1] - 2, -1, -1):
        advantages.append(deltas[:, k] + keep[..., k] * advantages[-1])
    return torch.stack(advantages[::-1], dim=1)
