"""Estimators against the exact gradient of the discrete problem, on quadrature noise."""

import math
from dataclasses import replace

import pytest
import torch

import ctrl
from ctrl import policy_gradient as pg
from tests.ctrl import lq_chain as lq

ROUND_OFF = {"rtol": 1e-11, "atol": 1e-12}  # of 5 ** 6 weighted paths


def exact_gradient(parameters, **settings):
    return torch.autograd.grad(lq.performance(lq.values(*parameters, **settings)), parameters)


def gradient(each, paths, parameters):
    return torch.autograd.grad(paths.weights @ each, parameters, retain_graph=True)


def assert_same(gradients, expected, **tolerance):
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.fixture(scope="module")
def setting():
    theta = lq.parameters()
    problem, policy = lq.problem(), lq.policy(*theta)
    value = lq.value_function(lq.values(*theta))
    return theta, problem, policy, value, lq.paths(problem, policy)


def test_no_tested_gradient_is_near_zero(setting):
    """Otherwise a wrong factor could not be seen."""
    assert all(abs(g) > 0.02 for g in exact_gradient(setting[0]))


@pytest.mark.parametrize("estimator", ["return", "return less V", "difference", "gae"])
def test_drawn_actions_give_the_exact_gradient_of_the_chain(setting, estimator):
    theta, problem, policy, value, paths = setting
    each = {
        "return": lambda: pg.return_gradient(problem, policy, paths),
        "return less V": lambda: pg.return_gradient(problem, policy, paths, value),
        "difference": lambda: pg.temporal_difference_gradient(problem, policy, value, paths),
        "gae": lambda: pg.temporal_difference_gradient(problem, policy, value, paths, rate=1.3),
    }[estimator]()
    assert_same(gradient(each, paths, theta), exact_gradient(theta), **ROUND_OFF)


def wrong_entropy(problem, policy, value, paths):
    return pg.temporal_difference_gradient(replace(problem, temperature=0.0), policy, value, paths)


def wrong_discount(problem, policy, value, paths):
    return pg.temporal_difference_gradient(replace(problem, discount=0.0), policy, value, paths)


def score_at_the_next_state(problem, policy, value, paths):
    next_paths = replace(paths, states=torch.cat([paths.states[:, 1:], paths.states[:, -1:]], 1))
    log_prob = pg.DrawnActions().log_prob(problem, policy, next_paths)
    dm = ctrl.martingale.increments(value, problem, paths, policy).detach()
    return (ctrl.value.discount_factors(problem, paths) * log_prob * dm).sum(1)


def no_outer_discount(problem, policy, value, paths):
    dm = ctrl.martingale.increments(value, problem, paths, policy).detach()
    return (pg.DrawnActions().log_prob(problem, policy, paths) * dm).sum(1)


@pytest.mark.parametrize(
    "wrong", [wrong_entropy, wrong_discount, score_at_the_next_state, no_outer_discount]
)
def test_the_comparison_rejects_wrong_variants(setting, wrong):
    theta, problem, policy, value, paths = setting
    slope = gradient(wrong(problem, policy, value, paths), paths, theta)
    gaps = [abs(float(f - e)) for f, e in zip(slope, exact_gradient(theta), strict=True)]
    assert max(gaps) > 1e-3


def test_an_action_dependent_baseline_is_biased_and_one_of_the_state_is_not(setting):
    theta, problem, policy, _, paths = setting
    shifted = pg.return_gradient(problem, policy, paths, lambda t, x: 3 + x[:, 0] * t)
    # the baseline is pinned to the terminal reward at the horizon only, which no decision follows
    assert_same(gradient(shifted, paths, theta), exact_gradient(theta), **ROUND_OFF)


