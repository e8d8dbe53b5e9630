"""The settings of a run as plain JSON, and as objects again.

Whoever starts a run, from Python or from the command line, the same is stored: dataclasses by the
name of their class and their fields, functions and objects by the name that imports them. So every
run can be made again from its folder; what has no such name (a lambda, a function of a script) has
to be named when it is.
"""

import dataclasses
import importlib
import math
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from diffusion_envs.models.protocol import Model
from diffusion_envs.prompt import Prompt
from diffusion_envs.rewards.contract import load, name_of_loaded

_KINDS = ("class", "function", "loaded", "instance")
_ANY_TIME = (  # no number of an update depends on them
    *("updates", "model.device", "model.sharded", "options.wandb", "options.progress"),
    *("options.wandb_name", "options.frontier_samples"),
    *("options.reward_timeout", "options.overlap", "options.process_timeout"),
)
_SERVERS = ("diffusion_envs.rewards.remote:Remote", "diffusion_envs.rewards.vlm_judge:VLMJudge")
_HOW_REACHED = (  # a server: what it scores is compared when a run is resumed
    *("url", "concurrency", "timeout", "connect_timeout", "retries", "backoff", "patience"),
    *("api_key_variable", "cache"),
)


@dataclass(frozen=True)
class Unnamed:
    """Stands for what a run was started with and what cannot be imported again.

    Attributes:
        setting: which one, such as "reward".
        why: what it was, in words.
    """

    setting: str
    why: str

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, where a reward or a judge is called.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self.setting} was {self.why}")


