"""The problem of ``closed_form.matrix_lq_chain`` as users write it: everything at once."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl.value import Value
from verification.claim import Setting
from verification.closed_form import matrix_lq_chain as lq
from verification.closed_form.matrix_lq_chain import DIM, HORIZON, NODES, THETA, MatrixLQ
from verification.cubature import point_start

P = MatrixLQ()
# another policy, for what is off-policy or new
OTHER = THETA + np.array([0.2, 0.1, -0.15, 0.1, -0.2, 0.3, 0.1, 0.05, -0.1])


def of_time(setting: Setting, coefficient: Callable[[float], object]) -> Callable[[Tensor], Tensor]:
    """A coefficient for torch: they are polynomials of time, so a few times tell it."""
    times = np.linspace(0, HORIZON, 6)
    rows = np.array([coefficient(t) for t in times], dtype=float)
    fitted = np.linalg.solve(np.vander(times, increasing=True), rows.reshape(len(times), -1))
    series = setting.tensor(fitted.reshape(rows.shape))

    def at(t: Tensor) -> Tensor:
        total = torch.zeros_like(series[0])
        for each in series.flip(0):
            total = total * t + each
        return total

    return at


def form(x: Tensor, matrix: Tensor) -> Tensor:
    """x' matrix x / 2 of every row."""
    return 0.5 * (x @ matrix * x).sum(1)


def quadratic(setting: Setting, of: Callable[[float], lq.Quadratic]) -> Value:
    """A quadratic function of the state and of time."""
    P, e, c = (of_time(setting, lambda t, i=i: of(t)[i]) for i in range(3))
    return lambda t, x: form(x, P(t)) + x @ e(t) + c(t)


def problem(setting: Setting, p: MatrixLQ = P) -> ctrl.ControlProblem:
    """Dynamics and rewards; the noise is diagonal if its matrix is."""
    A, B, S, N = (of_time(setting, lambda t, i=i: p.at(t)[i]) for i in range(4))
    paid, value = quadratic(setting, p.reward), quadratic(setting, lq.value)

    def drift(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return x @ A(t).T + a @ B(t).T

    if np.count_nonzero(p.noise) == DIM:
        sde = ctrl.ControlledSDE(drift, lambda t, x: S(t).diagonal().expand_as(x))
    else:
        sde = ctrl.ControlledSDE(
            drift, lambda t, x: S(t).expand(len(x), DIM, DIM), noise="general", noise_dim=DIM
        )
    return ctrl.ControlProblem(
        sde,
        HORIZON,
        lambda t, x, a: paid(t, x) - form(a, N(t)),
        lambda x: value(x.new_tensor(HORIZON), x),
        p.discount,
        p.temperature,
    )


def chain_value(setting: Setting, p: MatrixLQ = P, theta: np.ndarray = THETA) -> Value:
    """V of the chain at its nodes."""
    times, rows = setting.tensor(NODES), lq.chain_value(p, theta, NODES)
    squares, linears, constants = (setting.tensor(np.array(c)) for c in zip(*rows, strict=True))

    def value(t: Tensor, x: Tensor) -> Tensor:
        k = (times - t).abs().argmin()
        return form(x, squares[k]) + x @ linears[k] + constants[k]

    return value


def parameters(setting: Setting, theta: np.ndarray = THETA) -> list[Tensor]:
    """K, k and L, to be differentiated."""
    return [setting.tensor(each).requires_grad_() for each in lq.unpack(theta)]


def policy(theta: Sequence[Tensor]) -> ctrl.MultivariateGaussianPolicy:
    """a ~ N(K x + k, L L')."""
    gain, offset, scale = theta
    return ctrl.MultivariateGaussianPolicy(lambda t, x: x @ gain.T + offset, lambda t: scale)


def drawn_paths(
    setting: Setting, theta: Sequence[Tensor], nodes: np.ndarray = NODES, rule: int = 3
) -> ctrl.Paths:
    """Quadrature paths of the drawn actions; each variable to the degree 2 rule - 1."""
    grid = ctrl.TimeGrid(setting.tensor(nodes))
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=rule, noise=(DIM,), action=(DIM,))
    start = point_start(noise, list(P.start))
    return ctrl.simulate(problem(setting), policy(theta), start, grid, noise=noise)


def along(paths: ctrl.Paths) -> list[tuple[int, float, float, np.ndarray, np.ndarray]]:
    """Every step for numpy: its number, time and size, states and actions."""
    assert paths.actions is not None
    x, a = (each.detach().double().cpu().numpy() for each in (paths.states, paths.actions))
    nodes = paths.grid.nodes.double().cpu().numpy()
    return [(k, float(nodes[k]), float(h), x[:, k], a[:, k]) for k, h in enumerate(np.diff(nodes))]
