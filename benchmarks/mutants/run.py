"""Run the tests against every mutant, each in a process of its own.

One session of pytest imports and collects everything once. Each test file is run once under
coverage, to learn which of its tests reach which line. Then, for every mutant, a fork of that
session gives the mutated functions their new code, runs the tests that reach the changed lines,
those that killed its neighbours first, and stops at the first that fails. Nothing is written but
the results: there is never a mutated file.
"""

import ast
import functools
import hashlib
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coverage
import pytest

from benchmarks.mutants.mutate import MODULES, ROOT, Mutant, mutants, path_of
from benchmarks.mutants.report import read

TESTS = (
    "tests/ctrl",
    *(f"tests/diffusion_envs/{path.name}" for path in (ROOT / "tests/diffusion_envs").glob("*.py")),
    "tests/diffusion_envs/objectives",
    "tests/diffusion_envs/training",
    "tests/diffusion_envs/samplers",
    "tests/diffusion_envs/exact",
    "tests/diffusion_envs/models",
    "tests/diffusion_envs/runs",
    "tests/diffusion_envs/sd15",
    "tests/verification/test_statistics.py",
)
_SETTINGS = "_hypothesis_internal_use_settings"  # where hypothesis keeps a test's own
MEMORY = 8 * 2**30  # bytes a mutant may take beside what was there before


