"""The test's own error rates, by simulation, and that it cannot be misread."""

import inspect
import itertools
import math

import pytest
import torch

from verification.statistics import Verdict, decide, influence, samples_needed

SIGNS = torch.tensor([1.0, -1.0], dtype=torch.float64)
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
        decision = decide(
            samples.split(50), 0.0, tolerance=tolerance, variance=1.0,
            false_fail=false_fail, false_pass=false_pass, most=most,
        )  # fmt: skip
        counts[decision.verdict] += 1
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
    decision = decide(
        (torch.randn(500, generator=generator) + 1.0 for _ in range(20)), 0.0,
        tolerance=0.5, variance=1.2,
    )  # fmt: skip
    assert decision.verdict is Verdict.FAIL
    assert decision.n <= 500


def test_a_right_claim_passes_with_about_the_samples_that_are_planned(generator):
    planned = samples_needed(0.1, 1.0)
    used = []
    for _ in range(20):
        samples = torch.randn(4 * planned, generator=generator, dtype=torch.float64)
        decision = decide(samples.split(20), 0.0, tolerance=0.1, variance=1.0)
        assert decision.verdict is Verdict.PASS
        used.append(decision.n)
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
    decision = decide([torch.zeros(3)], 0.0, tolerance=0.01, variance=1.0)
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert decision.needed >= samples_needed(0.01, 1.0)
    with pytest.raises(TypeError, match="truth value"):
        bool(decision.verdict)


def test_nan_fails_at_once_and_wild_samples_never_pass(generator):
    batches = [torch.zeros(10), torch.tensor([0.0, math.nan])]
    assert decide(batches, 0.0, tolerance=0.1, variance=1.0).verdict is Verdict.FAIL
    wild = 3 * torch.randn(20_000, generator=generator)
    decision = decide(wild.split(1000), 0.0, tolerance=0.5, variance=1.0, most=20_000)
    assert decision.verdict is not Verdict.PASS
    assert "variance" in decision.reason or decision.verdict is Verdict.FAIL


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


# --- the walks themselves, sample by sample, in plain Python


def walked(batches, claimed, tolerance, variance, false_fail, false_pass, most):
    """Verdict, n, mean and evidence by the module's definition, one sample at a time."""
    lam, seen = tolerance / variance, []
    walks, peaks = [0.0] * 4, [0.0] * 4
    for batch in batches:
        for sample in batch[: most - len(seen)]:
            seen.append(sample)
            x = sample - claimed
            for i, y in enumerate((x, -x, x + tolerance, -(x - tolerance))):
                phi = math.copysign(math.log(1 + abs(lam * y) + (lam * y) ** 2 / 2), y)
                walks[i] += phi - lam**2 * variance / 2
                peaks[i] = max(peaks[i], walks[i])
        evidence = (max(peaks[:2]), peaks[2], peaks[3])
        n, mean = len(seen), sum(seen) / len(seen)
        if evidence[0] >= math.log(2 / false_fail):
            return Verdict.FAIL, n, mean, evidence
        sample_variance = sum((sample - mean) ** 2 for sample in seen) / n
        if min(evidence[1:]) >= math.log(1 / false_pass) and sample_variance <= 1.25 * variance:
            return Verdict.PASS, n, mean, evidence
        if n >= most:
            break
    return Verdict.INCONCLUSIVE, n, mean, evidence


@pytest.mark.parametrize("shift", [0.0, 0.2, -0.2, 0.9, -0.9])
@pytest.mark.parametrize(("size", "most"), [(1, 10_000), (7, 10_000), (7, 40)])
@pytest.mark.parametrize("rates", [(1e-2, 1e-4), (1e-4, 1e-2), (0.4, 0.5)], ids=str)
def test_decisions_are_those_of_the_walks(shift, size, most, rates, generator):
    samples = 0.7 + shift + 1.1 * torch.randn(4000, generator=generator, dtype=torch.float64)
    settings = {
        "claimed": 0.7, "tolerance": 0.4, "variance": 1.3,
        "false_fail": rates[0], "false_pass": rates[1], "most": most,
    }  # fmt: skip
    batches = samples.split(size)
    verdict, n, mean, evidence = walked([batch.tolist() for batch in batches], **settings)
    decision = decide(iter(batches), **settings)
    assert (decision.verdict, decision.n) == (verdict, n)
    assert decision.mean == pytest.approx(mean, rel=1e-12)
    assert decision.log_evidence == pytest.approx(evidence, rel=1e-10, abs=1e-12)
    assert decision.reason == ""
    if verdict is Verdict.INCONCLUSIVE:
        assert decision.needed == max(2 * n, samples_needed(0.4, 1.3, rates[1]))
    else:
        assert decision.needed is None


def test_the_plan_is_twice_the_logarithm_of_the_rate_by_the_squared_signal():
    """And 1.4 of that, rounded up: both sides must be refuted."""
    assert samples_needed(0.3, 2.0, 1e-3) == math.ceil(2.8 * 3 * math.log(10) * 2 / 0.09)
    assert samples_needed(0.3, 2.0, 0.5) == math.ceil(2.8 * math.log(2) * 2 / 0.09)
    assert samples_needed(0.3, 2.0) == math.ceil(2.8 * 6 * math.log(10) * 2 / 0.09)


