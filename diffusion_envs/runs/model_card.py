"""A model card beside an export: what it is, what it was trained for, how to load it.

Prompts and names stand in it as text, whatever Markdown or HTML is in them.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_envs.models.adapters import LORA_FILE
from diffusion_envs.models.exports import KOHYA_FILE, PIPELINE
from diffusion_envs.models.folders import SHIPPED
from diffusion_envs.models.guidance_schedule import GUIDANCE_FILE
from diffusion_envs.runs.prompts import split
from diffusion_envs.training.phase import phase
from diffusion_envs.whole_files import whole

CARD = "README.md"  # the name that the hub shows

_PROMPTS = 5  # that are listed
_LONGEST = 500  # characters of each
# what Markdown, or HTML in it, makes something of; an underscore only at the edge of a word
_MARKS = re.compile(r"([\\`*\[\]|~#$]|(?<![^\W_])_|_(?![^\W_]))")
_START = re.compile(r"^(\d*)([-+.)])")  # of a list within a list, or a line across the page
_SETTINGS = ("sampler", "steps", "updates", "objective", "optimiser", "size", "seed")
_MODEL_ONLY = ("device", "model")  # on this machine alone, or said elsewhere


@phase("report")
def write_card(folder: Path) -> Path:
    """Write the card of a finished run, from its settings, summary and log.

    Args:
        folder: of the run.

    Returns:
        The file.
    """
    path = folder / CARD
    text = card(folder)
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def card(folder: Path, *, merged: bool = False) -> str:
    """The text of a finished run's card, with the header that the hub reads.

    Args:
        folder: of the run.
        merged: it lies in the folder of a whole model, into which the adapter was merged.
    """
    from huggingface_hub import ModelCardData

    config = json.loads((folder / "config.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    settings = config["settings"]
    model = settings["model"]
    base, on_hub = base_model(model)
    whole = merged or (folder / PIPELINE).is_dir()
    adapter = not whole and (folder / LORA_FILE).is_file()
    header = ModelCardData(
        base_model=base if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image" if "guidance" in model else "unconditional-image-generation",
        tags=["diffusers", "reinforcement-learning", *(["lora"] if adapter else [])],
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1]) if lines else {}
    scale = (folder / GUIDANCE_FILE).is_file()
    kinds = ((whole, "The UNet"), (adapter, "A LoRA adapter"), (scale, "The guidance scale"))
    what = next((words for is_there, words in kinds if is_there), "A model")
    method = f"{_plain(settings['objective']['name'])} with the reward {_reward(settings)}"
    start = model.get("lora")
    if start is not None:
        named, _ = base_model({"model": start})
        method += (
            f". Training started from the LoRA {_code(named)}, which is contained in this adapter; "
            "what is called pretrained below is the model with that LoRA"
        )
    return f"""---
{header.to_yaml()}
---

# {_plain(folder.absolute().name)}

{what} of {_code(base)}, fine-tuned by reinforcement learning: {method}.

## What it reached

On held-out seeds, before and after (mean and standard error):

{_reached(summary)}

## Prompts

{_prompts(settings)}

## How to load it

{_loading(folder, base, model, whole)}

## Budget

{_budget(summary, last, settings)}

## Settings

{_table(("setting", "value"), _settings(settings))}

Versions: {", ".join(_plain(f"{k} {version}") for k, version in config["versions"].items())}.

## Licence

