"""The stop rule sees constructed over-optimisation, and noise no more often than it promises."""

import math
from statistics import NormalDist

import pytest
import torch
from scipy.stats import binom, t

from diffusion_envs.runs.early_stopping import EarlyStopping, Scores, StopRule, check

DOUBLE = torch.float64


def evaluations(
    judge: list[float],
    reward: list[float],
    generator: torch.Generator,
    *,
    samples: int = 32,
    noise: float = 0.3,
    path_kl: list[float] | None = None,
) -> list[Scores]:
    """Seeds differ by a standard deviation of 1, evaluations of one seed by ``noise``."""
    seed = torch.randn(samples, dtype=DOUBLE, generator=generator)

    def seen(means: list[float]) -> list[torch.Tensor]:
        fresh = torch.randn(len(means), samples, dtype=DOUBLE, generator=generator)
        return list(torch.tensor(means, dtype=DOUBLE)[:, None] + seed + noise * fresh)

    nats = path_kl or [0.1 * k for k in range(len(judge))]
    return [
        Scores(10 * k, r, {"clarity": j}, torch.full((samples,), n, dtype=DOUBLE))
        for k, (j, r, n) in enumerate(zip(seen(judge), seen(reward), nats, strict=True))
    ]


def first_stop(rule: StopRule, seen: list[Scores]) -> int | None:
    """Number of the evaluation at which a run ends."""
    return next((k for k in range(len(seen)) if rule.decide(seen[: k + 1]).reason), None)


def test_it_stops_soon_after_a_judge_begins_to_fall_and_keeps_its_best_look(generator):
    judge = [0.0, 0.3, 0.6, 0.5, 0.2, -0.2]
    seen = evaluations(judge, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], generator, samples=64)
    at = first_stop(StopRule(z=3.5), seen)
    # 0.6 -> 0.2 is 7.5 standard errors of the paired difference, 0.3 sqrt(2 / 64) = 0.053
    assert at in (3, 4)
    decision = StopRule(z=3.5).decide(seen[: at + 1])
    assert decision.best == 20
    assert "judge clarity had fallen by" in decision.reason
    assert "from its best, at update 20, while the reward rose" in decision.reason


def test_a_judge_that_falls_with_the_reward_does_not_stop_it(generator):
    seen = evaluations([0.0, 0.6, -0.6], [0.0, 1.0, 0.2], generator)
    assert StopRule().decide(seen).reason is None


def test_a_judge_below_the_pretrained_model_stops_at_the_first_look(generator):
    seen = evaluations([0.0, -0.7], [0.0, 1.0], generator)
    decision = StopRule().decide(seen)
    assert decision.reason is not None
    assert decision.best == 0  # the pretrained model itself


def test_pairing_matters(generator):
    """The fall is a third of the seeds' deviation: unpaired it would be 1.5 standard errors."""
    seen = evaluations([0.0, -0.35], [0.0, 1.0], generator, samples=36)
    assert StopRule(z=3.0).decide(seen).reason is not None
    other = seen[1].judged["clarity"][torch.randperm(36, generator=generator)]
    shuffled = Scores(10, seen[1].rewards, {"clarity": other}, seen[1].path_kl)
    assert StopRule(z=3.0).decide([seen[0], shuffled]).reason is None


@pytest.mark.parametrize("judges", [1, 2])
def test_noise_stops_no_more_runs_than_promised(generator, judges):
    """Eight evaluations that differ by noise only, while the reward rises."""
    rule, runs, ahead = StopRule(z=2.5, samples=24, every=10), 300, 8
    bound = rule.false_stop_bound(updates=80, judges=judges)
    expected = judges * 36 * t.sf(2.5, 23)
    assert bound == pytest.approx(expected, rel=1e-9)
    stops = 0
    for _ in range(runs):
        seen = evaluations([0.0] * (ahead + 1), list(range(ahead + 1)), generator, samples=24)
        if judges == 2:
            other = evaluations([0.0] * (ahead + 1), list(range(ahead + 1)), generator, samples=24)
            seen = [
                Scores(a.update, a.rewards, {**a.judged, "other": b.judged["clarity"]}, a.path_kl)
                for a, b in zip(seen, other, strict=True)
            ]
        stops += first_stop(rule, seen) is not None
    # a true probability at the bound would give more stops than this once in 10^6
    assert stops <= binom.isf(1e-6, runs, bound)
    # and the bound is not idle: these runs do stop, at a rate within a factor of 8 of it
    assert stops / runs > bound / 8


