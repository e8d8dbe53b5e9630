"""Measuring what the right code and every wrong variant show, under several kernels.

Each kernel (``kernels``) has a process of its own, which runs every claim's body on the right code
and on each variant in both precisions and prints what it saw, one JSON line a claim. Of the right
code the largest deviation counts, of a variant the smallest: a tolerance between the two then holds
under every kernel that was measured, and by its room under more.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from verification.claim import Check, Claim, Sampled, Setting
from verification.claims import CLAIMS
from verification.kernels import Kernel
from verification.planting import PlantingError, planted
from verification.tolerances import Right, Tolerance, derive, units_seen

PRECISIONS = ("float64", "float32")
_PILOT = 200_000  # samples that measure a sampled check's effects


@dataclass(frozen=True)
class Observation:
    """Deviations that one claim showed, under one kernel or under several.

    Attributes:
        right: check -> what the right code shows.
        wrong: variant -> check -> deviation.
        refused: variants that the code itself refuses with the error that they name.
        quick: checks that a quick run has too.
        complaints: variants that do not fit or break the code, checks of one name.
    """

    right: Mapping[str, Right] = field(default_factory=dict[str, Right])
    wrong: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    refused: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    complaints: tuple[str, ...] = ()


def observe(claim: Claim, setting: Setting) -> Observation:
    """Run a claim's body on the right code and on every variant, here and now."""
    quick = tuple(check.name for check in claim.body(replace(setting, full=False)))
    full = replace(setting, full=True)
    right: dict[str, Right] = {}
    for check in claim.body(full):
        if check.name in right:
            return Observation(complaints=(f"two checks are called {check.name!r}",))
        precision = str(claim.precision_of(check, setting)).removeprefix("torch.")
        units = check.units if isinstance(check, Check) else 1.0
        deviation = _size(check, standard_error=True)
        right[check.name] = Right(check.route, deviation, precision, units)
    wrong: dict[str, dict[str, float]] = {}
    refused: list[str] = []
    complaints: list[str] = []
    if setting.dtype == torch.float64:
        complaints += [
            f"check {check!r} computes in float32 ({', '.join(operations)}) and does not say so"
            for check, operations in unstated_singles(claim).items()
        ]
    for variant in claim.mistakes:
        effects: dict[str, float] = {}
        try:
            with planted(*variant.edits):
                for check in claim.body(full):
                    effects[check.name] = _size(check)
        except PlantingError as error:
            complaints.append(f"variant {variant.name!r}: {error}")
        except Exception as error:
            if variant.raises is not None and isinstance(error, variant.raises):
                refused.append(variant.name)
            elif not effects:
                complaints.append(
                    f"variant {variant.name!r} breaks the code: {type(error).__name__}: {error}"
                )
        else:
            if variant.raises is not None:
                complaints.append(f"variant {variant.name!r} is not refused with {variant.raises}")
        wrong[variant.name] = effects
    return Observation(right, wrong, tuple(refused), quick, tuple(complaints))


def merged(seen: Sequence[Observation]) -> Observation:
    """Under several kernels: of the right code the largest deviation, of variants the smallest.

    A number that is none is the largest. A check that a variant does not reach under every kernel
    does not see it.
    """
    first, complaints = seen[0], [text for one in seen for text in one.complaints]
    if any(list(one.right) != list(first.right) for one in seen):
        complaints.append("kernels differ in the checks that they reach on the right code")
        return Observation(complaints=tuple(dict.fromkeys(complaints)))
    right = {
        check: replace(
            shown,
            deviation=max((one.right[check].deviation for one in seen), key=_nan_last),
            units=max(one.right[check].units for one in seen),
        )
        for check, shown in first.right.items()
    }
    wrong = {
        variant: {
            check: min((one.wrong[variant][check] for one in seen), key=_nan_last)
            for check in effects
            if all(check in one.wrong[variant] for one in seen)
        }
        for variant, effects in first.wrong.items()
    }
    refused = tuple(name for name in first.refused if all(name in one.refused for one in seen))
    return Observation(right, wrong, refused, first.quick, tuple(dict.fromkeys(complaints)))


def lines(
    claim: Claim, observation: Observation, single: Observation | None = None
) -> tuple[dict[str, Tolerance], list[str]]:
    """A claim's lines of the table in one precision, and complaints (``tolerances.derive``).

    Args:
        claim: that was observed.
        observation: of it.
        single: of it in float32, which tells how many units of round-off its checks gather.
    """
    right = dict(observation.right)
    for check, shown in (single.right if single else {}).items():
        if check in right:
            units = max(right[check].units, units_seen(shown))
            if right[check].route not in ("limit", "sampled"):
                right[check] = replace(right[check], units=units)
    full_only = frozenset(variant.name for variant in claim.mistakes if variant.full)
    table, complaints = derive(
        right,
        observation.wrong,
        frozenset(observation.refused),
        frozenset(observation.quick),
        full_only,
    )
    return table, [*observation.complaints, *complaints]


