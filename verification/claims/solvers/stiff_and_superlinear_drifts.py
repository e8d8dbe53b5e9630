"""Solvers for drifts that are stiff or grow faster than linearly.

DriftImplicitEuler solves Y = X + b(t1, Y, a) h + sigma(t0, X, a) dW, whatever the
stiffness, with the derivatives of its solution; TamedEuler is X + h b / (1 + h |b|) +
sigma dW, a Gaussian step. Both are of weak order 1, and of strong order 1 for additive
noise.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

import ctrl
from verification.claim import Check, Setting, limit, pathwise, rounding, stated
from verification.closed_form.stiff import Stiff, cubic_root

SOURCE = "Kloeden & Platen 12.2; Hutzenthaler, Jentzen & Kloeden 2012, Ann. Appl. Probab. 22"
WHY_DOUBLE = "orders are read off differences of errors, which float32's round-off covers"

S = Stiff()
T0, T1 = 0.3, 0.7
NOWHERE = ctrl.DeterministicPolicy(lambda t, x: torch.zeros_like(x))
CUBIC = ctrl.ControlledSDE(lambda t, x, a: x - x**3 + a, lambda t, x: 0.8)


def stiff_sde(setting: Setting) -> ctrl.ControlledSDE:
    """In the plane."""
    A = setting.tensor(S.A)
    return ctrl.ControlledSDE(
        lambda t, x, a: (1 + t) * x @ A.T, lambda t, x: (1 + t) * S.noise * torch.ones_like(x)
    )


def orders(setting: Setting, solver: ctrl.Solver) -> tuple[float, float]:
    """Strong and weak, from exact expectations on 2, 4 and 8 coupled steps."""
    fine = ctrl.TimeGrid(torch.linspace(0, 0.004, 9, dtype=setting.dtype, device=setting.device))
    noise = ctrl.noise.gauss_hermite(fine.steps, nodes=3)
    assert noise.weights is not None
    start = setting.tensor(1.6).expand(len(noise.increments), 1)
    ends = list[Tensor]()
    for every in (4, 2, 1):
        grid = ctrl.TimeGrid(fine.nodes[::every])
        dw = ctrl.noise.coarsen(noise.increments, fine.nodes, grid.nodes)
        problem = ctrl.ControlProblem(CUBIC, 1.0)
        ends.append(
            ctrl.simulate_end(problem, NOWHERE, start, grid, solver, noise=ctrl.Noise(dw))[:, 0]
        )
    strong = [(noise.weights @ (a - b).square()).sqrt() for a, b in itertools.pairwise(ends)]
    means = [noise.weights @ end.square() for end in ends]
    weak = (means[0] - means[1]) / (means[1] - means[2])
    return math.log2(strong[0] / strong[1]), math.log2(abs(weak))


def checks(setting: Setting) -> Iterator[Check]:
    """Steps by hand, derivatives, and orders."""
    implicit, tamed = ctrl.DriftImplicitEuler(), ctrl.TamedEuler()
    t0, t1 = setting.tensor(T0), setting.tensor(T1)
    x = setting.tensor([[1.2, -0.4], [-2.0, 0.3], [0.1, 4.0]])
    dw = setting.tensor([[0.3, -0.2], [-0.5, 0.1], [0.2, 0.7]])
    sde, by_hand = stiff_sde(setting), (x.numpy(), dw.numpy(), T0, T1)
    step = implicit.step(sde, t0, t1, x, 0 * x, dw)
    yield stated(
        pathwise("implicit, linear", step, S.implicit(*by_hand)), units=rounding(size=36.0)
    )
    step = tamed.step(sde, t0, t1, x, 0 * x, dw)
    yield pathwise("tamed, linear", step, S.tamed(*by_hand))
    center, std = tamed.transition(sde, t0, t1, x, 0 * x)
    yield pathwise("tamed: transition", center + std * dw / math.sqrt(T1 - T0), step)

    y = setting.tensor([[-60.0], [-0.7], [0.2], [9.0]]).requires_grad_()
    a, h = setting.tensor([[0.4], [-0.8], [1.1], [0.5]]), T1 - T0
    step = implicit.step(CUBIC, t0, t1, y, a, 0 * a)
    known = y.detach().numpy() + h * a.numpy()
    root = cubic_root(known, h)
    yield pathwise("implicit, cubic", step, root)
    (slope,) = torch.autograd.grad(step.sum(), y)
    yield pathwise("derivative of the implicit step", slope, 1 / (1 - h * (1 - 3 * root**2)))
    with torch.no_grad():
        push = h * (y - y**3 + a)
        step = tamed.step(CUBIC, t0, t1, y, a, 0 * a)
    yield pathwise("tamed, cubic", step, (y + push / (1 + push.abs())).detach())

    for name, solver in (("implicit", implicit), ("tamed", tamed)):
        strong, weak = orders(setting, solver)
        yield limit(f"{name}: strong order, additive noise", strong, 1.0)
        yield limit(f"{name}: weak order", weak, 1.0)


MISTAKES = """
ctrl.solvers.DriftImplicitEuler.step
    drift at the left end's time | as_like(t1, states) => as_like(t0, states)
    explicit drift | drift_at(end, y, => drift_at(end, states,
    half of the drift | y - h * sde => y - 0.5 * h * sde
    diffusion at the right end | sde.diffuse(as_like(t0, states) => sde.diffuse(as_like(t1, states)
    step size off by half an order | h = as_like(t1, states), float(t1 - t0)
        => h = as_like(t1, states), float(t1 - t0) * (1 + 3 * float(t1 - t0) ** 0.5)
    derivative of the explicit step | return y - _newton_change(gap, y.detach()) => return y - gap(y.detach())
ctrl.solvers.TamedEuler._drifted
    tamed by /b/ sqrt(h) | (1 + size.view => (1 + (size / float(t1 - t0) ** 0.5).view
    drift not tamed | push / (1 + size => push / (1 + 0 * size
    tamed by /b/, not /b/ h | (1 + size.view => (1 + (size / float(t1 - t0)).view
    every coordinate tamed by the largest | .norm(dim=1) => .abs().amax(1)
    action left out of the tamed drift | states, action) => states, 0 * action)
ctrl.solvers._newton_change
    transposed Jacobian [RuntimeError] | solve(jacobian, residual) => solve(jacobian.mT, residual)
ctrl.solvers.TamedEuler.transition
    std of another solver's transition | states, action)[1] => states, action)[1] * float(t1 - t0) ** 0.5
"""
