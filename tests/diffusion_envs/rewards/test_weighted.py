"""Sums of rewards: what they are, their parts in log, evaluation and report, and their errors."""

import dataclasses
import inspect
import itertools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrl import Estimate
from diffusion_envs import rewards
from diffusion_envs.objectives import DDPO, GRPO, ReFL, ScoreAsAction
from diffusion_envs.rewards import Colour, JpegCompressibility, RewardError, Weighted, statistics
from diffusion_envs.runs.evaluation import evaluate, evaluate_pretrained
from diffusion_envs.training.requirements import require_inputs

EPS = torch.finfo(torch.float32).eps
RED, BLUE, JPEG = Colour("red"), Colour("blue"), JpegCompressibility()
PROMPTS = ["a cat", "a ship", "a frog", "", "a dog"]


@pytest.fixture
def images(generator) -> Tensor:
    return torch.rand(5, 3, 8, 8, generator=generator)


class Cutting:
    """Counts the prompts that are longer than four letters."""

    def __init__(self) -> None:
        self.counter: Counter[str] = Counter(prompts_cut=0)

    @property
    def counts(self) -> Mapping[str, int]:
        return self.counter

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.counter["prompts_cut"] += sum(len(prompt) > 4 for prompt in prompts)
        return images.mean((1, 2, 3))


# -- what the sum is ------------------------------------------------------------------------------


def test_it_is_the_weighted_sum(images):
    made = Weighted({"red": (RED, 2.0), "jpeg": (JPEG, -0.5)})
    red, jpeg = (rewards.score(r, images, PROMPTS) for r in (RED, JPEG))
    # two products and a sum, each rounded once
    size = (2 * red.abs() + 0.5 * jpeg.abs()).max().item()
    torch.testing.assert_close(
        rewards.score(made, images, PROMPTS), 2 * red - 0.5 * jpeg, rtol=0, atol=2 * EPS * size
    )


def test_means_and_standard_deviations_are_taken_out_first(images):
    made = Weighted({"red": (RED, 2.0), "jpeg": (JPEG, -0.5)}, normalise={"jpeg": (-0.3, 0.04)})
    red, jpeg = (rewards.score(r, images, PROMPTS).double() for r in (RED, JPEG))
    expected = (2 * red - 0.5 * (jpeg + 0.3) / 0.04).float()
    torch.testing.assert_close(
        rewards.score(made, images, PROMPTS),
        expected,
        rtol=0,
        atol=8 * EPS * expected.abs().max().item(),
    )


def test_a_sum_of_sums_is_the_sum_written_out(images):
    inner = Weighted(
        {"red": (RED, 1.5), "blue": (BLUE, -2.0)}, normalise={"red": (0.1, 0.3), "blue": (0.2, 2.0)}
    )
    outer = Weighted(
        {"colours": (inner, 0.7), "jpeg": (JPEG, 1.0)}, normalise={"colours": (0.4, 5.0)}
    )
    red, blue, jpeg = (rewards.score(r, images, PROMPTS).double() for r in (RED, BLUE, JPEG))
    colours = 1.5 * (red - 0.1) / 0.3 - 2.0 * (blue - 0.2) / 2
    expected = 0.7 * (colours - 0.4) / 5 + jpeg
    total, parts = rewards.score_in_parts(outer, images, PROMPTS)
    torch.testing.assert_close(total, expected.float(), rtol=16 * EPS, atol=16 * EPS)
    assert list(parts) == ["colours.red", "colours.blue", "jpeg"] == list(outer.weights)
    assert list(outer.weights.values()) == [0.7 * 1.5, 0.7 * -2.0, 1]
    torch.testing.assert_close(parts["colours.blue"], blue.float(), rtol=0, atol=0)


def test_a_picture_gets_the_same_alone_and_in_any_batch(images):
    made = Weighted({"red": (RED, 2.0), "jpeg": (JPEG, -0.5)}, normalise={"jpeg": (-0.3, 0.04)})
    together = rewards.score(made, images, PROMPTS)
    for some in ([0], [4, 1], [2, 3, 0]):
        alone = rewards.score(made, images[some], [PROMPTS[k] for k in some])
        assert torch.equal(alone, together[some])


def test_statistics_are_those_of_each_term_alone(images):
    terms = {"red": (RED, 2.0), "jpeg": (JPEG, -0.5), "both": (Weighted({"b": (BLUE, 3.0)}), 1.0)}
    measured = statistics(terms, images, PROMPTS)
    assert measured == statistics(Weighted(terms), images, PROMPTS)
    normal = Weighted(terms, normalise=measured)
    for name, (reward, _) in terms.items():
        values = rewards.score(reward, images, PROMPTS).double()
        assert measured[name] == pytest.approx((values.mean().item(), values.std().item()))
    # so that each term, taken by itself, has mean 0 and standard deviation |weight|
    only = dataclasses.replace(
        normal, terms={"red": (RED, 2.0)}, normalise={"red": measured["red"]}
    )
    values = rewards.score(only, images, PROMPTS)
    assert abs(values.mean().item()) < 1e-5
    assert values.std().item() == pytest.approx(2, rel=1e-5)


