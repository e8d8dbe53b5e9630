"""Values and gradients by recursion, then the error of an adjoint.

Through ctrl.simulate(differentiable=True) the gradient of an expectation of the scheme, in
the drift's, the policy's and the diffusion's parameters and the start, is the derivative of
the chain's own expectation, for our solvers and torchsde's; the adjoint of reversible_heun
gives the same. False: that an adjoint always does; that of euler is off by O(h).
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from verification.claim import Check, Setting, array, expectation, limit
from verification.closed_form.linear_steps import gradient, second_moment
from verification.cubature import mean
from verification.problems.backward_induction import local_order

SOURCE = "Giles & Glasserman 2006; Li, Wong, Chen & Duvenaud 2020; Kidger et al. 2021"

NODES = (0.0, 0.2, 0.5, 0.9)
NUMBERS = np.array([-0.7, 0.4, 0.55, 1.3])  # pull, gain, noise, start


def gradient_by_paths(
    setting: Setting, solver: ctrl.Solver, nodes: tuple[float, ...], stratonovich: bool = False
) -> tuple[float, Tensor]:
    """E X_T^2 and its derivatives in NUMBERS, through ``ctrl.simulate``."""
    leaves = [setting.tensor(float(v)).requires_grad_() for v in NUMBERS]
    pull, gain, noise, start = leaves
    sde = ctrl.ControlledSDE(lambda t, x, a: pull * x + a, lambda t, x: noise * x)
    if isinstance(solver, ctrl.TorchSDE) and solver.adjoint:
        solver = ctrl.TorchSDE(solver.method, adjoint=True, parameters=(pull, noise))
    grid = ctrl.TimeGrid(setting.tensor(nodes))
    rule = ctrl.noise.gauss_hermite(grid.steps, nodes=4)
    assert rule.weights is not None
    paths = ctrl.simulate(
        ctrl.ControlProblem(sde.to_stratonovich() if stratonovich else sde, nodes[-1]),
        ctrl.DeterministicPolicy(lambda t, x: gain * x),
        start * torch.ones_like(rule.increments[:, 0]),
        grid,
        solver,
        noise=rule,
        differentiable=True,
    )
    value = mean(paths.states[:, -1, 0].square(), paths)
    slopes = torch.autograd.grad(value, leaves, allow_unused=True)
    return float(value.detach()), torch.stack(
        [torch.zeros_like(pull) if one is None else one for one in slopes]
    )


def checks(setting: Setting) -> Iterator[Check]:
    """Values and gradients by recursion, then the error of an adjoint."""
    steps = np.diff(NODES)
    solvers = {
        "Euler-Maruyama": ("Euler-Maruyama", ctrl.EulerMaruyama()),
        "Milstein": ("Milstein", ctrl.Milstein()),
        "Heun": ("Heun", ctrl.Heun()),
        "torchsde's euler": ("Euler-Maruyama", ctrl.TorchSDE("euler")),
        "torchsde's milstein": ("Milstein", ctrl.TorchSDE("milstein")),
        "torchsde's heun": ("Heun", ctrl.TorchSDE("heun")),
        "adjoint of reversible_heun": ("Heun", ctrl.TorchSDE("reversible_heun", adjoint=True)),
    }
    for name, (scheme, solver) in solvers.items():
        value, slopes = gradient_by_paths(setting, solver, NODES, stratonovich=scheme == "Heun")
        want = second_moment(scheme, NUMBERS, steps).real
        yield expectation(f"{name}: second moment", value, want)
        yield expectation(f"{name}: its gradient", slopes, gradient(scheme, NUMBERS, steps))
    errors = []
    for count in (1, 2, 4):
        even = tuple(np.linspace(0, 0.4, count + 1).tolist())
        _, adjoint_slopes = gradient_by_paths(setting, ctrl.TorchSDE("euler", adjoint=True), even)
        exact = gradient("Euler-Maruyama", NUMBERS, np.diff(even))
        errors.append(float(np.abs(array(adjoint_slopes) - exact).max()))
    yield limit("adjoint of euler: local order of its error", local_order(errors, 0.0), 1.0)


MISTAKES = r"""
ctrl.solvers.EulerMaruyama.step
    states detached in Euler's step | drifted = states + => drifted = states.detach() +
ctrl.sde.ControlledSDE.drift_at
    drift detached | return value => return value.detach()
ctrl.paths.TimeGrid.steps
    an uneven grid taken for an even one | return self.nodes.diff()
        => return self.nodes.diff().mean().expand(len(self.nodes) - 1)
ctrl.sde.ControlledSDE.diffuse
    diffusion detached | return sigma * increment\n => return sigma.detach() * increment\n
ctrl.sde.ControlledSDE._own_derivative
    correction detached | return derivative => return derivative.detach()
ctrl.simulate._roll_out_with_graph
    paths detached | states[k], actions[k], increment, source) => states[k].detach(), actions[k], increment, source)
ctrl.policy.DeterministicPolicy.act
    action detached | return mean => return mean.detach()
ctrl.solvers.Heun.step
    corrector detached | there = states + here => there = (states + here).detach()
ctrl.torchsde_solver.TorchSDE._by_adjoint
    parameters left out of the adjoint | adjoint_params=(*self.parameters, equation.action)
        => adjoint_params=(equation.action,)
    action left out of the adjoint | adjoint_params=(*self.parameters, equation.action)
        => adjoint_params=self.parameters
    the adjoint's step in two, each with the whole increment | (1 + 1e-6) * float => 0.5 * float
ctrl.solvers.Milstein._correction
    Milstein's term detached | return sde.noise_drift(t, states, action) *
        => return sde.noise_drift(t, states, action).detach() *
shared
    h for sqrt(h)
"""
