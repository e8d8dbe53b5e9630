"""Roll-outs: the fused loop against the plain recursion, explicit noise, bad input."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ctrl
from ctrl.noise import antithetic, gauss_hermite

KINDS = ["number", "diagonal", "scalar", "general"]


def model(kind: str) -> ctrl.ControlledSDE:
    def drift(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return -1.3 * x + (0.4 + t) * a

    if kind == "number":
        return ctrl.ControlledSDE(drift, lambda t, x: 0.7)
    if kind == "diagonal":
        return ctrl.ControlledSDE(drift, lambda t, x: 0.3 + 0.1 * x.square() + t)
    if kind == "scalar":
        return ctrl.ControlledSDE(drift, lambda t, x: 0.3 + 0.1 * x, "scalar")
    matrix = torch.tensor([[0.3, 0.1, 0.0], [0.2, -0.5, 0.4]], dtype=torch.float64)
    return ctrl.ControlledSDE(drift, lambda t, x: matrix.expand(len(x), -1, -1), "general", 3)


POLICY = ctrl.DeterministicPolicy(lambda t, x: torch.sin(x) + t)


@given(
    kind=st.sampled_from(KINDS),
    gaps=st.lists(st.floats(0.01, 0.4), min_size=1, max_size=6),
    paths=st.integers(1, 5),
    differentiable=st.booleans(),
)
def test_euler_maruyama_is_its_recursion(kind, gaps, paths, differentiable):
    sde = model(kind)
    g = torch.Generator().manual_seed(0)
    grid = ctrl.TimeGrid(torch.tensor([0.1, *gaps], dtype=torch.float64).cumsum(0))
    start = torch.randn(paths, 2, dtype=torch.float64, generator=g)
    shape = (paths, len(gaps), *sde.noise_shape((2,)))
    noise = ctrl.Noise(torch.randn(shape, dtype=torch.float64, generator=g))
    got = ctrl.simulate(
        ctrl.ControlProblem(sde, 3.0),
        POLICY,
        start,
        grid,
        noise=noise,
        differentiable=differentiable,
    )
    x = start
    for k, h in enumerate(grid.steps.tolist()):
        t, dw = grid.nodes[k], noise.increments[:, k]
        action = torch.sin(x) + t
        sigma = sde.diffusion(t, x)
        if kind == "general":
            kick = (sigma @ dw[:, :, None])[:, :, 0]
        else:
            kick = sigma * (dw[:, None] if kind == "scalar" else dw)
        # a sine of strided numbers may come from another kernel; of another node it is off by h
        again = torch.sin(got.states[:, k]) + t
        torch.testing.assert_close(got.actions[:, k], again, rtol=1e-14, atol=1e-14)
        x = x + h * (-1.3 * x + (0.4 + t) * action) + kick
        torch.testing.assert_close(got.states[:, k + 1], x, rtol=1e-12, atol=1e-12)
    assert got.increments is not None
    assert torch.equal(got.increments, noise.increments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [("states",), ("states", "actions", "increments")])
def test_drawn_increments_are_those_that_moved_the_states(kind, keep, generator):
    sde = model(kind)
    start = torch.randn(4000, 2, dtype=torch.float64, generator=generator)
    grid = ctrl.TimeGrid(torch.tensor([0.0, 0.2, 0.25, 0.9], dtype=torch.float64))
    state = generator.get_state()
    problem = ctrl.ControlProblem(sde, 1.0)
    drawn = ctrl.simulate(problem, POLICY, start, grid, generator=generator, keep=keep)
    generator.set_state(state)
    whole = ctrl.simulate(problem, POLICY, start, grid, generator=generator)
    # what is kept does not change what is drawn: the same numbers up to the order of rounding
    torch.testing.assert_close(drawn.states, whole.states, rtol=1e-12, atol=1e-12)
    assert whole.increments is not None
    replayed = ctrl.simulate(problem, POLICY, start, grid, noise=ctrl.Noise(whole.increments))
    torch.testing.assert_close(replayed.states, whole.states, rtol=1e-12, atol=1e-12)
    # variance h of each increment: 4000 samples or more resolve 15 % at 1e-6 two-sided false alarm
    # (4.9 standard errors of sqrt(2/4000) = 11 %); swapping sqrt(h) for h is 50 % or more off
    variance = whole.increments.square().transpose(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(variance / grid.steps, torch.ones(3).double(), rtol=0, atol=0.15)


def test_gaussian_actions_are_drawn_held_and_kept(generator):
    policy = ctrl.GaussianPolicy(lambda t, x: 0.5 * x, std=lambda t: 0.2 + t)
    grid = ctrl.uniform_grid(1.0, 4)
    start = torch.randn(6, 2, dtype=torch.float64, generator=generator)
    drawn = torch.randn(6, 4, 2, dtype=torch.float64, generator=generator)
    noise = ctrl.Noise(torch.zeros_like(drawn), drawn)
    paths = ctrl.simulate(
        ctrl.ControlProblem(model("number"), 1.0), policy, start, grid, noise=noise
    )
    for k in range(4):
        expected = 0.5 * paths.states[:, k] + (0.2 + grid.nodes[k]) * drawn[:, k]
        torch.testing.assert_close(paths.actions[:, k], expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="actions"):
        ctrl.simulate(
            ctrl.ControlProblem(model("number"), 1.0),
            policy,
            start,
            grid,
            noise=ctrl.Noise(torch.zeros_like(drawn)),
        )


def test_gradients_flow_through_the_path(generator):
    gain = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    policy = ctrl.DeterministicPolicy(lambda t, x: gain * x)
    start = torch.full((1, 1), 0.8, dtype=torch.float64)
    grid = ctrl.uniform_grid(1.0, 8)
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.0)
    noise = ctrl.Noise(torch.zeros(1, 8, 1, dtype=torch.float64))
    paths = ctrl.simulate(
        ctrl.ControlProblem(sde, 1.0), policy, start, grid, noise=noise, differentiable=True
    )
    paths.states[0, -1, 0].backward()
    exact = 0.8 * 8 * (1 + 0.4 / 8) ** 7 / 8  # d/dgain of start (1 + gain h)^8
    assert gain.grad is not None
    assert gain.grad.item() == pytest.approx(exact, rel=1e-12)
    plain = ctrl.simulate(ctrl.ControlProblem(sde, 1.0), policy, start, grid, noise=noise)
    assert not plain.states.requires_grad


def test_quadrature_gives_the_chains_exact_moments():
    sde = ctrl.ControlledSDE(lambda t, x, a: -1.3 * x, lambda t, x: 0.2 + 0.5 * x)
    grid = ctrl.TimeGrid(torch.tensor([0.0, 0.2, 0.5, 0.6], dtype=torch.float64))
    noise = gauss_hermite(grid.steps, nodes=4)
    start = torch.full((len(noise.increments), 1), 0.9, dtype=torch.float64)
    policy = ctrl.DeterministicPolicy(lambda t, x: x)
    paths = ctrl.simulate(ctrl.ControlProblem(sde, 1.0), policy, start, grid, noise=noise)
    mean, second = 0.9, 0.81
    for h in grid.steps.tolist():
        variance = h * (0.04 + 0.2 * mean + 0.25 * second)
        mean, second = (1 - 1.3 * h) * mean, (1 - 1.3 * h) ** 2 * second + variance
    last, weights = paths.states[:, -1, 0], paths.weights
    assert weights is not None
    assert (weights * last).sum().item() == pytest.approx(mean, rel=1e-12)
    assert (weights * last.square()).sum().item() == pytest.approx(second, rel=1e-12)


def test_antithetic_paths_mirror_each_other(generator):
    increments = torch.randn(3, 5, 2, dtype=torch.float64, generator=generator)
    pairs = antithetic(ctrl.Noise(increments))
    sde = ctrl.ControlledSDE(lambda t, x, a: -x, lambda t, x: 0.5)
    policy = ctrl.DeterministicPolicy(lambda t, x: x)
    start = torch.zeros(6, 2, dtype=torch.float64)
    paths = ctrl.simulate(
        ctrl.ControlProblem(sde, 1.0), policy, start, ctrl.uniform_grid(1.0, 5), noise=pairs
    )
    torch.testing.assert_close(paths.states[0::2], -paths.states[1::2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("random", [False, True])
def test_gradients_flow_through_drawn_noise_too(kind, random):
    """The same generator draws the same path with a graph; its gradient is that of differences."""
    grid = ctrl.TimeGrid(torch.tensor([0.0, 0.2, 0.25, 0.9], dtype=torch.float64))
    start = torch.tensor([[0.4, -0.7], [1.1, 0.3]], dtype=torch.float64)

    def end(gain: Tensor, differentiable: bool) -> Tensor:
        def mean(t: Tensor, x: Tensor) -> Tensor:
            return gain * torch.sin(x)

        policy = ctrl.GaussianPolicy(mean, 0.3) if random else ctrl.DeterministicPolicy(mean)
        paths = ctrl.simulate(
            ctrl.ControlProblem(model(kind), 1.0),
            policy,
            start,
            grid,
            generator=torch.Generator().manual_seed(3),
            differentiable=differentiable,
        )
        assert paths.actions is not None
        return (paths.states.square().sum() + paths.actions.sum()).double()

    gain = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    end(gain, differentiable=True).backward()
    step = 1e-4  # central differences: error of order step^2 = 1e-8, round-off of 1e-12
    difference = (end(gain + step, False) - end(gain - step, False)) / (2 * step)
    torch.testing.assert_close(gain.grad, difference.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [("states",), ("states", "actions", "increments")])
def test_brownian_increments_are_what_simulate_draws(kind, keep):
    sde, problem = model(kind), ctrl.ControlProblem(model(kind), 1.0)
    grid = ctrl.uniform_grid(1.0, 3)
    start = torch.full((7, 2), 0.4, dtype=torch.float64)
    drawn = ctrl.simulate(
        problem, POLICY, start, grid, generator=torch.Generator().manual_seed(5), keep=keep
    )
    increments = ctrl.noise.brownian_increments(
        grid.steps, 7, sde.noise_shape((2,)), generator=torch.Generator().manual_seed(5)
    )
    replayed = ctrl.simulate(problem, POLICY, start, grid, noise=ctrl.Noise(increments), keep=keep)
    torch.testing.assert_close(drawn.states, replayed.states, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("event", [(), (1,), (4, 8, 8)], ids=str)
@pytest.mark.parametrize("noise", ["diagonal", "scalar"])
@pytest.mark.parametrize("differentiable", [False, True])
def test_events_of_any_shape_are_simulated_coordinate_by_coordinate(event, noise, differentiable):
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.2 + 0.1 * x, noise)
    g = torch.Generator().manual_seed(0)
    start = torch.randn(3, *event, generator=g)
    increments = 0.5 * torch.randn(3, 5, *sde.noise_shape(event), generator=g)
    grid = ctrl.uniform_grid(1.25, 5)

    def roll_out(start: Tensor, increments: Tensor) -> ctrl.Paths:
        return ctrl.simulate(
            ctrl.ControlProblem(sde, 1.25),
            POLICY,
            start,
            grid,
            noise=ctrl.Noise(increments),
            differentiable=differentiable,
        )

    paths = roll_out(start, increments)
    assert paths.states.shape == (3, 6, *event)
    flat = roll_out(
        start.reshape(3, -1), increments.reshape(3, 5, -1) if noise == "diagonal" else increments
    )
    torch.testing.assert_close(paths.states.reshape(3, 6, -1), flat.states)
    assert paths.actions is not None
    assert flat.actions is not None
    torch.testing.assert_close(paths.actions.reshape(3, 5, -1), flat.actions)


def test_any_object_with_a_step_is_a_solver(generator):
    class Heun:
        """Deterministic, of second order: it must see both of the step's ends."""

        def step(self, sde, t0, t1, states, action, increment):
            first = sde.drift(t0, states, action)
            second = sde.drift(t1, states + (t1 - t0) * first, action)
            return states + 0.5 * (t1 - t0) * (first + second)

    sde = ctrl.ControlledSDE(lambda t, x, a: t * x, lambda t, x: 0.0)
    start = torch.tensor([[0.7]], dtype=torch.float64)
    errors = []
    for steps in (50, 100):
        paths = ctrl.simulate(
            ctrl.ControlProblem(sde, 1.0),
            POLICY,
            start,
            ctrl.uniform_grid(1.0, steps),
            Heun(),
            generator=generator,
        )
        errors.append(paths.states[0, -1, 0].item() - 0.7 * math.exp(0.5))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)  # second order, O(h) corrections


