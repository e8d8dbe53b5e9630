"""Both ways between control problems and gymnasium."""

import math
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import ctrl
from ctrl.gym import ControlEnv, sample

GRID = ctrl.TimeGrid(torch.tensor([0.0, 0.2, 0.5, 0.9], dtype=torch.float64))


def problem(horizon=0.9, **settings):
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x + t, lambda t, x: 0.3 + 0.1 * x)
    terminal = (lambda x: -(x - 1).square().sum(1)) if math.isfinite(horizon) else None
    return ctrl.ControlProblem(
        sde, horizon, lambda t, x, a: -x.square().sum(1) - 0.1 * a.square().sum(1), terminal,
        **settings,
    )  # fmt: skip


def env(**settings):
    return ControlEnv(problem(), GRID, np.array([0.4, -0.2]), 2, **settings)


@pytest.mark.parametrize("observe_time", [True, False])
@pytest.mark.parametrize("bound", [2.0, math.inf])
def test_gymnasiums_own_checker_finds_nothing(observe_time, bound):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # gymnasium advises bounds; a control problem need not have any
        warnings.filterwarnings("ignore", message=r".*(infinity|symmetric and normalized).*")
        warnings.filterwarnings("ignore", message=r".*not within the observation space.*")
        check_env(env(observe_time=observe_time, action_bound=bound), skip_render_check=True)


@pytest.mark.parametrize("solver", [ctrl.EulerMaruyama(), ctrl.Milstein(), ctrl.TorchSDE("srk")])
def test_a_roll_out_is_simulate_on_the_same_noise(solver):
    one = env(solver=solver)
    actions = np.array([[0.3, -0.1], [1.0, 0.5], [-0.7, 0.2]])
    observed, _ = one.reset(seed=5)
    seen, rewards, infos = [observed], [], []
    for action in actions:
        observed, reward, terminated, truncated, info = one.step(action)
        seen.append(observed)
        rewards.append(reward)
        infos.append(info)
    assert terminated
    assert not truncated
    again = env()
    again.reset(seed=5)
    h = GRID.steps
    dw = torch.stack(
        [s.sqrt() * torch.as_tensor(again.np_random.standard_normal((1, 2))) for s in h], dim=1
    )
    held = iter(torch.as_tensor(actions))
    policy = ctrl.DeterministicPolicy(lambda t, x: next(held).unsqueeze(0))
    start = torch.tensor([[0.4, -0.2]], dtype=torch.float64)
    paths = ctrl.simulate(problem(), policy, start, GRID, solver, noise=ctrl.Noise(dw))
    np.testing.assert_allclose(np.array(seen)[:, :2], paths.states[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(np.array(seen)[:, 2], GRID.nodes)
    expected = ctrl.running_rewards(problem(), paths)[0].clone()
    expected[-1] += problem().terminal_reward(paths.states[:, -1])[0]
    np.testing.assert_allclose(rewards, expected, rtol=1e-12)


def test_endless_problems_are_truncated_and_tell_their_discount():
    endless = ControlEnv(problem(math.inf, discount=0.7), GRID, np.zeros(2), 2)
    endless.reset(seed=0)
    for k in range(3):
        _, _, terminated, truncated, info = endless.step(np.zeros(2))
        assert info["discount"] == pytest.approx(math.exp(-0.7 * float(GRID.steps[k])))
    assert truncated
    assert not terminated
    with pytest.raises(ValueError, match="reset"):
        endless.step(np.zeros(2))


def test_the_start_may_be_drawn_and_seeds_decide():
    drawn = ControlEnv(problem(), GRID, lambda rng: rng.standard_normal(2), 2)
    first, _ = drawn.reset(seed=3)
    second, _ = drawn.reset(seed=3)
    third, _ = drawn.reset(seed=4)
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, third)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="horizon"):
        ControlEnv(problem(0.5), GRID, np.zeros(2), 2)
    for start in (np.zeros((2, 2)), np.array([np.nan, 0.0])):
        with pytest.raises(ValueError, match="start"):
            ControlEnv(problem(), GRID, start, 2)
    with pytest.raises(ValueError, match="action_dim"):
        ControlEnv(problem(), GRID, np.zeros(2), 0)
    with pytest.raises(ValueError, match="action_bound"):
        ControlEnv(problem(), GRID, np.zeros(2), 2, action_bound=-1.0)
    one = env()
    one.reset(seed=0)
    for action in (np.zeros(3), np.array([np.nan, 0.0])):
        with pytest.raises(ValueError, match="action"):
            one.step(action)