def describe(value: Any) -> Any:
    """A JSON form of a setting, from which ``rebuild`` makes the same again where it can.

    Paths become absolute, so that a run can be resumed from another directory.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}  # for which JSON has no number
    if isinstance(value, Prompt) and value.metadata:
        return {"prompt": str(value), "metadata": dict(value.metadata)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return {"path": str(value.expanduser().absolute())}
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [describe(v) for v in value]
    if (spec := name_of_loaded(value)) is not None and _in_file(spec):
        path, _, attribute = spec.rpartition(":")
        return {
            "loaded": f"{Path(path).name}:{attribute}",
            "name": attribute,
            "folder": str(Path(path).parent),
        }
    named = getattr(value, "__qualname__", None) is not None
    kind = value if named else type(value)
    reference: dict[str, Any] = {"name": getattr(value, "label", kind.__qualname__)}
    if (folder := _folder(kind.__module__)) is not None:
        reference["folder"] = folder
    if named:
        return {"function": f"{kind.__module__}:{kind.__qualname__}", **reference}
    if spec is not None:
        return {"loaded": spec, **reference}
    if dataclasses.is_dataclass(value) and not isinstance(value, Model):  # a loaded one is no name
        fields = {
            _key(f.name): describe(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.init
        }
        return {"class": f"{kind.__module__}:{kind.__qualname__}", **reference, **fields}
    return {"instance": f"{kind.__module__}:{kind.__qualname__}", **reference}


def rebuild(described: Any, setting: str = "") -> Any:
    """The object of ``describe`` again; ``Unnamed`` where its name does not lead back to it.

    Args:
        described: JSON form of a setting.
        setting: its name, for messages.

    Raises:
        ValueError: a class does not take the stored fields.
    """
    if isinstance(described, list):
        return tuple(rebuild(v, f"{setting}[{k}]") for k, v in enumerate(described))
    if not isinstance(described, Mapping):
        return described
    if len(described) == 1 and isinstance(word := next(iter(described.values())), str):
        if "float" in described:
            return float(word)
        if "path" in described:
            return Path(word)
    if described.keys() == {"prompt", "metadata"}:
        return Prompt(described["prompt"], described["metadata"])
    kind = _kind(described)
    if kind is None:
        return {k: rebuild(v, f"{setting}.{k}" if setting else k) for k, v in described.items()}
    name = described[kind]
    if not _has_a_name(described):
        script = " of a script" if name.startswith("__main__:") else ""
        what = "an object" if kind == "instance" else "a function or class"
        return Unnamed(setting, f"{what}{script} that no name leads to ({name})")
    folder, in_file = described.get("folder"), kind == "loaded" and _in_file(name)
    if (folder is not None or in_file) and not Path(str(folder)).is_absolute():
        raise ValueError(
            f"{setting or name} is stored with code in the folder {folder!r}, which is no absolute "
            "path: such a run was not written by this library, and its code is not imported"
        )
    if in_file:
        try:
            return load(str(Path(str(folder)) / Path(name).name))
        except ValueError as error:
            return Unnamed(setting, f"{name}, which cannot be loaded any more ({error})")
    try:
        imported = _imported(name, described.get("folder"))
    except (ImportError, AttributeError) as error:
        return Unnamed(setting, f"{name}, which cannot be imported any more ({error})")
    if kind == "function":
        return imported
    if kind == "loaded":
        return load(name)
    fields = {
        f.name: rebuild(described[key], f"{setting}.{f.name}" if setting else f.name)
        for f in dataclasses.fields(imported)
        # runs of before wrote every field under its own name
        if f.init and (key := _key(f.name) if _key(f.name) in described else f.name) in described
    }
    try:
        return imported(**fields)
    except TypeError as error:
        raise ValueError(
            f"{setting or name} was stored by another version of {name}: {error}"
        ) from error


def differences(stored: Any, wanted: Any, setting: str = "") -> list[tuple[str, Any, Any]]:
    """Settings that differ: dotted name, value then, value now.

    What changes no number (device, progress, logging, the address of a reward's server) may differ,
    and so may the number of updates, which has a rule of its own. Where a reward is stored by a
    name that leads nowhere, any other is let through: its numbers are compared instead
    (``callbacks.Evaluations``).
    """
    if setting in _ANY_TIME:
        return []
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        kinds = {_kind(stored), _kind(wanted)}
        if len(kinds) > 1 and None not in kinds:
            blind = "loaded" in kinds or not (_has_a_name(stored) and _has_a_name(wanted))
            return [] if blind else [(setting, stored["name"], wanted["name"])]
        if None not in kinds and not (_has_a_name(stored) and _has_a_name(wanted)):
            return []
        if kinds == {"class"} and stored["class"] != wanted["class"]:
            return [(setting, stored["name"], wanted["name"])]
        if kinds == {"class"}:  # runs of before lack what has been added since
            stored = {k: v for k, v in _defaults(wanted).items() if k in wanted} | dict(stored)
        free = {"folder", *(_HOW_REACHED if stored.get("class") in _SERVERS else ())}
        free |= {"name"} if kinds == {"class"} else set()  # a label, which its fields make
        return [
            differing
            for k in sorted((stored.keys() | wanted.keys()) - free)
            for differing in differences(
                stored.get(k), wanted.get(k), f"{setting}.{k}" if setting else k
            )
        ]
    if not (isinstance(stored, list) and isinstance(wanted, list)):
        return [] if stored == wanted else [(setting, stored, wanted)]
    if setting.endswith("prompts"):
        return _differing_prompts(stored, wanted, setting)
    if len(stored) == len(wanted) and any(isinstance(value, Mapping) for value in stored):
        return [  # such as a reward and its weight
            differing
            for k, pair in enumerate(zip(stored, wanted, strict=True))
            for differing in differences(*pair, f"{setting}[{k}]")
        ]
    return [] if stored == wanted else [(setting, stored, wanted)]


def _differing_prompts(
    stored: Sequence[Any], wanted: Sequence[Any], setting: str
) -> list[tuple[str, Any, Any]]:
    """The first prompt that differs, of thousands; else their numbers."""
    for k, (then, now) in enumerate(zip(stored, wanted, strict=False)):
        if then != now:
            return [(f"{setting}[{k}]", then, now)]
    sizes = len(stored), len(wanted)
    return [] if sizes[0] == sizes[1] else [(f"{setting}.length", *sizes)]


def _defaults(described: Mapping[str, Any]) -> dict[str, Any]:
    """What the fields of a described object are if nobody names them."""
    try:
        kind = _imported(described["class"], described.get("folder"))
    except (ImportError, AttributeError):
        return {}
    return {
        _key(f.name): describe(f.default)
        for f in dataclasses.fields(kind)
        if f.default is not dataclasses.MISSING
    }


def _key(field: str) -> str:
    """What a field of a dataclass is stored under: not what says which class it is."""
    return f"{field} (field)" if field in ("name", "folder", *_KINDS) else field


def _kind(described: Mapping[str, Any]) -> str | None:
    """Which of ``_KINDS`` it is; None of a plain mapping, whatever its keys are called."""
    named = isinstance(described.get("name"), str)
    return next((kind for kind in _KINDS if named and isinstance(described.get(kind), str)), None)


def _has_a_name(described: Mapping[str, Any]) -> bool:
    """Whether an import can lead back to it."""
    kind = _kind(described)
    if kind is None or kind == "instance":
        return False
    return not described[kind].startswith("__main__:") and "<" not in described[kind]


def _in_file(spec: str) -> bool:
    """Whether it names something in a file rather than in a module."""
    return spec.rpartition(":")[0].endswith(".py")


def _imported(name: str, folder: str | None) -> Any:
    module, _, qualified = name.partition(":")
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)
    imported: Any = importlib.import_module(module)
    for part in qualified.split("."):
        imported = getattr(imported, part)
    return imported


def _folder(module: str) -> str | None:
    """Where a user's module is imported from; None for installed ones and our own."""
    top = module.partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None or top in ("ctrl", "diffusion_envs", "__main__"):
        return None
    path = Path(file).resolve()
    folder = path.parent.parent if path.name == "__init__.py" else path.parent
    installed = any(folder.is_relative_to(place) for place in sysconfig.get_paths().values())
    return None if installed else str(folder)
