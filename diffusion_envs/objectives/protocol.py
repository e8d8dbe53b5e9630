"""What an objective is, and what it is shown.

An objective is a frozen dataclass of hyperparameters with pure functions; it holds no network and
no state. There are three kinds, by what they learn from; a method derives from one of them, and the
loop knows the kinds, never the methods:

    PathObjective      steps of sampled paths: policy gradients, preferences, adjoint matching
    NoisedObjective    data that the model made, re-noised: any sampler will do
    BackpropObjective  the last steps of the sampler, differentiated with the reward

What it needs is declared, so that a sampler or a reward that cannot serve is refused at the start.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor

from ctrl import DeterministicPolicy, Policy
from ctrl.devices import sent
from diffusion_envs.rollout import Rollout


@dataclass(frozen=True, eq=False)
class Rows:
    """Single steps of paths with the current policy's score; only ``mean`` carries a gradient.

    The members of a group stand side by side, at the same step: ``view(-1, group, ...)``; if the
    objective joins steps, ``view(-1, steps, group, ...)``.
    """

    mean: Float[Tensor, " rows *event"]  # current policy
    old_mean: Float[Tensor, " rows *event"]  # the policy that sampled
    reference_score: Float[Tensor, " rows *event"]  # pretrained, frozen
    action: Float[Tensor, " rows *event"]
    noise: Float[Tensor, " rows *event"]
    advantage: Float[Tensor, " rows"]
    step_size: Float[Tensor, " rows"]  # int g^2 dt
    horizon: Float[Tensor, ""]  # sum of all step sizes of a path
    score_gain: Float[Tensor, " rows"]  # d(mean of the next state) / d(score)
    std: Float[Tensor, " rows"]  # of the transition
    action_std: Float[Tensor, " rows"]  # of the drawn score; 0 if it is not drawn
    kl_factor: float  # ((1 + eta^2) / (2 eta))^2
    sigma: Float[Tensor, " rows"] | None = None  # noise level at the left: epsilon = -sigma score
    state: Float[Tensor, " rows *event"] | None = None  # at the left of the step
    next_mean: Float[Tensor, " rows *event"] | None = None  # of the next state; carries a gradient
    next_state: Float[Tensor, " rows *event"] | None = None  # that was sampled
    target: Float[Tensor, " rows *event"] | None = None  # of ``PathObjective.targets``
    preference: Float[Tensor, " rows"] | None = None  # larger is preferred within a group
    # V at any states of the rows: at the left of their steps, and at the right
    value: Callable[[Tensor], Tensor] | None = None
    next_value: Callable[[Tensor], Tensor] | None = None
    steps: int = 1  # of a group that come together (``PathObjective.joins_steps``)


@dataclass(frozen=True, eq=False)
class NoisedRows:
    """Data that a policy made, re-noised: state = alpha data + sigma noise.

    Only ``mean`` carries a gradient. Scores that the objective does not need are None.
    """

    mean: Float[Tensor, " rows *event"]  # current score at the noised state
    old_mean: Float[Tensor, " rows *event"] | None  # of the policy that made the data
    reference_score: Float[Tensor, " rows *event"] | None  # pretrained
    state: Float[Tensor, " rows *event"]
    data: Float[Tensor, " rows *event"]
    noise: Float[Tensor, " rows *event"]
    alpha: Float[Tensor, " rows"]
    sigma: Float[Tensor, " rows"]
    reward: Float[Tensor, " rows"]
    advantage: Float[Tensor, " rows"]
    # At a state drawn between the noised state and the data, given both: path KL from the noised
    # state on, nats, as one unbiased estimate; and the score of the noised state given that state.
    bridge_cost: Float[Tensor, " rows"] | None = None
    bridge_score: Float[Tensor, " rows *event"] | None = None


@runtime_checkable
class Model(Protocol):
    """What an objective may ask of the model beyond its scores (``PathObjective.targets``)."""

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


@dataclass(frozen=True)
class Objective:
    """A way to improve a policy, as a frozen dataclass of its hyperparameters."""

    learning_rate: float = 1e-3  # of the adapter, AdamW

    needs_density: ClassVar[bool] = False
    needs_reward_gradient: ClassVar[bool] = False
    needs_preferences: ClassVar[bool] = False
    needs_value: ClassVar[bool] = False
    needs_fresh_rollouts: ClassVar[bool] = False  # one optimiser step, then sample anew
    # roll-outs come from the trained policy, or from one that follows it: their path KL is its own
    on_policy: ClassVar[bool] = True

    @property
    def needs_reference(self) -> bool:
        """Whether pretrained scores enter the loss, or are only there to report the path KL."""
        return True

    @property
    def group(self) -> int:
        """How many paths in a row share a prompt."""
        return 1

    @property
    def shared_start(self) -> bool:
        """Whether the paths of a group share their starting noise too."""
        return False

    def policy(
        self, mean: Callable[[Tensor, Tensor], Tensor], sigma: Callable[[Tensor], Tensor]
    ) -> Policy:
        """How roll-outs act, given the network's score and the noise level at a time."""
        return DeterministicPolicy(mean)


