"""What an update takes here, what it would take on 8 and 64 GPUs, and where they would wait.

    python -m benchmarks.scaling            the tables, from what is stored in docs/scaling.json
    python -m benchmarks.scaling --write    and into docs/scaling.md
    python -m benchmarks.scaling --measure counts|schedule|tiny|middle|communication   that anew

Measuring takes minutes on a machine that does nothing else.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.pages import filled
from benchmarks.scaling import cluster, communication, measured_updates
from benchmarks.scaling.cluster import A100, Run
from benchmarks.scaling.counts import Counts, build_middle, counted
from benchmarks.scaling.measured_updates import FITTED, HELD_OUT, Sizes
from benchmarks.scaling.schedule import Reward, mean_update
from diffusion_envs.runs.run_folder import versions

STORED = Path(__file__).parents[2] / "docs" / "scaling.json"
PAGE = STORED.with_suffix(".md")
GPUS = (1, 8, 64)
MODELS = {"tiny": "the embedded model", "middle": "a UNet of 8.7 M parameters"}
LARGE = {"sd15": "SD1.5, 512 x 512", "sdxl": "SDXL, 1024 x 1024"}
BATCH = {"sd15": 8, "sdxl": 4}
FROZEN = {"sd15": 207e6, "sdxl": 902e6}  # parameters of decoder and text encoders
EVENT = {"tiny": 4 * 8 * 8, "middle": 4 * 16 * 16}


@dataclass(frozen=True)
class Prediction:
    """Of something that was in no fit."""

    what: str
    predicted: float
    measured: float
    unit: str


def counts_of(stored: Mapping[str, Any]) -> dict[str, Counts]:
    """Of the large networks."""
    return {name: Counts(**values) for name, values in stored["counts"].items()}


def _sizes(row: Mapping[str, Any]) -> Sizes:
    return Sizes(**row["sizes"])


def _fits(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Prices of time, in calls of the yardstick, and of memory, in bytes."""
    fitted = [row for row in rows if _sizes(row) != HELD_OUT]
    time = measured_updates.fit(
        [measured_updates.time_features(_sizes(row)) for row in fitted],
        [row["ratio"] for row in fitted],
    )
    memory = measured_updates.fit(
        [measured_updates.memory_features(_sizes(row), EVENT[name]) for row in fitted],
        [row["peak_bytes"] for row in fitted],
    )
    return time, memory


def _predictions(
    rows: Sequence[Mapping[str, Any]], name: str
) -> Iterator[tuple[Any, float, float]]:
    """For each row: it, its time and its memory by the fit."""
    time, memory = _fits(rows, name)
    for row in rows:
        sizes = _sizes(row)
        yield (
            row,
            measured_updates.predicted(time, measured_updates.time_features(sizes)),
            measured_updates.predicted(
                memory, measured_updates.memory_features(sizes, EVENT[name])
            ),
        )


def held_out(stored: Mapping[str, Any]) -> list[Prediction]:
    """What was chosen before anything was measured, and is in no fit."""
    told = []
    for name in stored["updates"]:
        words = MODELS[name]
        for row, time, memory in _predictions(stored["updates"][name], name):
            if _sizes(row) != HELD_OUT:
                continue
            unit = row["unit_seconds"]
            told.append(Prediction(f"{words}, an update", time * unit, row["ratio"] * unit, "s"))
            told.append(
                Prediction(f"{words}, its memory", memory / 1e6, row["peak_bytes"] / 1e6, "MB")
            )
    links = _links(stored)
    for row in stored["communication"]:
        if (row["kind"], row["processes"], row["bytes"]) in communication.HELD_OUT:
            link = links[row["kind"]]
            seconds = link.seconds(row["kind"], row["processes"], row["bytes"])
            what = f"{row['kind']}, {row['processes']} processes, {row['bytes']:.0e} bytes"
            told.append(Prediction(what, 1e3 * seconds, 1e3 * row["least"], "ms"))
    return told


def _links(stored: Mapping[str, Any]) -> dict[str, communication.Link]:
    """For each kind of exchange, on the machine that was measured."""
    rows = [r for r in stored["communication"] if r["processes"] in communication.FITTED]
    cores = stored["machine"]["cores"]
    cache = stored["machine"]["cache"] / 2  # what is sent, and what comes
    return {
        kind: communication.fit([row for row in rows if row["kind"] == kind], cores, cache)
        for kind in ("all-reduce", "gather")
    }


# -- tables ----------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _gb(value: float) -> str:
    return f"{value / 1e9:.3g}"