def test_paths_of_an_environment_carry_its_rewards():
    policy = ctrl.GaussianPolicy(lambda t, x: -0.5 * x[:, :2], 0.3)
    g = torch.Generator().manual_seed(0)
    paths = sample(env(), policy, GRID, 6, seed=1, generator=g)
    assert paths.states.shape == (6, 4, 3)  # time is observed
    unpaid = ctrl.ControlProblem(problem().sde, math.inf)
    assert ctrl.running_rewards(unpaid, paths) is paths.rewards
    value = lambda t, x: x[:, 0]
    dm = ctrl.martingale.increments(value, unpaid, paths)
    after = paths.states[:, 1:, 0].clone()
    after[:, -1] = 0  # the environment terminates at its horizon, and has paid all
    by_hand = after - paths.states[:, :-1, 0] + paths.rewards
    torch.testing.assert_close(dm, by_hand)


def test_every_episode_has_a_start_of_its_own():
    """Random starts: one seed for all of them would make one path many times."""
    problem = ctrl.ControlProblem(ctrl.ControlledSDE(lambda t, x, a: -x, lambda t, x: 0.4), 1.0)
    draw = lambda random: random.standard_normal(2)
    made = ControlEnv(problem, ctrl.uniform_grid(1.0, 3), draw, 2, observe_time=False)
    policy = ctrl.DeterministicPolicy(lambda t, x: 0 * x)

    def run(seed, paths):
        return sample(
            made, policy, ctrl.uniform_grid(1.0, 3), paths, seed=seed, generator=torch.Generator()
        )

    episodes = run(5, 20)
    assert len(episodes.states[:, 0].unique(dim=0)) == 20
    assert len(episodes.states[:, 1].unique(dim=0)) == 20
    assert torch.equal(run(5, 20).states, episodes.states)
    assert torch.equal(run(6, 19).states, episodes.states[1:])
    assert episodes.black_box


def test_another_librarys_environment_is_a_black_box_to_learn_from():
    pendulum = gymnasium.make("Pendulum-v1")
    grid = ctrl.uniform_grid(1.0, 20)  # 0.05 a step
    policy = ctrl.GaussianPolicy(lambda t, x: -x[:, 2:], 0.5)
    g = torch.Generator().manual_seed(0)
    paths = sample(pendulum, policy, grid, 8, seed=0, generator=g)
    sde = ctrl.ControlledSDE(lambda t, x, a: 0 * x, lambda t, x: 1.0)  # not looked at
    problem = ctrl.ControlProblem(sde, math.inf, discount=0.5)

    def features(t, x):
        return torch.stack([x[:, 0], x[:, 2].square()], dim=1)

    value = ctrl.martingale.clstd(features, problem, paths)
    assert bool(torch.isfinite(value.coefficients).all())


WALLED = ctrl.ControlProblem(
    ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.35),
    math.inf,
    lambda t, x, a: -1 + 0 * x[:, 0],
    discount=0.3,
    domain=ctrl.stopping.Interval(-0.5, 0.5),
    exit_reward=lambda t, x: 3 + t + x[:, 0],
)
STEPS = ctrl.uniform_grid(1.0, 5)


