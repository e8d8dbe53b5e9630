"""A self-contained report of a run: one HTML file, nothing fetched, pictures inside.

What stands where is here; curves are drawn by ``charts.py``, the frontier and transfer by
``plots.py``. Of what the run has not left yet, it says so.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_envs.runs import charts, plots
from diffusion_envs.runs.over_optimisation import FAR, verdict
from diffusion_envs.runs.perceptual import STLPIPS
from diffusion_envs.runs.report_pictures import pictures
from diffusion_envs.runs.report_prompts import by_prompt
from diffusion_envs.runs.report_settings import settings_table
from diffusion_envs.runs.report_words import (
    duration,
    escaped,
    figure,
    image,
    in_errors,
    number,
    table,
)
from diffusion_envs.runs.tracking import OVER_OPTIMISATION, TRAINING_BY_PROMPT, read_metrics
from diffusion_envs.whole_files import whole

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60676f; --page: #f7f8f9; --card: #fff;
  --line: #dfe3e6; --good: #14713d; --bad: #b3261e; --one: #2264b0; --two: #c65f10; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a2a9b0; --page: #16181b;
  --card: #202327; --line: #383d43; --good: #7ad39b; --bad: #ff9d94; --one: #7fb2ee;
  --two: #f0a35e; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 0 auto; max-width: 80rem; padding: 1.5rem clamp(.8rem, 3vw, 2.5rem) 4rem; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .8rem; } p { max-width: 46rem; }
.muted, figcaption { color: var(--soft); font-size: .92rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem;
  margin: 1.5rem 0; }
.tile, figure, .scroll { background: var(--card); border: 1px solid var(--line);
  border-radius: .7rem; margin: 0; }
.tile { padding: .9rem 1.1rem; } .tile b { display: block; font-size: 1.7rem; line-height: 1.25;
  font-variant-numeric: tabular-nums; } .good { color: var(--good); } .bad { color: var(--bad); }
.tile small { font-size: 1rem; font-weight: normal; color: var(--soft); white-space: nowrap; }
.verdict { font-size: 1.12rem; border-left: .25rem solid var(--line); padding-left: 1rem;
  margin-top: 1.5rem; } summary { cursor: pointer; margin-top: 1rem; }
.cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 16.5rem), 1fr)); }
.pair { grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
figure { padding: .8rem; } figure img { display: block; width: 100%; height: auto;
  border-radius: .35rem; background: #fff; } figcaption { margin-top: .5rem; }
@media (prefers-color-scheme: dark) { figure .plot { filter: invert(.87) hue-rotate(180deg); } }
.pairs { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.pairs figure > div { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; }
.pairs img { image-rendering: pixelated; } .one { color: var(--one); } .two { color: var(--two); }
.scroll { overflow-x: auto; padding: .3rem 1.1rem; margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; }
th, td { text-align: left; padding: .45rem 1.2rem .45rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; } tbody th { font-weight: 500; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font-size: .88em; overflow-wrap: anywhere; }
"""

_SILENT = "groups_without_signal"
_COSTS = {
    "reward_queries": "reward queries",
    "network_calls": "network calls",
    "seconds": "seconds",
}
_LABELS = {
    "reward": "reward",
    _SILENT: "share of groups without signal",
    "path_kl": "path KL (nats)",
    "transition_kl": "transition KL (nats)",
    "kl_weight": "kl_weight (reward per nat)",
    "gradient_norm": "gradient norm",
    "clipped_fraction": "clipped fraction",
    "step_length": "length of a step",
    "step_path_kl": "path KL of a step (nats)",
    "measured_step_path_kl": "measured path KL of a step (nats)",
    "natural_residual": "residual of conjugate gradients",
    "value_loss": "value loss",
}
_SINGLE = {
    "reward_gain": "gain in reward",
    "path_kl": "path KL (nats)",
    "chain_kl": "KL of the sampled chain (nats)",
}
_PROGRESS = ("reward", "path_kl")  # in the chart with a choice of axis
_NOT_DRAWN = {"update", "memory", "ratio_min", "ratio_max", *_PROGRESS, *_COSTS}
_LONG = 3000  # characters of what is said in sentences
_MOST_DRAWN = 200  # evaluations beside the frontier
_FEW = 3  # points of a quantity from which on it is drawn; fewer are a table
_Points = Sequence[tuple[int | float, Mapping[str, Any]]]


