"""Dynkin's formula, by exact laws, by hand, and along paths.

E phi(T, X_T) - phi(0, x) = E int_0^T L phi(t, X_t) dt with
L phi = d_t phi + b . grad phi + tr(sigma sigma' Hess phi) / 2, for polynomials of a linear
diffusion in the plane, integrated over its exact law; L of every kind of noise, and of
Stratonovich equations in their Ito form (L x^n = (n b + n^2 s^2 / 2) x^n for
dX = b X dt + s X o dW, not n (n - 1)); and on every Euler path of one coordinate
phi(X') - phi(X) = L phi h + phi' s dW + phi'' / 2 ((b h + s dW)^2 - s^2 h) for quadratic
phi.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl.paths import kept_actions
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form import dynkin as exact
from verification.problems import NoiseKind
from verification.problems.martingale import C, problem, sampled

SOURCE = "Dynkin's and Ito's formulas; Karatzas & Shreve 5.1, Oksendal 7.4"

LINEAR = exact.Linear(
    drift=np.array([[-0.7, 0.4], [0.2, -1.1]]),
    push=np.array([0.3, -0.5]),
    noise=np.array([[0.6, -0.25], [0.15, 0.45]]),  # not symmetric
    start=np.array([0.8, -0.3]),
)
POINTS = np.array([[0.7, -0.4], [-1.1, 0.6], [0.3, 1.2]])
TIME, HORIZON = 0.4, 0.9


def phi(t: Tensor, x: Tensor) -> Tensor:
    """The polynomial of the closed form, as a value function."""
    a, b = x[:, 0], x[:, 1]
    return (1 + t**2) * a**2 * b + t * b**3 + 0.5 * a**4 - a * b


def linear(setting: Setting) -> ctrl.ControlledSDE:
    """dX = (drift X + a) dt + noise dW; ``push`` is the action that is held."""
    drift, noise = setting.tensor(LINEAR.drift), setting.tensor(LINEAR.noise)
    return ctrl.ControlledSDE(
        lambda t, x, a: x @ drift.T + a,
        lambda t, x: noise.expand(len(x), 2, 2),
        "general",
        2,
    )


def rates(
    setting: Setting, sde: ctrl.ControlledSDE, t: float, x: np.ndarray, a: np.ndarray
) -> np.ndarray:
    """L phi by the library."""
    actions = setting.tensor(np.broadcast_to(a, x.shape).copy())
    generated = ctrl.value.generator(sde, phi, setting.tensor(t), setting.tensor(x), actions)
    return generated.double().cpu().numpy()


def checks(setting: Setting) -> Iterator[Check]:
    """By hand, on paths, and by integrals over exact laws."""
    drift = POINTS @ LINEAR.drift.T + LINEAR.push
    shape = 0.3 + 0.2 * POINTS**2
    by_noise: dict[NoiseKind, np.ndarray] = {
        "general": np.broadcast_to(LINEAR.noise @ LINEAR.noise.T, (3, 2, 2)),
        "scalar": np.einsum("pi,pj->pij", shape, shape),
        "diagonal": np.einsum("pi,pj,ij->pij", shape, shape, np.eye(2)),
    }
    for noise, product in by_noise.items():
        sde = linear(setting)
        if noise != "general":
            sde = ctrl.ControlledSDE(sde.drift, lambda t, x: 0.3 + 0.2 * x**2, noise)
        got = rates(setting, sde, TIME, POINTS, LINEAR.push)
        want = exact.generator(TIME, POINTS, drift, product)
        yield pathwise(f"L phi by hand, {noise} noise", got, want)

    b, s, n = -0.7, 0.6, 3
    geometric = ctrl.ControlledSDE(
        lambda t, x, a: b * x, lambda t, x: s * x, calculus="stratonovich"
    )
    x = setting.tensor([[0.7], [-1.2]])
    got = ctrl.value.generator(geometric, lambda t, x: x[:, 0] ** n, x[0, 0], x, x)
    yield pathwise("L x^3, Stratonovich", got, (n * b + n**2 * s**2 / 2) * x[:, 0] ** n)

    # J = 0 pinned nowhere: dM of a problem without end and reward is phi(X') - phi(X)
    paths = sampled(setting)
    bare = ctrl.ControlProblem(problem().sde, float("inf"))
    actions, increments = kept_actions(paths), paths.increments
    assert increments is not None
    x, a, h = paths.states[:, :-1, 0], actions[..., 0], paths.grid.nodes.diff()

    def square(t: Tensor, x: Tensor) -> Tensor:
        return 0.4 * x[:, 0] ** 2 - 0.3 * x[:, 0]

    dm = ctrl.martingale.increments(square, bare, paths)
    rate = [
        ctrl.value.generator(bare.dynamics, square, t, paths.states[:, k], actions[:, k])
        for k, t in enumerate(paths.grid.nodes[:-1])
    ]
    state_change = (C.drift * x + C.control * a) * h + C.noise * increments[..., 0]
    rest = (0.8 * x - 0.3) * C.noise * increments[..., 0]
    rest = rest + 0.4 * (state_change**2 - C.noise**2 * h)
    yield pathwise("Ito's formula on every Euler path", dm, torch.stack(rate, 1) * h + rest)

    points, masses = np.polynomial.legendre.leggauss(9)
    total = 0.0
    for t, w in zip(HORIZON * (points + 1) / 2, HORIZON * masses / 2, strict=True):
        x, mass = exact.normal_nodes(*LINEAR.law(t))
        total += w * mass @ rates(setting, linear(setting), float(t), x, LINEAR.push)
    x, mass = exact.normal_nodes(*LINEAR.law(HORIZON))
    gained = mass @ exact.polynomial(HORIZON, x) - exact.polynomial(0.0, LINEAR.start[None])[0]
    yield expectation("Dynkin's formula over the exact law", total, gained)


MISTAKES = r"""
ctrl.value.transport
    time runs backwards | torch.ones_like(t) => -torch.ones_like(t)
    drift missing | (torch.ones_like(t), drift) => (torch.ones_like(t), 0 * drift)
ctrl.value.generator
    no drift correction of a Stratonovich equation | sde = sde.to_ito() => sde = sde
    Hessian's diagonal alone | directions, share = _columns(sde, t, states, actions), 1.0
        => columns = torch.cat(list(_columns(sde, t, states, actions)))\n        diagonal = torch.diag_embed(columns.square().sum(0).sqrt())\n        directions, share = [own_memory(diagonal.movedim(-1, 0))], 1.0
ctrl.value._columns
    sigma' sigma for sigma sigma' | sigma[..., some].movedim(-1, 0) => sigma.mT[..., some].movedim(-1, 0)
    one Brownian motion for all coordinates taken for one each | yield own_memory(sigma.expand_as(states).unsqueeze(0))
        => yield torch.diag_embed(sigma.expand_as(states)).movedim(1, 0)
    one Brownian motion for each coordinate taken for one in all | elif sde.noise == "scalar" => elif True
ctrl.value.martingale_increments
    difference of values over the step after | keep * along[:, 1:] - along[:, :-1]
        => (keep * along[:, 1:] - along[:, :-1]).roll(-1, 1)
shared
    second-order term of q missing
    1/2 of the second derivative missing
    derivative of V in time missing
"""