def test_an_episode_ends_where_the_domain_is_left_and_pays_the_exit():
    """The same noise in simulate leaves at the same step."""
    paths, draws = 20, 0
    for seed in range(paths):
        one = ControlEnv(WALLED, STEPS, np.array([0.1]), 1, observe_time=False)
        one.reset(seed=seed)
        again = np.random.default_rng()
        again.bit_generator.state = one.np_random.bit_generator.state
        drawn = [(again.standard_normal((1, 1)), again.random(1)) for _ in range(5)]
        increments = torch.tensor(np.array([dw for dw, _ in drawn])).view(1, 5, 1) * 0.2**0.5
        uniform = torch.tensor(np.array([u for _, u in drawn])).view(1, 5)
        policy = ctrl.DeterministicPolicy(lambda t, x: 0.2 + 0 * x)
        start = torch.tensor([[0.1]], dtype=torch.float64)
        noise = ctrl.Noise(increments, exits=uniform)
        path = ctrl.simulate(WALLED, policy, start, STEPS, noise=noise)
        end = int(path.ends[0])
        for k in range(end):
            seen, reward, terminated, truncated, _ = one.step(np.array([0.2]))
            np.testing.assert_allclose(seen, path.states[0, k + 1], atol=1e-14)
            assert terminated == (k + 1 == end and bool(path.terminated[0]))
            paid = 3 + float(STEPS.nodes[end]) + float(path.states[0, -1, 0]) if terminated else 0
            assert reward == pytest.approx(paid - 0.2)
        assert truncated == (not terminated)
        draws += terminated
        with pytest.raises(ValueError, match="over"):
            one.step(np.array([0.2]))
    assert 5 < draws < paths


def test_episodes_of_different_length_become_paths_with_ends():
    """Terminated: over. Truncated: broken off."""
    policy = ctrl.DeterministicPolicy(lambda t, x: 0.2 + 0 * x)
    walled = ControlEnv(WALLED, STEPS, np.array([0.1]), 1, observe_time=False)
    generator = torch.Generator()
    paths = sample(walled, policy, STEPS, 20, seed=0, generator=generator)
    left = paths.states[:, -1, 0].abs() == 0.5
    assert torch.equal(paths.terminated, left)
    assert left.any()
    assert not left.all()
    assert bool((paths.ends < 5).any())
    bare = ctrl.ControlProblem(WALLED.sde, math.inf, discount=0.3)
    along = ctrl.value.values(lambda t, x: 7 + 0 * x[:, 0], bare, paths)
    assert torch.equal(along[:, -1], torch.where(left, 0.0, 7.0).double())
    short = sample(env(), DRAWN, ctrl.uniform_grid(1.0, 5), 2, seed=0, generator=generator)
    assert short.ends.tolist() == [3, 3]
    assert short.terminated.all()
    outside = lambda rng: rng.standard_normal(1) + 9
    with pytest.raises(ValueError, match="domain must contain a start"):
        ControlEnv(WALLED, STEPS, outside, 1)


DRAWN = ctrl.GaussianPolicy(lambda t, x: x[:, :2], 0.3)


def test_discrete_actions_are_refused():
    g, policy = torch.Generator(), DRAWN
    with pytest.raises(TypeError, match="continuous"):
        sample(gymnasium.make("CartPole-v1"), policy, GRID, 1, seed=0, generator=g)
    with pytest.raises(ValueError, match="paths"):
        sample(env(), policy, GRID, 0, seed=0, generator=g)


def test_importing_ctrl_imports_neither_gymnasium_nor_matplotlib():
    code = "import sys, ctrl; sys.exit(bool({'gymnasium', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.filterwarnings("default")
def test_stable_baselines_trains_on_a_control_problem():
    """Steer a drifting particle to 1; the untrained policy does nothing much."""
    baselines = pytest.importorskip("stable_baselines3")
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.2)
    steer = ctrl.ControlProblem(
        sde, 1.0, lambda t, x, a: -4 * (x - 1).square().sum(1) - 0.05 * a.square().sum(1)
    )
    one = ControlEnv(steer, ctrl.uniform_grid(1.0, 10), np.zeros(1), 1, action_bound=4.0)
    model = baselines.PPO("MlpPolicy", one, n_steps=500, seed=0, learning_rate=3e-3, device="cpu")

    def mean_return():
        total = 0.0
        for episode in range(30):
            observed, _ = one.reset(seed=episode)
            for _ in range(10):
                action, _ = model.predict(observed, deterministic=True)
                observed, reward, *_ = one.step(action)
                total += reward / 30
        return total

    before = mean_return()
    model.learn(5000)
    # standing still pays about -4.6, the optimum about -1.3
    assert mean_return() > before + 1.5
