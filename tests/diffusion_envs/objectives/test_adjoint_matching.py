import pytest
import torch

from diffusion_envs.objectives.adjoint_matching import lean_adjoint, matching_loss

PATHS, STEPS, EVENT = 3, 4, (2, 3)
GAIN = torch.tensor([0.4, 0.9, 0.3, 1.7], dtype=torch.float64)
STD = torch.tensor([0.6, 0.2, 1.1, 0.35], dtype=torch.float64)


def normals(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def pretrained(k, x):
    """A step that mixes the coordinates of an event, and is not linear."""
    return x + GAIN[k] * (x.flip(-1) * x).tanh()


def test_the_lean_adjoint_is_the_gradient_through_the_noise_free_steps(generator):
    """Between frozen deviations x_{k+1} - mean_k(x_k) it is back-propagation of -r."""
    states = normals(generator, PATHS, STEPS + 1, *EVENT)
    slope = normals(generator, PATHS, *EVENT)
    got = lean_adjoint(pretrained, states, slope)
    for k in range(STEPS + 1):
        x = states[:, k].clone().requires_grad_()
        after = x
        for j in range(k, STEPS):
            after = pretrained(j, after) + (states[:, j + 1] - pretrained(j, states[:, j]))
        expected = torch.autograd.grad((-slope * after).sum(), x)[0]
        torch.testing.assert_close(got[:, k], expected, rtol=1e-12, atol=1e-12)


def test_the_loss_is_minimal_where_the_shift_of_the_mean_is_minus_variance_times_adjoint(generator):
    reference = normals(generator, PATHS, STEPS, *EVENT)
    adjoint = normals(generator, PATHS, STEPS + 1, *EVENT)
    gain, std = (each.view(1, -1, 1, 1) for each in (GAIN, STD))
    best = reference - std.square() * adjoint[:, 1:] / (0.7 * gain)
    loss = matching_loss(best, reference, adjoint, GAIN, STD, 0.7)
    torch.testing.assert_close(loss, torch.zeros(PATHS).double(), rtol=0, atol=1e-26)
    moved = matching_loss(best + std / gain, reference, adjoint, GAIN, STD, 0.7)
    expected = torch.full((PATHS,), 0.5 * STEPS * 6, dtype=torch.float64)
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)


def test_bad_input_is_refused_by_name(generator, monkeypatch):
    states, scores = normals(generator, 2, 4, 1), normals(generator, 2, 3, 1)
    level = torch.ones(3).double()
    with pytest.raises(ValueError, match="std must be positive"):
        matching_loss(scores, scores, states, level, 0 * level, 0.7)
    with pytest.raises(ValueError, match="kl_weight must be positive, got 0"):
        matching_loss(scores, scores, states, level, level, 0.0)
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as in production
    with pytest.raises(ValueError, match=r"reward_gradient must be \[2, 1\]"):
        lean_adjoint(pretrained, states, states[:, :2, 0])
    with pytest.raises(ValueError, match="3 steps need 4 nodes of the adjoint"):
        matching_loss(scores, scores, states[:, 1:], level, level, 0.7)
