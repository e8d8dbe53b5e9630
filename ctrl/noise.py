"""Randomness as an argument: named streams, and the increments that drive a simulation.

A stream is a ``torch.Generator`` that depends on nothing but its name: a run seed and any number of
strings and integers (what the numbers are for, the global index of a sample, the step). Streams of
different names are independent, so a result cannot depend on batch layout, on the order of queries
or on the number of processes. Names are hashed, never added: ``seed + rank`` would make seed 41 on
rank 1 replay seed 42 on rank 0.

On the CPU ``torch.Generator.manual_seed`` keeps only the low 32 bits of a seed, so that hashed
names would collide after some 77 000 streams. Streams therefore fill all 624 words of the Mersenne
Twister.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from ctrl import drawn_ahead
from ctrl.counter_normals import GROUP, key_of
from ctrl.devices import as_like, require, require_generator, sent
from ctrl.estimate import require_probabilities

_WORDS = 624  # of the Mersenne Twister's state


@cache
def _state_template() -> tuple[bytes, int]:
    """A fresh CPU generator's state, and where in it the Mersenne Twister's words begin.

    The layout is torch's own business, so it is identified by looking for the words that a known
    seed must give (Matsumoto & Nishimura's initialisation), not assumed.
    """
    seed = 12345
    words = np.zeros(_WORDS, dtype=np.uint64)
    words[0] = seed
    for i in range(1, _WORDS):
        before = int(words[i - 1])
        words[i] = (1812433253 * (before ^ (before >> 30)) + i) % 2**32
    state = torch.Generator().manual_seed(seed).get_state().numpy().tobytes()
    offset = state.find(words.tobytes())
    if offset < 0:
        raise RuntimeError(
            f"torch {torch.__version__} lays out its CPU generator in a way that named streams do "
            "not know; please report this with the version"
        )
    return state, offset


def stream(seed: int, *name: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random stream with this name: the same numbers whenever and wherever it is asked for.

    Args:
        seed: of the run.
        name: what the numbers are for, for example ``"initial", sample_index``.
        device: where the numbers are drawn. Streams of equal names differ between CPU and CUDA.

    Returns:
        A fresh generator.

    Raises:
        TypeError: ``seed`` or a part of ``name`` is neither an integer nor (``name``) a string.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {seed!r}")
    for part in name:
        if isinstance(part, bool) or not isinstance(part, str | int):
            raise TypeError(f"the parts of a stream's name must be str or int, got {part!r}")
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    if torch.device(device).type != "cpu":
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    words = np.random.SeedSequence(int.from_bytes(digest, "little")).generate_state(_WORDS)
    state, offset = _state_template()
    fresh = bytearray(state)
    fresh[offset : offset + 8 * _WORDS] = words.astype(np.uint64).tobytes()
    generator = torch.Generator()
    generator.set_state(torch.frombuffer(fresh, dtype=torch.uint8).clone())
    return generator


def normals_by_sample(
    shape: tuple[int, ...],
    *,
    seed: int,
    name: tuple[str | int, ...],
    samples: range,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals ``[len(samples), *shape]``, one stream for each global sample index.

    Row i depends on ``(seed, name, samples[i])`` alone: the same sample gets the same noise in any
    batch, on any process. The numbers are drawn on the CPU and sent to the device, so devices agree
    too.
    """
    rows = [
        torch.randn(shape, generator=stream(seed, *name, index), dtype=dtype) for index in samples
    ]
    if not rows:
        return torch.empty(0, *shape, device=device, dtype=dtype)
    return sent(torch.stack(rows), device)


@dataclass(frozen=True)
class PathStreams:
    """Noise that belongs to paths: give it to ``simulate`` in place of a generator.

    What drives path ``first_path + i`` depends on (seed, name, that index, the step) alone: not on
    how paths are split into batches, processes or threads, nor on what was asked for before. The
    numbers are made of their own index (``ctrl.counter_normals``), the same bits on every
    processor. Increments and actions have numbers of their own, and so have the two precisions.
    They are drawn on the CPU and sent to the device, so devices agree.

    Attributes:
        seed: of the run.
        name: of the roll-out, strings and integers; two of the same name are the same noise.
        first_path: global index of the first path of the batch.
    """

    seed: int
    name: tuple[str | int, ...]
    first_path: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, tuple):
            raise TypeError(f"name must be a tuple of str and int, got {self.name!r}")
        if isinstance(self.first_path, bool) or not isinstance(self.first_path, int):
            raise TypeError(f"first_path must be an int, got {self.first_path!r}")
        if self.first_path < 0:
            raise ValueError(f"first_path must be at least 0, got {self.first_path}")
        stream(self.seed, *self.name)  # a bad seed or name is refused here

    def rows(
        self,
        kind: str,
        paths: int,
        like: Tensor,
        *,
        widths: list[float] | None = None,
        by: drawn_ahead.Threads | None = None,
    ) -> Iterator[Tensor]:
        """Standard normals of one step after the other, [paths, *event].

        Each is valid until the next is asked for.

        Args:
            kind: what for; a part of what names the numbers.
            paths: how many, from ``first_path`` on.
            like: [any, *event], whose shape, dtype and device they have.
            widths: what those of each step are multiplied by; without them, and then without end,
                by 1.
            by: who draws beside the caller.
        """
        event = like.shape[1:]
        drawn = drawn_ahead.rows(
            self._numbers(paths, event.numel()),
            np.float64 if like.dtype == torch.float64 else np.float32,
            self._key(kind, like.dtype),
            scales=widths,
            by=by,
        )
        for row in drawn:
            yield sent(torch.from_numpy(row).view(paths, *event), like.device, like.dtype)

    def drawn_into(
        self,
        memory: Tensor,
        kind: str,
        *,
        widths: list[float],
        by: drawn_ahead.Threads | None = None,
    ) -> drawn_ahead.Drawing | None:
        """What ``rows`` has for all steps, drawn into memory ahead of time.

        Args:
            memory: [steps, paths, *event].
            kind: what for.
            widths: what those of each step are multiplied by.
            by: who draws beside the caller.

        Returns:
            Who to wait for before a row is touched; None where the memory does not allow it: on
            another device, in half precision, or where rows do not begin and end with a group of
            numbers that are drawn together.
        """
        numbers = self._numbers(memory.shape[1], memory.shape[2:].numel())
        whole = numbers.start % GROUP == 0 and len(numbers) % GROUP == 0
        plain = memory.device.type == "cpu" and memory.dtype in (torch.float32, torch.float64)
        if not (plain and whole and memory.is_contiguous()):
            return None
        out, key = memory.view(len(memory), -1).numpy(), self._key(kind, memory.dtype)
        group = numbers.start // GROUP
        return drawn_ahead.draw(out, key, group=group, scales=widths, by=by)

    def _key(self, kind: str, dtype: torch.dtype) -> npt.NDArray[np.uint64]:
        return key_of(self.seed, *self.name, kind, str(dtype))

    def _numbers(self, paths: int, width: int) -> range:
        return range(self.first_path * width, (self.first_path + paths) * width)


