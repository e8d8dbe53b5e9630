"""A self-contained report of a run: one HTML file, nothing fetched, pictures inside."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --card: #fff; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; } th, td { text-align: left; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } .cards { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; background: var(--card); color: #222; padding: .7rem; border-radius: .5rem;
  border: 1px solid var(--line); flex: 1 1 24rem; box-sizing: border-box; max-width: 100%; }
figure img { width: 100%; height: auto; display: block; } figcaption { font-size: .9rem; }
.headline { font-size: 1.3rem; } .muted { opacity: .75; } code { overflow-wrap: anywhere; }
"""

_CURRENCIES = {
    "update": "updates",
    "reward_queries": "reward queries",
    "network_calls": "network calls",
    "seconds": "seconds",
}


def write_report(folder: str | Path) -> Path:
    """Write ``folder/report.html`` from what the run has left so far, and say what is missing.

    Raises:
        FileNotFoundError: ``folder`` holds no run.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"folder must hold a run, but {folder} has no config.json")
    config = json.loads((folder / "config.json").read_text())
    summary, transfer = _json(folder / "summary.json"), _json(folder / "transfer.json")
    metrics = _metrics(folder / "metrics.jsonl")
    parts = [
        _headline(summary),
        _pictures(folder / "samples"),
        _curves(metrics),
        _transfer(transfer),
        _settings(config),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(folder.name)}: fine-tuning "
        f"report</title><style>{_STYLE}</style></head>"
        f"<body><h1>{html.escape(folder.name)}</h1>{''.join(parts)}</body></html>\n"
    )
    partial = folder / "report.html.partial"
    partial.write_text(page, encoding="utf-8")
    return partial.replace(folder / "report.html")


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _number(estimate: dict[str, Any]) -> str:
    error = estimate["standard_error"]
    spread = "" if error is None else f" &pm; {error:.2g}"
    return f"{estimate['mean']:.4g}{spread}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    kind = ' class="number"' if numbers else ""
    first, *others = heads
    head = f'<th scope="col">{first}</th>' + "".join(
        f'<th scope="col"{kind}>{h}</th>' for h in others
    )
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td{kind}>{c}</td>" for c in row[1:])
        + "</tr>"
        for row in rows
    )
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{inside}</table></div>'


def _headline(summary: dict[str, Any] | None) -> str:
    if summary is None:
        return "<p>This run is not finished: there is no evaluation yet.</p>"
    rewards = {"reward": summary["reward"]}
    rewards |= {f"judge: {name}": value for name, value in summary.get("judges", {}).items()}
    rows = []
    for name, value in rewards.items():
        gain = value["difference"]
        error = gain["standard_error"]
        errors = f"{gain['mean'] / error:+.1f}" if error else "-"
        numbers = [_number(value[part]) for part in ("before", "after", "difference")]
        rows.append([html.escape(name), *numbers, errors])
    heads = ["held-out samples", "before", "after", "paired difference", "in standard errors"]
    return (
        _table(heads, rows)
        + f"<p>Path KL from the pretrained model: <b>{_number(summary['path_kl'])}</b> nats. "
        f'<span class="muted">{summary["reward"]["after"]["n"]} samples, the same seeds before and '
        "after; &pm; is one standard error.</span></p>"
    )


def _image(data: bytes, kind: str, alt: str, caption: str) -> str:
    inside = base64.b64encode(data).decode()
    return (
        f'<figure><img src="data:image/{kind};base64,{inside}" alt="{html.escape(alt)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _pictures(folder: Path) -> str:
    found = sorted(folder.glob("step-*.png"))
    if not found:
        return "<h2>Pictures</h2><p>None yet.</p>"
    shown = [found[0]] if len(found) == 1 else [found[0], found[-1]]
    figures = [
        _image(
            path.read_bytes(),
            "png",
            f"Grid of generated pictures after {int(path.stem[5:])} updates",
            f"after {int(path.stem[5:])} updates"
            if int(path.stem[5:])
            else "before: the pretrained model",
        )
        for path in shown
    ]
    return (
        "<h2>Before and after</h2><p>The same prompts and seeds in the same places.</p>"
        f'<div class="cards">{"".join(figures)}</div>'
    )


def _curves(metrics: list[dict[str, Any]]) -> str:
    if not metrics:
        return "<h2>Curves</h2><p>No update is done yet.</p>"
    figures = []
    for quantity, unit in (("reward", "reward"), ("path_kl", "path KL, nats")):
        for currency, label in _CURRENCIES.items():
            if quantity == "path_kl" and currency != "update":
                continue
            figures.append(
                _image(
                    _plot(metrics, quantity, currency, label, unit),
                    "svg+xml",
                    f"{unit} of the training samples against {label}",
                    f"{unit} against {label}; the band is one standard error either side",
                )
            )
    return f'<h2>Training</h2><div class="cards">{"".join(figures)}</div>'


def _plot(
    metrics: list[dict[str, Any]], quantity: str, currency: str, label: str, unit: str
) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    x = [line[currency] for line in metrics]
    y = [line[quantity]["mean"] for line in metrics]
    e = [line[quantity]["standard_error"] or 0 for line in metrics]
    axes.fill_between(
        x,
        [a - b for a, b in zip(y, e, strict=True)],
        [a + b for a, b in zip(y, e, strict=True)],
        alpha=0.25,
        linewidth=0,
    )
    axes.plot(x, y, marker="." if len(x) < 60 else None)
    axes.set(xlabel=label, ylabel=unit)
    axes.grid(alpha=0.3)
    return _svg(figure)


def _svg(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _transfer(rows: list[dict[str, Any]] | None) -> str:
    title = "<h2>Transfer to other step counts</h2>"
    if not rows:
        return (
            f"{title}<p>Not measured yet: <code>python -m diffusion_envs.sd15 evaluate RUN "
            f"--steps 10 25 "
            "50 100</code>.</p>"
        )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["sampler"] for row in rows):
        mine = [row for row in rows if row["sampler"] == name]
        axes.errorbar(
            [row["steps"] for row in mine],
            [row["difference"]["mean"] for row in mine],
            [1.96 * row["difference"]["standard_error"] for row in mine],
            marker="o",
            capsize=3,
            label=name,
        )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="steps", ylabel="gain in reward", xscale="log")
    axes.legend()
    cells = [
        [
            html.escape(row["sampler"]),
            str(row["steps"]),
            *(_number(row[part]) for part in ("before", "after", "difference")),
        ]
        for row in rows
    ]
    plot = _image(
        _svg(figure),
        "svg+xml",
        "Gain in reward against the number of sampling steps",
        "paired gain with 95 % intervals",
    )
    table = _table(["sampler", "steps", "before", "after", "paired difference"], cells)
    return f'{title}<div class="cards">{plot}</div>{table}'


def _settings(config: dict[str, Any]) -> str:
    def rows(part: dict[str, Any]) -> list[list[str]]:
        return [
            [html.escape(k), f"<code>{html.escape(json.dumps(v, ensure_ascii=False))}</code>"]
            for k, v in part.items()
        ]

    known = config["versions"] | {"commit": config.get("commit")}
    return (
        "<h2>Settings</h2>"
        + _table(["setting", "value"], rows(config["settings"]), numbers=False)
        + "<h2>Versions</h2>"
        + _table(["of", "version"], rows(known), numbers=False)
    )