def _updates_table(stored: Mapping[str, Any]) -> str:
    lines = []
    for name in stored["updates"]:
        for row, time, memory in _predictions(stored["updates"][name], name):
            unit, sizes = row["unit_seconds"], _sizes(row)
            held = "held out" if sizes == HELD_OUT else "fitted"
            lines.append(
                [
                    name,
                    sizes.label,
                    held,
                    f"{time * unit:.3g} / {row['ratio'] * unit:.3g} "
                    f"({_percent(time / row['ratio'] - 1)})",
                    f"{memory / 1e6:.0f} / {row['peak_bytes'] / 1e6:.0f} "
                    f"({_percent(memory / row['peak_bytes'] - 1)})",
                ]
            )
    head = ["model", "update", "", "s, by the fit / measured", "MB, by the fit / measured"]
    return _table(head, lines)


def _held_out_table(stored: Mapping[str, Any]) -> str:
    lines = [
        [
            row.what,
            f"{row.predicted:.3g} {row.unit}",
            f"{row.measured:.3g} {row.unit}",
            _percent(row.predicted / row.measured - 1),
        ]
        for row in held_out(stored)
    ]
    return _table(["held out", "predicted", "measured", "off by"], lines)


def _communication_table(stored: Mapping[str, Any]) -> str:
    links = _links(stored)
    lines = []
    for row in stored["communication"]:
        by_fit = links[row["kind"]].seconds(row["kind"], row["processes"], row["bytes"])
        lines.append(
            [
                row["kind"],
                str(row["processes"]),
                f"{row['bytes']:.0e}",
                f"{1e3 * by_fit:.3g}",
                f"{1e3 * row['least']:.3g}",
                f"{1e3 * row['seconds']:.3g}",
                str(row["runs"]),
            ]
        )
    head = ["exchange", "processes", "bytes", "ms, by the fit", "least", "median", "runs"]
    told = "; ".join(
        f"{kind}: {1e6 * link.latency:.3g} us a step, {link.cached / 1e6:.3g} MB/s in the cache"
        + (f", {link.bandwidth / 1e6:.3g} beyond" if link.bandwidth != link.cached else "")
        for kind, link in links.items()
    )
    return f"Fitted to the least of 2 and of 4 processes. {told}.\n\n{_table(head, lines)}"


def _run(name: str, **changes: Any) -> Run:
    return replace(Run(batch=BATCH[name], frozen=FROZEN[name]), **changes)


def _parts_table(stored: Mapping[str, Any]) -> str:
    counts, lines = counts_of(stored), []
    for name, words in LARGE.items():
        for trains in ("lora", "all", "sharded"):
            run = _run(name, trains=trains)
            for gpus in GPUS[1:] if trains != "lora" else GPUS:
                parts = cluster.seconds(counts[name], run, gpus, A100)
                whole = sum(parts.values())
                asked = ("sampling", "reference", "update", "communication", "checkpoint")
                shares = [_percent(parts[part] / whole) for part in asked]
                lines.append([words, trains, str(gpus), f"{whole:.0f}", *shares])
    head = ["model", "trains", "GPUs", "s an update", "sampling", "reference", "update"]
    return _table([*head, "communication", "checkpoint"], lines)


def _memory_table(stored: Mapping[str, Any]) -> str:
    counts, lines = counts_of(stored), []
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("LoRA, recomputing", {}, 1),
        ("LoRA", {"recomputes": False}, 1),
        ("all weights, recomputing", {"trains": "all"}, 1),
        ("all weights, on 8 GPUs in shards", {"trains": "sharded"}, 8),
        ("all weights, on 64 GPUs in shards", {"trains": "sharded"}, 64),
    ]
    for name, words in LARGE.items():
        for what, changes, gpus in cases:
            held = cluster.memory(counts[name], _run(name, **changes), gpus)
            parts = [_gb(held[part]) for part in ("weights", "trained", "paths", "activations")]
            whole = sum(held.values())
            fits = "yes" if whole < A100.memory else "no"
            lines.append([words, what, *parts, _gb(whole), fits])
    head = ["model", "", "weights", "what trains", "paths", "activations", "GB", "fits 80 GB"]
    return _table(head, lines)


def rewards_of(computed: float) -> list[Reward]:
    """Who may score, given the seconds of a picture's update without its reward."""
    own = 10**6  # servers of others: as many as are asked
    return [
        Reward("on the GPU, 5 %", service=0.05 * computed, on_gpu=True),
        Reward(
            "on the processor, 5 %", service=0.05 * computed, of_each=True, request=8, at_once=1
        ),
        Reward(
            "on the processor, 25 %", service=0.25 * computed, of_each=True, request=8, at_once=1
        ),
        Reward("CLIP behind 1 server", (0.05, 0.2), 0.01, 1),
        Reward("CLIP behind 8 servers", (0.05, 0.2), 0.01, 8),
        Reward("VLM of others, 2 to 20 s", (2.0, 20.0), 0.0, own, request=1, at_once=8),
        Reward("own VLM, 8 pictures/s", (0.5, 1.0), 4.0, 32, request=1, at_once=8),
        Reward("own VLM, 64 pictures/s", (0.5, 1.0), 4.0, 256, request=1, at_once=8),
    ]


