"""Of a report: every setting of the run on a line of its own."""

import json
from collections.abc import Mapping
from typing import Any

from diffusion_envs.runs.report_prompts import prompt_words
from diffusion_envs.runs.report_words import escaped, folded, table

_SOME = 8  # prompts that stand among the settings
_LONGEST = 2000  # characters of a setting


def settings_table(config: Mapping[str, Any]) -> str:
    """Every setting on a line of its own, and the versions."""
    settings = dict(config.get("settings", {}))
    prompts = settings.get("prompts")
    if isinstance(prompts, list):
        several = f" and {len(prompts) - _SOME:,} more" if len(prompts) > _SOME else ""
        settings["prompts"] = "; ".join(prompt_words(p) for p in prompts[:_SOME]) + several
    rows = [
        [escaped(name), f"<code>{escaped(value, _LONGEST)}</code>"]
        for name, value in _flat(settings)
    ]
    known = config.get("versions", {}) | {"commit": config.get("commit")}
    versions = [[escaped(k), f"<code>{escaped(str(v))}</code>"] for k, v in known.items()]
    return (
        "<h2>Settings</h2>"
        + folded(f"All {len(rows)} settings", table(["setting", "value"], rows, numbers=False))
        + folded("Versions", table(["of", "version"], versions, numbers=False))
    )


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Dotted names and values of settings; an object's name, then its fields."""
    if not isinstance(value, Mapping):
        return [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
    if value.keys() in ({"path"}, {"float"}):
        return [(name, str(next(iter(value.values()))))]
    kinds = ("class", "function", "loaded", "instance", "folder")
    named = isinstance(value.get("name"), str) and any(kind in value for kind in kinds)
    rows = [(name, value["name"])] if named else []
    for key, inner in value.items():
        if not (named and key in ("name", *kinds)):
            plain = key.removesuffix(" (field)")
            rows += _flat(inner, f"{name}.{plain}" if name else plain)
    return rows
