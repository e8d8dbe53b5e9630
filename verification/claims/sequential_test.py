"""The test of the tests: what ``statistics.decide`` promises, by formula and by simulation."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy import integrate
from torch import Tensor

from verification.claim import Check, Setting, bound, claim, pathwise, wrong
from verification.statistics import Verdict, decide, influence, samples_needed

HERE = "verification.statistics."
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


@claim(
    statement="""
        E exp(phi(lam X)) <= 1 + lam^2 v / 2 <= exp(lam^2 v / 2) for every law of X of mean 0 and
        variance v, heavy-tailed ones too: the sum of phi(lam (X_i - m)) - lam^2 v / 2 is the
        logarithm of a supermartingale, and its running maximum exceeds log(1 / alpha) with
        probability alpha at most. The bound is tight as lam tends to 0.
        """,
    source="Catoni 2012; Ville 1939; Wang & Ramdas 2023",
    wrongs=[
        wrong("square root for logarithm", HERE + "influence", "torch.log1p(", "torch.sqrt("),
        wrong("influence halved", HERE + "influence", "return x", "return 0.5 * x"),
        wrong("x^2 for x^2 / 2", HERE + "influence", "0.5 * x", "1.0 * x"),
        wrong("sign lost", HERE + "influence", "x.sign() * ", ""),
        wrong("variance not paid for", HERE + "decide", "0.5 * lam**2 * variance", "0.0 * lam"),
        wrong("half of the variance", HERE + "decide", "0.5 * lam**2", "0.25 * lam**2"),
        wrong("last value for the maximum", HERE + "decide", "walk.amax(1)", "walk[:, -1]"),
        wrong("one edge for both", HERE + "decide", "(x - tolerance)", "(x + tolerance)"),
    ],
    why_double="the test runs in float64 whatever its samples are",
)
def supermartingale_of_the_sequential_test(setting: Setting) -> Iterator[Check]:
    """The test's evidence, and the inequality that it rests on."""
    jump = math.sqrt(0.998 / 0.002)
    two_point = ((jump, 0.002), (-1 / jump, 0.998))
    grown, paid = [], []
    for lam in (-0.8, -0.05, 0.05, 0.3, 1.1):
        grown += [_normal_mean(lam), _exponential_mean(lam)]
        grown.append(sum(p * math.exp(_phi(lam * x)) for x, p in two_point))
        paid += [1 + lam**2 / 2] * 3
    yield bound("E exp(phi(lam X)) of three laws", grown, paid)
    tight = (_normal_mean(0.02) - 1) / (0.02**2 / 2)
    yield bound("(E exp(phi(lam X)) - 1) / (lam^2 / 2) as lam tends to 0 is 1", [0.99], [tight])
    samples = torch.randn(50, generator=setting.generator("evidence"), dtype=torch.float64)
    decision = decide([samples], 0.1, tolerance=0.3, variance=1.4, false_fail=1e-9)
    yield pathwise(
        "evidence, against the running maxima", decision.log_evidence, _evidence(samples)
    )


def _phi(x: float) -> float:
    return float(influence(torch.tensor([x], dtype=torch.float64)))


def _normal_mean(lam: float) -> float:
    def density(x: float) -> float:
        return math.exp(_phi(lam * x) - x * x / 2) / math.sqrt(2 * math.pi)

    return sum(integrate.quad(density, *ends, epsabs=1e-9)[0] for ends in ((-12, 0), (0, 12)))


def _exponential_mean(lam: float) -> float:
    def density(x: float) -> float:
        return math.exp(_phi(lam * (x - 1)) - x)

    return sum(integrate.quad(density, *ends, epsabs=1e-9)[0] for ends in ((0, 1), (1, 60)))


def _evidence(samples: Tensor) -> list[float]:
    """By numpy, from the definition: against the claim, against too low, against too high."""
    x, tolerance, variance = samples.numpy() - 0.1, 0.3, 1.4
    lam = tolerance / variance

    def walk(y: np.ndarray) -> float:
        phi = np.sign(y) * np.log(1 + np.abs(y) + y * y / 2)
        return max(0.0, float(np.cumsum(phi - lam * lam * variance / 2).max()))

    either = max(walk(lam * x), walk(-lam * x))
    return [either, walk(lam * (x + tolerance)), walk(-lam * (x - tolerance))]


@claim(
    statement="""
        FAIL where the claim is right, and PASS where the mean is off by the tolerance, have at most
        their stated probabilities: 1 % each, counted, for laws from light to heavy tails; and 1e-6
        each for the normal law, by importance sampling. A right claim passes, mostly within
        1.5 times the samples that were planned.
        """,
    source="Catoni 2012; Ville 1939",
    wrongs=[
        wrong("variance not paid for", HERE + "decide", "0.5 * lam**2 * variance", "0.0 * lam"),
        wrong("level alpha for its logarithm", HERE + "decide", "math.log(1 / false_pass)", "1.0"),
        wrong("level of FAIL forgotten", HERE + "decide", "math.log(2 / false_fail)", "1.0"),
        wrong("a tenth of the level", HERE + "decide", "math.log(1 / false_pass)", "0.5"),
        wrong("PASS by one side", HERE + "decide", "min(against[1], against[2])", "against[2]"),
        wrong(
            "twice the tolerance planned for",
            HERE + "samples_needed",
            "/ tolerance",
            "/ 4 / tolerance",
        ),
    ],
    why_double="the test runs in float64 whatever its samples are",
)
def error_rates_of_the_sequential_test(setting: Setting) -> Iterator[Check]:
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
