"""Euler-Maruyama: its transition is its step; it converges at its order."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctrl
from ctrl.solvers import require_transition

EULER = ctrl.EulerMaruyama()


class Blind:
    """A black box: moves the states, and has no density."""

    def step(self, sde, t0, t1, states, action, increment):
        return states


@given(
    seed=st.integers(0, 2**32 - 1),
    before=st.floats(-2.0, 2.0),
    h=st.floats(1e-3, 1.0),
    event=st.sampled_from([(), (3,), (2, 2)]),
    constant=st.booleans(),
)
def test_a_step_is_its_transition_driven_by_noise(seed, before, h, event, constant):
    g = torch.Generator().manual_seed(seed)
    sde = ctrl.ControlledSDE(
        lambda t, x, a: t * x + a, lambda t, x: 0.7 if constant else 0.2 + x.square() + t.abs()
    )
    nodes = torch.tensor([before, before + h], dtype=torch.float64)
    x, a, z = torch.randn(3, 4, *event, dtype=torch.float64, generator=g)
    width = nodes.diff().sqrt()
    mean, std = EULER.transition(sde, nodes[0], nodes[1], x, a)
    stepped = EULER.step(sde, nodes[0], nodes[1], x, a, width * z)
    torch.testing.assert_close(stepped, mean + std * z, rtol=1e-12, atol=1e-12)


def test_strong_order_is_one_half_for_multiplicative_noise(generator):
    """Geometric Brownian motion, whose solution is known on every path."""
    pull, noise, fine = 0.4, 0.9, 1024
    sde = ctrl.ControlledSDE(lambda t, x, a: pull * x, lambda t, x: noise * x)
    idle = ctrl.DeterministicPolicy(lambda t, x: x)
    grid = ctrl.uniform_grid(1.0, fine)
    w = ctrl.noise.brownian_increments(grid.steps, 4000, (), generator=generator)
    exact = torch.exp(pull - noise**2 / 2 + noise * w.sum(1))

    def error(steps: int) -> float:
        coarse = ctrl.Noise(w.unflatten(1, (steps, -1)).sum(2))
        start = torch.ones(4000, dtype=torch.float64)
        problem = ctrl.ControlProblem(sde, 1.0)
        grid = ctrl.uniform_grid(1.0, steps)
        paths = ctrl.simulate(problem, idle, start, grid, noise=coarse, keep=("states",))
        return (paths.states[:, -1] - exact).square().mean().sqrt().item()

    order = math.log2(error(64) / error(1024)) / 4
    # Over 20 seeds the order had a standard deviation of 0.018: 0.1 is 5.5 of them. Increments
    # without their square root would give order 0, additive noise order 1.
    assert order == pytest.approx(0.5, abs=0.1)


def test_solvers_are_told_apart_by_their_density():
    assert require_transition(EULER) is EULER
    assert isinstance(EULER, ctrl.TransitionSolver)
    assert isinstance(Blind(), ctrl.Solver)
    assert not isinstance(Blind(), ctrl.TransitionSolver)
    with pytest.raises(TypeError, match="Blind has no transition density"):
        require_transition(Blind())


@pytest.mark.parametrize("kind", ["scalar", "general"])
def test_dependent_coordinates_have_no_diagonal_transition(kind):
    sde = ctrl.ControlledSDE(
        lambda t, x, a: a,
        lambda t, x: x if kind == "scalar" else x[:, :, None],
        kind,
        1 if kind == "general" else None,
    )
    x, t = torch.ones(3, 2), torch.tensor([0.0, 0.1])
    with pytest.raises(ValueError, match="diagonal"):
        EULER.transition(sde, t[0], t[1], x, x)


# --- every solver against the sum it stands for, where everything moves with time and action


def moving(noise, controlled):
    """b = (1 + t) a - x; sigma = 0.3 + t + 0.2 x (+ 0.1 a), and its derivative in x is 0.2."""

    def sigma(t, x, *action):
        size = 0.3 + t + 0.2 * x + (0.1 * action[0] if action else 0)
        return size[:, :, None] if noise == "general" else size

    diffusion = sigma if controlled else lambda t, x: sigma(t, x)
    return ctrl.ControlledSDE(
        lambda t, x, a: (1 + t) * a - x, diffusion, noise, 1 if noise == "general" else None,
        controls_diffusion=controlled,
    )  # fmt: skip


T0, T1 = torch.tensor([0.4, 0.65], dtype=torch.float64)
X, A, W = (
    torch.tensor(rows, dtype=torch.float64)
    for rows in ([[0.7], [-1.2]], [[0.4], [0.9]], [[0.3], [-0.5]])
)


@pytest.mark.parametrize("controlled", [False, True])
@pytest.mark.parametrize("noise", ["diagonal", "scalar", "general"])
@pytest.mark.parametrize("solver", [EULER, ctrl.Milstein()], ids=["euler", "milstein"])
def test_a_step_is_its_formula_at_the_left_end(solver, noise, controlled):
    sde, h = moving(noise, controlled), 0.25
    sigma = 0.7 + 0.2 * X + 0.1 * A * controlled
    expected = X + h * (1.4 * A - X) + sigma * W
    if solver != EULER:
        expected = expected + 0.5 * sigma * 0.2 * (W.square() - h)
    increment = W[:, 0] if noise == "scalar" else W
    close = {"rtol": 1e-14, "atol": 1e-14}
    torch.testing.assert_close(solver.step(sde, T0, T1, X, A, increment), expected, **close)
    after = torch.empty_like(X)
    solver.step_into(after, sde, T0, T1, X, A, increment)
    torch.testing.assert_close(after, expected, **close)
    if noise == "diagonal" and solver == EULER:
        mean, std = solver.transition(sde, T0, T1, X, A)
        torch.testing.assert_close(mean + std * W / 0.5, expected, **close)
        with torch.no_grad():  # in the increment's own memory
            own = W.clone()
            solver.step_into(own, sde, T0, T1, X, A, own)
        torch.testing.assert_close(own, expected, **close)


@pytest.mark.parametrize("controlled", [False, True])
def test_heuns_step_is_its_formula(controlled):
    sde, h = moving("diagonal", controlled), 0.25
    stratonovich = ctrl.ControlledSDE(
        sde.drift, sde.diffusion, calculus="stratonovich", controls_diffusion=controlled
    )

    def rates(t, x):
        return (1 + t) * A - x, 0.3 + t + 0.2 * x + 0.1 * A * controlled

    b, s = rates(0.4, X)
    there = X + h * b + s * W
    b_end, s_end = rates(0.65, there)
    expected = X + 0.5 * h * (b + b_end) + 0.5 * (s + s_end) * W
    after = ctrl.Heun().step(stratonovich, T0, T1, X, A, W)
    torch.testing.assert_close(after, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("solver", [EULER, ctrl.Milstein(), ctrl.Heun()], ids=repr)
def test_steps_keep_the_precision_of_the_states(solver):
    """The grid's times are in double precision, whatever the states are in."""
    sde = moving("diagonal", False)
    if isinstance(solver, ctrl.Heun):
        sde = ctrl.ControlledSDE(sde.drift, sde.diffusion, calculus="stratonovich")
    x, a, w = X.float(), A.float(), W.float()
    assert solver.step(sde, T0, T1, x, a, w).dtype == torch.float32
    if solver == EULER:
        assert solver.transition(sde, T0, T1, x, a)[1].dtype == torch.float32
    if not isinstance(solver, ctrl.Heun):
        after = torch.empty_like(x)
        solver.step_into(after, sde, T0, T1, x, a, w)
        torch.testing.assert_close(
            after.double(), solver.step(sde, T0, T1, X, A, W).float().double()
        )