def test_transitions_give_the_exact_gradient_of_the_chain():
    """View B, deterministic policy: its chain is the mean action's."""
    theta = lq.parameters(log_std=-40.0)[:2]  # no spread
    silent = torch.tensor(-40.0, dtype=torch.float64)
    settings = {"temperature": 0.0}
    coefficients = lq.values(*theta, silent, **settings)
    expected = torch.autograd.grad(lq.performance(coefficients), theta)
    problem = lq.problem(temperature=0.0)
    policy = ctrl.DeterministicPolicy(lambda t, x: theta[0] * x + theta[1])
    noise = ctrl.noise.gauss_hermite(lq.GRID.steps, nodes=6)
    start = torch.full((len(noise.increments), 1), lq.START, dtype=torch.float64)
    paths = ctrl.simulate(problem, policy, start, lq.GRID, noise=noise)
    view = pg.Transitions(ctrl.EulerMaruyama())
    value = lq.value_function(coefficients)
    difference = pg.temporal_difference_gradient(problem, policy, value, paths, view)
    assert_same(gradient(difference, paths, theta), expected, **ROUND_OFF)
    total = pg.return_gradient(problem, policy, paths, decisions=view)
    assert_same(gradient(total, paths, theta), expected, **ROUND_OFF)


@pytest.mark.parametrize("random", [False, True])
def test_transitions_see_that_the_action_itself_is_paid_for(random):
    """Two dimensions, a cost in action and state that grows in time, discount; by hand with noise.

    Of a random policy the mean action moves the states in view B, so its actions are their means
    here, and the reward moves with them.
    """
    tensor = lambda *rows: torch.tensor(rows, dtype=torch.float64)
    drift, cross = tensor([-0.5, 0.3], [0.1, -0.8]), tensor([0.4, -0.7], [0.2, 0.6])
    push, sigma, discount = tensor([0.9, 0.2], [-0.3, 0.7]), tensor(0.5, 0.8), 0.6
    nodes = tensor(0.0, 0.35, 0.8)

    def reward(t, x, a):
        return -((a @ cross * x).sum(1) + 0.45 * (1 + t) * a.square().sum(1)) / (1 + t)

    gain = tensor([-0.6, 0.2], [0.35, -0.9]).requires_grad_()
    offset = tensor(0.25, -0.4).requires_grad_()
    mean = lambda t, x: x @ gain.T + (1 + t) * offset
    sde = ctrl.ControlledSDE(lambda t, x, a: x @ drift.T + a @ push.T, lambda t, x: sigma + 0 * x)
    problem = ctrl.ControlProblem(sde, 0.8, reward, lambda x: x[:, 0] * x[:, 1], discount)
    grid = ctrl.TimeGrid(nodes)
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=5, noise=(2,))
    start = tensor(0.7, -0.2).expand(len(noise.increments), 2)
    paths = ctrl.simulate(problem, ctrl.DeterministicPolicy(mean), start, grid, noise=noise)
    paths = replace(paths, actions=paths.actions.detach(), states=paths.states.detach())

    x, total = start, 0.0
    for k, h in enumerate(grid.steps):
        a = mean(nodes[k], x)
        total = total + torch.exp(-discount * nodes[k]) * h * reward(nodes[k], x, a)
        x = x + h * (x @ drift.T + a @ push.T) + sigma * noise.increments[:, k]
    total = total + torch.exp(-discount * nodes[-1]) * x[:, 0] * x[:, 1]
    expected = torch.autograd.grad(noise.weights @ total, (gain, offset))
    assert all(bool((g.abs() > 0.02).all()) for g in expected)

    policy = ctrl.GaussianPolicy(mean, 1.0) if random else ctrl.DeterministicPolicy(mean)
    view = pg.Transitions(ctrl.EulerMaruyama())
    slope = pg.return_gradient(problem, policy, paths, decisions=view)
    assert_same(gradient(slope, paths, (gain, offset)), expected, **ROUND_OFF)
    # any function of (t, x) as V: the one-step difference is of the same mean less what V misses
    slope = pg.return_gradient(problem, policy, paths, lambda t, x: x.sin().sum(1), view)
    assert_same(gradient(slope, paths, (gain, offset)), expected, **ROUND_OFF)


def terminal_problem():
    """No running reward, no entropy: the setting of Score as Action."""
    sde = ctrl.ControlledSDE(lambda t, x, a: lq.A * x + lq.B * a, lambda t, x: lq.S)
    return ctrl.ControlProblem(sde, 0.9, terminal_reward=lambda x: -0.5 * lq.H * x[:, 0].square())


