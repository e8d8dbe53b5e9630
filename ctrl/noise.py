"""Randomness as an argument: named streams, and the increments that drive a simulation.

A stream is a ``torch.Generator`` that depends on nothing but its name: a run seed and any number of
strings and integers (what the numbers are for, the global index of a sample, the step). Streams of
different names are independent, so a result cannot depend on batch layout, on the order of queries
or
on the number of processes. Names are hashed, never added: ``seed + rank`` would make seed 41 on
rank 1
replay seed 42 on rank 0.

On the CPU ``torch.Generator.manual_seed`` keeps only the low 32 bits of a seed, so that hashed
names
would collide after some 77 000 streams. Streams therefore fill all 624 words of the Mersenne
Twister.
"""

import hashlib
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
            f"not "
            "know; please report this with the version"
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


def gauss_hermite(
    step_sizes: Float[Tensor, " steps"],
    *,
    nodes: int,
    noise: tuple[int, ...] = (1,),
    action: tuple[int, ...] | None = None,
) -> Noise:
    """Quadrature nodes in place of random numbers: every expectation of a polynomial is exact.

    The paths are the tensor product of Gauss-Hermite rules, one for each normal variable of a
    whole path; the
    weighted mean of a function of them is its expectation, exactly so for polynomials of degree
    up to 2 nodes - 1 in each variable.

    Args:
        step_sizes: of the grid, time.
        nodes: of each rule.
        noise: shape of one increment.
        action: shape of one action's noise, if actions are drawn.

    Raises:
        ValueError: the product would have more than 10 million paths.
    """
    steps = len(step_sizes)
    width = int(np.prod(noise))
    action_width = int(np.prod(action)) if action is not None else 0
    variables = steps * (width + action_width)
    if nodes < 1 or nodes**variables > 10_000_000:
        raise ValueError(
            f"nodes ** variables must be between 1 and 10 million, got {nodes} ** {variables}"
        )
    points, masses = np.polynomial.hermite_e.hermegauss(nodes)
    points = torch.as_tensor(points, dtype=step_sizes.dtype)
    masses = torch.as_tensor(masses / masses.sum(), dtype=step_sizes.dtype)
    which = torch.cartesian_prod(*[torch.arange(nodes)] * variables).view(-1, variables)
    normals, weights = points[which], masses[which].prod(1)
    split = normals.view(-1, steps, width + action_width)
    brownian = split[..., :width] * step_sizes.sqrt()[:, None]
    drawn = None if action is None else split[..., width:].reshape(-1, steps, *action)
    return Noise(brownian.reshape(-1, steps, *noise), drawn, weights)


def antithetic(noise: Noise) -> Noise:
    """Every path followed by its mirror image: all normals with the opposite sign."""

    def mirrored(value: Tensor | None) -> Tensor | None:
        return None if value is None else torch.stack([value, -value], dim=1).flatten(0, 1)

    increments = mirrored(noise.increments)
    assert increments is not None
    weights = None if noise.weights is None else noise.weights.repeat_interleave(2) / 2
    return Noise(increments, mirrored(noise.actions), weights)