Not stated. That of {_code(base)} applies to what is derived from it.
"""


def base_model(model: Mapping[str, Any]) -> tuple[str, bool]:
    """What a model was loaded from, without the place on this machine; whether it is a hub id."""
    name = model.get("model") or model["name"]
    named = name["path"] if isinstance(name, Mapping) else str(name)
    if Path(named).is_absolute():
        return Path(named).name, False
    return named, named.count("/") == 1


def _prompts(settings: Mapping[str, Any]) -> str:
    """Those of training, the first of them, and those of the numbers above where they differ."""
    options = settings["options"]
    prompts = [_text(prompt) for prompt in settings["prompts"]]
    asked = options.get("evaluation_prompts")
    held_out = prompts if asked is None else [_text(prompt) for prompt in asked]
    if options.get("held_out"):
        places = split(len(prompts), options["held_out"], settings["seed"])
        prompts, held_out = ([prompts[k] for k in part] for part in places)
    told = _listed("in training", prompts)
    return told if held_out == prompts else f"{told}\n\n{_listed('of held-out samples', held_out)}"


def _text(stored: Any) -> str:
    """A prompt as config.json has it, without its columns."""
    return str(stored["prompt"] if isinstance(stored, Mapping) else stored)


def _listed(what: str, prompts: list[str]) -> str:
    first = f", the first {_PROMPTS} of them" if len(prompts) > _PROMPTS else ""
    shown = (_START.sub(r"\1\\\2", _plain(prompt)) for prompt in prompts[:_PROMPTS])
    lines = "\n".join(f"- {prompt}" for prompt in shown)
    return f"{len(prompts)} {what}{first}:\n\n{lines}"


def _reward(settings: Mapping[str, Any]) -> str:
    described = settings["reward"]
    return _code(str(described["name"] if isinstance(described, Mapping) else described))


def _reached(summary: Mapping[str, Any]) -> str:
    rows = [("reward", *_three(summary["reward"]))]
    rows += [(f"judge {name}", *_three(value)) for name, value in summary["judges"].items()]
    table = _table(("", "before", "after", "difference"), rows)
    kl = summary.get("path_kl")
    if kl is None:
        return table
    return f"{table}\n\nPath KL from the pretrained model: {_estimate(kl)} nats."


def _three(compared: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_estimate(compared[name]) for name in ("before", "after", "difference"))


def _estimate(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.4g} ({value['standard_error']:.1g})"


def _budget(
    summary: Mapping[str, Any], last: Mapping[str, Any], settings: Mapping[str, Any]
) -> str:
    rows = [
        ("updates (exported: of update)", f"{settings['updates']} ({summary['update']})"),
        ("images an update", str(settings["size"]["samples"])),
    ]
    for name, words in (
        ("reward_queries", "images judged"),
        ("network_calls", "rows through the network"),
        ("seconds", "seconds"),
    ):
        if name in last:
            rows.append((words, f"{last[name]:,.0f}"))
    return _table(("", ""), rows)


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = list[tuple[str, str]]()
    model = {k: v for k, v in settings["model"].items() if k not in _MODEL_ONLY}
    for name, value in [*model.items(), *((name, settings.get(name)) for name in _SETTINGS)]:
        rows += _flat(name, value)
    unsaid = ("name", "size.name")
    return [
        (name, value)
        for name, value in rows
        if name not in unsaid and not name.endswith(("class", ".folder"))
    ]


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    """Settings by dotted names; of a place on this machine, its last part alone."""
    if isinstance(value, Mapping):
        if set(value) == {"path"}:
            return [(name, Path(value["path"]).name)]
        return [row for part, own in value.items() for row in _flat(f"{name}.{part}", own)]
    if value is None:
        return []
    words = json.dumps(value) if isinstance(value, list) else str(value)
    return [(name, Path(words).name if words.startswith("/") else words)]


def _loading(folder: Path, base: str, model: Mapping[str, Any], whole: bool) -> str:
    guidance = model.get("guidance")
    kind = "DDPMPipeline" if guidance is None else "DiffusionPipeline"
    place = _literal("FOLDER OR REPOSITORY" if whole else base)
    code = [f"from diffusers import {kind}"]
    if base in SHIPPED and not whole:
        code.append("from diffusion_envs.models.folders import shipped_folder")
        place = f"shipped_folder({place}), safety_checker=None"
    code.append(f"pipe = {kind}.from_pretrained({place})")
    words = list[str]()
    if not whole and (folder / LORA_FILE).is_file():
        name = f'weight_name="{LORA_FILE}"'
        code.append(f'pipe.load_lora_weights("FOLDER OR REPOSITORY", {name})')
    if not whole and (folder / KOHYA_FILE).is_file():
        words.append(
            f"`{KOHYA_FILE}` is the same adapter for AUTOMATIC1111, Forge, ComfyUI, SD.Next and "
            "InvokeAI: put it into their folder of LoRAs, and use it at weight 1."
        )
    asked = "" if guidance is None else f"prompt, guidance_scale={guidance}"
    if model.get("negative_prompt"):
        asked += f", negative_prompt={_literal(model['negative_prompt'])}"
    code.append(f"image = pipe({asked}).images[0]")
    if (folder / GUIDANCE_FILE).is_file():
        words.append(
            f"The guidance scale was trained too: `{GUIDANCE_FILE}` has it by timestep, and a "
            "callback of the pipeline sets it (docs/run_folder.md of the library has the lines)."
        )
    joined = "\n".join(code)
    return "\n\n".join([f"```python\n{joined}\n```", *words])


def _table(heads: tuple[str, ...], rows: list[Any]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _plain(words: str) -> str:
    """On one line, as text: nothing in it is Markdown, HTML or an address to be fetched."""
    line = " ".join(words.split())
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
    marked = _MARKS.sub(r"\\\1", line.replace("&", "&amp;"))
    return marked.replace("<", "&lt;").replace(">", "&gt;")


def _code(name: str) -> str:
    """A name between backticks, of which it has none itself."""
    return f"`{' '.join(name.split()).replace('`', chr(39)) or '?'}`"


def _literal(text: str) -> str:
    """A string of Python on one line, that cannot end the block of code that it stands in."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\u0060")
