"""Prompts come from whatever holds them, and what is wrong with them is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_envs.runs.prompts import from_words, read_prompts

PROMPTS = ("a photo of a cat", "Füchse im Schnee", "кот")


class Series:
    """As a column of pandas: it has a length and is gone through, but has no truth value."""

    def __init__(self, values: Any) -> None:
        self.values = list(values)

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self):
        return iter(self.values)

    def __bool__(self) -> bool:
        raise ValueError("the truth value of a Series is ambiguous")


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, iter, Series, lambda p: (x for x in p), dict.fromkeys]
)
def test_any_iterable_of_strings_will_do(kind):
    taken = read_prompts(kind(PROMPTS))
    assert taken == PROMPTS
    assert {type(prompt) for prompt in taken} == {str}
    json.dumps(taken)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("a photo of a cat", TypeError, "list of strings, got the string 'a photo of a cat'"),
        (3, TypeError, "list of strings, got int"),
        (np.array(3), TypeError, "list of strings, got ndarray"),
        (
            np.array([["a", "b"]]),
            TypeError,
            r"one-dimensional, but prompts\[0\] is an array \(2,\)",
        ),
        ([], ValueError, "at least one prompt, got none"),
        (iter(()), ValueError, "at least one prompt, got none"),
        (["a", " "], ValueError, "non-empty strings, got ' '"),
        (["a", 3], ValueError, "non-empty strings, got 3"),
        (np.array([1, 2]), ValueError, "non-empty strings"),
    ],
)
def test_what_is_no_list_of_prompts_is_named(value, error, message):
    with pytest.raises(error, match=message):
        read_prompts(value)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.txt").write_text("\ufeff" + "\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(PROMPTS))
    (tmp_path / "plain").write_text("\n".join(PROMPTS), encoding="utf-8")
    (tmp_path / "object.json").write_text('{"a": 1}')
    (tmp_path / "damaged.json").write_text('["a",')
    (tmp_path / "numbers.json").write_text("[1, 2]")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\xff\xfe")
    return tmp_path


@pytest.mark.parametrize("word", ["lines.txt", "@lines.txt", "list.json", "@list.json", "plain"])
def test_a_file_of_prompts_is_read(word, here):
    assert from_words([word]) == PROMPTS
    assert from_words(["a dog", word]) == ("a dog", *PROMPTS)
    assert read_prompts(here / word.removeprefix("@")) == PROMPTS


def test_a_prompt_that_only_looks_a_little_like_a_file_is_a_prompt(here):
    words = ["a page of lines.txt", "plainly", "1.5 cats", "a" * 5000, ""]
    assert from_words(words) == tuple(words)


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        ("missing.txt", FileNotFoundError, "one prompt a line, but missing.txt is none"),
        ("@missing", FileNotFoundError, "one prompt a line, but missing is none"),
        ("object.json", ValueError, "object.json must be a JSON list of strings, got dict"),
        ("damaged.json", ValueError, "damaged.json must be a JSON list of strings: "),
        ("numbers.json", ValueError, "non-empty strings, got 1"),
        ("empty.txt", ValueError, "at least one prompt, got none"),
        ("picture.txt", ValueError, "picture.txt must be UTF-8 text"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(word, error, message, here):
    with pytest.raises(error, match=message):
        from_words([word])