def terminal_value(gain, offset):
    """Exact V(t, x) of the continuous-time problem, closed loop dX = (cX + d)dt + S dW."""
    c, d = lq.A + lq.B * gain, lq.B * offset

    def value(t, x):
        left = 0.9 - t
        f = torch.exp(torch.as_tensor(c * left))
        mean = f * x[:, 0] + d / c * (f - 1)
        return -0.5 * lq.H * (mean.square() + lq.S**2 * (f.square() - 1) / (2 * c))

    return value


def continuous_gradient(gain, offset):
    """d/d(gain, offset) of V(0, START) by differentiating the closed form."""
    theta = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (gain, offset)]
    x = torch.full((1, 1), lq.START, dtype=torch.float64)
    value = terminal_value(*theta)(torch.zeros((), dtype=torch.float64), x)
    return torch.autograd.grad(value.sum(), theta)


@pytest.mark.parametrize("view", ["drawn", "transitions", "pathwise"])
def test_q_rates_tend_to_the_gradient_of_the_continuous_problem_at_order_one(view):
    """[SaA] Theorem 4.1 with the exact V; left-point sums err by O(h)."""
    gain, offset = -0.6, 0.45
    expected = continuous_gradient(gain, offset)
    problem, value = terminal_problem(), terminal_value(gain, offset)
    gaps = []
    for steps in (1, 2, 4) if view != "drawn" else (1, 2, 3):
        theta = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (gain, offset)]
        mean = lambda t, x: theta[0] * x + theta[1]  # noqa: B023  # used in this turn alone
        grid = ctrl.uniform_grid(0.9, steps)
        drawn = view == "drawn"
        policy = ctrl.GaussianPolicy(mean, 0.3) if drawn else ctrl.DeterministicPolicy(mean)
        noise = ctrl.noise.gauss_hermite(
            grid.steps, nodes=4 if drawn else 5, action=(1,) if drawn else None
        )
        start = torch.full((len(noise.increments), 1), lq.START, dtype=torch.float64)
        paths = ctrl.simulate(problem, policy, start, grid, noise=noise)
        if view == "pathwise":
            each = pg.pathwise_gradient(problem, policy, value, paths)
        else:
            named = pg.DrawnActions() if drawn else pg.Transitions(ctrl.EulerMaruyama())
            each = pg.q_rate_gradient(problem, policy, value, paths, named)
        slope = gradient(each, paths, theta)
        gaps.append([abs(float(f - e)) for f, e in zip(slope, expected, strict=True)])
    first, last = gaps[0], gaps[-1]
    refinement = 3 if view == "drawn" else 4
    for coarse, fine in zip(first, last, strict=True):
        assert 0.6 * refinement < coarse / fine < 1.9 * refinement


def test_pathwise_and_likelihood_ratio_agree_where_q_is_quadratic():
    """With entropy and a spread: E grad log pi (q - temperature log pi), either way."""
    theta = lq.parameters()
    problem, policy = lq.problem(), lq.policy(*theta)
    paths = lq.paths(problem, policy)

    def value(t, x):  # any smooth function
        return (0.3 + t) * x[:, 0].square() - 0.4 * x[:, 0]

    by_ratio = gradient(pg.q_rate_gradient(problem, policy, value, paths), paths, theta)
    by_path = gradient(pg.pathwise_gradient(problem, policy, value, paths), paths, theta)
    assert_same(by_ratio, by_path, **ROUND_OFF)
    assert all(abs(g) > 0.01 for g in by_ratio)