def test_coefficients_are_given_the_time_in_the_states_precision():
    seen = []

    def drift(t, x, a):
        seen.append(t.dtype)
        return a - x

    def diffusion(t, x):
        seen.append(t.dtype)
        return 0.3 + 0.2 * x

    ito = ctrl.ControlledSDE(drift, diffusion)
    stratonovich = ctrl.ControlledSDE(drift, diffusion, calculus="stratonovich")
    x, a, w = X.float(), A.float(), W.float()
    for solver in (EULER, ctrl.Milstein()):
        solver.step(ito, T0, T1, x, a, w)
        solver.step_into(torch.empty_like(x), ito, T0, T1, x, a, w)
    EULER.transition(ito, T0, T1, x, a)
    ctrl.Heun().step(stratonovich, T0, T1, x, a, w)
    assert set(seen) == {torch.float32}


# --- stiff and superlinear drifts -----------------------------------------------------------------

CUBIC = ctrl.ControlledSDE(lambda t, x, a: -(x**3), lambda t, x: 0.5)


@pytest.mark.parametrize("solver", [ctrl.DriftImplicitEuler(), ctrl.TamedEuler()])
def test_superlinear_drifts_stay_finite_where_euler_explodes(solver, generator):
    start = torch.full((8, 1), 30.0, dtype=torch.float64)
    problem, still = ctrl.ControlProblem(CUBIC, 4.0), ctrl.DeterministicPolicy(lambda t, x: 0 * x)
    grid, noise = (
        ctrl.uniform_grid(4.0, 40),
        ctrl.noise.brownian_increments(
            torch.full((40,), 0.1, dtype=torch.float64), 8, generator=generator
        ),
    )
    with pytest.raises(ValueError, match="not finite"):
        ctrl.simulate(problem, still, start, grid, noise=ctrl.Noise(noise))
    paths = ctrl.simulate(problem, still, start, grid, solver, noise=ctrl.Noise(noise))
    # tamed, a step goes down by less than 1; noise of 8 paths is below 5 standard deviations
    assert float(paths.states[:, -1].abs().max()) < 3


