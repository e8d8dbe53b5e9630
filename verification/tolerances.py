"""Tolerances, derived from what was measured: one table for all claims (``tolerances.json``).

For every check the table holds what the right code shows, the smallest effect among the wrong
variants that the check is to see, and the tolerance between them:

    exact routes, limits    sqrt(right * effect), the geometric mean, with a factor ``room`` or more
                            free on both sides (round-off counts as one unit at least)
    sampled                 effect / 2, which the sequential test then tells from 0

A check sees a variant if there is that much room. A check that sees no variant cannot fail, and a
variant that no check sees is not rejected: neither gets into the table. ``measure`` makes it; a
change of it shows the measured effects in the same commit.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

TABLE = Path(__file__).parent / "tolerances.json"


class BlindError(ValueError):
    """A check that sees no variant, or a variant that no check sees."""


@dataclass(frozen=True)
class Tolerance:
    """One line of the table.

    Attributes:
        route: of the check.
        right: deviation of the right code (for a sampled check: the pilot's standard error).
        effect: smallest deviation among the variants that the check sees.
        variant: which shows it.
        tolerance: between the two.
    """

    route: str
    right: float
    effect: float
    variant: str
    tolerance: float


def room(route: str, dtype: torch.dtype) -> float:
    """The factor that must be free on both sides of a tolerance.

    1e3 for exact routes in float64: another machine's round-off may be tens of units where this
    one's is one. Float32 has 1e7 units in all, so 30. A limit's error is one of approximation,
    the same everywhere: 5, which tells an order of 1 from one of 0 at the second digit.
    """
    if route == "limit":
        return 5.0
    if route == "sampled":
        return 3.0  # standard errors of the pilot on both sides of the half
    return 1e3 if dtype == torch.float64 else 30.0


def derive(
    right: Mapping[str, tuple[str, float]],
    wrong: Mapping[str, Mapping[str, float]],
    dtype: torch.dtype,
    refused: frozenset[str] = frozenset(),
    quick: frozenset[str] | None = None,
    full_only: frozenset[str] = frozenset(),
) -> tuple[dict[str, Tolerance], list[str]]:
    """The lines of one claim, and what is wrong with it.

    Args:
        right: name of each check -> its route and deviation on the right code.
        wrong: name of each variant -> name of each check -> deviation.
        dtype: they were measured in.
        refused: variants that the code itself refuses with an error.
        quick: the checks that a quick run has too; all, if not given.
        full_only: variants that only a full run has to see.

    Returns:
        A line for each check that sees something, and complaints: checks that see nothing,
        variants that nothing sees.
    """
    unit = torch.finfo(dtype).eps
    table: dict[str, Tolerance] = {}
    complaints: list[str] = []
    seen: set[str] = set(refused)
    for check, (route, deviation) in right.items():
        if not math.isfinite(deviation):
            complaints.append(f"check {check!r} is not finite on the right code")
            continue
        floor = deviation if route in ("limit", "sampled") else max(deviation, unit)
        floor = max(floor, unit)
        free = room(route, dtype) ** 2
        effects = {
            name: min(found.get(check, 0.0), 1e6) if not math.isnan(found.get(check, 0.0)) else 1e6
            for name, found in wrong.items()
        }
        visible = {name: effect for name, effect in effects.items() if effect >= free * floor}
        if not visible:
            largest = max(effects.values(), default=0.0)
            complaints.append(
                f"check {check!r} cannot fail: it shows {floor:.1e} on the right code and at most "
                f"{largest:.1e} on a variant, a factor {free:.0e} is needed"
            )
            continue
        variant = min(visible, key=lambda name: visible[name])
        effect = visible[variant]
        tolerance = effect / 2 if route == "sampled" else math.sqrt(floor * effect)
        table[check] = Tolerance(route, deviation, effect, variant, float(f"{tolerance:.2g}"))
        if quick is None or check in quick:
            seen |= set(visible)
        else:
            seen |= set(visible) & full_only
    for name in wrong:
        if name not in seen:
            ratios = [
                found / max(right[check][1], unit)
                for check, found in wrong[name].items()
                if check in right
            ]
            complaints.append(
                f"variant {name!r} is seen by no check: at most {max(ratios, default=0):.1e} times "
                "what the right code shows"
            )
    return table, complaints


def load(path: Path = TABLE) -> dict[str, dict[str, dict[str, Tolerance]]]:
    """Precision -> claim -> check -> its line."""
    if not path.exists():
        return {}
    return {
        precision: {
            claim: {check: Tolerance(**line) for check, line in checks.items()}
            for claim, checks in claims.items()
        }
        for precision, claims in json.loads(path.read_text()).items()
    }


def save(table: Mapping[str, Mapping[str, Mapping[str, Tolerance]]], path: Path = TABLE) -> None:
    """Write the table, sorted, so that a change shows as a change."""

    def rounded(line: Tolerance) -> dict[str, object]:
        values = asdict(line)
        return {
            key: float(f"{value:.2g}") if isinstance(value, float) else value
            for key, value in values.items()
        }

    plain = {
        precision: {
            claim: {check: rounded(line) for check, line in sorted(checks.items())}
            for claim, checks in sorted(claims.items())
        }
        for precision, claims in sorted(table.items())
    }
    path.write_text(json.dumps(plain, indent=1) + "\n")
