"""The mutation driver: what it changes, and that it tells killed mutants from survivors."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

from benchmarks.mutants import report
from benchmarks.mutants.mutate import MODULES, ROOT, mutants, path_of
from benchmarks.mutants.run import executed, transplant

PLANTED = '''\
"""Planted."""
from functools import cached_property


def seen(x: int = 3) -> int:
    """Doubled 2 + 2."""
    if x < 0:
        kind = "negative" * 7
        raise ValueError(f"x must be at least {0}, got {kind}")
    return 2 * x


def unseen(x):
    return x - 5


class Box:
    @cached_property
    def size(self):
        return 3
'''
TESTS = """\
import pytest
from ctrl.planted import Box, seen, unseen


def test_seen():
    assert (seen(), seen(0), seen(4)) == (6, 0, 8)
    with pytest.raises(ValueError, match="x must"):
        seen(-1)


def test_unseen():
    unseen(1)


def test_box():
    assert Box().size == 3
"""


def test_the_formula_modules_exist():
    assert len(set(MODULES)) == len(MODULES) > 20
    for name in MODULES:
        assert path_of(name).is_file(), name


def test_mutants_are_small_and_leave_words_alone():
    diffs = {each.diff for each in mutants("ctrl.planted", PLANTED)}
    assert "return 2 * x -> return 2 / x" in diffs
    assert "return 2 * x -> return 3 * x" in diffs
    assert "if x < 0: -> if x <= 0:" in diffs
    assert "def seen(x: int = 3) -> int: -> def seen(x: int = 4) -> int:" in diffs
    assert "return 3 -> return 4" in diffs
    assert not [diff for diff in diffs if "kind" in diff or "raise" in diff or "Doubled" in diff]
    keys = [each.key for each in mutants("ctrl.planted", PLANTED)]
    assert len(keys) == len(set(keys))


def test_devices_and_the_words_of_checks_are_left_alone():
    source = """
def f(x):
    y = all_finite("x", x.new_zeros(2, device=x.device))
    return not zip(x, y, strict=True)
"""
    after = [each.diff.split(" -> ")[1] for each in mutants("planted", source)]
    assert after
    assert all('"x"' in diff for diff in after if "finite" in diff)
    assert all("device=x.device" in diff for diff in after if "zeros" in diff)
    assert all("strict=True" in diff for diff in after if "zip" in diff)


def test_sums_and_means_swap():
    source = "import torch\n\n\ndef f(x):\n    return torch.sum(x.detach(), 1) + x.square()\n"
    diffs = {each.diff.split(" -> ")[1] for each in mutants("planted", source)}
    assert "return torch.mean(x.detach(), 1) + x.square()" in diffs
    assert "return torch.sum(x.clone(), 1) + x.square()" in diffs
    assert "return torch.sum(x.detach(), 1) + x.abs()" in diffs


def test_a_transplant_reaches_whoever_has_imported_the_function():
    module = types.ModuleType("planted")
    module.__file__ = "planted.py"
    exec(PLANTED, vars(module))
    held, box = module.seen, module.Box()
    for text, mistake in (("2 * x", "5 * x"), ("int = 3", "int = 7"), ("return 3", "return 4")):
        changed = executed(PLANTED.replace(text, mistake), module)
        assert transplant(changed, module) == 1
        assert held() == {"2 * x": 15, "int = 3": 14, "return 3": 6}[text]
        assert (box.size == 4) == (text == "return 3")
        del box.size
        assert transplant(executed(PLANTED, module), module) == 1
        assert held() == 6


def test_a_run_counts_what_was_killed_and_reports_what_survived(tmp_path):
    shutil.copytree(ROOT / "benchmarks/mutants", tmp_path / "benchmarks/mutants")
    for name, text in {
        "pyproject.toml": "[tool.pytest.ini_options]\npythonpath = ['.']\n",
        "benchmarks/__init__.py": "",
        "ctrl/__init__.py": "",  # another ctrl may be installed
        "ctrl/planted.py": PLANTED,
        "tests/test_planted.py": TESTS,
        "tests/deeper/conftest.py": "",
        "tests/deeper/test_nothing.py": "def test_nothing():\n    pass\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    code = "from pathlib import Path; from benchmarks.mutants.run import run; run("
    code += "['ctrl.planted'], Path('results'), 5.0, ['tests'])"
    command = [sys.executable, "-c", code]
    plain = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they cost seconds

    def run() -> list[str]:
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=plain)
        return (tmp_path / "results/results.jsonl").read_text().splitlines()

    assert len(first := run()) == 1 + len(mutants("ctrl.planted", PLANTED))
    assert (tmp_path / "ctrl/planted.py").read_text() == PLANTED  # no mutant was ever written
    assert len(run()) == len(first) + 1  # nothing is done again
    found = tallied(tmp_path)
    assert found.complete
    assert found.killed.total() == found.total - 2
    assert found.killed["assertion"] > 2
    assert {one["diff"] for one in found.unexplained.values()} == {
        "return x - 5 -> return x + 5",
        "return x - 5 -> return x - 6",
    }
    assert report.verdict([found])[0] == "ctrl.planted: 2 survivors have no reason"


def tallied(root: Path) -> report.Tally:
    import hashlib

    source = hashlib.sha256(PLANTED.encode()).hexdigest()[:12]
    results, total = report.read(root / "results", "ctrl.planted", source)
    return report.Tally("ctrl.planted", total, results, {})


def test_a_verdict_wants_reasons_for_survivors_and_survivors_for_reasons():
    killed = {"verdict": "killed", "by": "assertion", "line": 1, "diff": "a -> b"}
    results = {str(n): killed for n in range(99)} | {"x": {**killed, "verdict": "survived"}}
    reason = {"diff": "a -> b", "kind": "same", "reason": "b is a"}
    assert report.verdict([report.Tally("m", 100, results, {"x": reason})]) == []
    assert "1 survivors have no reason" in report.verdict([report.Tally("m", 100, results, {})])[0]
    stale = report.Tally("m", 100, results, {"x": reason, "7": reason})
    assert "what is no survivor: 7" in report.verdict([stale])[0]
    assert (
        "of 101 mutants were tried"
        in report.verdict([report.Tally("m", 101, results, {"x": reason})])[0]
    )
    text = report.document([report.Tally("m", 100, results, {"x": reason})])
    assert "| `m` | 100 | 99 | 99 | 0 | 0 | 1 | 99.0% |" in text
    assert "b is a" in text
