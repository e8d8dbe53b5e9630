"""docs/gpu.json and docs/gpu.md, made of what the stages left."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TITLES = {
    "tests": "The tests that need CUDA",
    "rollouts": "Roll-outs and path KLs",
    "tiny": "Fine-tuning the embedded model, stopped and resumed",
    "full_size": "Stable Diffusion 1.5 at 512 x 512",
}
HEAD = """# On a GPU

`bash benchmarks/gpu.sh` measures on a machine with a GPU, in at most eight minutes, and writes this
page and `gpu.json`; `bash benchmarks/gpu.sh --rehearse` runs the same stages on the CPU, tiny, to
show that they run. What is simulated is counted on an accelerator (`make test-device`) that has
CUDA's rules about devices, generators and waiting, and the CPU's arithmetic and speed.

| part | measured | simulated | neither |
| --- | --- | --- | --- |
"""
_COUNTED = "([table](benchmarks.md))"
# what, the stage that measures it, what is simulated of it, what is neither
PARTS = (
    (
        "every solver, estimator and agent of `ctrl`",
        "tests",
        "the CPU's numbers, to 1e-12; no step of `simulate` (own solvers) and of `path_kl` waits "
        + _COUNTED,
        "",
    ),
    ("seconds of roll-outs and path KLs", "rollouts", f"launches are counted {_COUNTED}", ""),
    (
        "fine-tuning, every objective",
        "",
        "the CPU's numbers, resumed bit for bit, at most one wait for each network call "
        + _COUNTED,
        "float16, several GPUs",
    ),
    ("the embedded model, resumed bit for bit", "tiny", "so it is", ""),
    (
        "Stable Diffusion 1.5 at 512 x 512: images per second, memory, share of its calls",
        "full_size",
        "",
        "",
    ),
    (
        "device choice",
        "",
        "`cuda` without one, `cuda:1` and `mps` are refused, `cpu` beside a GPU works",
        "several GPUs",
    ),
    ("the HJB solver", "", "is for the CPU, says so, and answers on a device", ""),
    ("races, pinned memory, memory limits, streams", "", "", "all of it"),
)


def write(folder: Path, to: Path, stages: Sequence[str]) -> None:
    """The pages, of as many stages as there are.

    Args:
        folder: with a file for each stage that ran.
        to: where gpu.json and gpu.md go.
        stages: in order.
    """
    found = {}
    for stage in stages:
        path = folder / f"{stage}.json"
        if path.exists():
            found[stage] = json.loads(path.read_text())
    to.mkdir(parents=True, exist_ok=True)
    (to / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (to / "gpu.md").write_text(page(found, stages))


def page(found: dict[str, dict[str, Any]], stages: Sequence[str]) -> str:
    """The page in Markdown."""
    real = {name: one for name, one in found.items() if not one.get("machine", {}).get("rehearsal")}
    lines = [HEAD.rstrip()]
    for part, stage, simulated, neither in PARTS:
        measured = "yes" if real.get(stage, {}).get("status") == "done" else "no"
        if measured == "no" and stage:
            neither = ", ".join(filter(None, ["seconds and CUDA's own round-off", neither]))
        lines.append(f"| {part} | {measured} | {simulated} | {neither} |")
    if not found:
        lines += ["", "**Nothing was measured on a GPU so far.**"]
    elif not real:
        lines += ["", "**A rehearsal on the CPU: the numbers below are of the page's form alone.**"]
    for stage in stages:
        if stage in found:
            lines += ["", *_section(TITLES[stage], found[stage])]
    return "\n".join(lines) + "\n"


def _section(title: str, stage: dict[str, Any]) -> list[str]:
    machine = stage.get("machine", {})
    where = machine.get("gpu", "CPU")
    lines = [f"## {title}", ""]
    says = {"done": "Done", "stopped": "Stopped", "failed": "Failed"}[stage["status"]]
    why = f": {stage['error']}" if "error" in stage else ""
    lines.append(f"{says} after {stage.get('seconds', 0):.0f} s on {where}{why}.")
    rows = stage["rows"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if rows:
        lines += ["", "| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
        lines += ["| " + " | ".join(_cell(row.get(c, "")) for c in columns) + " |" for row in rows]
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(str(each) for each in value)
    return "" if value is None else str(value)
