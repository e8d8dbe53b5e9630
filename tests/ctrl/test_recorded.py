"""Recorded episodes: each counts as it would alone; bad data are refused by name; replay."""

import math

import numpy as np
import pytest
import torch

import ctrl
from ctrl.recorded import Episode, Replay, episodes_of, paths_of, paths_of_arrays

PROBLEM = ctrl.ControlProblem(None, math.inf, discount=0.3, temperature=0.2)
POLICY = ctrl.GaussianPolicy(lambda t, x: (t - 0.5) * x, lambda t: 0.3 + t)
WITH_MEMORY = ctrl.PolicyWithMemory(
    lambda x: x, lambda t, x, a, m: 0.5 * m + (1 + t) * a, lambda m: ctrl.GaussianPolicy(
        lambda t, x: m - x, 0.4
    )
)  # fmt: skip


def value(t, x):
    return torch.exp(-t) * x[:, 0].square() + t


def q(t, x, a):
    return (1 + t) * (x * a).sum(1) - a.square().sum(1)


def episode(steps, seed, *, terminated, rewards=True, start=0.0):
    """Of random numbers."""
    random = np.random.default_rng(seed)
    times = start + np.concatenate([[0.0], random.uniform(0.05, 0.3, steps)]).cumsum()
    states, actions = random.normal(size=(steps + 1, 2)), random.normal(size=(steps, 2))
    paid = random.normal(size=steps) if rewards else None
    return Episode(times, states, actions, paid, terminated=terminated)


EPISODES = [
    episode(4, 1, terminated=True),
    episode(1, 2, terminated=False),
    episode(6, 3, terminated=False, start=0.4),
    episode(3, 4, terminated=True, start=0.1),
]
ESTIMATORS = {
    "martingale increments": lambda p: ctrl.martingale.increments(value, PROBLEM, p, POLICY).sum(1),
    "ctd0": lambda p: ctrl.martingale.ctd0(value, PROBLEM, p, POLICY),
    "ctd_lambda": lambda p: ctrl.martingale.ctd_lambda(value, PROBLEM, p, 0.7, POLICY),
    "orthogonality": lambda p: ctrl.martingale.orthogonality(
        ctrl.martingale.features_along(lambda t, x: (1 + t) * x), value, PROBLEM, p, POLICY
    ),
    "q-learning": lambda p: ctrl.q_learning.orthogonality_loss(value, q, PROBLEM, p),
    "q-learning moments": lambda p: ctrl.q_learning.orthogonality(
        lambda p: ctrl.paths.over_steps(lambda t, x, a: (1 + t) * x * a, p, p.actions),
        value, q, PROBLEM, p,
    ),
    "policy gradient": lambda p: ctrl.policy_gradient.temporal_difference_gradient(
        PROBLEM, POLICY, value, p, rate=0.5
    ),
    "entropy of a policy with memory": lambda p: ctrl.regularised_rewards(
        PROBLEM, p, WITH_MEMORY
    ).sum(1),
}  # fmt: skip


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_episode_counts_as_it_would_alone(name):
    """Beside longer ones on other times, and by itself on a common grid."""
    estimator = ESTIMATORS[name]
    together = estimator(paths_of(EPISODES))
    for i, one in enumerate(EPISODES):
        alone = estimator(paths_of([one]))
        torch.testing.assert_close(together[i], alone[0], rtol=1e-12, atol=1e-12)


def test_returns_of_episodes_that_are_over():
    over = [EPISODES[0], EPISODES[3]]
    problem = ctrl.ControlProblem(None, math.inf, discount=0.3)
    returns = ctrl.returns_to_go(problem, paths_of(over))
    for got, one in zip(returns, over, strict=True):
        weights = torch.exp(-0.3 * (one.times[:-1] - one.times[0]))
        torch.testing.assert_close(got[0], (weights * one.rewards).sum(), rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match="2 of 4 break off before"):
        ctrl.returns_to_go(problem, paths_of(EPISODES))


