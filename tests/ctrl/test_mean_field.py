from dataclasses import replace

import pytest
import torch

import ctrl
from ctrl import linear, mean_field

TIMES = torch.tensor([0.0, 0.3, 0.8], dtype=torch.float64)


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


def problem(mean=((0.4, 0.1), (-0.3, 0.2)), **more):
    lq = linear.LinearQuadratic(
        tensor([[-0.5, 0.2], [0.1, -0.9]]), tensor([[1.0], [0.3]]),
        tensor([[0.5, 0.0], [0.0, 0.3]]), tensor([[1.0, 0.1], [0.1, 0.6]]), tensor([[0.7]]),
        p=tensor([0.2, -0.1]), f=tensor([0.1, 0.3]), h=tensor([0.4, 0.2]), **more,
    )  # fmt: skip
    cost = tensor([[0.5, 0.2], [0.2, 0.8]])
    return mean_field.MeanFieldLQ(lq, tensor(mean), cost, -0.2 * cost)


def alone(**more):
    zero = tensor([[0.0, 0.0], [0.0, 0.0]])
    whole = problem(((0.0, 0.0), (0.0, 0.0)), **more)
    return replace(whole, M_mean=zero, H_mean=zero)


def test_without_the_mean_every_particle_is_alone():
    lone, t = alone(temperature=0.2), tensor(0.0)
    x = tensor([[[0.3, -0.7], [1.1, 0.4]]])
    single = linear.solve_lq(lone.lq, TIMES)
    for particles in (None, 2):
        solution = mean_field.solve(lone, TIMES, particles)
        expected = single.value(t, x[0]).mean()
        law = linear.Gaussian(x.mean((0, 1)), torch.cov(x[0].T, correction=0))
        torch.testing.assert_close(solution.value(t, x)[0], expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(solution.value_of(t, law), expected, rtol=1e-11, atol=1e-11)
        actions = solution.policy().mean(t, x)[0]
        torch.testing.assert_close(actions, single.law_at(t).mean(x[0]), rtol=1e-11, atol=1e-11)


def test_one_particle_is_its_own_mean():
    whole = problem()
    single = linear.solve_lq(
        replace(
            whole.lq,
            A=whole.lq.A + whole.A_mean,
            M=whole.lq.M + whole.M_mean,
            H=whole.lq.H + whole.H_mean,
        ),
        TIMES,
    )
    x = tensor([[[0.3, -0.7]], [[1.1, 0.4]]])
    value = mean_field.solve(whole, TIMES, 1).value(tensor(0.3), x)
    torch.testing.assert_close(value, single.value(tensor(0.3), x[:, 0]), rtol=1e-11, atol=1e-11)


def test_a_warm_policy_draws_with_the_temperature_over_the_cost(generator):
    policy = mean_field.solve(problem(temperature=0.28), TIMES).policy()
    assert policy.std == pytest.approx((0.28 / 0.7) ** 0.5)
    system = problem(temperature=0.28).particles(5, 0.8)
    start = torch.zeros(3, 5, 2, dtype=torch.float64)
    paths = ctrl.simulate(system, policy, start, ctrl.TimeGrid(TIMES), generator=generator)
    assert paths.actions.shape == (3, 2, 5, 1)
    assert ctrl.returns_to_go(system, paths, policy).shape == (3, 3)


def test_bad_input_is_refused():
    whole = problem()
    with pytest.raises(ValueError, match="particles must be an integer of at least 1, got 0"):
        mean_field.solve(whole, TIMES, 0)
    with pytest.raises(ValueError, match="particles must be an integer of at least 1, got 0"):
        whole.particles(0, 1.0)
    with pytest.raises(ValueError, match="M_mean"):
        replace(whole, M_mean=tensor([[1.0, 0.3], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="A_mean must be finite"):
        replace(whole, A_mean=whole.A_mean / 0)
    with pytest.raises(ValueError, match=r"A_mean must be .* in float64"):
        replace(whole, A_mean=whole.A_mean.float())
    with pytest.raises(ValueError, match="C = 0 and D = 0"):
        replace(whole, lq=replace(whole.lq, C=torch.ones(2, 2, 2).double()))
    skew = replace(whole, lq=replace(whole.lq, sigma=tensor([[0.5, 0.1], [0.0, 0.3]])))
    with pytest.raises(ValueError, match="sigma must be diagonal for particles"):
        skew.particles(4, 1.0)
