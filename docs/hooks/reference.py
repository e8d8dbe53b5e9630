"""The API reference: which modules are public, and a page for each of them.

The pages themselves are written by mkdocstrings from the docstrings; this file says what there is
and makes the overviews.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from posixpath import relpath

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Group:
    """Modules under one heading of the navigation.

    Attributes:
        title: of the group.
        words: what it is for, in a sentence.
        modules: dotted names; each has a page.
    """

    title: str
    words: str
    modules: tuple[str, ...]


def _of(package: str, names: str) -> tuple[str, ...]:
    return tuple(f"{package}.{name}" for name in names.split())


GROUPS = (
    Group(
        "ctrl: problems and paths",
        "Problems, policies and paths: what is controlled, by what, and how it is sampled.",
        _of(
            "ctrl",
            "sde problem policy squashed_policy memory exploration jumps regimes stopping noise "
            "paths returns simulate solvers torchsde_solver estimate recorded",
        ),
    ),
    Group(
        "ctrl: theorems on paths",
        "One number a path, for the caller to average: likelihoods, gradients, losses.",
        _of(
            "ctrl",
            "girsanov transitions value martingale q_learning policy_gradient trust_region "
            "advantages off_policy adjoint_matching risk_sensitive phibe",
        ),
    ),
    Group(
        "ctrl: exact answers",
        "Answers without samples: linear-quadratic problems, finite chains, grids.",
        ("ctrl.linear", *_of("ctrl", "hjb chains mean_field")),
    ),
    Group(
        "ctrl: ready to use",
        "Loops that learn, problems with known answers, gymnasium, pictures.",
        ("ctrl.agents", *_of("ctrl", "problems pendulum gym plots")),
    ),
    Group(
        "diffusion_envs: fine-tuning",
        "From prompts and a reward to a policy, a report and files that others load.",
        _of(
            "diffusion_envs",
            "sd15 cifar10 objectives rewards samplers exact frontier preferences",
        ),
    ),
    Group(
        "diffusion_envs: runs",
        "What a run is told, what it does around its updates, and what it leaves behind.",
        _of(
            "diffusion_envs.runs",
            "finetune options early_stopping callbacks summary presets publishing transfer "
            "estimate evaluation over_optimisation human_choices fit refused repeating",
        ),
    ),
    Group(
        "diffusion_envs: training and models",
        "The environment, the networks as policies, the trainer and its optimisers.",
        (
            *_of("diffusion_envs", "environment rollout denoising noise_schedules prompt"),
            *_of(
                "diffusion_envs.models",
                "protocol trainable adapters stable_diffusion stable_diffusion_xl "
                "text_to_image_unet unconditional_unet guidance_schedule exact exports",
            ),
            *_of("diffusion_envs.training", "trainer update_size optimisers path_metric critic"),
        ),
    ),
    Group(
        "Inner parts",
        "What the pages speak of and nobody has to call.",
        (
            *_of("ctrl", "bellman markov_chain wide_stencil counter_normals reused_memory"),
            *_of("diffusion_envs", "training.value_network digests whole_files"),
        ),
    ),
    Group(
        "verification",
        "What a claim is, how its mistakes are planted, and where tolerances come from.",
        _of("verification", "claim planting tolerances statistics running"),
    ),
)

# Further modules whose names stand on the page of their package.
SHARED: dict[str, tuple[str, ...]] = {
    "diffusion_envs.exact": _of("diffusion_envs.exact", "gaussian linear_policy"),
    "ctrl.linear": _of("ctrl.linear", "lq riccati lyapunov gaussian kl_control"),
    "ctrl.agents": _of(
        "ctrl.agents",
        "actor_critic online q_learning cppo policy_evaluation policy_iteration descent",
    ),
}


def modules() -> list[str]:
    """Every module of the reference."""
    return [module for group in GROUPS for module in group.modules]


def page_of(module: str) -> str:
    """The address of a module's page."""
    return f"reference/{module.replace('.', '/')}.md"


@cache
def packages() -> dict[str, griffe.Module]:
    """The three packages, read but not imported."""
    loader = griffe.GriffeLoader(search_paths=[ROOT])
    read = {name: loader.load(name) for name in ("ctrl", "diffusion_envs", "verification")}
    loader.resolve_aliases(implicit=False, external=False)
    return read  # pyright: ignore[reportReturnType]  # packages are modules


