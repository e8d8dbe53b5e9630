"""Linear SDEs: their Gaussian laws at a time, and divergences of these and of their paths.

    dX = (A X + b) dt + G dW,  X_0 ~ N(m, P)

Functions of float64 tensors; leading dimensions are a batch, shared or broadcast; differentiable in
every argument. No matrix need be invertible unless that is said.

Sources  [VL78] Van Loan 1978, computing integrals involving the matrix exponential, IEEE TAC 23.
         [KS91] Karatzas & Shreve, Brownian Motion and Stochastic Calculus, 3.5 (Girsanov).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.linear.exponential import exponential, unit
from ctrl.linear.lq import broadcast_batches, event_of, require_symmetric, times
from ctrl.linear.margin import cholesky, margin, require_positive_definite
from ctrl.linear.reading import largest


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, covariance)."""

    mean: Float[Tensor, "... dim"]
    covariance: Float[Tensor, "... dim dim"]


@dataclass(frozen=True, eq=False)
class Transition:
    """X_t | X_0 = x ~ N(F x + f, C)."""

    F: Float[Tensor, "*batch dim dim"]
    f: Float[Tensor, "*batch dim"]
    C: Float[Tensor, "*batch dim dim"]

    def of(self, start: Gaussian) -> Gaussian:
        """The law of X_t for a Gaussian start."""
        covariance = self.F @ start.covariance @ self.F.mT + self.C
        return Gaussian(times(self.F, start.mean) + self.f, covariance)

    def then(self, later: "Transition") -> "Transition":
        """This transition and a later one in a row."""
        law = later.of(Gaussian(self.f, self.C))
        return Transition(later.F @ self.F, law.mean, law.covariance)


@dataclass(frozen=True, eq=False)
class Affine:
    """x -> matrix x + vector."""

    matrix: Float[Tensor, "... dim dim"]
    vector: Float[Tensor, "... dim"]

    def __call__(self, x: Float[Tensor, "*paths dim"]) -> Float[Tensor, "*paths dim"]:
        """Its value at every x."""
        return times(self.matrix, x) + self.vector


def transition(
    A: Float[Tensor, "*A dim dim"],
    b: Float[Tensor, "*b dim"],
    G: Float[Tensor, "*G dim noise"],
    time: float | Float[Tensor, " *time"],
) -> Transition:
    """The transition of dX = (A X + b) dt + G dW over ``time`` ([VL78]).

    F = e^{A t}, f = int_0^t e^{A s} b ds, C = int_0^t e^{A s} G G' e^{A' s} ds: one exponential of
    a block matrix over t / 2^k, where nothing overflows, then doubled k times, which only adds.
    Each of the three is exact to round-off of its own size.

    Args:
        A: drift matrix, 1/time; may be singular.
        b: constant drift, state/time.
        G: diffusion, state/sqrt(time).
        time: duration, at least 0.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, or a negative time.
    """
    tensors = require_float64(A=A, b=b, G=G, time=scalar(time, A))
    (_, dim), (_, noise) = event_of("A", tensors["A"], 2), event_of("G", tensors["G"], 2)
    events = {"A": (dim, dim), "b": (dim,), "G": (dim, noise), "time": ()}
    full = broadcast_batches(tensors, events)
    _require_duration(full["time"])
    return _transition(full["A"], full["b"], full["G"], full["time"])


def _transition(A: Tensor, b: Tensor, G: Tensor, t: Tensor) -> Transition:
    h, doublings = _halved(A, t)
    Q, b = h * (G @ G.mT), h * b.unsqueeze(-1)
    of_Q, of_b = unit(Q), unit(b)  # the answer is linear in both
    upper = torch.cat([h * A, Q / of_Q, b / of_b], dim=-1)
    lower = torch.cat([torch.zeros_like(A), -h * A.mT, torch.zeros_like(b)], dim=-1)
    last = torch.zeros_like(upper[..., :1, :])
    grown = exponential(torch.cat([upper, lower, last], dim=-2))
    dim = A.shape[-1]
    F, f = grown[..., :dim, :dim], (of_b * grown[..., :dim, -1:]).squeeze(-1)
    one = Transition(F, f, of_Q * grown[..., :dim, dim : 2 * dim] @ F.mT)
    for k in range(int(largest(doublings))):
        more, both = doublings > k, one.then(one)
        one = Transition(
            torch.where(more[..., None, None], both.F, one.F),
            torch.where(more[..., None], both.f, one.f),
            torch.where(more[..., None, None], both.C, one.C),
        )
    return Transition(one.F, one.f, 0.5 * (one.C + one.C.mT))


