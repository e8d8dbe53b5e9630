"""A path that ends early counts as it would alone, on the part of the grid that it makes."""

import math
from dataclasses import replace

import pytest
import torch

import ctrl
from ctrl import martingale as mg
from ctrl import policy_gradient as pg
from ctrl import q_learning as ql
from tests.ctrl import lq_chain as lq

ENDS = torch.tensor([1, 3, 2, 3])
POLICY = lq.policy(*lq.parameters())
MEAN = ctrl.DeterministicPolicy(POLICY.mean)
OTHER = lq.policy(*lq.parameters(-0.2, 0.1, -0.3))
Q = ql.ConsistentQ(lambda t, x, a: -(a - 0.4 * x).square().sum(1), POLICY, lq.TEMPERATURE)


def value(t, x):
    return (0.4 + t) * x[:, 0].square() - x[:, 0]


def simulated(policy, seed):
    start = torch.tensor([[0.3], [-0.5], [0.9], [0.6]], dtype=torch.float64)
    return ctrl.simulate(
        lq.problem(), policy, start, lq.GRID, generator=ctrl.noise.stream(seed, "ends")
    )


def alone(paths, i):
    """Path i and its problem, on the nodes that it makes."""
    end = int(ENDS[i])
    cut = ctrl.Paths(
        paths.states[i : i + 1, : end + 1],
        paths.actions[i : i + 1, :end],
        paths.increments[i : i + 1, :end],
        ctrl.TimeGrid(lq.NODES[: end + 1]),
    )
    return lq.problem(horizon=float(lq.NODES[end])), cut


def xi(paths):
    return torch.stack([paths.states[:, :-1, 0], 1 + 0 * paths.states[:, :-1, 0]], dim=2)


def transitions(function):
    def of(problem, paths):
        each = function(problem.sde, ctrl.EulerMaruyama(), MEAN, lq_mean(OTHER), paths)
        return each.sum(1)

    return of


def lq_mean(policy):
    return ctrl.DeterministicPolicy(policy.mean)


def view_b(problem, paths):
    plain = replace(problem, temperature=0.0)
    return pg.q_rate_gradient(plain, MEAN, value, paths, pg.Transitions(ctrl.EulerMaruyama()))


DRAWN = {
    "return": lambda p, x: ctrl.returns_to_go(p, x, POLICY)[:, 0],
    "martingale": lambda p, x: mg.increments(value, p, x, POLICY, 0.3).sum(1),
    "martingale loss": lambda p, x: mg.martingale_loss(value, p, x, POLICY),
    "orthogonality": lambda p, x: mg.orthogonality(xi, value, p, x, POLICY),
    "ctd0": lambda p, x: mg.ctd0(value, p, x, POLICY),
    "ctd lambda": lambda p, x: mg.ctd_lambda(value, p, x, 0.6, POLICY, 0.3),
    "q loss": lambda p, x: ql.martingale_loss(value, Q, p, x),
    "q orthogonality loss": lambda p, x: ql.orthogonality_loss(value, Q, p, x),
    "q orthogonality": lambda p, x: ql.orthogonality(xi, value, Q, p, x),
    "return gradient": lambda p, x: pg.return_gradient(p, POLICY, x, value),
    "difference gradient": lambda p, x: pg.temporal_difference_gradient(
        p, POLICY, value, x, rate=0.4
    ),
    "q-rate gradient": lambda p, x: pg.q_rate_gradient(p, POLICY, value, x),
    "pathwise gradient": lambda p, x: pg.pathwise_gradient(p, POLICY, value, x),
    "performance difference": lambda p, x: pg.performance_difference(p, value, POLICY, x),
    "surrogate": lambda p, x: pg.surrogate(p, value, POLICY, OTHER, x),
    "path KL": lambda p, x: ctrl.girsanov.path_kl(p.sde, POLICY, OTHER, x),
}
HELD = {
    "log-ratio": lambda p, x: ctrl.girsanov.log_ratio(p.sde, MEAN, lq_mean(OTHER), x),
    "transition log-ratio": transitions(ctrl.transitions.log_ratio),
    "transition KL": transitions(ctrl.transitions.transition_kl),
    "log-density": lambda p, x: ctrl.transitions.log_prob(p.sde, ctrl.EulerMaruyama(), MEAN, x).sum(
        1
    ),
    "view B": view_b,
}


@pytest.mark.parametrize("name", [*DRAWN, *HELD])
def test_an_estimator_counts_each_path_up_to_its_end(name):
    policy, estimator = (POLICY, DRAWN[name]) if name in DRAWN else (MEAN, HELD[name])
    paths = simulated(policy, 3)
    together = estimator(lq.problem(), ctrl.paths.stop(paths, ENDS)).detach()
    assert torch.isfinite(together).all()
    for i in range(len(ENDS)):
        problem, cut = alone(paths, i)
        torch.testing.assert_close(
            together[i : i + 1], estimator(problem, cut).detach(), rtol=1e-12, atol=1e-12
        )


def test_least_squares_weighs_the_steps_that_are_made():
    paths = simulated(POLICY, 4)
    features = lambda t, x: torch.stack([x[:, 0], x[:, 0].square()], 1)
    stopped = ctrl.paths.stop(paths, ENDS)
    fitted = mg.clstd(features, lq.problem(), stopped, POLICY)
    moments = sum(
        mg.orthogonality(mg.features_along(features), fitted, *alone(paths, i), POLICY)
        for i in range(len(ENDS))
    )
    torch.testing.assert_close(moments, torch.zeros_like(moments), rtol=0, atol=1e-10)