def lookup(name: str) -> griffe.Object | griffe.Alias:
    """The object with this dotted name.

    Raises:
        KeyError: there is none.
    """
    package, _, rest = name.partition(".")
    found = packages()[package]
    return found[rest] if rest else found


def first_line(thing: griffe.Object | griffe.Alias) -> str:
    """What its docstring says in its first sentence."""
    text = thing.docstring.value if thing.docstring else ""
    return text.split("\n\n")[0].replace("\n", " ").replace("|", "\\|").strip()


def defined_at(thing: griffe.Object | griffe.Alias) -> str:
    """The dotted name under which it is defined, wherever it was imported from."""
    return thing.target_path if isinstance(thing, griffe.Alias) else thing.path


def exported(package: str) -> list[str]:
    """Where the names that a package re-exports are defined, submodules left out."""
    module = lookup(package)
    names = []
    for name in module.exports or []:
        member = module.members.get(str(name))
        if member is not None and defined_at(member) not in modules() and not member.is_module:
            names.append(defined_at(member))
    return names


def defining(package: str) -> list[str]:
    """Modules that define what a package re-exports, in the order of its imports."""
    seen: dict[str, None] = {}
    for path in exported(package):
        seen.setdefault(path.rpartition(".")[0])
    seen.pop(package, None)
    return [*seen]


def is_overview(module: str) -> bool:
    """Whether a module is a package, whose page has all that it re-exports."""
    return (ROOT / module.replace(".", "/")).is_dir()


def own_members(module: str) -> list[str]:
    """Public names that a module defines itself."""
    return [
        name
        for name, member in lookup(module).members.items()
        if not name.startswith("_") and not member.is_alias and not member.is_module
    ]


def page(module: str) -> str:
    """The Markdown of a module's page."""
    if not is_overview(module):
        return f"::: {module}\n"
    names = exported(module)
    lines = [
        f"# {module} {{ #{module} }}",
        "",
        first_line(lookup(module)),
        "",
        "| | |",
        "| --- | --- |",
    ]
    for path in sorted(names, key=lambda p: p.rpartition(".")[2].lower()):
        name = path.rpartition(".")[2]
        lines.append(f"| [`{name}`][{path}] | {first_line(lookup(path))} |")
    lines.append("")
    for name in own_members(module):
        if lookup(f"{module}.{name}").has_docstring:
            lines += _of_package(f"{module}.{name}")
    for inner in sorted({*defining(module), *SHARED.get(module, ())}):
        if inner in modules():
            continue
        lines += _of_package(inner)
    return "\n".join(lines)


def _of_package(name: str) -> list[str]:
    return [f"::: {name}", "    options:", "      heading_level: 2", ""]


def overview() -> str:
    """The reference's first page: every module with its first line, and the names of ``ctrl``."""
    lines = [
        "# Reference",
        "",
        "Made from the docstrings. Shapes stand in the annotations: "
        '`Float[Tensor, "paths steps *event"]` is a tensor with one row a path, one entry a step '
        "and the axes of a state. Functions return one value a path; their mean and standard error "
        "are `ctrl.Estimate.of(values)`.",
        "",
    ]
    for group in GROUPS:
        lines += [f"## {group.title}", "", group.words, "", "| | |", "| --- | --- |"]
        for module in group.modules:
            there = relpath(page_of(module), "reference")
            lines.append(f"| [`{module}`]({there}) | {first_line(lookup(module))} |")
        lines.append("")
    lines += ["## Names of `ctrl` itself", "", "| | |", "| --- | --- |"]
    for path in sorted(exported("ctrl"), key=lambda p: p.rpartition(".")[2].lower()):
        name = path.rpartition(".")[2]
        lines.append(f"| [`ctrl.{name}`][{path}] | {first_line(lookup(path))} |")
    return "\n".join([*lines, ""])


def navigation() -> list[dict[str, list[dict[str, str]]]]:
    """The part of the navigation that leads to the modules."""
    return [
        {group.title: [{module: page_of(module)} for module in group.modules]} for group in GROUPS
    ]


