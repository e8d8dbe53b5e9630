"""Rewards by name: every name makes its reward, and words that make none are refused by name."""

import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
import torch

from diffusion_envs import rewards
from diffusion_envs.rewards import registry
from diffusion_envs.rewards.registry import REWARDS, Named, Words

WITHOUT_A_MODEL = [name for name, entry in REWARDS.items() if entry.model is None]


@dataclass(frozen=True)
class Brightness:
    """A reward with a model, for these tests."""

    model: str
    channel: int = 0
    batch: int = field(default=16, kw_only=True)

    def __call__(self, images, prompts):
        return images[:, self.channel].mean((1, 2))


@pytest.fixture(autouse=True)
def _two_more(monkeypatch):
    table = {
        **REWARDS,
        "first": Named(Brightness, {"channel": 0}, model="a folder"),
        "second": Named(Brightness, {"channel": 1}, model="a folder"),
    }
    monkeypatch.setattr(registry, "REWARDS", table)


@pytest.mark.parametrize("name", WITHOUT_A_MODEL)
def test_every_name_makes_a_reward_that_has_this_name(name):
    made = registry.make([name], {}, "judge")
    assert registry.name_of(made) == name
    assert registry.name_of(replace(made)) == name  # a copy is the same reward


def test_a_reward_of_other_settings_has_no_name():
    assert registry.name_of(rewards.JpegCompressibility(quality=50)) is None
    assert registry.name_of(lambda images, prompts: images.mean((1, 2, 3))) is None
    assert registry.name_of(rewards.load("tests.diffusion_envs.rewards.test_registry:mean")) == (
        "tests.diffusion_envs.rewards.test_registry:mean"
    )


def mean(images, prompts):
    return images.mean((1, 2, 3))


def test_the_name_of_a_learned_reward_is_the_same_wherever_its_model_is():
    made = registry.make(["second"], {"second": "here"})
    assert made == Brightness("here", 1)
    assert registry.name_of(Brightness("there", 1, batch=2)) == "second"
    assert registry.name_of(Brightness("there", 2)) is None


@pytest.mark.parametrize(
    ("models", "names", "expected"),
    [
        ([], ["red"], {}),
        (["/a=b"], ["first", "red"], {"first": "/a=b"}),  # the one that needs a model
        (["first=/a=b"], ["first", "first"], {"first": "/a=b"}),
        (["second=y", "first=x"], ["first", "second"], {"first": "x", "second": "y"}),
        (["http://host/v1?red=1"], ["first"], {"first": "http://host/v1?red=1"}),
    ],
)
def test_places_of_models(models, names, expected):
    assert registry.places(models, names) == expected


@pytest.mark.parametrize(
    ("models", "names", "message"),
    [
        (["x"], ["red"], "reward_model x is of none of them.*need a model: none"),
        ([], ["first"], "reward first needs a folder; say --reward-model PLACE"),
        (["x"], ["first", "second"], "need a model: first, second; say --reward-model NAME=PLACE"),
        (["first=x"], ["first", "second"], "reward second needs a folder"),
        (["first=x", "first=y"], ["first"], "first=y stands there twice"),
        (["x", "y"], ["first"], "y stands there twice"),
        (["second=x"], ["first"], "second=x is of none"),
        (["red=x"], ["red", "first"], "red=x is of none"),
    ],
)
def test_places_that_do_not_fit_are_refused(models, names, message):
    with pytest.raises(ValueError, match=message):
        registry.places(models, names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "must name at least one"),
        (["redd"], "did you mean 'red'"),
        (["red", "blue"], "red is there without a finite weight"),
        (["red=1", "blue=much"], "blue=much is there without a finite weight"),
        (["red=1", "blue=nan"], "blue=nan is there without a finite weight"),
        (["red=1", "red=2"], "red=2 is there twice"),
        (["prompt-alignment-judge"], "must be one of"),  # it judges only
        (["first"], "first needs a folder"),
        (["no_such_module:f"], "no_such_module"),
    ],
)
def test_words_that_make_no_reward_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        registry.make(words, {})


def test_reward_and_judges_are_resolved_together_and_objects_stay():
    own = Brightness("elsewhere")
    reward, judges = registry.resolve(
        Words(("first",)), {"a": Words(("second",)), "b": own}, ["first=x", "second=y"]
    )
    assert (reward, judges) == (Brightness("x"), {"a": Brightness("y", 1), "b": own})
    with pytest.raises(TypeError, match="red is words still"):
        Words(("red",))(torch.rand(1, 3, 2, 2), ["a"])


UNWANTED = ("torchvision", "open_clip", "timm", "fairscale", "hpsv2", "ImageReward")
IMPORT_ALL = f"""
import importlib.abc, pkgutil, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {UNWANTED!r}:
            raise AssertionError(f"{{name}} is imported")

sys.meta_path.insert(0, Refuse())
import diffusion_envs.rewards as package
heavy = {{"torchvision", "transformers", "diffusers", "rapidocr", "onnxruntime", "cv2"}}
for module in pkgutil.iter_modules(package.__path__):
    if not module.name.startswith("__"):
        importlib.import_module(f"diffusion_envs.rewards.{{module.name}}")
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_all_rewards_import_together_and_without_what_they_are_published_with():
    done = subprocess.run(
        [sys.executable, "-c", "import importlib\n" + IMPORT_ALL],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