@pytest.mark.parametrize(("view", "growth"), [("drawn", 4.0), ("transitions", 1.0)])
def test_variance_of_the_return_estimator_grows_with_the_steps_only_for_drawn_actions(view, growth):
    """theory: like N in view A (16 against 4 steps: about 4), bounded in view B."""
    spreads = []
    for steps in (4, 16):
        mean = lambda t, x: -0.6 * x
        policy = (
            ctrl.GaussianPolicy(mean, 0.5) if view == "drawn" else ctrl.DeterministicPolicy(mean)
        )
        generator = torch.Generator().manual_seed(1)
        start = torch.full((20_000, 1), lq.START, dtype=torch.float64)
        problem, grid = terminal_problem(), ctrl.uniform_grid(0.9, steps)
        paths = ctrl.simulate(problem, policy, start, grid, generator=generator)
        # per-path slope in the gain: log pi is quadratic in it, so a difference is exact
        final = problem.terminal_reward(paths.states[:, -1])
        named = pg.DrawnActions() if view == "drawn" else pg.Transitions(ctrl.EulerMaruyama())

        def log_prob(shift, mean_std=0.5, paths=paths, named=named, problem=problem):
            shifted = lambda t, x: (shift - 0.6) * x
            policy = (
                ctrl.GaussianPolicy(shifted, mean_std)
                if isinstance(named, pg.DrawnActions)
                else ctrl.DeterministicPolicy(shifted)
            )
            return named.log_prob(problem, policy, paths).sum(1)

        slope = (log_prob(1e-3) - log_prob(-1e-3)) / 2e-3
        spreads.append(float((slope * final).var()))
    # 20 000 paths tell a variance to a few per cent; the two growths differ by a factor of 3
    assert 0.6 * growth < spreads[1] / spreads[0] < 1.5 * growth


def test_performance_difference_is_lemma_4_2():
    """V' - V = E' int q dt; exact in continuous time, O(h) on a grid."""
    old, new = (-0.6, 0.45), (-0.9, 0.1)
    problem, value = terminal_problem(), terminal_value(*old)
    x = torch.full((1, 1), lq.START, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    expected = float(terminal_value(*new)(zero, x) - value(zero, x))
    policy = ctrl.DeterministicPolicy(lambda t, x: new[0] * x + new[1])
    gaps = []
    for steps in (2, 4, 8):
        grid = ctrl.uniform_grid(0.9, steps)
        noise = ctrl.noise.gauss_hermite(grid.steps, nodes=3)  # quadratic in every normal
        start = torch.full((len(noise.increments), 1), lq.START, dtype=torch.float64)
        paths = ctrl.simulate(problem, policy, start, grid, noise=noise)
        each = pg.performance_difference(problem, value, policy, paths)
        gaps.append(float(paths.weights @ each) - expected)
    assert abs(expected) > 0.05
    assert abs(gaps[2]) < 0.25 * abs(expected)
    assert 1.7 < gaps[1] / gaps[2] < 2.3


def test_the_surrogate_equals_the_performance_difference_to_first_order():
    problem, value = terminal_problem(), terminal_value(-0.6, 0.45)
    grid = ctrl.uniform_grid(0.9, 3)
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=5, action=(1,))
    start = torch.full((len(noise.increments), 1), lq.START, dtype=torch.float64)
    old = ctrl.GaussianPolicy(lambda t, x: -0.6 * x + 0.45, 0.4)
    paths = ctrl.simulate(problem, old, start, grid, noise=noise)

    def gap(size):
        new = ctrl.GaussianPolicy(lambda t, x: -0.6 * x + 0.45 + size * (0.7 - 0.4 * x), 0.4)
        there = ctrl.simulate(problem, new, start, grid, noise=noise)
        surrogate = float(paths.weights @ pg.surrogate(problem, value, old, new, paths))
        return (
            float(there.weights @ pg.performance_difference(problem, value, new, there)) - surrogate
        )

    # second order: halving the change quarters the gap (quadrature of the ratio errs below 1e-6)
    assert gap(0.1) / gap(0.05) == pytest.approx(4, rel=0.1)


def test_entropy_needs_drawn_actions():
    theta = lq.parameters()
    problem, policy = lq.problem(), lq.policy(*theta)
    paths = lq.paths(problem, policy, nodes=2)
    with pytest.raises(ValueError, match="temperature"):
        pg.return_gradient(problem, policy, paths, decisions=pg.Transitions(ctrl.EulerMaruyama()))
    deterministic = ctrl.DeterministicPolicy(lambda t, x: x)
    with pytest.raises((TypeError, ValueError), match="policy"):
        pg.return_gradient(lq.problem(temperature=0.0), deterministic, paths)
    with pytest.raises(TypeError, match="transition density"):
        pg.Transitions(ctrl.Milstein())