def _halved(A: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Each member's time / 2^k, [*batch, 1, 1], with row sums of |A| below 1/2; and k."""
    size = (A.abs().sum(-1).amax(-1) * t).detach()
    doublings = torch.log2(2 * size.clamp(min=0.5)).ceil().long()
    return (t * torch.exp2(-doublings.to(t)))[..., None, None], doublings


def gaussian_moments(
    A: Float[Tensor, "*A dim dim"],
    b: Float[Tensor, "*b dim"],
    G: Float[Tensor, "*G dim noise"],
    start: Gaussian,
    time: float | Float[Tensor, " *time"],
) -> Gaussian:
    """Mean and covariance at ``time`` of dX = (A X + b) dt + G dW from a Gaussian start.

    Args:
        A: drift matrix, 1/time; may be singular.
        b: constant drift.
        G: diffusion.
        start: the law of X_0; its covariance may be singular.
        time: duration, at least 0.

    Raises:
        ValueError: as ``transition``; or the start does not fit.
    """
    step = transition(A, b, G, time)
    _check_gaussian("start", start, A.shape[-1])
    return step.of(start)


def linear_path_kl(
    law: Affine,
    reference: Affine,
    G: Float[Tensor, "*G dim noise"],
    start: Gaussian,
    time: float | Float[Tensor, " *time"],
) -> Float[Tensor, " *batch"]:
    """KL of the path on [0, time] of one linear SDE from that of another, nats ([KS91] 3.5.1).

    1/2 int_0^t E |G^+ ((A_1 - A_0) X + b_1 - b_0)|^2 ds under the first law: E z'V(t) z for the
    start z = (X_0, 1), and the integral over s of trace V(t - s) G G' for the noise.

    Args:
        law: the drift A_1 x + b_1, under which the expectation is.
        reference: the drift A_0 x + b_0.
        G: diffusion of both.
        start: the law of X_0, of both.
        time: duration, at least 0.

    Raises:
        ValueError: as ``transition``; a variance is negative; or the drifts differ where there is
            no noise, so that the KL is infinite.
    """
    tensors = require_float64(
        A1=law.matrix, b1=law.vector, A0=reference.matrix, b0=reference.vector, G=G,
        mean=start.mean, covariance=start.covariance, time=scalar(time, G),
    )  # fmt: skip
    n, noise = event_of("G", tensors["G"], 2)
    matrix, vector = (n, n), (n,)
    events = {"A1": matrix, "b1": vector, "A0": matrix, "b0": vector, "G": (n, noise)}
    events |= {"mean": vector, "covariance": matrix, "time": ()}
    full = broadcast_batches(tensors, events)
    _require_duration(full["time"])
    require_symmetric("covariance", full["covariance"])
    _require_variances("covariance", full["covariance"])
    return _path_kl(*full.values())


def _path_kl(
    A1: Tensor, b1: Tensor, A0: Tensor, b0: Tensor, G: Tensor, m: Tensor, P: Tensor, t: Tensor
) -> Float[Tensor, " *batch"]:
    shift = torch.cat([A1 - A0, (b1 - b0).unsqueeze(-1)], dim=-1)  # of z = (x, 1)
    # a direction without noise has round-off for a singular value
    inverse = torch.linalg.pinv(G, rtol=margin(max(G.shape[-2:]), G.new_ones(())))
    u = inverse @ shift  # controls, in units of the noise
    missed = (G @ u - shift).detach().abs().amax((-2, -1))
    if bool((missed > 1e-9 * shift.detach().abs().amax((-2, -1))).any()):
        raise ValueError(
            "G must have noise wherever the drifts differ, or the laws are singular and the KL is "
            f"infinite; {float(missed.max()):g} of the difference has none"
        )
    lift = torch.nn.functional.pad  # from x to z
    drift = lift(torch.cat([A1, b1.unsqueeze(-1)], dim=-1), (0, 0, 0, 1))
    z = torch.cat([m, torch.ones_like(m[..., :1])], dim=-1)
    second = z.unsqueeze(-1) * z.unsqueeze(-2) + lift(P, (0, 1, 0, 1))
    covariance = lift(G @ G.mT, (0, 1, 0, 1))
    energy = 0.5 * (u.mT @ u)
    once, twice = _energy_integrals(drift, energy, t)
    return (once * second).sum((-2, -1)) + (twice * covariance).sum((-2, -1))


def _energy_integrals(drift: Tensor, energy: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """V(t) = int_0^t e^{B's} E e^{B s} ds and Z(t) = int_0^t V(s) ds ([VL78]), B the drift.

    One exponential over t / 2^k, as in ``transition``, and then
    V(2h) = V + F'V F and Z(2h) = Z + h V + F'Z F, which only add.
    """
    h, doublings = _halved(drift, t)
    n, zero, one = drift.shape[-1], torch.zeros_like(drift), torch.eye(drift.shape[-1]).to(drift)
    size = unit(energy)
    blocks = [
        [-h * drift.mT, 0.5 * one.expand_as(drift), zero],
        [zero, -h * drift.mT, 0.5 * energy / size],
        [zero, zero, h * drift],
    ]
    grown = exponential(torch.cat([torch.cat(row, dim=-1) for row in blocks], dim=-2))
    flow = grown[..., 2 * n :, 2 * n :]
    once = 2 * h * size * flow.mT @ grown[..., n : 2 * n, 2 * n :]
    twice = 4 * h * h * size * flow.mT @ grown[..., :n, 2 * n :]
    for k in range(int(largest(doublings))):
        more = (doublings > k)[..., None, None]
        twice = torch.where(more, twice + h * once + flow.mT @ twice @ flow, twice)
        once = torch.where(more, once + flow.mT @ once @ flow, once)
        flow, h = torch.where(more, flow @ flow, flow), torch.where(more, 2 * h, h)
    return once, twice


def gaussian_kl(law: Gaussian, reference: Gaussian) -> Float[Tensor, " *batch"]:
    """KL(law || reference) of Gaussian laws, nats.

    From the eigenvalues of S_0^{-1} S_1 - 1, so that it keeps its digits where the laws are close.

    Args:
        law: N(m_1, S_1).
        reference: N(m_0, S_0).

    Raises:
        ValueError: shapes that do not fit, or a covariance that is not positive definite.
    """
    tensors = require_float64(
        mean=law.mean, covariance=law.covariance,
        reference_mean=reference.mean, reference_covariance=reference.covariance,
    )  # fmt: skip
    (n,) = event_of("mean", tensors["mean"], 1)
    events = {"mean": (n,), "covariance": (n, n)}
    events |= {"reference_" + name: event for name, event in events.items()}
    m1, S1, m0, S0 = broadcast_batches(tensors, events).values()
    for name, matrix in (("covariance", S1), ("reference_covariance", S0)):
        require_symmetric(name, matrix)
        require_positive_definite(name, matrix, "or the KL is infinite")
    root = cholesky(S0)
    gap = torch.linalg.solve_triangular(root, S1 - S0, upper=False)
    gap = torch.linalg.solve_triangular(root, gap.mT, upper=False)
    excess = torch.linalg.eigvalsh(0.5 * (gap + gap.mT))
    shift = torch.linalg.solve_triangular(root, (m1 - m0).unsqueeze(-1), upper=False).squeeze(-1)
    far = excess.detach() < -0.5  # 1 + excess may be far below round-off
    diagonals = [each.diagonal(dim1=-2, dim2=-1) for each in (cholesky(S1), root)]
    near = torch.log1p(torch.where(far, 0, excess)).sum(-1)
    logdet = torch.where(far.any(-1), 2 * (diagonals[0] / diagonals[1]).log().sum(-1), near)
    return 0.5 * ((excess + shift.square()).sum(-1) - logdet)


def ornstein_uhlenbeck_path_kl(
    pull: float | Float[Tensor, " *batch"],
    shift: float | Float[Tensor, " *batch"],
    reference_pull: float | Float[Tensor, " *batch"],
    reference_shift: float | Float[Tensor, " *batch"],
    noise: float | Float[Tensor, " *batch"],
    mean: float | Float[Tensor, " *batch"],
    variance: float | Float[Tensor, " *batch"],
    time: float | Float[Tensor, " *batch"],
) -> Float[Tensor, " *batch"]:
    """KL of the path of dX = (-pull X + shift) dt + noise dW from one with other drift, nats.

    ``linear_path_kl`` in one dimension; a pull of zero (Brownian motion) or less is no exception.

    Args:
        pull: k_1, 1/time, of the law under which the expectation is.
        shift: c_1, state/time.
        reference_pull: k_0.
        reference_shift: c_0.
        noise: state/sqrt(time), of both.
        mean: of X_0, of both.
        variance: of X_0, of both.
        time: duration.

    Raises:
        ValueError: as ``linear_path_kl``.
        TypeError: an argument is neither a number nor a float64 tensor.
    """
    law, reference, G, start = _of_one_dimension(
        pull=pull, shift=shift, reference_pull=reference_pull, reference_shift=reference_shift,
        noise=noise, mean=mean, variance=variance,
    )  # fmt: skip
    return linear_path_kl(law, reference, G, start, time)


def ornstein_uhlenbeck_terminal_kl(
    pull: float | Float[Tensor, " *batch"],
    shift: float | Float[Tensor, " *batch"],
    reference_pull: float | Float[Tensor, " *batch"],
    reference_shift: float | Float[Tensor, " *batch"],
    noise: float | Float[Tensor, " *batch"],
    mean: float | Float[Tensor, " *batch"],
    variance: float | Float[Tensor, " *batch"],
    time: float | Float[Tensor, " *batch"],
) -> Float[Tensor, " *batch"]:
    """KL of the law of X at ``time``, nats; at most ``ornstein_uhlenbeck_path_kl``.

    Args:
        pull: k_1, 1/time, of the law under which the expectation is.
        shift: c_1, state/time.
        reference_pull: k_0.
        reference_shift: c_0.
        noise: state/sqrt(time), of both.
        mean: of X_0, of both.
        variance: of X_0, of both.
        time: duration.

    Raises:
        ValueError: a law at ``time`` has no variance, or ``variance`` is negative.
        TypeError: an argument is neither a number nor a float64 tensor.
    """
    law, reference, G, start = _of_one_dimension(
        pull=pull, shift=shift, reference_pull=reference_pull, reference_shift=reference_shift,
        noise=noise, mean=mean, variance=variance,
    )  # fmt: skip
    return gaussian_kl(
        gaussian_moments(law.matrix, law.vector, G, start, time),
        gaussian_moments(reference.matrix, reference.vector, G, start, time),
    )


def require_float64(**tensors: Tensor) -> dict[str, Tensor]:
    """The same, refused where one is not a float64 tensor.

    Raises:
        TypeError: one is not.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.float64:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                f"{name} must be a float64 tensor, got {kind}; torch.as_tensor(..., "
                "dtype=torch.float64) makes one"
            )
    return tensors


def _require_duration(time: Tensor) -> None:
    if bool((time < 0).any()):
        raise ValueError(f"time must not be negative, got {time.tolist()}")


def _check_gaussian(name: str, law: Gaussian, dim: int) -> None:
    tensors = require_float64(mean=law.mean, covariance=law.covariance)
    broadcast_batches(tensors, {"mean": (dim,), "covariance": (dim, dim)})
    require_symmetric(f"{name}.covariance", law.covariance)
    _require_variances(f"{name}.covariance", law.covariance)


def _require_variances(name: str, covariance: Tensor) -> None:
    least = -largest(-covariance.diagonal(dim1=-2, dim2=-1))
    if least < -1e-9 * largest(covariance.abs()):  # round-off may be below 0
        raise ValueError(f"{name} must have no negative variance on its diagonal, got {least:g}")


def _numbers(**arguments: float | Tensor) -> dict[str, Tensor]:
    """Numbers as float64 tensors, under the names that the caller knows; on one device."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    like = torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else "cpu")
    each = {
        name: like.new_tensor(float(value)) if isinstance(value, int | float) else value
        for name, value in arguments.items()
    }
    for name, value in require_float64(**each).items():
        if largest(~torch.isfinite(value)):
            raise ValueError(f"{name} must be finite, got {value.tolist()}")
    return each


def scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor."""
    return value if isinstance(value, Tensor) else like.new_tensor(float(value))


def _of_one_dimension(
    **arguments: float | Tensor,
) -> tuple[Affine, Affine, Tensor, Gaussian]:
    """Both drifts, the diffusion and the start as ``linear_path_kl`` takes them."""
    of = _numbers(**arguments)
    law, reference = (
        Affine(-of[pull][..., None, None], of[shift].unsqueeze(-1))
        for pull, shift in (("pull", "shift"), ("reference_pull", "reference_shift"))
    )
    start = Gaussian(of["mean"].unsqueeze(-1), of["variance"][..., None, None])
    return law, reference, of["noise"][..., None, None], start
