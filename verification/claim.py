"""What a claim is, and what it means that one holds.

A claim is a statement with its source, a body that measures how far the code is from it, and at
least three wrong variants: the same code with one mistake planted (``planting``). The body is run
on the right code and on every variant. The claim holds where every deviation is within its
tolerance on the right code, and every variant is rejected by at least one of the checks.

Tolerances are measured, never chosen (``tolerances``): the geometric mean of what the right code
shows and of the smallest effect that the check is to see, with room on both sides. What the right
code shows is at least the round-off of the precision in which it computes. That is the setting's,
unless the claim states its own (networks are float32 inside a float64 setting, say), or a check
does for itself.

Routes, from the strongest:
    proof        an identity of symbols; the deviation is what is left of the difference
    pathwise     two formulas agree on every single path
    expectation  exact expectations: quadrature or recursions through production code
    bound        an inequality; the deviation is by how much it is violated
    limit        convergence: an extrapolated limit or a local order
    sampled      a sequential test on random numbers with both error rates stated
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verification import mistakes
from verification.mistakes import Mistake

ROUTES = ("proof", "pathwise", "expectation", "bound", "limit", "sampled")
PROPERTIES = (
    "reward on the action",
    "discount",
    "temperature",
    "uneven grid",
    "correlated noise",
    "several dimensions",
    "time-dependent",
)
"""What the problems of a claim may have, and a narrow claim's do not (``coverage``)."""
_FEWEST_MISTAKES = 3


@dataclass(frozen=True)
class Setting:
    """Precision, device and random generators with which a claim's body runs.

    Attributes:
        dtype: of all tensors.
        device: of all tensors.
        full: whether there is time for what takes more than a second.
        seed: of all random numbers.
    """

    dtype: torch.dtype = torch.float64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    full: bool = False
    seed: int = 0

    def tensor(self, value: Any) -> Tensor:
        """A number, list, array or tensor as a tensor of this setting."""
        return torch.as_tensor(value, dtype=self.dtype, device=self.device)

    def generator(self, name: str) -> torch.Generator:
        """The random numbers of this name: the same for every variant of a claim."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator(self.device)
        generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return generator


@dataclass(frozen=True)
class Check:
    """One measured deviation.

    Attributes:
        name: what is compared, in words; the same for every variant.
        route: one of ``ROUTES``.
        deviation: at least 0, relative to the scale of what is claimed; NaN where anything was
            not a number.
        values: the computed and the claimed number, by two routes; of several numbers the pair
            that is furthest apart.
        count: how many numbers were compared.
        curve: step sizes and errors, to draw, where the check is about convergence.
        precision: in which the numbers were computed; None for that of the claim.
        units: by how many units of round-off the right code may be off (``rounding``).
    """

    name: str
    route: str
    deviation: float
    values: tuple[float, float] = (math.nan, math.nan)
    count: int = 1
    curve: tuple[tuple[float, float], ...] = ()
    precision: torch.dtype | None = None
    units: float = 1.0


@dataclass(frozen=True)
class Sampled:
    """A mean that is to be decided by a sequential test (``statistics.decide``).

    Attributes:
        name: what is averaged.
        stream: batches [n] of independent samples.
        claimed: their mean, according to the claim.
        variance: a bound on their variance, from theory or from a pilot with a margin.
        scale: what deviations are relative to.
    """

    name: str
    stream: Iterable[Tensor]
    claimed: float
    variance: float
    scale: float
    route: str = "sampled"


Numbers = Tensor | np.ndarray | float | list[Any] | tuple[Any, ...]
Body = Callable[[Setting], Iterator[Check | Sampled]]


def rounding(terms: int = 1, size: float = 1.0) -> float:
    """Units of round-off by which a right number may be off: ``size * sqrt(terms)``.

    A sum of n terms is rounded n times, each time by half a unit of the partial sum or less.
    Rounding errors have no common sign: together they exceed k sqrt(n) units of the largest partial
    sum with probability 2 exp(-2 k^2) at most (Hoeffding; Higham & Mary 2019, Theorem 2.4), where
    all of one sign could make n / 2. A tolerance is at least k = 30 times this. How many of them a
    machine shows depends on the order in which its kernel adds: one that shows 0 proves nothing.

    Args:
        terms: that are added up in one number, one after another.
        size: of the partial sums, or of what cancels, relative to the scale of the check.
    """
    return max(1.0, size * math.sqrt(terms))


def stated(check: Check, *, precision: torch.dtype | None = None, units: float = 1.0) -> Check:
    """The check with a precision of its own, or more round-off than a single rounding."""
    return replace(check, precision=precision, units=max(check.units, units))


def pathwise(name: str, got: Numbers, want: Numbers, scale: float | None = None) -> Check:
    """Two formulas on the same paths."""
    return _compared(name, "pathwise", got, want, scale)


def expectation(name: str, got: Numbers, want: Numbers, scale: float | None = None) -> Check:
    """An exact expectation (quadrature, recursion) through production code, and its answer."""
    return _compared(name, "expectation", got, want, scale)


def limit(
    name: str,
    got: Numbers,
    want: Numbers,
    scale: float | None = None,
    curve: Iterable[tuple[float, float]] = (),
) -> Check:
    """An extrapolated limit, or a local order: what is left is an error of approximation.

    Args:
        name: what converges.
        got: the computed limit or order.
        want: the limit or order claimed.
        scale: what the deviation is relative to; the size of ``want`` if not given.
        curve: pairs of step size and error, for the report's plot.
    """
    points = tuple((float(h), abs(float(e))) for h, e in curve)
    return replace(_compared(name, "limit", got, want, scale), curve=points)


def proof(name: str, left: Numbers, scale: float = 1.0) -> Check:
    """Remainder of an identity's difference: exactly 0 where it is proven."""
    return _compared(name, "proof", left, np.zeros(np.shape(array(left))), scale)


