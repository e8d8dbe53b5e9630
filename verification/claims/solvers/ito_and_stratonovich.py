"""Ito and Stratonovich equations with one solution, and solvers that refuse the other sense.

dX = b dt + sigma dW and dX = b' dt + sigma o dW have one solution where
b = b' + 1/2 sum_jk (d sigma_ij / d x_k) sigma_kj, for diagonal, scalar and general noise;
conversion there and back changes nothing; a solver refuses equations in the other sense.
False: that general noise needs the divergence of sigma, or its rows.

For every kind of noise the drifts differ by 1/2 sum_jk (d sigma_ij / d x_k) sigma_kj: the
derivative of column j, in the direction of column j. The reference takes it by complex steps.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ctrl
from verification.claim import Check, Setting, limit, pathwise
from verification.closed_form.extrapolation import extrapolated
from verification.closed_form.linear_moments import first, noise_drift, second

SOURCE = "Kloeden & Platen, section 4.9"

TIME = 0.7
STATES = ((0.3, -1.1), (0.9, 0.45), (-0.6, 1.7))
ENTRIES: dict[str, Callable[..., tuple[tuple[Any, ...], ...]]] = {
    "diagonal": lambda cos, x, y: ((0.5 + 0.3 * cos(x), 0 * x), (0 * y, 0.5 + 0.3 * cos(y))),
    "scalar": lambda cos, x, y: ((0.7 + 0.4 * x * y,), (0.2 * y * y + cos(x),)),
    "general": lambda cos, x, y: (
        (0.7 + 0.4 * x * y, 0.3 * cos(y)),
        (0.2 * y * y + cos(x), 0.9 * x - 0.5 * y),
    ),
}  # sigma as rows, of torch's or of numpy's cosine


def equation(noise: str, calculus: str) -> ctrl.ControlledSDE:
    """A nonlinear equation of two coordinates with this kind of noise, growing in time."""

    def diffusion(t: Tensor, x: Tensor) -> Tensor:
        rows = ENTRIES[noise](torch.cos, x[:, 0], x[:, 1])
        sigma = (1 + 0.4 * t) * torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)
        if noise == "diagonal":
            # sigma_i of x_i alone
            return (1 + 0.4 * t) * (0.5 + 0.3 * x.cos())
        return sigma[..., 0] if noise == "scalar" else sigma

    return ctrl.ControlledSDE(
        lambda t, x, a: x.sin() + 0.8 * a - 0.35,
        diffusion,
        noise=noise,  # pyright: ignore[reportArgumentType]  # one of the three
        noise_dim=2 if noise == "general" else None,
        calculus=calculus,  # pyright: ignore[reportArgumentType]  # one of the two
    )


def by_complex_steps(noise: str) -> np.ndarray:
    """sum_jk (d sigma_ij / d x_k) sigma_kj at STATES."""

    def sigma(x: np.ndarray) -> np.ndarray:
        return (1 + 0.4 * TIME) * np.array(ENTRIES[noise](np.cos, x[0], x[1]))

    return np.stack([noise_drift(sigma, np.array(x)) for x in STATES])


SOLVERS = (
    ctrl.EulerMaruyama(),
    ctrl.Milstein(),
    ctrl.Heun(),
    ctrl.TorchSDE("euler"),
    ctrl.TorchSDE("heun"),
)


def refusals(setting: Setting) -> list[float]:
    """1 for every call that an equation in the other sense makes raise, 0 for one that answers."""
    x = setting.tensor(STATES)
    t0, t1 = setting.tensor([0.2, 0.3])
    raised: list[float] = []
    for solver in SOLVERS:
        of_ito = not (isinstance(solver, ctrl.Heun) or getattr(solver, "method", "") == "heun")
        sde = equation("diagonal", "stratonovich" if of_ito else "ito")
        calls: list[Callable[..., object]] = [solver.step]
        if isinstance(solver, ctrl.EulerMaruyama):
            calls.append(lambda *a, s=solver: s.transition(*a[:-1]))
        if isinstance(solver, ctrl.EulerMaruyama | ctrl.Milstein):
            calls.append(lambda *a, s=solver: s.step_into(torch.empty_like(x), *a))
        for call in calls:
            try:
                call(sde, t0, t1, x, 0 * x, 0.1 * x)
                raised.append(0.0)
            except ValueError:
                raised.append(1.0)
    return raised


DRIFT = ((-0.4, 0.7), (0.25, -0.9))
COLUMNS = (((0.5, 0.3), (-0.2, 0.35)), ((-0.3, 0.45), (0.6, 0.2)))
START, HORIZON = (1.3, 0.8), 0.6


def moments(setting: Setting, steps: int) -> tuple[Tensor, Tensor]:
    """E X_T and E X_T X_T' of Heun on the converted linear equation, by recursion."""
    a, b = setting.tensor(DRIFT), setting.tensor(COLUMNS)
    sde = ctrl.ControlledSDE(
        lambda t, x, _: x @ a.T,
        lambda t, x: torch.einsum("jik,pk->pij", b, x),
        noise="general",
        noise_dim=2,
    ).to_stratonovich()
    grid = ctrl.TimeGrid(setting.tensor([0.0, HORIZON / steps]))
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=4, noise=(2,))
    assert noise.weights is not None
    still = ctrl.DeterministicPolicy(lambda t, x: torch.zeros_like(x))
    columns = []
    for unit in torch.eye(2).to(a):
        start = unit.expand(len(noise.weights), -1).contiguous()
        problem = ctrl.ControlProblem(sde, HORIZON)
        columns.append(ctrl.simulate_end(problem, still, start, grid, ctrl.Heun(), noise=noise))
    step, x = torch.stack(columns, dim=-1), setting.tensor(START)  # [nodes, 2, 2]
    mean = torch.einsum("p,pij->ij", noise.weights, step)
    square = torch.einsum("p,pij,pkl->ikjl", noise.weights, step, step).reshape(4, 4)
    outer = torch.outer(x, x).flatten()
    return (
        torch.linalg.matrix_power(mean, steps) @ x,
        torch.linalg.matrix_power(square, steps) @ outer,
    )


