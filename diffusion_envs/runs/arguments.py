"""What ``finetune`` is called with: arguments of another kind are refused with what to say instead.

Command lines name methods, samplers and rewards by words; from Python they are objects. Whoever
knows the one and writes the other is told the object that the word stands for.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from diffusion_envs import objectives, samplers
from diffusion_envs.objectives import Objective, ScoreAsAction
from diffusion_envs.rewards.registry import require_reward
from diffusion_envs.runs.method_names import OBJECTIVES, OPTIMISERS, SAMPLERS
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.training import optimisers
from diffusion_envs.training.optimisers import Optimiser
from diffusion_envs.training.update_size import UpdateSize


@runtime_checkable
class _Bindable(Protocol):
    """What a sampler is before it is put on a model's noise levels."""

    @property
    def has_density(self) -> bool:
        """Whether its steps have a density."""
        ...

    @property
    def label(self) -> str:
        """Its name for reports."""
        ...

    def bind(self, table: Any, steps: int, prediction_type: Any, /) -> Any:
        """Its steps on noise levels."""
        ...


def require_kinds(
    *,
    reward: Any,
    objective: Any,
    optimiser: Any,
    sampler: Any,
    size: Any,
    options: Any,
    seed: Any,
    output: Any = "runs",
) -> None:
    """Refuse arguments of ``finetune`` that are of another kind than it takes.

    Raises:
        TypeError: naming the argument, what it is, and what to pass instead.
    """
    require_reward("reward", reward)
    _require("objective", objective, Objective, _objective_at, objectives)
    if optimiser is not None:
        _require("optimiser", optimiser, Optimiser, _optimiser_at, optimisers)
    _require("sampler", sampler, _Bindable, _sampler_at, samplers)
    for name, value, kind in (("size", size, UpdateSize), ("options", options, RunOptions)):
        if not isinstance(value, kind):
            raise TypeError(
                f"{name} must be {'an' if kind is UpdateSize else 'a'} {kind.__name__}, got "
                f"{value!r:.80}: {name}={_call(kind, value)}"
            )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {seed!r}")
    if not isinstance(output, str | Path):
        raise TypeError(
            f"output must name the folder of the run, such as 'runs/mine', got {output!r:.80}"
        )


def refuse_unknown(arguments: Iterable[str], known: Iterable[str], settings: Any) -> None:
    """Refuse names that ``finetune`` does not have, and say where they belong.

    Args:
        arguments: by which it was called.
        known: its own.
        settings: the objective that it was called with; None for the usual one.

    Raises:
        TypeError: naming one of them.
    """
    known = list(known)
    for name in arguments:
        if name in known:
            continue
        of_objective = [settings if isinstance(settings, type) else type(settings)]
        of_objective += [ScoreAsAction, *OBJECTIVES.values()]
        places = [
            ("the objective's, objective=objectives", of_objective),
            ("the sampler's, sampler=samplers", [samplers.DDIM]),
            ("the optimiser's, optimiser=optimisers", OPTIMISERS.values()),
        ]
        for place, kinds in places:
            for kind in kinds:
                if name in getattr(kind, "__dataclass_fields__", ()):
                    raise TypeError(
                        f"{name} is no argument of finetune: it is {place}.{kind.__name__}"
                        f"({name}=...)"
                    )
        near = difflib.get_close_matches(name, known, n=1)
        others = f" (did you mean {near[0]}?)" if near else f"; there are {', '.join(known)}"
        raise TypeError(f"{name} is no argument of finetune{others}")


def _require(name: str, value: Any, kind: Any, named: Any, module: Any) -> None:
    """Refuse a class, a word or anything else where an object is asked for."""
    if isinstance(value, kind) and not isinstance(value, type):
        return
    place = f"{module.__name__.rpartition('.')[2]}."
    if isinstance(value, type):
        own = value.__module__.startswith(module.__name__)
        raise TypeError(
            f"{name} must be an object, got the class {value.__name__}: make one, "
            f"{name}={place if own else ''}{value.__name__}(...)"
        )
    article = "an" if name[0] in "aeiou" else "a"
    example = (named(value) if isinstance(value, str) else None) or named("")
    raise TypeError(f"{name} must be {article} {name}, got {value!r:.80}: {name}={place}{example}")


def _objective_at(word: str) -> str | None:
    return _entry_at(word, OBJECTIVES, "ScoreAsAction()")


def _optimiser_at(word: str) -> str | None:
    return _entry_at(word, OPTIMISERS, "AdamW()")


def _entry_at(word: str, table: Mapping[str, type], usual: str) -> str | None:
    """How an entry of a table is made, by its name there or that of its class, in any case."""
    if not word:
        return usual
    for name, kind in table.items():
        if word.lower().replace("_", "-") in (name, kind.__name__.lower()):
            return f"{kind.__name__}()"
    return None


def _sampler_at(word: str) -> str | None:
    if not word:
        return "DDIM()"
    if (known := SAMPLERS.get(word.lower())) is not None:
        return repr(known)
    return f"Scheduler({word!r})" if word.endswith("Scheduler") else None


def _call(kind: type, value: Any) -> str:
    """How the dataclass is made of a mapping, or of a number as its first field."""
    names = [field.name for field in fields(kind)]
    if isinstance(value, Mapping) and all(name in names for name in value):
        return f"{kind.__name__}({_settings(value)})"
    example = value if isinstance(value, int) and not isinstance(value, bool) else "..."
    return f"{kind.__name__}({names[0]}={example})"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
