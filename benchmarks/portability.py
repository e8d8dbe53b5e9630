"""The tests that round, under every kernel that this machine can run.

python -m benchmarks.portability            the matrix: under 15 minutes on 2 cores
python -m benchmarks.portability --sample   two kernels and the fewest tests: what CI runs

A row is a choice of kernels (``verification.kernels``) by the variables that choose them, with a
fingerprint of their results, and what pytest says under it. Choices whose fingerprint equals one
before give the same bits here, as a rule, and are not run again: MKL picks by the vendor of the
processor, oneDNN by what it can do. Choices of instructions that this processor lacks are left out
where a library would run them all the same, and marked where it falls back to others. The exit code
is 1 where a test failed.

A row that fails is run again by
    VARIABLE=value ... python -m pytest FILE
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from verification.kernels import Kernel, processor

# Each value of each variable at least once, the usual first. Alone, so that a failure names its
# library; then together, as far from the usual as this machine can get.
MATRIX = (
    Kernel({}),
    Kernel({"MKL_CBWR": "COMPATIBLE"}),
    Kernel({"MKL_CBWR": "SSE4_2"}),
    Kernel({"MKL_CBWR": "AVX2"}),
    Kernel({"MKL_CBWR": "AVX512"}),
    Kernel({"ATEN_CPU_CAPABILITY": "default"}),
    Kernel({"ATEN_CPU_CAPABILITY": "avx2"}),
    Kernel({"ATEN_CPU_CAPABILITY": "avx512"}),
    Kernel({"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    Kernel({"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    Kernel({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    Kernel({"OPENBLAS_CORETYPE": "Prescott"}),
    Kernel({"OPENBLAS_CORETYPE": "Nehalem"}),
    Kernel({"OPENBLAS_CORETYPE": "Haswell"}),
    Kernel({"OPENBLAS_CORETYPE": "SkylakeX"}),
    Kernel({"OMP_NUM_THREADS": "2"}),
    Kernel(
        {
            "MKL_CBWR": "COMPATIBLE",
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "OPENBLAS_CORETYPE": "Prescott",
            "OMP_NUM_THREADS": "2",
        }
    ),
)
SAMPLE = (MATRIX[1], MATRIX[5])

# What rounds in more than one order: claims, batches, chunks, processes, resumption, solvers of
# numpy and scipy. Of the claims the right code alone: a planted mistake is rejected by orders of
# magnitude, and was measured under several kernels.
CLAIMS = ("-m", "verification", "--no-plant", "--output")
FEWEST = ("tests/diffusion_envs/training/test_rounding.py", "tests/ctrl/test_noise.py")
# Minutes of training, and of grids whose tolerances are of another size than round-off, are left
# out: the whole must fit into a quarter of an hour.
PARTS = (
    *FEWEST,
    "tests/verification/test_claims.py",
    *(
        f"tests/ctrl/test_{name}.py"
        for name in (
            "advantages", "estimate", "exploration", "girsanov", "linear", "lq", "martingale",
            "paths", "policy", "policy_gradient", "problems", "q_learning", "sde", "simulate",
            "solvers", "state_grid", "transitions", "trust_region", "value",
        )
    ),
    *(
        f"tests/diffusion_envs/test_{name}.py"
        for name in (
            "black_boxes", "denoising", "gaussian", "linear_policy", "samplers", "schedule",
            "two_views", "value",
        )
    ),
    *(
        f"tests/diffusion_envs/objectives/test_{name}.py"
        for name in ("adjoint_matching", "ddpo", "grpo", "ram", "score_as_action")
    ),
    "tests/diffusion_envs/samplers/test_flow_sde.py",
    "tests/diffusion_envs/training/test_update_losses.py",
)  # fmt: skip
LEFT_OUT = "not mistake and not refused"  # planted ones, as above; a refusal does not round
# Without the checks of shapes, which a kernel cannot change: they take most of the time.
PLAIN = "addopts=--import-mode=importlib --strict-markers"


@dataclass(frozen=True)
class Row:
    """Test results under one choice of kernels.

    Attributes:
        kernel: that was asked for.
        fingerprint: of its results; what was run is another's where they are equal.
        says: what became of it.
        passed: tests.
        failed: tests, or the process itself.
        seconds: it took.
        failures: names of the tests.
    """

    kernel: Kernel
    fingerprint: str
    says: str
    passed: int = 0
    failed: int = 0
    seconds: float = 0.0
    failures: tuple[str, ...] = ()


def fingerprint_of(kernel: Kernel) -> str:
    """``kernels.fingerprint`` in a process of this kernel; empty if it cannot run."""
    command = [sys.executable, "-m", "verification.kernels"]
    done = subprocess.run(command, env=kernel.environ(), capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def tested(kernel: Kernel, arguments: Sequence[str]) -> tuple[int, int, tuple[str, ...]]:
    """Claims and tests under this kernel: passed, failed, and the names of those that failed."""
    environ = kernel.environ()
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
    command += ["-o", PLAIN]
    tests = subprocess.run([*command, *arguments], env=environ, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *CLAIMS, folder]
        claims = subprocess.run(command, env=environ, capture_output=True, text=True)
    passed, failed, names = read_tests(tests.stdout, tests.returncode)
    held, broken, others = read_claims(claims.stdout, claims.returncode)
    return passed + held, failed + broken, (*names, *others)


def read_tests(output: str, code: int) -> tuple[int, int, tuple[str, ...]]:
    """Passed and failed tests by pytest's last words; a process that ended early is a failure."""
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", output)}
    failures = tuple(re.findall(r"^(?:FAILED|ERROR) (\S+)", output, flags=re.MULTILINE))
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if code != 0 and not failed:
        return counts.get("passed", 0), 1, (f"pytest ended with {code}",)
    return counts.get("passed", 0), failed, failures


