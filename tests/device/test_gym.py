"""gymnasium's numbers live on the CPU; grids and policies may live on a device."""

import numpy as np
import pytest
import torch

import ctrl
from tests.device.memory import NAME

gym = pytest.importorskip("ctrl.gym")

SDE = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.4)
PROBLEM = ctrl.ControlProblem(SDE, 0.8, lambda t, x, a: -a.square().sum(1))


def environment(device):
    grid = ctrl.uniform_grid(0.8, 4, device=device)
    return gym.ControlEnv(PROBLEM, grid, np.array([0.5, -0.2]), 2), grid


def on_the_device(t, x):
    return -0.6 * x.to(NAME)[:, :2]


def test_a_grid_of_the_device_gives_the_same_episode():
    episodes = []
    for device in ("cpu", NAME):
        env, _ = environment(device)
        env.reset(seed=3)
        episodes.append([env.step(np.array([0.1, -0.3]))[0] for _ in range(4)])
    np.testing.assert_array_equal(*episodes)


def test_a_policy_of_the_device_plays():
    env, grid = environment(NAME)
    policy = ctrl.GaussianPolicy(on_the_device, 0.3)
    generator = torch.Generator(NAME).manual_seed(0)
    paths = gym.sample(env, policy, grid, 2, seed=1, generator=generator)
    assert paths.actions.device.type == "cpu"


def test_a_generator_of_another_device_is_refused_by_name():
    env, grid = environment("cpu")
    policy = ctrl.GaussianPolicy(lambda t, x: -0.6 * x[:, :2], 0.3)
    with pytest.raises(ValueError, match="generator must be on cpu, as the action is, got sim"):
        gym.sample(env, policy, grid, 2, seed=1, generator=torch.Generator(NAME))
