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
Which KL     std makes it the KL of the chain's transitions. With a DDIM of few steps that is more
             than the SDE's path KL, by far in the last steps: on the Gaussian problem of
             ``diffusion_envs.exact`` its optimum reaches 84, 95, 98 percent of the gain that
             E[r] - kl_weight (path KL) allows at 20, 50, 100 steps. With ``path_kl`` what a step
             costs is the SDE's, c = kl_factor int g^2 for half a square of the score's change: then
             the loss is 1/2 sum_k |c^(1/2) (score_th - score_pre) + c^(-1/2) score_gain a_{k+1} /
             kl_weight|^2, the same for c = (score_gain / std)^2, and just as exact.
Sampler      What is generated at the optimum is the pretrained law tilted by exp(r / kl_weight)
             only if that forgets its start: eta = 1 with little signal left at the horizon.

Published    (1) The control of step k is matched with a_k, here with a_{k+1}. (2) Four of 50 steps
             are trained, half of them among the first 60 percent; ``UpdateSize.train_steps`` draws
             them evenly. (3) Losses above a moving 0.9 quantile are dropped: that biases the
             critical point towards paths of small adjoints, and is left out. (4) Guidance only
             samples; here paths, control and adjoint all belong to the guided model, which is the
             one that is regularised, but whose adjoints grow with the scale: prefer guidance=1.
Repeated     Paths are of the current policy. A second pass over a roll-out regresses on paths of
             the policy before; at the optimum the two are one.

Sources      [AM] Domingo-Enrich, Drozdzal, Karrer & Chen 2024, adjoint matching, arXiv 2409.08861.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor

from diffusion_envs.objectives.path_steps import PathObjective, Rows, Steps
from diffusion_envs.ranges import require_count, require_numbers, require_positive
from diffusion_envs.rollout import Rollout


@runtime_checkable
class PretrainedChain(Protocol):
    """What the adjoint is computed with: the pretrained model's steps, the reward's gradient."""

    def pretrained(self) -> AbstractContextManager[None]:
        """Within this context the model is the pretrained one."""
        ...

    def pretrained_mean(
        self, step: int, states: Tensor, condition: Int64[Tensor, " paths"]
    ) -> Tensor:
        """Mean of the next state after this step under the pretrained model."""
        ...

    def reward_gradient(self, states: Tensor, condition: Int64[Tensor, " paths"]) -> Tensor:
        """Gradient of the reward with respect to the last states."""
        ...

    def reward_gradient_by_queries(
        self,
        states: Tensor,
        condition: Int64[Tensor, " paths"],
        *,
        pairs: int,
        width: float,
        generator: Generator,
    ) -> Tensor:
        """The same of a reward that has none, from rewards of others near them."""
        ...


def lean_adjoint(
    pretrained_mean: Callable[[int, Tensor], Tensor],
    states: Float[Tensor, "paths nodes *event"],
    reward_gradient: Float[Tensor, " paths *event"],
) -> Float[Tensor, "paths nodes *event"]:
    """a at every node, reward/state: one vector-Jacobian product a step; carries no gradient.

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
        with torch.enable_grad():
            before = states[:, k].detach().requires_grad_()
            after = pretrained_mean(k, before)
        (carried,) = torch.autograd.grad(after, before, adjoint[-1])
        adjoint.append(carried)
    return torch.stack(adjoint[::-1], dim=1)


@dataclass(frozen=True, eq=False)
class AdjointRows(Rows):
    """Rows with the lean adjoint at the end of each step, reward/state."""

    adjoint: Float[Tensor, " rows *event"]


@dataclass(frozen=True)
class AdjointMatching(PathObjective):
    """Regression of each step's control on the lean adjoint at its end ([AM]).

    The published rate, 3e-6, is for all weights of the network; the library's default is for an
    adapter of low rank.
    """

    kl_weight: float = 0.01  # reward per nat; the inverse of [AM]'s factor on the reward, 100
    path_kl: bool = False  # charge the SDE's path KL, not that of the chain's transitions

    needs_reward_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(kl_weight=self.kl_weight, learning_rate=self.learning_rate)

    @property
    def reward_per_nat(self) -> float | None:
        """``kl_weight``, the regression's temperature."""
        return self.kl_weight

    def reward_gradient(
        self, rollout: Rollout, model: PretrainedChain, generator: Generator
    ) -> Float[Tensor, " paths *event"]:
        """Gradient of the reward at the last states."""
        return model.reward_gradient(rollout.states[:, -1], rollout.condition)

    def targets(
        self, rollout: Rollout, model: PretrainedChain, generator: Generator
    ) -> Float[Tensor, "paths steps *event"]:
        """The lean adjoint at the end of every step, reward/state."""
        condition = rollout.condition
        slope = self.reward_gradient(rollout, model, generator)
        # the whole of it within: checkpointed activations are computed again while going backwards
        with model.pretrained():
            adjoint = lean_adjoint(
                lambda k, states: model.pretrained_mean(k, states, condition),
                rollout.states,
                slope,
            )
        return adjoint[:, 1:]

    def advantages(self, rollout: Rollout) -> Float[Tensor, "paths steps"]:
        """Zeros: the loss reads targets only."""
        return torch.zeros_like(rollout.costs)

    def rows(self, common: Rows, steps: Steps) -> AdjointRows:
        """Rows with their adjoint targets."""
        assert steps.targets is not None
        return AdjointRows(**vars(common), adjoint=steps.targets)

    def loss(self, rows: AdjointRows) -> Float[Tensor, " rows"]:
        """1/2 |c^(1/2) (score - reference) + c^(-1/2) score_gain a / kl_weight|^2: one summand."""
        assert rows.reference_score is not None
        root = rows.score_gain / rows.std  # of what a step costs
        if self.path_kl:
            root = (rows.kl_factor * rows.step_size).sqrt()
        gap = (rows.mean - rows.reference_score).flatten(1)
        wanted = (rows.score_gain / root / self.kl_weight)[:, None] * rows.adjoint.flatten(1)
        return 0.5 * (root[:, None] * gap + wanted).square().sum(1)


@dataclass(frozen=True)
class ZerothOrderAdjointMatching(AdjointMatching):
    """The same for a reward without a gradient: its slope comes from queries near the sample.

    In d dimensions (of the latents) n pairs give the slope a cosine of about sqrt(n / (n + d)) with
    the true one, without bias but for the smoothing: the loss is linear in it, so that the
    critical point is that of the smoothed reward.
    """

    pairs: int = 16  # of reward queries either side of a sample, for the slope there
    width: float = 0.15  # of the smoothing, in the units of the latents

    needs_reward_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(width=self.width)
        require_count(pairs=self.pairs)

    def reward_gradient(
        self, rollout: Rollout, model: PretrainedChain, generator: Generator
    ) -> Float[Tensor, " paths *event"]:
        """Gradient of the smoothed reward at the last states, by differences of pairs."""
        return model.reward_gradient_by_queries(
            rollout.states[:, -1],
            rollout.condition,
            pairs=self.pairs,
            width=self.width,
            generator=generator,
        )
