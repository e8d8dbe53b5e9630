"""One linear-quadratic problem by three routes that share no line: Riccati, grid, sampled paths."""

import math

import pytest
import torch

import ctrl
from ctrl import hjb

X = torch.tensor([[-0.8], [0.1], [0.9]], dtype=torch.float64)
ZERO = torch.zeros((), dtype=torch.float64)


def one(number):
    return torch.tensor([[number]], dtype=torch.float64)


@pytest.fixture(scope="module")
def riccati():
    lq = ctrl.linear.LinearQuadratic(
        A=one(-0.5), B=one(0.9), sigma=one(0.6), M=one(1.7), N=one(0.5), R=one(0.2),
        p=torch.tensor([0.3]).double(), l=torch.tensor([-0.4]).double(),
        discount=0.4, temperature=0.15,
    )  # fmt: skip
    return lq, ctrl.linear.solve_lq_discounted(lq)


def test_finite_differences_agree_with_riccati(riccati):
    lq, exact = riccati
    sde = ctrl.ControlledSDE(lambda t, x, a: -0.5 * x + 0.9 * a, lambda t, x: 0.6)
    problem = ctrl.ControlProblem(sde, math.inf, lq.running_reward, discount=0.4, temperature=0.15)
    axis = hjb.Axis(-6.0, 6.0, 601)
    actions = hjb.trapezoid(-14.0, 16.0, 301)
    solution = hjb.solve_discounted(problem, (axis,), actions, differences="central")
    # the scheme is exact for quadratics; what is left is the walls, six deviations away
    torch.testing.assert_close(solution.value(ZERO, X), exact.value(ZERO, X), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        solution.mean_action(ZERO, X), exact.policy().mean(ZERO, X), rtol=1e-3, atol=1e-3
    )


def test_the_learned_value_agrees_with_riccati_at_first_order_in_the_step(riccati):
    """CLSTD on quadrature paths of one step: its only error is the chain's."""
    lq, exact = riccati
    problem, policy = lq.problem(), exact.policy()
    gaps = []
    for h in (0.02, 0.01):
        grid = ctrl.TimeGrid(torch.tensor([0.0, h], dtype=torch.float64))
        noise = ctrl.noise.gauss_hermite(
            torch.tensor([1.0, h], dtype=torch.float64), nodes=5, action=(1,)
        )
        start = 0.7 * noise.increments[:, 0]
        later_noise = ctrl.Noise(
            noise.increments[:, 1:].contiguous(), noise.actions[:, 1:].contiguous(), noise.weights
        )
        paths = ctrl.simulate(problem, policy, start, grid, noise=later_noise)

        def quadratic(t, x):
            return torch.cat([torch.ones_like(x), x, x.square()], dim=1)

        learned = ctrl.martingale.clstd(quadratic, problem, paths, policy)
        gaps.append(float((learned(ZERO, X) - exact.value(ZERO, X)).abs().max()))
    assert gaps[1] < 0.02 * float(exact.value(ZERO, X).abs().max())
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.1)


def test_the_optimal_pair_is_normalised_and_gibbs(riccati):
    """int exp(q / temperature) da = 1, and the improvement of the optimum is the optimum."""
    lq, exact = riccati
    problem = lq.problem()
    improved = ctrl.q_learning.gibbs_policy(problem, exact.value, 1, X[0])
    policy = exact.policy()
    torch.testing.assert_close(improved.mean(ZERO, X), policy.mean(ZERO, X), rtol=1e-8, atol=1e-8)
    a = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    q = ctrl.q_learning.q_rate(problem, exact.value, ZERO, X[:1].expand(4001, 1), a)
    mass = float((q / 0.15).exp().sum() * 24 / 4000)
    assert mass == pytest.approx(1, rel=1e-9)