def write_report(folder: str | Path) -> Path:
    """Write ``folder/report.html`` from what the run has left so far.

    Raises:
        FileNotFoundError: ``folder`` holds no run.
        ValueError: one of the run's files is damaged; it is named.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"folder must hold a run, but {folder} has no config.json")
    config = _json(folder / "config.json")
    summary, transfer = _json(folder / "summary.json"), _json(folder / "transfer.json")
    metrics = read_metrics(folder / "metrics.jsonl")
    lines = read_metrics(folder / OVER_OPTIMISATION)
    name = escaped(folder.resolve().name)
    parts = [
        f"<header><h1>{name}</h1>{_subtitle(config, metrics)}</header>",
        _verdict(lines, summary),
        _headline(summary),
        pictures(folder / "samples", summary),
        _progress(metrics, lines, summary),
        _frontier(_json(folder / "frontier.json"), lines, summary),
        by_prompt(summary, read_metrics(folder / TRAINING_BY_PROMPT), config),
        _over_optimisation(lines, summary),
        _training(metrics, config),
        _transfer(transfer),
        settings_table(config),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}: fine-tuning report</title><style>{_STYLE}{charts.STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
    path = folder / "report.html"
    with whole(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")
    return path


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


# -- parts ---------------------------------------------------------------------------------------


def _subtitle(config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    settings = config.get("settings", {})
    named = {what: settings.get(what) for what in ("model", "reward", "objective")}
    words = [
        f"{what} <b>{escaped(value['name'] if isinstance(value, dict) else str(value))}</b>"
        for what, value in named.items()
        if value is not None
    ]
    if metrics:
        last = metrics[-1]
        words.append(f"{last['update']} updates")
        words += [
            f"{last[c]:,} {_COSTS[c]}" for c in ("reward_queries", "network_calls") if c in last
        ]
        if "seconds" in last:
            words.append(duration(last["seconds"]))
    return f'<p class="muted">{" &middot; ".join(words)}</p>'


def _verdict(lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None) -> str:
    """What fine-tuning did, in words, before any number; and why it ended."""
    said = (summary or {}).get("over_optimisation")
    if said:
        words = [said["sentence"]]
    else:
        so_far = verdict(lines)
        start = "So far: " if summary is None else ""
        words = [] if so_far is None else [start + so_far.sentence]
    stop = (summary or {}).get("stop")
    if summary and stop:
        chance = f"with probability at most {stop['false_stop_bound']:.2g}"
        bound = f"noise alone makes a judge stop such a run {chance}"
        if stop["reason"] is None:
            words.append(f"The stop rule did not end the run ({bound}).")
        else:
            words.append(
                f"Stopped after update {stop['update']}: {stop['reason']} ({bound}). The exported "
                f"model is that of update {summary['update']}, the best that the rule saw."
            )
    said_so = "".join(f"<p>{escaped(text, _LONG)}</p>" for text in words)
    if fault := ((summary or {}).get("frontier") or {}).get("fault"):
        said_so = f'<p class="bad">{escaped(fault, _LONG)}</p>{said_so}'
        return f'<div class="verdict">{said_so}</div>'
    return f'<div class="verdict">{said_so}</div>' if words else ""


def _headline(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return "<p>This run is not finished: there is no evaluation on held-out seeds yet.</p>"
    judged = {"reward": summary.get("reward")}
    judged |= {f"part: {name}": value for name, value in summary.get("parts", {}).items()}
    judged |= {"judge": summary.get("judge")}
    for name, value in summary.get("judges", {}).items():
        judged[name if name == "judge" else f"judge: {name}"] = value
    judged = {name: value for name, value in judged.items() if value}
    nothing_fell = _nothing_fell(summary, judged)
    tiles, rows = [], []
    for name, value in judged.items():
        before, after, gain = (value[part] for part in ("before", "after", "difference"))
        below = f"{in_errors(gain)} standard errors"
        if name == "reward" and "path_kl" in summary:
            below += f", at a path KL of {number(summary['path_kl'])} nats"
        tiles.append(_tile(f"{name}, paired gain", gain, below, good=nothing_fell))
        numbers = [number(before), number(after), number(gain, "+"), in_errors(gain)]
        rows.append([escaped(name), *numbers, escaped(str(gain["n"]))])
    for name, label in (("path_kl", "path KL"), ("transition_kl", "transition KL")):
        if name in summary:
            text = "nats away from the pretrained model"
            tiles.append(_tile(label, summary[name], text, gain=False))
    heads = ["", "before", "after", "paired difference", "in standard errors", "samples"]
    return (
        f'<div class="tiles">{"".join(tiles)}</div>{table(heads, rows)}'
        '<p class="muted">On held-out seeds, the same before and after; ± is one standard error. '
        "Nothing was trained on a judge.</p>"
    )


def _nothing_fell(summary: Mapping[str, Any], judged: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a gain is good beyond doubt: nothing fell, and the model is not far away."""
    fallen = (summary.get("over_optimisation") or {}).get("fallen")
    worse = any(_clear(value["difference"]) < 0 for value in judged.values())
    far = "path_kl" in summary and summary["path_kl"]["mean"] > FAR
    return not (fallen or worse or far)


