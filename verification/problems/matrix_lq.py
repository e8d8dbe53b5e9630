"""The problem of ``closed_form.matrix_lq_chain`` as users write it: everything at once."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

import ctrl
from ctrl.value import Value
from verification.claim import Setting, array
from verification.closed_form import lq_policies
from verification.closed_form import matrix_lq_chain as lq
from verification.closed_form.matrix_lq_chain import DIM, HORIZON, NODES, THETA, MatrixLQ
from verification.cubature import point_start
from verification.problems.exploratory_lq import on_nodes, quadratic, series_in_time

P = MatrixLQ()
# another policy, for what is off-policy or new
OTHER = THETA + np.array([0.2, 0.1, -0.15, 0.1, -0.2, 0.3, 0.1, 0.05, -0.1])


def of_time(setting: Setting, coefficient: Callable[[float], object]) -> Callable[[Tensor], Tensor]:
    """A coefficient for torch: they are polynomials of time, so a few times tell it."""
    times = np.linspace(0, HORIZON, 6)
    rows = np.array([coefficient(t) for t in times], dtype=float)
    fitted = np.linalg.solve(np.vander(times, increasing=True), rows.reshape(len(times), -1))
    series = setting.tensor(fitted.reshape(rows.shape))
    return lambda t: series_in_time(series, t)


def true_value(setting: Setting) -> Value:
    """V of THETA in continuous time."""
    v = of_time(setting, lambda t: lq.value(t)[0])
    return lambda t, x: quadratic(v(t), x)


def problem(setting: Setting, p: MatrixLQ = P) -> ctrl.ControlProblem:
    """Dynamics and rewards; the noise is diagonal if its matrix is."""
    A, B, S, M, N = (
        of_time(setting, each)
        for each in (
            lambda t: p.at(t).A[1:, 1:],
            lambda t: p.at(t).B[1:],
            lambda t: p.at(t).C[:, 1:, 0].T,
            lambda t: p.at(t).M,
            lambda t: p.at(t).N,
        )
    )
    value = true_value(setting)

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
        lambda t, x, a: -0.5 * (quadratic(M(t), x) + (a @ N(t) * a).sum(1)),
        lambda x: value(x.new_tensor(HORIZON), x),
        p.discount,
        p.temperature,
    )


def chain_value(setting: Setting, p: MatrixLQ = P, theta: np.ndarray = THETA) -> Value:
    """V of the chain at its nodes."""
    return on_nodes(setting, NODES, lq_policies.chain_value(p, theta, NODES))


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
    x, a = (array(each) for each in (paths.states, paths.actions))
    nodes = array(paths.grid.nodes)
    return [(k, float(nodes[k]), float(h), x[:, k], a[:, k]) for k, h in enumerate(np.diff(nodes))]
