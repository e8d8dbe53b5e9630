"""Numbers that settings may have: what is out of range, or no number at all, is refused by name.

A number that was read from a file may be text ('1e-3' is, in YAML): it is told as such.
"""

import math
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, get_args


def require_numbers(settings: Any) -> None:
    """Refuse what is no number in a dataclass's fields of numbers, by name.

    Args:
        settings: a dataclass; fields that are declared ``int``, ``float`` or either, or None beside
            them, are looked at.

    Raises:
        ValueError: naming the field and its value.
    """
    for field in fields(settings):
        kinds, value = get_args(field.type) or (field.type,), getattr(settings, field.name)
        numbers_only = all(kind in (int, float, type(None)) for kind in kinds)
        if not numbers_only or (value is None and type(None) in kinds):
            continue
        whole = float not in kinds
        if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
            what = "an integer" if whole else "a number"
            raise ValueError(f"{field.name} must be {what}, got {value!r}")


def require_positive(**settings: Any) -> None:
    """Refuse what is not a positive finite number, by name.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, value in settings.items():
        if not (_is_number(value) and value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a positive finite number, got {value!r}")


def require_not_negative(**settings: Any) -> None:
    """Refuse what is negative, not finite or no number, by name.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, value in settings.items():
        if not (_is_number(value) and value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be at least 0 and finite, got {value!r}")


def require_count(*, least: int = 1, **counts: Any) -> None:
    """Refuse what is not a whole number of at least ``least``, by name.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
