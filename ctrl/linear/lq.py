"""The exploratory linear-quadratic problem, its Gaussian policies and quadratic values.

    dX = (A X + B a + f) dt + sum_j (C_j X + D_j a + sigma_j) dW_j
    running reward   -(x'Mx/2 + a'Rx + a'Na/2 + p'x + l'a) + temperature * entropy of the policy
    terminal reward  -(x'Hx/2 + h'x)

A value is V(x) = x'Sx/2 + e'x + c and a policy N(K x + k, Sigma). For each V the Hamiltonian is
quadratic in the action, with Hessian -W, W = N - sum_j D_j'S D_j, so that the Gibbs policy is

    K = W^{-1} (B'S + sum_j D_j'S C_j - R),   k = W^{-1} (B'e + sum_j D_j'S sigma_j - l),
    Sigma = temperature W^{-1}.

Tensors are float64; leading dimensions are a batch of problems, of which x then has one row each.

Sources  [WZZ20] Wang, Zariphopoulou & Zhou 2020, reinforcement learning in continuous time and
         space, JMLR 21, section 4.
         [YZ99] Yong & Zhou, Stochastic Controls, chapter 6.
"""

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, fields
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.linear.margin import cholesky, require_positive_definite
from ctrl.linear.reading import largest
from ctrl.policy import DeterministicPolicy, MultivariateGaussianPolicy
from ctrl.problem import ControlProblem
from ctrl.sde import ControlledSDE, Diffusion

ZERO = torch.zeros((), dtype=torch.float64)
"""Stands for zeros of whatever shape is meant, in the fields of a problem that may be left out."""
_LEFT_OUT = ("R", "p", "l", "H", "h", "f", "C", "D")


@dataclass(frozen=True, eq=False)
class Quadratic:
    """x -> x'Sx/2 + e'x + c.

    Attributes:
        hessian: S, symmetric.
        slope: e, the gradient at 0.
        constant: c.
    """

    hessian: Float[Tensor, "*batch state state"]
    slope: Float[Tensor, "*batch state"]
    constant: Float[Tensor, " *batch"]

    def __call__(self, x: Float[Tensor, "*paths state"]) -> Float[Tensor, " *paths"]:
        """Its value at every x, in the dtype of ``x``.

        Raises:
            ValueError: x has not the state's dimension, or not one row for each of the batch.
        """
        _check_rows(x, self.slope)
        S, e, c = (each.to(x) for each in (self.hessian, self.slope, self.constant))
        return (x * (0.5 * times(S, x) + e)).sum(-1) + c

    def gradient(self, x: Float[Tensor, "*paths state"]) -> Float[Tensor, "*paths state"]:
        """S x + e."""
        _check_rows(x, self.slope)
        return times(self.hessian.to(x), x) + self.slope.to(x)


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """The law a ~ N(K x + k, Sigma) of actions.

    Attributes:
        gain: K.
        offset: k.
        covariance: Sigma; zero where the action is not drawn.
    """

    gain: Float[Tensor, "*batch action state"]
    offset: Float[Tensor, "*batch action"]
    covariance: Float[Tensor, "*batch action action"]

    def mean(self, x: Float[Tensor, "*paths state"]) -> Float[Tensor, "*paths action"]:
        """K x + k, in the dtype of ``x``."""
        return times(self.gain.to(x), x) + self.offset.to(x)

    def policy(self) -> DeterministicPolicy | MultivariateGaussianPolicy:
        """The same as a policy for ``simulate``.

        Raises:
            ValueError: it is a batch of laws and draws its actions; or some of these it draws, and
                some not.
        """
        if not bool(self.covariance.any()):
            return DeterministicPolicy(lambda t, x: self.mean(x))
        require_one(self.covariance)
        require_positive_definite("covariance", self.covariance, "or drawn actions have no density")
        scale = cholesky(self.covariance)
        return MultivariateGaussianPolicy(lambda t, x: self.mean(x), scale)


