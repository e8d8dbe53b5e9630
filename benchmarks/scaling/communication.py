"""What processes send each other: seconds by size on this machine, and the law that they follow.

An all-reduce of n bytes among P processes around a ring takes 2 (P - 1) steps, in each of which
n / P bytes pass on; a gather takes P - 1 steps of n bytes, n those of one process. So both are
modelled as steps * (latency + bytes of a step / bandwidth). Where processes share cores, a step
takes as many times as long as there are processes to a core; where all that they exchange fits into
their cache together, the bandwidth is that of the cache.

On a machine that does other work a median says what that leaves. The least of many runs says what
the link does, and is what is fitted.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed

Kind = Literal["all-reduce", "gather"]
SIZES = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8)  # bytes of one process
FITTED = (2, 4)  # processes
LARGEST_GATHERED = 10**6  # bytes; statistics of a roll-out have fewer
HELD_OUT = (  # chosen after the law was fixed, and measured after that
    ("all-reduce", 3, 2 * 10**6),
    ("all-reduce", 3, 3 * 10**7),
    ("gather", 3, 3 * 10**4),
)


@dataclass(frozen=True)
class Link:
    """How fast processes pass on bytes.

    Attributes:
        latency: seconds of a step whatever its bytes.
        bandwidth: bytes a second of one process.
        cores: that the processes share; None if each has its own.
        cache: bytes of the cache that they share.
        cached: bandwidth where all of them fit into it together.
    """

    latency: float
    bandwidth: float
    cores: int | None = None
    cache: float = 0.0
    cached: float = math.inf

    def seconds(self, kind: Kind, processes: int, sent: float) -> float:
        """Of one exchange of ``sent`` bytes of each process."""
        steps, each = steps_of(kind, processes, sent)
        crowded = 1.0 if self.cores is None else max(1.0, processes / self.cores)
        fits = processes * sent <= self.cache
        bandwidth = self.cached if fits else self.bandwidth
        return crowded * steps * (self.latency + each / bandwidth)


def steps_of(kind: Kind, processes: int, sent: float) -> tuple[int, float]:
    """Steps around the ring, and the bytes that pass on in each."""
    if kind == "all-reduce":
        return 2 * (processes - 1), sent / max(1, processes)
    return processes - 1, sent


def fit(rows: Sequence[Mapping[str, Any]], cores: int | None = None, cache: float = 0.0) -> Link:
    """The link whose times have the least mean absolute error in the logarithm.

    In the logarithm, since sizes differ by five orders of magnitude; absolute, so that a row that
    is wrong does not count more. One number after the other, on grids that become finer.

    Args:
        rows: kind, processes, bytes and least seconds of exchanges.
        cores: that the processes share.
        cache: bytes of theirs.
    """

    def error(link: Link) -> float:
        return statistics.fmean(
            abs(math.log(link.seconds(row["kind"], row["processes"], row["bytes"]) / row["least"]))
            for row in rows
        )

    best = Link(1e-4, 1e9, cores, cache, 1e9)
    beyond = any(row["processes"] * row["bytes"] > cache for row in rows)
    names = ["latency", "cached"] + ["bandwidth"] * beyond
    for width in (3.0, 1.0, 0.3, 0.1, 0.03):  # in the logarithm to base 10
        factors = [10 ** (width * (k / 10 - 1)) for k in range(21)]
        for _ in range(4):
            for name in names:
                near = [replace(best, **{name: getattr(best, name) * f}) for f in factors]
                best = min(near, key=error)
    return best if beyond else replace(best, bandwidth=best.cached)


def worker(folder: Path, repeats: int) -> None:
    """One of several processes: times every exchange, and the first writes them."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes
    )
    cases = [(kind, size) for kind in ("all-reduce", "gather") for size in SIZES]
    cases += [(kind, size) for kind, n, size in HELD_OUT if n == processes]
    rows = []
    for kind, size in cases:
        if kind == "gather" and size > LARGEST_GATHERED:
            continue
        value = torch.ones(size // 4)
        gathered = [torch.empty_like(value) for _ in range(processes)]
        times = []
        for _ in range(max(3, repeats if size < 10**7 else repeats // 10)):
            torch.distributed.barrier()
            began = time.perf_counter()
            if kind == "all-reduce":
                torch.distributed.all_reduce(value)
            else:
                torch.distributed.all_gather(gathered, value)
            times.append(time.perf_counter() - began)
        rows.append(
            {
                "kind": kind,
                "processes": processes,
                "bytes": size,
                "seconds": statistics.median(times),
                "least": min(times),
                "runs": len(times),
                "load": round(os.getloadavg()[0], 1),
            }
        )
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure(processes: int, repeats: int = 300) -> Iterator[dict[str, Any]]:
    """Times of every exchange among so many processes of this machine, by gloo."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        code = (
            "import sys; from pathlib import Path; from benchmarks.scaling.communication import "
            "worker; worker(Path(sys.argv[1]), int(sys.argv[2]))"
        )
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(folder), str(repeats)],
                env=os.environ
                | {"RANK": str(rank), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"},
            )
            for rank in range(processes)
        ]
        if any(process.wait() for process in started):
            raise RuntimeError(f"one of {processes} processes failed")
        yield from json.loads((folder / "rows.json").read_text())
