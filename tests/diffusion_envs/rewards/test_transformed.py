"""Limits, thresholds and memories of rewards."""

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_envs import rewards
from diffusion_envs.prompt import Prompt
from diffusion_envs.rewards import Cached, Colour, JpegCompressibility, Limited, Threshold

RED, JPEG = Colour("red"), JpegCompressibility()
PROMPTS = ["a cat", "a ship", "a frog", "", "a dog"]


@pytest.fixture
def images(generator) -> Tensor:
    return torch.rand(5, 3, 8, 8, generator=generator)


class Asked:
    """Brightness, which remembers how many pictures it was asked for, and which prompts."""

    differentiable = True

    def __init__(self) -> None:
        self.pictures: list[int] = []
        self.counts = Counter(prompts_cut=0)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.pictures.append(len(images))
        self.counts["prompts_cut"] += len(images)
        return images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])


def test_a_limit_clamps_and_has_no_gradient_beyond(images):
    images = images.double()
    values = RED(images, PROMPTS).sort().values
    low, high = values[1].item(), values[3].item()
    for made, least, most in (
        (Limited(RED, low, high), low, high),
        (Limited(RED, lower=low), low, math.inf),
        (Limited(RED, upper=high), -math.inf, high),
    ):
        leaf = images.clone().requires_grad_()
        plain = RED(images, PROMPTS)
        limited = rewards.differentiable_score(made, leaf, PROMPTS)
        assert limited.tolist() == [min(max(v, least), most) for v in plain.tolist()]
        limited.sum().backward()
        assert leaf.grad is not None
        moves = leaf.grad.flatten(1).abs().amax(1) > 0
        inside = (plain > least) & (plain < most)
        beyond = (plain < least) | (plain > most)
        assert moves[inside].all()
        assert not moves[beyond].any()
        assert inside.any()
        assert beyond.any()


def test_a_threshold_is_one_or_the_other(images):
    values = RED(images, PROMPTS)
    at = values.sort().values[2].item()
    assert rewards.score(Threshold(RED, at), images, PROMPTS).tolist() == (values >= at).tolist()
    lower = rewards.score(Threshold(RED, at, otherwise=-0.5), images, PROMPTS)
    assert lower.tolist() == [1.0 if v >= at else -0.5 for v in values.tolist()]
    assert not getattr(Threshold(RED, at), "differentiable", False)