def read_claims(output: str, code: int) -> tuple[int, int, tuple[str, ...]]:
    """The same of ``python -m verification``."""
    last = re.search(r"(\d+) of (\d+) claims hold", output)
    if last is None:
        return 0, 1, (f"verification ended with {code}",)
    held, every = int(last[1]), int(last[2])
    failures = re.findall(r"^ *fail: (.*)$", output, flags=re.MULTILINE)
    return held, every - held, tuple(failures)


def rows(
    kernels: Sequence[Kernel],
    run: Callable[[Kernel], tuple[int, int, tuple[str, ...]]],
    identify: Callable[[Kernel], str] = fingerprint_of,
    processes: int = 2,
) -> list[Row]:
    """Every kernel's row, in order; those of equal fingerprints are run once."""
    known: dict[str, Kernel] = {}
    collected: dict[int, Row] = {}
    waiting: list[tuple[int, Kernel, str, str]] = []
    for at, kernel in enumerate(kernels):
        if kernel.missing:
            collected[at] = Row(kernel, "", f"left out: this processor has no {kernel.missing}")
            continue
        digits = identify(kernel)
        note = f"falls back: this processor has no {kernel.replaced}" if kernel.replaced else ""
        threads = kernel.variables.get("OMP_NUM_THREADS", "1")
        if not digits:
            collected[at] = Row(kernel, "", "cannot run here", failed=0)
        elif (key := f"{digits}/{threads}") in known:
            same = f"same kernels as {known[key].name}"
            collected[at] = Row(kernel, digits, f"{same}; {note}" if note else same)
        else:
            known[key] = kernel
            waiting.append((at, kernel, digits, note))

    def one(job: tuple[int, Kernel, str, str]) -> tuple[int, Row]:
        at, kernel, digits, note = job
        began = time.perf_counter()
        passed, failed, failures = run(kernel)
        seconds = time.perf_counter() - began
        print(f"{kernel.name}: {passed} passed, {failed} failed, {seconds:.0f} s", file=sys.stderr)
        return at, Row(kernel, digits, note, passed, failed, seconds, failures)

    with ThreadPoolExecutor(processes) as pool:
        collected.update(pool.map(one, waiting))
    return [collected[at] for at in range(len(kernels))]


def table(rows: Sequence[Row]) -> str:
    """Table of the rows in Markdown."""
    lines = [
        "| setting | fingerprint | passed | failed | s | |",
        "| --- | --- | --: | --: | --: | --- |",
    ]
    for row in rows:
        ran = row.passed + row.failed > 0
        counts = f"{row.passed} | {row.failed} | {row.seconds:.0f}" if ran else " |  | "
        lines.append(f"| {row.kernel.name} | {row.fingerprint} | {counts} | {row.says} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a test failed."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", action="store_true", help="two kernels, the fewest tests")
    parser.add_argument("--processes", type=int, default=2, help="kernels at a time")
    options = parser.parse_args(arguments)
    tests = [*(FEWEST if options.sample else PARTS), "-k", LEFT_OUT]
    began = time.perf_counter()
    measured = rows(
        SAMPLE if options.sample else MATRIX,
        lambda kernel: tested(kernel, tests),
        processes=options.processes,
    )
    print(f"{processor()}\n\n{table(measured)}\n")
    for row in measured:
        for name in row.failures:
            print(f"{row.kernel.name}: {name}")
    failed = sum(row.failed for row in measured)
    kernels = len({row.fingerprint for row in measured if row.passed + row.failed > 0})
    print(f"{kernels} different kernels, {failed} failures, {time.perf_counter() - began:.0f} s")
    return 1 if failed or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
