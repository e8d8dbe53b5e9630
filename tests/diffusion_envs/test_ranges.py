"""Settings that are numbers: what is no number is refused by its name, whichever class has it."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from diffusion_envs import samplers
from diffusion_envs.cifar10 import Cifar10Model
from diffusion_envs.ranges import (
    require_count,
    require_not_negative,
    require_numbers,
    require_positive,
)
from diffusion_envs.runs.early_stopping import StopRule
from diffusion_envs.runs.method_names import OBJECTIVES, OPTIMISERS
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.sd15 import StableDiffusion
from diffusion_envs.training.kl_controller import TargetKL
from diffusion_envs.training.update_size import UpdateSize

# Types are checked at every call in tests only: users see what the classes say themselves.
pytestmark = pytest.mark.usefixtures("as_users_run_it")
KINDS = [
    *OBJECTIVES.values(),
    *OPTIMISERS.values(),
    *(UpdateSize, RunOptions, StopRule, TargetKL, StableDiffusion, Cifar10Model),
    *(samplers.DDIM, samplers.FlowSDE, samplers.CPS),
]
NEEDED: dict[type, dict[str, Any]] = {TargetKL: {"nats": 2.5}}


def numbers_of(kind: type) -> dict[str, bool]:
    """Whether each field that is a number is a whole one, by name."""
    hints = typing.get_type_hints(kind)
    kinds = {
        f.name: typing.get_args(hints[f.name]) or (hints[f.name],) for f in dataclasses.fields(kind)
    }
    return {
        name: float not in of
        for name, of in kinds.items()
        if all(each in (int, float, type(None)) for each in of)
    }


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_text_in_the_place_of_a_number_is_refused_by_name(kind):
    names = numbers_of(kind)
    assert names or not dataclasses.fields(kind) or kind in OPTIMISERS.values()
    for name, whole in names.items():
        for bad in ("7e-4", "3", *([2.5] if whole else [])):
            with pytest.raises((ValueError, TypeError), match=f"^{name} must be .*got {bad!r}"):
                kind(**{**NEEDED.get(kind, {}), name: bad})


@dataclass(frozen=True)
class _Mixed:
    size: int | tuple[int, int] | None = (3, 5)
    share: int | float = 0.25
    count: int | None = None

    def __post_init__(self) -> None:
        require_numbers(self)


def test_what_may_be_something_else_too_is_left_alone():
    assert _Mixed(share=4, count=7).size == (3, 5)
    assert _Mixed(count=typing.cast(int, np.int64(7))).count == 7
    with pytest.raises(ValueError, match=r"^count must be an integer, got True"):
        _Mixed(count=True)
    with pytest.raises(ValueError, match=r"^share must be a number, got None"):
        _Mixed(share=typing.cast(Any, None))


@pytest.mark.parametrize(
    ("refuse", "value", "message"),
    [
        (require_positive, "0.3", r"^rate must be a positive finite number, got '0\.3'$"),
        (require_positive, float("inf"), "^rate must be a positive finite number, got inf$"),
        (require_positive, True, "^rate must be a positive finite number, got True$"),
        (require_not_negative, "0.3", r"^rate must be at least 0 and finite, got '0\.3'$"),
        (require_not_negative, -0.3, r"^rate must be at least 0 and finite, got -0\.3$"),
        (require_count, 0, "^rate must be an integer of at least 1, got 0$"),
        (require_count, 6.0, r"^rate must be an integer of at least 1, got 6\.0$"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_value(refuse, value, message):
    with pytest.raises(ValueError, match=message):
        refuse(rate=value)


def test_the_least_of_a_count_is_named():
    require_count(least=3, groups=3)
    with pytest.raises(ValueError, match=r"^groups must be an integer of at least 3, got 2$"):
        require_count(least=3, groups=2)
