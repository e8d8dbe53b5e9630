"""The site: links, claims, formulas, the navigation, and what fails its build."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mkdocs.exceptions import PluginError

from tests.docs.reading import DOCS, ROOT, hook

architecture, blocks, claims = hook("architecture"), hook("blocks"), hook("claims")
docstrings, formulas = hook("docstrings"), hook("formulas")
navigation, offline = hook("navigation"), hook("offline")
outside, reference = hook("outside"), hook("reference")

CLAIM = {
    "name": "path-kl",
    "theme": "likelihood",
    "file": "verification/claims/girsanov.py",
    "statement": "KL(P^u || P^0) = E^u[1/2 int |u|^2 dt]",
    "source": "Theorem 3.1 <of> the_paper",
    "checks": [
        {"name": "one | path", "route": "pathwise", "deviation": 0.0, "tolerance": 1e-12}
        | {"rejected": 0.3},
        {
            "name": "mean",
            "route": "sampled",
            "deviation": 2e-3,
            "tolerance": 1e-2,
            "rejected": None,
        },
    ],
    "mistakes": [
        {"name": "no half", "edits": [], "by": "one | path", "deviation": 0.5},
        {"name": "unseen", "edits": [], "by": None, "deviation": 0.0},
    ],
    "seconds": 1.0,
}


@pytest.fixture
def docs(tmp_path):
    file = tmp_path / "verification.json"
    file.write_text(json.dumps({"machine": {}, "claims": [CLAIM]}))
    return tmp_path


def test_a_claim_becomes_its_statement_its_checks_and_a_picture(docs):
    text = claims.expanded("before\n\nsee it <!-- claim: path-kl -->\n", "theory/x.md", docs)
    assert "see it" not in text
    assert text.startswith("before")
    assert "    KL(P^u || P^0) = E^u[1/2 int |u|^2 dt]" in text
    assert "2 checks reject 1 of 2 planted mistakes" in text
    assert r"| 1 | one \| path | pathwise | 0 | 1.0e-12 | 3.0e-01 |" in text
    assert "| 2 | mean | sampled | 2.0e-03 | 1.0e-02 |  |" in text
    assert r"\<of\> the\_paper" in text
    assert "(../verification.md#path-kl)" in text


def test_the_picture_has_every_number_where_its_logarithm_is(docs):
    picture = claims.picture(CLAIM)
    dots = [float(x) for x in re.findall(r'class="deviation" cx="([\d.]+)"', picture)]
    lines = [float(x) for x in re.findall(r'class="tolerance" d="M([\d.]+)', picture)]
    crosses = [float(x) + 4 for x in re.findall(r'class="rejected" d="M([\d.]+)', picture)]
    assert len(dots) == len(lines) == 2
    assert len(crosses) == 1
    # decades are equally wide: from 1e-12 to 1e-2 ten of them, to 0.3 eleven and a half
    decade = (lines[1] - lines[0]) / 10
    assert (crosses[0] - lines[0]) / decade == pytest.approx(11.477, abs=0.01)
    assert (dots[1] - lines[0]) / decade == pytest.approx(9.301, abs=0.01)
    assert dots[0] == pytest.approx(34.0)  # an exact zero, at the edge
    assert dots[0] < lines[0] - decade / 2


def test_a_claim_that_is_not_there_fails_the_build(docs):
    with pytest.raises(PluginError, match=r"theory/x\.md names a claim .* path-lk"):
        claims.expanded("<!-- claim: path-lk -->", "theory/x.md", docs)


def test_without_numbers_a_claim_is_a_link_and_still_has_to_exist(tmp_path):
    (tmp_path / "verification.md").write_text("## path-kl\n")
    known = claims.expanded("<!-- claim: path-kl -->", "theory/x.md", tmp_path)
    assert known == "[path-kl](../verification.md#path-kl)"
    with pytest.raises(PluginError):
        claims.expanded("<!-- claim: path-lk -->", "theory/x.md", tmp_path)


def test_formulas_are_mathml_and_unknown_commands_fail():
    page = r'a <span class="arithmatex">\(x &lt; \tfrac12\)</span> b'
    made = formulas.typeset(page, "x.md")
    assert "<math" in made
    assert "<mfrac>" in made
    assert "arithmatex" not in made
    block = formulas.typeset(r'<div class="arithmatex">\[\int_0^T u\,dt\]</div>', "x.md")
    assert 'display="block"' in block
    with pytest.raises(PluginError, match=r"x\.md.*nosuch"):
        formulas.typeset(r'<span class="arithmatex">\(\nosuch{x}\)</span>', "x.md")


def test_links_to_the_repository_lead_to_pages_of_the_site():
    text = "[a](../ctrl/girsanov.py#L3) [`b`](../examples/merton.py) [c](speed.md#x) `[d](../e)`"
    assert outside.rewritten(text, "models.md") == (
        "[a](source/ctrl/girsanov.py.md) [`b`](examples/merton.md) [c](speed.md#x) `[d](../e)`"
    )
    assert outside.rewritten("[a](docs/speed.md)", "changelog.md") == "[a](speed.md)"
    assert outside.rewritten("[a](../../README.md)", "howto/x.md") == "[a](../index.md)"
    assert outside.rewritten("[a](https://b.c)", "howto/x.md") == "[a](https://b.c)"


def test_every_file_that_a_page_links_to_has_a_page():
    pages = outside.generated()
    assert "changelog.md" in pages
    assert "source/deploy/slurm.sbatch.md" in pages
    assert "#SBATCH" in pages["source/deploy/slurm.sbatch.md"]()
    assert "```toml\n# JPEG" in pages["source/diffusion_envs/presets.md"]()
    example = pages["examples/merton.md"]()
    assert example.startswith("# examples/merton.py\n\n")
    assert "```python\n" in example


def test_the_navigation_is_filled_in_by_the_page_that_leads_to_it(tmp_path):
    (tmp_path / "theorems.md").write_text("[b](theory/b.md) and [a](theory/a.md#x)\n")
    pages = ["theory/a.md", "theory/b.md", "theory/c.md", "theorems.md"]
    nav = [{"Theory": ["theorems.md", "theory/*"]}, {"Empty": ["tutorials/*"]}]
    assert navigation.expanded(nav, pages, tmp_path) == [
        {"Theory": ["theorems.md", "theory/b.md", "theory/a.md", "theory/c.md"]}
    ]
    rest = navigation.expanded(
        [{"A": "a.md"}, {"Rest": ["*.md"]}], ["a.md", "b.md", "x/c.md"], tmp_path
    )
    assert rest == [{"A": "a.md"}, {"Rest": ["b.md"]}]
    (tmp_path / "theorems.md").write_text("## B\n[b](theory/b.md)\n## A\n[a](theory/a.md)\n")
    assert navigation.expanded(nav, pages, tmp_path)[0]["Theory"] == [
        "theorems.md",
        {"B": ["theory/b.md"]},
        {"A": ["theory/a.md"]},
        "theory/c.md",
    ]


def test_aligned_entries_of_a_docstring_become_a_list():
    text = (
        "First.\n\nSetting      dX = b dt\n             + s dW.\nSources      [A] a_b * c.\n\nMore."
    )
    assert docstrings.as_markdown(text) == (
        "First.\n\n- **Setting**: dX = b dt\n  + s dW.\n"
        "- **Sources**: \\[A\\] a\\_b \\* c.\n\nMore."
    )


def test_aligned_columns_of_a_docstring_are_kept():
    code, rest = "    code   it\n    is", "Setting   x.\n\nOne sentence.  Another\nline.\n"
    text = f"First.\n\na   b\ncc  d\n\n{code}\n\n{rest}"
    kept = f"First.\n\n```text\na   b\ncc  d\n```\n\n{code}\n\n{rest}"
    assert docstrings.with_tables_kept(text) == kept


def test_names_in_backticks_lead_to_the_reference_but_not_in_code():
    assert reference.linked("`ctrl.girsanov.path_kl` x") == (
        "[`ctrl.girsanov.path_kl`][ctrl.girsanov.path_kl] x"
    )
    assert reference.linked("`sd15.finetune(x=1)`") == (
        "[`sd15.finetune(x=1)`][diffusion_envs.sd15.finetune]"
    )
    for kept in ("`ctrl.girsanov.nothing`", "[`ctrl.simulate`](x.md)", "```\n`ctrl.simulate`\n```"):
        assert reference.linked(kept) == kept


def test_names_in_docstrings_lead_to_the_reference():
    def linked(text):
        return reference.linked_docstring(text, "ctrl.girsanov.path_kl", "ctrl.girsanov")

    assert linked("see ``girsanov.log_ratio``") == (
        "see [``girsanov.log_ratio``][ctrl.girsanov.log_ratio]"
    )
    assert linked("``Estimate.of(x)``") == "[``Estimate.of(x)``][ctrl.estimate.Estimate.of]"
    for kept in ("``girsanov.path_kl``", "``states``", "``noise``", "``True``"):
        assert linked(kept) == kept


def test_blocks_say_what_the_tests_do_with_them():
    text = (
        "a\n\n<!-- run before: x = 1 -->\n<!-- run with: y = 9 -> y = 2 -->\n"
        '```python title="f.py"\ny = 9\n```\n\n<!-- not run: no network -->\n```\npip x\n```\n'
    )
    first, second = blocks.blocks(text)
    assert (first.language, first.file, first.line) == ("python", "f.py", 5)
    assert first.smaller() == "x = 1\ny = 2\n"
    assert second.not_run == "no network"
    shown = blocks.on_page_markdown(text)
    assert "Not run by the tests: no network" in shown
    assert "run with" not in shown
    wrong = next(blocks.blocks("<!-- run with: z -> y -->\n```python\ny = 9\n```\n"))
    with pytest.raises(ValueError, match="'z' is to be changed"):
        wrong.smaller()


def test_the_drawing_of_the_layers_is_that_of_the_imports(monkeypatch):
    assert architecture.upward() == set()
    assert architecture.DRAWING.read_text() == architecture.drawing(), (
        "run python docs/hooks/architecture.py"
    )
    drawn = architecture.owners()
    for package in ("ctrl", "diffusion_envs", "verification"):
        for path in (ROOT / package).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if not module.endswith("__init__"):
                assert architecture.box_of(module, drawn), module
    # turned upside down it is wrong
    monkeypatch.setattr(architecture, "ROWS", architecture.ROWS[::-1])
    assert len(architecture.upward()) > 100


def test_what_a_page_would_fetch_is_seen():
    for fetched in (
        '<script src="https://a.b/c.js">',
        "<img alt=x src=//a.b/c.png>",
        '<link rel="stylesheet" href="https://a.b/c.css">',
        '<link href="https://a.b/f" rel="preconnect">',
        "<style>@import url('https://a.b/c.css')</style>",
    ):
        assert offline.fetched(fetched), fetched
    assert not offline.fetched(
        '<a href="https://a.b">x</a><img src="c.png"><link rel="canonical" href="https://a.b">'
    )


def test_settings_and_assets_name_no_other_place():
    text = (ROOT / "mkdocs.yml").read_text()
    settings = yaml.load(text, Loader=type("Loader", (yaml.BaseLoader,), {}))
    assert settings["theme"]["font"] == "false"
    assert "offline" in settings["plugins"]
    for name in ("extra_css", "extra_javascript"):
        assert not [x for x in settings.get(name, []) if "//" in x]
    assert settings["strict"] == "true"
    assert not [x for x in settings["extra"]["polyfills"] if "//" in x]
    for file in (DOCS / "assets").iterdir():
        outside_of = re.findall(r"https?://(?!www\.w3\.org/)\S+", file.read_text())
        assert not outside_of, file


BUILT = """
site_name: small
strict: true
plugins: [search]
hooks: [{hooks}/claims.py, {hooks}/formulas.py]
markdown_extensions: [{{pymdownx.arithmatex: {{generic: true}}}}]
validation: {{links: {{anchors: warn}}, nav: {{omitted_files: warn}}}}
"""


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("fine, [here](#a) $x^2$\n\n# a\n", None),
        ("[nowhere](nowhere.md)\n", "warnings in strict mode"),
        ("[anchor](#nowhere)\n", "warnings in strict mode"),
        ("<!-- claim: nothing -->\n", "a claim that is not there"),
        ("$\\nosuch$\n", "nosuch"),
    ],
)
def test_a_fault_of_a_page_fails_the_build(page, said, tmp_path: Path, caplog):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Start\n\n" + page)
    file = tmp_path / "mkdocs.yml"
    file.write_text(BUILT.format(hooks=DOCS / "hooks"))
    config = load_config(str(file))
    if said is None:
        build(config)
        assert "<math" in (tmp_path / "site" / "index.html").read_text()
    else:
        with pytest.raises(Abort) as ended:
            build(config)
        assert said in caplog.text + str(ended.value)


def test_the_command_of_make_docs_fails_on_a_broken_link(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Start\n\n[anchor](#nowhere)\n")
    (tmp_path / "mkdocs.yml").write_text(BUILT.format(hooks=DOCS / "hooks"))
    options = re.search(r"-m mkdocs (.*)$", (ROOT / "Makefile").read_text(), re.M)
    command = [sys.executable, "-m", "mkdocs", *options[1].split(), "-f", tmp_path / "mkdocs.yml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "nowhere" in done.stderr
