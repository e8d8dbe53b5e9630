"""The adapter against our own solvers on the same noise, and what it refuses."""

import math
import subprocess
import sys
import warnings

import pytest
import torch

import ctrl

HOLD = ctrl.DeterministicPolicy(lambda t, x: -0.1 * x)
GRID = ctrl.TimeGrid(torch.tensor([0.0, 0.3, 0.5, 1.1], dtype=torch.float64))


def geometric(calculus="ito", noise="diagonal", motions=None, controlled=False):
    def sigma(t, x, *a):
        value = 0.2 + 0.5 * x + (0.3 * a[0] if a else 0.0)
        if noise != "general":
            return value
        return torch.stack([value, 0.4 * x.flip(1)], dim=2)

    def diffusion(t, x, a):
        return sigma(t, x, a)

    return ctrl.ControlledSDE(
        lambda t, x, a: 0.3 * x + t + a,
        diffusion if controlled else sigma,
        noise,
        motions,
        calculus,
        controls_diffusion=controlled,
    )


def states(sde, solver, start=None, seed=3, **settings):
    problem = ctrl.ControlProblem(sde, 2.0)
    if start is None:
        start = torch.linspace(0.3, 1.5, 8, dtype=torch.float64).view(4, 2)
    return ctrl.simulate(
        problem, HOLD, start, GRID, solver,
        generator=torch.Generator().manual_seed(seed), **settings,
    ).states  # fmt: skip


@pytest.mark.parametrize("noise", ["diagonal", "scalar", "general"])
@pytest.mark.parametrize("controlled", [False, True])
@pytest.mark.parametrize(
    ("method", "ours"),
    [("euler", ctrl.EulerMaruyama()), ("milstein", ctrl.Milstein()), ("heun", ctrl.Heun())],
)
def test_one_step_methods_are_our_own_to_round_off(method, ours, noise, controlled):
    motions = 2 if noise == "general" else None
    calculus = "stratonovich" if method == "heun" else "ito"
    sde = geometric(calculus, noise, motions, controlled)
    if method == "milstein" and noise == "general":
        with pytest.raises(ValueError, match="general noise"):
            states(sde, ctrl.TorchSDE(method))
        return
    torch.testing.assert_close(
        states(sde, ctrl.TorchSDE(method)), states(sde, ours), rtol=1e-12, atol=1e-13
    )


def test_images_are_flattened_and_given_back():
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.5)
    start = torch.rand(3, 1, 4, 4)
    one, other = states(sde, ctrl.TorchSDE("euler"), start), states(sde, None, start)
    torch.testing.assert_close(one, other)
    assert one.dtype == torch.float32


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "srk"},
        {"method": "srk", "dt": 0.03},
        {"method": "milstein", "adaptive": True},
        {"method": "srk", "adaptive": True},
    ],
)
def test_a_step_is_a_function_of_its_arguments(settings):
    """Interior randomness too: the same noise gives the same states, whatever came before."""
    sde, solver = geometric(), ctrl.TorchSDE(**settings)
    first = states(sde, solver)
    states(sde, solver, seed=9)
    assert torch.equal(states(sde, ctrl.TorchSDE(**settings)), first)
    assert not torch.equal(states(sde, solver, seed=9), first)


