"""Affine Gaussian policies of linear-quadratic problems: everything is linear in pairs.

    dX = (A X + B a + f) dt + sum_j (C_j X + D_j a + sigma_j) dW_j
    reward rate -(x'Mx/2 + a'Rx + a'Na/2 + p'x + l'a) - temperature log pi(a), discounted
    a ~ N(K x + k, Sigma)

Of y = (1, x) this is a problem without affine terms, a = G y + noise. A quadratic of x is linear in
the pairs z = y (x) y: a row v stands for V(x) = v . z. So with E z' = L E z under the policy,
    discount V = paid + V L + dV/dt,    E[z(X') | x] = (1 + h L + h^2 H) z
in continuous time and on the Euler chain, which holds its action over a step. Everything is
analytic in the policy's parameters theta: its derivatives are complex steps.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from verification.answers import remembered
from verification.closed_form import complex_steps, gaussian_law
from verification.closed_form.gaussian_law import Transition


class Linear(NamedTuple):
    """At one time: dy = (A y + B a) dt + sum_j (C_j y + D_j a) dW_j, -(y'My/2 + a'Ry + a'Na/2)."""

    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray
    M: np.ndarray
    N: np.ndarray
    R: np.ndarray
    discount: float
    temperature: float


class Law(NamedTuple):
    """N(K x + k, Sigma)."""

    K: np.ndarray
    k: np.ndarray
    Sigma: np.ndarray

    @property
    def G(self) -> np.ndarray:
        """Of (1, x)."""
        return np.column_stack([self.k, self.K])


@runtime_checkable
class Problem(Protocol):
    """E z at the start, the reward at the end (a row), coefficients of time, policies."""

    @property
    def first(self) -> np.ndarray: ...  # noqa: D102
    @property
    def last(self) -> np.ndarray: ...  # noqa: D102
    def at(self, t: float) -> Linear: ...  # noqa: D102
    def law(self, theta: np.ndarray) -> Law: ...  # noqa: D102


Number = Any  # a float, or complex where the policy's parameters are
Value = Callable[[Any], tuple[np.ndarray, np.ndarray]]
"""A quadratic and its derivative in time, at a time; both are rows."""


# ---- rows, and maps of y


def with_zeros(rows: np.ndarray) -> np.ndarray:
    """Rows of what moves x, below one of zeros: 1 does not move."""
    return np.concatenate([0 * rows[..., :1, :], rows], axis=-2)


def affine(constant: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """The map y -> (0, slope x + constant)."""
    return with_zeros(np.concatenate([constant[..., None], slope], axis=-1))


def bordered(S: np.ndarray, e: np.ndarray, c: Number) -> np.ndarray:
    """The matrix of x'Sx + 2 e'x + c, as a form of (1, x)."""
    return np.block([[np.full((1, 1), c), e[None]], [e[:, None], S]])


def row(S: np.ndarray, e: np.ndarray, c: Number) -> np.ndarray:
    """Of x'Sx/2 + e'x + c."""
    return bordered(S, e, 2 * c).ravel() / 2


def hessian(v: np.ndarray) -> np.ndarray:
    """Of the quadratic as a form of y: S, e and 2 c, bordered."""
    size = round(v.size**0.5)
    return 2 * v.reshape(size, size)


def with_one(x: np.ndarray) -> np.ndarray:
    """The vector (1, x) of states [..., dim]."""
    return np.concatenate([np.ones_like(x[..., :1]), x], axis=-1)


def pairs(x: np.ndarray) -> np.ndarray:
    """The products of all pairs in (1, x), in a row, of states [..., dim]."""
    y = with_one(x)
    return (y[..., :, None] * y[..., None, :]).reshape(*y.shape[:-1], -1)


# ---- what a policy does in a moment


def generator(F: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """L of dy = F y dt + sum_j noise_j y dW_j."""
    one = np.eye(len(F))
    return _kron(F, one) + _kron(one, F) + _kron(noise, noise).sum(0)


def motion(p: Linear, law: Law) -> tuple[np.ndarray, np.ndarray]:
    """L, and H, which holding the action over a step adds: the square of the drift."""
    F = p.A + p.B @ law.G
    L, H = generator(F, p.C + p.D @ law.G), _kron(F, F)
    L[:, 0] += (p.D @ law.Sigma @ p.D.swapaxes(1, 2)).sum(0).ravel()
    H[:, 0] += (p.B @ law.Sigma @ p.B.T).ravel()
    return L, H


def _kron(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As numpy's, which is slow for small matrices; of the last two axes."""
    size = a.shape[-1] * b.shape[-1]
    each = a[..., :, None, :, None] * b[..., None, :, None, :]
    return each.reshape(*a.shape[:-2], size, size)


def paid(p: Linear, law: Law) -> np.ndarray:
    """The mean reward rate with the entropy's share, a row."""
    G, across = law.G, law.G.T @ p.R
    v = -(p.M + across + across.T + G.T @ p.N @ G).ravel() / 2
    v[0] -= np.sum(p.N * law.Sigma) / 2
    if p.temperature:
        v[0] += p.temperature * np.log(np.linalg.det(2 * np.pi * np.e * law.Sigma)) / 2
    return v


def average_q(p: Linear, law: Law, value: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """E_{a ~ law}[q - temperature log pi] of V = value, dV/dt = slope, a row."""
    return slope + paid(p, law) + value @ motion(p, law)[0] - p.discount * value


# ---- linear diffusions dX = (A X + c) dt + G dW, without actions


def uncontrolled(A: np.ndarray, c: np.ndarray, G: np.ndarray) -> np.ndarray:
    """L."""
    return generator(affine(c, A), affine(G.T, np.zeros((G.shape[1], *A.shape))))


def transition(A: np.ndarray, c: np.ndarray, G: np.ndarray, time: float) -> Transition:
    """X at this time given where it starts."""
    moved, n = expm(time * uncontrolled(A, c, G)), len(c) + 1
    second = moved[:, 0].reshape(n, n)  # from 0
    mean = second[0, 1:]
    return Transition(moved[1:n, 1:n], mean, second[1:, 1:] - np.outer(mean, mean))


def earned(L: np.ndarray, rate: np.ndarray, z: np.ndarray, time: float) -> tuple[float, np.ndarray]:
    """int_0^time rate . z dt of z' = L z, and z at the end: one matrix exponential."""
    zero = np.zeros((len(z), 1))
    end = expm(time * np.block([[L, zero], [rate[None], zero[:1]]])) @ np.append(z, 0.0)
    return float(end[-1]), end[:-1]


# ---- one action


def reward(p: Linear, x: np.ndarray, a: np.ndarray) -> Any:
    """Without entropy, at states [..., dim] and actions [..., actions]."""
    y = with_one(x)
    cost = np.sum(y @ p.M * y, -1) / 2 + np.sum(y @ p.R.T * a, -1) + np.sum(a @ p.N * a, -1) / 2
    return -cost


def _noise(p: Linear, v: np.ndarray, x: np.ndarray, a: np.ndarray) -> Any:
    """Sum_j sigma_j' Hess V sigma_j / 2."""
    each = np.tensordot(with_one(x), p.C, (-1, -1)) + np.tensordot(a, p.D, (-1, -1))
    return np.sum(each @ hessian(v) * each, axis=(-1, -2)) / 2


def q_rate(p: Linear, value: np.ndarray, slope: np.ndarray, x: np.ndarray, a: np.ndarray) -> Any:
    """dV/dt + b . grad V + tr(sigma sigma' Hess V) / 2 + r - discount V."""
    y = with_one(x)
    along = np.sum((y @ p.A.T + a @ p.B.T) * (y @ hessian(value)), -1) + _noise(p, value, x, a)
    return pairs(x) @ (slope - p.discount * value) + along + reward(p, x, a)


def ahead(p: Linear, h: float, after: np.ndarray, x: np.ndarray, a: np.ndarray) -> Any:
    """E[after(X') | x, a], X' an Euler step of size h later."""
    moved = x + h * (with_one(x) @ p.A.T + a @ p.B.T)[..., 1:]
    return pairs(moved) @ after + h * _noise(p, after, x, a)


def log_density(p: Problem, theta: np.ndarray, x: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Log pi(a | x), of rows."""
    law = p.law(theta)
    return gaussian_law.log_density(a, x @ law.K.T + law.k, law.Sigma)


# ---- Euler chains


def before(p: Linear, law: Law, h: float, v: np.ndarray) -> np.ndarray:
    """The value a step of size h earlier."""
    L, H = motion(p, law)
    return np.exp(-p.discount * h) * (v + h * v @ L + h**2 * v @ H) + h * paid(p, law)


def chain_value(p: Problem, theta: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """V at every node, rows: backwards."""
    law, backward = p.law(theta), [p.last]
    for t, h in zip(nodes[-2::-1], np.diff(nodes)[::-1], strict=True):
        backward.append(before(p.at(t), law, h, backward[-1]))
    return np.array(backward[::-1])


def visits(
    p: Problem, theta: np.ndarray, nodes: np.ndarray
) -> Iterator[tuple[float, float, Linear, np.ndarray]]:
    """Time, step size, coefficients and E z of the chain's states at every step: forwards."""
    law, z = p.law(theta), p.first
    for t, h in zip(nodes[:-1], np.diff(nodes), strict=True):
        at = p.at(t)
        yield float(t), float(h), at, z
        L, H = motion(at, law)
        z = z + h * L @ z + h**2 * H @ z


def chain_q(
    p: Problem, theta: np.ndarray, nodes: np.ndarray, k: int, x: np.ndarray, a: np.ndarray
) -> np.ndarray:
    """(e^{-discount h} E[V_{k+1} | x, a] - V_k) / h + r of the chain's own V, of rows."""
    at, h, V = p.at(nodes[k]), nodes[k + 1] - nodes[k], chain_value(p, theta, nodes)
    later = np.exp(-at.discount * h) * ahead(at, h, V[k + 1], x, a)
    return (later - pairs(x) @ V[k]) / h + reward(at, x, a)


def at_start(p: Problem, v: np.ndarray) -> Number:
    """A quadratic's mean at the start."""
    return (v @ p.first).item()


@remembered
def performance(p: Problem, theta: np.ndarray, nodes: np.ndarray) -> Number:
    """V(0, start) of the chain, backwards."""
    return at_start(p, chain_value(p, theta, nodes)[0])


def forward_performance(p: Problem, theta: np.ndarray, nodes: np.ndarray) -> Number:
    """The same from the moments of the states."""
    law, total = p.law(theta), 0.0
    *steps, end = visits(p, theta, np.append(nodes, nodes[-1] + 1))  # and the states at the end
    for t, h, at, z in steps:
        total = total + np.exp(-at.discount * (t - nodes[0])) * h * paid(at, law) @ z
    t, _, at, z = end
    return (total + np.exp(-at.discount * (t - nodes[0])) * p.last @ z).item()


def q_sum(
    p: Problem, nodes: np.ndarray, value: Value, visiting: np.ndarray, acting: np.ndarray
) -> Number:
    """Sum h_k e^{-discount t_k} E[q - temperature log pi], q of a value, along a chain.

    Args:
        p: the problem.
        nodes: of the chain.
        value: what q is made of.
        visiting: the policy whose chain's states count.
        acting: the policy that draws the actions at these states.
    """
    law, total = p.law(acting), 0.0
    for t, h, at, z in visits(p, visiting, nodes):
        rate = average_q(at, law, *value(t)) @ z
        total = total + h * np.exp(-at.discount * (t - nodes[0])) * rate
    return total


def q_gradient(p: Problem, nodes: np.ndarray, value: Value, theta: np.ndarray) -> np.ndarray:
    """Sum h_k e^{-discount t_k} E[grad log pi (q - temperature log pi)] along the chain of theta.

    By Stein's identities it is E[(da/dtheta)' grad_a (q - temperature log pi)]: the derivative of
    the average in the policy that acts, the states held.
    """
    return complex_steps.gradient(lambda acting: q_sum(p, nodes, value, theta, acting), theta)


# ---- continuous time


@remembered
def continuous_performance(p: Problem, theta: np.ndarray, horizon: float) -> Number:
    """V(0, start)."""
    law = p.law(theta)

    def rate(to_go: float, v: np.ndarray) -> np.ndarray:
        return average_q(p.at(horizon - to_go), law, v, 0 * v)

    end = p.last.astype(theta.dtype)
    v = solve_ivp(rate, (0, horizon), end, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    return at_start(p, v)


def value_series(p: Problem, theta: np.ndarray, terms: int = 20) -> np.ndarray:
    """V in powers of the time that is left, rows, where coefficients do not depend on time."""
    at, law, series = p.at(0.0), p.law(theta), [p.last]
    moves, pay = motion(at, law)[0] - at.discount * np.eye(p.last.size), paid(at, law)
    for j in range(1, terms):
        series.append((series[-1] @ moves + (j == 1) * pay) / j)
    return np.array(series)


def continuous_value(p: Problem, theta: np.ndarray, horizon: float) -> Value:
    """By that series."""
    polyval, series = np.polynomial.polynomial.polyval, value_series(p, theta)
    decays = np.polynomial.polynomial.polyder(series)
    return lambda t: (polyval(horizon - t, series), -polyval(horizon - t, decays))


def initial_value(p: Problem, theta: np.ndarray, horizon: float) -> Number:
    """``continuous_performance`` by that series."""
    return at_start(p, continuous_value(p, theta, horizon)(0.0)[0])