def bound(name: str, smaller: Numbers, larger: Numbers, scale: float | None = None) -> Check:
    """smaller <= larger; the deviation is the largest excess."""
    a, b = array(smaller), array(larger)
    size = float(np.abs(b).max()) if scale is None else scale
    check = _compared(name, "bound", a, b, size)
    over = np.maximum(a - b, 0.0) / size  # NaN stays
    at = int(np.argmax(a - b))
    values = (float(a.flat[at]), float(b.flat[at]))
    deviation = float(over.max()) if not math.isnan(check.deviation) else math.nan
    return replace(check, deviation=deviation, values=values)


def sampled(
    name: str, stream: Iterable[Tensor], claimed: float, variance: float, scale: float | None = None
) -> Sampled:
    """The mean of a stream of independent samples, by a sequential test."""
    size = abs(claimed) if scale is None else scale
    return Sampled(name, stream, claimed, variance, _usable(name, size))


def _compared(name: str, route: str, got: Numbers, want: Numbers, scale: float | None) -> Check:
    a, b = array(got), array(want)
    if a.shape != b.shape:
        raise ValueError(f"{name!r} compares shapes {list(a.shape)} and {list(b.shape)}")
    if not a.size:
        raise ValueError(f"{name!r} compares no numbers")
    gaps = np.abs(a - b)
    at = int(np.argmax(gaps))  # the first NaN, if there is one
    values = (float(a.flat[at]), float(b.flat[at]))
    if not np.isfinite(b).all():
        return Check(name, route, math.nan, values, a.size)
    size = _usable(name, float(np.abs(b).max()) if scale is None else scale)
    return Check(name, route, float(gaps.flat[at]) / size, values, a.size)


def _usable(name: str, scale: float) -> float:
    if not 0 < scale < math.inf:
        raise ValueError(
            f"{name!r} has scale {scale}: choose constants that keep it away from 0, or give one"
        )
    return scale


def array(value: Numbers) -> np.ndarray:
    """In float64, for numpy."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


@dataclass(frozen=True)
class Claim:
    """A statement that is checked, with the mistakes that the checks are known to reject.

    Attributes:
        name: of the file, with hyphens.
        title: what it is about, in one sentence.
        statement: the result, with its formula.
        source: paper and theorem or equation.
        mistakes: at least three that the checks reject.
        body: setting -> checks.
        why_double: where float32 cannot show anything: the reason.
        precision: in which the body computes whatever the setting; None for the setting's.
        theme: the folder.
        covers: those of ``PROPERTIES`` that its problems have and ``coverage`` cannot see.

    Raises:
        ValueError: fewer than three mistakes, two of one name, or no words.
    """

    name: str
    title: str
    statement: str
    source: str
    mistakes: tuple[Mistake, ...]
    body: Body
    why_double: str | None = None
    precision: torch.dtype | None = None
    theme: str = ""
    covers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [mistake.name for mistake in self.mistakes]
        if len(names) < _FEWEST_MISTAKES:
            raise ValueError(
                f"claim {self.name} has {len(names)} mistakes: a check that is not shown to fail "
                f"proves nothing, at least {_FEWEST_MISTAKES} are needed"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"claim {self.name} has two mistakes of one name: {names}")
        if not self.statement.strip() or not self.source.strip():
            raise ValueError(f"claim {self.name} must have a statement and a source")
        if unknown := set(self.covers) - set(PROPERTIES):
            raise ValueError(
                f"claim {self.name} covers {sorted(unknown)}, but the properties are {PROPERTIES}"
            )

    @classmethod
    def of(cls, module: ModuleType) -> "Claim":
        """The claim that a module is.

        Its docstring has a title and, after an empty line, the statement; what follows are remarks.
        ``SOURCE`` names the paper, ``checks`` is the body, ``MISTAKES`` the table of mistakes
        (``mistakes.read``). ``WHY_DOUBLE``, ``PRECISION`` and ``COVERS`` (names, with commas) are
        there where they are needed.

        Raises:
            ValueError: one of them is missing, or the table cannot be read.
        """
        theme, _, name = module.__name__.rpartition(".")
        parts = ("SOURCE", "checks", "MISTAKES")
        missing = [part for part in parts if not hasattr(module, part)]
        title, _, rest = inspect.cleandoc(module.__doc__ or "").partition("\n\n")
        if missing or not rest:
            raise ValueError(
                f"{module.__name__} is no claim: it has no {', '.join(missing or ['statement'])}; "
                "imitate a file beside it"
            )
        return cls(
            name.replace("_", "-"),
            title,
            rest.split("\n\n")[0],
            module.SOURCE,
            mistakes.read(module.MISTAKES),
            module.checks,
            getattr(module, "WHY_DOUBLE", None),
            getattr(module, "PRECISION", None),
            theme.rpartition(".")[2],
            tuple(filter(None, getattr(module, "COVERS", "").split(", "))),
        )

    @property
    def file(self) -> str:
        """Where the claim is, relative to the repository."""
        return self.body.__module__.replace(".", "/") + ".py"

    @property
    def single(self) -> bool:
        """Whether the body is meaningful in float32 too."""
        return self.why_double is None

    def precision_of(self, check: "Check | Sampled", setting: Setting) -> torch.dtype:
        """In which a check of this claim computes: its own, the claim's or the setting's."""
        own = check.precision if isinstance(check, Check) else None
        return own or self.precision or setting.dtype
