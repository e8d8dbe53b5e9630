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
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_WORDS = 624  # of the Mersenne Twister's state


@cache
def _state_template() -> tuple[bytes, int]:
    """A fresh CPU generator's state, and where in it the Mersenne Twister's words begin.

    The layout is torch's own business, so it is found by looking for the words that a known seed
    must give (Matsumoto & Nishimura's initialisation), not assumed.
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
    batch, on any process. The numbers are drawn on the CPU and moved, so devices agree too.
    """
    rows = [
        torch.randn(shape, generator=stream(seed, *name, index), dtype=dtype) for index in samples
    ]
    return (
        torch.stack(rows).to(device) if rows else torch.empty(0, *shape, device=device, dtype=dtype)
    )


@dataclass(frozen=True, eq=False)
class Noise:
    """All randomness of a simulation, as tensors.

    Attributes:
        increments: W(t + h) - W(t) for every path and step, sqrt(time).
        actions: standard normals that the policy's actions are drawn with, if it draws them.
        weights: of the paths, non-negative, summing to 1, where they are not equal (quadrature).
    """

    increments: Float[Tensor, "paths steps *noise"]
    actions: Float[Tensor, "paths steps *action"] | None = None
    weights: Float[Tensor, " paths"] | None = None

    def __post_init__(self) -> None:
        if self.increments.ndim < 2:
            raise ValueError(
                f"increments must be [paths, steps, *noise], got {list(self.increments.shape)}"
            )
        paths, steps = self.increments.shape[:2]
        if self.actions is not None and self.actions.shape[:2] != (paths, steps):
            raise ValueError(
                f"actions must begin with [{paths}, {steps}], as increments do, got "
                f"{list(self.actions.shape)}"
            )
        if self.weights is not None and self.weights.shape != (paths,):
            raise ValueError(f"weights must be [{paths}], got {list(self.weights.shape)}")
        for name in ("increments", "actions", "weights"):
            value = getattr(self, name)
            if value is not None and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} must be finite")
        if self.weights is not None:
            total, least = self.weights.double().sum().item(), self.weights.min().item()
            if least < 0 or abs(total - 1) > 1e-5:  # float32 weights miss 1 by round-off
                raise ValueError(
                    f"weights must be non-negative and sum to 1, they sum to {total:g} and the "
                    f"least is {least:g}"
                )


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
    drawn = step_sizes.new_empty(len(step_sizes), paths, *noise)  # time-major, as paths are stored
    for row, width in zip(drawn, step_sizes.sqrt().tolist(), strict=True):
        row.normal_(generator=generator).mul_(width)
    return drawn.movedim(0, 1)


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
    points = torch.as_tensor(points).to(step_sizes)
    masses = torch.as_tensor(masses / masses.sum()).to(step_sizes)
    rule = torch.arange(nodes, device=step_sizes.device)
    which = torch.cartesian_prod(*[rule] * variables).view(-1, variables)
    weights = masses[which].prod(1)
    split = points[which].view(len(which), steps, -1)
    brownian = split[..., :width] * step_sizes.sqrt()[:, None]
    drawn = None if action is None else split[..., width:].reshape(len(which), steps, *action)
    return Noise(brownian.reshape(len(which), steps, *noise), drawn, weights)


def antithetic(noise: Noise) -> Noise:
    """Every path followed by its mirror image: all normals with the opposite sign."""

    def mirrored(value: Tensor | None) -> Tensor | None:
        return None if value is None else torch.stack([value, -value], dim=1).flatten(0, 1)

    increments = mirrored(noise.increments)
    assert increments is not None
    weights = None if noise.weights is None else noise.weights.repeat_interleave(2) / 2
    return Noise(increments, mirrored(noise.actions), weights)


def _check_step_sizes(step_sizes: Float[Tensor, " steps"]) -> None:
    if step_sizes.ndim != 1 or not len(step_sizes):
        raise ValueError(f"step_sizes must be [at least 1], got {list(step_sizes.shape)}")
    if not bool(((step_sizes > 0) & torch.isfinite(step_sizes)).all()):
        raise ValueError(f"step_sizes must be positive and finite, got {step_sizes.tolist()}")
