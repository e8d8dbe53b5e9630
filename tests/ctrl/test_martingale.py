"""Every method against its own exact limit on the same grid, by numpy moments of an OU process.

The setting of theory: dX = -K X dt + S dW, X_0 ~ N(M0, P0), reward rate x^2, features
(T - t){1, x, x^2}, under which the value function is misspecified, so that methods differ.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

import ctrl
from ctrl import martingale as mg
from tests.ctrl import lq_chain as lq

K, S, M0, P0, T = 1.2, 0.7, 0.6, 0.4, 1.0


def features(t, x):
    x = x[:, 0]
    return (T - t) * torch.stack([torch.ones_like(x), x, x**2], dim=1)


def problem(**settings):
    sde = ctrl.ControlledSDE(lambda t, x, a: -K * x + 0 * a, lambda t, x: S)
    return ctrl.ControlProblem(sde, T, lambda t, x, a: x[:, 0] ** 2, **settings)


POLICY = ctrl.DeterministicPolicy(lambda t, x: torch.zeros_like(x))


def sampled(grid, settings=None, nodes=4):
    """Exact expectations: the start is one more normal."""
    with_start = torch.cat([grid.steps.new_ones(1), grid.steps])
    noise = ctrl.noise.gauss_hermite(with_start, nodes=nodes)
    start = M0 + P0**0.5 * noise.increments[:, 0]
    rest = ctrl.Noise(noise.increments[:, 1:].contiguous(), weights=noise.weights)
    return ctrl.simulate(problem(**(settings or {})), POLICY, start, grid, noise=rest)


def gaussian_moments(mean, variance):
    """E x^0 ... E x^4."""
    m, v = mean, variance
    return np.array([1, m, m**2 + v, m**3 + 3 * m * v, m**4 + 6 * m**2 * v + 3 * v**2])


def oracle(nodes, discount=0.0):
    """Coefficients of the three methods by moment recursion; no code of ctrl."""
    h = np.diff(nodes)
    mean, var = M0, P0
    moments, marginals = [], []
    for k in range(len(h)):
        moments.append(gaussian_moments(mean, var))
        marginals.append((mean, var))
        mean, var = (1 - K * h[k]) * mean, (1 - K * h[k]) ** 2 * var + S**2 * h[k]
    # exact value of the chain: V_k = c0 + c2 x^2
    c0, c2, values = 0.0, 0.0, []
    for k in reversed(range(len(h))):
        keep, f = np.exp(-discount * h[k]), 1 - K * h[k]
        c0, c2 = keep * (c0 + c2 * S**2 * h[k]), h[k] + keep * c2 * f**2
        values.append((c0, c2))
    values.reverse()
    projection, target = np.zeros((3, 3)), np.zeros(3)
    matrix, right = np.zeros((3, 3)), np.zeros(3)
    naive, naive_right = np.zeros((3, 3)), np.zeros(3)
    for k, m in enumerate(moments):
        now, after = T - nodes[k], T - nodes[k + 1]
        gram = np.array([[m[i + j] for j in range(3)] for i in range(3)])
        weight = np.exp(-2 * discount * nodes[k]) * h[k]
        projection += weight * now**2 * gram
        target += weight * now * (values[k][0] * m[:3] + values[k][1] * m[2:5])
        # E[phi(X') | x] as a matrix on {1, x, x^2}
        f, keep = 1 - K * h[k], np.exp(-discount * h[k])
        step = np.array([[1, 0, 0], [0, f, 0], [S**2 * h[k], 0, f**2]])
        shift = keep * after * step - now * np.eye(3)
        outer = np.exp(-discount * nodes[k])
        matrix += outer * now * gram @ shift.T
        right += outer * now * h[k] * m[2:5]
        # sum of squares: E (shift + martingale part)^2, the latter has E[dphi dphi'] beyond
        noise = noise_gram(m, f, S**2 * h[k])
        naive += shift @ gram @ shift.T + (keep * after) ** 2 * noise
        naive_right += h[k] * shift @ m[2:5]
    return {
        "projection": np.linalg.solve(projection, target),
        "moment": np.linalg.solve(matrix, -right),
        "naive": np.linalg.solve(naive, -naive_right),
    }


def noise_gram(m, f, q):
    """E Cov(phi(X') | x), phi = (1, x, x^2), X' = f x + N(0, q)."""
    return np.array(
        [[0, 0, 0], [0, q, 2 * f * q * m[1]], [0, 2 * f * q * m[1], 4 * f**2 * q * m[2] + 2 * q**2]]
    )


UNEVEN = ctrl.TimeGrid(torch.tensor([0.0, 0.25, 0.6, 1.0], dtype=torch.float64))


def root(loss, paths):
    """Root of a gradient that is affine in the coefficients."""

    def gradient(theta):
        theta = theta.detach().requires_grad_()
        value = mg.LinearValue(features, theta)
        each = loss(value)
        mean = each if each.ndim == 0 else paths.weights @ each
        return torch.autograd.grad(mean, theta)[0]

    zero = torch.zeros(3, dtype=torch.float64)
    offset = gradient(zero)
    jacobian = torch.stack([gradient(e) - offset for e in torch.eye(3, dtype=torch.float64)], 1)
    return torch.linalg.solve(jacobian, -offset).numpy()


def assert_coefficients(coefficients, expected):
    # round-off of 4 ** 4 paths through a 3 x 3 system of condition below 1e4
    np.testing.assert_allclose(coefficients, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("discount", [0.0, 0.8])
def test_martingale_loss_is_least_at_the_projection_of_the_true_value(discount):
    settings = {"discount": discount}
    paths = sampled(UNEVEN, settings)
    coefficients = root(lambda v: mg.martingale_loss(v, problem(**settings), paths), paths)
    assert_coefficients(coefficients, oracle(UNEVEN.nodes.numpy(), discount)["projection"])


@pytest.mark.parametrize("discount", [0.0, 0.8])
def test_ctd0_and_clstd_solve_the_moment_equation(discount):
    settings = {"discount": discount}
    paths, expected = sampled(UNEVEN, settings), oracle(UNEVEN.nodes.numpy(), discount)["moment"]
    assert_coefficients(root(lambda v: mg.ctd0(v, problem(**settings), paths), paths), expected)
    coefficients = mg.clstd(features, problem(**settings), paths).coefficients
    assert_coefficients(coefficients.numpy(), expected)


def test_gradient_td_has_the_same_root_under_both_weightings():
    paths, expected = sampled(UNEVEN), oracle(UNEVEN.nodes.numpy())["moment"]
    tests = mg.features_along(features)
    for weighting in ("identity", "covariance"):
        coefficients = root(
            lambda v, w=weighting: mg.cgtd_loss(tests, v, problem(), paths, weighting=w), paths
        )
        np.testing.assert_allclose(
            coefficients, expected, rtol=1e-7, atol=1e-8
        )  # condition squared


def test_ctd_lambda_goes_from_the_projection_to_the_moment_equation():
    paths, limits = sampled(UNEVEN), oracle(UNEVEN.nodes.numpy())
    coefficients = {
        decay: root(lambda v, d=decay: mg.ctd_lambda(v, problem(), paths, d), paths)
        for decay in (0.0, 2.0, 400.0)
    }
    assert_coefficients(coefficients[0.0], limits["projection"])
    apart = np.abs(limits["projection"] - limits["moment"]).max()
    assert np.abs(coefficients[2.0] - limits["projection"]).max() > 0.05 * apart
    # at 400 / time the past is worth e^{-100} on this grid, but h weights the steps: CTD(0) with
    # weights h_k, which on an even grid is CTD(0)
    even = ctrl.uniform_grid(T, 3)
    paths = sampled(even)
    coefficients = root(lambda v: mg.ctd_lambda(v, problem(), paths, 400.0), paths)
    assert_coefficients(coefficients, oracle(even.nodes.numpy())["moment"])


def test_limits_of_the_exact_recursion_are_those_of_the_theory():
    """ML and CTD(0) in continuous time, by extrapolating the first-order error away."""
    fine, finer = (oracle(np.linspace(0, T, n + 1)) for n in (2000, 4000))
    limits = {name: 2 * finer[name] - fine[name] for name in fine}
    np.testing.assert_allclose(limits["projection"], [0.115391, 0.008037, 0.432786], atol=2e-6)
    np.testing.assert_allclose(limits["moment"], [0.133110, 0.009761, 0.341519], atol=2e-6)
    # squared increments: least for a flat J, whatever the value is ([JZ22a] section 3.2)
    np.testing.assert_allclose(limits["naive"], [0.41475, 0, 0], atol=2e-4)


def test_the_naive_residual_goes_somewhere_else():
    paths, limits = sampled(UNEVEN), oracle(UNEVEN.nodes.numpy())
    coefficients = root(lambda v: mg.increments(v, problem(), paths).square().sum(1), paths)
    assert_coefficients(coefficients, limits["naive"])
    assert np.abs(limits["naive"] - limits["moment"]).max() > 0.05


# --- the exact value of a chain with actions, entropy and discount


@pytest.fixture(scope="module")
def chain():
    theta = lq.parameters()
    policy = lq.policy(*theta)
    return (
        lq.problem(),
        policy,
        lq.value_function(lq.values(*theta)),
        lq.paths(lq.problem(), policy),
    )


def basis(t, x):
    return torch.stack([torch.ones_like(x[:, 0]), x[:, 0], x[:, 0] ** 2], dim=1)


def worst(tests, value, problem, paths, policy):
    each = mg.orthogonality(tests, value, problem, paths, policy)
    return float((paths.weights @ each).detach().abs().max())


def test_the_true_value_is_orthogonal_and_wrong_ones_are_not(chain):
    problem, policy, value, paths = chain
    tests = mg.features_along(basis)
    assert worst(tests, value, problem, paths, policy) < 1e-13  # 5 ** 6 weighted paths
    wrong = {
        "curvature + 1 %": (lambda t, x: value(t, x) + 0.01 * x[:, 0] ** 2, problem),
        "offset": (lambda t, x: value(t, x) + 0.01, problem),
        "discount missing": (value, replace(problem, discount=0.0)),
        "discount doubled": (value, replace(problem, discount=0.6)),
        "entropy missing": (value, replace(problem, temperature=0.0)),
        "terminal reward missing": (value, replace(problem, terminal_reward=None)),
    }
    for name, (other, setting) in wrong.items():
        assert worst(tests, other, setting, paths, policy) > 1e-4, name


def test_entropy_sign_is_seen(chain):
    problem, policy, value, paths = chain
    flipped = replace(
        paths,
        rewards=ctrl.running_rewards(problem, paths)
        + problem.temperature
        * torch.stack(
            [
                policy.log_prob(t, x, a)
                for t, x, a in zip(
                    paths.grid.nodes,
                    paths.states[:, :-1].unbind(1),
                    paths.actions.unbind(1),
                    strict=False,
                )
            ],
            1,
        ).detach()
        * paths.grid.steps,
    )
    setting = replace(problem, running_reward=None, temperature=0.0)
    assert worst(mg.features_along(basis), value, setting, flipped, None) > 0.05


@pytest.mark.parametrize("step", [0, 1, 2])
def test_test_functions_that_look_ahead_are_refused_wherever_they_do(chain, step):
    problem, policy, value, paths = chain

    def ahead(given):
        xi = given.states[:, :-1].clone()
        xi[:, step] = given.states[:, step + 1]
        return xi

    with pytest.raises(ValueError, match=f"step {step}"):
        mg.orthogonality(ahead, value, problem, paths, policy)


@pytest.mark.parametrize("part", ["actions", "increments", "the terminal state", "other paths"])
def test_what_a_value_must_not_see_is_refused(chain, part):
    problem, policy, value, paths = chain
    tests = {
        "actions": lambda p: p.actions,
        "increments": lambda p: p.increments,
        "the terminal state": lambda p: p.states[:, -1:].expand_as(p.actions),
        "other paths": lambda p: p.actions - p.actions.mean(0, keepdim=True),
    }[part]
    with pytest.raises(ValueError, match="adapted"):
        mg.orthogonality(tests, value, problem, paths, policy)


def test_test_functions_of_other_paths_than_the_given_are_refused(chain):
    problem, policy, value, paths = chain
    kept = paths.states[:, :-1]
    with pytest.raises(ValueError, match="made of the paths"):
        mg.orthogonality(lambda p: kept, value, problem, paths, policy)


def test_the_past_is_allowed(chain):
    problem, policy, value, paths = chain

    def running_mean(p):
        count = torch.arange(1, 4, dtype=torch.float64)[:, None]
        return p.states[:, :-1].cumsum(1) / count

    def earlier_actions(p):
        return torch.cat([torch.zeros_like(p.actions[:, :1]), p.actions[:, :-1]], dim=1)

    for tests in (running_mean, earlier_actions):
        assert worst(tests, value, problem, paths, policy) < 1e-13


def test_ergodic_least_squares_finds_value_and_average():
    """dX = -K X dt + S dW, reward x^2: V = x^2 / (2 K), average S^2 / (2 K), of Euler's chain."""
    endless = replace(problem(), horizon=float("inf"))
    h = 0.1
    grid = ctrl.TimeGrid(torch.tensor([0.0, h, 2 * h], dtype=torch.float64))
    f = 1 - K * h
    at_rest = S**2 * h / (1 - f**2)
    noise = ctrl.noise.gauss_hermite(torch.tensor([1.0, h, h], dtype=torch.float64), nodes=5)
    start = at_rest**0.5 * noise.increments[:, 0]
    later_noise = ctrl.Noise(noise.increments[:, 1:].contiguous(), weights=noise.weights)
    paths = ctrl.simulate(endless, POLICY, start, grid, noise=later_noise)

    def quadratic(t, x):
        return torch.cat([x, x**2], dim=1)

    fit = mg.clstd(quadratic, endless, paths, ergodic=True)
    # V = c x^2: c (f^2 - 1) x^2 + x^2 h = 0 and average = at_rest
    np.testing.assert_allclose(fit.coefficients, [0, h / (1 - f**2)], atol=1e-12)
    assert fit.average_reward == pytest.approx(at_rest, rel=1e-12)
    with pytest.raises(ValueError, match="determine"):
        mg.clstd(basis, endless, paths, ergodic=True)  # the constant is a martingale
    with pytest.raises(ValueError, match="ergodic"):
        mg.clstd(quadratic, problem(), sampled(UNEVEN), ergodic=True)


def test_bad_input_is_refused(chain):
    problem_, policy, value, paths = chain
    endless = replace(problem_, horizon=float("inf"), terminal_reward=None)
    with pytest.raises(ValueError, match="horizon"):
        mg.martingale_loss(value, endless, paths, policy)
    for decay in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="decay"):
            mg.ctd_lambda(value, problem_, paths, decay, policy)
    with pytest.raises(ValueError, match="policy"):
        mg.increments(value, problem_, paths)
    with pytest.raises((ValueError, TypeError)):
        mg.cgtd_loss(mg.features_along(basis), value, problem_, paths, policy, weighting="no")
    with pytest.raises(ValueError, match="tests"):
        mg.orthogonality(lambda p: p.states, value, problem_, paths, policy)
    nan = lambda p: torch.full_like(p.actions, float("nan"))
    with pytest.raises(ValueError, match="finite"):
        mg.orthogonality(nan, value, problem_, paths, policy)


def test_gradient_td_weights_its_moments_as_it_says():
    """m' m / 2, and m' (E int xi xi' dt)^{-1} m / 2, by hand."""
    paths = sampled(UNEVEN)
    tests = mg.features_along(features)
    value = mg.LinearValue(features, torch.tensor([0.3, -0.1, 0.2], dtype=torch.float64))
    mean = paths.weights @ mg.orthogonality(tests, value, problem(), paths)
    xi = tests(paths)
    outer = torch.einsum("pki,pkj->pkij", xi, xi) * UNEVEN.steps[:, None, None]
    covariance = (paths.weights[:, None, None] * outer.sum(1)).sum(0)
    plain = mg.cgtd_loss(tests, value, problem(), paths)
    weighted = mg.cgtd_loss(tests, value, problem(), paths, weighting="covariance")
    torch.testing.assert_close(plain, 0.5 * mean @ mean, rtol=1e-12, atol=0)
    inverse = torch.linalg.inv(covariance)
    torch.testing.assert_close(weighted, 0.5 * mean @ inverse @ mean, rtol=1e-9, atol=0)


# --- term by term, on a few paths without weights: no symmetry, no zero

AVERAGE = 0.15


def timed(t, x):
    return (1.3 + t) * basis(t, x)


def known(t, x):
    return (0.4 - 1.7 * t) * x[:, 0]


@pytest.fixture
def few(generator):
    policy = lq.policy(*(v.detach() for v in lq.parameters()))
    start = torch.linspace(-0.8, 1.1, 7, dtype=torch.float64)[:, None]
    paths = ctrl.simulate(lq.problem(), policy, start, lq.GRID, generator=generator)
    return lq.problem(), policy, paths


def terms(problem, policy, paths, value, average=0.0):
    """Discounted dM of every path and step, by loops."""
    nodes, total = paths.grid.nodes, torch.zeros(len(paths.states), 3, dtype=torch.float64)
    for p in range(len(paths.states)):
        x = paths.states[p : p + 1]
        j = [value(t, x[:, k]) for k, t in enumerate(nodes[:-1])] + [
            problem.terminal_reward(x[:, -1])
        ]
        for k, t in enumerate(nodes[:-1]):
            h, a = nodes[k + 1] - t, paths.actions[p : p + 1, k]
            pay = problem.running_reward(t, x[:, k], a) - average
            pay = pay - lq.TEMPERATURE * policy.log_prob(t, x[:, k], a)
            step = torch.exp(-lq.DISCOUNT * h) * j[k + 1] - j[k] + pay * h
            total[p, k] = torch.exp(-lq.DISCOUNT * t) * step[0]
    return total


def linear(theta, base=known):
    return mg.LinearValue(timed, torch.as_tensor(theta, dtype=torch.float64), base)


THETA = (0.3, -0.7, 0.45)


def gradients(loss, theta=THETA):
    """d loss / d theta of every path, [paths, 3]."""
    theta = torch.tensor(theta, dtype=torch.float64)
    return torch.func.jacrev(lambda one: loss(linear(one)))(theta)


def close(computed, expected):
    torch.testing.assert_close(computed, expected, rtol=1e-12, atol=1e-12)


def test_martingale_loss_is_the_squared_gap_to_the_end_of_the_martingale(few):
    problem, policy, paths = few
    dm = terms(problem, policy, paths, linear(THETA))
    rest = dm.flip(1).cumsum(1).flip(1)  # M_T - M_t
    expected = (lq.GRID.steps * rest.square()).sum(1)
    close(mg.martingale_loss(linear(THETA), problem, paths, policy), expected)


def test_orthogonality_is_the_sum_of_test_functions_times_increments(few):
    problem, policy, paths = few
    dm = terms(problem, policy, paths, linear(THETA), AVERAGE)
    xi = mg.features_along(timed)(paths)
    arguments = (linear(THETA), problem, paths, policy, AVERAGE)
    each = mg.orthogonality(mg.features_along(timed), *arguments)
    close(each, (xi * dm[..., None]).sum(1))
    mean = each.mean(0)  # no weights: equal ones
    loss = mg.cgtd_loss(mg.features_along(timed), *arguments)
    close(loss, 0.5 * (mean @ mean))
    covariance = torch.einsum("k,pki,pkj->ij", lq.GRID.steps, xi, xi) / len(xi)
    loss = mg.cgtd_loss(mg.features_along(timed), *arguments, weighting="covariance")
    expected = 0.5 * mean @ torch.linalg.solve(covariance, mean)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def test_ctd0_descends_against_features_times_increments(few):
    problem, policy, paths = few
    dm = terms(problem, policy, paths, linear(THETA), AVERAGE)
    xi = mg.features_along(timed)(paths)
    slope = gradients(lambda value: mg.ctd0(value, problem, paths, policy, AVERAGE))
    close(slope, -(xi * dm[..., None]).sum(1))


@pytest.mark.parametrize("decay", [0.0, 1.7])
def test_ctd_lambda_descends_against_decayed_features_times_increments(few, decay):
    problem, policy, paths = few
    dm, phi = terms(problem, policy, paths, linear(THETA), AVERAGE), mg.features_along(timed)(paths)
    t, h = lq.NODES[:-1], lq.GRID.steps
    past = (t[:, None] >= t) * torch.exp(-decay * (t[:, None] - t)) * h  # [now, then]
    xi = torch.einsum("kl,plm->pkm", past, phi)
    slope = gradients(lambda value: mg.ctd_lambda(value, problem, paths, decay, policy, AVERAGE))
    close(slope, -(xi * dm[..., None]).sum(1))


def test_least_squares_leave_no_moment_beside_a_known_part(few):
    """Without weights, and with what the problem pays at its horizon."""
    problem, policy, paths = few
    fit = mg.clstd(timed, problem, paths, policy, base=known)
    t, x = lq.NODES[1], paths.states[:, 1]
    close(fit(t, x), timed(t, x) @ fit.coefficients + known(t, x))
    moments = mg.orthogonality(mg.features_along(timed), fit, problem, paths, policy).mean(0)
    assert moments.abs().max() < 1e-12
    plain = mg.clstd(timed, problem, paths, policy)
    assert plain.base is None
    assert plain.average_reward == 0  # of a problem that ends


def test_ergodic_least_squares_beside_a_known_part(few):
    problem, _, paths = few
    settings = {"terminal_reward": None, "discount": 0.0, "temperature": 0.0}
    endless = replace(problem, horizon=float("inf"), **settings)
    quadratic = lambda t, x: torch.cat([x, x**2], dim=1)
    fit = mg.clstd(quadratic, endless, paths, base=known, ergodic=True)
    with_one = mg.features_along(timed)  # {1, x, x^2}, but for a factor of the time
    tests = lambda p: with_one(p) / (1.3 + lq.NODES[:-1, None])
    average = fit.average_reward
    assert average != 0
    moments = mg.orthogonality(tests, fit, endless, paths, average_reward=average)
    assert moments.mean(0).abs().max() < 1e-12


def test_all_methods_keep_the_precision_of_the_paths(few):
    """Grids are in double precision, whatever the states are in."""
    problem, policy, paths = few
    half = replace(
        paths,
        states=paths.states.float(),
        actions=paths.actions.float(),
        increments=None,
    )
    value = mg.LinearValue(timed, torch.tensor(THETA))
    tests = mg.features_along(timed)
    for function in (
        lambda p: mg.martingale_loss(value, problem, p, policy),
        lambda p: mg.ctd0(value, problem, p, policy),
        lambda p: mg.ctd_lambda(value, problem, p, 0.5, policy),
        lambda p: mg.cgtd_loss(tests, value, problem, p, policy, weighting="covariance"),
        lambda p: mg.clstd(timed, problem, p, policy).coefficients,
        lambda p: (
            mg.clstd(
                lambda t, x: torch.cat([x, x**2], dim=1),
                replace(problem, discount=0.0, horizon=float("inf"), terminal_reward=None),
                p,
                policy,
                ergodic=True,
            ).coefficients
        ),
    ):
        assert function(half).dtype == torch.float32


def test_rewards_of_a_simulator_are_seen_only_afterwards(chain):
    problem, _, value, paths = chain
    paid = replace(paths, rewards=ctrl.running_rewards(problem, paths))
    problem = replace(problem, running_reward=None, temperature=0.0)

    def late(p):
        return torch.cat([torch.zeros_like(p.rewards[:, :1]), p.rewards[:, :-1]], 1)[..., None]

    assert mg.orthogonality(late, value, problem, paid).shape == (len(paths.states), 1)
    with pytest.raises(ValueError, match="adapted"):
        mg.orthogonality(lambda p: p.rewards[..., None], value, problem, paid)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_one_function_that_looks_ahead_is_found_among_others_of_any_size(chain, size):
    problem, policy, value, paths = chain

    def tests(p):
        ahead = size * p.states[:, 1:]
        ahead = torch.cat([ahead[:, :1], torch.full_like(ahead[:, 1:], 1e20)], dim=1)
        return torch.cat([ahead, torch.zeros_like(ahead)], dim=2)

    with pytest.raises(ValueError, match="step 0"):
        mg.orthogonality(tests, value, problem, paths, policy)


def test_least_squares_accept_features_of_any_size_and_refuse_nearly_equal_ones(few):
    problem, policy, paths = few
    for gap, refused in ((1e-3, False), (3e-16, True)):
        similar = lambda t, x, gap=gap: torch.cat([x, x + gap * x**2], dim=1)
        if refused:
            with pytest.raises(ValueError, match="determine"):
                mg.clstd(similar, problem, paths, policy)
        else:
            mg.clstd(similar, problem, paths, policy)


def test_test_functions_of_another_shape_are_refused(few):
    problem, policy, paths = few
    for tests in (
        lambda p: p.states[:, :-1, 0],
        lambda p: p.states[:, :-1, None],
        lambda p: p.states,
    ):
        with pytest.raises(ValueError, match="tests must return"):
            mg.orthogonality(tests, linear(THETA), problem, paths, policy)


def test_the_covariance_of_moving_test_functions_is_held_fixed(few):
    problem, policy, paths = few
    arguments = (linear(THETA), problem, paths, policy)

    def tests(theta):
        return lambda p: theta * mg.features_along(timed)(p)

    theta = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    loss = mg.cgtd_loss(tests(theta), *arguments, weighting="covariance")
    (slope,) = torch.autograd.grad(loss, theta)
    # m = theta m_1 and A = A_1 / theta^2 is held: d(m'A m / 2) = m_1'A_1 m_1 / theta
    one = mg.cgtd_loss(tests(1.0), *arguments, weighting="covariance")
    torch.testing.assert_close(slope, 2 * one / 1.3, rtol=1e-9, atol=0)
