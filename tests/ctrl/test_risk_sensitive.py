import math
from dataclasses import replace

import pytest
import torch

import ctrl
from ctrl import linear, q_learning
from ctrl import risk_sensitive as rs

RISK = -0.7


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


def lq(**more):
    matrices = {
        "A": [[-0.3, 0.5], [0.1, -0.8]], "B": [[0.2], [1.1]], "sigma": [[0.4, 0.1], [0.0, 0.5]],
        "M": [[1.2, 0.2], [0.2, 0.6]], "N": [[0.8]], "p": [0.3, -0.2], "f": [0.1, 0.4],
        "H": [[0.5, 0.1], [0.1, 0.9]], "h": [0.2, -0.6],
    }  # fmt: skip
    return linear.LinearQuadratic(**{key: tensor(each) for key, each in matrices.items()}, **more)


TIMES = tensor([0.0, 0.4, 0.9])


def test_seeking_risk_is_to_own_the_noise_as_an_action():
    # max over w of w . sigma' grad V - |w|^2 / (2 risk) is risk/2 |sigma' grad V|^2
    risk, plain = 0.45, lq()
    both = replace(
        plain,
        B=torch.cat([plain.B, plain.sigma], 1),
        N=torch.block_diag(plain.N, torch.eye(2).double() / risk),
        R=tensor([[0.0] * 2] * 3),
        l=tensor([0.0] * 3),
        D=torch.zeros(2, 2, 3).double(),
    )
    ours, theirs = rs.solve_lq(plain, risk, TIMES).values, linear.solve_lq(both, TIMES).values
    for one, other in zip(vars(ours).values(), vars(theirs).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_the_optimal_policys_own_value_is_the_optimal_value():
    warm = lq(temperature=0.2)
    best = rs.solve_lq(warm, RISK, TIMES)
    again = rs.evaluate_lq(warm, best.law_at, RISK, TIMES)
    for one, other in zip(vars(best.values).values(), vars(again.values).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_without_risk_all_is_risk_neutral(generator):
    warm = lq(temperature=0.2)
    best, solved = linear.solve_lq(warm, TIMES), rs.solve_lq(warm, 0.0, TIMES)
    torch.testing.assert_close(solved.values.hessian, best.values.hessian, rtol=1e-11, atol=1e-11)
    problem = warm.problem(0.9)
    policy = best.policy()
    paths = ctrl.simulate(
        problem, policy, torch.ones(6, 2).double(), ctrl.uniform_grid(0.9, 3), generator=generator
    )
    pair = best.value, q_learning.GibbsQ(policy, 0.2)
    ours, theirs = rs.increments(*pair, problem, paths, 0.0), q_learning.increments(
        *pair, problem, paths
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    returns = tensor([0.3, -1.2, 0.8])
    weights = tensor([0.2, 0.5, 0.3])
    torch.testing.assert_close(rs.certainty_equivalent(returns, 0.0, weights), weights @ returns)


@pytest.mark.parametrize(
    ("noise", "diffusion", "expected"),
    [
        ("diagonal", lambda t, x: 0.5 + 0.1 * x, lambda x, g: (0.5 + 0.1 * x) * g),
        ("scalar", lambda t, x: 0.5 + 0.1 * x, lambda x, g: ((0.5 + 0.1 * x) * g).sum(1)),
        (
            "general",
            lambda t, x: tensor([[0.3, 0.1, 0.7], [0.2, -0.4, 0.0]]).expand(len(x), 2, 3),
            lambda x, g: g @ tensor([[0.3, 0.1, 0.7], [0.2, -0.4, 0.0]]),
        ),
    ],
)
def test_every_kind_of_noise_has_its_variation_and_its_tilt(noise, diffusion, expected):
    sde = ctrl.ControlledSDE(
        lambda t, x, a: -x, diffusion, noise, 3 if noise == "general" else None
    )  # fmt: skip
    problem, t = ctrl.ControlProblem(sde, 1.0), tensor(0.2)
    x = tensor([[0.3, -0.8], [1.1, 0.4], [0.2, 0.9]])

    def value(t, x):
        return (1 + t) * (x[:, 0] ** 2 * x[:, 1])

    slope = 1.2 * torch.stack([2 * x[:, 0] * x[:, 1], x[:, 0] ** 2], 1)
    along = expected(x, slope)
    torch.testing.assert_close(rs.noise_of_value(sde, value, t, x, x), along)
    more = rs.q_rate(problem, value, RISK, t, x, x) - q_learning.q_rate(problem, value, t, x, x)
    torch.testing.assert_close(more, 0.5 * RISK * along.reshape(3, -1).square().sum(1))
    sigma = sde.columns(t, x)
    tilt = rs.tilted_sde(sde, value, RISK).drift_at(t, x, x) + x
    torch.testing.assert_close(tilt, RISK * (sigma @ sigma.mT @ slope.unsqueeze(2)).squeeze(2))


def test_losses_are_their_sums_over_steps(generator):
    warm = lq(temperature=0.2)
    problem, policy = warm.problem(0.9), linear.solve_lq(warm, TIMES).policy()
    paths = ctrl.simulate(
        problem, policy, torch.ones(4, 2).double(), ctrl.uniform_grid(0.9, 3), generator=generator
    )
    theta, psi = (tensor(each).requires_grad_() for each in (0.6, -0.3))

    def value(t, x):
        return theta * (1 + t) * x.square().sum(1)

    def q(t, x, a):
        return psi * a[:, 0] * x[:, 0]

    x, a = paths.states, paths.actions
    V = theta * (1 + paths.grid.nodes) * x.square().sum(2)
    V = torch.cat([V[:, :-1], problem.terminal_reward(x[:, -1])[:, None]], 1)
    rewards = ctrl.running_rewards(problem, paths)
    rates = psi * a[..., 0] * x[:, :-1, 0]
    dm = V.diff() + rewards - (rates + 0.4) * 0.3 + 0.5 * RISK * V.diff().square()
    pair = value, q, problem, paths, RISK
    torch.testing.assert_close(rs.increments(*pair, 0.4), dm, rtol=1e-12, atol=1e-12)
    loss = rs.orthogonality_loss(*pair, 0.4).sum()
    slopes = torch.autograd.grad(loss, (theta, psi), retain_graph=True)
    along = (V[:, :-1] / theta, rates / psi)
    for slope, each in zip(slopes, along, strict=True):
        torch.testing.assert_close(slope, -(each * dm).sum(), rtol=1e-12, atol=1e-12)

    def tests(paths):
        return torch.cat([paths.states[:, :-1], paths.actions], 2)

    xi = torch.cat([x[:, :-1], a], 2)
    expected = (xi * dm[..., None]).sum(1)
    torch.testing.assert_close(rs.orthogonality(tests, *pair, 0.4), expected)


def test_tilting_weights_are_the_derivative_of_the_certainty_equivalent():
    returns = tensor([0.3, -1.2, 0.8, 2.1]).requires_grad_()
    weights = tensor([0.1, 0.4, 0.3, 0.2])
    for each in (None, weights):
        sure = rs.certainty_equivalent(returns, RISK, each)
        slope = torch.autograd.grad(sure, returns)[0]
        torch.testing.assert_close(rs.tilting_weights(returns, RISK, each), slope)


def test_what_has_no_risk_sensitive_value_is_refused(as_users_run_it):
    law = linear.LinearGaussian(tensor([[0.1]]), tensor([0.0]), tensor([[1.0]]))
    with pytest.raises(ValueError, match=r"finite back to t = 0.*nearer to 0 than 40"):
        rs.solve_lq(replace(lq(), M=-lq().M, H=-lq().H), 40.0, TIMES)
    with pytest.raises(ValueError, match="discount must be 0"):
        rs.solve_lq(lq(discount=0.2), RISK, TIMES)
    with pytest.raises(ValueError, match="C = 0 and D = 0"):
        rs.evaluate_lq(replace(lq(), C=torch.ones(2, 2, 2).double()), law, RISK, TIMES)
    with pytest.raises(ValueError, match="gain must be"):
        rs.evaluate_lq(lq(), law, RISK, TIMES)
    problem = ctrl.ControlProblem(lq().sde, 1.0, discount=0.3)
    x = torch.ones(2, 2).double()
    with pytest.raises(ValueError, match=r"problem\.discount must be 0"):
        rs.q_rate(problem, lambda t, x: x.sum(1), RISK, tensor(0.0), x, x[:, :1])
    with pytest.raises(ValueError, match="risk must be finite"):
        rs.certainty_equivalent(tensor([1.0]), math.nan)
    with pytest.raises(ValueError, match="weights must"):
        rs.tilting_weights(tensor([1.0, 2.0]), RISK, tensor([0.7, 0.7]))


def test_nothing_is_added_after_the_end_of_a_path(generator):
    warm = lq(temperature=0.2)
    problem, solution = warm.problem(0.9), rs.solve_lq(warm, RISK, TIMES)
    policy = solution.policy()
    pair = solution.value, q_learning.GibbsQ(policy, 0.2), problem
    grid = ctrl.uniform_grid(0.9, 3)
    start = torch.ones(3, 2, dtype=torch.float64)
    paths = ctrl.simulate(problem, policy, start, grid, generator=generator)
    ends = torch.tensor([1, 3, 2])
    cut = ctrl.paths.stop(paths, ends, torch.tensor([False, True, False]))
    whole, part = rs.increments(*pair, paths, RISK), rs.increments(*pair, cut, RISK)
    torch.testing.assert_close(part, torch.where(cut.running, whole, 0), rtol=1e-12, atol=1e-12)
