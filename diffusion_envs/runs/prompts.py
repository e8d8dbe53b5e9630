"""Prompts from whatever holds them: a list, an array, a generator, or a file; and a held-out part.

A file is read by its ending: ``.csv`` and ``.tsv`` (a header, then a row a prompt; values stay
text), ``.jsonl`` and ``.ndjson`` (a line a prompt), ``.json`` (a list); in JSON a prompt is a
string, or an object with the prompt under ``column``. Every other file is text, one prompt a line.
Further columns are the prompt's ``metadata``, which rewards read.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctrl.noise import stream
from diffusion_envs.prompt import Prompt, metadata_of

COLUMN = "prompt"  # the usual name of the column with the prompt
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_ENDINGS = (".txt", ".json", *_JSON_LINES, *_DELIMITERS)


def read_prompts(
    prompts: Any, name: str = "prompts", *, column: str = COLUMN
) -> tuple[Prompt, ...]:
    """Prompts from any iterable of strings or from a file (see the module).

    Args:
        prompts: an iterable of strings, or the path of a file.
        name: of the argument, for messages.
        column: of a file, that holds the prompt.

    Raises:
        TypeError: ``prompts`` is one string, or nothing to go through, or holds what is no string.
        ValueError: there is no prompt, one is empty, or the file is no list of prompts.
        FileNotFoundError: the file is not there.
    """
    if isinstance(prompts, str):
        raise TypeError(
            f"{name} must be a list of strings, got the string {prompts!r}: for a file give a "
            "pathlib.Path"
        )
    source = f" in {prompts}" if isinstance(prompts, Path) else ""
    try:
        taken = list(_read(prompts, name, column) if isinstance(prompts, Path) else prompts)
    except TypeError:
        raise TypeError(f"{name} must be a list of strings, got {type(prompts).__name__}") from None
    if not taken:
        raise ValueError(f"{name}{source} must name at least one prompt, got none")
    for k, prompt in enumerate(taken):
        if isinstance(prompt, np.ndarray):
            raise TypeError(
                f"{name} must be one-dimensional, but {name}[{k}] is an array {prompt.shape}"
            )
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{name}{source} must be non-empty strings, got {prompt!r}")
    return tuple(Prompt(str(prompt), metadata_of(prompt)) for prompt in taken)  # numpy's too


def from_words(
    words: Iterable[str], name: str = "prompts", *, column: str = COLUMN
) -> tuple[Prompt, ...]:
    """Prompts of a command line: each word is a prompt, or the name of a file with prompts.

    A word is a file if it begins with @, if there is such a file, or if it is one word that ends as
    files of text do. A folder is refused, if it is written with a slash.

    Args:
        words: as they stand there.
        name: of the option, for messages.
        column: of a file, that holds the prompt.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: the file is no list of prompts.
    """
    taken: list[Prompt] = []
    for word in words:
        named = word.startswith("@") or (word.endswith(_ENDINGS) and len(word.split()) == 1)
        named = named or ("/" in word and len(word) < 200 and Path(word).is_dir())
        if named or (word.strip() and len(word) < 200 and Path(word).is_file()):
            taken += read_prompts(Path(word.removeprefix("@")), name, column=column)
        else:
            taken.append(Prompt(word))
    return tuple(taken)


def split(n: int, held_out: int | float, seed: int) -> tuple[list[int], list[int]]:
    """Places of the prompts to train on and of those to hold out; the same for one seed.

    Args:
        n: number of all prompts.
        held_out: how many, or their share of all.
        seed: of the run.

    Raises:
        ValueError: nothing would be left on one side.
    """
    count = round(held_out * n) if isinstance(held_out, float) else held_out
    if not 0 < count < n:
        raise ValueError(
            f"held_out must leave prompts to train on and prompts to hold out, but {held_out} of "
            f"{n} prompt{'' if n == 1 else 's'} holds out {count}: take another share or number, "
            "or more prompts"
        )
    order = torch.randperm(n, generator=stream(seed, "held-out prompts")).tolist()
    return sorted(order[count:]), sorted(order[:count])


# -- files -----------------------------------------------------------------------------------------


def _read(path: Path, name: str, column: str) -> list[Any]:
    path = path.expanduser()
    if not path.is_file():
        what = "is a folder: name the files in it" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{name} must be a file with one prompt a line, but {path} {what}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} in {path} must be UTF-8 text: {error}; save it in that encoding"
        ) from error
    place = f"{name} in {path}"
    if (delimiter := _DELIMITERS.get(path.suffix.lower())) is not None:
        return _from_table(text, delimiter, place, column)
    if path.suffix.lower() in _JSON_LINES:
        return _from_json_lines(text, place, column)
    if path.suffix.lower() == ".json" or text.lstrip().startswith("["):
        return _from_json(text, place, column)
    return [line.strip() for line in text.splitlines() if line.strip()]


def _from_table(text: str, delimiter: str, place: str, column: str) -> list[Prompt]:
    """Rows under a header; their values are text."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    taken: list[Prompt] = []
    try:
        header = [word.strip() for word in next(reader, [])]
        if not header:
            return []
        if twice := [word for word, times in Counter(header).items() if times > 1]:
            raise ValueError(
                f"{place} must have different columns, but {twice[0]!r} is there twice"
            )
        _require_column(header, place, column)
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"{place}, line {reader.line_num}, must have {len(header)} values as its "
                    f"header, got {len(row)}; put a value with a {delimiter!r} in it into quotes"
                )
            taken.append(_with_columns(dict(zip(header, row, strict=True)), place, column))
    except csv.Error as error:
        raise ValueError(f"{place}, line {reader.line_num}, is no row: {error}") from error
    return taken


def _from_json_lines(text: str, place: str, column: str) -> list[Any]:
    taken: list[Any] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{place}, line {number},"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} must be JSON, one prompt a line: {error}") from error
        taken.append(_entry(entry, where, column))
    return taken


def _from_json(text: str, place: str, column: str) -> list[Any]:
    if not text.strip():
        return []
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} must be a JSON list of prompts: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{place} must be a JSON list of prompts, got {type(entries).__name__}")
    return [_entry(entry, f"{place}, entry {k},", column) for k, entry in enumerate(entries)]


def _entry(entry: Any, place: str, column: str) -> Any:
    """A string, or an object with columns."""
    if not isinstance(entry, Mapping):
        return entry
    _require_column(list(entry), place, column)
    return _with_columns(entry, place, column)


def _with_columns(columns: Mapping[str, Any], place: str, column: str) -> Prompt:
    text = columns[column]
    if not isinstance(text, str):
        raise ValueError(f"{place} must have text as {column!r}, got {text!r}")
    rest = {name: value for name, value in columns.items() if name != column}
    return Prompt(text.strip(), rest)


def _require_column(columns: Sequence[str], place: str, column: str) -> None:
    """Refuse what has no column with the prompt.

    Raises:
        ValueError: it is not there.
    """
    if column not in columns:
        raise ValueError(
            f"{place} must have the column {column!r}, and has {', '.join(columns) or 'none'}; "
            "name the column with the prompt by --prompt-column "
            "(read_prompts(path, column=...))"
        )
