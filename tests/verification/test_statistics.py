"""The test's own error rates, by simulation, and that it cannot be misread."""

import math

import pytest
import torch

from verification.statistics import Verdict, decide, influence, samples_needed

LAWS = {  # of mean 0 and variance 1
    "normal": lambda shape, g: torch.randn(shape, generator=g, dtype=torch.float64),
    "exponential": lambda shape, g: (
        torch.empty(shape, dtype=torch.float64).exponential_(generator=g) - 1
    ),
    "chi-square": lambda shape, g: (
        (torch.randn(shape, generator=g, dtype=torch.float64).square() - 1) / math.sqrt(2)
    ),
    "rare jump": lambda shape, g: (
        ((torch.rand(shape, generator=g, dtype=torch.float64) < 0.002).double() - 0.002)
        / math.sqrt(0.002 * 0.998)
    ),
}


def rates(law, shift, tolerance, false_fail, false_pass, runs, g):
    """Shares of PASS and FAIL over runs of their own."""
    most = 3 * samples_needed(tolerance, 1.0, false_pass)
    counts = dict.fromkeys(Verdict, 0)
    for _ in range(runs):
        samples = LAWS[law](most, g) + shift
        found = decide(
            samples.split(50), 0.0, tolerance=tolerance, variance=1.0,
            false_fail=false_fail, false_pass=false_pass, most=most,
        )  # fmt: skip
        counts[found.verdict] += 1
    return counts[Verdict.PASS] / runs, counts[Verdict.FAIL] / runs


@pytest.mark.parametrize("law", LAWS)
def test_error_rates_are_below_what_is_stated(law, generator):
    """2 % stated, 400 runs: a rate of 2 % gives more than 20 of them with probability 3e-5."""
    passed, failed = rates(law, 0.0, 0.25, 0.02, 0.02, 400, generator)
    assert failed <= 20 / 400
    # power; one jump in the few samples that decide raises the variance alarm, and waits
    assert passed > (0.8 if law == "rare jump" else 0.9)
    for side in (1, -1):
        passed, _ = rates(law, side * 0.25, 0.25, 0.02, 0.02, 400, generator)
        assert passed <= 20 / 400


def test_gross_errors_fail_at_the_strictest_rates(generator):
    found = decide(
        (torch.randn(500, generator=generator) + 1.0 for _ in range(20)), 0.0,
        tolerance=0.5, variance=1.2,
    )  # fmt: skip
    assert found.verdict is Verdict.FAIL
    assert found.n <= 500


def test_a_right_claim_passes_with_about_the_samples_that_are_planned(generator):
    planned = samples_needed(0.1, 1.0)
    used = []
    for _ in range(20):
        samples = torch.randn(4 * planned, generator=generator, dtype=torch.float64)
        found = decide(samples.split(20), 0.0, tolerance=0.1, variance=1.0)
        assert found.verdict is Verdict.PASS
        used.append(found.n)
    # the plan is the mean; 20 runs of a spread of a third
    assert 0.7 * planned < sum(used) / len(used) < 1.3 * planned


def test_influence_is_catonis_bound():
    """-log(1 - x + x^2/2) <= phi(x) <= log(1 + x + x^2/2), with equality on one side."""
    x = torch.linspace(-30, 30, 2001, dtype=torch.float64)
    upper = torch.log1p(x + 0.5 * x.square())
    lower = -torch.log1p(-x + 0.5 * x.square())
    assert bool((influence(x) <= upper + 1e-12).all())
    assert bool((influence(x) >= lower - 1e-12).all())


def test_too_few_samples_are_inconclusive_and_say_how_many_would_do():
    found = decide([torch.zeros(3)], 0.0, tolerance=0.01, variance=1.0)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.needed >= samples_needed(0.01, 1.0)
    with pytest.raises(TypeError, match="truth value"):
        bool(found.verdict)


def test_nan_fails_at_once_and_wild_samples_never_pass(generator):
    batches = [torch.zeros(10), torch.tensor([0.0, math.nan])]
    assert decide(batches, 0.0, tolerance=0.1, variance=1.0).verdict is Verdict.FAIL
    wild = 3 * torch.randn(20_000, generator=generator)
    found = decide(wild.split(1000), 0.0, tolerance=0.5, variance=1.0, most=20_000)
    assert found.verdict is not Verdict.PASS
    assert "variance" in found.reason or found.verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tolerance", 0.0), ("tolerance", math.nan), ("variance", -1.0), ("variance", math.inf),
        ("false_fail", 0.0), ("false_pass", 1.0), ("most", 0),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(name, value):
    settings = {"tolerance": 0.1, "variance": 1.0} | {name: value}
    with pytest.raises(ValueError, match=name):
        decide([torch.zeros(3)], 0.0, **settings)
    with pytest.raises(ValueError, match="sample"):
        decide([], 0.0, tolerance=0.1, variance=1.0)
