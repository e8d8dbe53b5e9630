"""A prompt with what else is known of it."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


class Prompt(str):
    """A string to ask a model for, with columns that only rewards read: ``Prompt(text, metadata)``.

    Models, logs and whatever else takes a string see its text alone; two are equal if their texts
    are. A reward reads ``prompt.metadata["column"]``.

    Attributes:
        metadata: by column, whatever JSON can hold; nothing if left out.

    Raises:
        ValueError: a value is none that JSON can hold, and so could not be stored with a run.
    """

    _metadata: dict[str, Any]

    def __new__(cls, text: str, metadata: Mapping[str, Any] | None = None) -> "Prompt":
        """The text, with a copy of its metadata."""
        made = super().__new__(cls, text)
        columns = {str(column): value for column, value in (metadata or {}).items()}
        made._metadata = _Columns(columns)
        try:
            json.dumps(made._metadata, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"metadata of prompt {text!r} must be what JSON can hold, text and finite numbers, "
                f"for example: {error}"
            ) from error
        return made

    @property
    def metadata(self) -> Mapping[str, Any]:
        """By column; read only."""
        return MappingProxyType(self._metadata)


class _Columns(dict[str, Any]):
    """Columns of a prompt, which say what there is where another is asked for."""

    def __missing__(self, column: str) -> Any:
        raise KeyError(
            f"there is no column {column!r}, but {', '.join(map(repr, self))}"
            if self
            else f"there is no column {column!r}, and no other: columns come from a file of "
            "prompts that has them (CSV, JSON), or from Prompt(text, {column: value})"
        )


def metadata_of(prompt: str) -> Mapping[str, Any]:
    """A prompt's columns; none of a plain string."""
    return prompt.metadata if isinstance(prompt, Prompt) else {}


def described(prompt: str) -> str:
    """The text, with the columns where there are any: no two different prompts have the same."""
    columns = metadata_of(prompt)
    if not columns:
        return str(prompt)
    return f"{prompt} {json.dumps(dict(columns), sort_keys=True, ensure_ascii=False)}"