def test_the_space_time_area_has_its_law():
    """Of dX_1 = X_2 dt, dX_2 = dW the first is the path's integral: variance h^3 / 3."""
    sde = ctrl.ControlledSDE(
        lambda t, x, a: torch.stack([x[:, 1], 0 * x[:, 1]], dim=1),
        lambda t, x: torch.tensor([0.0, 1.0], dtype=x.dtype).expand_as(x),
    )
    many, h = 200_000, 0.7
    grid = ctrl.TimeGrid(torch.tensor([0.0, h], dtype=torch.float64))
    start = torch.zeros(many, 2, dtype=torch.float64)
    for settings in ({}, {"dt": h / 3}):
        path = ctrl.simulate(
            ctrl.ControlProblem(sde, 1.0), HOLD, start, grid, ctrl.TorchSDE("srk", **settings),
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        integral, end = path.states[:, 1, 0], path.states[:, 1, 1]
        torch.testing.assert_close(end, path.increments[:, 0, 1])
        # 6 standard errors of a second moment of 200 000 samples
        share = 6 * (2 / many) ** 0.5
        assert float(integral.square().mean()) == pytest.approx(h**3 / 3, rel=share)
        assert float((integral * end).mean()) == pytest.approx(h**2 / 2, rel=1.5 * share)


def test_substeps_follow_the_given_increment():
    """Additive noise and no drift: whatever is done in between, X moves by the increment."""
    sde = ctrl.ControlledSDE(lambda t, x, a: 0 * x, lambda t, x: 1.0)
    for settings in ({"method": "euler", "dt": 0.04}, {"method": "srk", "adaptive": True}):
        problem, start = ctrl.ControlProblem(sde, 2.0), torch.zeros(4, 2, dtype=torch.float64)
        paths = ctrl.simulate(
            problem, HOLD, start, GRID, ctrl.TorchSDE(**settings),
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        torch.testing.assert_close(
            paths.states.diff(dim=1), paths.increments, rtol=1e-12, atol=1e-13
        )


def test_substeps_are_a_brownian_bridge():
    """Of dX_1 = X_2 dt, dX_2 = dW two Euler steps show W in the middle."""
    sde = ctrl.ControlledSDE(
        lambda t, x, a: torch.stack([x[:, 1], 0 * x[:, 1]], dim=1),
        lambda t, x: torch.tensor([0.0, 1.0], dtype=x.dtype).expand_as(x),
    )
    many, h = 200_000, 0.7
    grid = ctrl.TimeGrid(torch.tensor([0.0, h], dtype=torch.float64))
    path = ctrl.simulate(
        ctrl.ControlProblem(sde, 1.0), HOLD, torch.zeros(many, 2, dtype=torch.float64), grid,
        ctrl.TorchSDE("euler", dt=h / 2), generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    middle, end = path.states[:, 1, 0] / (h / 2), path.states[:, 1, 1]
    torch.testing.assert_close(end, path.increments[:, 0, 1], rtol=1e-12, atol=1e-13)
    bridge = middle - 0.5 * end  # N(0, h / 4), whatever the end
    share = 6 * (2 / many) ** 0.5  # 6 standard errors of a second moment
    assert float(bridge.square().mean()) == pytest.approx(h / 4, rel=share)
    assert abs(float((bridge * end).mean())) < 6 * h / 2 / many**0.5


def test_drift_is_called_once_a_step_and_the_action_is_held():
    calls = []

    def drift(t, x, a):
        calls.append((float(t), a))
        return a - x

    sde = ctrl.ControlledSDE(drift, lambda t, x: 0.5)
    states(sde, ctrl.TorchSDE("euler"))
    assert [t for t, _ in calls] == [0.0, 0.3, 0.5]
    calls.clear()
    states(sde, ctrl.TorchSDE("euler", dt=9.0))
    assert len(calls) == 3  # a step ends at a node
    calls.clear()
    states(sde, ctrl.TorchSDE("euler", dt=0.1))
    # intervals of 0.3, 0.2 and 0.6, divided evenly and without a last step of 1e-17
    times = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert [t for t, _ in calls] == pytest.approx(times, abs=1e-12)
    assert len({id(a) for _, a in calls}) == 3  # one action a node, however many steps


def test_adaptive_steps_come_closer_with_the_tolerance():
    sde = ctrl.ControlledSDE(lambda t, x, a: 0.5 * x, lambda t, x: 0.8 * x)
    grid = ctrl.uniform_grid(1.0, 1)
    dw = torch.randn(256, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    exact = torch.exp(0.5 - 0.32 + 0.8 * dw[:, 0])

    def error(tolerance):
        solver = ctrl.TorchSDE(adaptive=True, rtol=tolerance, atol=tolerance)
        start = torch.ones(256, 1, dtype=torch.float64)
        problem = ctrl.ControlProblem(sde, 1.0)
        end = ctrl.simulate_end(problem, HOLD, start, grid, solver, noise=ctrl.Noise(dw))
        return float((end - exact).square().mean().sqrt())

    coarse, fine = error(1e-2), error(1e-4)
    assert fine < coarse / 4  # measured: 1.6e-2 and 1.1e-3
    assert fine < 30 * 1e-4  # a tolerance of one step, missed at the end by a factor of 11


# --- the adjoint

WIDE = ctrl.TimeGrid(
    torch.tensor(
        [0.0, 0.008594329022030113, 0.0511017761061, 0.1942134, 0.595738654997689],
        dtype=torch.float64,
    )
)


def gradients(solver, calculus, grid, noise="diagonal", controlled=False):
    """Of E |X_T|^2 in drift, diffusion, policy and start; ``solver`` is made of the leaves."""
    gain, volatility, feedback = (
        torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.4, 0.3, -0.2)
    )

    def sigma(t, x, *a):
        value = 0.2 + volatility * x + (0.3 * a[0] if a else 0.0)
        return value if noise != "general" else torch.stack([value, 0.4 * x.flip(1)], dim=2)

    def controlled_sigma(t, x, a):
        return sigma(t, x, a)

    sde = ctrl.ControlledSDE(
        lambda t, x, a: gain * x.sin() + a, controlled_sigma if controlled else sigma, noise,
        2 if noise == "general" else None, calculus, controls_diffusion=controlled,
    )  # fmt: skip
    start = torch.linspace(0.3, 1.5, 128, dtype=torch.float64).view(64, 2).requires_grad_()
    paths = ctrl.simulate(
        ctrl.ControlProblem(sde, 1.0), ctrl.DeterministicPolicy(lambda t, x: feedback * x), start,
        grid, solver((gain, volatility)), generator=torch.Generator().manual_seed(5),
        differentiable=True,
    )  # fmt: skip
    leaves = (gain, volatility, feedback, start)
    return torch.autograd.grad(paths.states[:, -1].square().mean(), leaves)


def gap(method, calculus, grid, **equation):
    """Greatest relative difference of the adjoint's gradients from backpropagation's."""
    kept = gradients(lambda _: ctrl.TorchSDE(method), calculus, grid, **equation)
    slope = gradients(
        lambda leaves: ctrl.TorchSDE(method, adjoint=True, parameters=leaves),
        calculus, grid, **equation,
    )  # fmt: skip
    return max(float((f - k).abs().max() / k.abs().max()) for f, k in zip(slope, kept, strict=True))


@pytest.mark.parametrize("noise", ["diagonal", "scalar", "general"])
@pytest.mark.parametrize("controlled", [False, True])
def test_the_adjoint_of_reversible_heun_is_backpropagation(noise, controlled):
    """On steps with -t1 + (t1 - t0) < -t0 in floating point too: no increment is used twice."""
    nodes = WIDE.nodes
    assert (-nodes[1:] + nodes.diff() < -nodes[:-1]).any()
    assert gap("reversible_heun", "stratonovich", WIDE, noise=noise, controlled=controlled) < 1e-13


@pytest.mark.parametrize(
    ("method", "calculus"),
    [("euler", "ito"), ("milstein", "ito"), ("srk", "ito"), ("midpoint", "stratonovich")],
)
@pytest.mark.parametrize("controlled", [False, True])
def test_the_error_of_other_adjoints_falls_with_the_step(method, calculus, controlled):
    coarse, fine = (
        gap(method, calculus, ctrl.uniform_grid(1.0, steps), controlled=controlled)
        for steps in (8, 64)
    )
    # of order 1/2 at least: 8 times the steps, an error 2.8 times less
    assert fine < coarse / 2
    assert coarse < 0.1


def test_gradients_are_difference_quotients():
    """By a central difference, whose own error is of the order of 1e-9."""
    grid = ctrl.TimeGrid(torch.tensor([0.0, 0.2, 0.5, 0.9], dtype=torch.float64))
    start = torch.linspace(0.3, 1.5, 12, dtype=torch.float64).view(6, 2)

    def value(gain, settings):
        sde = ctrl.ControlledSDE(
            lambda t, x, a: gain * x.sin() + a, lambda t, x: 0.2 + gain * 0.3 * x,
            calculus="stratonovich",
        )  # fmt: skip
        paths = ctrl.simulate(
            ctrl.ControlProblem(sde, 1.0), HOLD, start, grid, ctrl.TorchSDE(**settings),
            generator=torch.Generator().manual_seed(5), differentiable=True,
        )  # fmt: skip
        return paths.states[:, -1].square().mean()

    at, step = torch.tensor(0.4, dtype=torch.float64, requires_grad=True), 1e-5
    for settings in (
        {"method": "reversible_heun", "adjoint": True, "parameters": (at,)},
        {"method": "reversible_heun", "adjoint": True, "parameters": (at,), "dt": 0.05},
        {"method": "log_ode", "dt": 0.1},
    ):
        plain = {name: settings[name] for name in ("method", "dt") if name in settings}
        with torch.no_grad():
            slope = (value(at + step, plain) - value(at - step, plain)) / (2 * step)
        gradient = torch.autograd.grad(value(at, settings), at)[0]
        torch.testing.assert_close(gradient, slope, rtol=1e-7, atol=1e-9)


def test_the_adjoint_refuses_to_lose_a_gradient():
    layer = torch.nn.Linear(2, 2, dtype=torch.float64)
    sde = ctrl.ControlledSDE(lambda t, x, a: layer(x) + a, lambda t, x: 0.3)
    start = torch.ones(4, 2, dtype=torch.float64)
    problem, noise = ctrl.ControlProblem(sde, 2.0), torch.ones(4, 3, 2, dtype=torch.float64)
    for listed in ((), (layer.weight,)):
        solver = ctrl.TorchSDE("euler", adjoint=True, parameters=listed)
        with pytest.raises(ValueError, match="parameters must hold every leaf"):
            ctrl.simulate(
                problem, HOLD, start, GRID, solver, noise=ctrl.Noise(noise), differentiable=True
            )
    whole = ctrl.TorchSDE("euler", adjoint=True, parameters=tuple(layer.parameters()))
    paths = ctrl.simulate(
        problem, HOLD, start, GRID, whole, noise=ctrl.Noise(noise), differentiable=True
    )
    loss = paths.states.square().mean()
    once = torch.autograd.grad(loss, layer.weight, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, layer.weight)[0], once)
    volatility = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    noisy = ctrl.ControlProblem(
        ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: volatility * x), 2.0
    )
    with pytest.raises(ValueError, match="parameters must hold every leaf"):
        ctrl.simulate(
            noisy, HOLD, start, GRID, solver, noise=ctrl.Noise(noise), differentiable=True
        )
    # without a graph nothing can be lost
    ctrl.simulate(problem, HOLD, start, GRID, solver, noise=ctrl.Noise(noise))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "miltein"}, "milstein"),
        ({"method": "rk4"}, "method"),
        ({"dt": 0.0}, "dt"),
        ({"dt": -0.1}, "dt"),
        ({"dt": math.nan}, "dt"),
        ({"rtol": 0.0}, "rtol"),
        ({"atol": math.inf}, "atol"),
        ({"method": "euler", "adaptive": True}, "adaptive"),
        ({"parameters": (torch.zeros(1),)}, "adjoint"),
        ({"adjoint_method": "midpoint"}, "adjoint"),
        ({"adjoint": True, "adaptive": True}, "divide them evenly"),
        ({"method": "heun", "adjoint": True, "adjoint_method": "milstein"}, "adjoint_method"),
        ({"method": "srk", "adjoint": True, "adjoint_method": "srk"}, "adjoint_method"),
        (
            {"method": "reversible_heun", "adjoint": True, "adjoint_method": "heun"},
            "adjoint_reversible_heun",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ctrl.TorchSDE(**settings)


def test_what_torchsde_would_get_wrong_is_refused():
    general = geometric("stratonovich", "general", 2)
    with pytest.raises(ValueError, match="general noise"):
        states(general, ctrl.TorchSDE("heun", adaptive=True))
    with pytest.raises(ValueError, match="to_stratonovich"):
        states(geometric(), ctrl.TorchSDE("heun"))
    with pytest.raises(ValueError, match="to_ito"):
        states(geometric("stratonovich"), ctrl.TorchSDE("srk"))
    with pytest.raises(ValueError, match="diagonal noise"):
        states(
            geometric(noise="scalar"),
            ctrl.TorchSDE("euler", adjoint=True, adjoint_method="milstein"),
        )


def test_an_adaptive_step_that_fails_is_an_error_not_a_warning():
    stiff = ctrl.ControlledSDE(lambda t, x, a: -1e9 * x**3, lambda t, x: 0.5 + x)
    with pytest.raises(ValueError, match=r"too short|finite"):
        states(stiff, ctrl.TorchSDE("milstein", adaptive=True, rtol=1e-9, atol=1e-12))


def test_what_a_drift_says_is_not_taken_for_a_failing_step():
    def drift(t, x, a):
        warnings.warn("the drift's own", UserWarning, stacklevel=1)
        return a - x

    with pytest.raises(UserWarning, match="the drift's own"):
        states(ctrl.ControlledSDE(drift, lambda t, x: 0.5), ctrl.TorchSDE(adaptive=True))


def test_adaptive_steps_that_cannot_meet_their_tolerance_are_an_error():
    """Milstein's local error at the least step is of the order of 1e-4."""
    solver = ctrl.TorchSDE("milstein", adaptive=True, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match=r"too short between t = 0 and 0\.3"):
        states(geometric(), solver)


@pytest.mark.parametrize("adaptive", [False, True])
def test_states_that_blow_up_are_refused(adaptive):
    explosive = ctrl.ControlledSDE(lambda t, x, a: x**9 * 1e9, lambda t, x: 0.5)
    with pytest.raises(ValueError, match=r"finite|too short"):
        states(explosive, ctrl.TorchSDE("srk", adaptive=adaptive))
    undefined = ctrl.ControlledSDE(lambda t, x, a: x * math.nan, lambda t, x: 0.5)
    with pytest.raises(ValueError, match="finite"):
        states(undefined, ctrl.TorchSDE("srk", adaptive=adaptive))


@pytest.mark.parametrize("settings", [{}, {"dt": 0.1}, {"adaptive": True}])
def test_the_layout_of_memory_does_not_matter(settings):
    """Strided increments and expanded states give what contiguous ones do; one path is enough."""
    sde, solver = geometric(), ctrl.TorchSDE(**settings)
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 4, 5, dtype=torch.float64, generator=g)
    strided, x = wide[:, :2, 3], torch.tensor([[0.4, 0.9]], dtype=torch.float64).expand(3, 2)
    t0, t1 = GRID.nodes[:2]
    one = solver.step(sde, t0, t1, x, x, strided)
    other = solver.step(sde, t0, t1, x.clone(), x.clone(), strided.clone())
    # the same numbers from another kernel; those of another place would be off by a tenth or more
    torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    alone = solver.step(sde, t0, t1, x[:1, :1], x[:1, :1], strided[:1, :1])
    assert alone.shape == (1, 1)