def test_the_horizon_is_each_path_s_own_last_time():
    """An episode that reaches the horizon is over, whatever its number of steps."""
    times = ([0.0, 0.3, 1.0], [0.0, 1.0], [0.0, 0.2, 0.5])
    episodes = [
        Episode(t, np.ones((len(t), 1)), np.ones((len(t) - 1, 1)), terminated=False) for t in times
    ]
    problem = ctrl.ControlProblem(None, 1.0, terminal_reward=lambda x: 5 * x[:, 0])
    paths = paths_of(episodes)
    assert ctrl.paths.finished(problem, paths).tolist() == [True, True, False]
    along = ctrl.value.values(lambda t, x: 2 * x[:, 0], problem, paths)
    assert along.tolist() == [[2, 2, 5], [2, 5, 5], [2, 2, 2]]


def test_arrays_with_masks_are_the_episodes():
    paths = paths_of(EPISODES)
    nodes = paths.states.shape[1]
    counts = [len(one) + 1 for one in EPISODES]
    observed = np.arange(nodes) < np.array(counts)[:, None]
    rubbish = {
        name: torch.where(
            torch.as_tensor(observed[:, nodes - values.shape[1] :]).view(
                *values.shape[:2], *[1] * (values.ndim - 2)
            ),
            values,
            math.nan,
        ).numpy()
        for name, values in {
            "times": paths.grid.nodes,
            "states": paths.states,
            "actions": paths.actions,
            "rewards": paths.rewards,
        }.items()
    }
    again = paths_of_arrays(
        **rubbish, observed=observed, terminated=[one.terminated for one in EPISODES]
    )
    for name in ("states", "actions", "rewards", "ends", "terminated"):
        assert torch.equal(getattr(again, name), getattr(paths, name))
    assert torch.equal(again.grid.nodes, paths.grid.nodes)
    back = episodes_of(again)
    assert all(torch.equal(a.states, b.states) for a, b in zip(back, EPISODES, strict=True))
    assert [one.terminated for one in back] == [one.terminated for one in EPISODES]


def test_common_times_are_one_grid():
    paths = paths_of_arrays(
        [0.0, 0.5, 0.7], np.ones((2, 3, 1)), np.ones((2, 2, 1)), terminated=True
    )
    assert isinstance(paths.grid, ctrl.TimeGrid)
    assert paths.states.movedim(1, 0).is_contiguous()  # stored as simulated paths are


def test_what_needs_dynamics_refuses_them():
    paths = paths_of(EPISODES)
    for refuses in (
        lambda: ctrl.girsanov.path_kl(None, POLICY, POLICY, paths),
        lambda: ctrl.q_learning.q_rates(PROBLEM, value, paths),
        lambda: ctrl.policy_gradient.q_rate_gradient(PROBLEM, POLICY, value, paths),
    ):
        with pytest.raises(Exception, match=r"they were recorded|sde"):
            refuses()
    start = torch.zeros(1, 2)
    simple = ctrl.ControlProblem(None, 1.0)
    with pytest.raises(ValueError, match=r"problem\.sde must be given"):
        ctrl.simulate(simple, POLICY, start, ctrl.uniform_grid(1.0, 2), generator=torch.Generator())
    with pytest.raises(ValueError, match=r"problem\.sde must be given"):
        ctrl.q_learning.q_rate(PROBLEM, value, start[0, 0], start, start)
    box = ctrl.BlackBox(lambda t0, t1, x, a: x + a)
    still = ctrl.DeterministicPolicy(lambda t, x: x)
    paths = ctrl.simulate(simple, still, start, ctrl.uniform_grid(1.0, 2), box)
    assert paths.black_box


def shortened(**changes):
    good = {"times": [0.0, 0.5, 0.7], "states": np.ones((3, 1)), "actions": np.ones((2, 1))}
    return Episode(**{**good, "terminated": True, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"times": [0.0, 0.7, 0.5]}, r"times must increase strictly, but times\[1\] = 0\.7"),
        ({"times": [0.0, 0.5, 0.5]}, r"times must increase strictly, but times\[1\] = 0\.5"),
        ({"times": [0.0, math.nan, 0.7]}, r"times must be finite, but times\[1\]"),
        ({"times": [0.0]}, "times must be"),
        ({"states": [[1.0], [math.inf], [1.0]]}, r"states must be finite, but states\[1\]"),
        ({"states": np.ones((2, 1))}, r"states must begin with \[3\]"),
        ({"actions": np.ones((3, 1))}, r"actions must begin with \[2\], one for each step"),
        ({"rewards": [1.0]}, r"rewards must begin with \[2\]"),
        ({"rewards": [[1.0], [2.0]]}, r"rewards must be \[2\]"),
        ({"rewards": [1.0, math.nan]}, "rewards must be finite"),
        ({"states": [[True], [False], [True]]}, "states must be real numbers"),
    ],
)
def test_bad_episodes_are_refused(changes, words):
    with pytest.raises((ValueError, TypeError), match=words):
        shortened(**changes)


