"""When a curve passes a target, and what the ladder compares."""

import math

import pytest

from benchmarks.calls_to_reward import BASELINE, Options, calls_until, gain, ladder, mean_curve

CURVE = [(0.0, 0.0), (100.0, 0.2), (200.0, 0.1), (300.0, 0.5)]


@pytest.mark.parametrize(
    ("target", "calls"), [(0.1, 50), (0.2, 100), (0.3, 250), (0.5, 300), (0.6, math.inf), (-1, 0)]
)
def test_a_curve_passes_its_target_between_judgements(target: float, calls: float) -> None:
    assert calls_until(CURVE, target) == pytest.approx(calls)


def test_the_mean_curve_starts_at_nothing_and_stops_with_the_shortest() -> None:
    def one(*rewards: float) -> dict[str, object]:
        curve = [{"calls": 10 * (k + 1), "reward": r} for k, r in enumerate(rewards)]
        return {"start": {"reward": 1.0}, "curve": curve}

    assert mean_curve([one(2.0, 3.0), one(4.0, 5.0, 6.0)]) == [(0, 0), (10, 2), (20, 3)]
    assert gain(one(2.0, 3.0)) == 2


def test_only_the_baseline_gets_all_calls() -> None:
    options = Options()
    assert options.budget(BASELINE).calls == 36_000
    rows = ladder(options.steps)
    assert {options.budget(name).calls for name in rows if name != BASELINE} == {12_000}
    for entry in rows.values():
        entry.objective(0.01)  # settings are valid
