"""Processes and their device; what several of them must agree on: gradients, batch statistics.

Wherever processes wait for each other they do so for ``process_timeout`` seconds at most. One that
waits in vain raises ``LostProcessError``, which says who is missing and in which phase it was. With
gloo that is what its operations raise; NCCL's do so too where they block the host
(TORCH_NCCL_BLOCKING_WAIT, set here unless the environment says otherwise).
"""

import atexit
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor, distributed, nn

from diffusion_envs.preferences import MissingChoicesError
from diffusion_envs.rewards import RewardError
from diffusion_envs.training import phase
from diffusion_envs.training.process_watch import ProcessWatch

Value = TypeVar("Value")
TIMEOUT = 1800.0  # seconds that processes wait for each other
_watch: ProcessWatch | None = None  # of this process, if it is one of several


class RewardErrorOfAll(RewardError):
    """The reward failed on one of several processes; all of them raise this and end together."""


class LostProcessError(RuntimeError):
    """Another process died, hangs, or is too late; the message says which, and in which phase."""


def start(device: str | None = None, timeout: float = TIMEOUT) -> Accelerator:
    """The processes of this run: one, or those that ``accelerate`` or ``torchrun`` started.

    Args:
        device: "cpu" or "cuda"; None takes what there is.
        timeout: seconds that processes wait for each other; that of the first call in a process.

    Raises:
        ValueError: the device is not there, or not one of these.
    """
    if device is None:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    else:
        kind = _checked(str(device))
    # accelerate keeps the first device of a Python process for ever
    known = AcceleratorState._shared_state
    if known and known["device"].type != kind and known["num_processes"] == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    accelerator = Accelerator(cpu=kind == "cpu", kwargs_handlers=[waiting])
    if accelerator.num_processes > 1:
        _begin_watch(accelerator)
    return accelerator


def _begin_watch(accelerator: Accelerator) -> None:
    global _watch
    if _watch is None:
        atexit.register(_leave)  # after the watch has closed
        _watch = ProcessWatch.start(accelerator.process_index, accelerator.num_processes)
    if _watch is not None:
        _watch.begin()


def _leave() -> None:
    """Close connections while the interpreter still runs: their threads must not outlive it."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _checked(device: str) -> str:
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda"):
        raise ValueError(
            f"device must be 'cpu' or 'cuda', got {device!r}, on which nothing here has run (and "
            "mps has no float64): use device='cpu', or leave it out"
        )
    if kind == "cuda" and not torch.cuda.is_available():
        why = "built without CUDA" if torch.version.cuda is None else "which sees no GPU"
        raise ValueError(
            f"device {device!r} is not there: this is torch {torch.__version__}, {why}; use "
            "device='cpu', or leave it out to take what there is"
        )
    if index not in ("", "0"):
        raise ValueError(
            f"device must be 'cpu' or 'cuda', got {device!r}: which GPU a process sees is for the "
            f"environment to say, CUDA_VISIBLE_DEVICES={index} with device='cuda'"
        )
    return kind


def add_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace every gradient by its sum over the processes; one may have none, for lack of rows."""
    if accelerator.num_processes == 1:
        return
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    parts.append(parts[0].new_tensor([p.grad is not None for p in parameters]))
    flat = total(torch.cat([part.flatten() for part in parts]), accelerator)
    *sums, had = flat.split([part.numel() for part in parts])
    for parameter, summed, any_had in zip(parameters, sums, had.tolist(), strict=True):
        parameter.grad = summed.view_as(parameter).clone() if any_had else None


def total(value: Tensor, accelerator: Accelerator) -> Tensor:
    """Its sum over the processes, the same on all of them."""
    if accelerator.num_processes == 1:
        return value
    with _meeting(accelerator):
        summed = accelerator.reduce(value, "sum")
    assert isinstance(summed, Tensor)  # what goes in comes out
    return summed


def broadcast_from_main(number: int, accelerator: Accelerator) -> int:
    """Give every process the number that the main process holds."""
    if accelerator.num_processes == 1:
        return number
    return int(gather(torch.tensor([number], device=accelerator.device), accelerator)[0])


def from_main(value: Value, accelerator: Accelerator) -> Value:
    """Give every process what the main process holds: tensors of the CPU, words, containers."""
    if accelerator.num_processes == 1:
        return value
    with _meeting(accelerator):
        (held,) = broadcast_object_list([value])
    return held


def wait(accelerator: Accelerator) -> None:
    """Go on when all processes have come to here."""
    if accelerator.num_processes > 1:
        with _meeting(accelerator):
            accelerator.wait_for_everyone()


