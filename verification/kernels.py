"""Kernels: the arithmetic of other machines, on this one.

A sum of floats depends on the order of its terms, and that order is up to the kernel that a library
picks for a processor: MKL and oneDNN for matrices and convolutions, ATen for what goes elementwise
and for sums, OpenBLAS for numpy and scipy. Each takes its choice from an environment variable, read
once when it is loaded, so that one machine can round as several do: in a process of its own for
each kernel (``Kernel.environ``). What a processor lacks, its library replaces by something else; a
``fingerprint`` tells which kernels were really different.
"""

import hashlib
import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

CHOICES = (
    "MKL_CBWR",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "OMP_NUM_THREADS",
)

# What a choice needs, by Linux's names. OpenBLAS runs it without asking the processor; the others
# take what there is.
_NEEDS = {
    ("MKL_CBWR", "AVX2"): "avx2",
    ("MKL_CBWR", "AVX512"): "avx512f",
    ("ATEN_CPU_CAPABILITY", "avx2"): "avx2",
    ("ATEN_CPU_CAPABILITY", "avx512"): "avx512f",
    ("ONEDNN_MAX_CPU_ISA", "AVX2"): "avx2",
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"): "avx512f",
    ("OPENBLAS_CORETYPE", "Haswell"): "avx2",
    ("OPENBLAS_CORETYPE", "SkylakeX"): "avx512f",
}


@dataclass(frozen=True)
class Kernel:
    """A choice of kernels, by the variables that choose them.

    Attributes:
        variables: of ``CHOICES``; those that are not named are left to the library, and threads
            are one.
    """

    variables: Mapping[str, str]

    def __post_init__(self) -> None:
        if unknown := set(self.variables) - set(CHOICES):
            raise ValueError(f"kernels are chosen by {', '.join(CHOICES)}, not by {unknown}")

    @property
    def name(self) -> str:
        """The choice of kernels, in one line."""
        return " ".join(f"{k}={v}" for k, v in self.variables.items()) or "usual"

    @property
    def missing(self) -> str | None:
        """Instructions that this processor lacks and that would end the process; None if none."""
        return self._lacking(("OPENBLAS_CORETYPE",))

    @property
    def replaced(self) -> str | None:
        """Instructions that this processor lacks and that libraries replace by others."""
        return self._lacking(CHOICES)

    def _lacking(self, choices: Sequence[str]) -> str | None:
        here = instructions_here()
        for choice, value in self.variables.items():
            needed = _NEEDS.get((choice, value))
            if choice in choices and here and needed is not None and needed not in here:
                return needed
        return None

    def environ(self) -> dict[str, str]:
        """This process's environment with the choice in it, and no other."""
        kept = {key: value for key, value in os.environ.items() if key not in CHOICES}
        # threads that wait must not burn the core that another process needs
        return {"OMP_WAIT_POLICY": "PASSIVE", **kept, "OMP_NUM_THREADS": "1", **self.variables}


# Under which effects are measured: the usual kernels, then each library's simplest, then what its
# choices for other processors come to here. They are few, since everything is measured under each.
MEASURED = (
    Kernel({}),
    Kernel(
        {
            "MKL_CBWR": "COMPATIBLE",
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "OPENBLAS_CORETYPE": "Prescott",
        }
    ),
    Kernel({"MKL_CBWR": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OPENBLAS_CORETYPE": "Haswell"}),
    Kernel({"MKL_CBWR": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OPENBLAS_CORETYPE": "Nehalem"}),
)


def instructions_here() -> frozenset[str]:
    """Instruction sets of this processor, as Linux names them; none that is known elsewhere."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return frozenset()
    flags = [line for line in info.read_text().splitlines() if line.startswith("flags")]
    return frozenset(flags[0].split(":")[1].split()) if flags else frozenset()


def processor() -> str:
    """Its name, for a reader."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def fingerprint() -> str:
    """Twelve digits that are the same where all these kernels give the same bits, as a rule.

    Over matrix products (large, small, of a vector, many at once), inverse, solution, eigenvalues,
    Cholesky factor, convolution, exponential and sums, in both precisions, and numpy's and scipy's
    own; the inputs are the same everywhere, as they come from integers.
    """
    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.float64):
        for compute in _computations(dtype):
            digest.update(compute().contiguous().numpy().tobytes())
    a = _inputs(torch.float64, 40, 40).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for result in (a @ a.T, np.linalg.solve(a, a.T), scipy.linalg.expm(a), np.exp(a).sum()):
            digest.update(np.asarray(result).tobytes())
    return digest.hexdigest()[:12]


def _inputs(dtype: torch.dtype, *shape: int) -> Tensor:
    """Numbers in (-1, 1) that no kernel makes: multiples of 1 / 1009, scattered."""
    count = int(np.prod(shape))
    scattered = (torch.arange(1, count + 1) * 7919 + 12345) % 2017
    return ((scattered - 1008).double() / 1009).to(dtype).view(shape)


def _computations(dtype: torch.dtype) -> list[Callable[[], Tensor]]:
    a, b = _inputs(dtype, 131, 257), _inputs(dtype, 257, 65)
    many = _inputs(dtype, 9, 24, 24)
    square = many @ many.mT + torch.eye(24, dtype=dtype)
    images, weights = _inputs(dtype, 2, 4, 16, 16), _inputs(dtype, 8, 4, 3, 3)
    values = _inputs(dtype, 10007)
    return [
        lambda: a @ b,
        lambda: a[:7, :16] @ b[:16, :3],
        lambda: a @ b[:, 0],
        lambda: torch.bmm(many, square),
        lambda: torch.linalg.inv(square),
        lambda: torch.linalg.solve(square, many),
        lambda: torch.linalg.eigh(square)[0],
        lambda: torch.linalg.cholesky(square),
        lambda: torch.nn.functional.conv2d(images, weights, padding=1),
        lambda: values.exp(),
        lambda: values.sin(),
        lambda: values.sum(),
        lambda: a.sum(1),
        lambda: torch.nn.functional.layer_norm(a, [257]),
    ]


if __name__ == "__main__":  # in a process of its own, under the kernel that its environment names
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(fingerprint())  # noqa: T201  # read by the caller
