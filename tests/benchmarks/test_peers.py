"""The comparison of libraries: who is asked, who is missing, what is written."""

import json
import sys

import pytest

from benchmarks import peers
from benchmarks.peers import Case, Libraries, measure, over, page, table, write


def row(case, threads, *seconds, paths=4096, error=None):
    return {
        "case": case, "paths": paths, "threads": threads, "seconds": list(seconds), "error": error,
    }  # fmt: skip


ROWS = [
    row(peers.OURS, 1, 0.02, 0.04, 0.03),
    row(peers.OURS, 2, 0.01, 0.02, 0.02),
    row("jax scan", 1, 0.06, 0.04, 0.06),
]


def test_ratios_are_taken_within_a_round():
    assert over(ROWS[0], ROWS[2]) == [2.0, 1.0, 3.0]
    lines = table(ROWS).splitlines()
    assert lines[2] == f"| {peers.OURS} | 30 (20 to 40) | 20 (10 to 20) | 2 (1.5 to 2) |  |"
    assert lines[3] == "| jax scan | 60 (40 to 60) |  |  | 2 (1 to 3) |"


def test_tables_are_written_into_their_place_and_what_is_missing_is_named(tmp_path):
    (tmp_path / "speed.md").write_text(
        "before\n<!-- peers -->\nold\n<!-- end of peers -->\nafter\n"
    )
    (tmp_path / "speed.json").write_text('{"other": 1}')
    measured = {
        "roll-outs": ROWS, "others": [row("exit problem: finhjb", 1, 0.004, error=4.5e-6)],
        "missing": {"diffrax": "No module named 'diffrax'"},
    }  # fmt: skip
    write(tmp_path, measured)
    text = (tmp_path / "speed.md").read_text()
    assert text.startswith("before\n<!-- peers -->\n4096 paths")
    assert text.endswith("<!-- end of peers -->\nafter\n")
    assert "old" not in text
    assert "| exit problem: finhjb | 4 (4 to 4) | 4.5e-06 |" in text
    assert "Not measured: diffrax (No module named 'diffrax')." in page(measured)
    assert set(json.loads((tmp_path / "speed.json").read_text())) == {"other", "peers"}


def test_a_library_is_timed_in_its_own_process_and_left_out_where_it_is_not_installed(tmp_path):
    blocked = tmp_path / "jax.py"
    blocked.write_text("raise ModuleNotFoundError(\"No module named 'jax'\", name='jax')")
    cases = (
        Case("loop", "torch", "loop, memory kept", (1,)),
        Case("scan", "jax", "scan", (1, 2), environment=(("PYTHONPATH", str(tmp_path)),)),
        Case("ode", "torchdiffeq", "ode", (1,), largest=10),
        Case("then", "earlier", "generator", (1,)),
    )
    libraries = Libraries(sys.executable, None)
    try:
        rows = measure(cases, 16, 2, libraries)
    finally:
        libraries.end()
    assert [(one["case"], one["threads"], len(one["seconds"])) for one in rows] == [("loop", 1, 2)]
    assert libraries.missing == {
        "jax": "ModuleNotFoundError: No module named 'jax'",
        "earlier": "no --earlier checkout",
    }


def test_a_call_that_fails_says_whose_it_was():
    libraries = Libraries(None, None)
    try:
        with pytest.raises(RuntimeError, match=r"nonsense of .*torch.*KeyError: 'nonsense'"):
            measure((Case("loop", "torch", "nonsense", (1,)),), 16, 1, libraries)
    finally:
        libraries.end()