def test_nothing_keeps_a_graph_unasked():
    path = states(geometric(), ctrl.TorchSDE("milstein"))
    assert not path.requires_grad
    x, (t0, t1) = torch.ones(3, 2, dtype=torch.float64), GRID.nodes[:2]
    with torch.no_grad():
        after = ctrl.TorchSDE("milstein").step(geometric(), t0, t1, x, x, x)
    assert not after.requires_grad


def test_interior_randomness_is_named_by_all_arguments():
    sde, solver = geometric(), ctrl.TorchSDE("srk")
    g = torch.Generator().manual_seed(0)
    x, increment = torch.randn(2, 300, 2, dtype=torch.float64, generator=g)
    time = torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64)

    def first(t0, t1, increment):
        """The first path, which is not touched by what changes."""
        return solver.step(sde, t0, t1, x, 0 * x, increment)[0]

    usual = first(time[1], time[2], increment)
    other, balanced = increment.clone(), increment.clone()
    other[299, 1] += 1e-9
    balanced.view(torch.int64)[298:, 1] += torch.tensor([1, -1])  # the last bits: the sum stays
    assert not torch.equal(first(time[1], time[2], other), usual)
    assert not torch.equal(first(time[1], time[2], balanced), usual)
    sde = ctrl.ControlledSDE(lambda t, x, a: x, lambda t, x: 0.5)  # does not look at the time
    shifted = first(time[0], time[1], increment)
    assert not torch.equal(first(time[1], time[2], increment), shifted)


