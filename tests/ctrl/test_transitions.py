"""Transitions as decisions: against torch.distributions and against Girsanov."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import ctrl
from ctrl import girsanov, transitions

GRID = ctrl.TimeGrid(torch.tensor([0.0, 0.1, 0.35, 0.5, 0.9], dtype=torch.float64))  # uneven
EULER = ctrl.EulerMaruyama()
POLICY = ctrl.DeterministicPolicy(lambda t, x: torch.sin(x) - 0.3 * t)
REFERENCE = ctrl.DeterministicPolicy(lambda t, x: 0.4 * x + 0.2)


def model(constant: bool) -> ctrl.ControlledSDE:
    return ctrl.ControlledSDE(
        lambda t, x, a: a - 0.6 * x, lambda t, x: 0.7 if constant else 0.5 + 0.1 * x.square() + t
    )


def sample(sde: ctrl.ControlledSDE, event: tuple[int, ...], seed: int = 0) -> ctrl.Paths:
    g = torch.Generator().manual_seed(seed)
    start = torch.randn(6, *event, dtype=torch.float64, generator=g)
    return ctrl.simulate(ctrl.ControlProblem(sde, 1.0), POLICY, start, GRID, generator=g)


@dataclass(frozen=True)
class Widening:
    """Its spread depends on the action: the two laws differ in both of their parameters."""

    def step(self, sde, t0, t1, states, action, increment):
        mean, std = self.transition(sde, t0, t1, states, action)
        return mean + std * increment / (t1 - t0).sqrt()

    def transition(self, sde, t0, t1, states, action) -> tuple[Tensor, Tensor]:
        return states + 0.3 * action, 0.2 + action.square()


@given(
    seed=st.integers(0, 2**32 - 1),
    event=st.sampled_from([(), (2,), (3, 2, 2)]),
    solver=st.sampled_from([EULER, Widening()]),
    constant=st.booleans(),
)
def test_log_densities_and_divergences_are_those_of_torch(seed, event, solver, constant):
    sde = model(constant)
    paths = sample(sde, event, seed)
    log_prob = transitions.log_prob(sde, solver, POLICY, paths)
    log_ratio = transitions.log_ratio(sde, solver, POLICY, REFERENCE, paths)
    kl = transitions.transition_kl(sde, solver, POLICY, REFERENCE, paths)
    for k, t in enumerate(GRID.nodes[:-1]):
        x, after = paths.states[:, k], paths.states[:, k + 1]

        def law(policy: ctrl.Policy, x: Tensor = x, t: Tensor = t, k: int = k) -> Normal:
            return Normal(*solver.transition(sde, t, GRID.nodes[k + 1], x, policy.mean(t, x)))

        new, old = law(POLICY), law(REFERENCE)
        density, before = new.log_prob(after), old.log_prob(after)
        each = (density, density - before, kl_divergence(new, old))
        for computed, expected in zip((log_prob, log_ratio, kl), each, strict=True):
            # sums of at most 12 terms, each at most about 1e4 at spreads of 0.2 and more
            torch.testing.assert_close(
                computed[:, k], expected.reshape(6, -1).sum(1), rtol=1e-10, atol=1e-10
            )


def test_the_steps_log_ratios_add_up_to_girsanovs():
    sde = model(constant=False)
    paths = sample(sde, (2,))
    steps = transitions.log_ratio(sde, EULER, POLICY, REFERENCE, paths)
    whole = girsanov.log_ratio(sde, POLICY, REFERENCE, paths)
    torch.testing.assert_close(steps.sum(1), whole, rtol=1e-12, atol=1e-12)
    chain = transitions.transition_kl(sde, EULER, POLICY, REFERENCE, paths).sum(1)
    running = girsanov.path_kl(sde, POLICY, REFERENCE, paths)
    torch.testing.assert_close(chain, running, rtol=1e-12, atol=1e-12)


def test_equal_policies_have_a_log_ratio_of_exactly_zero_in_float32():
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.7)
    g = torch.Generator().manual_seed(0)
    paths = ctrl.simulate(
        ctrl.ControlProblem(sde, 1.0), POLICY, torch.randn(5, 4, 8, 8, generator=g), GRID,
        generator=g,
    )  # fmt: skip
    assert not transitions.log_ratio(sde, EULER, POLICY, POLICY, paths).any()
    assert not transitions.transition_kl(sde, EULER, POLICY, POLICY, paths).any()


def test_the_log_ratios_gradient_is_the_score_at_equal_policies():
    """d log_ratio = z d mean / std there: what a policy gradient multiplies with an advantage."""
    sde, gain = model(constant=True), torch.zeros((), dtype=torch.float64, requires_grad=True)
    paths = sample(sde, (2,))
    nudged = ctrl.DeterministicPolicy(lambda t, x: POLICY.mean(t, x) + gain * x)
    transitions.log_ratio(sde, EULER, nudged, POLICY, paths).sum().backward()
    assert paths.increments is not None
    expected = (paths.states[:, :-1] * paths.increments / 0.7).sum()
    torch.testing.assert_close(gain.grad, expected, rtol=1e-11, atol=1e-11)
    gain.grad = None
    girsanov.log_ratio(sde, nudged, POLICY, paths).sum().backward()
    torch.testing.assert_close(gain.grad, expected, rtol=1e-11, atol=1e-11)


def test_transitions_without_noise_have_no_density():
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: (t < 0.3) * 0.5)
    paths = sample(model(constant=True), (2,))
    for call in (
        lambda: transitions.log_prob(sde, EULER, POLICY, paths),
        lambda: transitions.log_ratio(sde, EULER, POLICY, REFERENCE, paths),
        lambda: transitions.transition_kl(sde, EULER, POLICY, REFERENCE, paths),
    ):
        with pytest.raises(ValueError, match=r"from t = 0\.35 has no density"):
            call()


def test_solvers_without_density_say_so():
    class Blind:
        def step(self, sde, t0, t1, states, action, increment):
            return states

    with pytest.raises(TypeError, match="density"):
        transitions.log_prob(model(True), Blind(), POLICY, sample(model(True), (2,)))


def test_one_coordinate_without_noise_is_enough_to_have_no_density():
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: torch.tensor([0.5, 0.0]).to(x) + 0 * x)
    with pytest.raises(ValueError, match="has no density"):
        transitions.log_prob(sde, EULER, POLICY, sample(model(constant=True), (2,)))


def test_transitions_keep_the_precision_of_the_states():
    paths = sample(model(constant=True), (2,))
    half = ctrl.Paths(paths.states.float(), None, None, GRID)
    assert transitions.log_prob(model(True), EULER, POLICY, half).dtype == torch.float32


def test_policies_are_given_the_time_in_the_states_precision():
    seen = []

    def mean(t, x):
        seen.append(t.dtype)
        return 0.3 * x

    policy, paths = ctrl.DeterministicPolicy(mean), sample(model(constant=True), (2,))
    half = ctrl.Paths(paths.states.float(), None, None, GRID)
    transitions.log_prob(model(True), EULER, policy, half)
    girsanov.path_kl(model(True), policy, REFERENCE, half)
    value = lambda t, x: seen.append(t.dtype) or x.sum(1)
    problem = ctrl.ControlProblem(model(True), 1.0)
    ctrl.policy_gradient.Transitions(EULER).advantages(problem, policy, value, half)
    acted = ctrl.Paths(half.states, half.states[:, :-1], None, GRID)
    ctrl.policy_gradient.pathwise_gradient(problem, policy, value, acted)
    assert set(seen) == {torch.float32}
