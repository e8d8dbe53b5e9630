"""What contributors are told is so: files exist, templates are forms, hooks are the tools of CI."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FOLDERS = ("ctrl", "diffusion_envs", "verification", "tests", "benchmarks", "docs", "examples")
KINDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def test_there_is_a_form_for_each_kind_of_issue():
    assert {form.stem for form in FORMS} == {"bug", "mathematics", "feature", "config"}


@pytest.mark.parametrize("form", [f for f in FORMS if f.stem != "config"], ids=lambda f: f.stem)
def test_forms_of_issues_are_what_github_reads(form):
    read = yaml.safe_load(form.read_text())
    assert read.keys() == {"name", "description", "labels", "body"}
    names = [field["id"] for field in read["body"]]
    assert len(set(names)) == len(names)
    for field in read["body"]:
        assert field["type"] in KINDS
        assert field["attributes"]["label"]
        assert field.keys() <= {"type", "id", "attributes", "validations"}
    assert any(field.get("validations", {}).get("required") for field in read["body"])


def test_hooks_before_a_commit_download_nothing_and_call_tools_that_are_there():
    read = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in read["repos"] for hook in repository["hooks"]]
    assert {repository["repo"] for repository in read["repos"]} == {"local"}
    assert {hook["id"] for hook in hooks} == {"ruff-format", "ruff-check", "pyright"}
    for hook in hooks:
        assert hook["language"] == "system"
        beside_python = Path(sys.executable).parent / hook["entry"].split()[0]
        assert beside_python.exists() or shutil.which(hook["entry"].split()[0])
        re.compile(hook.get("files", ""))


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "AGENTS.md"])
def test_files_that_contributors_are_sent_to_exist(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|md|txt))`", text):
        named = [ROOT / name]
        if "/" not in name:
            named += [path for folder in FOLDERS for path in (ROOT / folder).rglob(name)]
        if name in ("utils.py", "my_rewards.py"):  # what is not to be, and the reader's own
            continue
        assert any(path.exists() for path in named), name


def test_contributing_has_a_section_for_each_thing_that_is_added():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    things = ("theorem", "claim", "method", "model family", "reward", "sampler")
    assert [s for s in sections if s.startswith("A ")] == [f"A {thing}" for thing in things]


def test_the_page_for_agents_is_one_page():
    assert len((ROOT / "AGENTS.md").read_text().splitlines()) < 60
