"""The q-rate by hand, and the pair's conditions on a chain that is solved exactly."""

import math
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctrl
from ctrl import martingale as mg
from ctrl import q_learning as ql
from tests.ctrl import lq_chain as lq

ROUND_OFF = {"rtol": 1e-11, "atol": 1e-12}
T = torch.tensor(0.3, dtype=torch.float64)
X = torch.tensor([[0.7], [-1.2], [0.1]], dtype=torch.float64)


def quadratic_value(t, x):
    return (0.4 * t - 0.9) * x[:, 0].square() + 0.3 * x[:, 0]


def test_q_rate_is_the_formula():
    a = torch.tensor([[0.2], [1.1], [-0.5]], dtype=torch.float64)
    problem = lq.problem()
    rates = ql.q_rate(problem, quadratic_value, T, X, a)
    x, u = X[:, 0], a[:, 0]
    curvature = 0.4 * T - 0.9
    by_hand = (
        0.4 * x**2  # d_t V
        + (lq.A * x + lq.B * u) * (2 * curvature * x + 0.3)
        + lq.S**2 * curvature  # 1/2 S^2 V''
        - 0.5 * (lq.M * x**2 + lq.N * u**2)
        - lq.DISCOUNT * quadratic_value(T, X)
    )
    torch.testing.assert_close(rates, by_hand, **ROUND_OFF)


@given(temperature=st.floats(0.05, 2.0), std=st.floats(0.1, 2.0), mean=st.floats(-1.0, 1.0))
def test_gibbs_q_is_normalised_and_consistent(temperature, std, mean):
    policy = ctrl.GaussianPolicy(lambda t, x: mean * x, std)
    q = ql.GibbsQ(policy, temperature)
    actions = mean * X[:1] + std * torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None]
    mass = torch.exp(q(T, X[:1].expand(4001, 1), actions) / temperature)
    # the trapezoid rule is exact to round-off for a Gaussian
    assert float(mass.sum() * std * 18 / 4000) == pytest.approx(1, rel=1e-12)


def test_consistent_q_has_the_mean_that_the_entropy_asks_for():
    policy = ctrl.GaussianPolicy(lambda t, x: -0.6 * x, 0.8)
    raw = lambda t, x, a: (1.3 * a - 0.7 * a**2 + 5.0 + x * a).squeeze(1)
    q = ql.ConsistentQ(raw, policy, 0.2)
    points, weights = np.polynomial.hermite_e.hermegauss(20)
    mean = torch.zeros(3, dtype=torch.float64)
    for z, w in zip(points, weights / weights.sum(), strict=True):
        a = -0.6 * X + 0.8 * z
        mean += w * (q(T, X, a) - 0.2 * policy.log_prob(T, X, a))
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-13)
    a, b = torch.full_like(X, 0.4), torch.full_like(X, -0.9)
    difference = q(T, X, a) - q(T, X, b)
    torch.testing.assert_close(difference, raw(T, X, a) - raw(T, X, b), **ROUND_OFF)


def test_gibbs_policy_is_the_maximiser_with_the_temperature_over_the_curvature():
    policy = ql.gibbs_policy(lq.problem(), quadratic_value, 1, X[0])
    # q = B a V' - N a^2 / 2 + ...: mean B V' / N, variance temperature / N
    slope = 2 * (0.4 * T - 0.9) * X + 0.3
    torch.testing.assert_close(policy.mean(T, X), lq.B * slope / lq.N, rtol=1e-9, atol=1e-9)
    scale = policy.scale_at(T, X)
    assert float(scale) == pytest.approx(math.sqrt(lq.TEMPERATURE / lq.N), rel=1e-9)


def test_gibbs_policy_of_two_coordinates_and_a_controlled_diffusion():
    n = torch.tensor([[1.0, 0.3], [0.3, 0.8]], dtype=torch.float64)
    d = torch.tensor([0.5, -0.2], dtype=torch.float64)
    sde = ctrl.ControlledSDE(
        lambda t, x, a: a[:, :1] - 0.7 * a[:, 1:],
        lambda t, x, a: (a @ d)[:, None] + 0.3 * x,
        controls_diffusion=True,
    )
    cost = lambda t, x, a: -0.5 * torch.einsum("pi,ij,pj->p", a, n, a)
    problem = ctrl.ControlProblem(sde, 1.0, cost, temperature=0.4)
    policy = ql.gibbs_policy(problem, quadratic_value, 2, X[0])
    curvature = 2 * (0.4 * T - 0.9)
    precision = n - curvature * torch.outer(d, d)
    slope = curvature * X + 0.3
    drift = torch.tensor([1.0, -0.7], dtype=torch.float64)
    linear = slope * drift + curvature * 0.3 * X * d
    expected = torch.linalg.solve(precision, linear.T).T
    torch.testing.assert_close(policy.mean(T, X), expected, rtol=1e-9, atol=1e-9)
    scale = policy.scale_at(T, expected)
    torch.testing.assert_close(
        scale @ scale.T, 0.4 * torch.linalg.inv(precision), rtol=1e-9, atol=1e-9
    )


