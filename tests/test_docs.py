"""Names and files that the documents mention exist, and the README's first example runs."""

import importlib
import re
from pathlib import Path

import pytest
from pymdownx.slugs import slugify

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FRAGMENTS = ROOT / "docs" / "figures"  # which figures.md is put together from


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_in_backticks_exist(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    names = re.findall(r"`((?:ctrl|diffusion_envs|verification)(?:\.\w+)+)(?:\(.*?\))?`", text)
    for name in names:
        if not name.endswith(".py"):
            resolved(name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_test_files_exist(document):
    text = document.read_text()
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        if document.parent == FRAGMENTS or "reference/" in target:
            continue  # pages that `make docs` makes, and holds to exist
        assert (document.parent / target).exists(), target
    for name in re.findall(r"`(tests/[\w/]+\.py)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"[(`](test_\w+\.py)", text):
        assert list((ROOT / "tests").rglob(name)), name


def headings(text):
    """The addresses of a page's headings, as the site and GitHub make them."""
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    plain = [re.sub(r"\[(.*?)\]\(.*?\)|`", r"\1", title) for title in titles]
    return {slugify(case="lower")(title, "-") for title in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_to_a_part_of_a_page_lead_to_a_heading(document):
    text = re.sub(r"^( *)```.*?^\1```$", "", document.read_text(), flags=re.M | re.S)
    for target, part in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
        page = document.parent / target if target else document
        if page.suffix == ".md" and "reference/" not in target and document.parent != FRAGMENTS:
            assert part in headings(page.read_text()), f"{target}#{part}"


def test_the_first_example_of_the_readme_runs(capsys):
    source = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    exec(compile(source, "README.md", "exec"), {})  # our own text
    printed = capsys.readouterr().out
    assert re.match(r"path KL 1\.6\d+\(\d+\)  reward -0\.9\d+\(\d+\)", printed), printed


def test_the_document_of_claims_has_every_claim_and_no_other():
    from verification.claims import CLAIMS

    text = (ROOT / "docs" / "verification.md").read_text()
    assert re.findall(r"^### (\S+)$", text, re.MULTILINE) == list(CLAIMS)
    assert "do not hold" not in text
    assert "does not hold" not in text


def test_claims_that_the_list_of_theorems_names_exist():
    from verification.claims import CLAIMS

    text = (ROOT / "docs" / "theorems.md").read_text()
    named = set()
    for line in text.splitlines():
        if line.startswith("| ") and line.count("|") == 4:
            named |= set(re.findall(r"`([a-z]+(?:-[a-z]+)+|tilt|tweedie)`", line.split("|")[3]))
    assert len(named) > 40
    assert not named - set(CLAIMS)


def test_the_method_that_the_document_adds_improves_a_policy():
    import dataclasses

    from accelerate import Accelerator

    from diffusion_envs.exact import GaussianProblem, table
    from diffusion_envs.samplers import DDIM
    from diffusion_envs.training.trainer import Trainer
    from diffusion_envs.training.update_size import UpdateSize

    source = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "methods.md").read_text(), re.S)
    names = {"__name__": "added"}
    exec(compile(source[0], "methods.md", "exec", dont_inherit=True), names)  # our own text
    problem, sampler = GaussianProblem(), DDIM(eta=1.0).bind(table(), 8)
    environment = problem.environment(sampler, seed=0)
    objective = dataclasses.replace(
        names["Reinforce"](), kl_weight=problem.kl_weight, learning_rate=0.01
    )
    trainer = Trainer(
        environment,
        objective,
        UpdateSize(samples=128, batch=10_000, weight_decay=0.0),
        accelerator=Accelerator(cpu=True),
    )
    before = problem.evaluate(environment.model, sampler).objective
    for _ in trainer.updates(25):
        pass
    after = problem.evaluate(environment.model, sampler).objective
    best = problem.optimum(sampler).objective
    assert after - before > 0.3 * (best - before)


def test_every_objective_is_in_the_document_of_methods():
    from diffusion_envs import objectives

    text = (ROOT / "docs" / "methods.md").read_text()
    kinds = {"PathObjective", "NoisedObjective", "BackpropObjective", "Objective"}
    for name in objectives.__all__:
        made = getattr(objectives, name)
        if isinstance(made, type) and issubclass(made, objectives.Objective):
            assert name in kinds or f"`{name}`" in text, name


def test_every_capability_of_the_table_has_the_test_that_it_names():
    text = (ROOT / "docs" / "capabilities.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "tests/" in line]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
        assert named, row
        for file, name in named:
            assert f"def {name}(" in (ROOT / file).read_text(), row
