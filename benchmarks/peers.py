"""How fast are ``simulate`` and ``hjb`` beside the libraries of their field, in one run?

The same problems by torchsde, diffrax, jax, torchdiffeq, finhjb and a plain torch loop: each
library in a process of its own, all cases in turns within every round, wall time. Libraries that
are not installed are left out, by name.

    python -m benchmarks.peers --python PEERS --earlier FOLDER --to docs

PEERS is a Python that has the others, made once, torch first and pinned:

    python -m venv peers; peers/bin/pip install -c constraints.txt torch torchsde
    peers/bin/pip install -c constraints.txt diffrax torchdiffeq jax finhjb

FOLDER is a checkout of an earlier version of this repository, to be beside today's.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.pages import filled
from benchmarks.update_speed import summary
from diffusion_envs.runs.run_folder import versions

ROOT = Path(__file__).parent.parent
OURS = "simulate, streams by path"


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        name: in the tables.
        library: whose process, of ``peer_process.py``.
        call: of that process.
        threads: with which it is timed.
        largest: number of paths from which on it is left out.
        environment: of the process, where it is not the usual one.
    """

    name: str
    library: str
    call: str
    threads: tuple[int, ...] = (1, 2)
    largest: int = 2**30
    environment: tuple[tuple[str, str], ...] = field(default=())


ROLL_OUTS = (
    Case(OURS, "ctrl", "streams by path"),
    Case("simulate, torch.Generator", "ctrl", "generator", (1,)),
    Case(
        "simulate, streams by path, no compiler", "ctrl", "streams by path",
        environment=(("CTRL_COMPILER", "none"),),
    ),
    Case("simulate of an earlier version", "earlier", "generator", (1,)),
    Case("plain torch loop, memory kept", "torch", "loop, memory kept"),
    Case("jax scan", "jax", "scan"),
    Case("diffrax Euler, batch as state", "diffrax", "euler, batch"),
    Case("diffrax Euler, vmap", "diffrax", "euler, vmap", (1,), 65536),
    Case("torchsde Euler, told its dt", "torchsde", "euler, told its dt", (1,), 65536),
    Case("torchsde Euler, default", "torchsde", "euler, default", (1,)),
)  # fmt: skip
OTHERS = (
    Case("an ODE: `BlackBox`", "ctrl", "ode", (1,)),
    Case("an ODE: torchdiffeq", "torchdiffeq", "ode", (1,)),
    Case("exit problem: `hjb.solve_discounted`", "ctrl", "exit", (1,)),
    Case("exit problem: finhjb", "finhjb", "exit", (1,)),
)
PEERS = ("torchdiffeq", "jax", "diffrax", "finhjb")  # of the other Python