@dataclass(frozen=True, eq=False)
class Noise:
    """All randomness of a simulation, as tensors.

    Attributes:
        increments: W(t + h) - W(t) for every path and step, sqrt(time).
        actions: standard normals that the policy's actions are drawn with, if it draws them.
        weights: of the paths, non-negative, summing to 1, where they are not equal (quadrature).
        exits: numbers in [0, 1), uniform, that decide which paths leave a domain between two nodes,
            if that is drawn (``stopping.BridgeCorrected``).
        jumps: standard normals whose quantiles are the numbers of jumps, one for each kind.
        marks: standard normals that marks are made of: of the first jumps of a step, [..., most,
            coordinates of the marks of all kinds in a row].
        step_sizes: of the grid that the increments are made for, time, where that is known: on
            another ``simulate`` refuses them.
    """

    increments: Float[Tensor, "paths steps *noise"]
    actions: Float[Tensor, "paths steps *action"] | None = None
    weights: Float[Tensor, " paths"] | None = None
    exits: Float[Tensor, "paths steps"] | None = None
    jumps: Float[Tensor, "paths steps kinds"] | None = None
    marks: Float[Tensor, "paths steps most marks"] | None = None
    step_sizes: Float[Tensor, " steps"] | None = None

    def __post_init__(self) -> None:
        if self.increments.ndim < 2:
            raise ValueError(
                f"increments must be [paths, steps, *noise], got {list(self.increments.shape)}"
            )
        paths, steps = self.increments.shape[:2]
        for name in ("actions", "jumps", "marks"):
            value = getattr(self, name)
            if value is not None and value.shape[:2] != (paths, steps):
                raise ValueError(
                    f"{name} must begin with [{paths}, {steps}], as increments do, got "
                    f"{list(value.shape)}"
                )
        if self.weights is not None and self.weights.shape != (paths,):
            raise ValueError(f"weights must be [{paths}], got {list(self.weights.shape)}")
        if self.exits is not None and (
            self.exits.shape != (paths, steps)
            or not bool(((self.exits >= 0) & (self.exits < 1)).all())
        ):
            raise ValueError(f"exits must be [{paths}, {steps}], numbers in [0, 1)")
        for name in ("increments", "actions", "weights", "jumps", "marks"):
            value = getattr(self, name)
            if value is not None:
                require(
                    torch.isfinite(value).all(),
                    lambda name=name: ValueError(f"{name} must be finite"),
                )
        if self.weights is not None:
            require_probabilities("weights", self.weights)
        if self.step_sizes is not None and self.step_sizes.shape != (steps,):
            raise ValueError(
                f"step_sizes must be [{steps}], one for each of the increments, got "
                f"{list(self.step_sizes.shape)}"
            )

    def __repr__(self) -> str:
        """What there is and its shapes, not the numbers, of which there are too many to read."""
        parts = ((field.name, getattr(self, field.name)) for field in fields(self))
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in parts if x is not None)
        return f"Noise({shapes}, {self.increments.dtype} on {self.increments.device})"


