"""The same numbers in float32, and on a GPU where there is one, as in float64 on the CPU."""

import pytest
import torch

import ctrl
from ctrl import martingale as mg
from ctrl import policy_gradient as pg
from ctrl import q_learning as ql

KINDS = [
    pytest.param("cpu", torch.float32, 2e-4, id="float32"),
    pytest.param("cuda", torch.float32, 2e-4, id="cuda-float32", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float64, 1e-9, id="cuda-float64", marks=pytest.mark.gpu),
]
GRID = ctrl.uniform_grid(0.8, 6)
STRATONOVICH = (ctrl.Heun(), ctrl.TorchSDE("midpoint"))


def results(device, dtype):
    """One number a path of every family of functions, on one noise."""
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.4 + 0.1 * x.sin())
    problem = ctrl.ControlProblem(
        sde, 0.8, lambda t, x, a: -a.square().sum(1), lambda x: x.sin().sum(1), 0.3, 0.1
    )
    policy = ctrl.GaussianPolicy(lambda t, x: -0.6 * x, 0.5)
    mean, reference = (ctrl.DeterministicPolicy(lambda t, x, c=c: c * x) for c in (-0.6, 0.1))
    value = lambda t, x: (1 + t) * x.sin().sum(1)
    g = torch.Generator().manual_seed(4)
    increments, drawn = (
        torch.randn(16, 6, 2, dtype=torch.float64, generator=g).to(device, dtype) for _ in range(2)
    )
    noise = ctrl.Noise(increments * GRID.steps.sqrt()[:, None].to(device, dtype), drawn)
    start = torch.linspace(-1, 1, 32, dtype=torch.float64).view(16, 2).to(device, dtype)
    collected = {}
    for solver in (
        ctrl.EulerMaruyama(), ctrl.Milstein(), ctrl.Heun(), ctrl.TorchSDE("milstein"),
        ctrl.TorchSDE("midpoint"),
    ):  # fmt: skip
        equation = sde.to_stratonovich() if solver in STRATONOVICH else sde
        paths = ctrl.simulate(
            ctrl.ControlProblem(equation, 0.8), mean, start, GRID, solver, noise=noise
        )
        collected[repr(solver)] = paths.states[:, -1, 0]
    paths = ctrl.simulate(problem, mean, start, GRID, noise=noise)
    collected["path KL"] = ctrl.girsanov.path_kl(sde, mean, reference, paths)
    collected["log ratio"] = ctrl.girsanov.log_ratio(sde, mean, reference, paths)
    paths = ctrl.simulate(problem, policy, start, GRID, noise=noise)
    collected["returns"] = ctrl.returns_to_go(problem, paths, policy)[:, 0]
    collected["martingale"] = mg.increments(value, problem, paths, policy).sum(1)
    collected["q"] = ql.q_rates(problem, value, paths).sum(1)
    collected["gradient"] = pg.temporal_difference_gradient(problem, policy, value, paths)
    collected["pathwise"] = pg.pathwise_gradient(problem, policy, value, paths)
    tests = mg.features_along(lambda t, x: x)
    collected["orthogonality"] = mg.orthogonality(tests, value, problem, paths, policy)[:, 0]
    return collected


@pytest.mark.parametrize(("device", "dtype", "tolerance"), KINDS)
def test_other_precisions_and_devices_agree_with_float64(device, dtype, tolerance):
    """A few dozen operations of relative error 6e-8 on numbers of order 1 to 10."""
    expected = results("cpu", torch.float64)
    for name, end in results(device, dtype).items():
        assert end.dtype == dtype, name
        assert end.device.type == device, name
        torch.testing.assert_close(
            end.cpu().double(), expected[name], rtol=tolerance, atol=tolerance, msg=name
        )
