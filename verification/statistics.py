"""A sequential test of a mean, with both of its error rates stated.

For independent samples of mean m and variance at most v, and any number lam,
    exp( sum_i phi(lam (X_i - m)) - n lam^2 v / 2 ),   phi(x) = sign(x) log(1 + |x| + x^2 / 2)
is a supermartingale ([C12]), so it ever exceeds 1 / alpha with probability at most alpha ([V39]).
Nothing but the variance bound is assumed: no normality, no bounded support, no number of samples
fixed in advance. Looking often, stopping early and going on are all paid for.

    FAIL           "the mean is what is claimed" is refuted at ``false_fail``
    PASS           "it is off by tolerance or more", on either side, is refuted at ``false_pass``
    INCONCLUSIVE   neither, within the samples that were allowed

Sources  [C12] Catoni 2012, challenging the empirical mean and empirical variance, Annales de
         l'I.H.P. 48.  [V39] Ville 1939, etude critique de la notion de collectif.
         [WR23] Wang & Ramdas 2023, Catoni-style confidence sequences, Stochastic Processes and
         their Applications 163.
"""

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_ALARM = 1.25  # sample variance over its bound, beyond which nothing passes


class Verdict(enum.Enum):
    """Result of a test. It has no truth value, so that INCONCLUSIVE cannot read as a pass."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"

    def __bool__(self) -> bool:
        raise TypeError("a verdict is not a truth value: compare it with Verdict.PASS")


@dataclass(frozen=True)
class Decision:
    """A verdict and what it rests on.

    Attributes:
        verdict: PASS, FAIL or INCONCLUSIVE.
        n: samples that were used.
        mean: of the samples.
        log_evidence: against the claim, against "too low" and against "too high": logarithms of
            supermartingales, of which independent repetitions add up.
        needed: how many samples would probably decide, where these did not.
        reason: in words, where there is one beside the evidence.
    """

    verdict: Verdict
    n: int
    mean: float
    log_evidence: tuple[float, float, float]
    needed: int | None = None
    reason: str = ""


def influence(x: Tensor) -> Tensor:
    """phi(x) = sign(x) log(1 + |x| + x^2 / 2): like x near 0, like 2 log |x| far out ([C12])."""
    return x.sign() * torch.log1p(x.abs() + 0.5 * x.square())


def samples_needed(tolerance: float, variance: float, false_pass: float = 1e-6) -> int:
    """Approximate number of samples until a right claim passes: 1.4 times the single refutation's.

    2 log(1 / false_pass) v / tolerance^2 would refute one side on average; both must be.
    """
    return math.ceil(1.4 * 2 * math.log(1 / false_pass) * variance / tolerance**2)


def decide(
    stream: Iterable[Tensor],
    claimed: float,
    *,
    tolerance: float,
    variance: float,
    false_fail: float = 1e-6,
    false_pass: float = 1e-6,
    most: int = 10_000_000,
) -> Decision:
    """Test whether the mean of a stream is what is claimed.

    Args:
        stream: batches [n] of independent samples; consumed until there is a verdict.
        claimed: the mean.
        tolerance: half of the smallest error worth finding, or less; in the samples' unit.
        variance: a bound on the samples' variance, from theory or from a pilot with a margin.
        false_fail: probability at most of FAIL where the claim is right.
        false_pass: probability at most of PASS where the mean is off by tolerance or more.
        most: samples.

    Returns:
        The decision. Samples that are not finite FAIL at once; where their variance exceeds its
        bound by a quarter, nothing passes.

    Raises:
        ValueError: a number is out of its range, or the stream holds no samples.
    """
    for name, value in (("tolerance", tolerance), ("variance", variance)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    for name, value in (("false_fail", false_fail), ("false_pass", false_pass)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    if not math.isfinite(claimed) or most < 1:
        raise ValueError(f"claimed must be finite and most at least 1, got {claimed}, {most}")
    lam = tolerance / variance  # grows fastest at the truth
    evidence = torch.zeros(4, dtype=torch.float64)  # too low, too high; then against the edges
    peak = torch.zeros(4, dtype=torch.float64)
    n, total, squares = 0, 0.0, 0.0
    for batch in stream:
        x = batch.detach().double().flatten()[: most - n] - claimed
        if not bool(torch.isfinite(x).all()):
            return Decision(
                Verdict.FAIL, n + len(x), math.nan, (math.inf, 0.0, 0.0), None, "not finite"
            )
        gains = torch.stack(
            [
                influence(lam * x),
                influence(-lam * x),
                influence(lam * (x + tolerance)),  # against: the mean is claimed - tolerance
                influence(-lam * (x - tolerance)),  # against: it is claimed + tolerance
            ]
        )
        walk = evidence[:, None] + (gains - 0.5 * lam**2 * variance).cumsum(1)
        if walk.shape[1]:
            peak = torch.maximum(peak, walk.amax(1))
            evidence = walk[:, -1]
        n, total = n + len(x), total + float(x.sum())
        squares += float(x.square().sum())
        against = _by_hypothesis(peak)
        if against[0] >= math.log(2 / false_fail):
            return Decision(Verdict.FAIL, n, claimed + total / n, against)
        refuted = min(against[1], against[2]) >= math.log(1 / false_pass)
        sample_variance = squares / n - (total / n) ** 2 if n else 0.0
        if refuted and sample_variance <= _ALARM * variance:
            return Decision(Verdict.PASS, n, claimed + total / n, against)
        if n >= most:
            break
    if not n:
        raise ValueError("stream must hold at least one sample")
    against = _by_hypothesis(peak)
    sample_variance = squares / n - (total / n) ** 2
    if sample_variance > _ALARM * variance:
        reason = f"the samples' variance {sample_variance:.3g} is above its bound {variance:.3g}"
        return Decision(Verdict.INCONCLUSIVE, n, claimed + total / n, against, None, reason)
    needed = max(2 * n, samples_needed(tolerance, variance, false_pass))
    return Decision(Verdict.INCONCLUSIVE, n, claimed + total / n, against, needed)


def _by_hypothesis(peak: Tensor) -> tuple[float, float, float]:
    """Log-evidence against the claimed mean, on either side, and against the two edges."""
    low, high, below, above = peak.tolist()
    return max(low, high), below, above
