"""The outcome of a run as plain numbers and words: what ``verification.json`` holds."""

import math
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from verification.claim import Mistake, Setting
from verification.planting import PlantingError
from verification.running import Measured, Outcome, Rates, Rejection

_LIBRARIES = ("torch", "torchsde", "numpy", "scipy", "sympy", "diffusers")


def of(
    outcomes: Sequence[Outcome], setting: Setting, rates: Rates, seconds: float
) -> dict[str, Any]:
    """Everything that a report says, for a machine to read.

    Args:
        outcomes: of every claim that was run.
        setting: they ran in.
        rates: of the sequential tests.
        seconds: they took.
    """
    return {
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in _LIBRARIES},
        "precision": str(setting.dtype).removeprefix("torch."),
        "device": str(setting.device),
        "threads": torch.get_num_threads(),
        "full": setting.full,
        "seed": setting.seed,
        "false_fail": rates.false_fail,
        "false_pass": rates.false_pass,
        "seconds": round(seconds, 2),
        "holds": all(outcome.holds for outcome in outcomes),
        "claims": [_claim(outcome) for outcome in outcomes],
    }


def _claim(outcome: Outcome) -> dict[str, Any]:
    claim = outcome.claim
    planted = {wrong.name: wrong for wrong in claim.mistakes}
    return {
        "name": claim.name,
        "title": claim.title,
        "theme": claim.theme,
        "statement": claim.statement,
        "source": claim.source,
        "file": claim.file,
        "why_double": claim.why_double,
        "verdict": outcome.verdict.value,
        "holds": outcome.holds,
        "seconds": round(outcome.seconds, 3),
        "error": outcome.error,
        "checks": [_check(check) for check in outcome.checks],
        "mistakes": [_wrong(rejection, planted[rejection.name]) for rejection in outcome.mistakes],
    }


def _check(check: Measured) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "name": check.name,
        "route": check.route,
        "verdict": check.verdict.value,
        "deviation": _number(check.deviation),
        "tolerance": check.tolerance,
        "precision": check.precision,
        "found": _value(check.values[0]),
        "claimed": _value(check.values[1]),
        "count": check.count,
    }
    if check.n is not None:
        numbers |= {"n": check.n, "log_evidence": check.log_evidence, "needed": check.needed}
    if check.curve:
        numbers["curve"] = check.curve
    return numbers | ({"note": check.note} if check.note else {})


def _wrong(rejection: Rejection, wrong: Mistake) -> dict[str, Any]:
    edits = []
    for edit in wrong.edits:
        try:
            right, mistaken = edit.lines()
        except (PlantingError, ValueError):
            right, mistaken = edit.old, edit.new
        edits.append({"target": edit.target, "right": right, "wrong": mistaken})
    return {
        "name": rejection.name,
        "rejected": rejection.rejected,
        "by": rejection.by,
        "deviations": {name: _number(value) for name, value in rejection.deviations.items()},
        "note": rejection.note,
        "edits": edits,
    }


def _number(value: float) -> float | str:
    """Three digits; what is no number in JSON in words."""
    return float(f"{value:.3g}") if math.isfinite(value) else str(value)


def _value(value: float) -> float | str:
    """All digits that a reader may compare."""
    return float(f"{value:.12g}") if math.isfinite(value) else str(value)