def test_gibbs_policy_refuses_what_is_not_quadratic_concave_or_warm():
    warm = lq.problem()
    with pytest.raises(ValueError, match="temperature"):
        ql.gibbs_policy(lq.problem(temperature=0.0), quadratic_value, 1, X[0])
    quartic = replace(warm, running_reward=lambda t, x, a: -(a[:, 0] ** 4))
    with pytest.raises(ValueError, match="not quadratic"):
        ql.gibbs_policy(quartic, quadratic_value, 1, X[0]).mean(T, X)
    convex = replace(warm, running_reward=lambda t, x, a: a[:, 0] ** 2)
    with pytest.raises(ValueError, match="concave"):
        ql.gibbs_policy(convex, quadratic_value, 1, X[0]).scale_at(T, X)
    shaped = replace(warm, running_reward=lambda t, x, a: -(1 + x[:, 0] ** 2) * a[:, 0] ** 2)
    with pytest.raises(ValueError, match="depends on the state"):
        ql.gibbs_policy(shaped, quadratic_value, 1, X[0]).mean(T, X)


# --- the pair on a chain: big Q of a step in place of q h, exactly


@pytest.fixture(scope="module")
def chain():
    """(V, q) of a policy on the grid: q_k h_k = E[e^{-dh} V_{k+1} | x, a] - V_k + r h_k."""
    theta = lq.parameters()
    policy, problem = lq.policy(*theta), lq.problem()
    coefficients = [tuple(float(v.detach()) for v in row) for row in lq.values(*theta)]
    value = lq.value_function(lq.values(*theta))
    steps = lq.GRID.steps

    def q(t, x, a):
        k = int((lq.NODES - t).abs().argmin())
        h, (p, e, c) = steps[k], coefficients[k + 1]
        x, a = x[:, 0], a[:, 0]
        mean = x + h * (lq.A * x + lq.B * a)
        ahead = p * (mean**2 + lq.S**2 * h) / 2 + e * mean + c
        here = value(t, x[:, None])
        return (torch.exp(-lq.DISCOUNT * h) * ahead - here) / h - 0.5 * (lq.M * x**2 + lq.N * a**2)

    return problem, policy, value, q


def basis_of(policy):
    """The minimum basis: 1, x, x^2, x eps, eps^2 - 1, eps the action's noise."""

    def tests(paths):
        x, a = paths.states[:, :-1, 0], paths.actions[..., 0]
        eps = (a + 0.5 * x - 0.3) / 0.81
        return torch.stack([torch.ones_like(x), x, x**2, x * eps, eps**2 - 1], dim=2)

    return tests


def behaviour(kind, policy):
    return policy if kind == "on" else ctrl.GaussianPolicy(lambda t, x: 0.3 - 0.5 * x, 0.81)


def worst(chain, kind, value, q, problem=None):
    setting, policy, _, _ = chain
    problem = setting if problem is None else problem
    paths = lq.paths(setting, behaviour(kind, policy))
    each = ql.orthogonality(basis_of(policy), value, q, problem, paths)
    return (paths.weights @ each).detach().abs()


@pytest.mark.parametrize("kind", ["on", "off"])
def test_the_pair_is_orthogonal_along_paths_of_any_policy(chain, kind):
    _, _, value, q = chain
    assert float(worst(chain, kind, value, q).max()) < 1e-13


