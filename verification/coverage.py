"""How general the problems are on which each theorem is checked: seen while the claims run.

python -m verification.coverage docs/verification_coverage.md             all claims
python -m verification.coverage docs/verification_coverage.md path-kl     these alone, the rest kept

A claim that holds where nothing costs anything says nothing of what an action costs. So each body
runs once under a profiler that looks at the arguments of every function of ``ctrl`` and
``diffusion_envs``: problems, equations, paths, grids, schedules. Whether a reward depends on the
action or a drift on time is asked of the function itself, at two actions or two times. What that
cannot see (a formula in numbers alone) a claim declares: ``COVERS``.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import ctrl
import diffusion_envs
from ctrl.linear import LinearQuadratic, TimeVarying
from verification.claim import PROPERTIES, Claim, Sampled, Setting
from verification.claims import CLAIMS

ROOT = Path(__file__).parent.parent
THEOREMS = ROOT / "docs" / "theorems.md"
ACTION, DISCOUNT, TEMPERATURE, UNEVEN, CORRELATED, SEVERAL, TIME = PROPERTIES

# In these files an equation is simulated: what a problem pays is of no account there.
_ROLL_OUTS = ("simulate.py", "noise_sources.py", "solvers.py", "sde.py", "torchsde_solver.py")
_STEP = 0.37  # from one action, or one time, to another

# Beginning of a result in docs/theorems.md -> why a property cannot be there.
_NO_REWARD: dict[str, str] = dict.fromkeys(
    (ACTION, DISCOUNT, TEMPERATURE), "of laws of paths: no reward enters"
)
_DENOISING = {
    **dict.fromkeys(
        (DISCOUNT, TEMPERATURE),
        "a diffusion model's reward is terminal, its score the action: no discount, no entropy",
    ),
    CORRELATED: "the noise of a diffusion model is independent in every coordinate",
}
_SAMPLES = "of samples of the last state: no grid and no dynamics enter"
NOT_APPLICABLE: Mapping[str, Mapping[str, str]] = {
    "Theorem 3.1": _NO_REWARD,
    "two meanings of an action": {
        TEMPERATURE: "the next state has no entropy that a policy chooses: such problems are "
        "refused (view A: the row above)",
        CORRELATED: "transition densities of noise that mixes are refused (view A: the row above)",
    },
    "... as an algorithm": {
        **_NO_REWARD,
        CORRELATED: _DENOISING[CORRELATED],
        UNEVEN: "steps are weighed by their noise, not by their length",
    },
    "value network": {**_DENOISING, ACTION: "no KL enters the value network's target"},
    "2023, normalisation": dict.fromkeys(
        (UNEVEN, TIME), "at one state and one time: no grid enters, and time is a parameter"
    ),
    "Wang, Zariphopoulou & Zhou 2020": dict.fromkeys(
        (ACTION, DISCOUNT, TEMPERATURE), _NO_REWARD[ACTION]
    ),
    "Zhao, Tang & Yao 2023": {TIME: "a stationary problem without a horizon"},
    "Tang & Zhou 2024": {
        TIME: "a stationary problem without a horizon",
        UNEVEN: "solved in continuous time: no grid enters",
    },
    "Gibbs policies": dict.fromkeys(
        (UNEVEN, TIME), "at one state and one time: no grid enters, and time is a parameter"
    ),
    "exploratory HJB": {UNEVEN: "steps of time are the solver's own, and even"},
    "Adjoint matching": _DENOISING,
    "KL-regularised optimum": _DENOISING,
    "KL-reward frontier": {**_DENOISING, UNEVEN: _SAMPLES, TIME: _SAMPLES},
}


class Watch:
    """A profile function that collects properties of what ``ctrl`` and its sibling work on."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._asked: dict[tuple[int, bool], object] = {}  # kept, or another would have its id
        self._folders = tuple(str(Path(p.__file__ or "").parent) for p in (ctrl, diffusion_envs))

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        """Look at the arguments of a call."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(self._folders):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = {name: frame.f_locals[name] for name in names if name in frame.f_locals}
        paid = not code.co_filename.endswith(_ROLL_OUTS)
        for name, value in values.items():
            self._number(name, value)
            if isinstance(value, ctrl.TimeGrid):
                self._steps(value.nodes.diff())
            elif isinstance(value, ctrl.Paths):
                self._steps(value.grid.nodes.diff(dim=-1))
            elif isinstance(value, ctrl.linear.Gaussian):
                self._mark(SEVERAL, value.mean.shape[-1] > 1)
            elif isinstance(value, LinearQuadratic | TimeVarying):
                self._linear(value)
            elif isinstance(value, ctrl.ControlProblem | ctrl.ControlledSDE):
                self._problem(value, values, paid)

    def _mark(self, name: str, there: object) -> None:
        if there:
            self.seen.add(name)

    def _steps(self, steps: Tensor) -> None:
        """Step sizes [..., steps], those after a path's end being 0."""
        if _plain(steps):
            steps = steps[steps > 0]
            self._mark(UNEVEN, len(steps) and float(steps.max() - steps.min()) > 1e-6)

    def _number(self, name: str, value: object) -> None:
        """A rate or a weight, by its name; step sizes; a schedule."""
        if name in ("discount", "temperature", "kl_weight"):
            number = isinstance(value, float | int | Tensor) and _plain(value)
            there = callable(value) or (number and bool(torch.as_tensor(value).gt(0).any()))
            of = {"discount": DISCOUNT, "temperature": TEMPERATURE, "kl_weight": ACTION}
            self._mark(of[name], there)
        elif name in ("step_sizes", "steps") and isinstance(value, Tensor) and value.ndim:
            self._steps(value)
        elif name == "schedule" and hasattr(value, "g2"):
            times = torch.tensor([0.3, 0.4], dtype=torch.float64)
            self._mark(TIME, float(_answer(value.g2, times).diff().abs().sum()) > 0)  # type: ignore[attr-defined]  # seen by hasattr
        elif name == "G" and isinstance(value, Tensor) and _plain(value) and value.ndim > 1:
            self._noise(value)

    def _noise(self, columns: Tensor) -> None:
        """sigma, [..., coordinates, Brownian motions]."""
        both = columns @ columns.mT
        self._mark(CORRELATED, (both - torch.diag_embed(both.diagonal(0, -2, -1))).abs().sum() > 0)
        self._mark(SEVERAL, columns.shape[-2] > 1)

    def _linear(self, lq: LinearQuadratic | TimeVarying) -> None:
        if isinstance(lq, TimeVarying):
            self.seen.add(TIME)
            lq = lq.at(torch.tensor(0.1, dtype=torch.float64))
        if not _plain(lq.A) or not _plain(lq.sigma):
            return
        self._mark(SEVERAL, lq.A.shape[-1] > 1)
        self._mark(ACTION, lq.N.abs().sum() > 0)
        self._noise(lq.sigma)
        self._number("discount", lq.discount)
        self._number("temperature", lq.temperature)

    def _problem(
        self, given: ctrl.ControlProblem | ctrl.ControlledSDE, values: Mapping[str, Any], paid: bool
    ) -> None:
        """Ask a problem's functions, at the first states that are beside it."""
        where = None if (id(given), paid) in self._asked else _where(values)
        if where is None:
            return
        self._asked[id(given), paid] = given
        t, x, a = where
        self._mark(SEVERAL, x[:1].numel() > 1)
        sde = given.sde if isinstance(given, ctrl.ControlProblem) else given
        if sde is not None:
            self._differs(TIME, sde.drift, where, (t + _STEP, x, a))
            state = (a,) if sde.controls_diffusion else ()
            self._differs(TIME, sde.diffusion, (t, x, *state), (t + _STEP, x, *state))
            if x.ndim == 2:
                self._noise(_answer(lambda: sde.columns(t, x, a)))
        if isinstance(given, ctrl.ControlProblem) and paid:
            self._number("temperature", given.temperature)
            self._number("discount", given.discount)
            if callable(given.discount):
                self._differs(TIME, given.discount, (t, x), (t + _STEP, x))
            if given.running_reward is not None and a is not None:
                self._differs(ACTION, given.running_reward, where, (t, x, a + _STEP))
                self._differs(TIME, given.running_reward, where, (t + _STEP, x, a))

    def _differs(
        self, name: str, function: Callable[..., Any], here: tuple[Any, ...], there: tuple[Any, ...]
    ) -> None:
        one, other = _answer(function, *here), _answer(function, *there)
        self._mark(name, one.shape == other.shape and (one - other).abs().sum() > 0)


