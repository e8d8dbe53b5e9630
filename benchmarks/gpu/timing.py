"""Seconds of work that a device does behind the host's back."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Where a stage runs, and how large it is to be.

    Attributes:
        device: of all tensors.
        rehearsal: whether the stage is only to show that it runs: tiny, whatever the device.
    """

    device: torch.device
    rehearsal: bool

    def synchronise(self) -> None:
        """Wait until the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable[[], object], runs: int = 7) -> dict[str, float]:
        """Median, least and most wall seconds of a few runs, after two that are not counted."""
        runs = 2 if self.rehearsal else runs
        for _ in range(1 if self.rehearsal else 2):
            function()
        found = []
        for _ in range(runs):
            self.synchronise()
            began = time.perf_counter()
            function()
            self.synchronise()
            found.append(time.perf_counter() - began)
        return {"seconds": statistics.median(found), "least": min(found), "most": max(found)}

    def peak_gib(self, function: Callable[[], object]) -> float | None:
        """The most memory that the device has in use meanwhile, GiB; None of a CPU."""
        if self.device.type != "cuda":
            function()
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        function()
        return torch.cuda.max_memory_allocated(self.device) / 2**30
