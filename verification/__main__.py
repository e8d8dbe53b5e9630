"""``python -m verification``: every claim on this machine, a table, a report, an exit code."""

import fcntl
import sys
from dataclasses import replace
from pathlib import Path

import torch

from verification import claims as _claims  # noqa: F401  # registers them
from verification import tolerances
from verification.claim import CLAIMS, Setting
from verification.running import measure, run


def _measure(names: list[str]) -> int:
    bad = 0
    for precision in ("float64", "float32"):
        for name in names:
            claim = CLAIMS[name]
            if precision == "float32" and not claim.single:
                continue
            setting = replace(Setting(), dtype=getattr(torch, precision))
            lines, complaints = measure(claim, setting)
            with Path(str(tolerances.TABLE) + ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                table = tolerances.load()
                table.setdefault(precision, {})[name] = lines
                tolerances.save(table)
            for complaint in complaints:
                print(f"{precision} {name}: {complaint}")
                bad += precision == "float64"
    return bad


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = [a for a in sys.argv[1:] if not a.startswith("-")] or list(CLAIMS)
    if "--measure" in sys.argv:
        sys.exit(min(_measure(chosen), 1))
    setting = Setting(full="--full" in sys.argv)
    table = tolerances.load()["float64"]
    worst = 0
    for name in chosen:
        found = run(CLAIMS[name], setting, table.get(name, {}))
        worst |= not found.holds
        print(f"{name}: {'holds' if found.holds else 'FAILS'}  {found.seconds:.2f} s {found.error}")
        for check in found.checks:
            print(
                f"  {check.verdict.name} {check.name}: {check.deviation:.1e} / {check.tolerance} {check.note}"
            )
        for w in found.wrongs:
            print(
                f"  {'rejected' if w.rejected else 'ACCEPTED'} {w.name}: {w.deviation:.1e} / {w.tolerance:.1e} by {w.by!r} {w.note}"
            )
    sys.exit(worst)
