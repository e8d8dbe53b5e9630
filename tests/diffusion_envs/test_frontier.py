"""The KL-reward frontier: values by hand, properties, what is unknown, bad input."""

import json
import math
from collections.abc import Hashable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ctrl.estimate import Estimate
from diffusion_envs.frontier import Frontier, FrontierPoint

SIZES = {"a cat": 70, ("a dog", 3): 120, 7: 55}
LOGARITHM = math.log(2)


def frontier(
    rewards: Tensor | Sequence[float], groups: Sequence[Hashable] | None = None, seed: int = 0
) -> Frontier:
    values = torch.as_tensor(rewards, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    keys = ["-"] * len(values) if groups is None else groups
    return Frontier(values, keys, resamples=60, generator=generator)


def drawn(seed: int) -> tuple[Tensor, list[Hashable]]:
    """Rewards of three unlike prompts, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    rewards, groups = [], list[Hashable]()
    for k, (name, n) in enumerate(SIZES.items()):
        values = torch.randn(n, dtype=torch.float64, generator=generator)
        rewards.append((0.4 + 0.3 * k) * values - 1.3 * k)
        groups += [name] * n
    order = torch.randperm(len(groups), generator=generator).tolist()
    return torch.cat(rewards)[order], [groups[k] for k in order]


def means(point: FrontierPoint) -> list[float]:
    return [point.reward.mean, point.kl.mean, point.objective.mean]


# -- values ---------------------------------------------------------------------------------------


def test_two_samples_by_hand_which_are_too_few_to_be_known():
    point = frontier([0.0, 1.0]).at_weight(1.0)
    share = math.e / (1 + math.e)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    kl = LOGARITHM - entropy
    assert means(point) == pytest.approx([share, kl, share - kl], rel=1e-14)
    assert point.effective_samples == pytest.approx((1 + math.e) ** 2 / (1 + math.e**2))
    assert not point.known
    assert "1.65 effective samples" in point.sentence
    assert "draw more samples" in point.sentence
    assert point.reward.high == math.inf == point.reward.standard_error


def test_a_tilted_coin_is_the_frontier_of_a_binary_reward():
    n, p, b = 4000, 0.3, 0.7
    curve = frontier((torch.arange(n) < p * n).double())
    odds = p / (1 - p) * math.exp(1 / b)
    q = odds / (1 + odds)
    kl = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    at = curve.at_weight(b)
    assert means(at) == pytest.approx([q, kl, q - b * kl], rel=1e-3)  # bias 1 / n
    assert curve.at_kl(kl).reward.mean == pytest.approx(q, rel=1e-3)
    assert curve.at_kl(kl).kl_weight == pytest.approx(b, rel=1e-10)


def test_prompts_count_alike_and_share_b():
    """Two prompts: one cannot be improved, the other counts half, whatever their numbers."""
    coin = (torch.arange(400) % 4 == 0).double()
    alone = frontier(coin)
    beside = frontier(
        torch.cat([coin, torch.full((40,), 5.0, dtype=torch.float64)]), ["a"] * 400 + ["b"] * 40
    )
    for b in (0.5, 2.0):
        one, both = alone.at_weight(b), beside.at_weight(b)
        assert both.reward.mean == pytest.approx(0.5 * (one.reward.mean + 5), rel=1e-12)
        assert both.kl.mean == pytest.approx(0.5 * one.kl.mean, rel=1e-12)
    assert beside.pretrained.mean == pytest.approx(0.5 * (0.25 + 5))
    assert beside.pretrained.standard_error == pytest.approx(0.5 * alone.pretrained.standard_error)
    assert beside.pretrained.n == 440
    assert beside.groups == ("a", "b")


def test_a_gaussian_reward_has_the_frontier_root_two_kl(generator):
    rewards = torch.randn(20_000, dtype=torch.float64, generator=generator)
    curve = frontier(0.3 * rewards + 0.1)
    for nats in (0.1, 0.5, 1.5):
        point = curve.at_kl(nats)
        # At most 0.02 of the range below; the mildest mistake, KL without its half, is 29 % off.
        exact = 0.1 + 0.3 * math.sqrt(2 * nats)
        assert abs(point.reward.mean - exact) < 5 * point.reward.standard_error < 0.03
        assert point.reward.low < point.reward.mean < point.reward.high
        assert point.kl.standard_error == 0
        assert point.objective.mean == pytest.approx(point.reward.mean - point.kl_weight * nats)


def test_no_kl_is_the_pretrained_model():
    rewards, groups = drawn(1)
    curve = frontier(rewards, groups)
    point, near = curve.at_kl(0.0), curve.at_kl(1e-9)
    assert point.kl_weight == math.inf
    assert point.known
    assert point.reward.mean == point.objective.mean == curve.pretrained.mean
    assert near.reward.mean == pytest.approx(point.reward.mean, abs=1e-4)
    assert curve.at_kl(1e-30).reward.mean == pytest.approx(point.reward.mean, abs=1e-5)
    assert near.reward.standard_error == pytest.approx(point.reward.standard_error, rel=0.3)


# -- properties -----------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6))
def test_the_frontier_rises_is_concave_and_has_slope_b(seed):
    rewards, groups = drawn(seed)
    curve = frontier(rewards, groups)
    most = 0.8 * curve.curve(2)[-1].kl.mean
    points = [curve.at_kl(most * k / 3) for k in range(1, 4)]
    for one, other in pairwise(points):
        assert one.kl_weight > other.kl_weight
        rise = (other.reward.mean - one.reward.mean) / (other.kl.mean - one.kl.mean)
        # Between the two slopes, as of a concave function; the correction has its own error.
        assert 0.9 * other.kl_weight < rise < 1.1 * one.kl_weight
    middle = most / 2
    rise = curve.at_kl(1.001 * middle).reward.mean - curve.at_kl(0.999 * middle).reward.mean
    assert rise / (0.002 * middle) == pytest.approx(curve.at_kl(middle).kl_weight, rel=0.1)


@given(seed=st.integers(0, 10**6), shift=st.floats(-50, 50), scale=st.floats(1e-3, 1e3))
def test_shifts_leave_kl_and_scales_leave_it_at_the_scaled_b(seed, shift, scale):
    rewards, groups = drawn(seed)
    one, other = frontier(rewards, groups), frontier(scale * rewards + shift, groups)
    at, there = one.at_weight(1.9), other.at_weight(1.9 * scale)
    # Subtracting the shift again costs round-off of the shift's size.
    error = 1e-9 * (1 + abs(shift) / scale)
    assert there.kl.mean == pytest.approx(at.kl.mean, abs=error)
    assert there.reward.mean == pytest.approx(scale * at.reward.mean + shift, abs=error * scale)
    assert there.effective_samples == pytest.approx(at.effective_samples, rel=error)
    assert there.reward.standard_error == pytest.approx(
        scale * at.reward.standard_error, rel=1e-3, abs=error * scale
    )
    nats = 0.1
    assert other.at_kl(nats).kl_weight == pytest.approx(
        scale * one.at_kl(nats).kl_weight, rel=100 * error
    )


@given(seed=st.integers(0, 10**6))
def test_the_order_of_samples_does_not_matter(seed):
    rewards, groups = drawn(seed)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    one = frontier(rewards, groups).at_weight(1.7)
    other = frontier(rewards[order], [groups[k] for k in order]).at_weight(1.7)
    assert means(other) == pytest.approx(means(one), rel=1e-9, abs=1e-9)
    assert other.effective_samples == pytest.approx(one.effective_samples)


@given(seed=st.integers(0, 10**6), b=st.floats(0.3, 30.0))
def test_every_b_bounds_the_reward_at_every_kl(seed, b):
    rewards, groups = drawn(seed)
    curve = frontier(rewards, groups)
    tangent = curve.at_weight(b)
    for point in curve.curve(4):
        if tangent.known:
            bound = tangent.objective.mean + b * point.kl.mean
            assert point.reward.mean <= bound + 0.02 * tangent.reward.standard_error + 1e-9


def test_one_seed_is_one_answer():
    rewards, groups = drawn(5)
    one, same, other = (frontier(rewards, groups, seed).at_weight(1.2) for seed in (3, 3, 4))
    assert one == same
    assert means(one) == means(other)
    assert one.reward.standard_error != other.reward.standard_error


def test_single_precision_rewards_are_read_as_they_are():
    rewards, groups = drawn(2)
    single = Frontier(
        rewards.float(), groups, resamples=60, generator=torch.Generator().manual_seed(0)
    )
    expected = frontier(rewards.float().double(), groups)
    assert single.at_weight(1.0) == expected.at_weight(1.0)


# -- where samples run out ------------------------------------------------------------------------


def test_the_curve_ends_where_twenty_effective_samples_are_left():
    rewards, groups = drawn(3)
    curve = frontier(rewards, groups).curve(9)
    assert [point.known for point in curve] == [True] * 9
    assert curve[0].kl.mean == 0
    assert curve[-1].effective_samples == pytest.approx(20, rel=1e-6)
    assert all(one.kl.mean < other.kl.mean for one, other in pairwise(curve))
    assert all(one.reward.mean < other.reward.mean for one, other in pairwise(curve))


def test_beyond_it_the_frontier_is_between_its_last_point_and_its_tangent_there():
    rewards, groups = drawn(3)
    estimate = frontier(rewards, groups)
    last = estimate.curve(2)[-1]
    beyond = estimate.at_kl(1.2 * last.kl.mean)
    assert not beyond.known
    assert beyond.effective_samples < 20
    assert beyond.reward.low == last.reward.low
    tangent = last.reward.high + last.kl_weight * 0.2 * last.kl.mean
    assert beyond.reward.high == pytest.approx(tangent)
    assert last.reward.mean < beyond.reward.mean < beyond.reward.high
    lower = estimate.at_weight(0.5 * last.kl_weight)
    assert not lower.known
    assert lower.kl.low == pytest.approx(last.kl.mean)
    assert lower.kl.high == math.inf


@pytest.mark.parametrize("nats", [9.0, 1e6, math.inf])
def test_more_kl_than_the_best_samples_alone_take(nats):
    rewards, groups = drawn(3)
    estimate = frontier(rewards, groups)
    point = estimate.at_kl(nats)
    assert not point.known
    assert point.kl_weight == 0
    best = [max(r for r, g in zip(rewards.tolist(), groups, strict=True) if g == k) for k in SIZES]
    assert point.reward.mean == pytest.approx(sum(best) / 3)
    assert point.reward.high > point.reward.mean  # the best seen is no bound
    assert "better ones have not been seen" in point.sentence


def test_ties_with_the_best_are_samples_too():
    """30 of 300 have reward 1: log 10 nats generate them alone, with 30 effective samples."""
    estimate = frontier((torch.arange(300) < 30).double())
    assert estimate.at_weight(1e-9).effective_samples == pytest.approx(30)
    assert estimate.at_weight(1e-9).kl.mean == pytest.approx(math.log(10), rel=0.01)
    assert estimate.at_kl(2.29).known
    assert not estimate.at_kl(2.31).known


def test_equal_rewards_have_a_flat_frontier_and_say_so():
    estimate = frontier([2.5] * 30 + [1.5] * 40, ["a"] * 30 + ["b"] * 40)
    assert estimate.flat
    assert len(estimate.curve()) == 1
    assert means(estimate.at_weight(0.1)) == pytest.approx([2.0, 0.0, 2.0])
    assert estimate.at_weight(0.1).known
    point = estimate.at_kl(0.5)
    assert not point.known
    assert point.reward.mean == 2.0
    assert "flat at 2 and no KL buys reward" in point.sentence
    assert not frontier([2.5] * 30 + [2.6]).flat


def test_groups_of_few_samples_are_read_but_nothing_is_known():
    estimate = frontier([0.1, 0.4, 0.2, 0.9] * 4, ["a"] * 8 + ["b"] * 8)
    assert [point.known for point in estimate.curve()] == [False]
    assert not estimate.at_kl(0.1).known
    assert estimate.at_kl(0.1).reward.low < estimate.pretrained.mean
    assert estimate.at_kl(0.1).reward.high == math.inf
    assert not estimate.excess(Estimate(9.0, 0.1, 50), Estimate(0.1, 0.01, 50)).fault


def test_points_are_plain_json():
    rewards, groups = drawn(4)
    estimate = frontier(rewards, groups)
    points = [estimate.at_kl(nats) for nats in (0.0, 0.1, 9.0)]
    read = json.loads(json.dumps([point.as_dict() for point in points], allow_nan=False))
    assert [point["known"] for point in read] == [True, True, False]
    assert read[0]["kl_weight"] is None
    assert read[1]["reward"]["mean"] == points[1].reward.mean
    assert read[2]["reward"]["standard_error"] is None


# -- runs -----------------------------------------------------------------------------------------


def normal(generator: torch.Generator) -> Frontier:
    """Of a standard normal reward: sqrt(2 KL)."""
    return frontier(torch.randn(20_000, dtype=torch.float64, generator=generator))


def test_a_run_below_the_frontier_is_no_fault(generator):
    told = normal(generator).excess(Estimate(0.9, 0.05, 200), Estimate(1.0, 0.03, 200))
    assert told.known
    assert not told.fault
    assert told.mean == pytest.approx(0.9 - math.sqrt(2), abs=0.05)
    assert told.low < told.mean
    assert "0.900(50)" in told.sentence
    assert "below the best possible at 1 nats" in told.sentence


def test_half_of_the_kl_is_a_fault(generator):
    run = Estimate(math.sqrt(2), 0.03, 200)  # the optimum at 1 nat
    assert not normal(generator).excess(run, Estimate(1.0, 0.03, 200)).fault
    told = normal(generator).excess(run, Estimate(0.5, 0.015, 200))
    assert told.fault
    assert 0 < told.low < told.mean
    assert told.sentence.startswith("Fault: ")
    assert "its KL is counted too low" in told.sentence


@pytest.mark.parametrize("which", ["reward", "kl"])
def test_an_error_of_the_run_keeps_it_from_being_a_fault(generator, which):
    errors = {"reward": 0.02, "kl": 0.02} | {which: 0.2}
    run = Estimate(math.sqrt(2), errors["reward"], 200), Estimate(0.5, errors["kl"], 200)
    told = normal(generator).excess(*run)
    assert told.mean > 0.3
    assert not told.fault
    assert "above, within the error of," in told.sentence


def test_one_sample_of_a_run_tells_nothing(generator):
    told = normal(generator).excess(Estimate(9.0, math.inf, 1), Estimate(0.5, math.inf, 1))
    assert told.low == -math.inf
    assert not told.fault


def test_a_run_beyond_what_is_known_is_no_fault(generator):
    told = normal(generator).excess(Estimate(50.0, 0.1, 200), Estimate(30.0, 1.0, 200))
    assert not told.known
    assert not told.fault
    assert told.sentence.startswith("Whether the run is above the frontier is unknown: ")


def test_an_infinite_kl_bounds_nothing(generator):
    told = normal(generator).excess(Estimate(50.0, 0.1, 200), Estimate(math.inf, math.inf, 200))
    assert not told.known
    assert not told.fault
    assert "a sampler without noise" in told.sentence


def test_the_pretrained_model_itself_is_at_no_kl(generator):
    estimate = normal(generator)
    same = Estimate(estimate.pretrained.mean, 0.01, 500)
    assert not estimate.excess(same, Estimate(0.0, 0.0, 500)).fault
    better = Estimate(estimate.pretrained.mean + 0.2, 0.01, 500)
    assert estimate.excess(better, Estimate(0.0, 0.0, 500)).fault


# -- bad input ------------------------------------------------------------------------------------


def test_a_prompt_with_one_sample_is_named():
    with pytest.raises(ValueError, match=r"1 of 2 have one \(the first is 'a dog'\); draw more"):
        frontier([0.1, 0.2, 0.3], ["a cat", "a dog", "a cat"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_named(bad):
    with pytest.raises(ValueError, match=r"1 of 3 are not \(the first is rewards\[1\] = .*'b'\)"):
        frontier([0.1, bad, 0.3], ["a", "b", "a"])


def test_rewards_and_groups_of_other_lengths():
    with pytest.raises(ValueError, match=r"got rewards \[3\] and 2 groups"):
        frontier([0.1, 0.2, 0.3], ["a", "a"])
    with pytest.raises(ValueError, match=r"got rewards \[0\] and 0 groups"):
        frontier([], [])


def test_too_few_resamples():
    with pytest.raises(ValueError, match="at least 20 to tell an error, got 3"):
        Frontier(torch.zeros(4), ["a"] * 4, resamples=3, generator=torch.Generator())


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_weights_that_are_no_weights(bad):
    with pytest.raises(ValueError, match="kl_weight must be positive and finite, in reward per"):
        frontier([0.1, 0.2]).at_weight(bad)


@pytest.mark.parametrize("bad", [-0.1, math.nan, -math.inf])
def test_kls_that_are_none(bad):
    with pytest.raises(ValueError, match="nats must not be negative"):
        frontier([0.1, 0.2]).at_kl(bad)
    with pytest.raises(ValueError, match="nats must not be negative"):
        frontier([0.1, 0.2]).excess(Estimate(0.1, 0.1, 9), Estimate(bad, 0.1, 9))


def test_a_run_without_a_reward():
    with pytest.raises(ValueError, match="the run's reward must be finite, got nan"):
        frontier([0.1, 0.2]).excess(Estimate(math.nan, 0.1, 9), Estimate(0.1, 0.1, 9))


def test_a_curve_of_one_point():
    with pytest.raises(ValueError, match="points must be at least 2, got 1"):
        frontier([0.1, 0.2]).curve(1)
