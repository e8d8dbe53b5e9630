"""Grids, paths, integrals along them, rewards and returns."""

import itertools
import math
from dataclasses import replace

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctrl
from tests.ctrl import lq_chain as lq


@pytest.mark.parametrize(
    ("nodes", "error"),
    [
        ([0.0], ValueError),
        ([0.0, 0.0], ValueError),
        ([0.0, 0.5, 0.4], ValueError),
        ([0.0, math.nan], ValueError),
        ([0.0, math.inf], ValueError),
    ],
)
def test_bad_grids_are_refused(nodes, error):
    with pytest.raises(error, match="nodes"):
        ctrl.TimeGrid(torch.tensor(nodes))


def test_integer_grids_and_bad_steps_are_refused():
    with pytest.raises(TypeError, match="nodes"):
        ctrl.TimeGrid(torch.tensor([0, 1]))
    for steps in (0, -1, True):
        with pytest.raises(ValueError, match="steps"):
            ctrl.uniform_grid(1.0, steps)
    with pytest.raises(ValueError, match="horizon"):
        ctrl.uniform_grid(0.0, 3)


def test_returns_to_go_discount_every_step():
    problem = ctrl.ControlProblem(
        ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 1.0),
        1.0,
        running_reward=lambda t, x, a: x[:, 0] * (1 + t),
        terminal_reward=lambda x: 2 * x[:, 0],
        discount=0.7,
    )
    grid = ctrl.TimeGrid(torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64))
    states = torch.tensor([[[1.5], [-0.4], [0.9]]], dtype=torch.float64)
    paths = ctrl.Paths(states, torch.zeros(1, 2, 1).double(), None, grid)
    last = 2 * 0.9
    middle = -0.4 * 1.3 * 0.7 + math.exp(-0.7 * 0.7) * last
    first = 1.5 * 0.3 + math.exp(-0.7 * 0.3) * middle
    expected = torch.tensor([[first, middle, last]], dtype=torch.float64)
    torch.testing.assert_close(ctrl.returns_to_go(problem, paths), expected, rtol=1e-12, atol=0)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8))
def test_grids_are_refused_exactly_where_they_do_not_increase(nodes):
    tensor = torch.tensor(nodes, dtype=torch.float64)
    if all(a < b for a, b in itertools.pairwise(nodes)):
        grid = ctrl.TimeGrid(tensor)
        assert len(grid.steps) == len(nodes) - 1
        assert bool((grid.steps > 0).all())
    else:
        with pytest.raises(ValueError, match="nodes must increase strictly"):
            ctrl.TimeGrid(tensor)


def test_wrong_types_of_grids_are_named():
    with pytest.raises(TypeError, match="nodes"):
        ctrl.TimeGrid([0.0, 1.0])  # type: ignore[arg-type]  # the wrong type is the test
    for horizon in ("1", math.nan, math.inf, -1.0):
        with pytest.raises((ValueError, TypeError), match="horizon"):
            ctrl.uniform_grid(horizon, 3)  # type: ignore[arg-type]  # the wrong type is the test
    with pytest.raises((ValueError, TypeError), match="steps"):
        ctrl.uniform_grid(1.0, 2.5)  # type: ignore[arg-type]  # the wrong type is the test


def test_a_grid_too_fine_for_its_precision_is_refused():
    with pytest.raises(ValueError, match="increase strictly"):
        ctrl.TimeGrid(1000 + torch.linspace(0, 1e-4, 11))