PROBLEM = ctrl.ControlProblem(ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.5), 1.0)
START, GRID = torch.ones(2, 3), ctrl.uniform_grid(1.0, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"generator": None}, ValueError, "exactly one"),
        ({"noise": ctrl.Noise(torch.zeros(2, 4, 3))}, ValueError, "exactly one"),
        ({"generator": None, "noise": ctrl.Noise(torch.zeros(2, 5, 3))}, ValueError, "increments"),
        ({"generator": None, "noise": ctrl.Noise(torch.zeros(1, 4, 3))}, ValueError, "increments"),
        (
            {"generator": None, "noise": ctrl.Noise(torch.zeros(2, 4, 3).double())},
            ValueError,
            "float32",
        ),
        ({"keep": ("stats",)}, ValueError, "keep"),
        ({"keep": "states"}, ValueError, "keep"),
        ({"grid": ctrl.uniform_grid(1.5, 4)}, ValueError, "horizon"),
        ({"grid": [0.0, 1.0]}, TypeError, "grid"),
        ({"policy": lambda t, x: x}, TypeError, "policy"),
        ({"solver": ctrl.EulerMaruyama}, TypeError, "solver"),
        ({"solver": "euler"}, TypeError, "solver"),
        ({"problem": None}, TypeError, "problem"),
        ({"start": [[1.0]]}, TypeError, "start"),
        ({"policy": ctrl.DeterministicPolicy(lambda t, x: 0.0)}, TypeError, "mean"),
        ({"policy": ctrl.DeterministicPolicy(lambda t, x: x[0])}, ValueError, "mean"),
        ({"policy": ctrl.DeterministicPolicy(lambda t, x: x[:, :1])}, ValueError, "drift"),
        ({"policy": ctrl.DeterministicPolicy(lambda t, x: x.double())}, ValueError, "drift"),
        ({"start": torch.ones(2, 3).long()}, TypeError, "start"),
        ({"start": torch.ones(0, 3)}, ValueError, "start"),
        ({"start": torch.full((2, 3), math.nan)}, ValueError, "start must be finite"),
        ({"policy": ctrl.DeterministicPolicy(lambda t, x: x * math.inf)}, ValueError, "node 1"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {
        "problem": PROBLEM,
        "policy": ctrl.DeterministicPolicy(lambda t, x: x),
        "start": START,
        "grid": GRID,
        "generator": torch.Generator().manual_seed(0),
    }
    with pytest.raises(error, match=message):
        ctrl.simulate(**arguments | change)


def test_actions_that_are_not_finite_are_refused_though_no_state_shows_them():
    problem = ctrl.ControlProblem(ctrl.ControlledSDE(lambda t, x, a: -x, lambda t, x: 0.5), 1.0)
    policy = ctrl.DeterministicPolicy(lambda t, x: x / (t - 0.5))
    with pytest.raises(ValueError, match=r"actions are not finite from node 2 \(t = 0\.5\)"):
        ctrl.simulate(problem, policy, START, GRID, generator=torch.Generator())


def test_large_finite_states_are_not_taken_for_infinite_ones():
    sde = ctrl.ControlledSDE(lambda t, x, a: 0 * x, lambda t, x: 0.0)
    start = torch.full((2, 3), 3e38)  # their sum overflows
    paths = ctrl.simulate(
        ctrl.ControlProblem(sde, 1.0), POLICY, start, GRID, generator=torch.Generator()
    )
    assert torch.equal(paths.states[:, -1], start)


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:, :1], lambda x: x.double(), lambda x: x[:1]],
    ids=["dim", "type", "row"],
)
@pytest.mark.parametrize("differentiable", [False, True])
def test_solvers_that_return_other_states_are_refused(change, differentiable):
    class Careless:
        def step(self, sde, t0, t1, states, action, increment):
            return change(states)

    with pytest.raises(ValueError, match=r"solver\.step must return"):
        ctrl.simulate(
            PROBLEM,
            POLICY,
            START,
            GRID,
            Careless(),
            generator=torch.Generator(),
            differentiable=differentiable,
        )


