"""Every function that a user brings, returning what it must not: it is named, and nothing passes.

A number, None, a sum over the paths and [paths, 1] would broadcast or have derivatives of something
else; NaN would become a result.
"""

import math
from dataclasses import replace

import jaxtyping
import pytest
import torch

import ctrl
from ctrl import adjoint_matching as am
from ctrl import martingale as mg
from ctrl import policy_gradient as pg
from ctrl import q_learning as ql
from ctrl import risk_sensitive as rs

PATHS, DIM = 5, 2
GRID = ctrl.uniform_grid(0.6, 3)
START = torch.linspace(-0.7, 1.1, PATHS * DIM, dtype=torch.float64).view(PATHS, DIM)
SDE = ctrl.ControlledSDE(lambda t, x, a: a - 0.3 * x, lambda t, x: 0.5)
PROBLEM = ctrl.ControlProblem(
    SDE, 0.6, lambda t, x, a: -a.square().sum(1), lambda x: x.sin().sum(1), 0.3
)
DRAWN = ctrl.GaussianPolicy(lambda t, x: -0.6 * x, 0.4)
MEAN = ctrl.DeterministicPolicy(lambda t, x: -0.6 * x)
OTHER = ctrl.DeterministicPolicy(lambda t, x: 0.2 * x)


def rolled(policy=DRAWN, problem=PROBLEM, **settings):
    generator = torch.Generator().manual_seed(3)
    return ctrl.simulate(problem, policy, START, GRID, generator=generator, **settings)


def value(t, x):
    return (1 + t) * x.sin().sum(1)


def q(t, x, a):
    return -a.square().sum(1)


def rewarded(f):
    return replace(PROBLEM, running_reward=f)


def leaving(f):
    """What paths earn that all leave after two steps."""
    domain = ctrl.stopping.Ball(torch.zeros(DIM).double(), 9.0)
    ends, left = torch.full((PATHS,), 2), torch.ones(PATHS, dtype=torch.bool)
    paths = ctrl.paths.stop(rolled(), ends, left)
    return ctrl.returns_to_go(replace(PROBLEM, domain=domain, exit_reward=f), paths)


def jumping(intensity, sizes=lambda t, x, a: 0.1 * x):
    wrapped = ctrl.Jumps(intensity, lambda t, x, a, z: sizes(t, x, a))
    return ctrl.ControlProblem(replace(SDE, jumps=wrapped), 0.6)


ONE_A_PATH = {
    "running_reward": [
        lambda f: ctrl.returns_to_go(rewarded(f), rolled()),
        lambda f: ql.q_rates(rewarded(f), value, rolled()),
        lambda f: pg.pathwise_gradient(rewarded(f), DRAWN, value, rolled()),
        lambda f: am.lean_adjoints(rewarded(f), rolled(MEAN)),
    ],
    "terminal_reward": [
        lambda f: ctrl.returns_to_go(replace(PROBLEM, terminal_reward=lambda x: f(0, x)), rolled()),
        lambda f: mg.martingale_loss(
            value, replace(PROBLEM, terminal_reward=lambda x: f(0, x)), rolled()
        ),
        lambda f: am.lean_adjoints(
            replace(PROBLEM, terminal_reward=lambda x: f(0, x)), rolled(MEAN)
        ),
    ],
    "discount": [
        lambda f: ctrl.returns_to_go(replace(PROBLEM, discount=lambda t, x: f(t, x)), rolled()),
        lambda f: ql.q_rates(replace(PROBLEM, discount=lambda t, x: f(t, x)), value, rolled()),
    ],
    "exit_reward": [leaving],
    "value": [
        lambda f: mg.martingale_loss(f, PROBLEM, rolled()),
        lambda f: mg.ctd0(f, PROBLEM, rolled()),
        lambda f: pg.temporal_difference_gradient(PROBLEM, DRAWN, f, rolled()),
        lambda f: pg.return_gradient(PROBLEM, DRAWN, rolled(), baseline=f),
        lambda f: pg.q_rate_gradient(PROBLEM, DRAWN, f, rolled()),
        lambda f: pg.pathwise_gradient(PROBLEM, DRAWN, f, rolled()),
        lambda f: pg.pathwise_gradient(PROBLEM, MEAN, f, rolled(MEAN)),
        lambda f: pg.q_rate_gradient(
            PROBLEM, MEAN, f, rolled(MEAN), pg.Transitions(ctrl.EulerMaruyama())
        ),
        lambda f: pg.performance_difference(PROBLEM, f, DRAWN, rolled()),
        lambda f: pg.surrogate(PROBLEM, f, DRAWN, DRAWN, rolled()),
        lambda f: ql.q_rates(PROBLEM, f, rolled()),
        lambda f: ql.martingale_loss(f, q, PROBLEM, rolled()),
        lambda f: rs.increments(f, q, replace(PROBLEM, discount=0.0), rolled(), -0.7),
    ],
    "q": [
        lambda f: ql.martingale_loss(value, f, PROBLEM, rolled()),
        lambda f: rs.increments(value, f, replace(PROBLEM, discount=0.0), rolled(), -0.7),
    ],
    "intensity": [lambda f: rolled(problem=jumping(f))],
}  # fmt: skip