def brownian_increments(
    step_sizes: Float[Tensor, " steps"],
    paths: int,
    noise: tuple[int, ...] = (1,),
    *,
    generator: torch.Generator,
) -> Float[Tensor, "paths steps *noise"]:
    """W(t + h) - W(t) of independent Brownian motions, sqrt(time).

    They are the increments that ``simulate`` draws from the same generator for a deterministic
    policy: give them to it as ``Noise`` to use them twice.

    Args:
        step_sizes: of the grid, time; the increments take its dtype and device.
        paths: how many.
        noise: shape of one increment (``ControlledSDE.noise_shape``).
        generator: to draw from, on the device of ``step_sizes``.

    Raises:
        ValueError: ``paths`` or a step size is not positive.
    """
    if paths < 1:
        raise ValueError(f"paths must be at least 1, got {paths}")
    _check_step_sizes(step_sizes)
    require_generator(generator, step_sizes.device, "step_sizes")
    drawn = step_sizes.new_empty(len(step_sizes), paths, *noise)  # time-major, as paths are stored
    many = steps_at_once(drawn[0])
    widths = step_sizes.sqrt().tolist()
    for k in range(0, len(drawn), many):
        fill_increments(drawn[k : k + many], widths[k : k + many], generator)
    return drawn.movedim(0, 1)


_TOGETHER = 2**24  # bytes of increments that a device draws at once


