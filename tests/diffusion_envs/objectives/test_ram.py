import pytest
import torch

from diffusion_envs import gaussian
from diffusion_envs.gaussian import Gaussian
from diffusion_envs.objectives import ram
from diffusion_envs.schedule import RectifiedFlow

S = torch.tensor(0.37, dtype=torch.float64)


def normals(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_score_and_velocity_are_one_function(generator):
    x, v = normals(generator, 2, 5, 3, 2)
    there = ram.score_from_velocity(x, v, S)
    torch.testing.assert_close(ram.velocity_from_score(x, there, S), v, rtol=1e-12, atol=1e-12)


def test_the_velocity_of_gaussian_data_is_noise_less_data(generator):
    """E[epsilon - x_0 | x] = -x / (1 - s) + E[epsilon | x] / (1 - s), E[epsilon | x] = -s score."""
    data = Gaussian(
        torch.tensor([0.8, -0.5], dtype=torch.float64),
        torch.tensor([[1.3, 0.45], [0.45, 0.6]], dtype=torch.float64),
    )
    x = normals(generator, 4, 2)
    score = gaussian.score(data, RectifiedFlow(), S, x)
    epsilon = -S * score
    x0 = (x - S * epsilon) / (1 - S)
    got = ram.velocity_from_score(x, score, S)
    torch.testing.assert_close(got, epsilon - x0, rtol=1e-12, atol=1e-12)


def test_a_constant_reward_pulls_towards_the_models_own_velocity(generator):
    """Averaged over (x_0, epsilon) given x the target is then the reference: v is a baseline."""
    v_ref, v = normals(generator, 2, 1, 3)
    pair = normals(generator, 1, 3)  # epsilon - x_0 - v, and its negative: mean v
    noise, data = torch.cat([v + pair, v - pair]), torch.zeros(2, 3).double()
    both = ram.target(
        v_ref.expand(2, 3), v.expand(2, 3), data, noise, torch.full((2,), 0.9).double(), 0.7
    )
    torch.testing.assert_close(both.mean(0, keepdim=True), v_ref, rtol=1e-12, atol=1e-12)


def test_the_loss_moves_rows_by_their_reward(generator):
    v, v_ref, x0, epsilon = normals(generator, 4, 2, 3, 2)
    rewards = torch.tensor([0.4, -1.3], dtype=torch.float64)
    leaf = v.clone().requires_grad_()
    targets = ram.target(v_ref, v, x0, epsilon, rewards, 0.7)
    ram.matching_loss(leaf, targets).sum().backward()
    expected = 2 * (v - v_ref - rewards.view(-1, 1, 1) / 0.7 * (epsilon - x0 - v))
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="kl_weight must be positive"):
        ram.target(v_ref, v, x0, epsilon, rewards, 0.0)
