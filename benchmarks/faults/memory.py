"""Memory that runs out: allocators that refuse more than so many rows, or so many bytes.

The gradients are those of problems with a known law, in float64: what round-off makes of another
order of addition is then 1e-16 of their size and a few hundred additions, far below 1e-12.
"""

import dataclasses
import gc
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.faults import small_run
from benchmarks.faults.row import Row
from diffusion_envs import objectives
from diffusion_envs.exact.problems import GaussianProblem, table
from diffusion_envs.objectives import Objective
from diffusion_envs.runs import checkpoint
from diffusion_envs.samplers import DDIM
from diffusion_envs.training import phase
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

PATHS, STEPS = 8, 4
TOLERANCE = 1e-12
# Of every kind: single steps, groups, joined steps, with targets, re-noised data, the last steps.
KINDS: dict[str, tuple[Objective, dict[str, Any]]] = {
    "score-as-action": (objectives.ScoreAsAction(kl_weight=0.3), {}),
    "ddpo": (objectives.DDPO(), {"train_steps": 2}),
    "grpo": (objectives.GRPO(group=2, kl_weight=0.1), {}),
    "dense-reward": (objectives.DenseReward(members=2), {}),
    "adjoint-matching": (objectives.AdjointMatching(kl_weight=0.3), {}),
    "adjoint-matching by queries": (
        objectives.ZerothOrderAdjointMatching(kl_weight=0.3, pairs=3),
        {},
    ),
    "nft": (objectives.DiffusionNFT(draws=3), {}),
    "ram": (objectives.ReinforceAdjointMatching(draws=2, path_cost=True), {}),
    "diffusion-dpo": (objectives.DiffusionDPO(draws=2), {}),
    "draft": (objectives.DRaFT(last=3, kl_weight=0.3), {}),
    "alignprop": (objectives.AlignProp(place_std=0.5, target=1e3), {}),
}