def _clear(gain: Mapping[str, Any]) -> int:
    """The sign of a gain beyond three standard errors, else 0."""
    mean, error = gain["mean"], gain["standard_error"]
    return 0 if not error or abs(mean) <= 3 * error else 1 if mean > 0 else -1


def _tile(
    name: str, estimate: Mapping[str, Any], below: str, gain: bool = True, good: bool = False
) -> str:
    sign = _clear(estimate) if gain else 0
    kind = ' class="good"' if sign > 0 and good else ' class="bad"' if sign < 0 else ""
    value, *error = number(estimate, "+" if gain else "").split(" ", 1)
    small = f" <small>{error[0]}</small>" if error else ""
    return (
        f'<div class="tile"><span class="muted">{escaped(name)}</span>'
        f'<b{kind}>{value}{small}</b><span class="muted">{below}</span></div>'
    )


def _frontier(
    drawn: Mapping[str, Any] | None,
    lines: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any] | None,
) -> str:
    """How near the run came to the best that any policy can have at its KL."""
    if summary is None or "frontier" not in summary:
        return ""
    told = summary["frontier"]
    words = "".join(f"<p>{escaped(sentence, _LONG)}</p>" for sentence in told["sentences"])
    if told["fault"] is not None:
        words = f'<p class="bad">{escaped(told["fault"], _LONG)}</p>{words}'
    shown = ""
    if drawn and drawn["curve"]:
        run = [
            (line["chain_kl"], line["reward"])
            for line in lines
            if "chain_kl" in line and line["update"] < summary["update"]
        ]
        if "pretrained" in told:
            run = [({"mean": 0.0, "standard_error": 0.0}, told["pretrained"]), *run]
        exported = "chain_kl" in told["kl"]
        if exported:
            run.append((told["kl"]["chain_kl"], told["reward"]))
        run = run[:: -max(1, -(-len(run) // _MOST_DRAWN))][::-1]  # with the last
        alt = "The most reward that a policy can have against KL, and the run's evaluations"
        caption = (
            f"From {drawn['samples']} samples of the pretrained model, of {drawn['prompts']} "
            f"prompt{'' if drawn['prompts'] == 1 else 's'}; bands and bars are 95 % intervals. The "
            "run's KL is that of the chain that was sampled."
        )
        drawing = plots.frontier(drawn["curve"], run, "reward", exported)
        shown = f'<div class="cards pair">{figure(image(drawing, "svg+xml", alt), caption)}</div>'
    return (
        f"<h2>Reward against KL</h2>{words}{shown}"
        '<p class="muted">No policy has more reward than the frontier at the KL of its sampled '
        "chain; in few steps that of the SDE is another number, and bounds nothing. Where the "
        "noise that a path starts from says something about its end, the best policy has less "
        "than the frontier, as no policy chooses its start. The choice of prompts is in no "
        "interval.</p>"
    )


def _progress(
    metrics: Sequence[Mapping[str, Any]],
    lines: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any] | None,
) -> str:
    """Reward and path KL against updates or what they cost, whichever is chosen."""
    title = "<h2>Progress</h2>"
    if len(metrics) < 2:
        return ""
    held_out = _held_out(lines, summary)
    last = metrics[-1]
    unit, divisor = "seconds", 1.0
    if last.get("seconds", 0.0) > 300:
        unit, divisor = ("hours", 3600.0) if last["seconds"] > 18000 else ("minutes", 60.0)
    axes = {"update": "updates", "reward_queries": "reward queries"}
    axes |= {"network_calls": "network calls", "seconds": unit}
    panels: dict[str, str] = {}
    for axis, across in axes.items():
        if axis not in last:
            continue
        scale = divisor if axis == "seconds" else 1.0
        where = {0: 0} | {line["update"]: line[axis] / scale for line in metrics}
        if axis != "seconds":
            where = {update: round(x) for update, x in where.items()}
        figures = [
            _progress_of(name, metrics, held_out, where, across)
            for name in _PROGRESS
            if sum(line.get(name) is not None for line in [*metrics, *held_out]) > 1
        ]
        panels[across] = f'<div class="cards pair">{"".join(figures)}</div>'
    return (
        f'{title}<p class="muted"><span class="one">Line: training samples</span> '
        f"({charts.explained([(0, line) for line in metrics])}). "
        '<span class="two">Dots: held-out seeds</span> (95 % intervals; not paired with one '
        f"another).</p>{charts.choice(panels, 'axis')}"
    )


def _held_out(
    lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None
) -> list[Mapping[str, Any]]:
    """What held-out seeds earned after updates, the pretrained and the exported model's too."""
    seen = {line["update"]: line for line in lines}
    final = (summary or {}).get("over_optimisation_metrics")
    if summary and final and "update" in summary:
        seen[summary["update"]] = dict(final) | {"update": summary["update"]}
    if summary:
        nothing = {"mean": 0.0, "standard_error": None, "n": 0}
        seen.setdefault(0, {"update": 0, "reward": summary["reward"]["before"], "path_kl": nothing})
    return [seen[update] for update in sorted(seen)]


def _progress_of(
    name: str,
    metrics: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    where: Mapping[int, int | float],
    across: str,
) -> str:
    line, dots = (
        [
            (where[each["update"]], each[name])
            for each in source
            if each.get(name) is not None and each["update"] in where
        ]
        for source in (metrics, held_out)
    )
    first, last = (number((line or dots)[k][1]) for k in (0, -1))
    label, of = _label(name), "the training samples" if line else "held-out seeds"
    alt = f"{label} of {of} against {across}: from {first} to {last}"
    drawn = charts.chart(line, across, alt, dots=dots, size=charts.LARGE)
    return figure(drawn, label)


def _over_optimisation(
    lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None
) -> str:
    """Judges, diversity and distance over the run."""
    title = "<h2>Over-optimisation</h2>"
    final = (summary or {}).get("over_optimisation_metrics")
    if not lines and final is None:
        return f"{title}<p>Nothing is measured yet.</p>"
    drawn_of = ("reward_gain", "judge_gain.", "diversity_gain.", "distance.", "path_kl", "chain_kl")
    names = dict.fromkeys(name for line in lines for name in line if name.startswith(drawn_of))
    series = {
        _quantity(name): [(line["update"], line[name]) for line in lines if name in line]
        for name in names
    }
    only_the_last = final is not None and len(lines) == 1
    drawn = "" if only_the_last else _over_updates(series, "on held-out seeds")
    rows = [
        [escaped(_quantity(k)), number(v), escaped(str(v["n"]))] for k, v in (final or {}).items()
    ]
    final_rows = table(["of the exported model", "", "samples"], rows) if rows else ""
    return (
        f"{title}{drawn}{final_rows}"
        '<p class="muted">On held-out seeds, paired with the pretrained model on the same seeds. '
        "Diversity is the mean distance of two pictures of one prompt, distance that of a picture "
        "from the pretrained one of its seed, separation that of two pretrained pictures: root "
        "mean square difference of pixels, 1 minus the cosine of features, or ST-LPIPS; "
        "docs/verdict.md has the formulas.</p>"
    )


def _over_updates(series: Mapping[str, _Points], where: str) -> str:
    """A plot of each quantity against updates; those of few points in one table."""
    figures, few = [], {}
    for label, points in series.items():
        if len(points) < _FEW:
            few[label] = {update: number(estimate) for update, estimate in points}
            continue
        first, last = (number(points[k][1]) for k in (0, -1))
        alt = f"{label} {where} against updates: from {first} to {last}"
        figures.append(figure(charts.chart(points, "updates", alt), label))
    updates = sorted({update for told in few.values() for update in told})
    rows = [
        [escaped(label), *(told.get(update, "") for update in updates)]
        for label, told in few.items()
    ]
    heads = [where, *(f"update {update}" for update in updates)]
    cards = f'<div class="cards">{"".join(figures)}</div>' if figures else ""
    return cards + (table(heads, rows) if rows else "")


def _quantity(name: str) -> str:
    """Words for the name of an over-optimisation metric."""
    kind, _, what = name.partition(".")
    if not what:
        return _SINGLE.get(name, name)
    words = {"pixels": "pixels", STLPIPS: "ST-LPIPS"}
    space = words.get(what, f"the {what}'s features")
    return {
        "judge": f"judge: {what}",
        "judge_gain": f"gain of judge: {what}",
        "judge_std": f"standard deviation of judge: {what} (pretrained model)",
        "diversity": f"diversity of {space}",
        "diversity_gain": f"change in diversity of {space}",
        "pretrained_diversity": f"diversity of {space} (pretrained model)",
        "distance": f"distance in {space}",
        "separation": f"separation in {space} (pretrained model)",
    }.get(kind, name)


def _estimate(value: Any) -> Mapping[str, Any]:
    """A number without an error as an estimate."""
    return value if isinstance(value, Mapping) else {"mean": value, "standard_error": None, "n": 1}


def _training(metrics: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    """Whatever an update logs, against updates; and what it had cost by then."""
    if not metrics:
        return "<h2>Training</h2><p>No update is done yet.</p>"
    logged = dict.fromkeys(name for line in metrics for name in line if name not in _NOT_DRAWN)
    logged = [name for name in logged if not _is_idle(name, metrics)]
    names = [name for name in _LABELS if name in logged]
    names += [name for name in logged if name not in _LABELS]
    names.sort(key=lambda name: not name.startswith("reward"))  # and its parts beside it
    series = {
        _label(name): [
            (line["update"], _estimate(line[name]))
            for line in metrics
            if line.get(name) is not None
        ]
        for name in names
    }
    drawn = _over_updates(
        {label: points for label, points in series.items() if points}, "of the training samples"
    )
    bands = charts.explained([(0, line) for line in metrics])
    return (
        '<h2>Training</h2><p class="muted">Means over the training samples of an update; bands: '
        f"{bands}.</p>{_without_signal(metrics, config)}{drawn}{_costs(metrics)}"
    )


def _label(name: str) -> str:
    """Words for what an update logs."""
    kind, _, what = name.partition(".")
    kinds = {"reward": "part of the reward", "reward_counts": "counted by the reward"}
    return f"{kinds[kind]}: {what}" if what and kind in kinds else _LABELS.get(name, name)


def _is_idle(name: str, metrics: Sequence[Mapping[str, Any]]) -> bool:
    """Whether it counts what never happened."""
    counts = name == _SILENT or name.startswith("reward_counts.")
    return counts and not any(line.get(name) for line in metrics)


def _without_signal(metrics: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    """A warning where most groups teach nothing."""
    shares = [line[_SILENT] for line in metrics if line.get(_SILENT) is not None]
    share = sum(shares) / len(shares) if shares else 0.0
    if share <= 0.5:
        return ""
    objective = config.get("settings", {}).get("objective")
    group = objective.get("group") if isinstance(objective, Mapping) else None
    size = "" if group is None else f" of {group}"
    return (
        f'<p class="bad">{100 * share:.0f} % of groups{size} carry no gradient, as all rewards of '
        "the group are equal: raise the group size or use a graded reward.</p>"
    )


def _costs(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Reward and path KL at a few updates beside what had been spent by then."""
    last = len(metrics) - 1
    chosen = [metrics[k] for k in sorted({round(last * part / 4) for part in range(5)})]
    costs = [name for name in _COSTS if name in metrics[-1]]
    results = [name for name in ("reward", "path_kl") if name in metrics[-1]]
    rows = []
    for line in chosen:
        spent = [
            duration(line[c]) if c == "seconds" else f"{line[c]:,}" for c in costs if c in line
        ]
        reached = [number(_estimate(line[name])) for name in results if name in line]
        if len(spent) == len(costs) and len(reached) == len(results):
            rows.append([str(line["update"]), *spent, *reached])
    heads = ["after update", *(_COSTS[c].replace("seconds", "time") for c in costs)]
    return table([*heads, *(_LABELS[name] for name in results)], rows) if costs and rows else ""


def _transfer(rows: Sequence[Mapping[str, Any]] | None) -> str:
    title = "<h2>Transfer to other samplers and step counts</h2>"
    if not rows:
        command = (
            "python -m diffusion_envs.sd15 evaluate RUN --steps 10 25 50 100 --samplers ddim dpm++"
        )
        return f"{title}<p>Not measured yet: <code>{command}</code>.</p>"
    cells = [
        [
            escaped(row["sampler"]),
            escaped(str(row["steps"])),
            *(number(row[part]) for part in ("before", "after")),
            number(row["difference"], "+"),
            in_errors(row["difference"]),
        ]
        for row in rows
    ]
    heads = ["sampler", "steps", "before", "after", "paired difference", "in standard errors"]
    levels = figure(
        image(
            plots.transfer(rows, ("before", "after"), "reward"),
            "svg+xml",
            "Reward before and after against sampling steps; the table below has the numbers",
        ),
        "reward before (open, dashed) and after (filled), with 95 % intervals",
    )
    gains = figure(
        image(
            plots.transfer(rows, ("difference",), "gain in reward"),
            "svg+xml",
            "Paired gain in reward against sampling steps; the table below has the numbers",
        ),
        "paired gain, with 95 % intervals",
    )
    return f'{title}<div class="cards pair">{levels}{gains}</div>{table(heads, cells)}'
