"""Commands of the pages, held to the command lines that they call, without being carried out.

A program of ours reads its words as it would, in this process, and is stopped before it acts.
"""

import argparse
import functools
import inspect
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tyro

from tests.docs.reading import ROOT

# What others' programs do is theirs; that these are their names is all that is held to be so.
OTHERS = (
    "ruff",
    "pyright",
    "hadolint",
    "jupytext",
    "vllm",
    "tensorboard",
    "hf",
    "git",
    "cd",
    "kill",
    "ls",
    "open",
    "docker",
    "pre-commit",
)
# Harmless, and what stands after it needs what it does.
CARRIED_OUT = ("printf", "echo", "mkdir", "cat")
_PLACEHOLDER = re.compile(r"^[A-Z][A-Z_]+(/[A-Z_]+)?$")
_MAKEFILE = (ROOT / "Makefile").read_text()


class Read(BaseException):
    """A program has read its words, all of which it knows."""


class NotACommandError(AssertionError):
    """What a page says to type would not do."""


def commands(source: str) -> Iterator[str]:
    """The commands of a block of shell, continued lines joined, comments left out."""
    for line in source.replace("\\\n", " ").splitlines():
        words = re.sub(r"(^|\s)#.*$", "", line).strip().removeprefix("$ ")
        for command in re.split(r"\s+&&\s+", words):
            if command:
                yield command


def check(command: str, folder: Path) -> None:
    """Hold a command to what it calls.

    Args:
        command: one line.
        folder: in which it would be typed.

    Raises:
        NotACommandError: a program, module, option, target or file does not exist.
    """
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]  # the environment
    program, *rest = words or [""]
    program = program.removeprefix(".venv/bin/")
    if program in CARRIED_OUT:
        done = subprocess.run(["bash", "-c", command], cwd=folder, check=False, capture_output=True)
        if done.returncode:
            raise NotACommandError(f"{command!r}: {done.stderr.decode()}")
    elif program in ("python", "python3"):
        _python(rest, folder)
    elif program == "make":
        _make(rest)
    elif program == "torchrun":
        _torchrun(rest, folder)
    elif program == "accelerate":
        _accelerate(rest, folder)
    elif program == "pip":
        _pip(rest)
    elif program not in OTHERS:
        raise NotACommandError(f"{program!r} of {command!r} is no program that pages may name")


def _python(words: list[str], folder: Path) -> None:
    if words[:1] == ["-m"]:
        _module(words[1], words[2:], folder)
    elif words and words[0].endswith(".py"):
        if not (ROOT / words[0]).is_file() and not (folder / words[0]).is_file():
            raise NotACommandError(f"there is no {words[0]}")
    else:
        raise NotACommandError(f"python {' '.join(words)} is neither a module nor a file")


