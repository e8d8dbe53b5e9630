"""Of a report: rewards by prompt, of held-out samples and of those that were trained on."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_envs.runs.prompt_statistics import training_by_prompt
from diffusion_envs.runs.report_words import escaped, folded, in_errors, number, table

_MANY_PROMPTS = 12  # more than so many are folded away
_EACH_END = 10  # prompts that changed most and least in training


def by_prompt(
    summary: Mapping[str, Any] | None,
    training: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
) -> str:
    """The reward of each prompt: of held-out samples, and of those that were trained on."""
    parts = [_held_out_by_prompt(summary), _trained_by_prompt(training, config)]
    return f"<h2>Reward by prompt</h2>{''.join(parts)}" if any(parts) else ""


def _held_out_by_prompt(summary: Mapping[str, Any] | None) -> str:
    """Largest gain first; of many prompts the summary has those at both ends."""
    prompts = (summary or {}).get("by_prompt")
    if not prompts:
        return ""
    ordered = sorted(prompts.items(), key=lambda item: -item[1]["difference"]["mean"])
    rows = [
        [
            escaped(prompt),
            *(number(value[part]) for part in ("before", "after")),
            number(value["difference"], "+"),
            in_errors(value["difference"]),
            escaped(str(value["difference"]["n"])),
        ]
        for prompt, value in ordered
    ]
    heads = [
        *("prompt, on held-out seeds", "before", "after", "paired difference"),
        *("in standard errors", "samples"),
    ]
    every = (summary or {}).get("prompts")
    shown = table(heads, rows)
    if isinstance(every, int) and every > len(rows):
        half = len(rows) // 2
        return (
            f'<p class="muted">The {half} largest and the {half} smallest gains of {every:,} '
            f"prompts; <code>evaluation/by_prompt.jsonl</code> has them all.</p>{shown}"
        )
    return folded(f"All {len(rows)} prompts", shown) if len(rows) > _MANY_PROMPTS else shown


def _trained_by_prompt(lines: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    """What training samples of a prompt earned in the earlier and the later half of updates."""
    every = training_by_prompt(lines)
    names = config.get("settings", {}).get("prompts", [])
    shown = every
    if len(every) > 2 * _EACH_END:
        shown = every[:_EACH_END] + every[-_EACH_END:]
    rows = [
        [
            escaped(prompt_words(names[each.prompt]) if each.prompt < len(names) else "?"),
            number(each.earlier.as_dict()),
            number(each.later.as_dict()),
            number(each.difference.as_dict(), "+"),
            f"{each.earlier.n} and {each.later.n}",
        ]
        for each in shown
    ]
    if not rows:
        return ""
    heads = ["prompt, in training", "earlier half", "later half", "difference", "samples"]
    which = f"{len(rows)} of {len(every):,} prompts" if len(shown) < len(every) else "every prompt"
    title = f"Training samples of {which}: the earlier and the later half of the updates"
    return folded(title, table(heads, rows))


def prompt_words(stored: Any) -> str:
    """A prompt as config.json has it, with its columns."""
    if not isinstance(stored, Mapping):
        return str(stored)
    return f"{stored['prompt']} {json.dumps(stored['metadata'], ensure_ascii=False)}"