class Library:
    """A process that answers with the seconds of its calls."""

    def __init__(self, case: Case, threads: int, python: str, earlier: Path | None) -> None:
        home = earlier if case.library == "earlier" else ROOT
        one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        settings = {
            "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(home)
        } | dict(case.environment)  # fmt: skip
        if threads == 1:
            settings["XLA_FLAGS"] = one
        name = "ctrl" if case.library == "earlier" else case.library
        self.process = subprocess.Popen(
            [python, str(ROOT / "benchmarks" / "peer_process.py"), name, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | settings, cwd=home,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline().strip() == "ready"

    def why_not(self) -> str:
        """The last line of what it said before it ended."""
        return (self.process.communicate()[1].strip().splitlines() or ["it ended"])[-1]

    def seconds(self, call: str, paths: int) -> tuple[float, float | None]:
        """Wall time of one call, and its error where it knows the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(call, paths, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().split()
        if not answer:
            raise RuntimeError(f"{call} of {self.process.args!r}: {self.why_not()}")
        return float(answer[0]), None if answer[1] == "-" else float(answer[1])

    def end(self) -> None:
        """End the process."""
        self.process.communicate()


class Libraries:
    """The processes that are running, and those that cannot."""

    def __init__(self, python: str | None, earlier: Path | None) -> None:
        self.python, self.earlier = python, earlier
        self.running: dict[tuple[Any, ...], Library] = {}
        self.missing: dict[str, str] = {}

    def of(self, case: Case, threads: int) -> Library | None:
        """The process of a case, started if it is not running; None where it cannot be."""
        key = (case.library, case.environment, threads)
        if key not in self.running and case.library not in self.missing:
            elsewhere = case.library in PEERS
            if elsewhere and self.python is None:
                self.missing[case.library] = "no --python that has it"
            elif case.library == "earlier" and self.earlier is None:
                self.missing[case.library] = "no --earlier checkout"
            else:
                python = self.python if elsewhere else sys.executable
                library = Library(case, threads, str(python), self.earlier)
                if library.ready:
                    self.running[key] = library
                else:
                    self.missing[case.library] = library.why_not()
        return self.running.get(key)

    def end(self) -> None:
        """End all."""
        for library in self.running.values():
            library.end()


def measure(
    cases: tuple[Case, ...], paths: int, rounds: int, libraries: Libraries
) -> list[dict[str, Any]]:
    """Every case with each number of threads: seconds of every round; one before does not count."""
    timed = [
        (case, threads, library)
        for case in cases
        for threads in case.threads
        if paths < case.largest and (library := libraries.of(case, threads)) is not None
    ]
    rows = [
        {"case": case.name, "paths": paths, "threads": threads, "seconds": []}
        for case, threads, _ in timed
    ]
    before = 1 if paths < 10_000 else 0
    for turn in range(rounds + before):
        for row, (case, _, library) in zip(rows, timed, strict=True):
            seconds, error = library.seconds(case.call, paths)
            if turn >= before:
                row["seconds"].append(float(f"{seconds:.5g}"))
                row["error"] = error
    return rows


def over(one: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """How many times as long the other takes, round by round: median, least, most."""
    return summary([b / a for a, b in zip(one["seconds"], other["seconds"], strict=True)])


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds and ratios, Markdown."""

    def row_of(name: str, threads: int) -> dict[str, Any] | None:
        return next((r for r in rows if (r["case"], r["threads"]) == (name, threads)), None)

    ours = row_of(OURS, 1)
    lines = [
        "| case | 1 thread, ms | 2 threads, ms | 2 threads over 1 | ours is times as fast |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["case"] for row in rows):
        one, two = row_of(name, 1), row_of(name, 2)
        cells = ["" if r is None else _cell(summary(_ms(r))) for r in (one, two)]
        cells.append(_cell(over(two, one)) if one and two else "")
        cells.append(_cell(over(ours, one)) if ours and one and name != OURS else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_others(rows: list[dict[str, Any]]) -> str:
    """Milliseconds and errors, Markdown."""
    lines = ["| problem: by | ms | largest error |", "| --- | --- | --- |"]
    for row in rows:
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        lines.append(f"| {row['case']} | {_cell(summary(_ms(row)))} | {error} |")
    return "\n".join(lines)


def _ms(row: dict[str, Any]) -> list[float]:
    return [1e3 * seconds for seconds in row["seconds"]]


def _cell(values: list[float]) -> str:
    middle, least, most = (f"{v:.3g}" for v in values)
    return f"{middle} ({least} to {most})"


def page(measured: dict[str, Any]) -> str:
    """What stands in ``speed.md``."""
    pieces = []
    for paths in dict.fromkeys(row["paths"] for row in measured["roll-outs"]):
        rows = [row for row in measured["roll-outs"] if row["paths"] == paths]
        pieces += [f"{paths} paths of dimension 8, 200 steps, float32:", table(rows)]
    pieces.append(table_of_others(measured["others"]))
    if measured["missing"]:
        each = "; ".join(f"{name} ({why})" for name, why in measured["missing"].items())
        pieces.append(f"Not measured: {each}.")
    return "\n\n".join(pieces)


def write(folder: Path, measured: dict[str, Any]) -> None:
    """Into ``speed.json``, and as tables into their place in ``speed.md``."""
    file, text = folder / "speed.json", (folder / "speed.md").read_text()
    whole = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(whole | {"peers": measured}, indent=1) + "\n")
    (folder / "speed.md").write_text(filled(text, "peers", page(measured)))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--paths", type=int, nargs="+", default=[4096, 65536])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--python", help="a Python that has the other libraries")
    parser.add_argument("--earlier", type=Path, help="a checkout of an earlier version")
    parser.add_argument("--to", type=Path, help="folder with speed.md (default: print only)")
    options = parser.parse_args()
    libraries = Libraries(options.python, options.earlier)
    try:
        rows = [
            row
            for paths in options.paths
            for row in measure(
                ROLL_OUTS, paths, max(3, options.rounds * 4096 // max(paths, 4096)), libraries
            )
        ]
        others = measure(OTHERS, min(options.paths), options.rounds, libraries)
    finally:
        libraries.end()
    measured = {
        "rounds": options.rounds, "versions": versions(), "roll-outs": rows, "others": others,
        "missing": libraries.missing,
    }  # fmt: skip
    print(page(measured))
    if options.to is not None:
        write(options.to, measured)


if __name__ == "__main__":
    main()
