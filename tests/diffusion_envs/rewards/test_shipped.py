"""The contract of the rewards that need no weights of others, the same for every one of them."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffusion_envs import rewards
from diffusion_envs.rewards import Colour, JpegCompressibility, PromptAlignment
from diffusion_envs.rewards.declaration import Declaration, Declaring
from diffusion_envs.rewards.registry import REWARDS
from diffusion_envs.runs.settings import describe, rebuild

# opencv and onnxruntime warn when they are imported
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")
EPS = torch.finfo(torch.float32).eps
CLASSES = ["a photo of a cat", "a ship", "a green frog", "a dog", "an airplane"]
ANY = ["a cat", "", "x" * 10_000, "Ω \n 猫", "a dog"]
QUOTED = ['says "CAT"', 'says "A"', 'says "TO BE"', "\u201cox\u201d", 'says "' + "x" * 300 + '"']
# ten layers of sums of at most 1440 products, whose roundings add up like independent ones
NETWORK = 10 * 1440**0.5 * EPS
SHORT = 0.005
MEANS = 3 * 32 * 32 * EPS  # a mean in any order


@dataclass(frozen=True)
class Case:
    """A reward and what is known of it.

    Attributes:
        reward: to test.
        prompts: that it can score.
        least: of its scores.
        most: of its scores.
        said: of ``least`` and ``most`` in words, where the declared scale must have them.
        error: of float32, in units of the largest score.
        step: of differences that tell its gradient; between kinks, of a network of maxima.
    """

    reward: rewards.Reward
    prompts: Sequence[str]
    least: float
    most: float
    said: tuple[str, ...]
    error: float = 0.0
    step: float = 0.2


def classifier(name: str) -> Case:
    confident, inf = name.startswith("class"), math.inf
    least, said = (-math.log(10), ("-2.3", "to 0")) if confident else (-inf, ("at most 0",))
    return Case(
        REWARDS[name].make(None), ANY if confident else CLASSES, least, 0, said, NETWORK, SHORT
    )


def colour(name: str) -> Case:
    return Case(REWARDS[name].make(None), ANY, -1, 1, ("-1 to 1",), MEANS)


def text(name: str, said: str) -> Case:
    return Case(REWARDS[name].make(None), QUOTED, 0, 1, (said,))


CASES: dict[str, Case] = {
    "jpeg-compressibility": Case(JpegCompressibility(), ANY, -math.inf, 0, ("below 0",)),
    "jpeg-incompressibility": Case(rewards.JpegIncompressibility(), ANY, 0, math.inf, ("above 0",)),
    **{name: colour(name) for name in ("red", "green", "blue")},
    **{
        name: classifier(name)
        for name in (
            *("prompt-alignment", "class-confidence"),
            *("prompt-alignment-judge", "class-confidence-judge"),
        )
    },
    "text-in-picture": text("text-in-picture", "0 to 1"),
    "readable-text": text("readable-text", "1 if"),
}
INSIDE = Colour("red"), JpegCompressibility(), PromptAlignment()
COMPOSED: dict[str, Case] = {
    "weighted": Case(
        rewards.Weighted({"r": (INSIDE[0], 2.0), "j": (INSIDE[1], 0.5)}, {"j": (-0.3, 0.1)}),
        *(ANY, -math.inf, 2 + 1.5, (), 8 * MEANS),
    ),
    "weighted, differentiable": Case(
        rewards.Weighted({"c": (INSIDE[2], 0.5), "r": (INSIDE[0], -2.0)}),
        *(CLASSES, -math.inf, 2, (), NETWORK, SHORT),
    ),
    "limited": Case(rewards.Limited(INSIDE[2], lower=-5.0), CLASSES, -5, 0, (), NETWORK, SHORT),
    "threshold": Case(rewards.Threshold(INSIDE[1], at=-0.8), ANY, 0, 1, ()),
    "cached": Case(rewards.Cached(INSIDE[2]), CLASSES, -math.inf, 0, (), NETWORK, SHORT),
}
SMOOTH = [n for n, c in (CASES | COMPOSED).items() if getattr(c.reward, "differentiable", False)]


@pytest.fixture
def images(generator) -> Tensor:
    """Five pictures: noise, smoother noise, black, white, and half red."""
    noise = torch.rand(1, 3, 32, 32, generator=generator)
    smooth = torch.nn.functional.interpolate(
        torch.rand(1, 3, 4, 4, generator=generator), (32, 32), mode="bilinear"
    )
    red = torch.zeros(1, 3, 32, 32)
    red[:, 0, :, 16:] = 1
    return torch.cat([noise, smooth, 0 * noise, 0 * noise + 1, red])


@pytest.fixture(params=CASES | COMPOSED)
def case(request) -> Case:
    if "text" in request.param and not all(
        importlib.util.find_spec(name) for name in ("rapidocr", "onnxruntime")
    ):
        pytest.skip("the extra ocr is not installed")
    return (CASES | COMPOSED)[request.param]


def test_every_reward_without_weights_of_others_is_here():
    assert set(CASES) == {name for name, entry in REWARDS.items() if entry.model is None}


def test_scores_are_finite_numbers_of_the_declared_scale(case, images):
    scores = rewards.score(case.reward, images, case.prompts)
    slack = case.error * scores.abs().max().item()
    assert case.least - slack <= scores.min().item()
    assert scores.max().item() <= case.most + slack
    if not case.said:  # a reward around rewards, whose scale is theirs
        return
    assert isinstance(case.reward, Declaring)
    declared = case.reward.declaration
    assert isinstance(declared, Declaration)
    for words in case.said:
        assert words in declared.scale
    assert declared.licence
    assert declared.version
    assert declared.source
    assert declared.preprocessing


def test_the_score_is_the_same_alone_and_in_any_batch(case, images):
    together = rewards.score(case.reward, images, case.prompts)
    tolerance = 2 * case.error * together.abs().max().item()
    for rows in ([0], [1], [4], [3, 2], [4, 3, 2, 1, 0], [1, 1, 0]):
        some = rewards.score(case.reward, images[rows], [case.prompts[k] for k in rows])
        torch.testing.assert_close(some, together[rows], rtol=0, atol=tolerance)


def test_keyword_arguments_are_the_same(case, images):
    prompts = list(case.prompts)
    assert torch.equal(case.reward(prompts=prompts, images=images), case.reward(images, prompts))


def test_the_pictures_are_left_as_they_are(case, images):
    before = images.clone()
    case.reward(images, list(case.prompts))
    assert torch.equal(images, before)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.1, -0.1])
def test_pictures_that_are_none_are_refused(case, images, value):
    images[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=r"images must have values in \[0, 1\]"):
        case.reward(images, list(case.prompts))


def test_swapped_and_unequal_arguments_are_refused(monkeypatch, case, images):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as in production
    with pytest.raises(TypeError, match=r"are they swapped\?"):
        case.reward(list(case.prompts), images)
    with pytest.raises(ValueError, match="one prompt for each image, got 5 images and 3 prompts"):
        case.reward(images, list(case.prompts)[:3])


def test_an_overshoot_of_a_decoder_is_let_through(case, images):
    scores = case.reward(images * 1.0009, list(case.prompts))
    assert scores.isfinite().all()


def test_it_comes_back_from_the_settings_of_a_run(case):
    assert rebuild(describe(case.reward)) == case.reward


def test_a_gradient_is_declared_exactly_where_there_is_one(case, images):
    scores = case.reward(images.requires_grad_(), list(case.prompts))
    assert scores.requires_grad == bool(getattr(case.reward, "differentiable", False))
    with torch.no_grad():
        assert not case.reward(images, list(case.prompts)).requires_grad


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_those_of_finite_differences(name, generator):
    case = CASES.get(name) or COMPOSED[name]
    # smooth grey pictures, so that nothing saturates
    small = 0.3 + 0.4 * torch.rand(9, 3, 8, 8, generator=generator)
    images = torch.nn.functional.interpolate(small, (32, 32), mode="bilinear")
    prompts = [case.prompts[0]] * 9
    leaf = images.clone().requires_grad_()
    value = rewards.differentiable_score(case.reward, leaf, prompts)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    steepness = slope.flatten(1).norm(dim=1)
    steep = steepness > 0  # not where it is limited
    assert steep.sum() >= 3
    direction = slope / steepness.view(-1, 1, 1, 1).clamp(min=1e-30)
    ends = [case.reward(images + s * case.step * direction, prompts) for s in (1, -1)]
    ratio = (ends[0] - ends[1]) / (2 * case.step) / steepness
    # a maximum that changes hands within the step errs by much, but in few pictures: the median;
    # half of a mistake of 10 % is told, and float32 makes little of that
    assert case.error * value.abs().max() / (case.step * steepness[steep].median()) < 0.025
    assert ratio[steep].median().item() == pytest.approx(1, abs=0.05)