@contextmanager
def _meeting(accelerator: Accelerator) -> Iterator[None]:
    """Within this context this process waits for all others."""
    if _watch is not None:
        _watch.meet()
    try:
        yield
    except RuntimeError as error:
        who = "which one is missing is not known" if _watch is None else _watch.missing()
        raise LostProcessError(
            f"process {accelerator.process_index} of {accelerator.num_processes} waited in vain "
            f"for the others, in phase {phase.current()!r}: {who}. The run ends here, and can be "
            "resumed, on any number of processes"
        ) from error


def share(n: int, accelerator: Accelerator) -> range:
    """This process's of n things in a row; shares differ by one at most."""
    k, processes = accelerator.process_index, accelerator.num_processes
    return range(n * k // processes, n * (k + 1) // processes)


def add(counts: Mapping[str, int], accelerator: Accelerator) -> dict[str, int]:
    """Sums over the processes by name; a process may lack one."""
    if accelerator.num_processes == 1:
        return dict(counts)
    total: Counter[str] = Counter()
    for mine in _gathered_objects([dict(counts)], accelerator):
        total.update(mine)
    return dict(total)


def gather(value: Tensor, accelerator: Accelerator) -> Tensor:
    """Rows of all processes, in the order of their index; each may have another number of them."""
    if accelerator.num_processes == 1:
        return value
    mine = torch.tensor([len(value)], device=accelerator.device)
    lengths = _gathered(mine, accelerator).tolist()
    missing = value.new_zeros(max(lengths) - len(value), *value.shape[1:])
    every = _gathered(torch.cat([value, missing]), accelerator).split(max(lengths) or 1)
    return torch.cat([rows[:length] for rows, length in zip(every, lengths, strict=True)])


def _gathered(value: Tensor, accelerator: Accelerator) -> Tensor:
    """As many rows of each process."""
    with _meeting(accelerator):
        gathered = accelerator.gather(value.contiguous())
    assert isinstance(gathered, Tensor)  # what goes in comes out
    return gathered


def _gathered_objects(mine: list[Value], accelerator: Accelerator) -> list[Value]:
    """What the lists of all processes hold, in their order."""
    with _meeting(accelerator):
        return gather_object(mine)


def missing_anywhere(
    missing: MissingChoicesError | None, accelerator: Accelerator
) -> MissingChoicesError | None:
    """What any of the processes misses, on all of them; None if no one misses anything."""
    if accelerator.num_processes == 1:
        return missing
    mine = []
    if missing is not None:
        images = None if missing.images is None else missing.images.cpu()
        mine = [(str(missing), missing.groups, images, missing.prompts)]
    gathered = _gathered_objects(mine, accelerator)
    if not gathered:
        return None
    words, groups, images, prompts = zip(*gathered, strict=True)
    return MissingChoicesError(
        "; ".join(dict.fromkeys(words)),
        groups=[members for part in groups for members in part],
        images=None if any(part is None for part in images) else torch.cat(images),
        prompts=[prompt for part in prompts for prompt in part],
    )


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[Callable[[], None]]:
    """Within this context a reward that fails on one process ends all of them, and none waits.

    The processes agree once: at the end of the context, or earlier where they call what it gives,
    before they wait for each other in another way; after that the reward may not be asked.

    Raises:
        RewardErrorOfAll: the reward failed on any of several processes.
    """
    agreed = False

    def agree(failure: RewardError | None = None) -> None:
        nonlocal agreed
        if agreed or accelerator.num_processes == 1:
            return
        agreed = True
        failed = torch.tensor([failure is not None], device=accelerator.device)
        if bool(gather(failed, accelerator).any()):
            mine = [] if failure is None else [f"process {accelerator.process_index}: {failure}"]
            words = _gathered_objects(mine, accelerator)
            raise RewardErrorOfAll("; ".join(words)) from failure

    try:
        yield agree
    except RewardErrorOfAll:
        raise
    except RewardError as failure:
        agree(failure)
        raise
    agree()


@contextmanager
def ending_together(accelerator: Accelerator) -> Iterator[None]:
    """Errors that all processes raise leave this context only when all have come to its end.

    The first process to end takes the others with it: none may do so while the main one still
    writes what the run goes on from.
    """
    try:
        yield
    except (RewardErrorOfAll, MissingChoicesError):
        wait(accelerator)
        raise


@contextmanager
def telling_others() -> Iterator[None]:
    """What ends this process within this context is told to the others, who would wait for it."""
    try:
        yield
    except BaseException as error:
        if _watch is not None:
            _watch.end(error, blameless=isinstance(error, LostProcessError))
        raise