def test_rates_are_a_millionth_and_samples_ten_million_unless_told():
    """Samples of 1, or of 0: each adds log(1 + 1 + 1/2) - 1/2 to one walk, or to two."""
    for value, bound in ((1.0, 2e6), (0.0, 1e6)):
        samples = torch.full((200,), value, dtype=torch.float64)
        decision = decide(samples.split(1), 0.0, tolerance=1.0, variance=1.0)
        step = math.log(2.5) - 0.5
        assert decision.n == math.ceil(math.log(bound) / step)
    decision = decide(torch.ones(9).split(1), 0.0, tolerance=1.0, variance=1.0, false_fail=0.4)
    assert decision.n == math.ceil(math.log(2 / 0.4) / step)
    (most,) = (p for p in inspect.signature(decide).parameters.values() if p.name == "most")
    assert most.default == 10_000_000


def test_a_bad_number_is_reported_with_what_was_read():
    batches = [torch.zeros(10), torch.tensor([0.0, math.inf, 0.0])]
    decision = decide(batches, 0.0, tolerance=0.1, variance=1.0)
    assert (decision.verdict, decision.n, decision.needed) == (Verdict.FAIL, 13, None)
    assert math.isnan(decision.mean)
    assert decision.log_evidence == (math.inf, 0.0, 0.0)
    assert decision.reason == "not finite"


@pytest.mark.parametrize("offset", [0.0, 0.25, -0.25])
@pytest.mark.parametrize("ratio", [1.24, 1.3])
def test_a_variance_above_its_bound_by_a_quarter_passes_nothing(ratio, offset):
    """Samples of exactly that variance, about a mean that is not quite what is claimed."""
    pair = 0.7 + offset + torch.tensor([ratio, ratio], dtype=torch.float64).sqrt() * SIGNS
    decision = decide(pair.repeat(200).split(2), 0.7, tolerance=1.0, variance=1.0, most=400)
    assert decision.verdict is (Verdict.PASS if ratio < 1.25 else Verdict.INCONCLUSIVE)
    settings = (0.7, 1.0, 1.0, 1e-6, 1e-6, 400)
    assert decision.n == walked([pair.tolist()] * 200, *settings)[1]
    assert decision.mean == pytest.approx(0.7 + offset, abs=1e-12)
    if ratio > 1.25:
        assert "variance 1.3 is above its bound 1" in decision.reason
        assert (decision.n, decision.needed) == (400, None)
        assert min(decision.log_evidence[1:]) >= math.log(1e6)


def test_a_stream_without_end_is_read_no_further_than_allowed():
    endless = itertools.repeat(torch.zeros(6, dtype=torch.float64))
    decision = decide(endless, 0.0, tolerance=0.1, variance=1.0, most=20)
    assert (decision.verdict, decision.n) == (Verdict.INCONCLUSIVE, 20)


@pytest.mark.parametrize("name", ["tolerance", "variance", "false_fail", "false_pass"])
def test_the_bad_setting_is_named(name):
    settings = {"tolerance": 0.1, "variance": 1.0} | {name: -1.0}
    with pytest.raises(ValueError, match=f"^{name} must be"):
        decide([torch.zeros(3)], 0.0, **settings)


def test_batches_of_any_shape_are_flattened_empty_ones_skipped_and_gradients_cut():
    samples = torch.linspace(-1, 1, 24, dtype=torch.float64, requires_grad=True)
    settings = {"claimed": 0.1, "tolerance": 0.3, "variance": 1.0}
    plain = decide([samples.detach()], **settings)
    odd = [samples[:0], samples[:12].view(3, 4), samples[:0], samples[12:].float().view(2, 3, 2)]
    decision = decide(odd, **settings)
    assert (decision.verdict, decision.n) == (plain.verdict, 24)
    assert decision.log_evidence == pytest.approx(plain.log_evidence, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value"), [("claimed", math.nan), ("claimed", math.inf), ("most", -1)]
)
def test_claims_and_numbers_of_samples_out_of_range_are_refused(name, value):
    settings = {"claimed": 0.0, "tolerance": 0.1, "variance": 1.0} | {name: value}
    with pytest.raises(ValueError, match="claimed must be finite"):
        decide([torch.zeros(3)], **settings)
    assert decide([torch.zeros(3)], 0.0, tolerance=0.1, variance=1.0, most=1).n == 1


def test_where_the_plan_was_not_enough_twice_as_many_are_asked_for():
    half = torch.full((1000,), 0.2, dtype=torch.float64)  # as far from the claim as from its edge
    decision = decide([half], 0.0, tolerance=0.4, variance=1.3)
    assert samples_needed(0.4, 1.3) < 1000
    assert (decision.verdict, decision.needed) == (Verdict.INCONCLUSIVE, 2000)
    assert decision.mean == pytest.approx(0.2)
