"""Policies with memory: which functions take them, which refuse; the law is verified by a claim."""

import pytest
import torch

import ctrl

SDE = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.5)
PROBLEM = ctrl.ControlProblem(SDE, 0.6, terminal_reward=lambda x: -x[:, 0].square())
GRID = ctrl.TimeGrid(torch.tensor([0.0, 0.1, 0.35, 0.6], dtype=torch.float64))
START = torch.tensor([[0.4], [-1.2], [0.9]], dtype=torch.float64)


def averaging(std=0.3):
    """Acts on the mean of all states so far: the memory is their sum and their number."""
    return ctrl.PolicyWithMemory(
        start=lambda x: torch.cat([x, torch.ones_like(x)], 1),
        remember=lambda t, x, a, m: m + torch.cat([x, torch.ones_like(x)], 1),
        at=lambda m: ctrl.GaussianPolicy(lambda t, x: -m[:, :1] / m[:, 1:], std),
    )


def rolled_out(policy, generator):
    return ctrl.simulate(PROBLEM, policy, START, GRID, generator=generator)


def test_a_memory_that_is_not_used_changes_nothing(generator):
    plain = ctrl.GaussianPolicy(lambda t, x: -0.4 * x, 0.3)
    other = ctrl.PolicyWithMemory(lambda x: x, lambda t, x, a, m: m + a, lambda m: plain)
    state = generator.get_state()
    one = rolled_out(plain, generator)
    two = rolled_out(other, generator.set_state(state))
    assert torch.equal(one.states, two.states)
    for function in (ctrl.paths.log_probs, lambda p, paths: ctrl.girsanov.path_kl(
        SDE, p, ctrl.DeterministicPolicy(lambda t, x: x), paths
    )):  # fmt: skip
        assert torch.equal(function(plain, one), function(other, one))


def test_one_roll_out_does_not_remember_the_one_before(generator):
    policy, state = averaging(), generator.get_state()
    first = rolled_out(policy, generator)
    again = rolled_out(policy, generator.set_state(state))
    assert torch.equal(first.states, again.states)
    end = ctrl.simulate_end(PROBLEM, policy, START, GRID, generator=generator.set_state(state))
    assert torch.equal(first.states[:, -1], end)


def test_actions_have_the_density_of_the_path_so_far(generator):
    policy = averaging()
    paths = rolled_out(policy, generator)
    log_prob = ctrl.paths.log_probs(policy, paths)
    x = paths.states[:, :-1, 0]
    average = torch.cat([2 * x[:, :1], x[:, :1] + x.cumsum(1)[:, :-1] + 0], 1)
    average = average / torch.tensor([2.0, 2.0, 3.0])
    average[:, 0] = x[:, 0]
    law = torch.distributions.Normal(-average, 0.3)
    torch.testing.assert_close(log_prob, law.log_prob(paths.actions[..., 0]))


def test_what_rests_on_a_value_of_the_state_refuses_a_memory(generator):
    policy = averaging()
    paths, value = rolled_out(policy, generator), lambda t, x: x[:, 0]
    gradient = ctrl.policy_gradient
    for refuses in (
        lambda: gradient.temporal_difference_gradient(PROBLEM, policy, value, paths),
        lambda: gradient.q_rate_gradient(PROBLEM, policy, value, paths),
        lambda: gradient.pathwise_gradient(PROBLEM, policy, value, paths),
        lambda: ctrl.exploratory_sde(SDE, policy),
        lambda: ctrl.policy.mean_action(policy, GRID.nodes[0], START),
    ):
        with pytest.raises(TypeError, match="policy"):
            refuses()


def test_bad_memories_are_refused(generator):
    plain = ctrl.GaussianPolicy(lambda t, x: x, 0.3)
    with pytest.raises(TypeError, match="remember"):
        ctrl.PolicyWithMemory(lambda x: x, 0.3, lambda m: plain)
    for bad, error in (
        (ctrl.PolicyWithMemory(lambda x: x[:1], lambda t, x, a, m: m, lambda m: plain), "start"),
        (ctrl.PolicyWithMemory(lambda x: x, lambda t, x, a, m: m[:, 0], lambda m: plain), "remem"),
    ):
        with pytest.raises(ValueError, match=f"policy.{error}"):
            rolled_out(bad, generator)
    no_policy = ctrl.PolicyWithMemory(lambda x: x, lambda t, x, a, m: m, lambda m: m)
    with pytest.raises(TypeError, match=r"policy\.at must return a Policy"):
        rolled_out(no_policy, generator)
    paths = ctrl.simulate(PROBLEM, averaging(), START, GRID, generator=generator, keep=("states",))
    with pytest.raises(ValueError, match="kept their actions"):
        ctrl.paths.log_probs(averaging(), paths)
