"""Rewards of readable text: the formula without a recogniser, then drawn text with the real one."""

import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from diffusion_envs.rewards import ReadableText, TextInPicture
from diffusion_envs.rewards.text_in_picture import (
    _reader,
    distance,
    quoted_text,
    share_read,
)
from diffusion_envs.runs import settings

needs_reader = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("rapidocr", "onnxruntime")),
    reason="the extra ocr is not installed",
)
# opencv and onnxruntime warn when they are imported
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")


@functools.cache
def plain_distance(left: str, right: str) -> int:
    """Levenshtein's distance by its recursive definition."""
    if not left or not right:
        return len(left) + len(right)
    if left[0] == right[0]:
        return plain_distance(left[1:], right[1:])
    return 1 + min(
        plain_distance(left[1:], right),
        plain_distance(left, right[1:]),
        plain_distance(left[1:], right[1:]),
    )


def drawn(*lines: str, size: int = 32, letter: int = 12, ink: str = "black") -> torch.Tensor:
    """One picture ``[1, 3, size, size]`` with lines of text in its middle."""
    from matplotlib import get_data_path

    path = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    picture = Image.new("RGB", (size, size), "lightyellow")
    ImageDraw.Draw(picture).text(
        (size / 2, size / 2),
        "\n".join(lines),
        font=ImageFont.truetype(str(path), letter),
        fill=ink,
        anchor="mm",
        align="center",
    )
    pixels = torch.tensor(list(picture.get_flattened_data())).view(size, size, 3)
    return pixels.permute(2, 0, 1)[None].float() / 255


def test_distance_is_levenshteins(generator):
    for _ in range(60):
        n, m = torch.randint(7, (2,), generator=generator).tolist()
        left, right = (
            "".join("abc"[k] for k in torch.randint(3, (size,), generator=generator).tolist())
            for size in (n, m)
        )
        assert distance(left, right) == plain_distance(left, right), (left, right)


@pytest.mark.parametrize(
    ("read", "wanted", "share"),
    [
        ("cat", "cat", 1.0),
        ("xcatx", "cat", 1.0),  # contained
        ("cut", "cat", 2 / 3),
        ("ca", "cat", 2 / 3),
        ("", "cat", 0.0),
        ("a long text", "cat", 0.0),  # a distance of 10 counts as 3
        ("tac", "cat", 1 / 3),
    ],
)
def test_share_read(read, wanted, share):
    assert share_read(read, wanted) == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "CAT"', "cat"),
        ('"Go  Home" and "Stay"', "gohome"),
        ("a sign that says \u201cD\u00c9J\u00c0 vu\u201d", "d\u00e9j\u00e0vu"),
    ],
)
def test_the_wanted_text_is_what_is_quoted_first(prompt, text):
    assert quoted_text(prompt) == text


@pytest.mark.parametrize("prompt", ["a sign", "", 'a sign that says ""', 'says " "', 'a 3" pipe'])
@pytest.mark.parametrize("reward", [TextInPicture(), ReadableText()])
def test_a_prompt_that_quotes_nothing_is_refused(reward, prompt):
    with pytest.raises(ValueError, match="must have the wanted text in double quotes"):
        reward(images=torch.rand(1, 3, 32, 32), prompts=[prompt])


@pytest.mark.parametrize("reward", [TextInPicture(), ReadableText()])
def test_inputs_are_checked(reward):
    with pytest.raises(TypeError):  # jaxtyping speaks first in tests
        reward(['says "A"'], torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        reward(torch.full((1, 3, 32, 32), float("nan")), ['says "A"'])


@pytest.mark.parametrize(
    "wrong", [{"threads": 0}, {"detect_from": -1}, {"detection_side": 31}, {"threads": True}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be an integer of at least"):
        TextInPicture(**wrong)


def test_a_recogniser_that_is_not_installed_is_named(monkeypatch):
    _reader.cache_clear()
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match=r"pip install ctrl-diffusion\[ocr\]"):
        TextInPicture()(torch.rand(1, 3, 32, 32), ['says "A"'])


@pytest.mark.parametrize("reward", [TextInPicture(threads=2), ReadableText(detect_from=0)])
def test_settings_are_read_back(reward):
    assert settings.rebuild(settings.describe(reward)) == reward
    assert reward.declaration.licence == "Apache-2.0"
    assert not reward.differentiable


@needs_reader
def test_drawn_words_are_read_in_small_pictures():
    images = torch.cat([drawn("CAT"), drawn("CUT"), drawn("HI"), drawn("CATS", letter=11)])
    prompts = ['a sign that says "CAT"'] * 4
    assert TextInPicture().texts(images) == ["cat", "cut", "hi", "cats"]
    torch.testing.assert_close(
        TextInPicture()(images=images, prompts=prompts), torch.tensor([1, 2 / 3, 0, 1])
    )
    assert ReadableText()(images=images, prompts=prompts).tolist() == [1, 0, 0, 0]


@needs_reader
def test_the_text_of_each_picture_is_compared_with_its_own_prompt():
    images = torch.cat([drawn("CAT"), drawn("DOG")])
    right, wrong = ['says "CAT"', 'says "DOG"'], ['says "DOG"', 'says "CAT"']
    assert ReadableText()(images, right).tolist() == [1, 1]
    assert ReadableText()(images, wrong).tolist() == [0, 0]


@needs_reader
def test_a_score_is_the_same_alone_and_in_any_batch():
    images = torch.cat([drawn("CAT"), drawn("WON"), drawn("I", letter=9), torch.rand(1, 3, 32, 32)])
    prompts = [f'says "{word}"' for word in ("CAT", "WIN", "A", "X")]
    reward = TextInPicture()
    together = reward(images, prompts)
    alone = torch.cat([reward(images[k : k + 1], prompts[k : k + 1]) for k in range(4)])
    assert torch.equal(together, alone)


@needs_reader
def test_larger_pictures_are_searched_for_lines():
    picture = drawn("STOP", "HERE", size=192, letter=40)
    reward = TextInPicture(detection_side=192)
    assert reward.texts(picture) == ["stophere"]
    assert reward(picture, ['a plate with "Stop here"']).tolist() == [1.0]
    assert ReadableText(detection_side=192)(picture, ['says "STOP"']).tolist() == [0.0]
    assert reward(picture, ['says "STOP"']).tolist() == [1.0]


@needs_reader
@pytest.mark.parametrize("size", [32, 128])
def test_an_empty_picture_says_nothing(size):
    images = torch.full((1, 3, size, size), 0.5)
    assert TextInPicture(detection_side=128)(images, ['says "Q"']).tolist() == [0.0]


@needs_reader
def test_nothing_is_printed_or_downloaded(capfd, monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("a connection was asked for")

    _reader.cache_clear()
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    ReadableText(detect_from=0, detection_side=64)(drawn("CAT"), ['says "CAT"'])
    assert capfd.readouterr() == ("", "")
