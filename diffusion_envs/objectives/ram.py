"""Reinforce adjoint matching: the velocity is regressed on itself, moved by rewards of clean data.

Setting      Rectified flow: x = (1 - s) x_0 + s epsilon, noising time s, 0 is data. The velocity is
             v(s, x) = E[epsilon - x_0 | x]; the score is -(x + (1 - s) v) / s.
Target       v_ref + R (epsilon - x_0 - v),  R = r(x_0) / kl_weight, x_0 from the current model by
             any sampler; no path, no reward gradient, no likelihood ratio. The target is fixed.
Fixed point  Where v is the model's own velocity the mean of R (epsilon - x_0 - v) given x is
             Cov(R, epsilon - x_0 | x) = -s / (1 - s) grad E[R | x]. The KL-optimal velocity has
             -s / (1 - s) grad V* / kl_weight in its place, and V* is the expected reward less the
             path cost to come, which is dropped here. For linear rewards that is a constant and
             nothing is lost; for others the two differ.

Sources      [RAM] reinforce adjoint matching 2026, arXiv 2605.10759 (equation 17, algorithm 1, as
             quoted in a public derivation).
"""

from jaxtyping import Float
from torch import Tensor

from diffusion_envs.denoising import Level, State


def score_from_velocity(states: State, velocity: State, s: Level) -> State:
    """-(x + (1 - s) v) / s, 1/state."""
    return -(states + (1 - s) * velocity) / s


def velocity_from_score(states: State, score: State, s: Level) -> State:
    """-(x + s score) / (1 - s)."""
    return -(states + s * score) / (1 - s)


def target(
    reference_velocity: Float[Tensor, " rows *event"],
    velocity: Float[Tensor, " rows *event"],
    data: Float[Tensor, " rows *event"],
    noise: Float[Tensor, " rows *event"],
    rewards: Float[Tensor, " rows"],
    kl_weight: float,
) -> Float[Tensor, " rows *event"]:
    """v_ref + r(x_0) / kl_weight (epsilon - x_0 - v) ([RAM] 17); to be held fixed in the loss.

    Args:
        reference_velocity: of the pretrained model at x.
        velocity: of the current model at x: as a baseline it takes the mean of R out.
        data: x_0, from the current model.
        noise: epsilon; x = (1 - s) x_0 + s epsilon.
        rewards: r(x_0).
        kl_weight: reward per nat.

    Raises:
        ValueError: ``kl_weight`` is not positive.
    """
    if not kl_weight > 0:
        raise ValueError(f"kl_weight must be positive, got {kl_weight}")
    weight = (rewards / kl_weight).view(-1, *[1] * (data.ndim - 1))
    return reference_velocity + weight * (noise - data - velocity)


def matching_loss(
    velocity: Float[Tensor, " rows *event"], targets: Float[Tensor, " rows *event"]
) -> Float[Tensor, " rows"]:
    """Squared distance of each row, summed over coordinates.

    Args:
        velocity: of the current model; carries the gradient.
        targets: by ``target``, detached.
    """
    return (velocity - targets).square().flatten(1).sum(1)