@pytest.mark.parametrize("solver", [ctrl.DriftImplicitEuler(), ctrl.TamedEuler()])
def test_strong_order_one_half_of_noise_in_proportion_to_the_state(solver):
    """Local, from exact expectations on 2, 4 and 8 coupled steps of a short time."""
    sde = ctrl.ControlledSDE(lambda t, x, a: x - x**3, lambda t, x: x)
    fine = torch.linspace(0, 0.01, 9, dtype=torch.float64)
    noise = ctrl.noise.gauss_hermite(fine.diff(), nodes=3)
    start = torch.full((len(noise.increments), 1), 0.9, dtype=torch.float64)
    still, ends = ctrl.DeterministicPolicy(lambda t, x: 0 * x), []
    for every in (4, 2, 1):
        dw = ctrl.noise.coarsen(noise.increments, fine, fine[::every])
        grid, problem = ctrl.TimeGrid(fine[::every]), ctrl.ControlProblem(sde, 1.0)
        end = ctrl.simulate_end(problem, still, start, grid, solver, noise=ctrl.Noise(dw))
        ends.append(end[:, 0])
    first, second = ((noise.weights @ (a - b).square()).sqrt() for a, b in itertools.pairwise(ends))
    # of Milstein's scheme it is 1; what is left is O(time) = 0.01 of its square root
    assert float((first / second).log2()) == pytest.approx(0.5, abs=0.05)


def test_gradients_go_through_an_implicit_step():
    solver, t0, t1 = ctrl.DriftImplicitEuler(), torch.tensor(0.0), torch.tensor(0.3)
    x = torch.tensor([[1.3, -0.4]], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([[0.2, 0.5]], dtype=torch.float64, requires_grad=True)
    pull = torch.tensor([[-3.0, 1.0], [2.0, -5.0]], dtype=torch.float64)
    sde = ctrl.ControlledSDE(lambda t, x, a: x @ pull.T - x**3 + a, lambda t, x: 0.5)

    def step(x, a):
        return solver.step(sde, t0, t1, x, a, torch.zeros_like(x))

    assert torch.autograd.gradcheck(step, (x, a))


def test_newtons_method_says_where_it_does_not_converge():
    rough = ctrl.ControlledSDE(lambda t, x, a: 60 * (x**2 + 1), lambda t, x: 0.5)  # no solution
    x = torch.ones(3, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="has not converged in 50 iterations at t = 0"):
        ctrl.DriftImplicitEuler().step(rough, torch.tensor(0.0), torch.tensor(0.5), x, 0 * x, 0 * x)
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        ctrl.DriftImplicitEuler(0)


def test_an_implicit_step_has_no_gaussian_transition_and_a_tamed_one_has():
    with pytest.raises(TypeError, match="DriftImplicitEuler has no transition density"):
        require_transition(ctrl.DriftImplicitEuler())
    assert require_transition(ctrl.TamedEuler())
