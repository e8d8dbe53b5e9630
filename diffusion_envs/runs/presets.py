"""Presets: files of options that can be read and changed; the command line wins over them.

A preset is flat TOML. Its keys are options of the command line, its values text, numbers, booleans
or lists of them; a value ``@file`` is a file beside it, and no other. Those that ship are in
``diffusion_envs/presets``.
"""

import difflib
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "presets"


def shipped() -> list[str]:
    """Names of the presets of this library."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def path_of(name: str | Path) -> Path:
    """The file of a preset: one that ships by its name, or one's own by its path.

    Raises:
        FileNotFoundError: it is neither.
    """
    path = Path(name).expanduser()
    if str(name) in shipped():
        return FOLDER / f"{name}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(str(name), shipped(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FileNotFoundError(
            f"preset must be one of {', '.join(shipped())}, or a file of options, got {name}{hint}"
        )
    return path


def options(name: str | Path) -> dict[str, list[str]]:
    """The options of a preset: what stands on a command line, the option itself first, by option.

    Raises:
        FileNotFoundError: there is no such preset.
        ValueError: it is no TOML, or has what is no option.
    """
    path = path_of(name)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"preset {path} must be TOML in UTF-8: {error}") from error
    words: dict[str, list[str]] = {}
    for key, value in content.items():
        option = "--" + key.replace("_", "-")
        if option in words:
            raise ValueError(f"preset {path}: {option} is there twice")
        if isinstance(value, bool):
            words[option] = [option if value else f"--no-{option[2:]}"]
            continue
        values = value if isinstance(value, list) else [value]
        if any(isinstance(each, dict | list | bool) for each in values):
            raise ValueError(
                f"preset {path}: {key} must be text, a number, a boolean or a list of them, got "
                f"{value!r}; options stand side by side, not in tables"
            )
        words[option] = [option, *(_word(each, path) for each in values)]
    return words


def expanded(
    arguments: Iterable[str], named: Iterable[str], name: str | Path
) -> tuple[list[str], dict[str, list[str]]]:
    """A command line with the options of a preset that do not stand on it, and these.

    Args:
        arguments: words of the command line, without the preset's name.
        named: options that stand there.
        name: of the preset.
    """
    taken = {option: words for option, words in options(name).items() if option not in set(named)}
    return [*(word for words in taken.values() for word in words), *arguments], taken


def _word(value: Any, preset: Path) -> str:
    """A value as it stands on the command line; a file beside the preset by its path.

    Raises:
        ValueError: it names a file elsewhere.
    """
    text = str(value)
    if not text.startswith("@"):
        return text
    folder = preset.parent.absolute()
    file = Path(os.path.normpath(folder / text[1:]))
    if not file.is_relative_to(folder):
        raise ValueError(
            f"preset {preset} names the file {text!r}, which is not beside it: presets are passed "
            "on, and read no other files; copy it there, or name it on the command line"
        )
    return f"@{file}" if file.is_file() else text
