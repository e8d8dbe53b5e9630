"""One stage, its results left in a file; or the pages that are made of all of them.

python -m benchmarks.gpu rollouts --folder runs/gpu [--rehearse]
python -m benchmarks.gpu pages --folder runs/gpu --to docs
python -m benchmarks.gpu ended tests --folder runs/gpu --code 124      (what gpu.sh says of a
                                                                        stage that left nothing)
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import full_size, pages, rollouts, tiny
from benchmarks.gpu.timing import Device
from diffusion_envs.runs.run_folder import versions


def tests(where: Device) -> Iterable[dict[str, Any]]:
    """The tests that need CUDA, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=line", "-m", "gpu", "-p", "no:cacheprovider"],
        capture_output=True, text=True,
    )  # fmt: skip
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped)", done.stdout)}
    failures = re.findall(r"^FAILED (\S+)", done.stdout, flags=re.MULTILINE)
    yield {"case": "pytest -m gpu", **counts, "exit_code": done.returncode, "failures": failures}


STAGES: dict[str, Callable[[Device], Iterable[dict[str, Any]]]] = {
    "tests": tests,
    "rollouts": rollouts.rows,
    "tiny": tiny.rows,
    "full_size": full_size.rows,
}


def device_of(rehearsal: bool) -> Device:
    """The GPU; of a rehearsal the CPU.

    Raises:
        SystemExit: there is no GPU.
    """
    if rehearsal:
        torch.set_num_threads(1)
        return Device(torch.device("cpu"), rehearsal=True)
    if not torch.cuda.is_available():
        sys.exit("no GPU that torch can use: bash benchmarks/gpu.sh --rehearse runs on the CPU")
    return Device(torch.device("cuda"), rehearsal=False)


def machine(where: Device) -> dict[str, Any]:
    """What the numbers were measured on."""
    found: dict[str, Any] = {"rehearsal": where.rehearsal, "cpu": platform.machine()}
    if where.device.type == "cuda":
        properties = torch.cuda.get_device_properties(where.device)
        found |= {"gpu": properties.name, "memory_GiB": properties.total_memory / 2**30}
        found["cuda"] = torch.version.cuda
    return found | {"versions": versions()}


def write(folder: Path, stage: str, found: dict[str, Any]) -> None:
    """Under a temporary name, then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stage}.json"
    path.with_suffix(".tmp").write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".tmp").replace(path)


def run(stage: str, where: Device, folder: Path) -> int:
    """The stage's lines, written after each, so that one that is stopped leaves what it had."""
    found: dict[str, Any] = {"stage": stage, "machine": machine(where), "rows": []}
    began = time.perf_counter()
    try:
        for row in STAGES[stage](where):
            found["rows"].append(row)
            found |= {"status": "stopped", "seconds": time.perf_counter() - began}
            write(folder, stage, found)
        found["status"] = "done"
    except Exception as error:
        found |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    found["seconds"] = time.perf_counter() - began
    write(folder, stage, found)
    return int(found["status"] != "done")


def main() -> int:
    """One of the three."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=[*STAGES, "pages", "ended"])
    parser.add_argument("stage", nargs="?", choices=list(STAGES))
    parser.add_argument("--folder", type=Path, required=True, help="where the stages leave results")
    parser.add_argument("--to", type=Path, default=Path("docs"), help="where the pages go")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--code", type=int, default=0, help="with which a stage ended")
    options = parser.parse_args()
    if options.what == "pages":
        pages.write(options.folder, options.to, list(STAGES))
        return 0
    if options.what == "ended":
        return ended(options.folder, options.stage, options.code)
    return run(options.what, device_of(options.rehearse), options.folder)


def ended(folder: Path, stage: str, code: int) -> int:
    """Say of a stage that was killed why it has no more lines."""
    path = folder / f"{stage}.json"
    found = json.loads(path.read_text()) if path.exists() else {"stage": stage, "rows": []}
    if found.get("status") not in ("done", "failed"):
        why = "ran out of its time" if code == 124 else f"ended with code {code}"
        found |= {"status": "stopped", "error": why}
        write(folder, stage, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
