"""Randomness as an argument: named streams, and the increments that drive a simulation.

A stream is a ``torch.Generator`` that depends on nothing but its name: a run seed and any number of
strings and integers (what the numbers are for, the global index of a sample, the step). Streams of
different names are independent, so a result cannot depend on batch layout, on the order of queries or
on the number of processes. Names are hashed, never added: ``seed + rank`` would make seed 41 on rank 1
replay seed 42 on rank 0.

On the CPU ``torch.Generator.manual_seed`` keeps only the low 32 bits of a seed, so that hashed names
would collide after some 77 000 streams. Streams therefore fill all 624 words of the Mersenne Twister.
"""

import hashlib
from functools import cache

import numpy as np
import torch
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
            f"torch {torch.__version__} lays out its CPU generator in a way that named streams do not "
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
