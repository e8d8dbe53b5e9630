"""All small mistakes in a module: its mutants.

The mistakes are mutmut's own (an operator, a number, an argument, a constant, a branch), and
swaps of a formula's functions (a mean for a sum). Left alone, since no answer depends on them:
docstrings, annotations, decorators, imports, assertions, protocols, f-strings, whatever is raised
and what a refusing branch computes for its message (not its condition), the names that checks are
given for their messages, ``strict=`` of zip, and ``device=``, which only a GPU sees.
Outside of functions only numbers and truth values change. A string changes once, not in its case.
"""

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string

ROOT = Path(__file__).parents[2]

MODULES = """
ctrl.girsanov ctrl.martingale ctrl.q_learning ctrl.policy_gradient ctrl.trust_region ctrl.value
ctrl.advantages ctrl.transitions ctrl.exploration ctrl.policy ctrl.solvers ctrl.paths
ctrl.linear.gaussian ctrl.linear.kl_control ctrl.linear.lq ctrl.linear.riccati
ctrl.agents.actor_critic ctrl.agents.cppo ctrl.agents.descent ctrl.agents.online
ctrl.agents.policy_evaluation ctrl.agents.policy_iteration ctrl.agents.q_learning
diffusion_envs.noise_schedules diffusion_envs.denoising diffusion_envs.exact.gaussian
diffusion_envs.exact.linear_policy diffusion_envs.samplers.gaussian_steps
diffusion_envs.samplers.ddim diffusion_envs.samplers.flow_sde
diffusion_envs.samplers.diffusers_scheduler diffusion_envs.training.value_network
diffusion_envs.objectives.score_as_action diffusion_envs.objectives.path_steps
diffusion_envs.objectives.noised_data diffusion_envs.objectives.last_steps
diffusion_envs.environment diffusion_envs.rollout diffusion_envs.models.exact
diffusion_envs.models.adapters diffusion_envs.models.noise_table
diffusion_envs.models.text_to_image_unet diffusion_envs.models.unconditional_unet
diffusion_envs.training.trainer diffusion_envs.training.critic
diffusion_envs.training.requirements diffusion_envs.training.kl_controller
diffusion_envs.training.parallel diffusion_envs.runs.callbacks diffusion_envs.runs.evaluation
diffusion_envs.runs.monitoring diffusion_envs.runs.resuming diffusion_envs.runs.early_stopping
diffusion_envs.runs.over_optimisation diffusion_envs.runs.distances diffusion_envs.runs.summary
verification.statistics
""".split()  # noqa: SIM905  # a list literal of fifty strings reads worse

SWAPS = {
    "sum": "mean",
    "mean": "sum",
    "amax": "amin",
    "amin": "amax",
    "max": "min",
    "min": "max",
    "maximum": "minimum",
    "minimum": "maximum",
    "all": "any",
    "any": "all",
    "square": "abs",
    "abs": "square",
    "sin": "cos",
    "cos": "sin",
    "exp": "expm1",
    "expm1": "exp",
    "log": "log1p",
    "log1p": "log",
    "sqrt": "square",
    "triu": "tril",
    "tril": "triu",
    "detach": "clone",
}
"""A method or function of torch or math, and the one that takes its place."""


NAMED = {
    "all_finite": 0,
    "one_a_path": 0,
    "require_symmetric": 0,
    "_require_finite": 0,
    "require_calculus": 1,
    "require_concave": 2,
    "_require_decay": 2,
}
"""Checks, and the place of the argument that is only words of their message."""


@dataclass(frozen=True)
class Mutant:
    """A module with one small mistake.

    Attributes:
        module: its name.
        function: the qualified name of where the mistake is; empty outside of any.
        lines: first and last of its statement, then of its function; counted from 1.
        diff: the lines that changed, before and after.
        number: counts equal changes in one function.
        source: of the whole module, with the mistake.
    """

    module: str
    function: str
    lines: tuple[tuple[int, int], ...]
    diff: str
    number: int
    source: str

    @property
    def key(self) -> str:
        """A name that edits elsewhere do not change."""
        digest = hashlib.sha256(f"{self.diff}|{self.number}".encode()).hexdigest()[:8]
        return f"{self.function or 'module'} {digest}"