CASES = {  # of the schedule: which network, and whether the pretrained model is asked
    "SD1.5": ("sd15", True),
    "SD1.5 without reference": ("sd15", False),
    "SDXL": ("sdxl", True),
}
CALLS = (0, 1, 4)  # of the reward at once, while more is sampled


def schedule_row(
    counts: Mapping[str, Counts], case: str, reward: int, gpus: int
) -> list[tuple[float, float]]:
    """Seconds of an update, and the share of them that a GPU waits, for each of ``CALLS``."""
    name, reference = CASES[case]
    run = _run(name, reference=reference)
    computed = cluster.work(counts[name], run, 1, A100).computed / run.pictures
    who = rewards_of(computed)[reward]
    work = cluster.work(counts[name], run, gpus, A100)
    made = [mean_update(work, who, gpus, overlap=calls) for calls in CALLS]
    return [(round(each.seconds, 2), round(each.share_waiting, 4)) for each in made]


def _schedule_table(stored: Mapping[str, Any], case: str) -> str:
    lines = []
    for k, reward in enumerate(rewards_of(1.0)):
        cells = [reward.name]
        for gpus in GPUS:
            rows = stored["schedule"][case][str(k)][str(gpus)]
            (whole, waits), *overlapped = rows
            wins = [_percent(1 - seconds / whole) for seconds, _ in overlapped]
            cells += [f"{whole:.0f} s", _percent(waits), *wins]
        lines.append(cells)
    heads = [f"{gpus} GPU{'s' * (gpus > 1)} | waits | 1 call | 4 calls" for gpus in GPUS]
    return _table(["reward", *" | ".join(heads).split(" | ")], lines)


def tables(stored: Mapping[str, Any]) -> dict[str, str]:
    """Every table of the page, by its name."""
    return {
        "held out": _held_out_table(stored),
        "updates": _updates_table(stored),
        "communication": _communication_table(stored),
        "parts": _parts_table(stored),
        "memory": _memory_table(stored),
        **{f"schedule of {case}": _schedule_table(stored, case) for case in CASES},
    }


# -- measuring -------------------------------------------------------------------------------------


def _measure(what: str, rounds: int) -> dict[str, Any]:
    """What belongs into the stored file."""
    if what == "counts":
        return {"counts": {name: asdict(counted(name, rank=8)) for name in LARGE}}
    if what == "schedule":
        counts = counts_of(json.loads(STORED.read_text()))
        rewards = range(len(rewards_of(1.0)))
        return {
            "schedule": {
                case: {
                    str(k): {str(gpus): schedule_row(counts, case, k, gpus) for gpus in GPUS}
                    for k in rewards
                }
                for case in CASES
            }
        }
    if what == "communication":
        rows = [row for n in (*communication.FITTED, 3) for row in communication.measure(n)]
        return {"communication": rows}
    with tempfile.TemporaryDirectory() as temporary:
        model: str | Path = what
        if what == "middle":
            model = Path(temporary) / "middle"
            build_middle(model)
        rows = []
        for row in measured_updates.measured(model, (*FITTED, HELD_OUT), rounds):
            print(json.dumps(row), flush=True)
            rows.append(row)
    return {"updates": {what: rows}}


def _store(measured: Mapping[str, Any]) -> None:
    stored = json.loads(STORED.read_text()) if STORED.is_file() else {"updates": {}}
    for name, value in measured.items():
        stored[name] = stored["updates"] | value if name == "updates" else value
    stored["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cache": _cache(),
        "versions": versions(),
    }
    STORED.write_text(json.dumps(stored, indent=1) + "\n")


def _cache() -> int:
    """Bytes of the last cache that the cores share (Linux)."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    return 1024 * int(size.removesuffix("K"))


def write(stored: Mapping[str, Any]) -> None:
    """Every table into its place on the page."""
    text = PAGE.read_text()
    for name, table in tables(stored).items():
        text = filled(text, name, table)
    PAGE.write_text(text)


def main() -> None:
    """Print, write or measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", choices=["counts", "schedule", *MODELS, "communication"])
    parser.add_argument("--rounds", type=int, default=5, help="of each update (default: 5)")
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    options = parser.parse_args()
    if options.measure:
        _store(_measure(options.measure, options.rounds))
        return
    stored = json.loads(STORED.read_text())
    for name, table in tables(stored).items():
        print(f"{name}\n\n{table}\n")
    if options.write:
        write(stored)


if __name__ == "__main__":
    main()