@dataclass(frozen=True)
class PathObjective(Objective, ABC):
    """Learns from the steps of sampled paths."""

    needs_density: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = False
    joins_steps: ClassVar[bool] = False  # a loss is of whole paths: their used steps come together
    fits_end: ClassVar[bool] = False  # the value network is also fitted at the final node
    value_sees_denoised: ClassVar[bool] = False  # V is a function of x0_hat; no reward query

    @property
    def cost_weight(self) -> float:
        """Reward per nat that the value function is charged along a path."""
        return 0.0

    @property
    def denoised_rewards(self) -> bool:
        """Whether values start from the reward of the denoised image (one query a node)."""
        return False

    def action_std(self, sigma: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """Standard deviation of the drawn score at a noise level; 0 if it is not drawn."""
        return torch.zeros_like(sigma)

    def targets(self, rollout: Rollout, model: Model) -> Tensor | None:
        """What the scores of each step are matched with, if ``needs_targets``; of some paths."""
        return None

    def step_probabilities(self, steps: int) -> Float[Tensor, " steps"] | None:
        """With which steps are drawn, with replacement; None for equal ones, without."""
        return None

    def maintain(
        self,
        value: Any,
        optimiser: torch.optim.Optimizer,
        shown: Callable[[], tuple[Tensor, ...]],
        update: int,
        generator: Generator,
    ) -> None:
        """What is done to the value network after an update; nothing, usually.

        Args:
            value: the network.
            optimiser: of it.
            shown: its arguments at every node of the roll-outs of all processes.
            update: number of this one, from 0.
            generator: the same on all processes.
        """

    def log_ratio(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Log density of each row's decision, current over sampling policy, nats.

        Before the weights move it is 0 up to round-off: bit for bit on one machine with one number
        of threads, where roll-out and update ask the network for the same rows at once; otherwise
        up to ``log_ratio_rounding``.
        """
        return transition_log_ratio(rows)

    def half_width(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Trusted size of the log-ratio of each row, nats."""
        return torch.full_like(rows.step_size, math.inf)

    def clipped(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Share of each row that a clip touches, to log."""
        outside = self.log_ratio(rows).abs() > self.half_width(rows)
        return outside.to(rows.step_size)

    @abstractmethod
    def advantages(self, rollout: Rollout) -> Float[Tensor, "paths steps"]:
        """What each decision of the roll-out was worth, in reward."""

    @abstractmethod
    def loss(self, rows: Rows) -> Float[Tensor, " rows"]:
        """Negative surrogate objective of each row; mean times steps estimates a path's.

        A loss of a whole group is given to each of its members, and one that joins steps to each
        of its rows: the mean is then the path's.
        """


@dataclass(frozen=True)
class NoisedObjective(Objective, ABC):
    """Learns from data that the model made with any sampler, re-noised."""

    draws: int = 4  # noised states of each sample: pairs of one noise level and opposite noise

    needs_old: ClassVar[bool] = True  # the scores of the policy that sampled enter the loss

    @property
    def needs_bridge(self) -> bool:
        """Whether the rows are to know what the path from the noised state to the data costs."""
        return False

    def old_decay(self, update: int) -> float:
        """How much the sampling policy keeps of itself after an update; 0: it is the current."""
        return 0.0

    @abstractmethod
    def advantages(self, rollout: Rollout) -> Float[Tensor, " paths"]:
        """What each sample was worth."""

    def numbers(self, advantages: Float[Tensor, " paths"]) -> dict[str, float]:
        """What to log of the advantages."""
        return {}

    @abstractmethod
    def loss(self, rows: NoisedRows) -> Float[Tensor, " rows"]:
        """Of each row; its mean estimates the loss of a sample."""


@dataclass(frozen=True)
class BackpropObjective(Objective, ABC):
    """Learns by differentiating the last steps of the sampler with the reward."""

    needs_reward_gradient: ClassVar[bool] = True

    @abstractmethod
    def cut(self, steps: int, generator: Generator) -> tuple[int, int]:
        """First step that is differentiated, and the step after which the image is looked at.

        The second is ``steps`` for the finished image; earlier ones show the denoised one.
        """

    @abstractmethod
    def loss(
        self, rewards: Float[Tensor, " paths"], path_kl: Float[Tensor, " paths"]
    ) -> Float[Tensor, " paths"]:
        """Of each path; both arguments carry gradients.

        The KL is that of the differentiated steps; 0 if it is not charged (``needs_reference``).
        """


# -- pieces of many losses -----------------------------------------------------------------------


def transition_log_ratio(rows: Rows) -> Float[Tensor, " rows"]:
    """log p_th(x_{k+1} | x_k) - log p_old(x_{k+1} | x_k), summed over coordinates, nats."""
    shift = (rows.mean - rows.old_mean).flatten(1) * (rows.score_gain / rows.std)[:, None]
    return (shift * rows.noise.flatten(1) - 0.5 * shift.square()).sum(1)


def score_rounding(precision: torch.dtype) -> float:
    """|difference| / |score| of one policy's scores of one state, asked for in other batches.

    A kernel that gets other rows beside a state adds in another order. In float32 a difference of
    256 units of round-off is allowed for. The embedded network, which has the layers of Stable
    Diffusion's, shows up to 7 without guidance and, where guidance w multiplies the branches'
    roundings by sqrt(w^2 + (1 - w)^2), 16 at w = 3 and 38 at w = 7.5, under any kernel of MKL,
    ATen and oneDNN that could be tried; rounding to bfloat16 alone makes 2^15. In half precision,
    where a sum rounds to another neighbour now and then, 3 % are.
    """
    return 256 * torch.finfo(torch.float32).eps if precision == torch.float32 else 3e-2


def log_ratio_rounding(rows: Rows, precision: torch.dtype) -> Float[Tensor, " rows"]:
    """|log-ratio| of equal policies that round-off may make, nats; false once in 5e8 rows.

    Both scores are of the same state x_k. They differ by delta, with |delta| <= c |score|
    (``score_rounding``); in units of the decision's standard deviation s that is a shift of length
        r = c |score| / s,    s = std / score_gain of a transition, action_std of a drawn score,
    and the log-ratio is <shift, z> - r^2 / 2. The standard normal z of the decision is drawn after
    x_k and independent of it, so of delta: the log-ratio has the law N(-r^2 / 2, r^2) and is
    within 6 r + r^2 / 2 but for a probability of 2e-9. (|z| r, what Cauchy's inequality allows,
    would be sqrt(d) r in d dimensions.) Other rounding is of order r eps: the noise is kept, not
    computed from states that nearly cancel. The mean over coordinates is smaller yet.
    """
    std = torch.where(rows.action_std > 0, rows.action_std, rows.std / rows.score_gain).abs()
    shift = score_rounding(precision) * rows.old_mean.flatten(1).norm(dim=1) / std
    return 6 * shift + 0.5 * shift.square()


def reference_log_ratio(rows: Rows) -> Float[Tensor, " rows"]:
    """log p_th(x_{k+1} | x_k) - log p_pre(x_{k+1} | x_k), summed over coordinates, nats."""
    scale = (rows.score_gain / rows.std)[:, None]
    own = (rows.mean - rows.old_mean).flatten(1) * scale
    other = (rows.reference_score - rows.old_mean).flatten(1) * scale
    noise = rows.noise.flatten(1)
    return ((own - other) * noise - 0.5 * (own.square() - other.square())).sum(1)


def transition_kl(rows: Rows) -> Float[Tensor, " rows"]:
    """KL(p_th(. | x_k) || p_pre(. | x_k)) of each row's Gaussian transition, nats."""
    gap = (rows.mean - rows.reference_score).flatten(1) * (rows.score_gain / rows.std)[:, None]
    return 0.5 * gap.square().sum(1)


def path_kl_rate(rows: Rows) -> Float[Tensor, " rows"]:
    """Path KL of each row's step from the pretrained model, nats; carries the gradient."""
    gap = (rows.mean - rows.reference_score).square().flatten(1).sum(1)
    return 0.5 * rows.kl_factor * rows.step_size * gap


def coordinates(rows: Rows) -> int:
    """d: by which published code divides log-densities."""
    return rows.mean[0].numel()


def trusted_width(rows: Rows, clip: float, clip_per_pixel: float | None) -> Float[Tensor, " rows"]:
    """``clip`` nats on a whole step, or ``clip_per_pixel`` times the coordinates if given."""
    width = clip if clip_per_pixel is None else clip_per_pixel * coordinates(rows)
    return torch.full_like(rows.step_size, width)


def per_prompt(
    rewards: Float[Tensor, " paths"], condition: Int64[Tensor, " paths"], std_offset: float
) -> Float[Tensor, " paths"]:
    """(r - mean) / (std + std_offset) within each prompt, by the population standard deviation.

    A prompt with one reward, or with equal ones, gets 0.
    """
    host, condition = rewards.cpu(), condition.cpu()  # read once, not for every prompt
    standardised = torch.zeros_like(host)
    for prompt in condition.unique():
        one = condition == prompt
        values = host[one]
        if bool((values != values[0]).any()):  # round-off of equal ones must not be blown up
            standardised[one] = (values - values.mean()) / (values.std(correction=0) + std_offset)
    return sent(standardised, rewards.device)


def require_positive(**settings: float) -> None:
    """Refuse what is not a positive finite number, by name."""
    for name, value in settings.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a positive finite number, got {value}")


def require_not_negative(**settings: float) -> None:
    """Refuse what is negative or not finite, by name."""
    for name, value in settings.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def require_count(**counts: int) -> None:
    """Refuse what is not a whole number of at least 1, by name."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
