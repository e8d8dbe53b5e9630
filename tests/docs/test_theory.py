"""Pages of theory: claims and functions exist, examples print what is printed there."""

import contextlib
import importlib
import inspect
import io
import re
from pathlib import Path

import pytest

from diffusion_envs import objectives

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "theory"
PAGES = sorted(FOLDER.glob("*.md"))
INDEX = (ROOT / "docs" / "theorems.md").read_text()
CLAIM = re.compile(r"<!-- claim: ([\w-]+) -->")
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\$)\$([^$]+?)\$(?!\$)", re.DOTALL)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def registered():
    """Names of all claims."""
    from verification.claims import CLAIMS

    return set(CLAIMS)


def resolved(name):
    """The object behind a dotted name, its modules imported as far as there are any."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            module = getattr(module, part)
        return module
    raise AttributeError(name)


def expected_and_printed(source, text, names):
    """What a block says it prints, in comments or in the block of text after it; what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(source, "page", "exec", dont_inherit=True), names)  # our own text
    said = re.findall(r"^print\(.*\)  # (.*)$", source, re.MULTILINE)
    said += text.splitlines() if text else []
    return said, out.getvalue().splitlines()


@pages
def test_a_page_says_what_checks_it(page):
    text = page.read_text()
    claims = CLAIM.findall(text)
    files = re.findall(r"`(tests/[\w/]+\.py)`", text)
    assert claims or files
    assert not set(claims) - registered()
    assert len(set(claims)) == len(claims)
    assert all((ROOT / file).exists() for file in files)
    for name in claims:
        assert f"[{name}](../verification.md#{name}) <!-- claim: {name} -->" in text


def test_every_claim_stands_on_a_page():
    on_pages = {name for page in PAGES for name in CLAIM.findall(page.read_text())}
    assert on_pages == registered()


def test_every_objective_stands_on_the_page_of_losses():
    concrete = {
        name
        for name in objectives.__all__
        if isinstance(one := getattr(objectives, name), type)
        and issubclass(one, objectives.Objective)
        and not inspect.isabstract(one)
    }
    page = (ROOT / "docs/theory/losses.md").read_text()
    assert len(concrete) > 20
    assert {name for name in concrete if not re.search(rf"\b{name}\b", page)} == set()


@pages
def test_functions_that_a_page_names_exist(page):
    names = re.findall(
        r"`((?:ctrl|diffusion_envs|verification)(?:\.\w+)+)(?:\(.*?\))?`", prose(page)
    )
    assert names
    for name in names:
        resolved(name)


def test_every_page_stands_in_the_index_once_at_least():
    linked = set(re.findall(r"\]\(theory/([\w-]+)\.md\)", INDEX))
    assert linked == {page.stem for page in PAGES}


@pages
def test_links_and_pictures_of_a_page_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`(examples/\w+\.py)`", page.read_text()):
        assert (ROOT / name).exists(), name


@pages
def test_examples_of_a_page_print_what_it_says(page):
    blocks = BLOCK.findall(page.read_text())
    assert blocks
    names = {"__name__": "page"}
    for source, text in blocks:
        said, printed = expected_and_printed(source, text, names)
        assert printed
        assert printed == said


def test_an_example_that_prints_something_else_is_seen():
    assert expected_and_printed("print(1 + 1)  # 3\n", "", {}) == (["3"], ["2"])
    assert expected_and_printed("print(2)\n", "3\n", {}) == (["3"], ["2"])


@pages
def test_formulas_become_mathml(page):
    converter = pytest.importorskip("latex2mathml.converter", reason="the site's extra")
    text = re.sub(r"`[^`]*`", "", prose(page))
    formulas = FORMULA.findall(text)
    assert formulas
    assert text.count("$") == sum(4 if block else 2 for block, _ in formulas)
    for block, inline in formulas:
        formula = block or inline
        assert "\n" not in formula, formula  # GitHub ends a formula at the line's end
        assert not re.search(r"\\[^a-zA-Z ]|(?<!\\)\*", formula), (
            formula
        )  # Markdown would read these
        made = converter.convert(formula)
        assert not re.search(r"\\[a-zA-Z]", re.sub(r"<[^>]*>", " ", made)), formula


def test_pictures_are_all_drawn_used_and_small():
    from benchmarks.theory_plots.__main__ import PICTURES

    files = {file.stem: file for file in (FOLDER / "plots").iterdir()}
    used = {
        name for page in PAGES for name in re.findall(r"\(plots/(\w+)\.svg\)", page.read_text())
    }
    assert set(files) == used == set(PICTURES)
    for file in files.values():
        assert file.stat().st_size < 60_000, file
        assert "<svg" in file.read_text()


def test_a_picture_has_the_same_bytes_again(tmp_path):
    from benchmarks.theory_plots.__main__ import PICTURES
    from benchmarks.theory_plots.style import save

    once, again = (save(PICTURES["terminal_kl"](), name, tmp_path) for name in ("a", "b"))
    assert once.read_bytes() == again.read_bytes()