@pytest.mark.gpu
def test_paths_on_cuda_are_those_on_the_cpu(generator):
    start = torch.randn(5, 4, 8, 8, generator=generator)
    increments = 0.5 * torch.randn(5, 4, 4, 8, 8, generator=generator)
    here = ctrl.simulate(PROBLEM, POLICY, start, GRID, noise=ctrl.Noise(increments))
    there = ctrl.simulate(PROBLEM, POLICY, start.cuda(), GRID, noise=ctrl.Noise(increments.cuda()))
    torch.testing.assert_close(there.states.cpu(), here.states)
    with pytest.raises(ValueError, match="generator"):
        ctrl.simulate(PROBLEM, POLICY, start.cuda(), GRID, generator=torch.Generator())


# --- other solvers, black boxes, memory that is used again


def geometric(calculus="ito", diffusion=None):
    return ctrl.ControlledSDE(
        lambda t, x, a: 0.3 * x + a, diffusion or (lambda t, x: 0.5 * x), calculus=calculus
    )


HOLD = ctrl.DeterministicPolicy(lambda t, x: -0.1 * x)


@pytest.mark.parametrize("solver", [ctrl.EulerMaruyama(), ctrl.Milstein(), ctrl.Heun()])
@pytest.mark.parametrize("keep", [("states",), ("states", "increments")])
def test_in_place_and_with_a_graph_are_the_same_numbers(solver, keep):
    calculus = "stratonovich" if isinstance(solver, ctrl.Heun) else "ito"
    problem = ctrl.ControlProblem(geometric(calculus), 1.0)
    start = torch.linspace(0.5, 2, 6, dtype=torch.float64).view(3, 2)
    grid = ctrl.uniform_grid(1.0, 5)
    one, other = (
        ctrl.simulate(
            problem, HOLD, start, grid, solver, keep=keep, differentiable=graph,
            generator=torch.Generator().manual_seed(7),
        )
        for graph in (False, True)
    )  # fmt: skip
    torch.testing.assert_close(one.states, other.states, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("noise", ["diagonal", "scalar", "general"])
def test_milstein_adds_half_sigma_dsigma_of_the_excess(noise):
    x = torch.tensor([[0.5], [1.4]], dtype=torch.float64)
    dw = torch.tensor([[0.3], [-0.2]], dtype=torch.float64)
    diffusion, motions = (lambda t, x: 0.5 * x), None
    if noise == "general":
        diffusion, motions = (lambda t, x: (0.5 * x).unsqueeze(-1)), 1
    sde = ctrl.ControlledSDE(lambda t, x, a: 0.3 * x, diffusion, noise, motions)
    increment = dw[:, 0] if noise == "scalar" else dw
    t0, t1 = (torch.tensor(v, dtype=torch.float64) for v in (0.2, 0.3))
    after = ctrl.Milstein().step(sde, t0, t1, x, x, increment)
    h = float(t1 - t0)
    by_hand = x + 0.3 * x * h + 0.5 * x * dw + 0.5 * 0.5 * 0.5 * x * (dw.square() - h)
    torch.testing.assert_close(after, by_hand, rtol=1e-14, atol=0)


def test_heun_averages_both_ends():
    sde = ctrl.ControlledSDE(
        lambda t, x, a: t * x + a, lambda t, x: x.square(), calculus="stratonovich"
    )
    x, a = torch.tensor([[0.5]]).double(), torch.tensor([[0.7]]).double()
    dw, h = torch.tensor([[0.3]]).double(), 0.1
    t0 = torch.tensor(0.2, dtype=torch.float64)
    t1 = t0 + h
    there = x + (t0 * x + a) * h + x**2 * dw
    by_hand = x + 0.5 * ((t0 * x + a) + (t1 * there + a)) * h + 0.5 * (x**2 + there**2) * dw
    after = ctrl.Heun().step(sde, t0, t1, x, a, dw)
    torch.testing.assert_close(after, by_hand, rtol=1e-14, atol=0)


def test_a_solver_refuses_the_other_calculus_and_noise_it_cannot_take():
    problem = ctrl.ControlProblem(geometric(), 1.0)
    start, grid = torch.ones(2, 2).double(), ctrl.uniform_grid(1.0, 2)
    g = torch.Generator()
    with pytest.raises(ValueError, match="to_stratonovich"):
        ctrl.simulate(problem, HOLD, start, grid, ctrl.Heun(), generator=g)
    other = ctrl.ControlProblem(geometric("stratonovich"), 1.0)
    for solver in (ctrl.EulerMaruyama(), ctrl.Milstein()):
        with pytest.raises(ValueError, match="to_ito"):
            ctrl.simulate(other, HOLD, start, grid, solver, generator=g)
    mixing = ctrl.ControlledSDE(
        lambda t, x, a: a, lambda t, x: torch.ones(len(x), 2, 2).double(), "general", 2
    )
    with pytest.raises(ValueError, match="Levy"):
        ctrl.simulate(
            ctrl.ControlProblem(mixing, 1.0), HOLD, start, grid, ctrl.Milstein(), generator=g
        )


def test_a_black_box_has_states_and_actions_and_shows_no_noise():
    calls = []

    def simulator(t0, t1, states, action):
        calls.append((float(t0), float(t1)))
        return states + (t1 - t0) * action

    problem = ctrl.ControlProblem(geometric(), 1.0)
    start, grid = torch.ones(3, 2, dtype=torch.float64), ctrl.uniform_grid(1.0, 4)
    paths = ctrl.simulate(problem, HOLD, start, grid, ctrl.BlackBox(simulator))
    assert paths.increments is None
    assert calls == [(0.25 * k, 0.25 * (k + 1)) for k in range(4)]
    torch.testing.assert_close(paths.states[:, -1], start * (1 - 0.025) ** 4)
    random = ctrl.GaussianPolicy(HOLD.mean, 0.3)
    with pytest.raises(ValueError, match="generator"):
        ctrl.simulate(problem, random, start, grid, ctrl.BlackBox(simulator))
    drawn = ctrl.simulate(
        problem, random, start, grid, ctrl.BlackBox(simulator),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert drawn.actions.std() > 0.1
    noise = ctrl.Noise(torch.zeros(3, 4, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="noise"):
        ctrl.simulate(problem, HOLD, start, grid, ctrl.BlackBox(simulator), noise=noise)
    with pytest.raises((TypeError, ValueError)):
        ctrl.BlackBox(3)
    short = ctrl.BlackBox(lambda t0, t1, states, action: states[:1])
    with pytest.raises(ValueError, match=r"solver\.step"):
        ctrl.simulate(problem, HOLD, start, grid, short)


def test_memory_of_earlier_paths_is_used_again_and_gives_the_same_numbers():
    problem = ctrl.ControlProblem(geometric(), 1.0)
    start, grid = torch.ones(4, 3), ctrl.uniform_grid(1.0, 6)
    fresh = ctrl.simulate(problem, HOLD, start, grid, generator=torch.Generator().manual_seed(2))
    expected = [part.clone() for part in (fresh.states, fresh.actions, fresh.increments)]
    old = ctrl.simulate(problem, HOLD, start, grid, generator=torch.Generator().manual_seed(9))
    again = ctrl.simulate(
        problem, HOLD, start, grid, generator=torch.Generator().manual_seed(2), out=old
    )
    for one, other, kept in zip(
        (again.states, again.actions, again.increments),
        expected,
        (old.states, old.actions, old.increments),
        strict=True,
    ):
        assert torch.equal(one, other)
        assert one.data_ptr() == kept.data_ptr()
    with pytest.raises(ValueError, match=r"out\.states"):
        ctrl.simulate(problem, HOLD, start[:2], grid, generator=torch.Generator(), out=old)
    with pytest.raises(ValueError, match="out"):
        ctrl.simulate(
            problem, HOLD, start, grid, generator=torch.Generator(), out=old, differentiable=True
        )


def test_each_path_may_have_its_own_parameters():
    """A batch of problems is a closure over rows."""
    rates = torch.tensor([[0.1], [0.5], [-0.3]], dtype=torch.float64)
    sde = ctrl.ControlledSDE(lambda t, x, a: rates * x, lambda t, x: 0.0)
    paths = ctrl.simulate(
        ctrl.ControlProblem(sde, 1.0), HOLD, torch.ones(3, 1).double(), ctrl.uniform_grid(1.0, 8),
        generator=torch.Generator(),
    )  # fmt: skip
    torch.testing.assert_close(paths.states[:, -1], (1 + rates / 8) ** 8)


def test_compiled_steps_and_losses_are_the_same_numbers():
    """In a process of its own: shape checks at run time, as in tests, cannot be compiled."""
    code = """
import torch, ctrl
x, dw = torch.rand(4, 2).double(), torch.rand(4, 2).double()
t0, t1 = (torch.tensor(v, dtype=torch.float64) for v in (0.0, 0.1))
for solver in (ctrl.EulerMaruyama(), ctrl.Milstein(), ctrl.Heun()):
    calculus = "stratonovich" if isinstance(solver, ctrl.Heun) else "ito"
    sde = ctrl.ControlledSDE(
        lambda t, x, a: 0.3 * x + a, lambda t, x: 0.5 * x, calculus=calculus
    )
    compiled = torch.compile(solver.step, backend="aot_eager")
    torch.testing.assert_close(compiled(sde, t0, t1, x, x, dw), solver.step(sde, t0, t1, x, x, dw))
surrogate = torch.compile(
    ctrl.policy_gradient.clipped_surrogate, backend="aot_eager", fullgraph=True
)
rows = torch.linspace(-1, 1, 5)
half = torch.full((5,), 0.2)
expected = ctrl.policy_gradient.clipped_surrogate(rows, rows, half)
torch.testing.assert_close(surrogate(rows, rows, half), expected)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("solver", [ctrl.EulerMaruyama(), ctrl.Milstein(), ctrl.Heun()])
def test_the_end_alone_is_the_end_of_the_whole(solver, graph):
    calculus = "stratonovich" if isinstance(solver, ctrl.Heun) else "ito"
    problem = ctrl.ControlProblem(geometric(calculus), 1.0)
    start, grid = torch.linspace(0.5, 2, 6).view(3, 2), ctrl.uniform_grid(1.0, 5)
    before = start.clone()
    whole = ctrl.simulate(
        problem, HOLD, start, grid, solver, generator=torch.Generator().manual_seed(3)
    )
    end = ctrl.simulate_end(
        problem, HOLD, start, grid, solver,
        generator=torch.Generator().manual_seed(3), differentiable=graph,
    )  # fmt: skip
    torch.testing.assert_close(end, whole.states[:, -1], rtol=1e-6, atol=1e-6)  # float32
    assert torch.equal(start, before)


def test_an_end_that_is_not_finite_is_refused():
    problem = ctrl.ControlProblem(geometric(diffusion=lambda t, x: x**9), 1.0)
    start, grid = torch.full((2, 1), 1e9), ctrl.uniform_grid(1.0, 9)
    with pytest.raises(ValueError, match="finite"):
        ctrl.simulate_end(problem, HOLD, start, grid, generator=torch.Generator())