def path_of(module: str) -> Path:
    """The file of a module."""
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def mutants(name: str, source: str) -> list[Mutant]:
    """Every mutant of a module that compiles and differs from it, each once."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    module = wrapper.module
    visitor = _Visitor(module)
    wrapper.visit(visitor)
    pieces = [module.code_for_node(statement) for statement in module.body]
    begin = source[: source.index(pieces[0])] if pieces else ""
    assert source.startswith(begin + "".join(pieces))
    end = source[len(begin) + sum(map(len, pieces)) :]
    seen = {_meaning(piece) for piece in pieces}
    counts: Counter[tuple[str, str]] = Counter()
    collected = []
    for change in visitor.changes:
        statement = module.body[change.place].deep_replace(change.before, change.after)
        piece = module.code_for_node(statement)  # type: ignore[arg-type]  # a replaced node is typed as any node
        meaning = _meaning(piece)
        if not meaning or meaning in seen:
            continue
        seen.add(meaning)
        before, after = pieces[: change.place], pieces[change.place + 1 :]
        mutated = "".join([begin, *before, piece, *after, end])
        diff = difference(source, mutated)
        counts[change.function, diff] += 1
        number = counts[change.function, diff]
        collected.append(Mutant(name, change.function, change.lines, diff, number, mutated))
    return collected


def _meaning(code: str) -> str:
    """The syntax tree; empty where there is none."""
    try:
        return ast.dump(ast.parse(code))
    except SyntaxError:
        return ""


def difference(before: str, after: str) -> str:
    """The lines that differ, joined: "before -> after"."""
    old, new = before.splitlines(), after.splitlines()
    while old and new and old[0] == new[0]:
        del old[0], new[0]
    while old and new and old[-1] == new[-1]:
        del old[-1], new[-1]
    return " -> ".join(" ".join(" ".join(lines).split()) for lines in (old, new))


@dataclass(frozen=True)
class _Change:
    place: int  # of the statement, in the module's body
    before: cst.CSTNode
    after: cst.CSTNode
    function: str
    lines: tuple[tuple[int, int], ...]


class _Visitor(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, module: cst.Module) -> None:
        self._places = {id(statement): i for i, statement in enumerate(module.body)}
        self._place = -1
        self.changes: list[_Change] = []
        self._names: list[str] = []
        self._ranges: list[tuple[int, int]] = []  # of classes and functions, and of a statement
        self._functions = 0
        self._refusals: set[cst.CSTNode] = set()

    def on_visit(self, node: cst.CSTNode) -> bool:
        self._place = self._places.get(id(node), self._place)
        if node in self._refusals or _never(node):
            return False
        if isinstance(node, cst.Call) and (words := _words(node)):
            self._refusals.add(words)
        if isinstance(node, cst.If) and _raises(node.body):
            self._refusals.add(node.body)
        if isinstance(node, cst.FunctionDef | cst.ClassDef | cst.SimpleStatementLine):
            self._ranges.append(self._range(node))
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._names.append(node.name.value)
            self._functions += isinstance(node, cst.FunctionDef)
        elif not m.matches(node, m.Call(func=m.Name("len") | m.Name("isinstance"))):
            for after in _changed(node, in_function=self._functions > 0):
                lines = (self._range(node), *reversed(self._ranges))
                self.changes.append(_Change(self._place, node, after, ".".join(self._names), lines))
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if _never(original_node):
            return
        if isinstance(original_node, cst.FunctionDef | cst.ClassDef | cst.SimpleStatementLine):
            self._ranges.pop()
        if isinstance(original_node, cst.FunctionDef | cst.ClassDef):
            self._names.pop()
            self._functions -= isinstance(original_node, cst.FunctionDef)

    def _range(self, node: cst.CSTNode) -> tuple[int, int]:
        place = self.get_metadata(PositionProvider, node, None)
        return (place.start.line, place.end.line) if place else (0, 0)


def _never(node: cst.CSTNode) -> bool:
    """Whether nothing in a node may change."""
    if isinstance(node, cst.SimpleStatementLine):
        return m.matches(node.body[0], m.Expr(m.SimpleString() | m.ConcatenatedString()))
    if isinstance(node, cst.ClassDef):
        return any(m.matches(base.value, m.Name("Protocol")) for base in node.bases)
    if isinstance(node, cst.Arg):
        return node.keyword is not None and node.keyword.value in ("strict", "device")
    return isinstance(
        node,
        cst.Annotation
        | cst.Decorator
        | cst.Import
        | cst.ImportFrom
        | cst.Assert
        | cst.Raise
        | cst.FormattedString
        | cst.ConcatenatedString,
    )


def _raises(body: cst.BaseSuite) -> bool:
    last = body.body[-1]
    return isinstance(last, cst.SimpleStatementLine) and isinstance(last.body[-1], cst.Raise)


def _changed(node: cst.CSTNode, *, in_function: bool) -> Iterator[cst.CSTNode]:
    """Mutations of one node."""
    if not in_function and not isinstance(node, cst.BaseNumber | cst.Name):
        return
    for kind, operator in mutation_operators:
        if isinstance(node, kind):
            for count, after in enumerate(operator(node)):
                if operator is operator_string and count:
                    break
                both = isinstance(node, cst.Call) and isinstance(after, cst.Call)
                if both and _left_alone(after) != _left_alone(node):
                    continue
                yield after
    if m.matches(node, m.Call(func=m.Attribute() | m.Name())):
        assert isinstance(node, cst.Call)
        name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
        assert isinstance(name, cst.Name)
        if name.value in SWAPS:
            yield node.with_deep_changes(name, value=SWAPS[name.value])


def _left_alone(call: cst.CSTNode) -> list[cst.Arg]:
    """The arguments of a call that must stay."""
    assert isinstance(call, cst.Call)
    words = _words(call)
    return [arg for arg in call.args if _never(arg) or arg is words]


def _words(call: cst.Call) -> cst.Arg | None:
    """The argument of a check that its message alone needs."""
    name = call.func.attr if isinstance(call.func, cst.Attribute) else call.func
    place = NAMED.get(name.value) if isinstance(name, cst.Name) else None
    return call.args[place] if place is not None and place < len(call.args) else None