class Limit:
    """An allocator that refuses the network more than so many rows, while it is set."""

    def __init__(self) -> None:
        self.rows: int | None = None
        self.refused = 0
        self.backward = False  # refuse while going backwards instead

    def check(self, rows: int) -> None:
        """Raise if it is too many."""
        if self.rows is not None and rows > self.rows:
            self.refused += 1
            raise torch.OutOfMemoryError(f"simulated: out of memory with {rows} rows")

    def around(self, exact: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What an exact model says, within this limit."""

        def limited(states: Tensor, *levels: Tensor) -> Tensor:
            if not self.backward:
                self.check(len(states))
            return exact(states, *levels)

        return limited

    def hook(self, module: Any, arguments: Any, answer: Tensor) -> None:
        """Of a module: refuse its gradient."""
        if self.backward and answer.requires_grad:
            rows = len(answer)

            def refuse(gradient: Tensor) -> None:
                self.check(rows)

            answer.register_hook(refuse)


def trainer(objective: Objective, limit: Limit, seed: int, **size: Any) -> Trainer:
    """A run in float64 that is limited from the moment at which it has sampled."""
    environment = GaussianProblem().environment(DDIM(1.0).bind(table(), STEPS), seed)
    model = environment.model
    model.exact = limit.around(model.exact)  # pyright: ignore[reportAttributeAccessIssue]  # of exact models
    model.correction.double().register_forward_hook(limit.hook)  # pyright: ignore[reportAttributeAccessIssue]  # as above
    sizes = {"samples": PATHS, "batch": 64, "max_gradient_norm": 1e15, "value_epochs": 1} | size
    run = Trainer(environment, objective, UpdateSize(**sizes), accelerator=Accelerator(cpu=True))
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in run.parameters:  # in the midst of a run: the adapter is not fresh
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise).double())
    run.update, own = 1, run.sample
    if run.critic is not None:
        run.critic.network.double()  # pyright: ignore[reportAttributeAccessIssue]  # of both critics
        run.critic.calibrate(torch.tensor([-1.0, 0.5, 2.0]).double())

    def sample() -> Any:
        limit.rows, rows = None, limit.rows
        made = own()
        limit.rows = rows
        wide = {
            f.name: value.double()
            for f in dataclasses.fields(made.rollout)
            if isinstance(value := getattr(made.rollout, f.name), Tensor)
            and value.is_floating_point()
        }
        denoised = made.denoised_rewards
        return dataclasses.replace(
            made,
            rollout=dataclasses.replace(made.rollout, **wide),
            denoised_rewards=None if denoised is None else denoised.double(),
        )

    run.sample = sample
    return run


def gradient(run: Trainer) -> Tensor:
    """What the last step of the optimiser has read."""
    return torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None])


def deviation(
    objective: Objective, rows: int, *, backward: bool, seed: int = 3, **size: Any
) -> tuple[float, Any]:
    """Of an update with and without a limit: |difference of gradients| / |gradient|, and numbers.

    Raises:
        RuntimeError: the limit was never reached.
    """
    told = []
    for limited in (False, True):
        limit = Limit()
        run = trainer(objective, limit, seed, **size)
        limit.rows, limit.backward = (rows if limited else None), backward
        told.append((run.step(), gradient(run), limit.refused))
    (_, whole, _), (numbers, pieces, refused) = told
    if not refused:
        raise RuntimeError(f"{type(objective).__name__} was never refused {rows} rows")
    return float((pieces - whole).norm() / whole.norm()), (told[0][0], numbers)


def same_gradients(*, sample: bool) -> Row:
    """Every kind of loss, at several limits, forwards and backwards."""
    kinds = ("score-as-action", "dense-reward", "draft") if sample else tuple(KINDS)
    tried, failed, worst = 0, list[str](), 0.0
    for kind in kinds:
        objective, size = KINDS[kind]
        joined = getattr(objective, "joins_steps", False)
        least = objective.group * (STEPS if joined else 1)
        for rows in (least,) if sample else (least, least + 1, 2 * least + 1):
            for backward in (False,) if sample else (False, True):
                if kind.startswith("adjoint-matching") and backward:
                    continue  # the targets are of the pretrained model, which has no gradient
                gap, (whole, numbers) = deviation(objective, rows, backward=backward, **size)
                tried, worst = tried + 1, max(worst, gap)
                costs = all(whole[n] == numbers[n] for n in ("reward_queries", "network_calls"))
                if not (gap <= TOLERANCE and numbers["batch"] <= max(rows, least) and costs):
                    failed.append(f"{kind} with {rows} rows: {gap:.2g}, {numbers.get('batch')}")
    return Row(
        "no memory for more than n rows",
        f"{len(kinds)} objectives, forwards and backwards",
        f"the same gradient to {TOLERANCE:g} in float64, the same costs, and `batch` in the log",
        tried,
        tried - len(failed),
        failed[0] if failed else f"largest deviation {worst:.1g}",
    )


# -- bytes ---------------------------------------------------------------------------------------


class Allocator(TorchDispatchMode):
    """Counts the bytes of all tensors that live, and refuses more than a limit.

    Args:
        most: bytes; None for any number.
    """

    def __init__(self, most: int | None = None) -> None:
        super().__init__()
        self.most, self.peak, self.refused = most, 0, 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As torch does it, but for the count."""
        answer = func(*args, **(kwargs or {}))
        for value in answer if isinstance(answer, tuple | list) else (answer,):
            if isinstance(value, Tensor):
                self._count(value)
        return answer

    def _count(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        size = storage.nbytes()
        known = self._live.get(storage._cdata)
        if known is not None and not known[0].expired():
            return
        if known is not None:
            self._bytes -= known[1]
        self._live[storage._cdata] = StorageWeakRef(storage), size
        self._bytes += size
        if self._bytes > (self.peak if self.most is None else self.most):
            self._sweep()
        self.peak = max(self.peak, self._bytes)
        if self.most is not None and self._bytes > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError(
                f"simulated: {self._bytes} bytes would be in use, of {self.most}"
            )

    def _sweep(self) -> None:
        gone = [key for key, (ref, _) in self._live.items() if ref.expired()]
        for key in gone:
            self._bytes -= self._live.pop(key)[1]


def in_phase(name: str, most: int | None, told: Path | None = None) -> Callable[[], Any]:
    """A fault of a run: an allocator, in one phase of it; it tells the most bytes it has seen."""

    @contextmanager
    def fault() -> Iterator[None]:
        allocator, inside = Allocator(most), False

        def follow(current: str) -> None:
            nonlocal inside
            if current == name and not inside:
                allocator.__enter__()
            elif current != name and inside:
                allocator.__exit__(None, None, None)
            inside = current == name

        try:
            with phase.observed(follow):
                yield
        finally:
            if inside:
                allocator.__exit__(None, None, None)
            if told is not None:
                told.write_text(str(allocator.peak))

    return fault


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def whole_runs(folder: Path, *, sample: bool) -> Iterator[Row]:
    """Runs of the embedded model with an allocator that is too small for their pieces."""
    plain = small_run.uninterrupted()
    costs = [(x["reward_queries"], x["network_calls"]) for x in metrics(plain.folder)]
    phases = ("update",) if sample else ("update", "sampling", "value network", "evaluation")
    shares = (0.6,) if sample else (0.8, 0.6, 0.45, 0.3)
    tried = held = ended = 0
    notes, ends_tried, ends_held = list[str](), 0, 0
    for name in phases:
        told = folder / f"{name}.peak"
        small_run.run(folder / f"{name}-whole" / "run", in_phase(name, None, told))
        peak = int(told.read_text())
        for share in shares:
            place = folder / f"{name}-{share}" / "run"
            done = small_run.run(place, in_phase(name, int(share * peak)))
            tried += 1
            if done.code == 0:
                lines = metrics(place)
                same = [(x["reward_queries"], x["network_calls"]) for x in lines] == costs
                warned = "memory ran out in" in done.said
                logged = name == "evaluation" or any("batch" in key for x in lines for key in x)
                good = same and (not warned or logged)
            else:  # not even one row: it says so, and goes on without the limit to the same end
                ended += 1
                good = done.code == 2 and "gradient_checkpointing" in done.said and done.in_words
                again = small_run.run(place)
                good = good and again.code == 0
                good = good and small_run.results(place).keys() == plain.results.keys()
            held += good
            if not good:
                notes.append(f"{name} at {share:.0%}: {done.last}")
        place = folder / f"{name}-least" / "run"
        done = small_run.run(place, in_phase(name, 1000))
        kept = (place / "checkpoints").is_dir() and checkpoint.latest(place / "checkpoints")
        valid = kept is not None or name == "sampling"
        again = small_run.run(place)
        same = again.code == 0 and not small_run.first_difference(
            small_run.results(place), plain.results
        )
        good = done.code == 2 and "memory ran out in" in done.said and valid and same
        ends_tried, ends_held = ends_tried + 1, ends_held + bool(good)
        if not good:
            notes.append(f"{name} at 1000 bytes: {done.last}; then {again.last}")
    yield Row(
        "an allocator with fewer bytes than a run takes",
        f"{', '.join(phases)}; {', '.join(f'{share:.0%}' for share in shares)} of the peak",
        "pieces are halved, said and logged, at the same costs; or it ends and says what to do",
        tried,
        held,
        notes[0] if notes else f"{ended} ended as not even one row fitted",
    )
    yield Row(
        "an allocator with 1000 bytes",
        ", ".join(phases),
        "the run ends, says what to do, and goes on to the same numbers bit for bit",
        ends_tried,
        ends_held,
        notes[-1] if notes else "",
    )


# -- the system's --------------------------------------------------------------------------------


class Wide(torch.nn.Module):
    """A correction whose activations take megabytes a row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.width = torch.nn.Parameter(torch.zeros(2)), width

    def forward(self, states: Tensor, alpha: Tensor) -> Tensor:
        """gain x, at the price of ``width`` floats a row."""
        wide = (states * self.gain)[:, :, None].expand(-1, -1, self.width).contiguous()
        return wide.sin().asin().mean(2)  # each keeps what it needs to go back


def system_limit(folder: Path) -> Row:
    """A real limit of the process's memory (RLIMIT_AS), in a child of its own."""
    written = folder / "told.json"
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        code = 1
        try:
            small_run.rebuild_threads()
            written.write_text(json.dumps(_under_a_real_limit()))
            code = 0
        except BaseException as error:
            written.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        finally:
            os._exit(code)
    os.waitpid(child, 0)
    told: dict[str, Any] = {"error": "it was killed"}
    if written.is_file():
        told = json.loads(written.read_text())
    held = told.get("batch", 64) < 32 and told.get("gap", 1.0) <= 1e-5
    return Row(
        "a limit of the process's memory by the system (RLIMIT_AS)",
        "an update whose 32 rows take 4 times as much",
        "pieces are halved; the same gradient up to float32's rounding",
        1,
        int(held),
        told.get("error") or f"{told['batch']} rows at once, deviation {told['gap']:.1g}",
    )


def _under_a_real_limit() -> dict[str, Any]:
    told = []
    for limited in (False, True):
        environment = GaussianProblem().environment(DDIM(1.0).bind(table(), STEPS), 1)
        environment.model.correction = wide = Wide(2**17)  # pyright: ignore[reportAttributeAccessIssue]  # of exact models
        environment.model.parameters = [wide.gain]
        size = UpdateSize(samples=PATHS, batch=32, max_gradient_norm=1e15)
        objective = objectives.DDPO()
        run = Trainer(environment, objective, size, accelerator=Accelerator(cpu=True))
        sample = run.sample()
        if limited:
            # 32 rows of 2 x 2^17 floats: 32 MB for each of what is kept and what is made
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + 48 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        numbers = run._improve(sample)
        told.append((gradient(run), {**numbers, **run._fewer_at_once()}))
    (whole, _), (pieces, numbers) = told
    gap = float((pieces - whole).norm() / whole.norm())
    return {"batch": numbers.get("batch", 64), "gap": gap}


def rows(folder: Path, *, sample: bool) -> Iterator[Row]:
    """What becomes of runs whose memory runs out."""
    yield from whole_runs(folder, sample=sample)
    yield system_limit(folder)
    yield same_gradients(sample=sample)