@cache
def linkable() -> dict[str, str]:
    """Names that pages use -> names under which the reference has them."""
    known: dict[str, str] = {}
    shown = {m for module in modules() for m in (module, *SHARED.get(module, ()))}
    shown |= {inner for m in modules() if is_overview(m) for inner in defining(m)}
    for module in sorted(shown):
        if module in modules():
            known[module] = module
        for name in own_members(module):
            path = f"{module}.{name}"
            if lookup(path).has_docstring or lookup(path).has_docstrings:
                known[path] = path
            if lookup(path).is_class:
                for inner, member in lookup(path).members.items():
                    if not inner.startswith("_") and member.has_docstring:
                        known[f"{path}.{inner}"] = f"{path}.{inner}"
    for package in modules():
        if is_overview(package):
            for inner in {*defining(package), *SHARED.get(package, ())}:
                known.setdefault(inner, package)
    for package in ("ctrl", *(m for m in modules() if is_overview(m))):
        for path in exported(package):
            for full in [p for p in known if p == path or p.startswith(path + ".")]:
                short = f"{package}.{path.rpartition('.')[2]}{full.removeprefix(path)}"
                known.setdefault(short, known[full])
    for name, path in [*known.items()]:
        if name.startswith("diffusion_envs."):
            known.setdefault(name.removeprefix("diffusion_envs."), path)
    return known


@cache
def target(name: str) -> str | None:
    """Where the reference explains a dotted name: at the name, or at the class that has it."""
    known = linkable()
    if name in known:
        return known[name]
    try:
        thing = lookup(name)
    except (KeyError, griffe.AliasResolutionError):
        thing = None
    if thing is not None and defined_at(thing) in known:
        return known[defined_at(thing)]
    parent = name.rpartition(".")[0]
    is_attribute = parent in known and lookup(known[parent]).is_class
    return known[parent] if is_attribute and "._" not in name else None


_IN_DOCSTRING = re.compile(r"(?<![\[`])(`{1,2})(\w+(?:\.\w+)*)(\([^`]*\))?\1(?![`\]])")


def linked_docstring(text: str, path: str, module: str) -> str:
    """A docstring whose names, dotted or capitalised, lead to the reference.

    Args:
        text: of the docstring.
        path: of what it documents, which is not linked to itself.
        module: that this stands in, whose names need no dots.
    """
    package = module.partition(".")[0]

    def link(match: re.Match[str]) -> str:
        name = match[2]
        if "." not in name and not name[0].isupper():
            return match.group()
        for prefix in ("", f"{module}.", f"{package}.", "ctrl."):
            there = target(prefix + name)
            if there is not None and there != path:
                return f"[{match.group()}][{there}]"
        return match.group()

    lines = text.split("\n")  # code and sections that are indented by four blanks are code
    return "\n".join(
        line if line.lstrip().startswith(">>>") else _IN_DOCSTRING.sub(link, line) for line in lines
    )


_NAME = re.compile(r"(?<![\[`])`((?:\w+\.)+\w+)(\([^`]*\))?`(?![`\]])")
_FENCED = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.M | re.S)


def linked(text: str) -> str:
    """Markdown in which dotted names in backticks lead to the reference."""

    def link(match: re.Match[str]) -> str:
        path = target(match[1])
        return match.group() if path is None else f"[{match.group()}][{path}]"

    parts, at = [], 0
    for code in _FENCED.finditer(text):
        parts += [_headings_kept(text[at : code.start()], link), code.group()]
        at = code.end()
    return "".join([*parts, _headings_kept(text[at:], link)])


def _headings_kept(text: str, link: Callable[[re.Match[str]], str]) -> str:
    lines = text.split("\n")
    return "\n".join(x if x.startswith("#") else _NAME.sub(link, x) for x in lines)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the reference."""
    files.append(File.generated(config, "reference/index.md", content=overview()))
    for module in modules():
        files.append(File.generated(config, page_of(module), content=page(module)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Link names in backticks to the reference."""
    if page.file.src_uri.startswith("reference/"):
        page.meta["search"] = {"boost": 2}
    if page.file.src_uri.startswith(("source/", "examples/")):
        return markdown
    return linked(markdown)
