"""Options of a command line that are objects: what tyro makes of their words, and the way back.

Each is named by one word (a sampler, a budget of KL, who prefers) or by several (a reward, judges).
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import docstring_parser
import tyro

from diffusion_envs import rewards, samplers
from diffusion_envs.cifar10.pictures import Pictures
from diffusion_envs.objectives.distributional import FirstVariation, NearTarget, mean_reward
from diffusion_envs.preferences import Preference, Recorded
from diffusion_envs.rewards import registry
from diffusion_envs.rewards.registry import OWN
from diffusion_envs.runs.early_stopping import StopRule
from diffusion_envs.runs.method_names import SAMPLERS, entry, name_of, sampler_named
from diffusion_envs.training.energy import TrainingData
from diffusion_envs.training.kl_controller import TargetKL

STOP = {"stop_z": "z", "stop_path_kl": "max_path_kl", "stop_every": "every"}


def _judges(words: list[str]) -> dict[str, rewards.Reward]:
    pairs = [word.partition("=") for word in words]
    if bad := [name for name, equals, reward in pairs if not (name and equals and reward)]:
        raise ValueError(f"judges must be NAME=REWARD, got {bad[0]!r}")
    return {name: registry.Words((reward,)) for name, _, reward in pairs}


def reward_words(made: Any) -> str:
    """What to write for a reward."""
    return " ".join(made.words) if isinstance(made, registry.Words) else name_of(made, {})


def _preference(word: str) -> Preference | None:
    module, colon, name = word.partition(":")
    if colon and name.isidentifier() and module.replace(".", "_").isidentifier():
        return entry("preferences", word, {}, OWN)
    return None if word == "None" else Recorded(Path(word))


def _variation(name: str) -> FirstVariation:
    if name == "mean":
        return mean_reward
    kind, _, target = name.partition(":")
    try:
        if kind != "near":
            raise ValueError(kind)
        return NearTarget(float(target))
    except ValueError:
        raise ValueError(f"must be mean or near:REWARD such as near:5.0, got {name!r}") from None


def variation_name(made: Any) -> str:
    """What to write for a first variation."""
    return f"near:{made.target}" if isinstance(made, NearTarget) else "mean"


# type, how it is written, a word made an object, an object made words
_PRIMITIVES: list[tuple[Any, str, Callable[[str], Any], Callable[[Any], str]]] = [
    (FirstVariation, "mean|near:REWARD", _variation, variation_name),
    (
        samplers.Sampler,
        "NAME",
        lambda word: sampler_named("sampler", word),
        lambda made: (
            made.name
            if isinstance(made, samplers.Scheduler) and made not in SAMPLERS.values()
            else name_of(made, SAMPLERS)
        ),
    ),
    (
        TrainingData | None,
        "FOLDER",
        lambda word: None if word == "None" else Pictures(Path(word)),
        lambda made: str(made.folder) if isinstance(made, Pictures) else "None",
    ),
    (
        TargetKL | None,
        "NATS",
        lambda word: None if word == "None" else TargetKL(float(word)),
        lambda made: "None" if made is None else str(made.nats),
    ),
    (
        Preference | None,
        f"FILE|{OWN}",
        _preference,
        lambda made: (
            str(made.path) if isinstance(made, Recorded) else name_of(made, {"None": None})
        ),
    ),
]
WORDS = tyro.constructors.ConstructorRegistry()


@WORDS.primitive_rule
def _one_word(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Objects that are named by one word."""
    for kind, metavar, make, write in _PRIMITIVES:
        if info.type == kind:
            return tyro.constructors.PrimitiveConstructorSpec(
                nargs=1,
                metavar=metavar,
                instance_from_str=lambda words, make=make: make(words[0]),
                is_instance=lambda value: True,
                str_from_instance=lambda made, write=write: [write(made)],
            )
    if info.type == (bool | str):
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="PROJECT",
            instance_from_str=lambda words: words[0] if words else True,
            is_instance=lambda value: isinstance(value, bool | str),
            str_from_instance=lambda value: [str(value)],
        )
    if info.type == rewards.Reward:
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar=f"NAME|{OWN}|NAME=WEIGHT ...",
            instance_from_str=lambda words: registry.Words(tuple(words)),
            is_instance=lambda value: True,
            str_from_instance=lambda made: reward_words(made).split(),
        )
    if info.type == Mapping[str, rewards.Reward]:
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="NAME=REWARD",
            instance_from_str=_judges,
            is_instance=lambda value: True,
            str_from_instance=lambda made: [f"{k}={reward_words(v)}" for k, v in made.items()],
        )
    return None


@WORDS.struct_rule
def _stop_rule(
    info: tyro.constructors.StructTypeInfo,
) -> tyro.constructors.StructConstructorSpec | None:
    """A stop rule by its three options; its samples are the evaluation's."""
    if info.type is not StopRule:
        return None
    explained = {
        p.arg_name: p.description for p in docstring_parser.parse_from_object(StopRule).params
    }
    kinds = {f.name: f.type for f in dataclasses.fields(StopRule)}
    return tyro.constructors.StructConstructorSpec(
        instantiate=lambda **values: StopRule(**{STOP[flag]: v for flag, v in values.items()}),
        fields=tuple(
            tyro.constructors.StructFieldSpec(
                name=flag,
                type=kinds[name],  # pyright: ignore[reportArgumentType]  # never a string here
                default=getattr(info.default, name),
                helptext=explained[name],
            )
            for flag, name in STOP.items()
        ),
    )