def steps_at_once(row: Tensor) -> int:
    """Number of steps that are drawn together: one on the CPU, where they stay in cache.

    On a device every call is a launch, which for small rows costs more than what it does.
    """
    if row.device.type == "cpu":
        return 1
    return max(1, min(64, _TOGETHER // max(1, row.numel() * row.element_size())))


def fill_increments(
    rows: Float[Tensor, "steps paths *noise"], widths: list[float], generator: torch.Generator
) -> None:
    """Draw W(t + h) - W(t) of some steps, time-major, each with its own width sqrt(h)."""
    # normal_(std=...) is twice as slow as normal_() and a product
    rows.normal_(generator=generator)
    if len(widths) == 1:
        rows.mul_(widths[0])
    else:
        rows.mul_(
            as_like(torch.tensor(widths, dtype=torch.float64), rows).view(
                -1, *[1] * (rows.ndim - 1)
            )
        )


def gauss_hermite(
    step_sizes: Float[Tensor, " steps"],
    *,
    nodes: int,
    noise: tuple[int, ...] = (1,),
    action: tuple[int, ...] | None = None,
) -> Noise:
    """Quadrature nodes in place of random numbers: every expectation of a polynomial is exact.

    The paths are the tensor product of Gauss-Hermite rules, one for each normal variable of a whole
    path; the weighted mean of a function of them is its expectation, exactly so for polynomials of
    degree up to 2 nodes - 1 in each variable.

    Args:
        step_sizes: of the grid, time; the noise takes its dtype and device.
        nodes: of each rule.
        noise: shape of one increment.
        action: shape of one action's noise, if actions are drawn.

    Raises:
        ValueError: the product would have more than 10 million paths, or a step size is not
            positive.
    """
    _check_step_sizes(step_sizes)
    steps, width = len(step_sizes), math.prod(noise)
    variables = steps * (width + (0 if action is None else math.prod(action)))
    if nodes < 1 or nodes**variables > 10_000_000:
        raise ValueError(
            f"nodes ** variables must be between 1 and 10 million, got {nodes} ** {variables}"
        )
    points, masses = np.polynomial.hermite_e.hermegauss(nodes)
    points = as_like(torch.as_tensor(points), step_sizes)
    masses = as_like(torch.as_tensor(masses / masses.sum()), step_sizes)
    rule = torch.arange(nodes, device=step_sizes.device)
    which = torch.cartesian_prod(*[rule] * variables).view(-1, variables)
    weights = masses[which].prod(1)
    split = points[which].view(len(which), steps, -1)
    brownian = split[..., :width] * step_sizes.sqrt()[:, None]
    drawn = None if action is None else split[..., width:].reshape(len(which), steps, *action)
    increments = brownian.reshape(len(which), steps, *noise)
    return Noise(increments, drawn, weights, step_sizes=step_sizes)


def random_signs(*shape: int, like: Tensor, generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """Independent signs, 1 or -1 with equal probability: probes of a trace (``value.generator``).

    Args:
        shape: for ``q_learning.q_rates``: paths, steps, probes, and that of one increment.
        like: whose dtype and device they have.
        generator: to draw them with, on that device.
    """
    require_generator(generator, like.device, "like")
    drawn = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8, device=like.device)
    return (2 * drawn - 1).to(like)


def antithetic(noise: Noise) -> Noise:
    """Twice the paths, interleaved: path 2 i is path i, path 2 i + 1 its mirror image.

    The mirror image has all normals with the opposite sign, and the same uniform numbers. Average
    each pair before you take a standard error, ``values.view(-1, 2).mean(1)``: the two are not
    independent.
    """

    def mirrored(value: Tensor | None) -> Tensor | None:
        return None if value is None else torch.stack([value, -value], dim=1).flatten(0, 1)

    increments = mirrored(noise.increments)
    assert increments is not None
    weights = None if noise.weights is None else noise.weights.repeat_interleave(2) / 2
    exits = None if noise.exits is None else noise.exits.repeat_interleave(2, dim=0)
    actions, jumps, marks = (mirrored(each) for each in (noise.actions, noise.jumps, noise.marks))
    return Noise(increments, actions, weights, exits, jumps, marks, noise.step_sizes)


def coarsen(
    increments: Float[Tensor, "paths fine *noise"],
    fine_nodes: Float[Tensor, " fine_nodes"],
    coarse_nodes: Float[Tensor, " coarse_nodes"],
) -> Float[Tensor, "paths coarse *noise"]:
    """The same Brownian paths on fewer nodes: increments summed over each coarse step.

    Args:
        increments: on the fine nodes, sqrt(time).
        fine_nodes: times, increasing.
        coarse_nodes: some of them, with the first and the last.

    Raises:
        ValueError: a coarse node is not a fine one, the ends differ, or the shapes do not fit.
    """
    _check_fine(increments, fine_nodes, "fine_nodes")
    ends = _places(coarse_nodes, fine_nodes)
    sums = [increments[:, a:b].sum(1) for a, b in itertools.pairwise(ends)]
    return torch.stack(sums, dim=1)


def refine(
    increments: Float[Tensor, "paths coarse *noise"],
    coarse_nodes: Float[Tensor, " coarse_nodes"],
    fine_nodes: Float[Tensor, " fine_nodes"],
    *,
    generator: torch.Generator | None = None,
    normals: Iterator[Tensor] | None = None,
) -> Float[Tensor, "paths fine *noise"]:
    """The same Brownian paths on more nodes: a Brownian bridge in every coarse step.

    Given the remaining increment R over the remaining time s of a coarse step, the next fine
    increment over time h is N(R h / s, h (s - h) / s). ``coarsen`` undoes it.

    Args:
        increments: on the coarse nodes, sqrt(time).
        coarse_nodes: times, increasing.
        fine_nodes: times that include the coarse ones, with the same ends.
        generator: of the bridge's normals, on the increments' device; or
        normals: these themselves, [paths, *noise] for every fine node that is no coarse one.

    Raises:
        ValueError: a coarse node is not a fine one, the ends differ, the shapes do not fit, or
            both or neither of ``generator`` and ``normals`` are given.
    """
    if (generator is None) == (normals is None):
        raise ValueError("give exactly one of generator and normals")
    if generator is not None:
        require_generator(generator, increments.device, "increments")
    _check_fine(increments, coarse_nodes, "coarse_nodes")
    ends = _places(coarse_nodes, fine_nodes)
    times = fine_nodes.double().tolist()
    fine: list[Tensor] = []
    for k, (a, b) in enumerate(itertools.pairwise(ends)):
        left = increments[:, k]
        for j in range(a, b - 1):
            rest, h = times[b] - times[j], times[j + 1] - times[j]
            if normals is None:
                normal = torch.empty_like(left).normal_(generator=generator)
            else:
                normal = next(normals)
            one = left * (h / rest) + normal * math.sqrt(h * (rest - h) / rest)
            fine.append(one)
            left = left - one
        fine.append(left)
    return torch.stack(fine, dim=1)


def _check_fine(increments: Tensor, nodes: Tensor, name: str) -> None:
    if increments.ndim < 2 or nodes.ndim != 1 or increments.shape[1] != len(nodes) - 1:
        raise ValueError(
            f"increments must be [paths, {len(nodes) - 1}, ...] to fit {name}, got "
            f"{list(increments.shape)}"
        )
    if not increments.is_floating_point() or not len(increments):
        raise TypeError(
            f"increments must be floating point, of at least one path, got {increments.dtype} "
            f"{list(increments.shape)}"
        )
    if not bool(torch.isfinite(increments).all()):
        raise ValueError("increments must be finite")


def _places(coarse: Tensor, fine: Tensor) -> list[int]:
    """Index of every coarse node among the fine ones."""
    for name, nodes in (("coarse_nodes", coarse), ("fine_nodes", fine)):
        if nodes.ndim != 1 or len(nodes) < 2 or not bool((nodes.diff() > 0).all()):
            raise ValueError(f"{name} must be at least two increasing times, got {nodes.tolist()}")
    coarse, fine = coarse.cpu(), fine.cpu()
    slack = 1e-6 * float(fine.detach().diff().min())  # nodes of two grids may differ by round-off
    gaps = (coarse.double()[:, None] - fine.double()[None]).abs()
    nearest, places = gaps.min(1)
    if bool((nearest > slack).any()):
        k = int((nearest > slack).nonzero()[0])
        raise ValueError(
            f"coarse_nodes must be among fine_nodes, but coarse_nodes[{k}] = {coarse[k]:g} is not"
        )
    indices = [int(place) for place in places]
    if indices[0] != 0 or indices[-1] != len(fine) - 1:
        raise ValueError("coarse_nodes and fine_nodes must begin and end together")
    return indices


def _check_step_sizes(step_sizes: Float[Tensor, " steps"]) -> None:
    if not isinstance(step_sizes, Tensor):
        raise TypeError(
            f"step_sizes must be a tensor, got {type(step_sizes).__name__}; grid.steps are those "
            "of a TimeGrid"
        )
    if step_sizes.ndim != 1 or not len(step_sizes):
        raise ValueError(f"step_sizes must be [at least 1], got {list(step_sizes.shape)}")
    if not bool(((step_sizes > 0) & torch.isfinite(step_sizes)).all()):
        raise ValueError(f"step_sizes must be positive and finite, got {step_sizes.tolist()}")