def test_statistics_of_pictures_that_a_term_does_not_tell_apart_are_refused(images):
    with pytest.raises(RewardError, match=r"reward red \(Colour\) gives all 3 images"):
        statistics({"red": (RED, 1.0)}, images[[0, 0, 0]], PROMPTS[:3])
    with pytest.raises(ValueError, match="at least 2, got 1"):
        statistics({"red": (RED, 1.0)}, images[:1], PROMPTS[:1])


# -- gradients ------------------------------------------------------------------------------------


def test_its_gradient_is_the_weighted_sum_of_those_of_its_parts(images):
    made = Weighted({"red": (RED, 2.0), "blue": (BLUE, -0.5)}, normalise={"blue": (0.1, 0.2)})
    assert made.differentiable

    def gradient(reward: rewards.Reward) -> Tensor:
        leaf = images.double().requires_grad_()
        rewards.differentiable_score(reward, leaf, PROMPTS).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    expected = 2 * gradient(RED) - 2.5 * gradient(BLUE)
    torch.testing.assert_close(gradient(made), expected, rtol=1e-12, atol=1e-15)


def test_it_has_a_gradient_exactly_if_all_parts_have(images):
    mixed = Weighted({"red": (RED, 1.0), "jpeg": (JPEG, 0.1)})
    assert not mixed.differentiable
    assert not Weighted({"outer": (mixed, 1.0)}).differentiable
    with pytest.raises(ValueError, match=r"gradient; jpeg of Weighted \(JpegCompressibility\) doe"):
        require_inputs(ReFL(), mixed, None, None)
    require_inputs(ReFL(), Weighted({"red": (RED, 1.0)}), None, None)
    assert not mixed(images.requires_grad_(), PROMPTS).requires_grad


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "normalise", "words"),
    [
        ({}, None, "rewards and weights by name"),
        ([(RED, 1.0)], None, "rewards and weights by name"),
        ({"a b": (RED, 1.0)}, None, "letters, digits and any of '_-.:', got 'a b'"),
        ({"a.b": (RED, 1.0), "a": (Weighted({"b": (BLUE, 1.0)}), 1.0)}, None, "two parts are call"),
        ({"": (RED, 1.0)}, None, "got ''"),
        ({"a": RED}, None, "term 'a' must be"),
        ({"a": (1.0, RED)}, None, "term 'a' must be"),
        (
            {"a": (RED, math.nan)},
            None,
            "weight of 'a' must be a finite number other than 0, got nan",
        ),
        ({"a": (RED, 0.0)}, None, "got 0.0: leave the term out"),
        ({"a": (RED, True)}, None, "got True"),
        ({"a": (RED, 1)}, {"b": (0, 1)}, "names 'b', which is none of the terms a"),
        ({"a": (RED, 1)}, {"a": (0, 0)}, "std positive, got"),
        ({"a": (RED, 1)}, {"a": (0, -1.0)}, "std positive, got"),
        ({"a": (RED, 1)}, {"a": (math.inf, 1.0)}, "normalise of 'a'"),
        ({"a": (RED, 1)}, {"a": 1.0}, "normalise of 'a'"),
    ],
)
def test_what_is_no_sum_is_refused(terms: Any, normalise: Any, words):
    make = inspect.unwrap(Weighted.__init__)  # without the checks of types that tests add
    with pytest.raises(ValueError, match=words):
        make(object.__new__(Weighted), terms, normalise)


def returning(value: Any) -> rewards.Reward:
    return lambda images, prompts: value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([0.0, math.nan, 0.0, 0.0, 0.0], r"reward b.bad of Weighted must be finite .* sample 1"),
        ([1.0], r"reward b.bad of Weighted must return one real number"),
        (torch.zeros(5, 1), r"reward b.bad of Weighted must return one real number"),
        ("high", r"reward b.bad of Weighted must return one real number"),
    ],
)
def test_every_part_is_checked_and_named(images, value, words):
    made = Weighted({"a": (RED, 1.0), "b": (Weighted({"bad": (returning(value), 1.0)}), 1.0)})
    for ask in (rewards.score, rewards.score_in_parts):
        with pytest.raises(RewardError, match=words):
            ask(made, images, PROMPTS)


def test_a_part_that_raises_is_named_and_so_is_one_that_is_wrapped(images):
    def raises(images: Tensor, prompts: list[str]) -> Tensor:
        raise KeyError("weights")

    for reward in (raises, rewards.Limited(raises, upper=1.0), rewards.Cached(raises)):
        made = Weighted({"pick": (reward, 1.0)})
        with pytest.raises(RewardError, match=r"reward pick of Weighted.*KeyError") as caught:
            rewards.score(made, images, PROMPTS)
        assert "reward Weighted" not in str(caught.value)