def test_a_path_that_breaks_off_is_worth_its_value_there():
    """And is refused where a sum to the end is asked for."""
    paths = simulated(POLICY, 5)
    over = torch.tensor([True, True, False, False])
    cut = ctrl.paths.stop(paths, ENDS, over)
    along = ctrl.value.values(value, lq.problem(), cut)
    for i, end in enumerate(ENDS.tolist()):
        state = paths.states[i : i + 1, end]
        final = bool(over[i]) or end == 3  # the horizon
        paid = lq.problem().terminal_reward(state) if final else value(lq.NODES[end], state)
        torch.testing.assert_close(along[i, end], paid[0])
    for refused in (
        lambda: ctrl.returns_to_go(lq.problem(), cut, POLICY),
        lambda: ql.martingale_loss(value, Q, lq.problem(), cut),
        lambda: pg.performance_difference(lq.problem(), value, POLICY, cut),
    ):
        with pytest.raises(ValueError, match=r"1 of 4 break off before"):
            refused()


def test_functions_are_not_called_where_a_path_rests():
    """At the end of a path they need not be finite; gradients are finite too."""
    paths = ctrl.paths.stop(simulated(POLICY, 6), ENDS)
    last = paths.states[0, 1].detach()  # where the first path rests
    singular = replace(lq.problem(), running_reward=lambda t, x, a: 1 / (x[:, 0] - last))
    assert torch.isfinite(ctrl.returns_to_go(singular, paths, POLICY)).all()
    gain = lq.parameters()[0]
    mean = lambda t, x: gain / (x - last)
    kl = ctrl.girsanov.path_kl(lq.problem().sde, ctrl.DeterministicPolicy(mean), MEAN, paths)
    slope = torch.autograd.grad(kl.sum(), gain)[0]
    assert torch.isfinite(kl).all()
    assert torch.isfinite(slope)


def test_test_functions_that_look_at_the_end_to_come_are_refused():
    paths = ctrl.paths.stop(simulated(POLICY, 7), ENDS)
    ahead = lambda x: (x.ends.unsqueeze(1) > 2).double().expand(-1, 3).unsqueeze(2)
    with pytest.raises(ValueError, match="adapted: at step 0"):
        mg.orthogonality(ahead, value, lq.problem(), paths, POLICY)
    running = lambda x: x.running.double().unsqueeze(2)  # known at the left end of a step
    assert mg.orthogonality(running, value, lq.problem(), paths, POLICY).shape == (4, 1)


STATES = torch.tensor([[[1.5], [-0.4], [0.9]], [[0.2], [0.7], [0.7]]], dtype=torch.float64)
GRID = ctrl.uniform_grid(1.0, 2)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (torch.tensor([0, 2]), "ends must be from 1 to 2"),
        (torch.tensor([-1, 2]), "ends must be from 1 to 2"),
        (torch.tensor([1, 3]), "ends must be from 1 to 2"),
        (torch.tensor([2.0, 1.0]), "ends must be a tensor of integers"),
        ([2, 1], "ends must be a tensor of integers"),
        (torch.tensor([True, True]), "ends must be a tensor of integers"),
        (torch.tensor([[2, 1]]), r"ends must be \[2\]"),
        (torch.tensor([2]), r"ends must be \[2\]"),
        (torch.tensor([1, 2]), "states must rest after the paths' ends"),
    ],
)
def test_ends_that_are_none_are_refused(ends, message, monkeypatch):
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    assert ctrl.Paths(STATES, None, None, GRID, ends=torch.tensor([2, 1])).running.tolist() == [
        [True, True], [True, False],
    ]  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        ctrl.Paths(STATES, None, None, GRID, ends=ends)


@pytest.mark.parametrize("name", ["actions", "increments", "rewards"])
def test_steps_after_the_end_are_empty(name):
    rows = torch.ones(2, 2, 1, dtype=torch.float64)
    parts = {"actions": None, "increments": None} | {
        name: rows if name != "rewards" else rows[..., 0]
    }
    with pytest.raises(ValueError, match=f"{name} must rest"):
        ctrl.Paths(STATES, **parts, grid=GRID, ends=torch.tensor([2, 1]))


def test_what_is_over_belongs_to_ends():
    over = torch.tensor([True, False])
    with pytest.raises(ValueError, match="terminated must be None"):
        ctrl.Paths(STATES, None, None, GRID, terminated=over)
    paths = ctrl.Paths(STATES, None, None, GRID, ends=torch.tensor([2, 1]))
    with pytest.raises(ValueError, match="not be after those"):
        ctrl.paths.stop(paths, torch.tensor([2, 2]))
    endless = replace(lq.problem(), horizon=math.inf, terminal_reward=None)
    assert ctrl.paths.finished(endless, paths).tolist() == [False, True]


def test_jumps_and_own_times_rest_too():
    jumps = torch.ones(2, 2, 3, dtype=torch.float64)
    paths = ctrl.Paths(STATES, None, None, GRID, jumps=jumps)
    stopped = ctrl.paths.stop(paths, torch.tensor([1, 2]))
    assert stopped.jumps.sum((1, 2)).tolist() == [3.0, 6.0]
    with pytest.raises(ValueError, match="jumps must rest"):
        replace(stopped, jumps=jumps)
    times = torch.tensor([[0.0, 0.2, 0.9], [0.0, 0.5, 0.5]], dtype=torch.float64)
    own = ctrl.Paths(STATES, None, None, ctrl.paths.OwnTimes(times), ends=torch.tensor([2, 1]))
    assert ctrl.paths.stop(own, torch.tensor([1, 1])).grid.nodes.tolist() == [
        [0.0, 0.2, 0.2], [0.0, 0.5, 0.5],
    ]  # fmt: skip