@dataclass(frozen=True, eq=False)
class LinearQuadratic:
    """A linear-quadratic problem; whatever is not given is zero.

    Attributes:
        A: drift's part in the state, [state, state], 1/time.
        B: drift's part in the action, [state, action].
        sigma: additive noise, one column for each Brownian motion, [state, noise].
        M: cost of the state, symmetric.
        N: cost of the action, symmetric.
        R: cost of both together, [action, state].
        p: linear cost of the state.
        l: linear cost of the action.
        H: terminal cost of the state, symmetric.
        h: linear terminal cost.
        f: constant drift.
        C: noise in proportion to the state, [noise, state, state]. Leave out what is zero: products
            with C and D cost more than all others.
        D: noise in proportion to the action, [noise, state, action].
        discount: a rate, 1/time.
        temperature: reward per nat of the policy's entropy and unit of time.
    """

    A: Float[Tensor, "... state state"]
    B: Float[Tensor, "... state action"]
    sigma: Float[Tensor, "... state noise"]
    M: Float[Tensor, "... state state"]
    N: Float[Tensor, "... action action"]
    R: Float[Tensor, "... action state"] = ZERO
    p: Float[Tensor, "... state"] = ZERO
    l: Float[Tensor, "... action"] = ZERO  # noqa: E741  # the literature's name
    H: Float[Tensor, "... state state"] = ZERO
    h: Float[Tensor, "... state"] = ZERO
    f: Float[Tensor, "... state"] = ZERO
    C: Float[Tensor, "... noise state state"] = ZERO
    D: Float[Tensor, "... noise state action"] = ZERO
    discount: float | Float[Tensor, "..."] = 0.0
    temperature: float | Float[Tensor, "..."] = 0.0

    def __post_init__(self) -> None:
        tensors = self._tensors()
        n, k, m = (event_of(name, tensors[name], 2)[-1] for name in ("A", "B", "sigma"))
        events = {"A": (n, n), "B": (n, k), "sigma": (n, m), "M": (n, n), "N": (k, k)}
        events |= {"R": (k, n), "p": (n,), "l": (k,), "H": (n, n), "h": (n,), "f": (n,)}
        events |= {"C": (m, n, n), "D": (m, n, k), "discount": (), "temperature": ()}
        for name, tensor in broadcast_batches(tensors, events, _LEFT_OUT).items():
            object.__setattr__(self, name, tensor)
        for name in ("M", "N", "H"):
            require_symmetric(name, getattr(self, name))
        for name in ("discount", "temperature"):
            if bool((getattr(self, name) < 0).any()):
                raise ValueError(f"{name} must not be negative, got {getattr(self, name).tolist()}")

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name in ("discount", "temperature") and isinstance(value, int | float):
                value = ZERO.new_tensor(float(value))
            if not isinstance(value, Tensor) or value.dtype != torch.float64:
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(
                    f"{name} must be a float64 tensor, got {kind}; torch.as_tensor(..., "
                    "dtype=torch.float64) makes one, of [[number]] where it is a matrix"
                )
            tensors[name] = value.to(self.A.device) if value.ndim == 0 else value
        return tensors

    @property
    def rates(self) -> tuple[Float[Tensor, " *batch"], Float[Tensor, " *batch"]]:
        """Discount and temperature, as tensors."""
        return cast(Tensor, self.discount), cast(Tensor, self.temperature)

    @property
    def scaled_noise(self) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """C and D; of no Brownian motion at all where neither was given."""
        still = _is_left_out(self.C) and _is_left_out(self.D)
        return (self.C[..., :0, :, :], self.D[..., :0, :, :]) if still else (self.C, self.D)

    def running_reward(self, t: Tensor, x: Tensor, a: Tensor) -> Float[Tensor, " paths"]:
        """-(x'Mx/2 + a'Rx + a'Na/2 + p'x + l'a), without entropy, reward/time."""
        M, R, N, p, l = (each.to(x) for each in (self.M, self.R, self.N, self.p, self.l))  # noqa: E741  # the literature's names
        of_state = (x * (0.5 * times(M, x) + p)).sum(-1)
        return -of_state - (a * (times(R, x) + 0.5 * times(N, a) + l)).sum(-1)

    def terminal_reward(self, x: Tensor) -> Float[Tensor, " paths"]:
        """-(x'Hx/2 + h'x)."""
        return self.terminal(x)

    @property
    def terminal(self) -> Quadratic:
        """The value at the horizon."""
        return Quadratic(-self.H, -self.h, self.h.new_zeros(self.h.shape[:-1]))

    @property
    def sde(self) -> ControlledSDE:
        """The dynamics; their noise is general, and controlled where D is not zero."""

        def drift(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
            return times(self.A.to(x), x) + times(self.B.to(x), a) + self.f.to(x)

        def free(t: Tensor, x: Tensor) -> Tensor:
            columns = times(self.C.to(x), x.unsqueeze(-2)).mT + self.sigma.to(x)
            return columns.expand(len(x), *self.sigma.shape[-2:])

        def controlled(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
            return free(t, x) + times(self.D.to(x), a.unsqueeze(-2)).mT

        controls_diffusion = bool(self.D.any())
        diffusion = controlled if controls_diffusion else free
        noise_dim = self.sigma.shape[-1]
        return ControlledSDE(
            drift, diffusion, "general", noise_dim, controls_diffusion=controls_diffusion
        )

    def problem(self, horizon: float = math.inf) -> ControlProblem:
        """The same as a problem for ``simulate`` and the estimators.

        Args:
            horizon: time; may be infinite where there is no terminal cost.

        Raises:
            ValueError: the discount or the temperature differs within the batch.
        """
        for name, rate in zip(("discount", "temperature"), self.rates, strict=True):
            if bool((rate != rate.reshape(-1)[0]).any()):
                raise ValueError(f"{name} must be one number for a ControlProblem, got {rate}")
        discount, temperature = (float(rate.reshape(-1)[0]) for rate in self.rates)
        ends = bool(self.H.any()) or bool(self.h.any())
        terminal = self.terminal_reward if ends else None
        return ControlProblem(
            self.sde, horizon, self.running_reward, terminal, discount, temperature
        )


@dataclass(frozen=True, eq=False)
class TimeVarying:
    """A linear-quadratic problem whose coefficients are smooth functions of time.

    Attributes:
        at: times [*times], float64 -> the problem at each of them, a batch [*times]. Coefficients
            that do not change need no such dimensions: ``LinearQuadratic`` broadcasts.
    """

    at: Callable[[Tensor], LinearQuadratic]

    def __post_init__(self) -> None:
        if not callable(self.at):
            raise TypeError(f"at must be a function of times, got {self.at!r}")

    def now(self, t: Float[Tensor, "*times"]) -> LinearQuadratic:
        """The problem at these times, a batch of as many.

        Raises:
            ValueError: the batch is another, so that a coefficient mixes times.
        """
        t = t.to(torch.float64)
        lq = self.at(t)
        if lq.A.shape[:-2] != t.shape:
            raise ValueError(
                f"at must return a batch {list(t.shape)}, a problem for each time, got "
                f"{list(lq.A.shape[:-2])}: t[..., None, None] times a matrix is one"
            )
        return lq

    @property
    def sde(self) -> ControlledSDE:
        """The dynamics; their noise is general, and controlled where D is not left out."""
        first = self.now(ZERO)
        controls_diffusion = not _is_left_out(first.D)

        def free(t: Tensor, x: Tensor) -> Tensor:
            return cast(Tensor, cast(Diffusion, self.now(t).sde.diffusion)(t, x))

        def controlled(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
            lq = self.now(t)
            columns = times(lq.C.to(x), x.unsqueeze(-2)) + times(lq.D.to(x), a.unsqueeze(-2))
            return columns.mT + lq.sigma.to(x)

        return ControlledSDE(
            lambda t, x, a: self.now(t).sde.drift(t, x, a),
            controlled if controls_diffusion else free,
            "general",
            first.sigma.shape[-1],
            controls_diffusion=controls_diffusion,
        )

    def problem(self, horizon: float) -> ControlProblem:
        """The same as a problem for ``simulate`` and the estimators; its discount is a function.

        Args:
            horizon: finite; the terminal cost is that of this time.

        Raises:
            ValueError: the temperature changes with time.
        """
        first, last = self.now(ZERO), self.now(torch.tensor(horizon, dtype=torch.float64))
        temperature = float(first.rates[1])
        if temperature != float(last.rates[1]):
            raise ValueError(
                "temperature must be one number for a ControlProblem, got "
                f"{temperature} at 0 and {float(last.rates[1])} at the horizon"
            )
        return ControlProblem(
            self.sde,
            horizon,
            lambda t, x, a: self.now(t).running_reward(t, x, a),
            last.terminal_reward,
            discount=lambda t, x: self.now(t).rates[0].to(x).expand(len(x)),
            temperature=temperature,
        )


def problem_at(lq: LinearQuadratic | TimeVarying, t: Float[Tensor, "*times"]) -> LinearQuadratic:
    """The problem at these times: always the same one, or a batch of as many."""
    return lq if isinstance(lq, LinearQuadratic) else lq.now(t)


def value_rate(lq: LinearQuadratic, value: Quadratic, law: LinearGaussian) -> Quadratic:
    """x -> E[L^a V + r(x, a)] + temperature * entropy - discount V, a drawn by ``law``.

    Minus d_t V where V is the value of the law; zero where that is stationary. The expectation over
    actions is exact, and V's time derivative is not part of it.
    """
    S, e, c = value.hessian, value.slope, value.constant
    K, k = law.gain, law.offset
    discount, _ = lq.rates
    A, f = lq.A + lq.B @ K, lq.f + times(lq.B, k)
    by_state, D = lq.scaled_noise
    scaled = D.shape[-3]  # all Brownian motions, or none
    C, s = by_state + D @ K.unsqueeze(-3), lq.sigma.mT  # [scaled, state, state], [noise, state]
    if scaled:
        s = s + times(D, k.unsqueeze(-2))
    each, carried = S.unsqueeze(-3), s @ S.mT  # the same S for every Brownian motion
    both = S @ A - K.mT @ lq.R
    quadratic = (C.mT @ each @ C).sum(-3) - lq.M - K.mT @ lq.N @ K
    hessian = both + both.mT + quadratic - discount[..., None, None] * S
    shift = times(A.mT, e) + times(S, f) + times(C.mT, carried[..., :scaled, :]).sum(-2)
    slope = shift - lq.p - times(lq.R.mT, k) - times(K.mT, times(lq.N, k) + lq.l)
    constant = (e * f).sum(-1) + 0.5 * (s * carried).sum((-2, -1))
    constant = constant - (k * (0.5 * times(lq.N, k) + lq.l)).sum(-1)
    drawn = 0.5 * (curvature(lq, S) * law.covariance).sum((-2, -1))
    constant = constant - drawn + _entropy_reward(lq, law.covariance)
    return Quadratic(hessian, slope - discount[..., None] * e, constant - discount * c)


def _entropy_reward(lq: LinearQuadratic, covariance: Tensor) -> Float[Tensor, " *batch"]:
    """temperature logdet(2 pi e Sigma) / 2, and 0 without temperature."""
    _, temperature = lq.rates
    warm = temperature > 0
    eye = torch.eye(covariance.shape[-1]).to(covariance)
    safe = torch.where(warm[..., None, None], covariance, eye)
    entropy = 0.5 * torch.linalg.slogdet(2 * math.pi * math.e * safe).logabsdet
    return torch.where(warm, temperature * entropy, torch.zeros_like(temperature))


def curvature(lq: LinearQuadratic, hessian: Tensor) -> Float[Tensor, "*batch action action"]:
    """W = N - sum_j D_j'S D_j: minus the Hamiltonian's Hessian in the action."""
    D = lq.scaled_noise[1]
    return lq.N - (D.mT @ hessian.unsqueeze(-3) @ D).sum(-3)


def greedy(lq: LinearQuadratic, value: Quadratic) -> LinearGaussian:
    """``improve_lq`` without its check; NaN where there is no best action, but for round-off."""
    S, e = value.hessian, value.slope
    C, D = lq.scaled_noise
    DS = D.mT @ S.unsqueeze(-3)  # [scaled, action, state]
    G = lq.B.mT @ S + (DS @ C).sum(-3) - lq.R
    g = times(lq.B.mT, e) + times(DS, lq.sigma.mT[..., : D.shape[-3], :]).sum(-2) - lq.l
    root, info = torch.linalg.cholesky_ex(curvature(lq, S))
    root = torch.where((info == 0)[..., None, None], root, torch.nan)
    gains = torch.cholesky_solve(torch.cat([G, g.unsqueeze(-1)], dim=-1), root)
    _, temperature = lq.rates
    eye = torch.eye(root.shape[-1]).to(root).expand_as(root)
    covariance = temperature[..., None, None] * torch.cholesky_solve(eye, root)
    return LinearGaussian(gains[..., :-1], gains[..., -1], 0.5 * (covariance + covariance.mT))


def improve_lq(lq: LinearQuadratic, value: Quadratic) -> LinearGaussian:
    """One step of policy improvement: the Gibbs policy of a value ([WZZ20] equation 20).

    From the value of a policy to the next policy this is Newton's (Kleinman's) iteration.

    Args:
        lq: the problem.
        value: of the policy to improve, or the optimal one.

    Raises:
        ValueError: W = N - sum_j D_j'S D_j is not positive definite: the reward of large actions is
            not bounded.
    """
    require_concave(lq, value)
    return greedy(lq, value)


def require_concave(lq: LinearQuadratic, value: Quadratic, when: str = "") -> None:
    """Refuse a value whose Hamiltonian has no largest action.

    Raises:
        ValueError: W is not positive definite.
    """
    hessian, D = value.hessian.detach(), lq.scaled_noise[1].detach().abs()
    W = curvature(lq, hessian).detach()
    size = lq.N.detach().abs() + (D.mT @ hessian.abs().unsqueeze(-3) @ D).sum(-3)
    if largest(torch.isnan(cholesky(W, size.diagonal(dim1=-2, dim2=-1)))):
        least = -largest(-torch.linalg.eigvalsh(W.nan_to_num()))
        raise ValueError(
            "N - sum_j D_j' (Hessian of the value) D_j must be positive definite beyond round-off, "
            f"or large actions are rewarded without bound; its least eigenvalue is {least:g}{when}"
        )


def times(matrix: Float[Tensor, "..."], vector: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Matrix times vector, batched."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def broadcast_batches(
    tensors: Mapping[str, Tensor],
    events: Mapping[str, tuple[int, ...]],
    left_out: Container[str] = (),
) -> dict[str, Tensor]:
    """The same with one batch shape for all: [*batch, *event].

    Args:
        tensors: to broadcast.
        events: shape of a single one of each.
        left_out: those for which the number 0 stands for zeros.

    Raises:
        ValueError: a tensor has not its event's shape, the batches do not fit, or it is not finite.
    """
    batches: dict[str, torch.Size] = {}
    for name, event in events.items():
        shape, many = tensors[name].shape, len(event)
        if name in left_out and not shape and not tensors[name]:
            batches[name] = torch.Size()
        elif len(shape) < many or tuple(shape[len(shape) - many :]) != event:
            raise ValueError(f"{name} must be [*batch, {_listed(event)}], got {list(shape)}")
        else:
            batches[name] = shape[: len(shape) - many]
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"{name} must be finite, got {tensors[name].tolist()}")
    try:
        batch = torch.broadcast_shapes(*batches.values())
    except RuntimeError:
        listed = {name: list(shape) for name, shape in batches.items() if shape}
        raise ValueError(f"leading (batch) dimensions must fit each other, got {listed}") from None
    return {name: tensors[name].expand((*batch, *event)) for name, event in events.items()}


def event_of(name: str, tensor: Tensor, many: int) -> tuple[int, ...]:
    """The last sizes of a vector (``many`` = 1) or a matrix (2), or of a batch of them.

    Raises:
        ValueError: it has fewer dimensions.
    """
    if tensor.ndim < many:
        kind = "vector" if many == 1 else "matrix"
        raise ValueError(f"{name} must be a {kind}, or a batch of them, got {list(tensor.shape)}")
    return tuple(tensor.shape[-many:])


def _listed(event: tuple[int, ...]) -> str:
    return ", ".join(str(size) for size in event)


def _is_left_out(matrix: Tensor) -> bool:
    """Whether it is the number 0, expanded; not a tensor of zeros that may have a derivative."""
    expanded = not any(matrix.stride()) and not matrix.requires_grad and bool(matrix.numel())
    return expanded and not bool(matrix[(0,) * matrix.ndim])


def require_symmetric(name: str, matrix: Float[Tensor, "*batch dim dim"]) -> None:
    """Refuse a matrix that is not its own transpose.

    Raises:
        ValueError: it is not.
    """
    gap = (matrix - matrix.mT).abs().amax((-2, -1))
    if bool((gap > 1e-10 * matrix.abs().amax((-2, -1))).any()):
        raise ValueError(f"{name} must be symmetric; it differs from its transpose by {gap.max()}")


def require_one(matrix: Tensor) -> None:
    """Refuse a batch.

    Raises:
        ValueError: there are leading dimensions.
    """
    if matrix.ndim != 2:
        raise ValueError(
            f"a policy that draws its actions is that of one problem, got a batch "
            f"{list(matrix.shape[:-2])}"
        )


def _check_rows(x: Tensor, slope: Tensor) -> None:
    if x.ndim < 1 or x.shape[-1] != slope.shape[-1]:
        raise ValueError(f"x must be [..., {slope.shape[-1]}], got {list(x.shape)}")
    if slope.ndim > 1 and x.shape[-slope.ndim :] != slope.shape:
        raise ValueError(
            f"x must be [..., {_listed(tuple(slope.shape))}], one row for each problem of the "
            f"batch, got {list(x.shape)}"
        )


Law = LinearGaussian | Callable[[Tensor], LinearGaussian]
"""A policy; as a function of time it is given times [nodes] and returns a batch of laws."""
