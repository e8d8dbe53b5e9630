"""The adapter against our own solvers on the same noise, and what it refuses."""

import math
import subprocess
import sys

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


def test_drift_is_called_once_a_step_and_the_action_is_held():
    calls = []

    def drift(t, x, a):
        calls.append((float(t), a))
        return a - x

    sde = ctrl.ControlledSDE(drift, lambda t, x: 0.5)
    states(sde, ctrl.TorchSDE("euler"))
    assert [t for t, _ in calls] == [0.0, 0.3, 0.5]
    calls.clear()
    states(sde, ctrl.TorchSDE("euler", dt=0.1))
    assert len({id(a) for _, a in calls}) == 3  # one action a node, however many steps


def test_adjoint_gradients_agree_with_backpropagation():
    gain = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    policy_gain = torch.tensor(-0.2, dtype=torch.float64, requires_grad=True)
    policy = ctrl.DeterministicPolicy(lambda t, x: policy_gain * x)

    def gradients(solver, calculus, steps):
        sde = ctrl.ControlledSDE(
            lambda t, x, a: gain * x + a, lambda t, x: 0.3 + 0.2 * x, calculus=calculus
        )
        start = torch.full((64, 1), 0.7, dtype=torch.float64, requires_grad=True)
        paths = ctrl.simulate(
            ctrl.ControlProblem(sde, 1.0), policy, start, ctrl.uniform_grid(1.0, steps), solver,
            generator=torch.Generator().manual_seed(5), differentiable=True,
        )  # fmt: skip
        loss = paths.states[:, -1].square().mean()
        return torch.autograd.grad(loss, (gain, policy_gain, start))

    def gap(method, calculus, steps):
        kept = gradients(ctrl.TorchSDE(method), calculus, steps)
        adjoint = ctrl.TorchSDE(method, adjoint=True, parameters=(gain,))
        found = gradients(adjoint, calculus, steps)
        return max(
            float((f - k).abs().max() / k.abs().max()) for f, k in zip(found, kept, strict=True)
        )

    assert gap("midpoint", "stratonovich", 32) < 0.05
    coarse, fine = gap("milstein", "ito", 16), gap("milstein", "ito", 64)
    assert fine < 0.6 * coarse < 0.2  # the adjoint's own error falls with the step


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


def test_an_adaptive_step_that_fails_is_an_error_not_a_warning():
    stiff = ctrl.ControlledSDE(lambda t, x, a: -1e9 * x**3, lambda t, x: 0.5 + x)
    with pytest.raises(ValueError, match=r"too short|finite"):
        states(stiff, ctrl.TorchSDE("milstein", adaptive=True, rtol=1e-9, atol=1e-12))


def test_states_that_blow_up_are_refused():
    explosive = ctrl.ControlledSDE(lambda t, x, a: x**9 * 1e9, lambda t, x: 0.5)
    with pytest.raises(ValueError, match="finite"):
        states(explosive, ctrl.TorchSDE("srk"))


def test_nothing_keeps_a_graph_unasked():
    path = states(geometric(), ctrl.TorchSDE("milstein"))
    assert not path.requires_grad


def test_importing_ctrl_does_not_import_torchsde():
    code = "import sys, ctrl; ctrl.TorchSDE(); sys.exit('torchsde' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
