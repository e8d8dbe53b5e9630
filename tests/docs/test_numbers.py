"""Numbers of the pages: tables and prose are those of the stored results; the rest says whose."""

import re

import pytest

from benchmarks import image_leaderboard, leaderboard, pages, peers, update_speed
from benchmarks.scaling import __main__ as scaling
from tests.docs.reading import ROOT

SENTENCES = pages.sentences()


def read(page):
    return (ROOT / page).read_text()


def on_one_line(text):
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("page", "name"), [(page, name) for page, tables in pages.TABLES.items() for name in tables]
)
def test_a_table_is_what_its_stored_results_say(page, name):
    text = read(page)
    assert pages.filled(text, name, pages.TABLES[page][name]()) == text, (
        "python -m benchmarks.pages writes it again"
    )


def test_tables_of_speed_and_scaling_are_their_stored_results():
    speed, text = pages.stored("speed"), read("docs/speed.md")
    for name, measured in speed.items():
        made = peers.page(measured) if name == "peers" else update_speed.table(measured)
        assert pages.filled(text, name, made) == text, name
    text = read("docs/scaling.md")
    for name, made in scaling.tables(pages.stored("scaling")).items():
        assert pages.filled(text, name, made) == text, name


def rows_of(text):
    return [line for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("problem", ["gaussian", "mixture"])
def test_a_leaderboard_is_its_stored_rows(problem):
    rows = pages.stored(f"leaderboard_{problem}")["rows"]
    made = leaderboard.markdown(rows, leaderboard.Options(problem=problem))
    assert rows_of(made) == rows_of(read(f"docs/leaderboard_{problem}.md"))


def test_the_leaderboard_on_images_is_its_stored_rows():
    shown = rows_of(read("docs/leaderboard_images.md"))
    stored = pages.stored("leaderboard_images")["rows"]
    assert len([row for row in shown if not row.startswith(("| method", "| ---"))]) == len(stored)
    for one in stored:
        cells = [pages.bracketed(one[key], 2) for key in image_leaderboard.COLUMNS]
        row = " | ".join([one["method"], *cells, f"{one['updates']:.0f}", f"{one['calls']:,.0f}"])
        assert any(line.startswith(f"| {row} | ") for line in shown), row


@pytest.mark.parametrize("page", SENTENCES)
def test_prose_quotes_the_stored_results(page):
    text = on_one_line(read(page))
    missing = [phrase for phrase in SENTENCES[page] if phrase.lower() not in text.lower()]
    assert not missing, missing


def test_the_readme_counts_faults_and_kernels_as_their_pages_do():
    readme = on_one_line(read("README.md"))
    held = re.findall(r"\| (\d+) of (\d+) \|", read("docs/reliability.md"))
    kept, tried = (sum(int(pair[k]) for pair in held) for k in (0, 1))
    assert f"**{kept:,} of {tried:,} faults**" in readme
    rows = re.findall(
        r"\| `?[^|]+ \| ([0-9a-f]{12}) \| (\d+) \| (\d+) \|", read("docs/portability.md")
    )
    ((passed, failed),) = {(int(p), int(f)) for _, p, f in rows}
    kernels = len({fingerprint for fingerprint, *_ in rows})
    assert f"**{failed} failures under {kernels} kernels**" in readme
    assert f"of {passed:,} claims and tests" in readme
    assert f"under {kernels} kernels" in on_one_line(read("docs/index.md"))


# What a number looks like that somebody has measured: a standard error in brackets, or a unit of
# time, memory or comparison.
MEASURED = re.compile(
    r"\d\(\d+\)|(?<![\w.])\d[\d,.]*(?: to \d[\d.,]*)? "
    r"(?:ms|s|seconds?|minutes?|hours?|min|kB|MB|GB|MiB|GiB|%|times)(?!\w)"
)
# What stands in a section that says where its numbers come from: a command that measures, a stored
# file, a test that holds them, a page that has them.
COMMAND = re.compile(
    r"(?:python|torchrun [-\w ]*) ?-m (?:benchmarks(?!\.pages)|verification)"
    r"|-m diffusion_envs\.\w+ (?:measure|train|pretrain)"
    r"|make (?:demo|test|verify|faults|portability|docs|package)"
)
SOURCE = re.compile(COMMAND.pattern + r"|\]\([\w/.]+\.(?:json|csv)\)|tests/[\w/]+\.py|test_\w+\.py")
# Sections whose numbers are no measurements of ours, and why.
COUNTED = {
    ("README.md", "Ten lines of control"): "its example prints them, and a test runs it",
    ("docs/exports.md", "All weights"): "products of numbers of weights and bytes",
    ("docs/exports.md", "What a run exports, and which program loads it"): "the same",
    ("docs/models.md", "Prompts"): "products of sizes and bytes",
    ("docs/reliability.md", "How sure is that"): "arithmetic of chances",
    ("docs/run_folder.md", "What a run leaves behind"): "limits of sizes, and a formula",
    ("docs/verdict.md", "Reward against KL"): "levels of intervals",
    ("docs/rewards.md", "Several rewards at once"): "the same",
}
WRITTEN = ("verification", "verification_coverage", "mutants", "figures", "gpu", "leaderboard_")


def sections(text):
    """Heading and text of each part of a page, without the tables that commands fill in."""
    text = re.sub(r"<!-- (\w[^>]*?) -->\n.*?<!-- end of \1 -->", "", text, flags=re.DOTALL)
    for part in re.split(r"(?m)^(?=## )", text):
        yield part.split("\n", 1)[0].lstrip("# "), part


def unbacked(page, text, known=()):
    """Sections of a page that tell measured numbers and not where they come from."""
    (_, preamble), *_ = parts = list(sections(text))
    if page != "README.md" and COMMAND.search(preamble):
        return []  # what it says holds for the whole page
    missing = []
    for heading, part in parts:
        words = on_one_line(re.sub(r"(?ms)^( *)```.*?^\1```$", "", part))
        for phrase in known:
            words = re.sub(re.escape(phrase), "", words, flags=re.IGNORECASE)
        if (page, heading) not in COUNTED and not SOURCE.search(part) and MEASURED.search(words):
            missing.append((heading, MEASURED.findall(words)))
    return missing


PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "docs/howto").iterdir(),
    ]
    if path.suffix == ".md" and not path.stem.startswith(WRITTEN)
]