def measure(claim: Claim, setting: Setting) -> tuple[dict[str, Tolerance], list[str]]:
    """The lines of one claim under this process's kernel, in one precision; and complaints."""
    return lines(claim, observe(claim, setting))


def over_kernels(
    names: Sequence[str], kernels: Sequence[Kernel], told: Callable[[str], None], processes: int = 2
) -> dict[str, dict[str, Observation]]:
    """Precision -> claim -> what it showed under all these kernels, each in its own process.

    A kernel whose process ends early is left out of the claims that it did not reach, and ``told``.
    """
    with ThreadPoolExecutor(processes) as pool:
        parts = list(pool.map(lambda kernel: _under(kernel, names, told), kernels))
    observations: dict[str, dict[str, Observation]] = {precision: {} for precision in PRECISIONS}
    for precision in PRECISIONS:
        for name in names:
            seen = [part[precision, name] for part in parts if (precision, name) in part]
            if seen:
                observations[precision][name] = merged(seen)
            elif precision == "float64":
                observations[precision][name] = Observation(complaints=("no kernel measured it",))
    return observations


def _under(
    kernel: Kernel, names: Sequence[str], told: Callable[[str], None]
) -> dict[tuple[str, str], Observation]:
    if kernel.missing:
        told(f"{kernel.name}: left out, this processor has no {kernel.missing}")
        return {}
    command = [sys.executable, "-m", __name__, *names]
    observations: dict[tuple[str, str], Observation] = {}
    with subprocess.Popen(
        command, env=kernel.environ(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                one = json.loads(line)
                observations[one["precision"], one["claim"]] = _observation(one["observation"])
    if process.returncode:
        told(
            f"{kernel.name}: its process ended with {process.returncode} after "
            f"{len(observations)} lines"
        )
    return observations


def _observation(plain: dict[str, Any]) -> Observation:
    right = {check: Right(**shown) for check, shown in plain["right"].items()}
    lists = {key: tuple(plain[key]) for key in ("refused", "quick", "complaints")}
    return Observation(right, plain["wrong"], **lists)


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _size(check: Check | Sampled, standard_error: bool = False) -> float:
    if isinstance(check, Check):
        return check.deviation
    values = torch.cat(list(_at_most(check.stream, _PILOT))).double()
    if standard_error:
        return float(values.std() / math.sqrt(len(values))) / check.scale
    return abs(float(values.mean()) - check.claimed) / check.scale


def _at_most(stream: Iterator[Tensor] | object, most: int) -> Iterator[Tensor]:
    n = 0
    for batch in stream:  # type: ignore[attr-defined]
        yield batch.detach().flatten()
        n += batch.numel()
        if n >= most:
            return


# -- what a body computes in ---------------------------------------------------------------------

# Operations that make float32 numbers without rounding any: from nothing, or as they were.
_EXACT = (
    "_to_copy", "cat", "clone", "copy_", "stack", "index", "select", "slice", "view", "reshape",
    "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "detach", "alias", "split",
    "unbind", "flip", "gather", "neg", "abs", "sort", "repeat", "lift_fresh",
)  # fmt: skip


class _Rounds(TorchDispatchMode):
    """Notices operations on float32 numbers that round."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and keep its name if it rounds."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        single = [x for x in args if isinstance(x, Tensor) and x.dtype == torch.float32]
        results = result if isinstance(result, tuple | list) else [result]
        made = any(isinstance(x, Tensor) and x.dtype == torch.float32 for x in results)
        if single and made and name not in _EXACT and not name.endswith("_like"):
            self.operations.add(name)
        return result


def unstated_singles(claim: Claim) -> dict[str, tuple[str, ...]]:
    """Checks before which a body, asked for float64, rounded in float32, and does not say so.

    With each the operations that rounded. A claim says so by its ``precision``, a check by its own
    (float64, where its numbers are such that float32 holds them exactly).
    """
    unstated: dict[str, tuple[str, ...]] = {}
    checks = iter(claim.body(Setting()))
    while claim.precision is None:
        with _Rounds() as rounds:
            check = next(checks, None)
        if check is None:
            break
        stated = check.precision if isinstance(check, Check) else None
        if rounds.operations and stated is None:
            unstated[check.name] = tuple(sorted(rounds.operations))
    return unstated


def main(names: Sequence[str]) -> None:
    """Observe these claims under the kernel that this process was started with; print JSON."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a body prints does not get between
    for name in names:
        for precision in PRECISIONS:
            if precision == "float32" and not CLAIMS[name].single:
                continue
            observation = observe(CLAIMS[name], Setting(dtype=getattr(torch, precision)))
            plain = {"claim": name, "precision": precision, "observation": asdict(observation)}
            out.write(json.dumps(plain) + "\n")
            out.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