@pytest.mark.parametrize("kind", ["on", "off"])
def test_wrong_pairs_are_rejected(chain, kind):
    problem, policy, value, q = chain
    wrong = {
        "q + 1 %": (value, lambda t, x, a: 1.01 * q(t, x, a), problem),
        "q doubled": (value, lambda t, x, a: 2 * q(t, x, a), problem),
        "q missing": (value, lambda t, x, a: torch.zeros_like(x[:, 0]), problem),
        "q shifted": (value, lambda t, x, a: q(t, x, a) - 0.2, problem),
        "V offset": (lambda t, x: value(t, x) + 0.01, q, problem),
        "V curvature": (lambda t, x: value(t, x) + 0.01 * x[:, 0] ** 2, q, problem),
        "discount missing": (value, q, replace(problem, discount=0.0)),
        "terminal missing": (value, q, replace(problem, terminal_reward=None)),
        "entropy counted twice": (
            value,
            lambda t, x, a: q(t, x, a) - 0.2 * policy.log_prob(t, x, a).detach(),
            problem,
        ),
    }
    for name, (v, other, setting) in wrong.items():
        assert float(worst(chain, kind, v, other, setting).max()) > 2e-4, name


def test_functions_of_the_state_alone_cannot_see_a_scaled_q_on_policy(chain):
    """E_pi[q - temperature log pi] = 0, so scaling q about that mean is invisible to them."""
    _, policy, value, q = chain

    def scaled(t, x, a):
        entropy_part = 0.2 * policy.log_prob(t, x, a).detach()
        return entropy_part + 2 * (q(t, x, a) - entropy_part)

    seen = worst(chain, "on", value, scaled)
    assert float(seen[:3].max()) < 1e-13
    assert float(seen[3:].max()) > 1e-2


def test_the_on_policy_formula_of_values_is_wrong_off_policy(chain):
    problem, policy, value, _ = chain
    paths = lq.paths(problem, behaviour("off", policy))
    tests = mg.features_along(lambda t, x: torch.stack([torch.ones_like(x[:, 0]), x[:, 0]], 1))
    each = mg.orthogonality(tests, value, problem, paths, policy)
    assert float((paths.weights @ each).detach().abs().max()) > 0.02


def slope(chain, kind, loss, at):
    """Gradient in directions of V (1, x^2) and of q (two, of mean 0 under the chain's policy)."""
    problem, policy, value, q = chain
    paths = lq.paths(problem, behaviour(kind, policy))
    theta = torch.tensor(at, dtype=torch.float64, requires_grad=True)

    def v(t, x):
        return value(t, x) + theta[0] + theta[1] * x[:, 0] ** 2

    def rate(t, x, a):
        x, eps = x[:, 0], (a - policy.mean(t, x).detach())[:, 0]
        std = policy.std_at(t).detach()
        return q(t, x[:, None], a) + theta[2] * x * eps + theta[3] * (eps**2 - std**2)

    each = loss(v, rate, problem, paths)
    return torch.autograd.grad(paths.weights @ each, theta)[0].abs()


@pytest.mark.parametrize(
    ("kind", "loss"),
    [("on", ql.orthogonality_loss), ("off", ql.orthogonality_loss), ("on", ql.martingale_loss)],
)
def test_losses_are_stationary_at_the_pair_and_nowhere_near(chain, kind, loss):
    assert float(slope(chain, kind, loss, [0.0, 0.0, 0.0, 0.0]).max()) < 1e-12
    for i in range(4):
        displaced = [0.1 * (i == j) for j in range(4)]
        assert float(slope(chain, kind, loss, displaced)[i]) > 1e-3


def test_the_martingale_loss_is_biased_off_policy(chain):
    """Not an accident of the step: d_psi q is correlated with the martingale's past there."""
    gradient = slope(chain, "off", ql.martingale_loss, [0.0, 0.0, 0.0, 0.0])
    assert float(gradient[:2].max()) < 1e-12
    assert float(gradient[2:].max()) > 1e-3


def test_a_test_function_may_see_its_action_but_not_what_follows(chain):
    problem, policy, value, q = chain
    paths = lq.paths(problem, policy, nodes=3)
    ql.orthogonality(lambda p: p.actions, value, q, problem, paths)
    for ahead in (lambda p: p.states[:, 1:], lambda p: p.increments):
        with pytest.raises(ValueError, match="adapted"):
            ql.orthogonality(ahead, value, q, problem, paths)


def test_bad_input_is_refused(chain):
    problem, policy, value, q = chain
    paths = lq.paths(problem, policy, nodes=2)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            ql.GibbsQ(policy, temperature)
    with pytest.raises((TypeError, ValueError)):
        ql.GibbsQ(ctrl.DeterministicPolicy(lambda t, x: x), 0.1)
    with pytest.raises(ValueError, match="nodes"):
        ql.ConsistentQ(q, policy, 0.1, nodes=0)
    with pytest.raises(ValueError, match="q must return"):
        ql.rates(lambda t, x, a: a, paths)
    with pytest.raises(ValueError, match="finite"):
        ql.rates(lambda t, x, a: a[:, 0] * math.nan, paths)
    endless = replace(problem, horizon=math.inf, terminal_reward=None)
    with pytest.raises(ValueError, match="horizon"):
        ql.martingale_loss(value, q, endless, paths)