def test_integrals_along_a_path_read_the_left_end(generator):
    grid = ctrl.TimeGrid(torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64))
    rates = torch.tensor([[2.0, 5.0], [-1.0, 4.0]], dtype=torch.float64)
    integral = ctrl.time_integral(rates, grid)
    torch.testing.assert_close(integral, torch.tensor([0.6 + 3.5, -0.3 + 2.8]).double())
    w = torch.randn(2, 2, 3, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(ctrl.ito_sum(2 * w, w), 2 * w.square().sum((1, 2)))
    with pytest.raises((ValueError, TypeError), match="rates"):
        ctrl.time_integral(rates[:, :1], grid)
    with pytest.raises((ValueError, TypeError), match="integrand"):
        ctrl.ito_sum(w[:, :, :1], w)


GRID = ctrl.TimeGrid(torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64))
STATES = torch.tensor([[[1.5], [-0.4], [0.9]], [[0.2], [0.7], [1.1]]], dtype=torch.float64)
PATHS = ctrl.Paths(STATES, STATES[:, :2], None, GRID)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"states": STATES[:, :2]}, "states"),
        ({"actions": STATES}, "actions"),
        ({"actions": STATES[:1, :2]}, "actions"),
        ({"increments": STATES}, "increments"),
        ({"weights": torch.ones(3).double()}, "weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_paths_whose_parts_do_not_fit_are_refused(change, name):
    whole = {"states": STATES, "actions": None, "increments": None, "grid": GRID}
    with pytest.raises((ValueError, TypeError), match=name):
        ctrl.Paths(**whole | change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"running_reward": lambda t, x, a: x}, r"running_reward must return \[2\]"),
        ({"running_reward": lambda t, x, a: x[:, 0] / 0}, "running_reward must be finite"),
        ({"terminal_reward": lambda x: x}, r"terminal_reward must return \[2\]"),
        ({"terminal_reward": lambda x: x.mean()}, r"terminal_reward must return \[2\]"),
        ({"terminal_reward": lambda x: x[:, 0] * math.nan}, "terminal_reward must be finite"),
        ({"terminal_reward": lambda x: x[:, 0], "horizon": 2.0}, "end at the horizon 2"),
        ({"temperature": 0.1}, "temperature"),
    ],
)
def test_rewards_that_broadcast_or_are_paid_elsewhere_are_refused(settings, message):
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 1.0)
    problem = ctrl.ControlProblem(**{"sde": sde, "horizon": 1.0} | settings)
    with pytest.raises(ValueError, match=message):
        ctrl.returns_to_go(problem, PATHS)


def test_running_rewards_need_the_actions():
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 1.0)
    blind = ctrl.Paths(STATES, None, None, GRID)
    assert not ctrl.running_rewards(ctrl.ControlProblem(sde, 1.0), blind).any()
    problem = ctrl.ControlProblem(sde, 1.0, running_reward=lambda t, x, a: a[:, 0])
    with pytest.raises(ValueError, match="actions"):
        ctrl.running_rewards(problem, blind)


# --- all steps at once, observed rewards, entropy


def chain():
    theta = lq.parameters()
    problem, policy = lq.problem(), lq.policy(*theta)
    return problem, policy, lq.paths(problem, policy, nodes=2)


def test_all_steps_at_once_is_one_step_after_the_other():
    _, _, paths = chain()

    def vectorisable(t, x, a):
        return t * x[:, 0] + a[:, 0]

    def branching(t, x, a):
        return vectorisable(t, x, a) if float(t) >= 0 else x[:, 0]  # a value decides: no vmap

    one = ctrl.paths.over_steps(vectorisable, paths, paths.actions)
    other = ctrl.paths.over_steps(branching, paths, paths.actions)
    torch.testing.assert_close(one, other, rtol=1e-15, atol=1e-15)
    nodes = ctrl.paths.over_nodes(lambda t, x: t * x[:, 0], paths)
    torch.testing.assert_close(nodes, paths.grid.nodes * paths.states[..., 0])


def test_a_fault_of_the_callers_function_is_raised_not_swallowed():
    _, _, paths = chain()
    for fault in (ValueError("mine"), RuntimeError("mine"), KeyError("mine")):

        def broken(t, x, a, fault=fault):
            raise fault

        with pytest.raises(type(fault), match="mine"):
            ctrl.paths.over_steps(broken, paths, paths.actions)


def test_observed_rewards_replace_the_problems_and_are_never_added_to_them():
    problem, _, paths = chain()
    paid = replace(paths, rewards=torch.ones(len(paths.states), 3, dtype=torch.float64))
    unpaid = replace(problem, running_reward=None, temperature=0.0)
    assert ctrl.running_rewards(unpaid, paid) is paid.rewards
    with pytest.raises(ValueError, match="running_reward"):
        ctrl.running_rewards(problem, paid)
    with pytest.raises((ValueError, TypeError)):
        replace(paths, rewards=torch.ones(len(paths.states), 2, dtype=torch.float64))


