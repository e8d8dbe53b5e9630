"""Running claims: the right code, then every wrong variant, and what follows from both."""

import math
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from verification.claim import Check, Claim, Mistake, Sampled, Setting
from verification.planting import PlantingError, planted
from verification.statistics import Verdict, decide
from verification.tolerances import Tolerance


@dataclass(frozen=True)
class Measured:
    """A check on the right code, held against its tolerance.

    Attributes:
        name: of the check.
        route: one of ``claim.ROUTES``.
        deviation: relative; of a sampled check that of its mean.
        tolerance: from the table; None where this precision shows nothing.
        verdict: PASS, FAIL or INCONCLUSIVE.
        n: samples that were used, if sampled.
        log_evidence: as ``statistics.Decision``, if sampled.
        needed: samples that would decide, if these did not.
        note: why, in words, where there is more to say.
        values: the computed and the claimed number (``claim.Check``).
        count: how many numbers were compared.
        curve: step sizes and errors, where the check is about convergence.
        precision: in which it computes, where a tolerance says so.
    """

    name: str
    route: str
    deviation: float
    tolerance: float | None
    verdict: Verdict
    n: int | None = None
    log_evidence: tuple[float, float, float] | None = None
    needed: int | None = None
    note: str = ""
    values: tuple[float, float] = (math.nan, math.nan)
    count: int = 1
    curve: tuple[tuple[float, float], ...] = ()
    precision: str = ""


@dataclass(frozen=True)
class Rejection:
    """Result of running a wrong variant.

    Attributes:
        name: of the variant.
        rejected: whether some check failed.
        by: the check whose deviation is the largest multiple of its tolerance.
        deviations: of every check that has a tolerance.
        note: how, where it was not by a deviation.
    """

    name: str
    rejected: bool
    by: str = ""
    deviations: Mapping[str, float] = field(default_factory=dict[str, float])
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """Everything about one claim in one run."""

    claim: Claim
    verdict: Verdict
    checks: tuple[Measured, ...]
    mistakes: tuple[Rejection, ...]
    seconds: float
    error: str = ""

    @property
    def holds(self) -> bool:
        """Whether the right code passed and every variant was rejected."""
        return (
            self.verdict is Verdict.PASS
            and not self.error
            and all(rejection.rejected for rejection in self.mistakes)
        )


@dataclass(frozen=True)
class Rates:
    """Error rates of each sequential test, and the most samples it may use."""

    false_fail: float = 1e-6
    false_pass: float = 1e-6
    most: int = 2_000_000


def run(
    claim: Claim,
    setting: Setting,
    tolerances: Mapping[str, Tolerance],
    rates: Rates | None = None,
    plant: bool = True,
) -> Outcome:
    """One claim: its checks on the right code, and on every mistake.

    A mistake is rejected by the first check that fails; a full run makes them all, and tells which
    of them saw it best.

    Args:
        claim: to run.
        setting: type, device, seed, and whether there is time.
        tolerances: of its checks, in this precision.
        rates: of its sequential tests.
        plant: whether to plant the mistakes too.
    """
    rates = rates or Rates()
    began = time.perf_counter()
    try:
        checks = tuple(
            _decided(check, claim, tolerances, setting, rates) for check in claim.body(setting)
        )
        error = "" if checks else "the claim has no checks"
    except Exception:
        checks, error = (), traceback.format_exc(limit=-3)
    verdicts = [check.verdict for check in checks]
    if error or Verdict.FAIL in verdicts:
        verdict = Verdict.FAIL
    elif Verdict.INCONCLUSIVE in verdicts or not any(c.tolerance for c in checks):
        verdict = Verdict.INCONCLUSIVE
    else:
        verdict = Verdict.PASS
    mistakes = tuple(
        _rejection(claim, wrong, setting, tolerances, rates)
        for wrong in claim.mistakes
        if plant and (setting.full or not wrong.full)
    )
    return Outcome(claim, verdict, checks, mistakes, time.perf_counter() - began, error)


def _decided(
    check: Check | Sampled,
    claim: Claim,
    tolerances: Mapping[str, Tolerance],
    setting: Setting,
    rates: Rates,
) -> Measured:
    line = tolerances.get(check.name)
    precision = str(claim.precision_of(check, setting)).removeprefix("torch.")
    if line is None:
        deviation = check.deviation if isinstance(check, Check) else math.nan
        if setting.dtype == torch.float64:
            note = "no tolerance was measured: python -m verification --measure"
            return Measured(check.name, check.route, deviation, None, Verdict.FAIL, note=note)
        bad = not math.isfinite(deviation) and isinstance(check, Check)
        verdict = Verdict.FAIL if bad else Verdict.PASS
        note = "not judged: no variant stands out from this precision's round-off"
        return Measured(check.name, check.route, deviation, None, verdict, note=note)
    if line.precision != precision:
        deviation = check.deviation if isinstance(check, Check) else math.nan
        note = f"measured in {line.precision}, computed in {precision}: measure it anew"
        return Measured(check.name, check.route, deviation, None, Verdict.FAIL, note=note)
    if isinstance(check, Check):
        passed = check.deviation <= line.tolerance  # NaN does not pass
        verdict = Verdict.PASS if passed else Verdict.FAIL
        return Measured(
            check.name,
            check.route,
            check.deviation,
            line.tolerance,
            verdict,
            values=check.values,
            count=check.count,
            curve=check.curve,
            precision=precision,
        )
    decision = decide(
        check.stream,
        check.claimed,
        tolerance=line.tolerance * check.scale,
        variance=check.variance,
        false_fail=rates.false_fail,
        false_pass=rates.false_pass,
        most=rates.most,
    )
    return Measured(
        check.name,
        check.route,
        abs(decision.mean - check.claimed) / check.scale,
        line.tolerance,
        decision.verdict,
        decision.n,
        decision.log_evidence,
        decision.needed,
        decision.reason,
        (decision.mean, check.claimed),
        precision=precision,
    )


def _rejection(
    claim: Claim,
    wrong: Mistake,
    setting: Setting,
    tolerances: Mapping[str, Tolerance],
    rates: Rates,
) -> Rejection:
    measured: list[Measured] = []
    try:
        with planted(*wrong.edits):
            for check in claim.body(setting):
                if check.name in tolerances:
                    measured.append(_decided(check, claim, tolerances, setting, rates))
                    if measured[-1].verdict is Verdict.FAIL and not setting.full:
                        break
    except PlantingError as error:
        return Rejection(wrong.name, False, note=str(error))
    except Exception as error:
        if wrong.raises is not None and isinstance(error, wrong.raises):
            note = f"refused with {type(error).__name__}: {error}"
            return Rejection(wrong.name, True, note=note)
        if all(check.verdict is not Verdict.FAIL for check in measured):
            return Rejection(wrong.name, False, note=traceback.format_exc(limit=-2))
    if not measured:
        return Rejection(wrong.name, False, note="no check has a tolerance")
    deviations = {check.name: check.deviation for check in measured}
    failed = [check for check in measured if check.verdict is Verdict.FAIL]
    by = max(failed or measured, key=_excess)
    return Rejection(wrong.name, bool(failed), by.name, deviations)


def _excess(check: Measured) -> float:
    """Deviation in units of the tolerance; infinite for NaN."""
    assert check.tolerance is not None
    return math.inf if math.isnan(check.deviation) else check.deviation / check.tolerance
