"""What users bring may not spoil stored paths, nor be taken for what it is not."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import ctrl
from ctrl import girsanov, transitions
from ctrl import martingale as mg
from ctrl import policy_gradient as pg
from ctrl import q_learning as ql
from ctrl.user_functions import takes

GRID = ctrl.uniform_grid(0.8, 4)
START = torch.linspace(-1.1, 0.9, 6, dtype=torch.float64).view(3, 2)
SDE = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.4)
PROBLEM = ctrl.ControlProblem(
    SDE, 0.8, lambda t, x, a: -a.square().sum(1), lambda x: x.sin().sum(1), 0.3, 0.1
)
DRAWN = ctrl.GaussianPolicy(lambda t, x: -0.6 * x, 0.5)
MEAN = ctrl.DeterministicPolicy(lambda t, x: -0.6 * x)
OTHER = ctrl.DeterministicPolicy(lambda t, x: 0.2 * x)
EULER = ctrl.EulerMaruyama()


def rolled(policy=DRAWN, sde=SDE, **settings):
    problem = ctrl.ControlProblem(sde, 0.8)
    generator = torch.Generator().manual_seed(3)
    return ctrl.simulate(problem, policy, START, GRID, generator=generator, **settings)


def value(t, x):
    return (1 + t) * x.sin().sum(1)


# --- functions that write into their input -------------------------------------------------------


def clamped(t, x, *rest):
    """Like a network that begins with ReLU(inplace=True)."""
    return x.mul_(0.7)


def pushed(t, x, a):
    return a.mul_(0.7) - x


WRITERS = {
    "policy.mean": (ctrl.DeterministicPolicy(clamped), SDE),
    "drift": (MEAN, ctrl.ControlledSDE(clamped, lambda t, x: 0.4)),
    "drift of the action": (MEAN, ctrl.ControlledSDE(pushed, lambda t, x: 0.4)),
    "diffusion": (MEAN, ctrl.ControlledSDE(lambda t, x, a: a, clamped)),
}


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("solver", [EULER, ctrl.Milstein(), ctrl.TorchSDE("srk", dt=0.1)])
@pytest.mark.parametrize("name", WRITERS)
def test_what_writes_into_the_states_is_named(name, solver, differentiable):
    policy, sde = WRITERS[name]
    words = f"{name.split()[0]} must not write"
    with pytest.raises(ValueError, match=words):
        rolled(policy, sde, solver=solver, differentiable=differentiable)
    problem = ctrl.ControlProblem(sde, 0.8)
    with pytest.raises(ValueError, match=words):
        ctrl.simulate_end(
            problem, policy, START, GRID, solver, generator=torch.Generator().manual_seed(3)
        )
    if name != "diffusion":  # the shift of a control-free diffusion is not asked for its argument
        with pytest.raises(ValueError, match=words):
            girsanov.path_kl(sde, policy, OTHER, rolled())


def test_functions_along_stored_paths_may_not_write_either():
    square = lambda t, x, *rest: x.mul_(0.7).square().sum(1)
    writer = replace(PROBLEM, running_reward=square, temperature=0.0)
    ends = replace(PROBLEM, terminal_reward=lambda x: x.mul_(0.7).sum(1))
    for call in (
        lambda paths: ctrl.value.values(square, PROBLEM, paths),
        lambda paths: ctrl.running_rewards(writer, paths),
        lambda paths: ctrl.returns_to_go(ends, paths, DRAWN),
        lambda paths: ql.rates(square, paths),
        lambda paths: ql.q_rates(writer, value, paths),
        lambda paths: pg.return_gradient(PROBLEM, ctrl.GaussianPolicy(clamped, 0.5), paths),
    ):
        with pytest.raises(ValueError, match="must not write into its inputs"):
            call(rolled())


def test_a_function_that_begins_with_a_copy_may_do_as_it_likes():
    policy = ctrl.DeterministicPolicy(lambda t, x: x.clone().mul_(-0.6))
    assert torch.equal(rolled(policy).states, rolled(MEAN).states)


def test_in_inference_mode_a_writer_is_given_a_copy():
    """Tensors made there do not tell that they were written to."""
    policy, _ = WRITERS["policy.mean"]
    with torch.inference_mode():
        spoilt = ctrl.DeterministicPolicy(lambda t, x: x.mul_(-0.6))
        assert torch.equal(rolled(spoilt).states, rolled(MEAN).states)
        paths = rolled(MEAN)
        before = paths.states.clone()
        girsanov.path_kl(SDE, policy, OTHER, paths)
        ctrl.value.values(lambda t, x: x.mul_(0.7).sum(1), PROBLEM, paths)
        assert torch.equal(paths.states, before)


# --- policies that are no functions of (t, x) ----------------------------------------------------


class Smoothed:
    """An exponential average of the states it has seen."""

    seen = None

    def __call__(self, t, x):
        self.seen = x if self.seen is None else 0.8 * self.seen + 0.2 * x
        return -0.5 * self.seen


def along_paths(policy, fixed, paths):
    """Everything that evaluates a policy along stored paths."""
    plain = replace(PROBLEM, temperature=0.0)
    view = pg.Transitions(EULER)
    if policy.is_random:
        return [
            lambda: pg.return_gradient(plain, policy, paths),
            lambda: pg.q_rate_gradient(plain, policy, value, paths),
            lambda: pg.pathwise_gradient(plain, policy, value, paths),
            lambda: pg.performance_difference(PROBLEM, value, policy, paths),
            lambda: pg.surrogate(plain, value, policy, DRAWN, paths),
            lambda: pg.surrogate(plain, value, DRAWN, policy, paths),
            lambda: mg.increments(value, PROBLEM, paths, policy),
            lambda: ctrl.returns_to_go(PROBLEM, paths, policy),
        ]
    return [
        lambda: girsanov.path_kl(SDE, policy, OTHER, paths),
        lambda: girsanov.path_kl(SDE, fixed, policy, paths),
        lambda: girsanov.log_ratio(SDE, policy, OTHER, paths),
        lambda: transitions.log_prob(SDE, EULER, policy, paths),
        lambda: transitions.log_ratio(SDE, EULER, OTHER, policy, paths),
        lambda: pg.temporal_difference_gradient(plain, policy, value, paths, view),
    ]


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_policy_with_a_memory_is_refused_where_it_is_evaluated_along_paths(random, steps):
    make = (lambda mean: ctrl.GaussianPolicy(mean, 0.5)) if random else ctrl.DeterministicPolicy
    grid = ctrl.uniform_grid(0.8, steps)
    paths = ctrl.simulate(
        ctrl.ControlProblem(SDE, 0.8), make(Smoothed()), START, grid,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    many = len(along_paths(make(Smoothed()), MEAN, paths))
    for index in range(many):
        with pytest.raises(ValueError, match="a function of \\(t, x\\) alone"):
            along_paths(make(Smoothed()), MEAN, paths)[index]()


def test_dropout_counts_as_a_memory_until_it_is_switched_off():
    network = torch.nn.Sequential(
        torch.nn.Linear(2, 16), torch.nn.Dropout(), torch.nn.Linear(16, 2)
    )
    policy = ctrl.DeterministicPolicy(lambda t, x: network.double()(x))
    paths = rolled(MEAN)
    with pytest.raises(ValueError, match="dropout"):
        girsanov.path_kl(SDE, policy, OTHER, paths)
    network.eval()
    assert bool(torch.isfinite(girsanov.path_kl(SDE, policy, OTHER, paths)).all())


# --- paths that the problem's equation did not make ----------------------------------------------


def test_paths_of_a_black_box_are_refused_where_the_dynamics_are_needed():
    jump = ctrl.BlackBox(lambda t0, t1, x, a: x + 0.7 * (t1 - t0).to(x))
    plain = replace(PROBLEM, temperature=0.0)
    still, drawn = rolled(MEAN, solver=jump), rolled(DRAWN, solver=jump)
    view = pg.Transitions(EULER)
    for call in (
        lambda: ql.q_rates(plain, value, drawn),
        lambda: pg.performance_difference(plain, value, DRAWN, drawn),
        lambda: pg.surrogate(plain, value, DRAWN, DRAWN, drawn),
        lambda: pg.q_rate_gradient(plain, DRAWN, value, drawn),
        lambda: pg.pathwise_gradient(plain, DRAWN, value, drawn),
        lambda: pg.q_rate_gradient(plain, MEAN, value, still, view),
        lambda: pg.return_gradient(plain, MEAN, still, decisions=view),
        lambda: girsanov.path_kl(SDE, MEAN, OTHER, still),
        lambda: girsanov.terminal_kl_bound(SDE, MEAN, OTHER, still),
        lambda: transitions.log_prob(SDE, EULER, MEAN, still),
        lambda: transitions.log_ratio(SDE, EULER, MEAN, OTHER, still),
        lambda: ql.q_rates(plain, value, replace(drawn, grid=drawn.grid)),
    ):
        with pytest.raises(ValueError, match="black box simulated them"):
            call()


def test_what_learns_from_paths_alone_takes_those_of_a_black_box():
    """For a drift of 0.7 whatever the action, V = 0.7 (T - t) + x solves reward 0, terminal x."""
    jump = ctrl.BlackBox(lambda t0, t1, x, a: x + 0.7 * (t1 - t0).to(x))
    problem = ctrl.ControlProblem(SDE, 0.8, terminal_reward=lambda x: x[:, 0])
    exact = lambda t, x: x[:, 0] + 0.7 * (0.8 - t)
    paths = rolled(DRAWN, solver=jump)
    nothing = lambda t, x, a: 0 * x[:, 0]
    zeros = torch.zeros(3, dtype=torch.float64)
    close = {"rtol": 0, "atol": 1e-14}
    torch.testing.assert_close(mg.martingale_loss(exact, problem, paths), zeros, **close)
    torch.testing.assert_close(ql.martingale_loss(exact, nothing, problem, paths), zeros, **close)
    dm = mg.increments(exact, problem, paths)
    torch.testing.assert_close(dm, torch.zeros_like(dm), **close)
    for loss in (
        pg.return_gradient(problem, DRAWN, paths),
        pg.temporal_difference_gradient(problem, DRAWN, exact, paths),
    ):
        assert bool(torch.isfinite(loss).all())


# --- grids that end early ------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1.3, float("inf")])
def test_returns_need_a_grid_to_the_horizon(horizon):
    """V(t) = 2 (horizon - t): a grid to 0.8 would give 1.6 for it."""
    problem = ctrl.ControlProblem(SDE, horizon, lambda t, x, a: 2 + 0 * x[:, 0], discount=0.2)
    paths = rolled()
    for call in (
        lambda: ctrl.returns_to_go(problem, paths),
        lambda: pg.return_gradient(problem, DRAWN, paths),
        lambda: mg.martingale_loss(value, problem, paths),
        lambda: ql.martingale_loss(value, lambda t, x, a: 0 * x[:, 0], problem, paths),
    ):
        with pytest.raises(ValueError, match=r"grid must end at the horizon|must be finite"):
            call()
    if horizon < 2:
        for call in (
            lambda: pg.performance_difference(problem, value, DRAWN, paths),
            lambda: pg.surrogate(problem, value, DRAWN, DRAWN, paths),
        ):
            with pytest.raises(ValueError, match="grid must end at the horizon"):
                call()
    rest = lambda t: 2 * -torch.expm1(-0.2 * (horizon - t)) / 0.2
    exact = lambda t, x: rest(t) + 0 * x[:, 0]
    # with a value at its end a short grid is right: dM of the exact V is its O(h^2) alone
    dm = mg.increments(exact, problem, paths)
    h = GRID.steps
    expected = 2 * h + torch.exp(-0.2 * h) * rest(GRID.nodes[1:]) - rest(GRID.nodes[:-1])
    torch.testing.assert_close(dm, expected.expand_as(dm), rtol=0, atol=1e-13)
    assert float(dm.abs().max()) < 0.05


# --- what paths are made of ----------------------------------------------------------------------

THIRDS = torch.full((3,), 1 / 3, dtype=torch.float64)


@pytest.mark.parametrize(
    "weights",
    [torch.ones(3), 1.001 * THIRDS, torch.tensor([0.7, 0.5, -0.2]), THIRDS * float("nan")],
)
def test_weights_that_are_no_probabilities_are_refused(weights):
    with pytest.raises(ValueError, match="weights must be non-negative and sum to 1"):
        replace(rolled(), weights=weights.double())
    assert replace(rolled(), weights=THIRDS.float()).weights is not None


def test_arrays_and_lists_are_named_as_what_they_are(monkeypatch):
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    states, actions = np.zeros((3, 5, 2)), np.zeros((3, 4, 2))
    for argument, name in (
        ((states, None, None), "states"),
        ((torch.zeros(3, 5, 2), actions, None), "actions"),
        ((torch.zeros(3, 5, 2), None, actions.tolist()), "increments"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a torch tensor.*as_tensor"):
            ctrl.Paths(*argument, grid=GRID)
    with pytest.raises(TypeError, match="grid must be a TimeGrid"):
        ctrl.Paths(torch.zeros(3, 5, 2), None, None, grid=GRID.nodes)


def test_coefficients_of_the_wrong_arguments_are_refused_when_they_are_given():
    two, three = (lambda t, x: 0.4), (lambda t, x, a: 0.4)
    with pytest.raises(TypeError, match="controls_diffusion=True"):
        ctrl.ControlledSDE(three, three)
    with pytest.raises(TypeError, match=r"diffusion must take \(t, states, actions\)"):
        ctrl.ControlledSDE(three, two, controls_diffusion=True)
    with pytest.raises(TypeError, match="drift must take three"):
        ctrl.ControlledSDE(two, two)
    ctrl.ControlledSDE(torch.add, torch.add)  # a built-in does not tell


def test_how_many_arguments_a_function_takes():
    functions = [lambda: 0, lambda a: 0, lambda a, b=1: 0, lambda *a: 0, lambda a, *, b: 0]
    expected = {(0, 0), (1, 1), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)}
    counts_that_fit = {
        (k, count) for (k, f), count in itertools.product(enumerate(functions), range(3))
        if takes(f, count)
    }  # fmt: skip
    assert counts_that_fit == expected


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"generator": 0}, TypeError, "torch.Generator.*manual_seed"),
        ({}, ValueError, "got neither"),
        ({"noise": torch.zeros(3, 4, 2)}, TypeError, "ctrl.Noise"),
    ],
)
def test_a_seed_is_no_generator_and_an_array_no_noise(monkeypatch, settings, error, words):
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    with pytest.raises(error, match=words):
        ctrl.simulate(ctrl.ControlProblem(SDE, 0.8), MEAN, START, GRID, **settings)
