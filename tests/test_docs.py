"""Names and files that the documents mention exist, and the README's first example runs."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def resolved(name):
    """The object behind a dotted name, its modules imported as far as there are any."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_names_in_backticks_exist(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    names = re.findall(r"`((?:ctrl|diffusion_envs|verification)(?:\.\w+)+)(?:\(.*?\))?`", text)
    for name in names:
        if not name.endswith(".py"):
            resolved(name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_test_files_exist(document):
    text = document.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (document.parent / target).exists(), target
    for name in re.findall(r"`(tests/[\w/]+\.py)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"[(`](test_\w+\.py)", text):
        assert list((ROOT / "tests").rglob(name)), name


def test_the_first_example_of_the_readme_runs(capsys):
    source = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    exec(compile(source, "README.md", "exec"), {})  # our own text
    printed = capsys.readouterr().out
    assert re.match(r"path KL 1\.6\d+\(\d+\)  reward -0\.9\d+\(\d+\)", printed), printed
