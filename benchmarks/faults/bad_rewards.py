"""Rewards that misbehave: an error that names the reward, or no effect; the run goes on either way.

A run of the embedded model is scored by a reward that misbehaves in the second update. Where it
must be refused the run ends, says why, and is resumed with the reward as it should be: its numbers
are then those of a run without faults, bit for bit. Where it must have no effect, they are so at
once.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.faults import small_run
from benchmarks.faults.row import Row
from diffusion_envs import rewards
from diffusion_envs.rewards.contract import LARGEST

SAMPLES = ("an exception", "NaN", "its pictures changed", "torch.manual_seed")  # the short part
_Returned = Callable[[Tensor], Any]
_AT = 2  # call of the reward that misbehaves: the first is of held-out samples


class Breaking(Fraction):
    """A real number that breaks where it is read."""

    def __float__(self) -> float:
        """Never."""
        raise ArithmeticError("no float")


def _raising(error: BaseException) -> _Returned:
    def returned(values: Tensor) -> Any:
        raise error

    return returned


def _with(value: float) -> _Returned:
    def returned(values: Tensor) -> Tensor:
        return torch.cat([values[:1], torch.full_like(values[1:2], value), values[2:]])

    return returned


def _attached(values: Tensor) -> Tensor:
    with torch.enable_grad():
        return values * torch.ones(len(values), requires_grad=True)


# What the run must end by, naming the reward; the words are part of what it says.
REFUSED: dict[str, tuple[_Returned, str]] = {
    "an exception": (_raising(KeyError("no such word")), "raised KeyError"),
    "SystemExit": (_raising(SystemExit(0)), "raised SystemExit"),
    "one number too few": (lambda v: v[:-1], "got shape"),
    "one number too many": (lambda v: torch.cat([v, v[:1]]), "got shape"),
    "a column": (lambda v: v[:, None], "got shape"),
    "one number for all": (lambda v: v.mean(), "got shape"),
    "a float": (lambda v: float(v.mean()), "got float"),
    "a string": (lambda v: "good", "got str"),
    "strings": (lambda v: [str(x) for x in v.tolist()], "sample 0 got str"),
    "None": (lambda v: None, "got NoneType"),
    "a list with None": (lambda v: [None, *v.tolist()[1:]], "sample 0 got NoneType"),
    "a generator": (lambda v: (x for x in v.tolist()), "got generator"),
    "nested lists": (lambda v: [[x] for x in v.tolist()], "sample 0 got list"),
    "a dictionary": (lambda v: {"reward": v}, "got dict"),
    "objects": (lambda v: np.array([object()] * len(v)), "got a numpy array of object"),
    "complex numbers": (lambda v: v.to(torch.complex64), "got complex"),
    "a sparse tensor": (lambda v: v.to_sparse(), "not dense"),
    "a tensor without values": (lambda v: v.to("meta"), "cannot be read"),
    "numbers that break": (lambda v: [Breaking(1)] * len(v), "cannot be read"),
    "a gradient attached": (_attached, "needs a gradient"),
    "NaN": (_with(math.nan), "sample 1 ("),
    "+inf": (_with(math.inf), "sample 1 ("),
    "-inf": (_with(-math.inf), "sample 1 ("),
    "1e38": (_with(1e38), "sample 1 ("),
    "the lowest float": (_with(torch.finfo().min), "sample 1 ("),
}


def _changes_pictures(images: Tensor, prompts: Any) -> None:
    images.mul_(-7.0)


def _changes_prompts(images: Tensor, prompts: Any) -> None:
    prompts.clear()


def _wants_gradients(images: Tensor, prompts: Any) -> None:
    images.requires_grad_()
    torch.set_grad_enabled(True)


# What must have no effect, done after the reward was computed: (pictures, prompts) -> nothing.
IGNORED: dict[str, Callable[[Tensor, Any], Any]] = {
    "its pictures changed": _changes_pictures,
    "the list of prompts emptied": _changes_prompts,
    "torch.manual_seed": lambda images, prompts: torch.manual_seed(0),
    "seeds of numpy and random": lambda images, prompts: (np.random.seed(0), random.seed(0)),  # noqa: NPY002  # what people's rewards do
    "torch.set_grad_enabled(False)": lambda images, prompts: torch.set_grad_enabled(False),
    "requires_grad of its pictures": _wants_gradients,
    "torch.set_default_dtype": lambda images, prompts: torch.set_default_dtype(torch.float64),
    "torch.set_default_device": lambda images, prompts: torch.set_default_device("meta"),
    "torch.set_num_threads": lambda images, prompts: torch.set_num_threads(3),
    "torch.use_deterministic_algorithms": (
        lambda images, prompts: torch.use_deterministic_algorithms(True)
    ),
    "a list instead of a tensor": lambda images, prompts: None,
    "a numpy array": lambda images, prompts: None,
    "float64": lambda images, prompts: None,
}
_FORMS: dict[str, Callable[[Tensor], Any]] = {
    "a list instead of a tensor": lambda v: v.tolist(),
    "a numpy array": lambda v: v.numpy(),
    "float64": lambda v: v.double(),
}


def _misbehaving(
    returned: Callable[[Tensor], Any], after: Callable[[Tensor, Any], Any] | None = None
) -> Callable[[], AbstractContextManager[None]]:
    """A fault of a run: its reward misbehaves in one call, or does something after each."""

    @contextmanager
    def fault() -> Iterator[None]:
        own, calls = rewards.Colour.__call__, 0

        def call(self: rewards.Colour, images: Tensor, prompts: Sequence[str]) -> Any:
            nonlocal calls
            values = own(self, images, prompts)
            if self.channel != "red":
                return values
            calls += 1
            if after is not None:
                after(images, prompts)
                return returned(values)
            return returned(values) if calls == _AT else values

        with patch.object(rewards.Colour, "__call__", call):
            yield

    return fault


def refused(folder: Path, names: Sequence[str]) -> Row:
    """Whole runs that a reward ends, and that go on without the fault."""
    plain, failed = small_run.uninterrupted().results, list[str]()
    for name in names:
        returned, words = REFUSED[name]
        place = folder / f"refused-{names.index(name)}" / "run"
        ended = small_run.run(place, _misbehaving(returned))
        named = ended.code == 2 and ended.in_words and words in ended.said
        named = named and ("Colour" in ended.said or "red" in ended.said)
        again = small_run.run(place)
        kept = again.code == 0 and not small_run.first_difference(small_run.results(place), plain)
        if not (named and kept):
            failed.append(f"{name}: {ended.last}; then {again.last}")
    return Row(
        f"a reward that misbehaves: {', '.join(names)}",
        "a call in a run",
        "an error that names the reward (and the sample); resumed, the same numbers bit for bit",
        len(names),
        len(names) - len(failed),
        failed[0] if failed else "",
    )


def ignored(folder: Path, names: Sequence[str]) -> Row:
    """Whole runs on which a reward's side effects have no effect."""
    plain, failed = small_run.uninterrupted().results, list[str]()
    for name in names:
        place = folder / f"ignored-{names.index(name)}" / "run"
        form = _FORMS.get(name, lambda values: values)
        ended = small_run.run(place, _misbehaving(form, IGNORED[name]))
        differs = None
        if ended.code == 0:
            differs = small_run.first_difference(small_run.results(place), plain)
        if ended.code or differs is not None:
            failed.append(f"{name}: {ended.last if ended.code else differs}")
    return Row(
        f"a reward with side effects, or of another form: {', '.join(names)}",
        "every call in a run",
        "the same numbers bit for bit",
        len(names),
        len(names) - len(failed),
        failed[0] if failed else "",
    )


