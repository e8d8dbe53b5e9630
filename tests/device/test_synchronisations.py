"""Roll-outs and estimators ask the device for nothing but work, whatever the number of steps."""

import pytest
import torch

import ctrl
from benchmarks.device import POLICY, ROLL_OUTS, SDE, per_step
from tests.device.memory import NAME

PER_STEP = {"simulate, TorchSDE srk": 1}  # its interior is named by the increments, which are read


@pytest.mark.parametrize("name", ROLL_OUTS)
def test_no_step_waits(name):
    waits, _, counts = per_step(ROLL_OUTS[name])
    assert waits == PER_STEP.get(name, 0), counts.lines()


def test_a_step_of_euler_maruyama_is_two_launches_of_its_own():
    """Beside the policy's product and the copy of the kept action; noise is drawn before."""
    _, launches, counts = per_step(ROLL_OUTS["simulate, EulerMaruyama"])
    assert launches == 4, counts.operations


@pytest.mark.parametrize("keep", [("states",), ("states", "increments")])
def test_noise_that_is_drawn_for_many_steps_at_once_is_what_moves_the_states(keep):
    """More steps than are drawn at once, uneven; and the same numbers whatever is kept."""
    nodes = torch.linspace(0, 1, 151, dtype=torch.float64).square()
    problem, grid = ctrl.ControlProblem(SDE, 1.0), ctrl.TimeGrid(nodes)
    start = torch.linspace(-1, 1, 32, dtype=torch.float64).view(16, 2).to(NAME)
    drawn = lambda: torch.Generator(NAME).manual_seed(3)
    increments = ctrl.noise.brownian_increments(grid.steps.to(NAME), 16, (2,), generator=drawn())
    replayed = ctrl.simulate(problem, POLICY, start, grid, noise=ctrl.Noise(increments))
    found = ctrl.simulate(problem, POLICY, start, grid, generator=drawn(), keep=keep)
    end = ctrl.simulate_end(problem, POLICY, start, grid, generator=drawn())
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found.states.cpu(), replayed.states.cpu(), **close)
    torch.testing.assert_close(end.cpu(), replayed.states[:, -1].cpu(), **close)
    if found.increments is not None:
        torch.testing.assert_close(found.increments.cpu(), increments.cpu(), **close)