@pytest.mark.parametrize("page", PAGES)
def test_a_section_with_measured_numbers_says_where_they_come_from(page):
    assert not unbacked(page, read(page), SENTENCES.get(page, ()))


def test_a_number_without_a_source_is_seen():
    text = "# A page\n\n## Cost\n\nIt takes 2.7 s and gains 0.31(2).\n\n## Else\n\nTwo words.\n"
    assert unbacked("page", text) == [("Cost", ["2.7 s", "1(2)"])]
    for source in ("`python -m benchmarks.cost`", "[all](cost.json)", "`tests/a/test_b.py`"):
        assert not unbacked("page", text.replace("It takes", f"By {source} it takes"))
    assert not unbacked("page", text, ("it takes 2.7 s and gains 0.31(2)",))
    table = "<!-- cost -->\n| 2.7 s |\n<!-- end of cost -->"
    assert not unbacked("page", text.replace("It takes 2.7 s and gains 0.31(2).", table))


def test_no_section_is_excused_that_is_not_there():
    for page, heading in COUNTED:
        assert heading in [name for name, _ in sections(read(page))], (page, heading)


def test_a_page_without_the_place_of_a_table_is_refused():
    assert pages.filled("a\n<!-- x -->\nold\n<!-- end of x -->\nb", "x", "new") == (
        "a\n<!-- x -->\nnew\n<!-- end of x -->\nb"
    )
    with pytest.raises(ValueError, match="one place for the table 'y', got 0"):
        pages.filled("<!-- x -->\nold\n<!-- end of x -->", "y", "new")