@dataclass(eq=False)  # pytest puts plugins into sets
class Session:
    """A plugin of pytest that takes the place of its loop over tests.

    Attributes:
        modules: to mutate.
        folder: where results are kept; what is there is not done again.
        budget: seconds of other modules' tests that a mutant must survive, and three times as many
            of its own module's.
    """

    modules: Sequence[str]
    folder: Path
    budget: float
    _failure: str = field(default="", init=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[None]:
        """Remember what a test failed with."""
        report = yield
        if report.failed:
            claims = (AssertionError, pytest.fail.Exception)
            kind = call.excinfo.type
            self._failure = "assertion" if issubclass(kind, claims) else kind.__name__
        return report

    def _fails(self, item: Any, following: Any) -> str:
        """Run one test; what it failed with, if it did."""
        self._failure = ""
        item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
        return self._failure

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        """Trace, then mutate."""
        if session.testsfailed:
            raise session.Interrupted("tests cannot be collected")
        items = {item.nodeid: item for item in session.items}
        for item in session.items:
            if settings := getattr(item.obj, _SETTINGS, None):
                setattr(item.obj, _SETTINGS, _hasty(settings))
        reach = self._trace(items)
        for module in self.modules:
            self._module(module, items, reach)
        return True

    def _trace(self, items: dict[str, Any]) -> "Reach":
        """Which tests reach which lines, and how long they take; kept from one run to the next."""
        store = self.folder / "coverage.json"
        known = json.loads(store.read_text()) if store.exists() else {}
        watched = [path_of(name) for name in sorted({*MODULES, *self.modules})]
        sources = _digest(*(path for path in watched if path.exists()))
        reach = Reach()
        files: dict[str, list[Any]] = {}
        for nodeid, item in items.items():
            files.setdefault(nodeid.split("::")[0], []).append(item)
        for name, mine in files.items():
            key = _digest(ROOT / name) + sources
            if known.get(name, {}).get("key") != key:
                print(f"tracing {name}", flush=True)
                answer = fork(functools.partial(self._traced, mine), seconds=1800)
                if "lines" not in answer:
                    raise RuntimeError(f"cannot trace {name}: {answer}")
                known[name] = {"key": key, **answer}
                store.write_text(json.dumps(known))
            reach.add(known[name])
        if reach.failed:
            print("do not pass unmutated, so not counted:", *sorted(reach.failed), sep="\n  ")
        return reach

    def _traced(self, items: list[Any]) -> dict[str, Any]:
        """Run tests under coverage."""
        watched = [str(path_of(module)) for module in {*MODULES, *self.modules}]
        cover = coverage.Coverage(data_file=None, include=watched, config_file=False)
        cover.set_option("run:disable_warnings", ["no-data-collected"])
        seconds, failed = {}, []
        cover.start()
        for item, following in zip(items, [*items[1:], None], strict=True):
            cover.switch_context(item.nodeid)
            start = time.process_time()
            if self._fails(item, following):
                failed.append(item.nodeid)
            seconds[item.nodeid] = time.process_time() - start
        cover.stop()
        data = cover.get_data()
        lines: dict[str, dict[int, list[str]]] = {}
        for path in data.measured_files():
            contexts_of = data.contexts_by_lineno(path)
            lines[str(Path(path).relative_to(ROOT))] = {
                line: sorted(set(contexts) - {""}) for line, contexts in contexts_of.items()
            }
        return {"lines": lines, "seconds": seconds, "failed": failed}

    def _module(self, name: str, items: dict[str, Any], reach: "Reach") -> None:
        path = path_of(name)
        source = path.read_text()
        results = Results(self.folder, name, source, self.budget)
        module = importlib.import_module(name)
        assert module.__file__ == str(path), f"{module.__file__} is not {path}"
        every = mutants(name, source)
        results.expect(every)
        todo = [each for each in every if not results.has(each)]
        killers: dict[str, list[str]] = {}
        start, last = time.time(), 0.0
        for count, mutant in enumerate(todo, 1):
            recent = killers.setdefault(mutant.function, [])
            tests = reach.tests(mutant, recent, self.budget)
            result = self._try(mutant, module, [items[test] for test in tests], reach)
            results.add(mutant, result)
            if test := result.get("test"):
                recent[:] = [test, *(each for each in recent if each != test)][:4]
            if time.time() - last > 30 or count == len(todo):
                last = time.time()
                print(f"{name}: {count} of {len(todo)} in {last - start:.0f} s", flush=True)

    def _try(
        self, mutant: Mutant, module: types.ModuleType, tests: list[Any], reach: "Reach"
    ) -> dict[str, Any]:
        start = time.time()

        def attempt() -> dict[str, Any]:
            try:
                fresh = executed(mutant.source, module)
            except Exception as error:  # it cannot even be imported
                return {"verdict": "killed", "by": type(error).__name__, "test": ""}
            if not transplant(fresh, module):
                return {"verdict": "not applied"}
            for item, following in zip(tests, [*tests[1:], None], strict=True):
                signal.setitimer(signal.ITIMER_PROF, 1 + 5 * reach.seconds[item.nodeid])
                if failure := self._fails(item, following):
                    return {"verdict": "killed", "by": failure, "test": item.nodeid}
            return {"verdict": "survived"}

        total = sum(reach.seconds[item.nodeid] for item in tests)
        result = fork(attempt, seconds=120 + 20 * total) if tests else {"verdict": "untested"}
        if "error" in result:
            result["verdict"] = "not applied"
        if "signal" in result:
            slow = result["signal"] in ("SIGPROF", "SIGALRM", "SIGKILL")
            result = {"verdict": "killed", "by": "time" if slow else result["signal"], "test": ""}
        return result | {"seconds": round(time.time() - start, 2), "tried": len(tests)}


@dataclass
class Reach:
    """Which tests reach which lines."""

    lines: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def add(self, file: dict[str, Any]) -> None:
        """Add what was learnt from one test file."""
        self.seconds |= file["seconds"]
        self.failed |= set(file["failed"])
        for path, lines in file["lines"].items():
            for line, tests in lines.items():
                self.lines.setdefault((path, int(line)), set()).update(tests)

    def tests(self, mutant: Mutant, first: list[str], budget: float) -> list[str]:
        """The tests to try, in order: killers of its neighbours, its module's own, then others."""
        path = path_of(mutant.module).relative_to(ROOT)
        own = f"/test_{path.stem}.py::"
        reached: set[str] = set()
        for depth, (begin, end) in enumerate((*mutant.lines, (1, 10_000))):
            for line in range(begin, end + 1):
                reached |= self.lines.get((str(path), line), set())
            if reached:  # a default is read when the module is imported: no test reaches its line
                reached |= {test for test in self.seconds if own in test and depth}
                break
        reached -= self.failed
        ordered = sorted(reached, key=lambda test: (own not in test, self.seconds[test]))
        chosen = sorted((test for test in first if test in reached), key=self.seconds.__getitem__)
        spent = [0.0, 0.0]
        for test in ordered:
            if test not in chosen:
                spent[own in test] += self.seconds[test] + 0.005
                if spent[own in test] <= (3 if own in test else 1) * budget:
                    chosen.append(test)
        return chosen


class Results:
    """The results of one module's mutants, one JSON line each, in ``folder``/results.jsonl.

    A result counts as long as its module's text is the same; a kill also as long as the test that
    made it is, a survival as long as all of them are, and for its own or a smaller budget.
    """

    def __init__(self, folder: Path, module: str, source: str, budget: float) -> None:
        self.file = folder / "results.jsonl"
        self.module, self.budget = module, budget
        self.source = hashlib.sha256(source.encode()).hexdigest()[:12]
        self.tests = _digest(*sorted((ROOT / "tests").rglob("*.py")))
        known, _ = read(folder, module, self.source)
        self.known = {key for key, line in known.items() if self._holds(line)}

    def has(self, mutant: Mutant) -> bool:
        """Whether the mutant needs no trial."""
        return mutant.key in self.known

    def expect(self, every: list[Mutant]) -> None:
        """Note which mutants there are."""
        self._write({"keys": [mutant.key for mutant in every]})

    def add(self, mutant: Mutant, result: dict[str, Any]) -> None:
        """Append one result."""
        test = result.get("test", "")
        line = {"key": mutant.key, "line": mutant.lines[0][0], "diff": mutant.diff}
        state = text_of(test) if test else self.tests
        self._write(line | result | {"tests": state, "budget": self.budget})

    def _holds(self, line: dict[str, Any]) -> bool:
        if line["verdict"] == "killed":
            return not line["test"] or line["tests"] == text_of(line["test"])
        return line["tests"] == self.tests and self.budget <= line["budget"]

    def _write(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as out:
            out.write(json.dumps({"module": self.module, "source": self.source} | line) + "\n")


def executed(source: str, module: types.ModuleType) -> dict[str, Any]:
    """The names of a module, made anew from another source."""
    fresh: dict[str, Any] = {"__name__": module.__name__, "__package__": module.__package__}
    fresh["__file__"] = module.__file__
    exec(compile(source, str(module.__file__), "exec"), fresh)  # our own text, but for a mistake
    return fresh


def transplant(fresh: dict[str, Any], module: types.ModuleType) -> int:
    """Give a module's functions, defaults and constants those of ``fresh``; return how many.

    Functions stay the same objects, so whoever has imported them gets the new code too.
    """
    return _transplant(module, vars(module), fresh, module.__name__)


def _transplant(owner: Any, old: Any, new: Any, module: str) -> int:
    changes = 0
    for name, before in list(old.items()):
        after = new.get(name)
        if isinstance(before, type) and isinstance(after, type) and before.__module__ == module:
            changes += _transplant(before, vars(before), vars(after), module)
        elif _plain(before) and _plain(after) and not name.startswith("__"):
            if repr(before) != repr(after):
                _everywhere(owner, name, before, after)
                changes += 1
        else:
            pairs = zip(_functions(before), _functions(after), strict=False)
            changes += sum(_recode(f, g) for f, g in pairs if f.__module__ == module)
    return changes


def _recode(old: types.FunctionType, new: types.FunctionType) -> bool:
    changed = old.__code__ != new.__code__
    if changed:
        old.__code__ = new.__code__
    mine, theirs = old.__defaults__ or (), new.__defaults__ or ()
    merged = tuple(_chosen(a, b) for a, b in zip(mine, theirs, strict=False))
    if len(mine) != len(theirs):
        merged = theirs
    if repr(merged) != repr(mine):
        old.__defaults__, changed = merged, True
    by_name = old.__kwdefaults__ or {}  # the function's own, no copy
    for name, value in by_name.items():
        chosen = _chosen(value, (new.__kwdefaults__ or {})[name])
        if repr(chosen) != repr(value):
            by_name[name], changed = chosen, True
    return changed


def _chosen(old: Any, new: Any) -> Any:
    return new if _plain(old) and _plain(new) else old


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | tuple)


def _everywhere(owner: Any, name: str, before: Any, after: Any) -> None:
    """Set a constant where it is and where it was imported."""
    owners = {id(owner): owner}
    if isinstance(owner, types.ModuleType):
        for each in list(sys.modules.values()):
            if isinstance(each, types.ModuleType) and vars(each).get(name) is before:
                owners[id(each)] = each
    for each in owners.values():
        setattr(each, name, after)


def _functions(thing: Any) -> Iterator[types.FunctionType]:
    """The functions behind a function, method, property or decorated function."""
    if isinstance(thing, property):
        for each in (thing.fget, thing.fset):
            yield from _functions(each)
    elif isinstance(thing, functools.cached_property):
        yield from _functions(thing.func)
    elif isinstance(thing, staticmethod | classmethod):
        yield from _functions(thing.__func__)
    elif isinstance(thing, types.FunctionType):
        yield thing
        yield from _functions(getattr(thing, "__wrapped__", None))


def fork(work: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Result of ``work`` in a silent copy of this process; ``{"signal": name}`` if it dies."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        _quiet()
        os.close(out)
        try:
            text = json.dumps(work())
        except BaseException as error:
            text = json.dumps({"error": repr(error)})
        with os.fdopen(into, "w") as pipe:
            pipe.write(text)
        os._exit(0)
    os.close(into)
    pieces, deadline = [], time.time() + seconds
    while True:
        ready, _, _ = select.select([out], [], [], max(0.0, deadline - time.time()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            break
        if not (piece := os.read(out, 2**16)):
            break
        pieces.append(piece)
    os.close(out)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"signal": signal.Signals(os.WTERMSIG(status)).name}
    return json.loads(b"".join(pieces))


def _hasty(settings: Any) -> Any:
    """Settings of hypothesis that stop at the first counterexample and do not shrink it."""
    from hypothesis import Phase  # not before pytest has, which rewrites its plugins

    return type(settings)(
        settings,
        max_examples=min(20, settings.max_examples),
        phases=(Phase.explicit, Phase.generate),
        derandomize=True,
        database=None,
    )


def _quiet() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def text_of(test: str) -> str:
    """A digest of the text of a test's function; empty where there is none."""
    file, _, name = test.partition("::")
    return _functions_of(ROOT / file).get(name.split("[")[0].split("::")[-1], "")


@functools.cache
def _functions_of(file: Path) -> dict[str, str]:
    tree = ast.parse(file.read_text()) if file.exists() else ast.Module([], [])
    definitions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {f.name: hashlib.sha256(ast.dump(f).encode()).hexdigest()[:12] for f in definitions}


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def run(modules: Sequence[str], folder: Path, budget: float, tests: Iterable[str] = TESTS) -> None:
    """Try the mutants of ``modules`` that have no result in ``folder`` yet."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [
        *tests,
        "--quiet",
        "--capture=no",
        "--tb=no",
        "--override-ini=addopts=--import-mode=importlib",
        "-pno:cacheprovider",
        "-pno:terminalreporter",
        f"--rootdir={ROOT}",
        f"--basetemp={folder / 'tmp'}",
    ]
    code = pytest.main(arguments, plugins=[Session(modules, folder, budget)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {code!r}")