def test_each_declares_a_gradient_only_if_its_reward_has_one(images):
    leaf = images.requires_grad_()
    for wrap in (lambda r: Limited(r, upper=1e3), Cached):
        assert wrap(RED).differentiable
        assert not wrap(JPEG).differentiable
        assert wrap(RED)(leaf, PROMPTS).requires_grad
        assert not wrap(JPEG)(leaf, PROMPTS).requires_grad


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Limited(RED), "lower or upper must be set"),
        (lambda: Limited(RED, 1.0, 1.0), "lower below upper, got 1.0 and 1.0"),
        (lambda: Limited(RED, lower=math.nan), "lower below upper, got nan"),
        (lambda: Threshold(RED, math.inf), "at must be finite"),
        (lambda: Threshold(RED, 0.0, otherwise=1.0), "otherwise below 1, got 0.0 and 1.0"),
        (lambda: Cached(RED, size=0), "size must be an integer of at least 1, got 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# -- memory ---------------------------------------------------------------------------------------


def test_a_picture_with_its_prompt_is_asked_for_once(images):
    asked = Asked()
    cached = Cached(asked)
    first = rewards.score(cached, images[:3], PROMPTS[:3])
    second = rewards.score(cached, images, PROMPTS)
    assert asked.pictures == [3, 2]
    assert torch.equal(second, asked(images, PROMPTS))
    assert torch.equal(first, second[:3])
    assert dict(cached.counts) == {"cache_hits": 3, "cache_misses": 5, "prompts_cut": 10}


def test_any_other_bit_type_shape_or_prompt_is_another_picture(images):
    asked = Asked()
    cached = Cached(asked)
    one = images[:1]
    nearly = one.clone()
    nearly[0, 2, 7, 7] = torch.nextafter(nearly[0, 2, 7, 7], torch.tensor(2.0))
    variants: list[tuple[Tensor, list[str]]] = [
        (one, ["a"]), (nearly, ["a"]), (one, ["b"]), (one.double(), ["a"]),
        (one.view(1, 3, 4, 16), ["a"]), (one.transpose(2, 3), ["a"]),
    ]  # fmt: skip
    for k, (image, prompt) in enumerate(variants, 1):
        cached(image, prompt)
        assert len(asked.pictures) == k
    for image, prompt in variants:
        cached(image.clone(memory_format=torch.contiguous_format), prompt)
    assert len(asked.pictures) == len(variants)


def test_the_same_picture_twice_in_a_batch_is_asked_for_once(images):
    asked = Asked()
    order = [1, 0, 1, 1]
    values = Cached(asked)(images[order], [PROMPTS[k] for k in order])
    assert asked.pictures == [2]
    assert torch.equal(values, asked(images, PROMPTS)[order])


def test_memory_is_bounded_and_keeps_what_was_asked_for_last(images):
    asked = Asked()
    cached = Cached(asked, size=2)

    def ask(*rows: int) -> None:
        cached(images[list(rows)], [PROMPTS[k] for k in rows])

    ask(0, 1, 2, 3, 4)  # more than fit are right too
    ask(3, 4)
    assert asked.pictures == [5]
    ask(3)
    ask(0)  # 4 is forgotten, 3 is not
    ask(3)
    assert asked.pictures == [5, 1]
    ask(4)
    assert asked.pictures == [5, 1, 1]


def test_where_a_gradient_is_needed_the_reward_is_asked_itself(images):
    asked = Asked()
    cached = Cached(asked)
    cached(images, PROMPTS)
    leaf = images.clone().requires_grad_()
    for _ in range(2):
        rewards.differentiable_score(cached, leaf, PROMPTS).sum().backward()
    assert asked.pictures == [5, 5, 5]
    assert cached.counts["cache_hits"] == 0
    with torch.no_grad():
        cached(leaf, PROMPTS)
    assert cached.counts["cache_hits"] == 5


def test_nothing_unusable_is_remembered(images):
    answers = itertools.chain([math.nan], itertools.repeat(1.0))

    def unsure(images: Tensor, prompts: list[str]) -> list[float]:
        return [next(answers)] * len(images)

    cached = Cached(unsure)
    with pytest.raises(
        rewards.RewardError, match=r"reward Cached\(unsure\): reward unsure must be"
    ):
        rewards.score(cached, images, PROMPTS)
    assert rewards.score(cached, images, PROMPTS).tolist() == [1.0] * 5


def test_memories_are_their_own(images):
    one, other = Cached(RED), Cached(RED)
    one(images, PROMPTS)
    assert one == other
    assert other.counts["cache_misses"] == 0


@pytest.mark.parametrize(
    "wrap", [lambda r: Limited(r, upper=9.0), lambda r: Threshold(r, 0.1), Cached]
)
def test_what_the_reward_counts_is_passed_on(wrap: Any, images):
    wrapped = wrap(Asked())
    wrapped(images, PROMPTS)
    assert wrapped.counts["prompts_cut"] == 5
    assert isinstance(wrap(RED), rewards.Counting)


def test_a_score_is_remembered_for_a_prompt_with_its_columns():
    def weight(images, prompts):
        return [prompt.metadata["weight"] for prompt in prompts]

    cached, image = rewards.Cached(weight), torch.rand(1, 3, 4, 4)
    for told in (1.0, 2.0, 1.0):
        assert cached(image, [Prompt("a", {"weight": told})]).tolist() == [told]
    assert cached.counts == {"cache_hits": 1, "cache_misses": 2}
