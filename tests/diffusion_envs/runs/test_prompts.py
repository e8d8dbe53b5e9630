"""Prompts come from whatever holds them, and what is wrong with them is named."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_envs.prompt import Prompt
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.prompts import from_words, read_prompts, split
from diffusion_envs.runs.settings import describe, differences, rebuild

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
    assert {type(prompt) for prompt in taken} == {Prompt}
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
        ("missing.txt", FileNotFoundError, "one prompt a line, but missing.txt does not exist"),
        ("@missing", FileNotFoundError, "one prompt a line, but missing does not exist"),
        ("folder/", FileNotFoundError, "folder is a folder: name the files in it"),
        ("./folder", FileNotFoundError, "folder is a folder: name the files in it"),
        ("@folder", FileNotFoundError, "folder is a folder: name the files in it"),
        ("object.json", ValueError, "object.json must be a JSON list of prompts, got dict"),
        ("damaged.json", ValueError, "damaged.json must be a JSON list of prompts: "),
        ("numbers.json", ValueError, "non-empty strings, got 1"),
        ("empty.txt", ValueError, "at least one prompt, got none"),
        ("picture.txt", ValueError, "picture.txt must be UTF-8 text"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(word, error, message, here):
    (here / "folder").mkdir()
    with pytest.raises(error, match=message):
        from_words([word])


COLUMNS = [
    {"prompt": "a sign, with words", "word": "STOP", "weight": 0.5},
    {"prompt": "Füchse", "word": "", "weight": 2},
]


@pytest.fixture
def columns(tmp_path, monkeypatch) -> Path:
    """The same prompts with the same columns in every kind of file."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps(each, ensure_ascii=False) for each in COLUMNS]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(COLUMNS))
    (tmp_path / "a.csv").write_text(
        'word,prompt,weight\r\nSTOP,"a sign, with words",0.5\r\n,Füchse,2\r\n', encoding="utf-8-sig"
    )
    (tmp_path / "a.tsv").write_text("word\tprompt\nSTOP\ta sign, with words\n\tFüchse", "utf-8")
    (tmp_path / "caption.csv").write_text("caption,word\na sign,STOP\n")
    (tmp_path / "short.csv").write_text("prompt,word\na sign\n")
    (tmp_path / "long.csv").write_text("prompt,word\na sign, STOP, more\n")
    (tmp_path / "twice.csv").write_text("prompt,prompt\na,b\n")
    (tmp_path / "quote.csv").write_text('prompt\n"a sign\n')
    (tmp_path / "header.csv").write_text("prompt,word\n")
    (tmp_path / "blank.csv").write_text("prompt,word\n ,a\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "number.jsonl").write_text('"a"\n{"prompt": 3}\n')
    (tmp_path / "without.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "damaged.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "nan.json").write_text('[{"prompt": "a", "weight": NaN}]')
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_columns_of_a_file_are_metadata_of_its_prompts(name, columns):
    read = from_words([name])
    assert read == tuple(each["prompt"] for each in COLUMNS)
    assert [prompt.metadata["word"] for prompt in read] == ["STOP", ""]
    if "json" in name:
        assert [dict(p.metadata) for p in read] == [
            {k: v for k, v in each.items() if k != "prompt"} for each in COLUMNS
        ]
    if name == "a.csv":
        assert [prompt.metadata["weight"] for prompt in read] == ["0.5", "2"]


def test_the_column_with_the_prompt_may_have_any_name(columns):
    (read,) = read_prompts(columns / "caption.csv", column="caption")
    assert (read, dict(read.metadata)) == ("a sign", {"word": "STOP"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("caption.csv", "must have the column 'prompt', and has caption, word; .* --prompt-column"),
        ("without.jsonl", "line 2, must have the column 'prompt', and has text"),
        ("short.csv", "line 2, must have 2 values as its header, got 1"),
        ("long.csv", "line 2, must have 2 values as its header, got 3; put .* into quotes"),
        ("twice.csv", "different columns, but 'prompt' is there twice"),
        ("quote.csv", "line 2, is no row: unexpected end of data"),
        ("header.csv", "header.csv must name at least one prompt, got none"),
        ("empty.csv", "empty.csv must name at least one prompt, got none"),
        ("blank.csv", "non-empty strings, got ''"),
        ("number.jsonl", "line 2, must have text as 'prompt', got 3"),
        ("damaged.jsonl", "line 2, must be JSON, one prompt a line: "),
        ("nan.json", "metadata of prompt 'a' must be what JSON can hold"),
    ],
)
def test_what_is_wrong_with_a_file_of_columns_is_named(name, message, columns):
    with pytest.raises(ValueError, match=message):
        from_words([name])


def test_metadata_go_wherever_their_prompt_goes():
    prompt = Prompt("a sign", {"word": "STOP", "boxes": [1, {"x": 2.5}]})
    others = [pickle.loads(pickle.dumps(prompt)), copy.deepcopy(prompt)]
    stored = json.loads(json.dumps(describe([prompt, Prompt("plain")])))
    again, plain = rebuild(stored)
    for other in [*others, again, *read_prompts([prompt])]:
        assert (other, other.metadata) == ("a sign", prompt.metadata)
    assert (plain, type(plain)) == ("plain", str)
    with pytest.raises(TypeError):
        prompt.metadata["word"] = "GO"  # pyright: ignore[reportIndexIssue]


def test_other_columns_are_other_prompts_when_a_run_is_resumed():
    stop, go = (describe({"prompts": [Prompt("a", {"word": w}), "b"]}) for w in ("STOP", "GO"))
    ((setting, then, now),) = differences(stop, go)
    assert setting == "prompts[0]"
    assert (then["metadata"], now["metadata"]) == ({"word": "STOP"}, {"word": "GO"})
    fewer = describe({"prompts": [Prompt("a", {"word": "STOP"})]})
    assert differences(stop, fewer) == [("prompts.length", 2, 1)]


def test_held_out_prompts_are_split_off_by_the_seed():
    prompts = tuple(Prompt(f"prompt {k}", {"k": k}) for k in range(20))
    training, held_out = RunOptions(held_out=0.25).prompts_of(prompts, 3)
    assert len(held_out) == 5
    assert sorted(training + held_out, key=prompts.index) == list(prompts)
    for part in (training, held_out):
        assert sorted(part, key=prompts.index) == list(part)
        assert all(p.metadata["k"] == prompts.index(p) for p in part)
    assert RunOptions(held_out=5).prompts_of(prompts, 3) == (training, held_out)
    assert RunOptions(held_out=5).prompts_of(prompts, 4) != (training, held_out)
    assert RunOptions().prompts_of(prompts, 3) == (prompts, prompts)
    others = RunOptions(evaluation_prompts=("a",)).prompts_of(prompts, 3)
    assert others == (prompts, ("a",))


@pytest.mark.parametrize(("held_out", "n"), [(0.1, 4), (3, 3), (0.9, 3), (5, 1)])
def test_a_split_that_leaves_nothing_is_refused(held_out, n):
    message = f"held_out must leave prompts to train on .* but {held_out} of {n} prompt"
    with pytest.raises(ValueError, match=message):
        split(n, held_out, 0)


@pytest.mark.parametrize("held_out", [-1, 1.0, 1.5, float("nan"), True])
def test_a_share_or_number_of_held_out_prompts_is_checked(held_out):
    with pytest.raises(ValueError, match="held_out must be a number of prompts, such as 20"):
        RunOptions(held_out=held_out)


def test_only_one_may_say_what_held_out_samples_are_asked_for():
    with pytest.raises(ValueError, match="leave one of them out"):
        RunOptions(held_out=2, evaluation_prompts=("a",))


def test_a_column_that_is_not_there_is_told_with_those_that_are():
    prompt = Prompt("a sign", {"word": "STOP", "size": 3})
    for told in (prompt, pickle.loads(pickle.dumps(prompt)), copy.deepcopy(prompt)):
        with pytest.raises(KeyError, match="there is no column 'kind', but 'word', 'size'"):
            told.metadata["kind"]
        assert told.metadata.get("kind") is None
        assert "kind" not in told.metadata
    with pytest.raises(
        KeyError, match=r"no column 'kind', and no other: .*\(CSV, JSON\), or from P"
    ):
        Prompt("a sign").metadata["kind"]
