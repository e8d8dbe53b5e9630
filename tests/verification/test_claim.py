"""What a claim demands of its author, and what its run says, shown on claims made here."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from verification.claim import (
    Claim,
    Setting,
    bound,
    expectation,
    pathwise,
    proof,
    rounding,
    sampled,
    stated,
)
from verification.claims import CLAIMS
from verification.measuring import Observation, lines, measure, merged, unstated_singles
from verification.mistakes import read
from verification.running import Rates, run
from verification.statistics import Verdict
from verification.tolerances import Right, Tolerance, derive, floor, load, room

SETTING = Setting()


def half_square(x):
    """The production code of this file."""
    return 0.5 * x * x


def draws(generator, shift):
    while True:
        yield shift + torch.randn(4096, dtype=torch.float64, generator=generator)


HERE = f"{__name__}.half_square"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this())


def _this():
    import types

    module = types.ModuleType(__name__)
    module.half_square = half_square
    return module


MISTAKES = f"""
{HERE}
    no 1/2 | 0.5 * x => x
    off by 1 % | 0.5 * => 0.505 *
    sign | return 0.5 => return -0.5
"""


def made(body, table=MISTAKES, statement="s", **more) -> Claim:
    return Claim(body.__name__, "title", statement, "source", read(table), body, **more)


def body_of_squares(setting):
    x = setting.tensor([0.3, 1.7])
    yield pathwise("squares", half_square(x), np.array([0.3, 1.7]) ** 2 / 2)


def test_right_code_passes_and_every_mistake_is_rejected():
    one = made(body_of_squares)
    table, complaints = measure(one, SETTING)
    assert not complaints
    line = table["squares"]
    assert line.effect == pytest.approx(0.01, rel=1e-6)
    assert line.variant == "off by 1 %"
    assert line.right * 1e3 <= line.tolerance <= line.effect / 1e3
    outcome = run(one, SETTING, table)
    assert outcome.holds
    assert outcome.verdict is Verdict.PASS
    assert [w.rejected for w in outcome.mistakes] == [True] * 3


def test_a_quick_run_stops_at_the_first_check_that_rejects_and_a_full_one_does_not():
    def twice(setting):
        yield from body_of_squares(setting)
        yield pathwise("again", half_square(2.0), 2.0)

    one = made(twice)
    table, _ = measure(one, SETTING)
    for full, seen in ((False, {"squares"}), (True, {"squares", "again"})):
        outcome = run(one, replace(SETTING, full=full), table)
        assert outcome.holds
        assert all(set(mistake.deviations) == seen for mistake in outcome.mistakes)


def test_a_mistake_that_nothing_sees_is_a_complaint_and_is_accepted():
    def blind_to_sign(setting):
        x = setting.tensor([0.3])
        yield expectation("size", half_square(x).abs(), [0.045])

    one = made(blind_to_sign)
    table, complaints = measure(one, SETTING)
    assert len(complaints) == 1
    assert "'sign' is seen by no check" in complaints[0]
    outcome = run(one, SETTING, table)
    assert not outcome.holds
    assert outcome.verdict is Verdict.PASS
    assert [w.rejected for w in outcome.mistakes] == [True, True, False]


def test_a_check_that_cannot_fail_is_a_complaint_and_gets_no_tolerance():
    def vacuous(setting):
        yield from body_of_squares(setting)
        yield bound("at least 0", [-1.0], [half_square(3.0) ** 2])

    table, complaints = measure(made(vacuous), SETTING)
    assert list(table) == ["squares"]
    assert "'at least 0' cannot fail" in complaints[0]
    outcome = run(made(vacuous), SETTING, table)
    assert outcome.verdict is Verdict.FAIL
    assert "no tolerance" in outcome.checks[1].note


def test_wrong_code_fails_with_its_deviation():
    def off(setting):
        x = setting.tensor([0.3])
        yield pathwise("squares", half_square(x) * (1 + 1e-3), [0.045])

    table, _ = measure(made(body_of_squares), SETTING)
    outcome = run(made(off), SETTING, table)
    assert outcome.verdict is Verdict.FAIL
    assert outcome.checks[0].deviation == pytest.approx(1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails_at_once(value):
    def broken(setting):
        yield pathwise("squares", [value], [0.045])

    lines = {"squares": Tolerance("pathwise", 1e-16, 1e-2, "v", 1e9)}
    assert run(made(broken), SETTING, lines, plant=False).verdict is Verdict.FAIL
    assert measure(made(broken), SETTING)[1]


def test_a_body_that_raises_fails_and_the_error_is_told():
    def raises(setting):
        yield pathwise("squares", [1.0, 2.0], [1.0])

    outcome = run(made(raises), SETTING, {}, plant=False)
    assert outcome.verdict is Verdict.FAIL
    assert "compares shapes [2] and [1]" in outcome.error


def test_a_claim_without_checks_proves_nothing():
    def empty(setting):
        yield from ()

    outcome = run(made(empty), SETTING, {}, plant=False)
    assert outcome.verdict is Verdict.FAIL
    assert "no checks" in outcome.error


def test_a_mistake_that_the_code_refuses_counts_only_if_that_is_said():
    def strict(setting):
        y = half_square(3.0)
        if y < 0:
            raise ValueError("negative")
        yield pathwise("square", [y], [4.5])

    table, complaints = measure(made(strict), SETTING)
    assert "breaks the code" in complaints[0]
    assert not run(made(strict), SETTING, table).holds
    said = MISTAKES.replace("sign |", "sign [ValueError] |")
    table, complaints = measure(made(strict, said), SETTING)
    assert not complaints
    outcome = run(made(strict, said), SETTING, table)
    assert outcome.holds
    assert "refused with ValueError: negative" in outcome.mistakes[2].note
    # and one that is said to be refused, but is not, is a complaint
    said = said.replace("no 1/2 |", "no 1/2 [ValueError] |")
    assert "is not refused" in measure(made(strict, said), SETTING)[1][0]


def means(setting):
    shift = half_square(0.6)
    stream = draws(setting.generator("means"), shift)
    yield sampled("mean", stream, 0.18, variance=1.0)


def test_a_sampled_check_decides_and_rejects():
    one = made(means, MISTAKES.replace("off by 1 % | 0.5 * => 0.505 *", "off | 0.5 * => 1.1 *"))
    table, complaints = measure(one, SETTING)
    assert not complaints
    assert table["mean"].tolerance == pytest.approx(table["mean"].effect / 2, rel=0.05)
    outcome = run(one, SETTING, table)
    assert outcome.holds
    assert outcome.checks[0].n > 1000
    assert outcome.checks[0].log_evidence is not None


def test_too_few_samples_are_inconclusive_and_a_failure_with_the_number_that_would_do():
    lines = {"mean": Tolerance("sampled", 0.01, 0.18, "v", 0.09)}
    outcome = run(made(means), SETTING, lines, Rates(most=50), plant=False)
    assert outcome.verdict is Verdict.INCONCLUSIVE
    assert not outcome.holds
    assert outcome.checks[0].needed > 1000


def test_the_same_variants_get_the_same_random_numbers():
    one, two = Setting(seed=3).generator("a"), Setting(seed=3).generator("a")
    assert torch.equal(torch.randn(3, generator=one), torch.randn(3, generator=two))
    other = torch.randn(3, generator=Setting(seed=4).generator("a"))
    assert not torch.equal(torch.randn(3, generator=one), other)


def test_fewer_than_three_mistakes_do_not_load():
    with pytest.raises(ValueError, match="at least 3"):
        made(body_of_squares, MISTAKES.replace("    off by 1 % | 0.5 * => 0.505 *\n", ""))
    with pytest.raises(ValueError, match="two mistakes of one name"):
        Claim("c", "t", "s", "s", 2 * read(MISTAKES), body_of_squares)
    with pytest.raises(ValueError, match="statement and a source"):
        made(body_of_squares, statement=" ")


def test_a_module_is_a_claim_or_says_what_it_lacks():
    import types

    module = types.ModuleType("verification.claims.squares.half_of_squares", "Title.\n\nStatement.")
    with pytest.raises(ValueError, match="no SOURCE, checks, MISTAKES"):
        Claim.of(module)
    module.SOURCE, module.checks, module.MISTAKES = "source", body_of_squares, MISTAKES
    one = Claim.of(module)
    assert (one.name, one.title, one.statement) == ("half-of-squares", "Title.", "Statement.")
    assert (one.theme, one.source, one.single) == ("squares", "source", True)
    module.__doc__ = "Title."
    with pytest.raises(ValueError, match="no statement"):
        Claim.of(module)


def test_a_scale_of_zero_is_refused():
    with pytest.raises(ValueError, match="away from 0"):
        pathwise("zero", [0.0], [0.0])


def test_deviations():
    assert pathwise("n", [1.0, 2.2], [1.0, 2.0]).deviation == pytest.approx(0.1)
    assert pathwise("n", [1.5], [1.0], scale=5.0).deviation == pytest.approx(0.1)
    assert bound("n", [1.0, 2.0], [1.0, 4.0]).deviation == 0
    assert bound("n", [1.0, 6.0], [1.0, 4.0]).deviation == pytest.approx(0.5)
    assert math.isnan(bound("n", [math.nan], [1.0]).deviation)
    assert math.isnan(pathwise("n", [1.0], [math.nan]).deviation)
    assert proof("n", 0.0).deviation == 0


UNIT, SINGLE_UNIT = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps
SEEN = {
    "small": {"a": 1e-8, "b": 0.02, "c": 0.004},
    "large": {"a": 1.0, "b": 0.5, "c": 0.1},
}


def test_tolerances_lie_between_right_and_wrong_with_room():
    right = {"a": Right("pathwise", 0.0), "b": Right("limit", 1e-3), "c": Right("sampled", 1e-3)}
    table, complaints = derive(right, SEEN)
    assert not complaints
    assert table["a"].tolerance == pytest.approx(math.sqrt(UNIT * 1e-8), rel=0.05)
    assert table["a"].variant == "small"  # 1e-8 is 1e7 units of round-off, so it is to be seen
    assert table["b"].variant == "large"  # 0.02 is but 20 times the error of approximation
    assert table["b"].tolerance == pytest.approx(math.sqrt(1e-3 * 0.5), rel=0.05)
    assert table["c"].tolerance == 0.05
    assert derive({"a": Right("pathwise", 1e-3)}, SEEN)[1]


def test_a_deviation_of_zero_in_float32_is_taken_for_a_unit_of_float32():
    """The mistake that let a ratio of 1 + 1.5e-6 fail: float64's unit for float32's."""
    table, _ = derive({"a": Right("pathwise", 0.0, "float32")}, SEEN)
    assert table["a"].variant == "large"  # 1e-8 is less than a unit
    assert table["a"].tolerance == pytest.approx(math.sqrt(SINGLE_UNIT), rel=0.05)
    assert table["a"].precision == "float32"
    assert derive({"a": Right("pathwise", 0.0)}, SEEN)[0]["a"].tolerance < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_of_many_terms_may_be_off_by_more_than_a_unit(dtype, generator):
    """Terms of one sign, added in three orders: within the units that are stated, over one."""
    terms = 4096
    x = torch.rand(64, terms, dtype=dtype, generator=generator)
    exact = (
        x.double().sum(1)
        if dtype == torch.float32
        else torch.tensor([math.fsum(row) for row in x.tolist()], dtype=dtype)
    )
    unit = torch.finfo(dtype).eps
    for order in (torch.arange(terms), torch.arange(terms).flip(0), x[0].argsort()):
        one_by_one = torch.zeros_like(x[:, 0])
        for k in order:
            one_by_one += x[:, k]
        off = ((one_by_one.double() - exact.double()).abs() / exact.double()).max() / unit
        assert 1 < off <= rounding(terms)
    shown = Right("pathwise", 0.0, str(dtype).removeprefix("torch."), rounding(terms))
    assert floor(shown) == pytest.approx(math.sqrt(terms) * unit)
    assert rounding(1, 0.1) == 1  # nothing is known to better than a unit


def test_units_of_float32_are_carried_over_to_float64():
    """A check that was off by 50 units in float32 may be off by 50 in float64 elsewhere."""
    double = Observation({"a": Right("pathwise", 0.0, "float64", 1.0)}, SEEN, quick=("a",))
    single = Observation({"a": Right("pathwise", 50 * SINGLE_UNIT, "float32", 1.0)}, SEEN)
    claim = made(body_of_squares)
    alone, both = lines(claim, double)[0]["a"], lines(claim, double, single)[0]["a"]
    assert alone.floor == UNIT
    assert both.floor == pytest.approx(50 * UNIT)
    assert both.tolerance == pytest.approx(math.sqrt(50 * UNIT), rel=0.05)
    limits = Observation({"a": Right("limit", 1e-3, "float32", 1.0)}, SEEN)
    assert lines(claim, double, limits)[0]["a"].floor == UNIT


def test_of_several_kernels_the_worst_right_code_and_the_mildest_mistake_count():
    def seen(right, small, large):
        wrong = {"small": {"a": small}, "large": {"a": large}}
        return Observation({"a": Right("pathwise", right, "float64", 1.0)}, wrong, quick=("a",))

    both = merged([seen(0.0, 3e-3, 0.5), seen(4e-16, 2e-3, 0.7)])
    assert both.right["a"].deviation == 4e-16
    assert both.wrong == {"small": {"a": 2e-3}, "large": {"a": 0.5}}
    assert math.isnan(merged([seen(0.0, 1.0, 1.0), seen(math.nan, 1.0, 1.0)]).right["a"].deviation)
    unreached = Observation(both.right, {"small": {}, "large": {"a": 0.1}}, quick=("a",))
    assert merged([both, unreached]).wrong == {"small": {}, "large": {"a": 0.1}}


def test_a_variant_must_be_refused_under_every_kernel():
    refused = Observation({}, {"v": {}}, refused=("v",))
    assert merged([refused, refused]).refused == ("v",)
    assert merged([refused, Observation({}, {"v": {}})]).refused == ()


def test_a_check_states_its_own_precision():
    def mixed(setting):
        x = setting.tensor([0.3, 1.7])
        yield pathwise("squares", half_square(x), np.array([0.3, 1.7]) ** 2 / 2)
        single = pathwise("in float32", half_square(x.float()), np.array([0.3, 1.7]) ** 2 / 2)
        yield stated(single, precision=torch.float32, units=4.0)

    one = made(mixed)
    table, _ = measure(one, SETTING)
    assert table["squares"].precision == "float64"
    assert table["in float32"].precision == "float32"
    assert table["in float32"].floor == pytest.approx(4 * SINGLE_UNIT)
    whole = measure(made(mixed, precision=torch.float32), SETTING)[0]
    assert whole["squares"].precision == "float32"
    # a table that was measured in another precision holds for nothing
    outcome = run(made(mixed, precision=torch.float32), SETTING, table, plant=False)
    assert outcome.verdict is Verdict.FAIL
    assert "measured in float64, computed in float32" in outcome.checks[0].note


def test_float32_in_a_body_that_does_not_say_so_is_a_complaint():
    def silent(setting):
        x = setting.tensor([0.3, 1.7])
        yield pathwise("squares", half_square(x), np.array([0.3, 1.7]) ** 2 / 2)
        yield pathwise("in float32", half_square(x.float()), np.array([0.3, 1.7]) ** 2 / 2)

    assert "'in float32' computes in float32" in measure(made(silent), SETTING)[1][0]
    assert not measure(made(silent, precision=torch.float32), SETTING)[1]
    single = Setting(dtype=torch.float32)
    assert not measure(made(silent), single)[1]


@pytest.mark.parametrize("name", ["training-loop", "noise-of-samples", "guidance"])
def test_claims_that_compute_in_float32_say_so(name):
    assert not unstated_singles(CLAIMS[name])
    assert unstated_singles(replace(CLAIMS["training-loop"], precision=None))


def test_the_table_keeps_the_rule_and_belongs_to_the_claims_that_there_are():
    for precision, table in load().items():
        assert set(table) <= set(CLAIMS), "the table has lines of claims that are gone"
        for name, checks in table.items():
            for check, line in checks.items():
                where = f"{precision} {name}: {check}"
                dtype = getattr(torch, line.precision)
                free = room(line.route, line.precision)
                assert line.variant in {w.name for w in CLAIMS[name].mistakes}, where
                # two digits are kept of each
                assert line.floor >= 0.95 * max(line.right, torch.finfo(dtype).eps), where
                assert line.tolerance <= 1.1 * line.effect / (2 if free == 3 else free), where
                assert line.tolerance >= 0.9 * free * line.floor, where
                if line.route != "sampled":
                    mean = math.sqrt(line.floor * line.effect)
                    assert line.tolerance == pytest.approx(mean, rel=0.1), where
                if CLAIMS[name].precision is not None:
                    assert dtype == CLAIMS[name].precision, where


def test_the_floor_in_float64_is_at_least_float32s_in_units():
    table = load()
    compared = 0
    for name, checks in table["float32"].items():
        for check, single in checks.items():
            double = table["float64"][name].get(check)
            if double and double.route not in ("limit", "sampled"):
                assert double.floor / UNIT >= 0.9 * single.right / SINGLE_UNIT, (name, check)
                compared += 1
    assert compared > 200
