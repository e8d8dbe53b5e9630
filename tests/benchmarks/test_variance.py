"""The benchmark of gradients, in small, and its exact side against the problem's own judgement."""

import dataclasses
import json

import pytest
import torch

from benchmarks import variance
from benchmarks.exact_laws import affine_objective, affine_values
from benchmarks.variance import Measured, Options
from diffusion_envs.exact import GaussianProblem, table
from diffusion_envs.samplers import DDIM

PROBLEM = GaussianProblem()
CHAIN = DDIM(1.0).bind(table(), 6)
WEIGHTS = variance.half_way(PROBLEM)


def measured(name, **settings):
    options = Options(**{"batches": 12, "samples": 32, "value_updates": 2} | settings)
    return Measured(PROBLEM, variance.estimators()[name], 6, WEIGHTS, options)


def test_the_differentiable_objective_is_the_problems_own():
    environment = PROBLEM.environment(CHAIN, seed=0)
    parameters = environment.model.parameters
    with torch.no_grad():
        for parameter, value in zip(parameters, WEIGHTS, strict=True):
            parameter.copy_(value)
    expected = PROBLEM.evaluate(environment.model, CHAIN)
    with torch.no_grad():
        found = affine_objective(PROBLEM, CHAIN, variance.exact_correction(WEIGHTS))
    assert float(found) == pytest.approx(expected.objective, rel=1e-6)  # its weights are float32


@torch.no_grad()
def test_half_way_is_about_three_quarters_of_the_gain():
    """J is nearly quadratic around the optimum, and half of the way leaves a quarter."""
    chain = DDIM(1.0).bind(table(), 40)  # its optimum is near that of continuous time
    best = PROBLEM.optimum(chain).objective
    start, there = (
        float(affine_objective(PROBLEM, chain, variance.exact_correction(w)))
        for w in ([torch.zeros_like(w) for w in WEIGHTS], WEIGHTS)
    )
    assert 0.65 < (there - start) / (best - start) < 0.85


@pytest.mark.parametrize("spread", [None, 0.4])
def test_exact_values_are_expectations_of_the_roll_outs(spread):
    name = "drawn 0.3, exact V" if spread else "score-as-action, exact V"
    one = measured(name, batches=100)
    sample = one.sample()
    values = one.values(sample)
    to_go = sample.rollout.costs.flip(1).cumsum(1).flip(1)
    returns = sample.rollout.rewards[:, None] - PROBLEM.kl_weight * to_go
    gap = (returns - values[:, :-1])[:, [0, 3]]
    error = gap.std(0) / len(gap) ** 0.5
    assert bool((gap.mean(0).abs() < 5 * error).all())
    # V explains what can be known: the remainder does not depend on the state
    states = sample.rollout.states[:, [0, 3]]
    slope = (gap[:, :, None] * (states - states.mean(0))).mean(0)
    bound = 5 * gap.std(0)[:, None] * states.std(0) / len(gap) ** 0.5
    assert bool((slope.abs() < bound).all())


@torch.no_grad()
def test_values_without_a_cost_are_those_of_the_reward():
    correction = variance.exact_correction(WEIGHTS)
    free = affine_values(PROBLEM, CHAIN, correction, None, 0.0)[0]
    charged = affine_values(PROBLEM, CHAIN, correction)[0]
    x = torch.tensor([0.3, -0.4], dtype=torch.float64)
    assert float(free(x)) > float(charged(x))


@pytest.mark.parametrize(
    "name", ["score-as-action, exact V, dV", "draft (all steps, KL)", "score-as-action, no V"]
)
def test_unbiased_estimators_have_the_exact_gradient_for_mean(name):
    one = measured(name, batches=60)
    gradients = one.gradients(one.sample())
    truth = variance.exact_gradient(PROBLEM, one.sampler, WEIGHTS)
    # centring 32 advantages by their own mean shrinks the gradient by 1 - 1/32
    scale = 1 - 1 / 32 if "score" in name else 1.0
    error = gradients.std(0) / len(gradients) ** 0.5
    z = (gradients.mean(0) - scale * truth) / error
    assert float(z.abs().max()) < 5  # of 36 coefficients
    assert float(error.norm()) < 0.4 * float(truth.norm())  # a wrong sign or factor 2 would show


def test_a_quarter_of_the_steps_is_unbiased_however_they_are_drawn():
    options = {"batches": 60, "value_updates": 2}
    whole = measured("score-as-action", **options)
    sample = whole.sample()
    values = torch.zeros_like(whole.values(sample))
    for name in ("score-as-action, a quarter", "score-as-action, a quarter by g^2"):
        few = measured(name, **options)
        # the same, bad, V for both: what differs is the draw
        for one in (whole, few):
            one.values = lambda _: values
        gap = few.gradients(sample) - whole.gradients(sample)
        z = gap.mean(0) / (gap.std(0) / len(gap) ** 0.5)
        assert float(z.abs().max()) < 5


def test_importance_weights_change_nothing_at_the_policy_that_sampled():
    sample = measured("ddpo").sample()
    one = measured("ddpo").gradients(sample)
    objective = variance.o.DDPOScoreFunction()
    other = measured("ddpo")
    other.objective = objective
    other.trainer.objective = objective
    torch.testing.assert_close(one, other.gradients(sample), rtol=1e-4, atol=1e-6)


def test_relative_variance_and_cosines_of_known_gradients(generator):
    truth = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    noise = torch.randn(40_000, 3, dtype=torch.float64, generator=generator)
    found = variance.summary(2 * truth + 5 * noise, truth)
    # 3 * 25 / 100; its standard error is reported
    value, error = found["relative_variance"]
    assert abs(value - 0.75) < 5 * error < 0.1
    assert found["cosine_of_mean"][0] == pytest.approx(1.0, abs=1e-3)
    assert found["norm"] == pytest.approx(2.0, abs=0.05)


def test_a_value_network_is_trained_without_moving_the_policy():
    one = measured("score-as-action", value_updates=3)
    sample = one.sample()
    before = one.values(sample)
    critics = {}
    cost = one.prepare(sample, critics)
    assert cost == {"queries": 32, "calls": 3 * 32 * 6}
    learned = one.values(sample)
    assert not torch.equal(before, learned)
    again = measured("score-as-action, a quarter", value_updates=3)
    again.prepare(sample, critics)
    assert torch.equal(again.values(sample), learned)


def test_what_is_measured_is_written_and_not_repeated(tmp_path, monkeypatch):
    names = ("ddpo", "adjoint-matching (path KL)")
    options = Options(names, steps=(4, 6), batches=20, samples=4)
    options = dataclasses.replace(options, runs=tmp_path / "runs", output=tmp_path / "docs")
    variance.main(options)
    rows = json.loads((tmp_path / "docs/variance.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * len(names)
    assert len((tmp_path / "docs/variance.csv").read_text().splitlines()) == len(rows) + 1
    assert (tmp_path / "docs/variance.png").stat().st_size > 10_000
    monkeypatch.setattr(variance, "_measure", None)
    variance.main(options)
    assert json.loads((tmp_path / "docs/variance.json").read_text())["rows"] == rows


def test_names_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="unknown estimators"):
        variance.main(Options(("nothing",), runs=tmp_path, output=tmp_path))
    with pytest.raises(SystemExit, match="unknown policies"):
        variance.main(Options(policies=("nowhere",), runs=tmp_path, output=tmp_path))
