"""Gradients through roll-outs, and solvers that must be one another.

The derivative of an expectation of the discrete scheme, on quadrature paths, is a number that a
polynomial recursion gives by complex steps, to round-off; whatever is detached on the way is seen.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from verification.backward_induction import local_order
from verification.claim import Check, Setting, claim, expectation, limit, pathwise, wrong
from verification.closed_form.linear_steps import gradient, second_moment
from verification.cubature import mean

NODES = (0.0, 0.2, 0.5, 0.9)
NUMBERS = np.array([-0.7, 0.4, 0.55, 1.3])  # pull, gain, noise, start
EULER, HEUN = "ctrl.solvers.EulerMaruyama.step", "ctrl.solvers.Heun.step"
ADJOINT = "ctrl.torchsde_solver.TorchSDE._by_adjoint"


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


@claim(
    statement="""
        Through ctrl.simulate(differentiable=True) the gradient of an expectation of the scheme, in
        the drift's, the policy's and the diffusion's parameters and the start, is the derivative of
        the chain's own expectation, for our solvers and torchsde's; the adjoint of reversible_heun
        gives the same. False: that an adjoint always does; that of euler is off by O(h).
        """,
    source="Giles & Glasserman 2006; Li, Wong, Chen & Duvenaud 2020; Kidger et al. 2021",
    wrongs=[
        wrong(
            "states detached in Euler's step",
            EULER,
            "drifted = states +",
            "drifted = states.detach() +",
        ),
        wrong(
            "drift detached",
            "ctrl.sde.ControlledSDE.drift_at",
            "return value",
            "return value.detach()",
        ),
        wrong(
            "h for sqrt(h)",
            "ctrl.noise.gauss_hermite",
            "step_sizes.sqrt()[:, None]",
            "step_sizes[:, None]",
        ),
        wrong(
            "an uneven grid taken for an even one",
            "ctrl.paths.TimeGrid.steps",
            "return self.nodes.diff()",
            "return self.nodes.diff().mean().expand(len(self.nodes) - 1)",
        ),
        wrong(
            "diffusion detached",
            "ctrl.sde.ControlledSDE.diffuse",
            "return sigma * increment\n",
            "return sigma.detach() * increment\n",
        ),
        wrong(
            "correction detached",
            "ctrl.sde.ControlledSDE._own_derivative",
            "return derivative",
            "return derivative.detach()",
        ),
        wrong(
            "paths detached",
            "ctrl.simulate._roll_out_with_graph",
            "states[k], actions[k], increment, source)",
            "states[k].detach(), actions[k], increment, source)",
        ),
        wrong(
            "action detached",
            "ctrl.policy.DeterministicPolicy.act",
            "return mean",
            "return mean.detach()",
        ),
        wrong(
            "corrector detached", HEUN, "there = states + here", "there = (states + here).detach()"
        ),
        wrong(
            "parameters left out of the adjoint",
            ADJOINT,
            "adjoint_params=(*self.parameters, equation.action)",
            "adjoint_params=(equation.action,)",
        ),
        wrong(
            "action left out of the adjoint",
            ADJOINT,
            "adjoint_params=(*self.parameters, equation.action)",
            "adjoint_params=self.parameters",
        ),
        wrong(
            "the adjoint's step in two, each with the whole increment",
            ADJOINT,
            "(1 + 1e-6) * float",
            "0.5 * float",
        ),
        wrong(
            "Milstein's term detached",
            "ctrl.solvers.Milstein._correction",
            "return sde.noise_drift(t, states, action) *",
            "return sde.noise_drift(t, states, action).detach() *",
        ),
    ],
)
def gradients_through_solvers(setting: Setting) -> Iterator[Check]:
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
        errors.append(float(np.abs(adjoint_slopes.double().cpu().numpy() - exact).max()))
    yield limit("adjoint of euler: local order of its error", local_order(errors, 0.0), 1.0)


BLACK_BOX, INTO = "ctrl.solvers.BlackBox.step", "ctrl.solvers.EulerMaruyama.step_into"
ITO = ctrl.ControlledSDE(
    lambda t, x, a: x.sin() - 0.3 * t + a, lambda t, x: (0.5 + 0.3 * x.cos()) * (1 + 0.4 * t)
)
PLAIN = ctrl.ControlledSDE(ITO.drift, lambda t, x: 0.6)
SCALAR = ctrl.ControlledSDE(
    ITO.drift, lambda t, x: torch.stack([0.3 * x[:, 1], x[:, 0].cos()], 1), noise="scalar"
)


@claim(
    statement="""
        A BlackBox that is given Euler's step and its increments is EulerMaruyama; steps in place
        are steps; simulate_end is the end of simulate.
        """,
    source="definitions",
    wrongs=[
        wrong(
            "the policy acts at the right end's time",
            "ctrl.simulate._left_ends",
            "grid.nodes[:-1]",
            "grid.nodes[1:]",
        ),
        wrong("action lost", BLACK_BOX, "states, action)", "states, 0 * action)"),
        wrong("times exchanged", BLACK_BOX, "function(t0, t1,", "function(t1, t0,"),
        wrong(
            "drift of the next time in place",
            INTO,
            "t = as_like(t0, states)",
            "t = as_like(t1, states)",
        ),
        wrong(
            "in place: h for a number's increment", INTO, "alpha=sigma,", "alpha=float(t1 - t0),"
        ),
        wrong("in place: drift without h", INTO, ", alpha=float(t1 - t0))", ")"),
        wrong(
            "in place: the states for the noise",
            INTO,
            "states, sigma, increment",
            "states, sigma, states",
        ),
        wrong(
            "in place: scalar noise twice",
            INTO,
            "torch.add(states, sde.diffuse(t, states, increment, action), out=after)",
            "torch.add(states, sde.diffuse(t, states, 2 * increment, action), out=after)",
        ),
        wrong(
            "Milstein in place without its term",
            "ctrl.solvers.Milstein.step_into",
            "after.add_(correction)",
            "pass",
        ),
        wrong(
            "the last step left out",
            "ctrl.simulate._last_states",
            "in _left_ends(grid, start):",
            "in list(_left_ends(grid, start))[:-1]:",
        ),
        wrong(
            "memory of the start written to",
            "ctrl.simulate._last_states",
            "(x if k else torch.empty_like(start))",
            "x",
        ),
    ],
)
def solvers_that_are_one(setting: Setting) -> Iterator[Check]:
    """Equal states on the same increments."""
    grid = ctrl.TimeGrid(setting.tensor(NODES))
    policy = ctrl.DeterministicPolicy(lambda t, x: 0.4 * x - 0.2 * t)
    generator = setting.generator("paths")
    many = ctrl.noise.brownian_increments(grid.steps, 5, (2,), generator=generator)
    start = setting.tensor([[0.8, -0.5]]) + many[:, 0]

    def stepped(solver: ctrl.Solver, sde: ctrl.ControlledSDE, increments: Tensor) -> Tensor:
        states = [start]
        for k, (t0, t1) in enumerate(zip(grid.nodes[:-1], grid.nodes[1:], strict=True)):
            action = policy.mean(t0, states[k])
            states.append(solver.step(sde, t0, t1, states[k], action, increments[:, k]))
        return torch.stack(states, dim=1)

    for name, solver, sde in (
        ("Euler-Maruyama", ctrl.EulerMaruyama(), ITO),
        ("Euler-Maruyama, a number as diffusion", ctrl.EulerMaruyama(), PLAIN),
        ("Euler-Maruyama, scalar noise", ctrl.EulerMaruyama(), SCALAR),
        ("Milstein", ctrl.Milstein(), ITO),
    ):
        increments = many[..., 0].contiguous() if sde.noise == "scalar" else many
        problem, noise = ctrl.ControlProblem(sde, NODES[-1]), ctrl.Noise(increments)
        whole = ctrl.simulate(problem, policy, start, grid, solver, noise=noise).states
        yield pathwise(f"{name}: in place and not", whole, stepped(solver, sde, increments))
        kept = start.clone()
        end = ctrl.simulate_end(problem, policy, kept, grid, solver, noise=noise)
        ends = torch.stack([end, kept])
        yield pathwise(f"{name}: the end alone", ends, torch.stack([whole[:, -1], start]))

    nodes = grid.nodes.tolist()

    def box(t0: Tensor, t1: Tensor, x: Tensor, action: Tensor) -> Tensor:
        k = nodes.index(float(t0))
        increment = many[:, k] if k < len(grid.steps) else 0 * x
        return ctrl.EulerMaruyama().step(ITO, t0, t1, x, action, increment)

    problem = ctrl.ControlProblem(ITO, NODES[-1])
    box_states = ctrl.simulate(problem, policy, start, grid, ctrl.BlackBox(box)).states
    yield pathwise(
        "a black box with Euler's step", box_states, stepped(ctrl.EulerMaruyama(), ITO, many)
    )


@claim(
    statement="""
        Adaptive steps of torchsde, the path refined within a step and its increment kept, converge
        on every path: on geometric Brownian motion to start exp((b - s^2 / 2) h + s dW).
        """,
    source="Kloeden & Platen, section 4.4; torchsde 0.2.6",
    why_double="tolerances of the steps are near float32's round-off",
    wrongs=[
        wrong(
            "drift for torchsde + 2 %",
            "ctrl.torchsde_solver._Equation.f",
            "self.sde.drift_at(as_like(t, y), x, self.action)",
            "1.02 * self.sde.drift_at(as_like(t, y), x, self.action)",
        ),
        wrong(
            "diffusion for torchsde + 1 %",
            "ctrl.torchsde_solver._Equation.g",
            "return sigma.reshape_as(y) if",
            "return 1.01 * sigma.reshape_as(y) if",
        ),
        wrong(
            "another path inside the step",
            "ctrl.torchsde_solver._tree",
            "W=increment, ",
            "W=1.1 * increment, ",
        ),
    ],
)
def adaptive_steps(setting: Setting) -> Iterator[Check]:
    """Against the exact solution, which depends on the increment alone."""
    pull, volatility, horizon = -0.7, 0.55, 0.1
    sde = ctrl.ControlledSDE(lambda t, x, a: pull * x, lambda t, x: volatility * x)
    t0, t1 = setting.tensor([0.0, horizon])
    x, w = setting.tensor([[1.3], [0.8]]), setting.tensor([[0.6], [-0.45]])
    solver = ctrl.TorchSDE("srk", adaptive=True, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        after = solver.step(sde, t0, t1, x, 0 * x, w)
    exact = [
        [start * math.exp((pull - volatility**2 / 2) * horizon + volatility * end)]
        for start, end in zip((1.3, 0.8), (0.6, -0.45), strict=True)
    ]
    yield limit("adaptive steps, along two paths", after, exact)
