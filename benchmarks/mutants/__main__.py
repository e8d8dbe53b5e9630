"""Try every mutant that has no result yet, write docs/mutants.md, and say if enough are killed.

    python -m benchmarks.mutants                 # all modules
    python -m benchmarks.mutants ctrl.girsanov   # one; prints its survivors, writes nothing
    python -m benchmarks.mutants --report        # from the results that there are

Exits with 1 where fewer than 95 % were killed, a survivor has no reason in docs/mutants.json, or
a reason has no survivor.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.mutants import report
from benchmarks.mutants.mutate import MODULES


def main() -> int:
    """Run, print the table; 1 if not enough mutants are killed."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="module", help="to mutate (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("runs/mutants"), help="of the results")
    parser.add_argument(
        "--budget", type=float, default=1.0, help="seconds of other modules' tests to survive"
    )
    parser.add_argument("--report", action="store_true", help="only tell what is known")
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - set(MODULES):
        parser.error(f"not a formula module: {', '.join(sorted(unknown))}")
    modules = arguments.modules or MODULES
    if not arguments.report:
        from benchmarks.mutants.run import run  # imports torch and pytest

        run(modules, arguments.folder, arguments.budget)
    reasons = report.reasons()
    tallies = [report.tally(module, arguments.folder, reasons) for module in modules]
    if modules == MODULES:
        report.DOCUMENT.write_text(report.document(tallies))
    missing = {
        each.module: {
            key: {"diff": one["diff"], "kind": "", "reason": ""}
            for key, one in each.unexplained.items()
        }
        for each in tallies
        if each.unexplained
    }
    if missing:
        print(json.dumps(missing, indent=1, ensure_ascii=False))
    print(report.table(tallies))
    wrong = report.verdict(tallies)
    print(*wrong, sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
