"""Processes and their device; what several of them must agree on: gradients, batch statistics.

Wherever processes wait for each other they do so for ``process_timeout`` seconds at most. One that
waits in vain raises ``LostProcessError``, which says who is missing and in which phase it was. With
gloo that is what its operations raise; NCCL's do so too where they block the host
(TORCH_NCCL_BLOCKING_WAIT, set here unless the environment says otherwise).
"""

import atexit
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, distributed, nn

from diffusion_envs.preferences import MissingChoicesError
from diffusion_envs.rewards import RewardError
from diffusion_envs.training import phase
from diffusion_envs.training.process_watch import ProcessWatch
from diffusion_envs.training.sharded import is_shard

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
    """Replace every gradient by its sum over the processes; one may have none, for lack of rows.

    Those of shards are means over the processes already.
    """
    if accelerator.num_processes == 1:
        return
    for shard in filter(is_shard, parameters):
        if shard.grad is not None:
            shard.grad.mul_(accelerator.num_processes)
    parameters = [p for p in parameters if not is_shard(p)]
    if not parameters:
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


def from_main(
    held: Mapping[str, Tensor] | None, accelerator: Accelerator
) -> dict[str, Tensor] | None:
    """Give every process the tensors that the main one holds, by name; None if it holds none."""
    return gather_named(held if accelerator.process_index == 0 else None, accelerator)


def gather_named(
    mine: Mapping[str, Tensor] | None, accelerator: Accelerator
) -> dict[str, Tensor] | None:
    """Rows of all processes by name, in the order of their index, on the CPU.

    Args:
        mine: None if this process has no rows; the result is None if no process has.
        accelerator: the processes.
    """
    if accelerator.num_processes == 1:
        return None if mine is None else dict(mine)
    shapes = None if mine is None else {k: [list(v.shape), str(v.dtype)] for k, v in mine.items()}
    told = next((each for each in gather_plain(shapes, accelerator) if each is not None), None)
    if told is None:
        return None
    every = dict[str, Tensor]()
    for name, (shape, kind) in told.items():
        none = torch.zeros(0, *shape[1:], dtype=getattr(torch, kind.removeprefix("torch.")))
        rows = none if mine is None else mine[name]
        every[name] = gather(rows.to(accelerator.device), accelerator).cpu()
    return every


def of_all(
    ask: Callable[[range], Mapping[str, Tensor]], n: int, accelerator: Accelerator | None
) -> dict[str, Tensor]:
    """What is asked for n things in a row, of which each process asks for its share.

    Args:
        ask: (some of them, at least one) -> a row for each, by name; a reward may fail in it.
        n: at least 1.
        accelerator: the processes; None: this one asks for all.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return dict(ask(range(n)))
    own = share(n, accelerator)
    with failing_together(accelerator):
        mine = ask(own) if len(own) else None
    every = gather_named(mine, accelerator)
    assert every is not None  # n is at least 1
    return every


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
    for theirs in gather_plain(dict(counts), accelerator):
        total.update(theirs)
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


def gather_plain(value: Any, accelerator: Accelerator) -> list[Any]:
    """What each process has, as JSON: nothing is pickled, so nothing that comes in is run."""
    content = torch.frombuffer(bytearray(json.dumps(value), "utf-8"), dtype=torch.uint8)
    lengths = gather(torch.tensor([len(content)], device=accelerator.device), accelerator).tolist()
    every = gather(content.to(accelerator.device), accelerator).cpu().split(lengths)
    return [json.loads(bytes(part.tolist())) for part in every]


def missing_anywhere(
    missing: MissingChoicesError | None, accelerator: Accelerator
) -> MissingChoicesError | None:
    """What any of the processes misses, on all of them; None if no one misses anything."""
    if accelerator.num_processes == 1:
        return missing
    mine, images = None, None
    if missing is not None:
        images = missing.images
        groups = [[int(k) for k in members] for members in missing.groups]
        shape = None if images is None else list(images.shape[1:])
        mine = {
            "words": str(missing),
            "groups": groups,
            "shape": shape,
            "prompts": list(missing.prompts),
        }
    told = [part for part in gather_plain(mine, accelerator) if part is not None]
    if not told:
        return None
    every = None
    if all(part["shape"] is not None for part in told):
        empty = torch.zeros(0, *told[0]["shape"])  # of a process that misses nothing
        rows = (empty if images is None else images).to(accelerator.device)
        every = gather(rows, accelerator).cpu()
    return MissingChoicesError(
        "; ".join(dict.fromkeys(part["words"] for part in told)),
        groups=[members for part in told for members in part["groups"]],
        images=every,
        prompts=[prompt for part in told for prompt in part["prompts"]],
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
            words = [each for told in gather_plain(mine, accelerator) for each in told]
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
