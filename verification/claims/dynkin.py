"""The generator and Dynkin's formula; what a discounted sum on a grid is."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl.paths import kept_actions
from verification.claim import Check, Setting, claim, expectation, limit, pathwise, wrong
from verification.claims import policy_evaluation as evaluation
from verification.claims.martingale import POLICY, C, earned, gaussian, problem, sampled
from verification.closed_form import dynkin as exact
from verification.closed_form import exploratory_chain as chain
from verification.closed_form.policy_evaluation import Evaluation
from verification.cubature import mean
from verification.problems import NODES, NoiseKind

LINEAR = exact.Linear(
    drift=np.array([[-0.7, 0.4], [0.2, -1.1]]),
    push=np.array([0.3, -0.5]),
    noise=np.array([[0.6, -0.25], [0.15, 0.45]]),  # not symmetric
    start=np.array([0.8, -0.3]),
)
POINTS = np.array([[0.7, -0.4], [-1.1, 0.6], [0.3, 1.2]])
TIME, HORIZON = 0.4, 0.9
SQUARES = Evaluation(discount=0.8)
GRIDS = (4, 8, 16, 32)


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


@claim(
    statement="""
        E phi(T, X_T) - phi(0, x) = E int_0^T L phi(t, X_t) dt with
        L phi = d_t phi + b . grad phi + tr(sigma sigma' Hess phi) / 2, for polynomials of a linear
        diffusion in the plane, integrated over its exact law; L of every kind of noise, and of
        Stratonovich equations in their Ito form (L x^n = (n b + n^2 s^2 / 2) x^n for
        dX = b X dt + s X o dW, not n (n - 1)); and on every Euler path of one coordinate
        phi(X') - phi(X) = L phi h + phi' s dW + phi'' / 2 ((b h + s dW)^2 - s^2 h) for quadratic
        phi.
        """,
    source="Dynkin's and Ito's formulas; Karatzas & Shreve 5.1, Oksendal 7.4",
    wrongs=[
        wrong(
            "second derivative dropped",
            "ctrl.value.generator",
            "along_drift + 0.5 * trace",
            "along_drift",
        ),
        wrong(
            "1/2 of the second derivative missing",
            "ctrl.value.generator",
            "along_drift + 0.5 * trace",
            "along_drift + trace",
        ),
        wrong(
            "time derivative missing",
            "ctrl.value.transport",
            "torch.ones_like(t)",
            "torch.zeros_like(t)",
        ),
        wrong(
            "time runs backwards",
            "ctrl.value.transport",
            "torch.ones_like(t)",
            "-torch.ones_like(t)",
        ),
        wrong(
            "drift missing",
            "ctrl.value.transport",
            "(torch.ones_like(t), drift)",
            "(torch.ones_like(t), 0 * drift)",
        ),
        wrong(
            "no drift correction of a Stratonovich equation",
            "ctrl.value.generator",
            "sde = sde.to_ito()",
            "sde = sde",
        ),
        wrong(
            "sigma' sigma for sigma sigma'",
            "ctrl.value._columns",
            "sigma[..., some].movedim(-1, 0)",
            "sigma.mT[..., some].movedim(-1, 0)",
        ),
        wrong(
            "one Brownian motion for all coordinates taken for one each",
            "ctrl.value._columns",
            "yield own_memory(sigma.expand_as(states).unsqueeze(0))",
            "yield torch.diag_embed(sigma.expand_as(states)).movedim(1, 0)",
        ),
        wrong(
            "one Brownian motion for each coordinate taken for one in all",
            "ctrl.value._columns",
            'elif sde.noise == "scalar"',
            "elif True",
        ),
        wrong(
            "Hessian's diagonal alone",
            "ctrl.value.generator",
            "directions, share = _columns(sde, t, states, actions), 1.0",
            "columns = torch.cat(list(_columns(sde, t, states, actions)))\n"
            "        diagonal = torch.diag_embed(columns.square().sum(0).sqrt())\n"
            "        directions, share = [own_memory(diagonal.movedim(-1, 0))], 1.0",
        ),
        wrong(
            "difference of values over the step after",
            "ctrl.value.martingale_increments",
            "keep * along[:, 1:] - along[:, :-1]",
            "(keep * along[:, 1:] - along[:, :-1]).roll(-1, 1)",
        ),
    ],
)
def dynkin_formula(setting: Setting) -> Iterator[Check]:
    """By integrals over exact laws, by hand, and on paths."""
    points, masses = np.polynomial.legendre.leggauss(9)
    total = 0.0
    for t, w in zip(HORIZON * (points + 1) / 2, HORIZON * masses / 2, strict=True):
        x, mass = exact.normal_nodes(*LINEAR.law(t))
        total += w * mass @ rates(setting, linear(setting), float(t), x, LINEAR.push)
    x, mass = exact.normal_nodes(*LINEAR.law(HORIZON))
    gained = mass @ exact.polynomial(HORIZON, x) - exact.polynomial(0.0, LINEAR.start[None])[0]
    yield expectation("Dynkin's formula over the exact law", total, gained)

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


@claim(
    statement="""
        The return of a path on a grid is sum_k e^{-discount (t_k - t_0)} r_k h_k
        + e^{-discount (T - t_0)} r(X_T), rewards at the left end of their own step; its mean is the
        value of the recursion V_k = r h_k + e^{-discount h_k} E V_{k+1}, exactly on any grid, and
        tends to E int e^{-discount t} r dt like the step. (e^{-discount h} and 1 - discount h share
        the limit, not the value on a grid.)
        """,
    source="Jia & Zhou 2022a, JMLR 23, section 2; Sutton & Barto 3.3 in continuous time",
    wrongs=[
        wrong(
            "1 - discount h for exp(-discount h)",
            "ctrl.paths.returns_to_go",
            "keep = torch.exp(-discount * as_like(paths.grid.steps, rewards))",
            "keep = 1 - discount * as_like(paths.grid.steps, rewards)",
        ),
        wrong(
            "discount missing",
            "ctrl.paths.returns_to_go",
            "-discount * as_like(",
            "-0.0 * as_like(",
        ),
        wrong(
            "discount per step",
            "ctrl.paths.returns_to_go",
            "as_like(paths.grid.steps, rewards))",
            "as_like(paths.grid.steps, rewards) ** 0)",
        ),
        wrong(
            "rewards discounted over their own step",
            "ctrl.paths.returns_to_go",
            "rewards[:, k] + keep[..., k] * returns[-1]",
            "keep[..., k] * (rewards[:, k] + returns[-1])",
        ),
        wrong(
            "uneven grid taken for an even one, in the discount",
            "ctrl.paths.returns_to_go",
            "as_like(paths.grid.steps, rewards))",
            "as_like(paths.grid.steps, rewards).mean().expand(rewards.shape[1]))",
        ),
        wrong(
            "uneven grid taken for an even one, in the reward",
            "ctrl.paths.running_rewards",
            "steps = as_like(paths.grid.steps, paths.states)",
            "steps = as_like(paths.grid.steps, paths.states).mean().expand("
            "paths.states.shape[1] - 1)",
        ),
        wrong(
            "rewards at the right end of their step",
            "ctrl.paths.over_steps",
            "paths.states[:, :-1]",
            "paths.states[:, 1:]",
        ),
        wrong(
            "rewards off by one step",
            "ctrl.paths.returns_to_go",
            "rewards[:, k] + keep[..., k]",
            "rewards[:, k - 1] + keep[..., k]",
        ),
        wrong(
            "discount off by one step",
            "ctrl.paths.returns_to_go",
            "keep[..., k] * returns",
            "keep[k - 1] * returns",
        ),
        wrong(
            "sqrt(dt) for dt",
            "ctrl.paths.running_rewards",
            "kept_actions(paths))) * steps",
            "kept_actions(paths))) * steps.sqrt()",
        ),
        wrong(
            "terminal reward of the state before the end",
            "ctrl.paths.returns_to_go",
            "paths.states[:, -1])",
            "paths.states[:, -2])",
        ),
        wrong(
            "discount counted from time 0 on a grid that begins later",
            "ctrl.value.discount_factors",
            "(nodes - nodes[..., :1])",
            "nodes",
        ),
        wrong(
            "discount at the right end of a step",
            "ctrl.value.discount_factors",
            "nodes = paths.grid.nodes[..., :-1]",
            "nodes = paths.grid.nodes[..., 1:]",
        ),
        wrong(
            "discount's sign",
            "ctrl.value.discount_factors",
            "-discount * (nodes",
            "discount * (nodes",
        ),
    ],
)
def discounted_return(setting: Setting) -> Iterator[Check]:
    """Against sums written out, the recursion of values, and the integral in the limit."""
    paths, policy, times = sampled(setting), gaussian(POLICY), np.array(NODES)
    returns = ctrl.returns_to_go(problem(), paths, policy)
    yield pathwise("return of a path, written out", returns[:, 0], earned(paths))
    known = [
        float(chain.expected(v, *law))
        for v, law in zip(
            chain.values(C, POLICY, times), chain.state_laws(C, POLICY, times), strict=True
        )
    ]
    yield expectation("mean return to go at every node", mean(returns, paths), known)
    late = replace(paths, grid=ctrl.TimeGrid(paths.grid.nodes + 0.3))
    factors = ctrl.value.discount_factors(problem(), late)
    yield pathwise("discount factors of a late grid", factors, np.exp(-C.discount * times[:-1]))
    sums = []
    for steps in GRIDS:
        even = setting.tensor(np.linspace(0, SQUARES.horizon, steps + 1))
        paths = evaluation.sampled(SQUARES, even)
        sums.append(
            float(mean(ctrl.returns_to_go(evaluation.problem(SQUARES), paths)[:, 0], paths))
        )
    s = SQUARES
    integral = exact.discounted_square(s.pull, s.noise, s.mean, s.variance, s.discount, s.horizon)
    powers = np.vander(1 / np.array(GRIDS, dtype=float), increasing=True)
    yield limit("limit of small steps", np.linalg.solve(powers, np.array(sums))[0], integral)
    order = np.log2((sums[-2] - integral) / (sums[-1] - integral))
    yield limit("order 1", order, 1.0)