def _module(module: str, words: list[str], folder: Path) -> None:
    """Let a module read its words, and stop it there."""
    if module.split(".")[0] not in ("diffusion_envs", "verification", "benchmarks"):
        if module == "pytest":
            _pytest(words)
        elif module not in ("pip", "venv", "build", "mkdocs"):
            raise NotACommandError(f"python -m {module} is no program that pages may name")
        return
    if (
        not (ROOT / module.replace(".", "/")).is_dir()
        and not (ROOT / (module.replace(".", "/") + ".py")).is_file()
    ):
        raise NotACommandError(f"there is no module {module}")
    if not words or any(_PLACEHOLDER.match(w) or "..." in w for w in words):
        words = [_filled(w) for w in words if "..." not in w]
        if not words:
            return
    with _stopped_when_read(), pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(sys, "argv", [module, *words])
        patched.setattr(sys, "path", [str(ROOT), *sys.path])
        # The import hook checks types in what it compiles; kept under the usual name, a process
        # without the hook could not run it.
        patched.setattr(sys, "dont_write_bytecode", True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # it was imported before
                runpy.run_module(module, run_name="__main__", alter_sys=False)
        except Read:
            return
        except SystemExit as ended:
            if not ended.code and ("--help" in words or "list" in words or "--list" in words):
                return
            raise NotACommandError(f"python -m {module} {' '.join(words)}: {ended.code}") from ended
    raise NotACommandError(f"python -m {module} {' '.join(words)} read no words")


def _pytest(words: list[str]) -> None:
    for word in words:
        if word.startswith("tests") and not (ROOT / word.split("::")[0]).exists():
            raise NotACommandError(f"there is no {word}")


def _filled(word: str) -> str:
    """A placeholder as a word that an option may take."""
    return word.lower() if _PLACEHOLDER.match(word) else word


def _unmade(wanted):
    """What reads the same words and does nothing: tyro calls a function that it reads for."""
    if not inspect.isfunction(wanted):
        return wanted

    @functools.wraps(wanted)
    def nothing(*_, **__):
        raise Read

    return nothing


@contextmanager
def _stopped_when_read() -> Iterator[None]:
    """Programs that read their words by tyro or argparse end there, by ``Read``."""
    from diffusion_envs.runs import command_line

    real_tyro, real_argparse = tyro.cli, argparse.ArgumentParser.parse_args
    real_commands, real_read = tyro.extras.subcommand_cli_from_dict, command_line.read
    inside = False  # a call of tyro that is a part of another

    def by_tyro(wanted, *words, **options):
        if inside:
            return real_tyro(wanted, *words, **options)
        real_tyro(_unmade(wanted), *words, **options)
        raise Read

    def by_argparse(parser, args=None, namespace=None):
        real_argparse(parser, args, namespace)
        raise Read

    def by_command(subcommands, **options):
        nonlocal inside
        inside = True  # it reads by tyro.cli
        try:
            real_commands({k: _unmade(f) for k, f in subcommands.items()}, **options)
        finally:
            inside = False
        raise Read

    def by_family(*words, **options):
        nonlocal inside
        inside = True
        try:
            real_read(*words, **options)
        finally:
            inside = False
        raise Read

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tyro, "cli", by_tyro)
        patched.setattr(tyro.extras, "subcommand_cli_from_dict", by_command)
        patched.setattr(argparse.ArgumentParser, "parse_args", by_argparse)
        patched.setattr(command_line, "read", by_family)
        yield


def _make(words: list[str]) -> None:
    for word in words:
        variable, equals, _ = word.partition("=")
        if equals and f"$({variable})" not in _MAKEFILE:
            raise NotACommandError(f"the Makefile reads no {variable}")
        target = re.escape(word.replace(".venv/", "$(VENV)/"))
        if not equals and not re.search(rf"^{target}:", _MAKEFILE, re.M):
            raise NotACommandError(f"the Makefile has no target {word}")


def _torchrun(words: list[str], folder: Path) -> None:
    from torch.distributed.run import get_args_parser

    at = words.index("-m")
    try:
        get_args_parser().parse_args(words)
    except SystemExit as ended:
        raise NotACommandError(f"torchrun {' '.join(words)}") from ended
    _module(words[at + 1], words[at + 2 :], folder)


def _accelerate(words: list[str], folder: Path) -> None:
    from accelerate.commands.launch import launch_command_parser

    if words[0] != "launch":
        raise NotACommandError(f"accelerate {words[0]} is not what runs are started by")
    at = words.index("-m")
    try:
        launch_command_parser().parse_args(words[1:])
    except SystemExit as ended:
        raise NotACommandError(f"accelerate {' '.join(words)}") from ended
    _module(words[at + 1], words[at + 2 :], folder)


def _pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[1:]:
        for extra in re.findall(r"\[([\w,-]+)\]", word):
            unknown = set(extra.split(",")) - set(extras["optional-dependencies"])
            if unknown:
                raise NotACommandError(f"there is no extra {sorted(unknown)}")