def test_multivariate_actions_are_reparametrised_exactly():
    scale = torch.tensor([[0.5, 0.0], [-0.2, 0.3]], dtype=torch.float64, requires_grad=True)
    gain = torch.tensor([[0.4, -0.1], [0.2, 0.6]], dtype=torch.float64, requires_grad=True)
    policy = ctrl.MultivariateGaussianPolicy(lambda t, x: x @ gain.T, lambda t: scale)
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.3)
    problem = ctrl.ControlProblem(
        sde, 0.5, lambda t, x, a: -(a.square().sum(1) + a.prod(1)), temperature=0.2
    )
    grid = ctrl.TimeGrid(torch.tensor([0.0, 0.5], dtype=torch.float64))
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=4, noise=(2,), action=(2,))
    start = torch.tensor([[0.7, -0.4]], dtype=torch.float64).expand(len(noise.increments), 2)
    paths = ctrl.simulate(problem, policy, start, grid, noise=noise)
    value = lambda t, x: -x.square().sum(1)
    slope = [
        gradient(each, paths, [gain, scale])
        for each in (
            pg.q_rate_gradient(problem, policy, value, paths),
            pg.pathwise_gradient(problem, policy, value, paths),
        )
    ]
    assert_same([slope[0][0], slope[0][1].tril()], [slope[1][0], slope[1][1].tril()], **ROUND_OFF)


def test_infinite_rate_is_the_one_step_difference(setting):
    _, problem, policy, value, paths = setting
    one = pg.temporal_difference_gradient(problem, policy, value, paths)
    other = pg.temporal_difference_gradient(problem, policy, value, paths, rate=math.inf)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# --- term by term, where everything moves in time


def moving(t, x):
    return (0.3 - t) * x


def timely(t, x):
    return (1.3 + t) * x[:, 0].square() - 0.4 * x[:, 0]


OLD = ctrl.GaussianPolicy(moving, lambda t: 0.5 + t)
NEW = ctrl.GaussianPolicy(lambda t, x: moving(t, x) + 0.2 * t + 0.1, lambda t: 0.6 + t)


@pytest.fixture
def few(generator):
    reward = lambda t, x, a: (1 + 2 * t) * x[:, 0] - a[:, 0].square()
    problem = replace(lq.problem(), running_reward=reward)
    start = torch.linspace(-0.8, 1.1, 5, dtype=torch.float64)[:, None]
    return problem, ctrl.simulate(problem, OLD, start, lq.GRID, generator=generator)


def at_every_step(function, paths):
    rows = zip(lq.NODES, paths.states[:, :-1].unbind(1), paths.actions.unbind(1), strict=False)
    return torch.stack([function(*row) for row in rows], 1)


DISCOUNTED = torch.exp(-lq.DISCOUNT * lq.NODES[:-1]) * lq.GRID.steps


def regularised(problem, policy):
    def rate(t, x, a):
        q = ctrl.q_learning.q_rate(problem, timely, t, x, a)
        return q - lq.TEMPERATURE * policy.log_prob(t, x, a)

    return rate


def test_estimators_are_their_sums_over_steps(few):
    problem, paths = few
    rates = at_every_step(regularised(problem, OLD), paths)
    log_prob = at_every_step(OLD.log_prob, paths)
    slope = pg.q_rate_gradient(problem, OLD, timely, paths)
    torch.testing.assert_close(slope, (DISCOUNTED * log_prob * rates).sum(1), **ROUND_OFF)
    new = at_every_step(regularised(problem, NEW), paths)
    per_path = pg.performance_difference(problem, timely, NEW, paths)
    torch.testing.assert_close(per_path, (DISCOUNTED * new).sum(1), **ROUND_OFF)
    ratio = (at_every_step(NEW.log_prob, paths) - log_prob).exp()
    per_path = pg.surrogate(problem, timely, OLD, NEW, paths)
    torch.testing.assert_close(per_path, (DISCOUNTED * ratio * new).sum(1), **ROUND_OFF)