def test_entropy_is_paid_by_the_log_density_of_what_was_drawn():
    problem, policy, paths = chain()
    plain = ctrl.running_rewards(problem, paths)
    rewards = ctrl.regularised_rewards(problem, paths, policy)
    k = 1
    share = policy.log_prob(paths.grid.nodes[k], paths.states[:, k], paths.actions[:, k])
    by_hand = plain[:, k] - lq.TEMPERATURE * share * paths.grid.steps[k]
    torch.testing.assert_close(rewards[:, k], by_hand, rtol=1e-13, atol=1e-14)
    for nobody in (None, ctrl.DeterministicPolicy(lambda t, x: x)):
        with pytest.raises(ValueError, match="policy"):
            ctrl.regularised_rewards(problem, paths, nobody)


def test_the_mean_return_is_the_value_of_the_chain():
    theta = lq.parameters()
    problem, policy = lq.problem(), lq.policy(*theta)
    paths = lq.paths(problem, policy)
    mean_return = float((paths.weights @ ctrl.returns_to_go(problem, paths, policy)[:, 0]).detach())
    expected = float(lq.performance(lq.values(*theta)).detach())
    assert mean_return == pytest.approx(expected, rel=1e-12)  # 5 ** 6 weighted paths


def test_an_endless_problem_never_ends():
    endless = replace(lq.problem(), horizon=math.inf, terminal_reward=None)
    assert not ctrl.paths.ends_at_horizon(endless, lq.GRID)
    assert ctrl.paths.ends_at_horizon(lq.problem(), lq.GRID)


# --- every part is checked at every entry, and precision is the states'