LIKE_STATES = {
    "drift": [
        lambda f: rolled(problem=ctrl.ControlProblem(replace(SDE, drift=f), 0.6)),
        lambda f: ql.q_rates(replace(PROBLEM, sde=replace(SDE, drift=f)), value, rolled()),
        lambda f: ctrl.girsanov.path_kl(replace(SDE, drift=f), MEAN, OTHER, rolled(MEAN)),
    ],
    "sizes": [lambda f: rolled(problem=jumping(lambda t, x, a: 9 + 0 * x[:, 0], f))],
    "solver.step": [lambda f: rolled(MEAN, solver=ctrl.BlackBox(lambda t0, t1, x, a: f(t0, x, a)))],
}

ROWS = {
    "features": [
        lambda f: mg.clstd(f, PROBLEM, rolled()),
        lambda f: mg.orthogonality(mg.features_along(f), value, PROBLEM, rolled()),
    ],
}

RIGHT = {
    "one": lambda t, x, *a: 0.3 + 0.1 * x[:, 0].square(),
    "like": lambda t, x, *a: 0.3 * x,
    "rows": lambda t, x: torch.stack([1 - t + 0 * x[:, 0], (1 - t) * x[:, 0]], dim=1),
}

NO_TENSOR = {
    "a number": lambda y: 0.3,
    "nothing": lambda y: None,
    "a list": lambda y: [0.3] * PATHS,
}
WRONG = {
    "a sum": lambda y: y.sum(),
    "a row too few": lambda y: y[:-1],
    "one row for all": lambda y: y[:1],
    "an axis more": lambda y: y.unsqueeze(-1),
}
NOT_FINITE = {
    "NaN": lambda y: y * math.nan,
    "infinite": lambda y: y / 0,
    "NaN on one path": lambda y: y * only_one(y, math.nan, 1.0),
    "a constant NaN on one path": lambda y: only_one(y, math.nan, y),
}


def only_one(y, one, others):
    """``one`` on a path of the second half, ``others`` elsewhere."""
    which = torch.arange(len(y)).view(-1, *[1] * (y.ndim - 1)) == len(y) // 2
    return torch.where(which, one, others)


def cases(spoilers):
    return list(_cases(spoilers))


def _cases(spoilers):
    for table, right in ((ONE_A_PATH, "one"), (LIKE_STATES, "like"), (ROWS, "rows")):
        for name, calls in table.items():
            for number, use in enumerate(calls):
                for kind, spoil in spoilers.items():
                    f = RIGHT[right]
                    spoilt = lambda t, x, *a, f=f, spoil=spoil: spoil(f(t, x, *a))
                    yield pytest.param(name, use, spoilt, id=f"{name} {number}, {kind}")


@pytest.fixture(autouse=True)
def production(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(("name", "use", "function"), cases(NO_TENSOR))
def test_what_is_no_tensor_is_named(name, use, function):
    with pytest.raises(TypeError, match=f"^{name} must return a tensor"):
        use(function)


@pytest.mark.parametrize(("name", "use", "function"), cases(WRONG))
def test_another_shape_is_named_and_nothing_broadcasts(name, use, function):
    with pytest.raises(ValueError, match=rf"^{name} must return .*\[{PATHS}.*got \["):
        use(function)


@pytest.mark.parametrize(("name", "use", "function"), cases(NOT_FINITE))
def test_what_is_not_finite_never_becomes_a_result(name, use, function):
    with pytest.raises(ValueError, match="finite"):
        use(function)


@pytest.mark.parametrize(("name", "use", "function"), cases({"right": lambda y: y}))
def test_the_right_function_is_taken(name, use, function):
    use(function)
