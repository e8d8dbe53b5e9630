from dataclasses import replace

import pytest
import torch

import ctrl
from ctrl import adjoint_matching as am

GRID = ctrl.TimeGrid(torch.tensor([0.0, 0.2, 0.5, 0.6], dtype=torch.float64))


def diffusion(t, x, a):
    return 0.5 + 0.2 * torch.cos(a) * (1 + x.square()).sqrt()


BENT = ctrl.ControlProblem(
    ctrl.ControlledSDE(lambda t, x, a: torch.sin(x) + a * x, diffusion, controls_diffusion=True),
    0.6,
    lambda t, x, a: -(a.square() * (1 + t) + torch.cos(x)).sum(1),
    lambda x: x.prod(1) - x.square().sum(1),
    discount=0.3,
)


def bent_policy(theta):
    return ctrl.DeterministicPolicy(lambda t, x: torch.tanh(theta * x.flip(1)) + t * theta)


def roll_out(policy, generator=None, noise=None, problem=BENT, **settings):
    start = torch.tensor([[0.3, -0.8], [1.1, 0.4], [0.2, 0.9]], dtype=torch.float64)
    return ctrl.simulate(problem, policy, start, GRID, generator=generator, noise=noise, **settings)


def test_full_adjoints_differentiate_every_path_in_the_control(generator):
    theta = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    policy = bent_policy(theta)
    paths = roll_out(policy, generator)
    first = am.adjoints(BENT, policy, paths).first
    loss = am.noise_matching_loss(BENT, policy, paths, first)
    same = roll_out(policy, noise=ctrl.Noise(paths.increments), differentiable=True)
    returns = ctrl.returns_to_go(BENT, same)[:, 0]
    for one, other in zip(loss, returns, strict=True):
        ours, theirs = (torch.autograd.grad(y, theta, retain_graph=True)[0] for y in (one, other))
        torch.testing.assert_close(-ours, theirs, rtol=1e-11, atol=1e-11)


def test_adjoints_are_derivatives_of_the_remaining_reward(generator):
    policy = bent_policy(torch.tensor(0.6, dtype=torch.float64))
    paths = roll_out(policy, generator)
    both = am.adjoints(BENT, policy, paths)
    lean = am.lean_adjoints(BENT, paths)
    for k in range(3):

        def remaining(x, k=k, held=False):
            earned, keep = 0.0, (-0.3 * GRID.steps[k]).exp()  # discounted to the step's left end
            for j in range(k + 1, 3):
                t, h = GRID.nodes[j], GRID.steps[j]
                a = paths.actions[:, j] if held else policy.mean(t, x)
                earned = earned + keep * h * BENT.running_reward(t, x, a)
                keep = keep * (-0.3 * h).exp()
                drift = BENT.sde.drift(t, x, a)
                x = x + h * drift + diffusion(t, x, a) * paths.increments[:, j]
            return (earned + keep * BENT.terminal_reward(x)).sum()

        x = paths.states[:, k + 1]
        torch.testing.assert_close(both.first[:, k], torch.func.grad(remaining)(x))
        hessian = torch.func.hessian(remaining)(x)
        each = torch.stack([hessian[i, :, i] for i in range(3)])
        torch.testing.assert_close(both.second[:, k], each)
        held = torch.func.grad(lambda x: remaining(x, held=True))(x)
        torch.testing.assert_close(lean[:, k], held)


def test_lean_adjoints_take_states_of_any_shape(generator):
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.4)
    problem = ctrl.ControlProblem(sde, 0.6, None, lambda x: -x.square().flatten(1).sum(1))
    policy = ctrl.DeterministicPolicy(lambda t, x: 0.1 * x)
    start = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    paths = ctrl.simulate(problem, policy, start, GRID, generator=generator)
    lean = am.lean_adjoints(problem, paths)
    torch.testing.assert_close(lean[:, 2], -2 * paths.states[:, 3])
    torch.testing.assert_close(lean[:, 1], -2 * (1 - 0.1) * paths.states[:, 3])
    assert am.noise_matching_loss(problem, policy, paths, lean).shape == (2,)
    with pytest.raises(ValueError, match=r"states must be \[paths, nodes, dim\]"):
        am.adjoints(problem, policy, paths)


def test_bad_input_is_refused(generator):
    policy = bent_policy(torch.tensor(0.6, dtype=torch.float64))
    paths = roll_out(policy, generator)
    with pytest.raises(ValueError, match="kept their increments"):
        am.adjoints(BENT, policy, replace(paths, increments=None))
    with pytest.raises(ValueError, match="policy must be deterministic"):
        am.adjoints(BENT, ctrl.GaussianPolicy(policy.mean, 0.2), paths)
    with pytest.raises(ValueError, match="end at the horizon"):
        am.lean_adjoints(replace(BENT, horizon=2.0), paths)
    other = replace(BENT, sde=replace(BENT.sde, calculus="stratonovich"))
    with pytest.raises(ValueError, match="adjoint_matching solves ito equations"):
        am.lean_adjoints(other, paths)
    killed = replace(BENT, discount=lambda t, x: x.square().sum(1))
    with pytest.raises(ValueError, match=r"problem\.discount must be a number"):
        am.matching_loss(killed, policy, paths, am.adjoints(BENT, policy, paths))
    stopped = ctrl.paths.stop(paths, torch.tensor([1, 3, 2]), torch.tensor([True] * 3))
    with pytest.raises(ValueError, match="paths must all go on to the horizon"):
        am.lean_adjoints(BENT, stopped)
