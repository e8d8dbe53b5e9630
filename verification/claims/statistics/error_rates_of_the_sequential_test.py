"""Error rates of the sequential test, counted and by importance sampling.

FAIL where the claim is right, and PASS where the mean is off by the tolerance, have at most
their stated probabilities: 1 % each, counted, for laws from light to heavy tails; and 1e-6
each for the normal law, by importance sampling. A right claim passes, mostly within
1.5 times the samples that were planned.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from verification.claim import Check, Setting, bound
from verification.statistics import Verdict, decide, samples_needed

SOURCE = "Catoni 2012; Ville 1939"
WHY_DOUBLE = "the test runs in float64 whatever its samples are"

TOLERANCE, RATE, TINY = 0.7, 0.01, 1e-6
BATCH = 24
# Laws of mean 0 and variance 1, from light to heavy tails.
LAWS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "normal": lambda n, g: torch.randn(n, generator=g, dtype=torch.float64),
    "rare jump": lambda n, g: (
        ((torch.rand(n, generator=g, dtype=torch.float64) < 0.002).double() - 0.002)
        / math.sqrt(0.002 * 0.998)
    ),
    "exponential": lambda n, g: torch.empty(n, dtype=torch.float64).exponential_(generator=g) - 1,
    "lognormal": lambda n, g: (
        (torch.randn(n, generator=g, dtype=torch.float64).mul(1.2).exp() - math.exp(0.72))
        / math.sqrt(math.exp(2.88) - math.exp(1.44))
    ),
}


def _counted(setting: Setting, names: list[str], runs: int) -> Iterator[Check]:
    """Shares of both errors: the worst of these laws, and of both sides."""
    fails = [_shares(setting, name, 0.0, runs)[0] for name in names]
    yield bound(
        f"share of FAIL at the truth, {', '.join(names)}, {runs} runs", fails, [RATE] * len(names)
    )
    passes = [
        _shares(setting, name, side * TOLERANCE, runs)[1] for name in names for side in (-1, 1)
    ]
    what = f"share of PASS off by the tolerance, {', '.join(names)}, {runs} runs"
    yield bound(what, passes, [RATE] * len(passes))


def _batches(
    law: Callable[[int, torch.Generator], Tensor], shift: float, g: torch.Generator
) -> Iterator[Tensor]:
    while True:
        yield law(BATCH, g) + shift


def _shares(setting: Setting, name: str, shift: float, runs: int) -> tuple[float, float]:
    """Shares of FAIL and of PASS at 1 % each."""
    g = torch.Generator().manual_seed(setting.seed + len(name) + round(10 * shift))
    most = 20 * samples_needed(0.7, 1.0, RATE)
    decisions = [
        decide(
            _batches(LAWS[name], shift, g),
            0.0,
            tolerance=TOLERANCE,
            variance=1.0,
            false_fail=RATE,
            false_pass=RATE,
            most=most,
        )
        for _ in range(runs)
    ]
    return (
        sum(one.verdict is Verdict.FAIL for one in decisions) / runs,
        sum(one.verdict is Verdict.PASS for one in decisions) / runs,
    )


def _tiny_rates(setting: Setting, runs: int) -> tuple[float, float, float]:
    """Probabilities of both errors at 1e-6, on normal data, and the samples used at the truth.

    The error is made likely by drawing from another mean, and weighted by the likelihood ratio of
    all samples that were drawn until the verdict.
    """
    g = torch.Generator().manual_seed(setting.seed)
    settings: dict[str, Any] = {
        "tolerance": TOLERANCE,
        "variance": 1.0,
        "false_fail": TINY,
        "false_pass": TINY,
    }
    fail = passed = used = 0.0
    for _ in range(runs):
        one = decide(_batches(LAWS["normal"], TOLERANCE, g), 0.0, **settings)
        if one.verdict is Verdict.FAIL:  # the truth is 0; twice, for the other side
            fail += 2 * math.exp(-one.n * TOLERANCE * (one.mean - TOLERANCE / 2))
        one = decide(_batches(LAWS["normal"], 0.0, g), 0.0, **settings)
        used += one.n
        if one.verdict is Verdict.PASS:  # the truth is the tolerance
            passed += math.exp(one.n * TOLERANCE * (one.mean - TOLERANCE / 2))
    return fail / runs, passed / runs, used / runs


def checks(setting: Setting) -> Iterator[Check]:
    """Its error rates, counted and by importance sampling."""
    yield from _counted(setting, ["normal", "rare jump"], 100)
    if setting.full:
        yield from _counted(setting, list(LAWS), 2000)
    fail, passed, used = _tiny_rates(setting, 50)
    yield bound("probability of FAIL at the truth, stated 1e-6, 50 runs", [fail], [TINY])
    yield bound("probability of PASS off by the tolerance, stated 1e-6, 50 runs", [passed], [TINY])
    planned = 1.5 * samples_needed(TOLERANCE, 1.0, TINY)
    yield bound("samples used at the truth, against 1.5 times the plan", [used], [planned])
    if setting.full:
        fail, passed, _ = _tiny_rates(setting, 1000)
        yield bound("probability of FAIL at the truth, stated 1e-6, 1000 runs", [fail], [TINY])
        what = "probability of PASS off by the tolerance, stated 1e-6, 1000 runs"
        yield bound(what, [passed], [TINY])


MISTAKES = """
verification.statistics.decide
    level alpha for its logarithm | math.log(1 / false_pass) => 1.0
    level of FAIL forgotten | math.log(2 / false_fail) => 1.0
    a tenth of the level | math.log(1 / false_pass) => 0.5
    PASS by one side | min(against[1], against[2]) => against[2]
verification.statistics.samples_needed
    twice the tolerance planned for | / tolerance => / 4 / tolerance
shared
    variance not paid for
"""