def test_a_part_without_its_gradient_is_named(images):
    @dataclasses.dataclass
    class Detached:
        differentiable = True

        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            return images.detach().mean((1, 2, 3))

    made = Weighted({"red": (RED, 1.0), "flat": (Detached(), 1.0)})
    with pytest.raises(RewardError, match="reward flat of Weighted declares differentiable"):
        rewards.differentiable_score(made, images.requires_grad_(), PROMPTS)


def test_a_sum_that_overflows_is_refused(images):
    made = Weighted({"red": (returning([1e12] * 5), 1e30)})
    with pytest.raises(RewardError, match="reward Weighted must be finite in float32"):
        rewards.score_in_parts(made, images, PROMPTS)


# -- in a run -------------------------------------------------------------------------------------


SUM = Weighted({"bright": (Colour("green"), 2.0), "jpeg": (JPEG, -0.1)})


def test_each_update_logs_every_part(small_trainer):
    trainer = small_trainer(DDPO(), reward=SUM)
    sample = trainer.sample()
    line = trainer.step()
    for k, (name, part) in enumerate([("bright", Colour("green")), ("jpeg", JPEG)]):
        expected = rewards.score(part, sample.images, sample.prompts)
        assert torch.equal(sample.rollout.reward_parts[:, k].float(), expected)
        assert line[f"reward.{name}"] == Estimate.of(expected)
    names = list(line)
    assert names[names.index("reward") + 1 :][:2] == ["reward.bright", "reward.jpeg"]
    assert line["reward_queries"] == 2 * 12  # pictures, not parts


def test_parts_cost_nothing_twice_and_change_no_reward(small_trainer):
    asked: list[int] = []

    def counted(images: Tensor, prompts: list[str]) -> Tensor:
        asked.append(len(images))
        return images.mean((1, 2, 3))

    one = small_trainer(DDPO(), reward=Weighted({"mean": (counted, 1.0)}))
    plain = small_trainer(DDPO(), reward=counted)
    with_parts = one.sample().rollout.rewards
    assert sum(asked) == 12
    assert torch.equal(with_parts, plain.sample().rollout.rewards)


def test_a_reward_without_parts_has_none(small_trainer):
    trainer = small_trainer(DDPO())
    rollout = trainer.sample().rollout
    assert rollout.reward_parts is None
    assert rollout.part_weights == {}
    assert not [name for name in trainer.step() if name.startswith("reward.")]


def test_parts_are_chosen_with_their_paths(small_trainer):
    rollout = small_trainer(DDPO(), reward=SUM).sample().rollout
    rows = torch.tensor([3, 0])
    assert torch.equal(rollout.chosen(rows).reward_parts, rollout.reward_parts[rows])


def test_an_evaluation_has_the_parts_too_and_finds_them_again(small_trainer, tmp_path):
    environment = small_trainer(DDPO(), reward=SUM).environment
    made = evaluate(environment, 5, batch=2)
    assert list(made.parts) == ["bright", "jpeg"]
    torch.testing.assert_close(
        SUM.total(made.parts), made.rewards.float(), rtol=4 * EPS, atol=4 * EPS
    )
    assert torch.equal(made.first(2).parts["jpeg"], made.parts["jpeg"][:2])
    path = tmp_path / "evaluation" / "before.safetensors"
    for _ in range(2):
        stored = evaluate_pretrained(environment, 5, path, judges={}, batch=2)
        for name, values in made.parts.items():
            assert torch.equal(stored.parts[name], values)


def test_what_the_parts_count_in_an_update_is_logged(small_trainer):
    cutting = Cutting()
    made = Weighted(
        {"cut": (cutting, 1.0), "in": (Weighted({"cached": (rewards.Cached(RED), 1.0)}), 1.0)}
    )
    trainer = small_trainer(DDPO(), reward=made)
    lines = []
    for _ in range(2):
        evaluate(trainer.environment, 3)  # is in no update
        lines.append(trainer.step())
    for line in lines:  # 12 samples of "one", "two", "three" in turn
        assert line["reward_counts.cut.prompts_cut"] == 4
        assert line["reward_counts.in.cached.cache_misses"] == 12
        assert line["reward_counts.in.cached.cache_hits"] == 0
    assert cutting.counts["prompts_cut"] > 8


def test_groups_whose_rewards_are_all_equal_are_counted(small_trainer):
    marks = itertools.cycle([1.0, 1.0, 0.0, 1.0, 0.35, 0.35 + 2**-25])  # the last by rounding

    def binary(images: Tensor, prompts: list[str]) -> list[float]:
        return [next(marks) for _ in prompts]

    for objective in (GRPO(group=2), GRPO(group=2, whole_batch_std=True)):
        line = small_trainer(objective, reward=binary).step()
        assert line["groups_without_signal"] == pytest.approx(2 / 3)
    assert "groups_without_signal" not in small_trainer(ScoreAsAction()).step()