def test_the_default_rule_seldom_stops_on_noise():
    rule = StopRule()
    assert rule.false_stop_bound(updates=100, judges=1) < 0.03
    assert rule.false_stop_bound(updates=100, judges=1) > 55 * NormalDist().cdf(-3.5)
    assert rule.false_stop_bound(updates=9, judges=1) == 0  # no evaluation at all
    assert StopRule(z=0.1).false_stop_bound(updates=1000, judges=3) == 1
    assert StopRule(z=None, max_path_kl=1.0).false_stop_bound(100, 1) == 0


def test_passing_the_limit_of_path_kl_stops_and_what_passed_it_is_not_kept(generator):
    seen = evaluations([0.0, 0.5, 1.0], [0.0, 1.0, 2.0], generator, path_kl=[0.0, 3.0, 5.5])
    decision = StopRule(max_path_kl=5.0).decide(seen)
    assert decision.reason == "the path KL, 5.5 nats, passed its limit of 5"
    assert decision.best == 10
    assert StopRule(max_path_kl=6.0).decide(seen).reason is None
    assert StopRule(max_path_kl=6.0).decide(seen).best == 20


def test_without_judges_the_reward_chooses(generator):
    seen = [
        Scores(k.update, k.rewards, {}, k.path_kl)
        for k in evaluations([0.0] * 3, [0.0, 2.0, 1.0], generator)
    ]
    assert StopRule(max_path_kl=9.0).decide(seen).best == 10


def test_judges_count_in_units_of_their_spread():
    def scores(update: int, coarse: float, fine: float) -> Scores:
        base = torch.tensor([-1.0, 1.0], dtype=DOUBLE)
        judged = {"coarse": 1000 * (base + coarse), "fine": base + fine}
        return Scores(update, base, judged, base.abs())

    # the coarse judge loses 0.3 of its standard deviation, the fine one gains 0.4 of its own
    assert StopRule(z=9.0).decide([scores(0, 0.0, 0.0), scores(10, -0.3, 0.4)]).best == 10
    assert StopRule(z=9.0).decide([scores(0, 0.0, 0.0), scores(10, -0.5, 0.4)]).best == 0


def test_a_watch_looks_on_time_keeps_the_best_and_resumes(generator):
    seen = {k.update: k for k in evaluations([0, 0.5, 1.0, -1.0], [0, 1, 2, 3], generator)}

    def stopping(kept: list[int]) -> EarlyStopping:
        return EarlyStopping(StopRule(), lambda update, pretrained: seen[update], kept.append)

    kept: list[int] = []
    whole = stopping(kept)
    whole.begin()
    decisions = {update: whole.evaluate(update) for update in range(1, 31)}
    assert [update for update, decision in decisions.items() if decision] == [10, 20, 30]
    assert kept == [0, 10, 20]
    assert decisions[20].reason is None
    assert decisions[30].reason is not None
    first, later = stopping([]), stopping(kept := [])
    first.begin()
    first.evaluate(10)
    later.load_state(first.state())
    later.begin()
    assert later.evaluate(20) == decisions[20]
    assert later.evaluate(30) == decisions[30]
    assert kept == [20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": 0.0}, "z must be a positive finite number, got 0.0"),
        ({"z": math.nan}, "z must"),
        ({"max_path_kl": -1.0}, "max_path_kl"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"samples": 1}, "samples must be at least 2, got 1"),
    ],
)
def test_bad_rules_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        StopRule(**change)


def test_rules_with_nothing_to_watch_are_refused():
    for rule, judges in ((StopRule(), {}), (StopRule(z=None), {"one": max})):
        with pytest.raises(ValueError, match="stop needs a judge"):
            check(rule, judges)
    check(StopRule(max_path_kl=1.0), {})
    check(StopRule(), {"one": max})
    with pytest.raises(ValueError, match="at least one"):
        StopRule().decide([])