def test_pathwise_gradient_is_slope_times_action(few):
    """d/da of q - temperature log pi by hand: B V' - 2 a + temperature (a - mean) / std^2."""
    problem, paths = few

    def term(t, x, a):
        slope = lq.B * (2 * (1.3 + t) * x - 0.4) - 2 * a
        slope = slope + lq.TEMPERATURE * (a - moving(t, x)) / (0.5 + t) ** 2
        return (slope * a)[:, 0]

    expected = (DISCOUNTED * at_every_step(term, paths)).sum(1)
    derivative = pg.pathwise_gradient(problem, OLD, timely, paths)
    torch.testing.assert_close(derivative, expected, **ROUND_OFF)


def test_worth_of_a_transition_is_the_slope_of_v_times_its_surprise(few):
    problem, paths = few
    view = pg.Transitions(ctrl.EulerMaruyama())
    advantages = view.advantages(problem, OLD, timely, paths)
    for k, t in enumerate(lq.NODES[:-1]):
        x, h = paths.states[:, k, 0], lq.GRID.steps[k]
        surprise = paths.states[:, k + 1, 0] - x - h * (lq.A * x + lq.B * moving(t, x))
        expected = (2 * (1.3 + t) * x - 0.4) * surprise
        torch.testing.assert_close(advantages[:, k], expected, **ROUND_OFF)


def test_a_surrogate_differentiates_the_new_policy_alone(few):
    problem, paths = few
    theta = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    both = ctrl.GaussianPolicy(lambda t, x: moving(t, x) + theta, 0.7)
    cold = replace(problem, temperature=0.0)
    each = pg.surrogate(cold, timely, both, both, paths)
    (slope,) = torch.autograd.grad(each.sum(), theta)
    log_prob = at_every_step(both.log_prob, paths)
    rates = ctrl.q_learning.q_rates(cold, timely, paths)
    (expected,) = torch.autograd.grad((DISCOUNTED * log_prob * rates).sum(), theta)
    torch.testing.assert_close(slope, expected, **ROUND_OFF)
    assert float(slope) != 0


def test_estimators_keep_the_precision_of_the_paths(few):
    problem, paths = few
    half = replace(
        paths, states=paths.states.float(), actions=paths.actions.float(), increments=None
    )
    cold, view = replace(problem, temperature=0.0), pg.Transitions(ctrl.EulerMaruyama())
    for estimate in (
        pg.return_gradient(problem, OLD, half, timely),
        pg.temporal_difference_gradient(problem, OLD, timely, half, rate=0.7),
        pg.q_rate_gradient(problem, OLD, timely, half),
        pg.q_rate_gradient(cold, OLD, timely, half, view),
        pg.pathwise_gradient(problem, OLD, timely, half),
        pg.performance_difference(problem, timely, NEW, half),
        pg.surrogate(problem, timely, OLD, NEW, half),
    ):
        assert estimate.dtype == torch.float32


def test_a_baseline_is_taken_from_the_return_of_every_step(few):
    problem, paths = few
    ahead = ctrl.returns_to_go(problem, paths, OLD)[:, :-1]
    less = ahead - at_every_step(lambda t, x, a: timely(t, x), paths)
    factors = torch.exp(-lq.DISCOUNT * lq.NODES[:-1])
    expected = (factors * at_every_step(OLD.log_prob, paths) * less).sum(1)
    slope = pg.return_gradient(problem, OLD, paths, timely)
    torch.testing.assert_close(slope, expected, **ROUND_OFF)


def test_one_path_has_a_pathwise_gradient_too(few):
    problem, paths = few
    one = replace(
        paths, states=paths.states[:1], actions=paths.actions[:1], increments=paths.increments[:1]
    )
    slope = pg.pathwise_gradient(problem, OLD, timely, one)
    torch.testing.assert_close(slope, pg.pathwise_gradient(problem, OLD, timely, paths)[:1])
