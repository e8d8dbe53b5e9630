"""Prompts from whatever holds them: a list, an array, a generator, or a file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

_ENDINGS = (".txt", ".json", ".jsonl", ".csv")


def read_prompts(prompts: Any, name: str = "prompts") -> tuple[str, ...]:
    """Prompts as a tuple of strings, from any iterable of them or from a file.

    A file holds one prompt a line (empty lines are passed over), or a JSON list of strings.

    Args:
        prompts: an iterable of strings, or the path of a file.
        name: of the argument, for messages.

    Raises:
        TypeError: ``prompts`` is one string, or nothing to go through, or holds what is no string.
        ValueError: there is no prompt, one is empty, or the file is no list of prompts.
        FileNotFoundError: the file is not there.
    """
    if isinstance(prompts, str):
        raise TypeError(f"{name} must be a list of strings, got the string {prompts!r}")
    try:
        taken = list(_read(prompts, name) if isinstance(prompts, Path) else prompts)
    except TypeError:
        raise TypeError(f"{name} must be a list of strings, got {type(prompts).__name__}") from None
    if not taken:
        raise ValueError(f"{name} must name at least one prompt, got none")
    for k, prompt in enumerate(taken):
        if isinstance(prompt, np.ndarray):
            raise TypeError(
                f"{name} must be one-dimensional, but {name}[{k}] is an array {prompt.shape}"
            )
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{name} must be non-empty strings, got {prompt!r}")
    return tuple(str(prompt) for prompt in taken)  # numpy's strings too


def from_words(words: Iterable[str]) -> tuple[str, ...]:
    """Prompts of a command line: each word is a prompt, or the name of a file with prompts.

    A word is a file if it begins with @, if there is such a file, or if it is one word that ends as
    files of text do.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: the file is no list of prompts.
    """
    taken: list[str] = []
    for word in words:
        named = word.startswith("@") or (word.endswith(_ENDINGS) and len(word.split()) == 1)
        if named or (word.strip() and len(word) < 200 and Path(word).is_file()):
            taken += read_prompts(Path(word.removeprefix("@")))
        else:
            taken.append(word)
    return tuple(taken)


def _read(path: Path, name: str) -> list[Any]:
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{name} must be a file with one prompt a line, but {path} is none")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} in {path} must be UTF-8 text: {error}") from error
    if path.suffix != ".json" and not text.lstrip().startswith("["):
        return [line.strip() for line in text.lstrip("\ufeff").splitlines() if line.strip()]
    try:
        prompts = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} in {path} must be a JSON list of strings: {error}") from error
    if not isinstance(prompts, list):
        raise ValueError(
            f"{name} in {path} must be a JSON list of strings, got {type(prompts).__name__}"
        )
    return prompts