ROW = torch.ones(2, 2, dtype=torch.float64)
PARTS = {
    "states": STATES,
    "actions": STATES[:, :2],
    "increments": STATES[:, :2],
    "weights": torch.full((2,), 0.5, dtype=torch.float64),
    "rewards": ROW,
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_with_one_bad_entry_or_of_integers_is_refused(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    ctrl.Paths(**PARTS, grid=GRID)
    for index in ((0,), (-1,)):
        for value in (math.nan, math.inf, -math.inf):
            spoilt = PARTS[name].clone()
            spoilt.view(-1)[index] = value
            where = {"weights": "sum to 1"}.get(name, "not finite from node")
            with pytest.raises(ValueError, match=f"{name}.*{where}"):
                ctrl.Paths(**PARTS | {name: spoilt}, grid=GRID)
    with pytest.raises(TypeError, match=f"{name} must be floating point"):
        ctrl.Paths(**PARTS | {name: PARTS[name].long()}, grid=GRID)
    for part in ("weights", "rewards"):
        with pytest.raises(ValueError, match=f"{part} must be"):
            ctrl.Paths(**PARTS | {part: PARTS[part][..., None]}, grid=GRID)


def test_the_first_node_that_is_not_finite_is_named():
    """Of any path and coordinate; opposite infinities do not cancel."""
    spoilt = torch.zeros(3, 3, 2, dtype=torch.float64)
    spoilt[0, 2, 0], spoilt[2, 1, 1] = math.inf, -math.inf
    with pytest.raises(ValueError, match=r"states are not finite from node 1 \(t = 0.3\)"):
        ctrl.Paths(spoilt, None, None, GRID)


def test_finite_numbers_whose_sum_overflows_are_good():
    huge = torch.full((2, 3, 1), torch.finfo(torch.float64).max, dtype=torch.float64)
    assert ctrl.Paths(huge, None, None, GRID).states is huge


def test_all_integrals_keep_the_precision_of_the_paths():
    problem, policy, paths = chain()
    half = replace(
        paths, states=paths.states.float(), actions=paths.actions.float(), increments=None,
        weights=None,
    )  # fmt: skip
    assert ctrl.time_integral(torch.ones(2, 2), GRID).dtype == torch.float32
    seen = []
    ctrl.paths.over_steps(lambda t, x, a: seen.append(t.dtype) or x[:, 0], half, half.actions)
    ctrl.paths.over_nodes(lambda t, x: seen.append(t.dtype) or x[:, 0], half)
    assert set(seen) == {torch.float32}
    assert ctrl.running_rewards(problem, half).dtype == torch.float32
    unpaid = replace(problem, running_reward=None)
    assert ctrl.running_rewards(unpaid, half).dtype == torch.float32
    assert ctrl.regularised_rewards(problem, half, policy).dtype == torch.float32
    assert ctrl.returns_to_go(problem, half, policy).dtype == torch.float32


@pytest.mark.parametrize("horizon", [1e-3, 0.9, 1e3])
def test_a_grid_ends_at_the_horizon_up_to_the_rounding_of_float32(horizon):
    problem = replace(lq.problem(), horizon=horizon)
    for gap, ends in ((5e-7, True), (-5e-7, True), (2e-6, False), (-2e-6, False)):
        grid = ctrl.TimeGrid(torch.tensor([0.0, horizon * (1 + gap)], dtype=torch.float64))
        assert ctrl.paths.ends_at_horizon(problem, grid) == ends


def test_rewards_and_entropy_are_read_at_their_own_times():
    moving = ctrl.GaussianPolicy(lambda t, x: (0.3 - t) * x, lambda t: 0.5 + t)
    reward = lambda t, x, a: (1 + 2 * t) * x[:, 0] - a[:, 0]
    problem = replace(lq.problem(), running_reward=reward, horizon=1.0)
    rewards = ctrl.regularised_rewards(problem, PATHS, moving)
    for k, (t, h) in enumerate(((0.0, 0.3), (0.3, 0.7))):
        x = a = STATES[:, k, 0]
        law = torch.distributions.Normal((0.3 - t) * x, 0.5 + t)
        rate = (1 + 2 * t) * x - a - lq.TEMPERATURE * law.log_prob(a)
        torch.testing.assert_close(rewards[:, k], rate * h, rtol=1e-13, atol=1e-14)


def test_a_uniform_grid_is_in_double_precision_on_the_cpu_unless_told():
    grid = ctrl.uniform_grid(0.8, 1)
    assert grid.nodes.tolist() == [0.0, 0.8]
    assert (grid.nodes.dtype, grid.nodes.device.type) == (torch.float64, "cpu")
    half = ctrl.uniform_grid(2.0, 4, dtype=torch.float32)
    torch.testing.assert_close(half.nodes, torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]))
    for nodes in (torch.zeros(1, 2), torch.tensor([0.0, math.inf]), torch.tensor([-math.inf, 0.0])):
        with pytest.raises((ValueError, TypeError)):
            ctrl.TimeGrid(nodes)


def test_without_a_running_reward_every_step_of_every_path_is_paid_nothing():
    silent = replace(lq.problem(), running_reward=None)
    three = ctrl.Paths(torch.ones(3, 3, 1, dtype=torch.float64), None, None, GRID)
    assert ctrl.running_rewards(silent, three).tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize(("megabytes", "calls"), [(1, 2), (2, 4), (5, 8)])
def test_many_steps_are_taken_four_megabytes_of_states_at_a_time(megabytes, calls):
    """The widest of all arguments counts."""
    states = torch.zeros(1, 9, megabytes * 2**18)
    paths = ctrl.Paths(states, torch.zeros(1, 8, 1), None, ctrl.uniform_grid(1.0, 8))
    seen = []
    each_step = ctrl.paths.over_steps(
        lambda t, x, a: seen.append(1) or t + x[:, 0] + a[:, 0], paths, paths.actions
    )
    assert len(seen) == calls
    torch.testing.assert_close(each_step[0], paths.grid.nodes[:-1].float())


def test_numbers_that_are_not_finite_are_counted_by_path():
    values = torch.zeros(3, 4)
    assert ctrl.returns.all_finite("it", values) is values
    values[0, 2] = math.nan
    with pytest.raises(ValueError, match="it must be finite, but it is not on 1 of 3 paths"):
        ctrl.returns.all_finite("it", values)
    values[2] = math.inf
    with pytest.raises(ValueError, match="not on 2 of 3 paths"):
        ctrl.returns.all_finite("it", values)
