"""What is built for users: its files, version, size, and that it declares whatever it imports.

``.ci/package`` installs the same wheels into an empty environment and uses them.
"""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import Any, NamedTuple

import hatchling.build
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import ctrl

ROOT = Path(__file__).parent.parent
PACKAGES = ("ctrl", "diffusion_envs", "verification")
COMPANION = ("diffusion_envs/words/weights/", "diffusion_envs/cifar10/weights/")
LARGEST = 15e6  # bytes of a wheel
DECLARED: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = DECLARED["optional-dependencies"]


class Built(NamedTuple):
    """Where the wheels and the source distribution lie."""

    sdist: Path
    wheel: Path  # from the source distribution alone
    models: Path


def listed(*patterns: str) -> set[str]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no clone: nothing tells which files belong to the repository")
    return {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both distributions, made by the hooks that pip and ``python -m build`` call."""
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        sdist = folder / hatchling.build.build_sdist(str(folder))
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        patch.chdir(folder / sdist.name.removesuffix(".tar.gz"))
        wheel = folder / hatchling.build.build_wheel(str(folder))
        patch.chdir(ROOT / "packages" / "models")
        models = folder / hatchling.build.build_wheel(str(folder))
    return Built(sdist, wheel, models)


def files(wheel: Path) -> set[str]:
    """Of a wheel, without its metadata."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def metadata(wheel: Path) -> Any:
    """The headers of a wheel's METADATA."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return HeaderParser().parsestr(archive.read(name).decode())


def test_the_wheel_has_every_file_of_the_packages_and_no_other(built):
    companion = {name for name in listed(*PACKAGES) if name.startswith(COMPANION)}
    assert files(built.wheel) == listed(*PACKAGES) - companion
    assert files(built.models) == companion
    assert {"ctrl/py.typed", "diffusion_envs/py.typed"} <= files(built.wheel)
    assert len(companion) > 10


def test_the_source_distribution_is_the_repository(built):
    with tarfile.open(built.sdist) as archive:
        inside = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert inside - {"PKG-INFO"} == listed()


def test_wheels_are_small_and_bring_their_licence(built):
    for wheel in (built.wheel, built.models):
        assert wheel.stat().st_size < LARGEST, wheel.name
        names = zipfile.ZipFile(wheel).namelist()
        (licence,) = (name for name in names if name.endswith("licenses/LICENSE"))
        assert zipfile.ZipFile(wheel).read(licence) == (ROOT / "LICENSE").read_bytes()
        assert metadata(wheel)["License-Expression"] == "Apache-2.0"


def test_the_version_comes_from_one_place(built):
    assert "version" not in DECLARED
    assert metadata(built.wheel)["Version"] == ctrl.__version__
    assert str(Version(ctrl.__version__)) == ctrl.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ctrl.__version__


def test_the_extra_asks_for_the_models_that_are_here(built):
    (asked,) = (Requirement(one) for one in EXTRAS["models"] if "models" in Requirement(one).name)
    assert asked.name == metadata(built.models)["Name"]
    assert asked.specifier.contains(metadata(built.models)["Version"])


def required(extra: str | None = None) -> set[str]:
    """Names of distributions that are declared, those of the extras within an extra included."""
    names: set[str] = set()
    for one in map(Requirement, EXTRAS[extra] if extra else DECLARED["dependencies"]):
        names |= set().union(*map(required, one.extras)) if one.name == "ctrl-diffusion" else set()
        names.add(normalised(one.name))
    return names


def normalised(name: str) -> str:
    """A distribution's name, however it is written."""
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(source: Path) -> set[str]:
    """Top-level modules that a file imports, at once or later, but not those of Python itself."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - set(PACKAGES)


# Files whose imports are an extra of their own, and say so where it is missing.
OPTIONAL = {
    "ctrl/gym.py": "gym",
    "ctrl/plots.py": "plots",
    "diffusion_envs/rewards/text_in_picture.py": "ocr",
    "diffusion_envs/runs/tracking.py": "wandb",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_whatever_is_imported_is_declared(package):
    extra = {"ctrl": None, "diffusion_envs": "diffusion", "verification": "verification"}[package]
    providers = importlib.metadata.packages_distributions()
    seen = 0
    for source in sorted((ROOT / package).rglob("*.py")):
        name = source.relative_to(ROOT).as_posix()
        declared = required() | (required(extra) if extra else set())
        declared |= required(OPTIONAL[name]) if name in OPTIONAL else set()
        for module in imported(source):
            seen += 1
            by = {normalised(one) for one in providers.get(module, [module])}
            assert by & declared, f"{name} imports {module}, which no requirement brings"
    assert seen > 20


def test_extras_name_extras_that_exist():
    for extra in EXTRAS:
        assert required(extra)
    assert {"diffusion", "models", "gym", "plots", "ocr", "wandb", "verification"} <= set(EXTRAS)


def test_what_is_pinned_is_what_is_declared():
    lines = (ROOT / "constraints.txt").read_text().split()
    pinned = {normalised(one.name): one for one in map(Requirement, lines)}
    for extra in (None, *EXTRAS):
        for one in map(Requirement, EXTRAS[extra] if extra else DECLARED["dependencies"]):
            if normalised(one.name) in pinned:
                (version,) = (part.version for part in pinned[normalised(one.name)].specifier)
                assert one.specifier.contains(version), f"{one} but {version} in constraints.txt"
            else:  # ours, and what is a service of others
                assert one.name in {"ctrl-diffusion", "ctrl-diffusion-models", "wandb"}, one


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Keyword and arguments of each instruction, continued lines joined, comments left out."""
    lines = [one for one in dockerfile.read_text().splitlines() if not re.match(r"\s*#", one)]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(one.split()[0], one.partition(" ")[2].strip()) for one in text.split("\n") if one]


KNOWN = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "ENTRYPOINT", "CMD", "LABEL"}


@pytest.mark.parametrize("place", ["Dockerfile", ".devcontainer/Dockerfile"])
def test_images_are_of_a_named_python_and_of_files_that_exist(place):
    found = instructions(ROOT / place)
    assert {keyword for keyword, _ in found} <= KNOWN
    for keyword, rest in found:
        if keyword == "FROM":
            assert re.fullmatch(r"python:3\.\d+-(slim-)?bookworm( AS \w+)?", rest), rest
            assert Version(rest[7:11].rstrip("-")) in SpecifierSet(DECLARED["requires-python"])
        if keyword == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
        if keyword in {"ENTRYPOINT", "CMD"}:
            assert all(isinstance(part, str) for part in json.loads(rest))
        if keyword == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists" in rest
    assert [rest for keyword, rest in found if keyword == "USER"][-1] not in {"root", "0"}


def test_images_pass_their_linter():
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("hadolint has no wheel for this machine")
    places = [str(ROOT / "Dockerfile"), str(ROOT / ".devcontainer" / "Dockerfile")]
    done = subprocess.run([str(linter), *places], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_the_development_container_builds_the_file_beside_it():
    folder = ROOT / ".devcontainer"
    settings = json.loads((folder / "devcontainer.json").read_text())
    assert (folder / settings["build"]["dockerfile"]).is_file()
    assert (folder / settings["build"]["context"]).resolve() == ROOT
    target = settings["postCreateCommand"].removeprefix("make ")
    assert f"{target.replace('.venv', '$(VENV)')}:" in (ROOT / "Makefile").read_text()
