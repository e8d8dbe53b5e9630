"""What is public is documented, and what pages name is public."""

import dataclasses
import importlib
import inspect
import pydoc
import re

import pytest

from tests.docs.reading import hook, pages

reference = hook("reference")
SHOWN = sorted(
    {
        *reference.modules(),
        *(m for inner in reference.SHARED.values() for m in inner),
        *(
            m
            for p in reference.modules()
            if reference.is_overview(p)
            for m in reference.defining(p)
        ),
    }
)


def missing(module):
    """Public names of a module without a docstring."""
    found = reference.lookup(module)
    if not found.has_docstring:
        yield module
    for name in reference.own_members(module):
        member = found.members[name]
        if (member.is_function or member.is_class) and not member.has_docstring:
            yield member.path
        if member.is_class:
            for inner, part in member.members.items():
                if (
                    not inner.startswith("_")
                    and not part.is_alias
                    and (part.is_function or "property" in part.labels)
                    and not part.has_docstring
                ):
                    yield part.path


@pytest.mark.parametrize("module", SHOWN)
def test_every_public_name_has_a_docstring(module):
    assert not list(missing(module))


@pytest.mark.parametrize("package", [m for m in reference.modules() if reference.is_overview(m)])
def test_what_a_package_exports_is_documented(package):
    for path in [*reference.exported(package), *reference.exported("ctrl")]:
        assert reference.lookup(path).has_docstring, path
        assert path.rpartition(".")[0] in SHOWN, path


def test_names_in_the_reference_can_be_imported():
    for module in SHOWN:
        imported = importlib.import_module(module)
        for name in reference.own_members(module):
            if reference.lookup(f"{module}.{name}").has_docstring:
                assert hasattr(imported, name), f"{module}.{name}"


# Packages that are a folder of modules, each with a page of its own.
WITHOUT_PAGE = {
    f"diffusion_envs.{name}" for name in ("models", "runs", "training", "tiny", "words")
}
# What these pages name is private, or was so when it was written.
OF_THE_INSIDE = ("verification.md", "mutants.md", "CHANGELOG.md")


def test_names_on_pages_lead_to_the_reference():
    named = set()
    for path in pages():
        if path.name in OF_THE_INSIDE:
            continue
        text = re.sub(r"^( *)```.*?^\1```$", "", path.read_text(), flags=re.M | re.S)
        named |= set(re.findall(r"`((?:ctrl|diffusion_envs)(?:\.\w+)+)(?:\([^`]*\))?`", text))
    named = {name for name in named if not name.endswith(".py")} - WITHOUT_PAGE
    assert len(named) > 60
    assert [name for name in sorted(named) if reference.target(name) is None] == []


def classes():
    for module in SHOWN:
        if module.startswith("ctrl"):
            for name in reference.own_members(module):
                if reference.lookup(f"{module}.{name}").is_class:
                    yield f"{module}.{name}"


@pytest.mark.parametrize("path", [*classes()])
def test_help_says_what_a_class_is_before_it_lists_anything(path):
    module, _, name = path.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    assert thing.__doc__, path
    # a dataclass without a docstring gets its own signature for one
    assert not thing.__doc__.startswith(f"{name}("), thing.__doc__
    shown = pydoc.render_doc(thing, renderer=pydoc.plaintext)
    first = inspect.cleandoc(thing.__doc__).splitlines()[0]
    assert first in shown
    if "Methods defined here" in shown:
        assert shown.index(first) < shown.index("Methods defined here")


@pytest.mark.parametrize("path", [*classes()])
def test_what_a_dataclass_holds_is_explained(path):
    module, _, name = path.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    if dataclasses.is_dataclass(thing):
        source = inspect.getsource(thing)
        for field in dataclasses.fields(thing):
            if field.name.startswith("_") or field.name not in inspect.get_annotations(thing):
                continue
            in_words = re.search(rf"\b{field.name}\b", thing.__doc__)
            explained = re.search(rf"^ +{field.name}:? .*", thing.__doc__, re.M)
            commented = re.search(rf"^    {field.name}: .*#", source, re.M)
            assert explained or commented or in_words, field.name
