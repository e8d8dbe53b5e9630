"""Kinds of mistakes, each planted where it did not stand yet, with a check that must see it.

Each kind was found once by hand, in one place, where no test saw it: a factor forgotten in one of
three updates, a name left out of a stream, rows in another order, a sum for a mean, a process that
does as if it were alone. A kind is a way to be wrong, so it is planted into other places, and a
check, an answer by another route, must see it there. The checks are few: one for each place where
such mistakes meet.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from verification import mistakes
from verification.planting import planted

WORTH = {"one": 1.0, "two": -2.0, "three": 5.0}


def by_words(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward that depends on the prompt, whatever else."""
    return images.mean((1, 2, 3)) * torch.tensor([WORTH[each] for each in prompts])


class Kinds:
    """The checks of a module, each with the mistakes that it must see."""

    def __init__(self) -> None:
        self._tables: dict[Callable[[Path], None], str] = {}

    def sees(self, table: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
        """Register a check with the mistakes that it must see, a table as of a claim."""

        def register(check: Callable[[Path], None]) -> Callable[[Path], None]:
            self._tables[check] = table
            return check

        return register

    def tests(self) -> tuple[Callable[..., None], Callable[..., None]]:
        """For pytest: the right code is right, and each planted mistake is seen."""
        cases = [(c, m) for c, table in self._tables.items() for m in mistakes.read(table)]
        names = [f"{check.__name__}: {mistake.name}" for check, mistake in cases]

        @pytest.mark.parametrize("check", self._tables, ids=lambda check: check.__name__)
        def right(check, tmp_path, as_users_run_it):
            check(tmp_path)

        @pytest.mark.parametrize(("check", "mistake"), cases, ids=names)
        def seen(check, mistake, tmp_path, as_users_run_it):
            wrong = (AssertionError, ValueError, pytest.fail.Exception)  # or what the code refuses
            with planted(*mistake.edits), pytest.raises(wrong):
                check(tmp_path)

        return right, seen
