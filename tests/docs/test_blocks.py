"""Every block of code on every page runs, or would be read by the program that it calls.

A block that is not run says why, in a comment before it that the site shows.
"""

import json
import re
import shutil
import sys

import pytest

from tests.diffusion_envs.cifar10.few_pictures import write_pictures
from tests.docs import commands
from tests.docs.reading import hook, name, pages

blocks = hook("blocks")
LANGUAGES = {"python", "bash", "text", "json", "", "toml", "yaml", "math"}
PAGES = pages()
SHELL = re.compile(
    r"^(\$ |python3? |make( |$)|torchrun |accelerate |pip |printf |git |OMP_|cd |vllm )", re.M
)
INLINE = re.compile(
    r"`((?:[A-Z_]+=\S+ )?(?:python3? -m|make|torchrun|accelerate launch|pip)\s[^`]{1,300})`"
)


def of_language(path, language):
    return [b for b in blocks.blocks(path.read_text()) if b.language == language]


def is_shell(block):
    return block.language == "bash" or (not block.language and SHELL.match(block.source))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run of one update, to go on with, evaluate and export."""
    from diffusion_envs import rewards, sd15
    from diffusion_envs.runs.options import RunOptions
    from diffusion_envs.training.update_size import UpdateSize

    folder = tmp_path_factory.mktemp("runs") / "finished"
    sd15.finetune(
        "tiny",
        reward=rewards.JpegCompressibility(),
        prompts=["a photo of a cat"],
        updates=1,
        steps=2,
        size=UpdateSize(samples=2),
        options=RunOptions(evaluation_samples=2, progress=False),
        output=folder,
    )
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, as a reader's would be, beside the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for module in set(sys.modules) - before:
        file = getattr(sys.modules[module], "__file__", None)
        if file and file.startswith(str(tmp_path)):
            del sys.modules[module]


def run_page(path, folder):
    """Execute the Python blocks of a page in order, as one program."""
    names = {"__name__": "__main__"}
    for block in blocks.blocks(path.read_text()):
        if block.file:
            (folder / block.file).write_text(block.source)
        if block.language == "python" and block.not_run is None:
            code = compile(block.smaller(), f"{name(path)}:{block.line}", "exec", dont_inherit=True)
            exec(code, names)  # our own text


def with_what_it_reads(command, folder, finished):
    """Put a finished run and a few pictures where a command reads them."""
    if "data/cifar10" in command and not (folder / "data").exists():
        (folder / "data").mkdir()
        write_pictures(folder / "data" / "cifar10", 20)
    for run in re.findall(r"(?:--resume|evaluate|export) (runs/[\w-]+)", command):
        if not (folder / run).exists():
            shutil.copytree(finished, folder / run)


# test_theory.py runs those of docs/theory, and compares what they print
WITH_PYTHON = [
    p
    for p in PAGES
    if p.parent.name != "theory" and any(b.not_run is None for b in of_language(p, "python"))
]


@pytest.mark.parametrize("path", WITH_PYTHON, ids=name)
def test_python_blocks_run(path, folder, capsys):
    run_page(path, folder)
    capsys.readouterr()


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_block_has_a_language_that_is_checked(path):
    for block in blocks.blocks(path.read_text()):
        assert block.language in LANGUAGES, (block.line, block.language)
        if block.language in ("", "text", "json"):
            assert block.language == "" or not SHELL.search(block.source), block.line
        if block.language == "json":
            json.loads(block.source)
        if block.language == "python":
            compile(block.source, path.name, "exec")
        block.smaller()  # what a comment changes stands there


WITH_SHELL = [p for p in PAGES if any(is_shell(b) for b in blocks.blocks(p.read_text()))]


@pytest.mark.parametrize("path", WITH_SHELL, ids=name)
def test_shell_blocks_are_read_by_what_they_call(path, folder, finished_run, capsys):
    for block in blocks.blocks(path.read_text()):
        if block.file:
            (folder / block.file).write_text(block.source)
        if is_shell(block) and block.not_run is None:
            for command in commands.commands(block.source):
                with_what_it_reads(command, folder, finished_run)
                commands.check(command, folder)
    capsys.readouterr()


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_in_sentences_are_read_by_what_they_call(path, folder, finished_run, capsys):
    text = re.sub(r"^( *)```.*?^\1```$", "", path.read_text(), flags=re.M | re.S)
    for command in (" ".join(words.split()) for words in INLINE.findall(text)):
        with_what_it_reads(command, folder, finished_run)
        commands.check(command, folder)
    capsys.readouterr()