def test_coefficients_see_times_and_constants_as_our_own_solvers_show_them():
    seen = []

    def drift(t, x, a):
        seen.append(t.dtype)
        return a - x

    def diffusion(t, x):
        seen.append(t.dtype)
        return torch.tensor(0.5)

    start = torch.ones(4, 2)
    end_states = states(ctrl.ControlledSDE(drift, diffusion), ctrl.TorchSDE("milstein"), start)
    assert set(seen) == {torch.float32}
    number = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.5)
    torch.testing.assert_close(end_states, states(number, ctrl.EulerMaruyama(), start))
    scalar = ctrl.ControlledSDE(drift, diffusion, "scalar")
    torch.testing.assert_close(
        states(scalar, ctrl.TorchSDE("euler"), start), states(scalar, ctrl.EulerMaruyama(), start)
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("calculus", "settings"),
    [
        ("ito", {"method": "srk"}),
        ("ito", {"method": "milstein", "dt": 0.1}),
        ("stratonovich", {"method": "heun", "dt": 0.1}),
    ],
)
def test_devices_agree(calculus, settings):
    sde, solver = geometric(calculus), ctrl.TorchSDE(**settings)
    g = torch.Generator().manual_seed(0)
    x, increment = torch.randn(2, 6, 2, dtype=torch.float64, generator=g)
    t0, t1 = GRID.nodes[:2]
    here = solver.step(sde, t0, t1, x, 0 * x, increment)
    there = solver.step(sde, t0, t1, x.cuda(), 0 * x.cuda(), increment.cuda())
    torch.testing.assert_close(there.cpu(), here, rtol=1e-12, atol=1e-13)


def test_importing_ctrl_does_not_import_torchsde():
    code = "import sys, ctrl; ctrl.TorchSDE(); sys.exit('torchsde' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
