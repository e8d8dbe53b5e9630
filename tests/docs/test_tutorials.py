"""Pages of the tutorials are those of their scripts, and say what the scripts print."""

import re

import pytest

from benchmarks import tutorials
from benchmarks.tutorials import Result, cells, changes, executed, page, smaller, without_results

NAMES = sorted(path.stem for path in tutorials.SCRIPTS.glob("*.py"))
# Those that take seconds as they are; all run small, as pages, in test_blocks.py.
QUICK = ("path_kl", "leave_an_interval")
NUMBER = re.compile(r"[-+]?\d+\.\d+|\d+")
SCRIPT = """# run with: SIZE = 3 -> SIZE = 2

# %% [markdown]
# # A title
#
# Prose with $x$.

# %%
SIZE = 3
print(SIZE)

# %%
print("last")
SIZE
"""


def source_of(name):
    return (tutorials.SCRIPTS / f"{name}.py").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_pages_are_made_from_their_scripts(name):
    source = source_of(name)
    nothing = [Result("", None) if cell.is_code else None for cell in cells(source)]
    expected, _ = page(source, nothing, name)
    assert without_results((tutorials.PAGES / f"{name}.md").read_text()) == expected


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_pages_exist_and_no_others(name):
    shown = re.findall(
        r"!\[[^\]]+\]\(([\w-]+\.png)\)", (tutorials.PAGES / f"{name}.md").read_text()
    )
    assert shown == sorted(path.name for path in tutorials.PAGES.glob(f"{name}-*.png"))
    for picture in shown:
        assert 1_000 < (tutorials.PAGES / picture).stat().st_size < 100_000


@pytest.mark.parametrize("name", QUICK)
def test_pages_say_what_scripts_print(name):
    printed = [r.printed for r in executed(cells(source_of(name)), name) if r is not None]
    said = re.findall(r"```text\n(.*?)```", (tutorials.PAGES / f"{name}.md").read_text(), re.S)
    for ours, theirs in zip((p for p in printed if p.strip()), said, strict=True):
        assert NUMBER.sub("#", ours).split() == NUMBER.sub("#", theirs).split()
        pairs = zip(NUMBER.findall(ours), NUMBER.findall(theirs), strict=True)
        # another processor rounds otherwise: a digit of an error bar, or a path that leaves later
        for one, other in pairs:
            assert float(one) == pytest.approx(
                float(other), rel=0.02, abs=2e-3 + 1.01 * ("." not in one)
            )


def test_every_tutorial_is_in_the_list_and_ends_with_what_to_try():
    listed = re.findall(r"\]\((\w+)\.md\)", (tutorials.PAGES / "index.md").read_text())
    assert sorted(set(listed)) == NAMES
    for name in NAMES:
        last = (tutorials.PAGES / f"{name}.md").read_text().rpartition("\n## ")[2]
        assert last.startswith("What to try\n")
        assert re.search(r"\]\(\.\./(theory/|theorems\.md|methods\.md)", last), name


def test_a_page_has_prose_code_output_and_what_makes_it_small():
    results = list(executed(cells(SCRIPT), "script"))
    text, pictures = page(SCRIPT, results, "script")
    assert text.startswith(
        "# A title\n\nProse with $x$.\n\n<!-- run with: SIZE = 3 -> SIZE = 2 -->\n"
    )
    assert "```python\nSIZE = 3\nprint(SIZE)\n```\n\n```text\n3\n```\n" in text
    assert "```text\nlast\n```" in text  # a number is no picture
    assert not pictures
    made_small = [r.printed for r in executed(cells(smaller(SCRIPT)), "script") if r is not None]
    assert made_small == ["2\n", "last\n"]


def test_a_figure_is_shown_where_it_is_the_last_line():
    source = (
        "# %%\nfrom matplotlib.figure import Figure\nfigure = Figure()\n"
        "figure.set_label('Nothing')\nfigure\n"
    )
    text, pictures = page(source, list(executed(cells(source), "script")), "script")
    assert "![Nothing](script-1.png)" in text
    assert pictures.keys() == {"script-1.png"}
    assert (
        pictures["script-1.png"]
        == page(source, list(executed(cells(source), "script")), "script")[1]["script-1.png"]
    )


def test_a_figure_that_says_nothing_is_refused():
    source = "# %%\nfrom matplotlib.figure import Figure\nFigure()\n"
    with pytest.raises(ValueError, match="say what it shows"):
        page(source, list(executed(cells(source), "script")), "script")


def test_errors_name_the_line_of_the_script():
    broken = SCRIPT + "\n# %%\nx = 1\n1 / 0\n"
    with pytest.raises(ZeroDivisionError) as caught:
        list(executed(cells(broken), "broken.py"))
    last = caught.traceback[-1]
    assert last.lineno + 1 == len(broken.splitlines())


def test_what_is_no_tutorial_is_refused():
    with pytest.raises(ValueError, match="must begin with a cell"):
        cells("import torch\n\n# %%\nprint(1)\n")
    with pytest.raises(ValueError, match="prose must be comments, but line 3"):
        cells("# %% [markdown]\n# prose\nprint(1)\n")
    with pytest.raises(ValueError, match="in one cell of code"):
        changes("# run with: SIZE = 4 -> SIZE = 2\n\n" + SCRIPT)