def test_bad_collections_are_refused():
    with pytest.raises(ValueError, match="at least one episode"):
        paths_of([])
    for other in (
        shortened(rewards=[1.0, 2.0]),
        shortened(states=np.ones((3, 2))),
        shortened(states=np.ones((3, 1), np.float32)),
    ):
        with pytest.raises(ValueError, match="episodes must be of one kind"):
            paths_of([shortened(), other])
    arrays = {"times": [0.0, 1.0, 2.0], "states": np.ones((2, 3, 1)), "actions": np.ones((2, 2, 1))}
    for mask, words in (
        ([[True, False, True], [True] * 3], "path 0 has a hole at node 1"),
        (
            [[True, True, True], [True, False, False]],
            "at least 2 nodes of each path, got 1 of path 1",
        ),
        ([[True, True]] * 2, r"observed must be boolean, \[2, 3\]"),
    ):
        with pytest.raises(ValueError, match=words):
            paths_of_arrays(**arrays, observed=np.array(mask), terminated=True)
    with pytest.raises(ValueError, match=r"actions must begin with \[2, 2\]"):
        paths_of_arrays(**{**arrays, "actions": np.ones((2, 3, 1))}, terminated=True)


def test_own_times_that_do_not_fit_are_refused():
    two = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 1.0]])
    states, ends = torch.zeros(2, 3, 1), torch.tensor([2, 1])
    ctrl.Paths(states, None, None, ctrl.paths.OwnTimes(two), ends=ends)
    with pytest.raises(ValueError, match="grid must end where the paths do"):
        ctrl.Paths(states, None, None, ctrl.paths.OwnTimes(two), ends=torch.tensor([2, 2]))
    with pytest.raises(ValueError, match="come with their ends"):
        ctrl.Paths(states, None, None, ctrl.paths.OwnTimes(two))
    for bad in ([[0.0, 1.0, 0.5]], [[0.0, 0.0, 1.0]], [[1.0, 1.0, 1.0]]):
        with pytest.raises(ValueError, match="nodes must increase strictly to a path's end"):
            ctrl.paths.OwnTimes(torch.tensor(bad))
    with pytest.raises(ValueError, match="nodes must be finite"):
        ctrl.paths.OwnTimes(torch.tensor([[0.0, math.nan]]))


def test_replay_holds_the_last_episodes_and_draws_steps_evenly():
    replay = Replay(3)
    with pytest.raises(ValueError, match="the replay must have episodes"):
        replay.sample(1, torch.Generator())
    replay.add(EPISODES)
    assert (len(replay), replay.steps) == (3, 10)
    generator = torch.Generator().manual_seed(3)
    steps = replay.sample_steps(20_000, generator)
    assert steps.actions.shape[1] == 1
    known = {float(a[0]): (i, k) for i, e in enumerate(EPISODES) for k, a in enumerate(e.actions)}
    drawn = [known[float(a)] for a in steps.actions[:, 0, 0]]
    for i, one in enumerate(EPISODES[1:], start=1):
        for k in range(len(one)):
            share = drawn.count((i, k)) / len(drawn)
            assert share == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / len(drawn)))
    for row in range(50):
        i, k = drawn[row]
        one = EPISODES[i]
        assert torch.equal(steps.states[row], one.states[k : k + 2])
        assert bool(steps.terminated[row]) == (one.terminated and k == len(one) - 1)
    whole = replay.sample(50, generator)
    assert len(whole.states) == 50
    for capacity in (0, True, 1.5):
        with pytest.raises((ValueError, TypeError), match="capacity"):
            Replay(capacity)