# --- in time, with an average reward, term by term


def moving(t, x, a):
    """A q-rate that depends on all of its arguments."""
    return (0.3 + t) * a[:, 0] * x[:, 0] - (0.7 - 0.4 * t) * a[:, 0].square() + t


MOVING = ctrl.GaussianPolicy(lambda t, x: (0.3 - t) * x, lambda t: 0.5 + t)


def timely(t, x):
    return (1.3 + t) * x[:, 0] ** 2


@pytest.fixture
def few(generator):
    reward = lambda t, x, a: (1 + 2 * t) * x[:, 0] - a[:, 0] ** 2
    problem = replace(lq.problem(temperature=0.0), running_reward=reward)
    start = torch.linspace(-0.8, 1.1, 5, dtype=torch.float64)[:, None]
    return problem, ctrl.simulate(problem, MOVING, start, lq.GRID, generator=generator)


def discounted_increments(problem, paths, value, q, average=0.0):
    """e^{-discount t} dM of every step, by a loop."""
    each, nodes = [], paths.grid.nodes
    j = [value(t, paths.states[:, k]) for k, t in enumerate(nodes[:-1])]
    j.append(problem.terminal_reward(paths.states[:, -1]))
    for k, t in enumerate(nodes[:-1]):
        x, a, h = paths.states[:, k], paths.actions[:, k], nodes[k + 1] - t
        paid = (problem.running_reward(t, x, a) - q(t, x, a) - average) * h
        step = torch.exp(-problem.discount * h) * j[k + 1] - j[k] + paid
        each.append(torch.exp(-problem.discount * t) * step)
    return torch.stack(each, 1)


def test_losses_are_their_sums_over_steps(few):
    problem, paths = few
    dm = discounted_increments(problem, paths, timely, moving)
    expected = (lq.GRID.steps * dm.flip(1).cumsum(1).flip(1).square()).sum(1)
    per_path = ql.martingale_loss(timely, moving, problem, paths)
    torch.testing.assert_close(per_path, expected, **ROUND_OFF)
    dm = discounted_increments(problem, paths, timely, moving, 0.15)
    tests = lambda p: torch.cat([p.states[:, :-1], p.actions], 2)
    per_path = ql.orthogonality(tests, timely, moving, problem, paths, 0.15)
    expected = (tests(paths) * dm[..., None]).sum(1)
    torch.testing.assert_close(per_path, expected, **ROUND_OFF)

    def loss(theta):
        scaled = lambda t, x: theta[0] * timely(t, x)
        rate = lambda t, x, a: theta[1] * moving(t, x, a)
        return ql.orthogonality_loss(scaled, rate, problem, paths, 0.15)

    gradient = torch.func.jacrev(loss)(torch.ones(2, dtype=torch.float64))
    for column, function in enumerate(
        (lambda t, x, a: timely(t, x), moving),
    ):
        xi = torch.stack(
            [
                function(t, paths.states[:, k], paths.actions[:, k])
                for k, t in enumerate(lq.NODES[:-1])
            ],
            1,
        )
        torch.testing.assert_close(gradient[:, column], -(xi * dm).sum(1), **ROUND_OFF)


def test_losses_keep_the_precision_of_the_paths(few):
    problem, paths = few
    half = replace(
        paths, states=paths.states.float(), actions=paths.actions.float(), increments=None
    )
    assert ql.martingale_loss(timely, moving, problem, half).dtype == torch.float32
    assert ql.orthogonality_loss(timely, moving, problem, half).dtype == torch.float32