def interrupted(folder: Path) -> Row:
    """A reward that raises KeyboardInterrupt: an interrupt, as of a person."""
    plain, place = small_run.uninterrupted().results, folder / "interrupted" / "run"
    ended = small_run.run(place, _misbehaving(_raising(KeyboardInterrupt())))
    again = small_run.run(place)
    same = again.code == 0 and not small_run.first_difference(small_run.results(place), plain)
    held = ended.code == 130 and "--resume" in ended.said and same
    return Row(
        "a reward that raises KeyboardInterrupt",
        "a call in a run",
        "the run ends as by Ctrl-C, and goes on to the same numbers bit for bit",
        1,
        int(held),
        "" if held else f"{ended.last}; then {again.last}",
    )


def fuzzed(tries: int) -> Row:
    """Whatever is returned, at random: a RewardError by name, or finite float32 numbers."""
    draw = random.Random(18)
    images = torch.linspace(0, 1, 3 * 3 * 4 * 4).view(3, 3, 4, 4)
    leaves: list[Callable[[], Any]] = [
        lambda: draw.uniform(-2, 2),
        lambda: draw.choice([math.nan, math.inf, -math.inf, 1e38, -1e300, -0.0, 1e-320]),
        lambda: draw.choice(
            [None, "1", b"1", 1j, 10**400, True, object(), Breaking(1), Fraction(1)]
        ),
        lambda: draw.choice([np.float16(2), np.int8(1), np.complex64(1), np.str_("a"), np.nan]),
        lambda: torch.tensor(draw.choice([1, 0.5, 1j, True])),
        lambda: [draw.uniform(-1, 1)],
    ]
    dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.uint8]

    def returned() -> Any:
        kind, length = draw.randrange(6), draw.choice([3, 3, 3, 0, 1, 2, 4])
        values = [draw.choice(leaves)() for _ in range(length)]
        if kind == 0:
            return values
        if kind == 1:
            return tuple(draw.uniform(-1, 1) for _ in range(length))
        if kind == 2:
            return np.array([draw.choice(leaves[:2])() for _ in range(length)])
        if kind == 3:
            return torch.randn(draw.choice([(3,), (3, 1), (1, 3), (), (0,)])).to(
                draw.choice(dtypes)
            )
        if kind == 4:
            return draw.choice(leaves)()
        return np.array(values, dtype=object)

    failed = list[str]()
    for _ in range(tries):
        value = returned()

        def my_reward(pictures: Tensor, prompts: Sequence[str], value: Any = value) -> Any:
            return value

        try:
            told = rewards.score(my_reward, images, ["a", "b", "c"])
        except rewards.RewardError as error:
            if "my_reward" not in str(error):
                failed.append(f"{value!r:.60}: {error}")
        except Exception as error:
            failed.append(f"{value!r:.60}: {type(error).__name__}: {error}")
        else:
            finite = bool((told.abs() <= LARGEST).all())
            if told.dtype != torch.float32 or told.shape != (3,) or not finite:
                failed.append(f"{value!r:.60}: {told}")
    return Row(
        "values at random",
        "what a reward returns",
        "an error that names it, or finite numbers, one for each picture",
        tries,
        tries - len(failed),
        failed[0] if failed else "",
    )


def rows(folder: Path, *, sample: bool) -> Iterator[Row]:
    """What becomes of runs whose reward misbehaves."""
    small_run.uninterrupted()
    yield refused(folder, [name for name in REFUSED if not sample or name in SAMPLES])
    yield ignored(folder, [name for name in IGNORED if not sample or name in SAMPLES])
    if not sample:
        yield interrupted(folder)
    yield fuzzed(200 if sample else 2000)
