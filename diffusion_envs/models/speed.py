"""How long operations take on this device: a few of them timed, at the shapes that they come in."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from diffusion_envs.models.counting import Meter, Operation, Shape

_CACHE = 2**23  # bytes that are swept between two operations, so that neither finds its inputs
_FLOPS, _BYTES = 3e10, 5e9  # a second: says which operations are timed first, and little else


class Stopwatch:
    """Times operations on a device, each of them once.

    Args:
        device: where.
        budget: seconds, about.
        clock: that is read before and after.
    """

    def __init__(
        self,
        device: torch.device,
        budget: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device, self.budget, self.clock = device, budget, clock
        self._others = torch.zeros(_CACHE, dtype=torch.uint8, device=device)
        self.overhead = self._overhead()
        self._measured = dict[str, float]()

    def seconds(self, operations: Mapping[Operation, int], calls: int) -> float:
        """Of operations, each so often, that are made by so many calls of torch's functions.

        Those that take most of the time are timed until the budget is used; the others' time is
        what was expected, corrected as those of their kind were.
        """
        ended = time.monotonic() + self.budget
        ordered = sorted(operations, key=lambda o: -operations[o] * _expected(o))
        expected, measured = dict[Any, float](), dict[Any, float]()
        total = 0.0
        left = list[Operation]()
        for operation in ordered:
            key = f"{operation.function} {operation.arguments}"
            if key not in self._measured and time.monotonic() < ended:
                self._measured[key] = self._time(operation)
            if key not in self._measured:
                left.append(operation)
                continue
            kind, many = operation.function, operations[operation]
            for name in (kind, None):
                expected[name] = expected.get(name, 0.0) + many * _expected(operation)
                measured[name] = measured.get(name, 0.0) + many * self._measured[key]
            total += many * self._measured[key]
        for operation in left:
            name = operation.function if operation.function in expected else None
            factor = measured[name] / expected[name]
            total += operations[operation] * _expected(operation) * factor
        if self.device.type == "cuda":  # works while the next ones are being called
            return max(total, calls * self.overhead)
        return total + calls * self.overhead

    def _time(self, operation: Operation) -> float:
        args, kwargs = tree_map(self._filled, operation.arguments)
        run = partial(operation.function, *args, **kwargs)
        with torch.no_grad():
            first = self._once(run)
            if first > 0.2:  # too long for a second try, and too long to be late by much
                return first
            return statistics.median(self._once(run) for _ in range(3))

    def _once(self, run: Callable[[], Any]) -> float:
        self._others.add_(1)  # what was read last is not what is read next
        self._wait()
        started = self.clock()
        run()
        self._wait()
        return self.clock() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _filled(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return self.device
        if not isinstance(value, Shape):
            return value
        pairs = zip(value.size, value.stride, strict=True)
        numbers = 1 + sum((size - 1) * stride for size, stride in pairs)
        if 0 in value.size:
            numbers = 0
        if value.dtype.is_floating_point:
            flat = torch.full((numbers,), 0.5, dtype=value.dtype, device=self.device)
        else:
            flat = torch.zeros(numbers, dtype=value.dtype, device=self.device)
        return flat.as_strided(value.size, value.stride)

    def _overhead(self) -> float:
        """Seconds that a call takes beside its arithmetic: layers so small that they have none."""
        layers = nn.Sequential(*[nn.Linear(2, 2) if k % 2 else nn.SiLU() for k in range(40)])
        layers.to(self.device)
        states = torch.zeros(1, 2, device=self.device)

        def run() -> Tensor:
            answer = layers(states).sum()
            answer.backward()
            return answer

        with Meter() as meter:
            run()
        return min(self._once(run) for _ in range(5)) / meter.calls


def _expected(operation: Operation) -> float:
    return operation.flops / _FLOPS + operation.bytes / _BYTES + 1e-7


def rows_for(flops_of_a_row: int, most: int, seconds: float) -> int:
    """Rows, a power of two, that can be timed within about so many seconds."""
    affordable = seconds * _FLOPS / max(flops_of_a_row, 1)
    return max(1, min(most, 2 ** int(math.log2(max(affordable, 1.0)))))