def _plain(value: object) -> bool:
    """Whether a number can be looked at: not inside of a ``torch.func`` transform."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]  # there is no public name
    return not isinstance(value, Tensor) or not wrapped(value)


def _answer(function: Callable[..., Any], *arguments: Any) -> Tensor:
    """What a user's function says; nothing where it cannot be asked about these numbers."""
    try:
        with torch.no_grad():
            return torch.as_tensor(function(*arguments), dtype=torch.float64)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return torch.zeros(1, 1, dtype=torch.float64)


def _where(values: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Time, states and actions among a function's arguments, if it has them."""
    for value in values.values():
        if isinstance(value, ctrl.Paths) and _plain(value.states):
            actions = None if value.actions is None else value.actions[:, 0]
            return value.grid.nodes.flatten()[0].to(value.states), value.states[:, 0], actions
    t, x, a = (
        next((values[name] for name in names if isinstance(values.get(name), Tensor)), None)
        for names in (("t", "t0"), ("states", "x"), ("actions", "action", "a"))
    )
    plain = t is not None and x is not None and all(map(_plain, (t, x, a)))
    return (t, x, a) if plain and t is not None and x is not None else None


def measured(claim: Claim) -> tuple[str, ...]:
    """The properties that a claim's problems were seen to have."""
    watch, before = Watch(), sys.getprofile()
    sys.setprofile(watch)
    try:
        for check in claim.body(Setting()):
            if isinstance(check, Sampled):
                next(iter(check.stream))
    finally:
        sys.setprofile(before)
    return tuple(name for name in PROPERTIES if name in watch.seen)


# -- the page ----------------------------------------------------------------------------------


def theorems() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Section, result and claims of every row of docs/theorems.md that names a claim."""
    section = ""
    for line in THEOREMS.read_text(encoding="utf-8").splitlines():
        section = line.removeprefix("## ") if line.startswith("## ") else section
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        names = tuple(name for name in re.findall(r"`([\w-]+)`", cells[-1]) if name in CLAIMS)
        if line.startswith("| ") and len(cells) == 3 and names:
            yield section, re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cells[0]), names


def not_applicable(result: str) -> Mapping[str, str]:
    """Property -> why a result has no part for it."""
    return next((why for text, why in NOT_APPLICABLE.items() if result.startswith(text)), {})


def holes(rows: Mapping[str, Iterable[str]]) -> list[str]:
    """Properties that apply to a result of the first three tables and that none of its claims has.

    Args:
        rows: of the page: name of each claim -> its properties.
    """
    sections = list(dict.fromkeys(section for section, _, _ in theorems()))[:3]
    return [
        f"{result}: {name}"
        for section, result, names in theorems()
        if section in sections
        for name in PROPERTIES
        if name not in not_applicable(result) and not any(name in rows[each] for each in names)
    ]


def page(rows: Mapping[str, Iterable[str]]) -> str:
    """The page: a table for every section, each result before its claims.

    Args:
        rows: name of each claim -> the properties that were seen; declared ones are added.
    """
    text = [
        "# What each theorem is checked on",
        "",
        "Written by `python -m verification.coverage docs/verification_coverage.md`. A theorem is "
        "only as well checked",
        "as its problems are general. yes: while the claim ran, a problem, an equation or a grid "
        "with this property went",
        "through `ctrl` or `diffusion_envs`; said: the claim declares it, where nothing can be "
        "seen (formulas in numbers",
        "alone). A result in bold has what any of its claims has; a number refers to the reason "
        "why the property",
        "does not apply.",
    ]
    reasons: list[str] = []
    section, listed = "", set[str]()
    for each, result, names in theorems():
        if each != section:
            section = each
            text += ["", f"## {section}", "", *_head()]
        why, row = not_applicable(result), list[str]()
        for name in PROPERTIES:
            if name in why and why[name] not in reasons:
                reasons.append(why[name])
            had = any(_mark(rows, claim, name) for claim in names)
            row.append("yes" if had else f"({reasons.index(why[name]) + 1})" if name in why else "")
        text.append(_row(f"**{result}**", row))
        text += [_claim(rows, claim) for claim in names]
        listed.update(names)
    text += ["", "## In no table of theorems", "", *_head()]
    text += [_claim(rows, claim) for claim in CLAIMS if claim not in listed]
    text += ["", "## Why a property does not apply", ""]
    text += [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join(text) + "\n"


def _head() -> list[str]:
    return [_row("claim", PROPERTIES), "| --- |" + " --- |" * len(PROPERTIES)]


def _row(name: str, cells: Iterable[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _claim(rows: Mapping[str, Iterable[str]], claim: str) -> str:
    return _row(f"`{claim}`", [_mark(rows, claim, name) for name in PROPERTIES])


def _mark(rows: Mapping[str, Iterable[str]], claim: str, name: str) -> str:
    if name in rows.get(claim, ()):
        return "yes"
    return "said" if name in CLAIMS[claim].covers else ""


def read(text: str) -> dict[str, tuple[str, ...]]:
    """The rows that a page was made of; declared properties are the claims' own."""
    rows: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            marks = zip(PROPERTIES, cells, strict=True)
            rows[name.strip("`")] = tuple(each for each, mark in marks if mark == "yes")
    return rows


def write(document: Path, names: Iterable[str] = ()) -> None:
    """Measure these claims, or all, and write the page."""
    rows = read(document.read_text(encoding="utf-8")) if document.exists() else {}
    for name in names or CLAIMS:
        rows[name] = measured(CLAIMS[name])
        sys.stderr.write(f"{name}: {', '.join(rows[name])}\n")
    document.write_text(page(rows), encoding="utf-8")
    for hole in holes({name: (*rows.get(name, ()), *CLAIMS[name].covers) for name in CLAIMS}):
        sys.stderr.write(f"no claim of {hole}\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("document", type=Path, help="the page, whose other rows are kept")
    parser.add_argument("claims", nargs="*", metavar="claim", help="all, if none is named")
    options = parser.parse_args()
    if unknown := set(options.claims) - set(CLAIMS):
        parser.error(f"no claim is called {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    write(options.document, options.claims)


if __name__ == "__main__":
    main()
