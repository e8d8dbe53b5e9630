"""Tolerances, derived from what was measured: one table for all claims (``tolerances.json``).

For every check the table holds what the right code shows, the smallest effect among the wrong
variants that the check is to see, and the tolerance between them:

    exact routes, limits    sqrt(floor * effect), the geometric mean, with a factor ``room`` or more
                            free on both sides
    sampled                 effect / 2, which the sequential test then tells from 0

The floor is the largest of three numbers, since a deviation that happened to be 0 says nothing of
another machine's:

    what the right code showed under any of several kernels (``kernels``);
    the round-off of the precision in which the check computes, one unit, or as many as the check
        states (``claim.rounding``);
    in float64, as many units as the same check was off by in float32. Both add the same terms in
        the same order; round-off is made of units, and float32's are large enough to be seen over
        whatever else is in a deviation.

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
        precision: in which the check computes.
        floor: deviation that right code may show (``floor``).
    """

    route: str
    right: float
    effect: float
    variant: str
    tolerance: float
    precision: str = "float64"
    floor: float = 0.0


@dataclass(frozen=True)
class Right:
    """Deviation of the right code in one check.

    Attributes:
        route: of the check.
        deviation: the largest that was seen.
        precision: in which the check computes.
        units: of its round-off, by which right code may be off.
    """

    route: str
    deviation: float
    precision: str = "float64"
    units: float = 1.0

    @property
    def eps(self) -> float:
        """A unit of round-off."""
        return torch.finfo(getattr(torch, self.precision)).eps


def floor(right: Right) -> float:
    """Deviation that right code may show on a machine that nobody measured: see above."""
    return max(right.deviation, right.units * right.eps)


def units_seen(single: Right) -> float:
    """Deviation of a check in float32, in units of round-off; 1 where that says nothing.

    A limit's deviation is an error of approximation and a sampled check's is the pilot's.
    """
    if single.route in ("limit", "sampled") or not math.isfinite(single.deviation):
        return 1.0
    return max(single.units, single.deviation / single.eps)


def room(route: str, precision: str) -> float:
    """The factor that must be free on both sides of a tolerance.

    1e3 for exact routes in float64: another machine's round-off may be tens of units where this
    one's is one. Float32 has 1e7 units in all, so 30. A limit's error is one of approximation,
    the same everywhere: 5, which tells an order of 1 from one of 0 at the second digit.
    """
    if route == "limit":
        return 5.0
    if route == "sampled":
        return 3.0  # standard errors of the pilot on both sides of the half
    return 1e3 if precision == "float64" else 30.0


def derive(
    right: Mapping[str, Right],
    wrong: Mapping[str, Mapping[str, float]],
    refused: frozenset[str] = frozenset(),
    quick: frozenset[str] | None = None,
    full_only: frozenset[str] = frozenset(),
) -> tuple[dict[str, Tolerance], list[str]]:
    """The lines of one claim, and what is wrong with it.

    Args:
        right: name of each check -> what it shows on the right code.
        wrong: name of each variant -> name of each check -> deviation.
        refused: variants that the code itself refuses with an error.
        quick: the checks that a quick run has too; all, if not given.
        full_only: variants that only a full run has to see.

    Returns:
        A line for each check that sees something, and complaints: checks that see nothing,
        variants that nothing sees.
    """
    table: dict[str, Tolerance] = {}
    complaints: list[str] = []
    seen: set[str] = set(refused)
    for check, shown in right.items():
        if not math.isfinite(shown.deviation):
            complaints.append(f"check {check!r} is not finite on the right code")
            continue
        least = floor(shown)
        free = room(shown.route, shown.precision) ** 2
        effects = {
            name: min(deviations.get(check, 0.0), 1e6)
            if not math.isnan(deviations.get(check, 0.0))
            else 1e6
            for name, deviations in wrong.items()
        }
        visible = {name: effect for name, effect in effects.items() if effect >= free * least}
        if not visible:
            largest = max(effects.values(), default=0.0)
            complaints.append(
                f"check {check!r} cannot fail: right code may show {least:.1e} and a variant shows "
                f"at most {largest:.1e}, a factor {free:.0e} is needed"
            )
            continue
        variant = min(visible, key=lambda name: visible[name])
        effect = visible[variant]
        tolerance = effect / 2 if shown.route == "sampled" else math.sqrt(least * effect)
        table[check] = Tolerance(
            shown.route,
            shown.deviation,
            effect,
            variant,
            float(f"{tolerance:.2g}"),
            shown.precision,
            least,
        )
        if quick is None or check in quick:
            seen |= set(visible)
        else:
            seen |= set(visible) & full_only
    for name in wrong:
        if name not in seen:
            ratios = [
                deviations / floor(right[check])
                for check, deviations in wrong[name].items()
                if check in right
            ]
            complaints.append(
                f"variant {name!r} is seen by no check: at most {max(ratios, default=0):.1e} times "
                "what right code may show"
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
    """Write the table, sorted, a line each check, so that a change shows as a change."""

    def rounded(line: Tolerance) -> dict[str, object]:
        values = asdict(line)
        return {
            key: float(f"{value:.2g}") if isinstance(value, float) else value
            for key, value in values.items()
        }

    text = []
    for precision, claims in sorted(table.items()):
        each = []
        for claim, checks in sorted(claims.items()):
            rows = [
                f"   {json.dumps(check)}: {json.dumps(rounded(line))}"
                for check, line in sorted(checks.items())
            ]
            each.append(f"  {json.dumps(claim)}: {{\n" + ",\n".join(rows) + "\n  }")
        text.append(f" {json.dumps(precision)}: {{\n" + ",\n".join(each) + "\n }")
    path.write_text("{\n" + ",\n".join(text) + "\n}\n")
