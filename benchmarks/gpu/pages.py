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

`bash benchmarks/gpu.sh` measures all of this on a machine with a GPU, in at most eight minutes, and
writes this page and `gpu.json`; `bash benchmarks/gpu.sh --rehearse` runs the same stages on the
CPU, tiny, to show that they run.

| part | measured on a GPU | counted on the simulated device (`make test-device`) |
| --- | --- | --- |
"""
PARTS = (
    ("tensors and generators of two devices, refused", "tests", True),
    ("every estimator of `ctrl`", "tests", True),
    ("an update of every objective, resumed", "", True),
    ("synchronisations and launches ([table](benchmarks.md))", "", True),
    ("seconds of roll-outs and path KLs", "rollouts", False),
    ("bit-for-bit resume", "tiny", False),
    ("images per second, memory, share of the network's own calls", "full_size", False),
    ("CUDA's own rounding, races, pinned memory, several GPUs", "", False),
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
    for part, stage, simulated in PARTS:
        measured = "yes" if real.get(stage, {}).get("status") == "done" else "no"
        lines.append(f"| {part} | {measured} | {'yes' if simulated else 'no'} |")
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
