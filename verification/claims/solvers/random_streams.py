"""Named random streams: the same for any split, different for any two names.

The noise of a path depends on (seed, name, index of the path, step) alone: the same
whether 1, 2 or 4 processes draw it, and different for every request. Streams differ in
every part of their names; seed and rank are never added. A generator is used once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import ctrl
from ctrl.noise import PathStreams, normals_by_sample, stream
from verification.claim import Check, Setting, pathwise

SOURCE = "Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3; verl-omni issue 561"

PATHS = 600
TIMES = (0.0, 0.25, 0.3125, 1.3125)  # roots of the steps are exact: normals can be compared
SPLITS = ((600,), (255, 345), (100, 157, 43, 300))  # over 1, 2, 4 processes, unevenly
NAMES: tuple[tuple[int, tuple[str | int, ...]], ...] = (
    (41, ("a", 1)),  # seed + rank is that of the next
    (42, ("a", 0)),
    (41, ("a", 0)),
    (42, ("a", 1)),
    (41 + 2**32, ("a", 0)),  # the same low bits
    (41, ("b", 0)),
    (41, ("a", "0")),  # a string, not a number
    (41, ("a0",)),
    (41, ("a",)),
    (41, (0, "a")),
    (41, ("a", 0, 0)),
    (41, ("a", 11, 1)),
    (41, ("a", 1, 11)),
    (-41, ("a", 0)),
)


def distinct(rows: Tensor) -> float:
    """Number of different rows."""
    return float(len({tuple(row) for row in rows.flatten(1).tolist()}))


def by_parts(
    setting: Setting, split: tuple[int, ...], seed: int = 41
) -> tuple[Tensor, Tensor, Tensor]:
    """States, increments and actions of a roll-out in so many parts."""
    sde = ctrl.ControlledSDE(lambda t, x, a: a - 0.4 * x, lambda t, x: 0.7)
    policy = ctrl.GaussianPolicy(lambda t, x: 0 * x, std=1.0)  # actions are the normals
    grid = ctrl.TimeGrid(setting.tensor(TIMES))
    problem, first, parts = ctrl.ControlProblem(sde, TIMES[-1]), 0, []
    for paths in split:
        streams = PathStreams(seed, ("roll-out", 3), first_path=first)
        start = setting.tensor([[0.8, -0.3]]).expand(paths, -1).contiguous()
        parts.append(ctrl.simulate(problem, policy, start, grid, generator=streams))
        first += paths
    kinds = ("states", "increments", "actions")
    states, increments, actions = (torch.cat([getattr(p, k) for p in parts]) for k in kinds)
    return states, increments, actions


def checks(setting: Setting) -> Iterator[Check]:
    """Splits, counts, names."""
    whole = by_parts(setting, SPLITS[0])
    parts = [by_parts(setting, split) for split in SPLITS]
    kinds = ("states", "increments", "actions")
    for k, kind in enumerate(kinds):
        gaps = torch.stack([part[k] - whole[k] for part in parts])
        scale = float(whole[k].abs().max())
        yield pathwise(f"{kind} of 1, 2 and 4 processes are one", gaps, 0 * gaps, scale)
    roots = setting.tensor(TIMES).diff().sqrt()[:, None]
    # every step of every path is a request, and so is every action, of two runs
    counts = []
    for split, one in zip(SPLITS, parts, strict=True):
        runs = (one, by_parts(setting, split, seed=42))
        normals = [(run[1] / roots, run[2]) for run in runs]
        counts.append(distinct(torch.cat([n.flatten(0, 1) for run in normals for n in run])))
    asked = float(2 * 2 * 3 * PATHS)
    yield pathwise("distinct noise vectors of 1, 2, 4 processes", counts, [asked] * len(counts))
    normal = whole[1] / roots
    rows = PathStreams(41, ("roll-out", 3)).rows("increments", PATHS, whole[0][:, 0])
    drawn = torch.stack([next(rows).clone() for _ in range(3)], dim=1)
    yield pathwise("simulate takes the streams' rows in turn", normal, drawn)
    steps = setting.tensor([0.3, 0.2, 0.4])  # of another, uneven grid
    alone = ctrl.noise.brownian_increments(steps, 5, (2,), generator=setting.generator("once"))
    still = ctrl.DeterministicPolicy(lambda t, x: 0 * x)
    problem = ctrl.ControlProblem(ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.7), 0.9)
    grid = ctrl.TimeGrid(setting.tensor([0.0, 0.3, 0.5, 0.9]))
    start = torch.zeros(5, 2).to(steps)
    paths = ctrl.simulate(problem, still, start, grid, generator=setting.generator("once"))
    assert paths.increments is not None
    yield pathwise("simulate draws what brownian_increments draws", paths.increments, alone)
    first = torch.stack([torch.randn(4, generator=stream(s, *name)) for s, name in NAMES])
    yield pathwise("streams whose names differ", distinct(first), float(len(NAMES)))

    def samples(indices: range) -> Tensor:
        name: tuple[str | int, ...] = ("transition", 2)
        return normals_by_sample((3,), seed=5, name=name, samples=indices, dtype=setting.dtype)

    together = samples(range(12))
    split = torch.cat([samples(range(0, 5)), samples(range(5, 12))])
    yield pathwise("samples in two batches and in one", split, together)
    yield pathwise("distinct samples", distinct(together), 12.0)


MISTAKES = """
ctrl.noise.PathStreams._numbers
    one path too far | range(self.first_path * width, (self.first_path + paths) * width)
        => range((self.first_path + bool(self.first_path)) * width, (self.first_path + bool(self.first_path) + paths) * width)
ctrl.drawn_ahead.rows
    the first paths of a group | row[begin : begin + len(numbers)] => row[: len(numbers)]
    one noise for every group of numbers | group=group, => group=0,
    the same noise at every step | row[begin : begin + len(numbers)] => out[0, begin : begin + len(numbers)]
ctrl.noise.PathStreams._key
    seed + rank | key_of(self.seed, => key_of(self.seed + (self.first_path > 0),
ctrl.noise_sources.Streamed.__init__
    widths of other steps | grid.steps.tolist() => grid.steps.flip(0).tolist()
ctrl.noise_sources.Drawn.increment
    the generator advanced twice a step | fill_increments(into.unsqueeze(0), self.widths[k : k + 1], self.generator)
        => [fill_increments(into[None], self.widths[k : k + 1], self.generator) for _ in '12']
ctrl.noise.stream
    the seed left out of a name | repr((seed, *name)) => repr(name)
    numbers added to the seed | repr((seed, *name))
        => repr((seed + sum(p for p in name if isinstance(p, int)), *map(type, name)))
    parts joined without a boundary | repr((seed, *name)) => "".join(map(str, (seed, *name)))
    low bits of the seed | repr((seed, *name)) => repr((seed % 2**32, *name))
    order of the parts lost | repr((seed, *name)) => repr((seed, *sorted(name, key=str)))
ctrl.noise.normals_by_sample
    the index of a sample left out | *name, index) => *name)
    index within the batch | for index in samples => for index in range(len(samples))
shared
    numbers local to a batch
    increments and actions alike
"""