def checks(setting: Setting) -> Iterator[Check]:
    """Corrections by complex steps, round trips, refusals, and moments of a solution."""
    x, t = setting.tensor(STATES), setting.tensor(TIME)
    a = 0.6 * x.flip(1)
    for noise in ENTRIES:
        sde = equation(noise, "stratonovich")
        plain, ito = sde.drift_at(t, x, a), sde.to_ito()
        correction = ito.drift_at(t, x, a) - plain
        yield pathwise(
            f"correction for {noise} noise, by complex steps",
            correction,
            by_complex_steps(noise) / 2,
        )
        back = ito.to_stratonovich().drift_at(t, x, a)
        yield pathwise(f"there and back, {noise} noise", back, plain)
    raised = refusals(setting)
    yield pathwise("solvers that refuse the other sense", raised, [1.0] * len(raised))
    recursions = [moments(setting, steps) for steps in (4, 8, 16, 32, 64)]
    drift, columns, start = np.array(DRIFT), np.array(COLUMNS), np.array(START)
    for k, want in enumerate(
        (first(drift, start, HORIZON), second(drift, columns, start, HORIZON).ravel())
    ):
        got = [extrapolated([float(one[k][i]) for one in recursions]) for i in range(len(want))]
        name = ("mean", "second moments")[k]
        yield limit(f"{name} of a linear equation of general noise, through Heun", got, want)


MISTAKES = """
ctrl.sde.ControlledSDE.to_ito
    without 1/2 | 0.5 => 1.0
ctrl.sde.ControlledSDE.to_stratonovich
    without 1/2 on the way back | 0.5 => 1.0
ctrl.sde.ControlledSDE._converted
    1/2 + 1 % | + share * => + 1.01 * share *
ctrl.sde.ControlledSDE.noise_drift
    derivative along 1, scalar | return along(sigma) => return sigma * along(torch.ones_like(sigma))
    rows for columns, general | along(column)[..., j] => along(column)[..., j, :]
    direction of another column | zip(sigma.unbind(-1) => zip(sigma.flip(-1).unbind(-1)
    directions are rows | zip(sigma.unbind(-1) => zip(sigma.unbind(-2)
    last column alone | for column, j in each]).sum(0) => for column, j in each])[-1]
ctrl.sde.ControlledSDE.require_calculus
    the other sense accepted | if self.calculus != calculus: => if calculus not in CALCULI:
ctrl.solvers.Heun.step
    the other sense accepted by Heun | sde.require_calculus("stratonovich", "Heun") => pass
ctrl.solvers.EulerMaruyama.step_into
    the other sense accepted in place | sde.require_calculus("ito", "EulerMaruyama") => pass
shared
    drift correction missing
    correction's sign
    g' for g g', diagonal
    sigma transposed
"""