def test_q_of_a_policy_and_of_a_problem_that_move_in_time():
    a = torch.tensor([[0.2], [1.1], [-0.5]], dtype=torch.float64)
    gap = (a - (0.3 - 0.3) * X)[:, 0] / 0.8
    log_density = -0.5 * gap**2 - math.log(0.8) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(ql.GibbsQ(MOVING, 0.7)(T, X, a), 0.7 * log_density, **ROUND_OFF)
    # a ~ N(0, 0.64): E moving = t - (0.7 - 0.4 t) 0.64; entropy log 0.8 + 1/2 log(2 pi e)
    entropy = math.log(0.8) + 0.5 * math.log(2 * math.pi * math.e)
    expected = moving(T, X, a) - (0.3 - 0.58 * 0.64) - 0.7 * entropy
    rates = ql.ConsistentQ(moving, MOVING, 0.7)(T, X, a)
    torch.testing.assert_close(rates, expected, **ROUND_OFF)
    reward = lambda t, x, a: (1 + 2 * t) * x[:, 0] * a[:, 0]
    problem = replace(lq.problem(), running_reward=reward)
    silent = replace(lq.problem(), running_reward=None)
    paid = ql.q_rate(problem, quadratic_value, T, X, a)
    unpaid = ql.q_rate(silent, quadratic_value, T, X, a)
    torch.testing.assert_close(paid - unpaid, 1.6 * X[:, 0] * a[:, 0], **ROUND_OFF)


def test_the_rule_of_a_consistent_q_is_exact_below_degree_sixteen_and_one_node_will_do():
    policy = ctrl.GaussianPolicy(lambda t, x: 0 * x, 1.0)
    even = lambda n: lambda t, x, a: a[:, 0] ** n
    zero = torch.zeros_like(X)
    for n, moment, exact in ((14, 135135, True), (16, 2027025, False)):
        rates = -ql.ConsistentQ(even(n), policy, 0.0)(T, X, zero)
        assert torch.allclose(rates, torch.full_like(rates, moment), rtol=1e-10) == exact
    # the rule of n nodes misses E a^(2 n) by n!
    torch.testing.assert_close(
        2027025 - rates, torch.full_like(rates, math.factorial(8)), rtol=1e-6, atol=0
    )
    one = ql.ConsistentQ(even(1), policy, 0.0, nodes=1)
    torch.testing.assert_close(one(T, X, X), X[:, 0], **ROUND_OFF)
    with pytest.raises(ValueError, match="temperature"):
        ql.ConsistentQ(even(1), policy, math.inf)


def test_states_may_have_no_axis_beside_the_paths_but_actions_must_fit_them(monkeypatch):
    states = X[:, 0]
    value = lambda t, x: (0.4 * t - 0.9) * x.square() + 0.3 * x
    flat = replace(lq.problem(), running_reward=lambda t, x, a: -0.5 * (lq.M * x**2 + lq.N * a**2))
    rates = ql.q_rate(flat, value, T, states, 0.4 * states)
    expected = ql.q_rate(lq.problem(), quadratic_value, T, X, 0.4 * X)
    torch.testing.assert_close(rates, expected, **ROUND_OFF)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    for x, a in ((X, X[:2]), (X[:0], X[:0]), (X, X[0, 0])):
        with pytest.raises(ValueError, match="actions must begin with"):
            ql.q_rate(lq.problem(), quadratic_value, T, x, a)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_a_hessian_that_depends_on_the_state_is_found_at_any_size(size):
    """Two states, two coordinates, off-diagonal zeros; and the same Hessian everywhere passes."""
    states = torch.tensor([[0.7, -0.2], [-1.2, 0.5]], dtype=torch.float64)
    mixed = torch.ones(2, 2, dtype=torch.float64)
    sde = ctrl.ControlledSDE(lambda t, x, a: x @ mixed.to(x), lambda t, x: 0.5)
    flat = lambda t, x: 0 * x[:, 0]

    def problem(bend):
        cost = lambda t, x, a: -size * (1 + bend * x[:, 0]) * a.square().sum(1)
        return ctrl.ControlProblem(sde, 1.0, cost, temperature=0.3)

    policy = ql.gibbs_policy(problem(0.0), flat, 2, states[0].float())
    assert policy.mean(T, states).dtype == torch.float64
    torch.testing.assert_close(policy.mean(T, states), torch.zeros_like(states))
    scale = ql.gibbs_policy(problem(0.0), flat, 2, states[0]).scale_at(T, states)
    variance = 0.15 / size * torch.eye(2, dtype=torch.float64)  # temperature / (2 size)
    torch.testing.assert_close(scale @ scale.T, variance, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="depends on the state"):
        ql.gibbs_policy(problem(1e-3), flat, 2, states[0]).mean(T, states)
    quartic = lambda t, x, a: -size * (a.square() + (x[:, :1] > 0) * a**4).sum(1)
    with pytest.raises(ValueError, match="not quadratic"):
        ql.gibbs_policy(replace(problem(0.0), running_reward=quartic), flat, 2, states[1]).mean(
            T, states
        )
