"""Randomness: quadrature in its place, bridges, streams that have names, and normal increments.

What can be counted is counted: distinct noise vectors among so many requests. What is linear is
probed: the law of a refined path is read off a matrix. Only what is left is sampled.
"""

from collections.abc import Callable, Iterator
from itertools import count

import torch
from torch import Tensor

import ctrl
from ctrl.noise import PathStreams, normals_by_sample, stream
from verification.claim import Check, Sampled, Setting, claim, expectation, pathwise, sampled, wrong
from verification.closed_form.brownian_bridge import (
    bridge,
    missed_by_quadrature,
    normal_moment,
    sums,
)

QUADRATURE, STREAM = "ctrl.noise.gauss_hermite", "ctrl.noise.stream"
STEPS = (0.3, 0.55)


@claim(
    statement="""
        The weighted mean over gauss_hermite's paths is the expectation of every polynomial of
        degree up to 2 nodes - 1 in each increment and each action's normal; at degree 2 nodes it
        is short by nodes! h^nodes. Antithetic pairs keep even moments and make odd ones 0.
        """,
    source="Golub & Welsch 1969; Hammersley & Morton 1956",
    wrongs=[
        wrong("h for sqrt(h)", QUADRATURE, "step_sizes.sqrt()[:, None]", "step_sizes[:, None]"),
        wrong(
            "steps exchanged",
            QUADRATURE,
            "step_sizes.sqrt()[:, None]",
            "step_sizes.sqrt().flip(0)[:, None]",
        ),
        wrong("physicists' polynomials", QUADRATURE, "hermite_e.hermegauss", "hermite.hermgauss"),
        wrong(
            "weights not normalised",
            QUADRATURE,
            "masses / masses.sum()",
            "masses",
            raises=ValueError,
        ),
        wrong("all weights equal", QUADRATURE, "masses / masses.sum()", "0 * masses + 1 / nodes"),
        wrong("a node less", QUADRATURE, "hermegauss(nodes)\n", "hermegauss(nodes := nodes - 1)\n"),
        wrong(
            "actions in units of the increments",
            QUADRATURE,
            "split[..., width:].reshape",
            "(split[..., width:] * step_sizes.sqrt()[:, None]).reshape",
        ),
        wrong(
            "one normal for increment and action",
            QUADRATURE,
            "split[..., width:].reshape",
            "split[..., :width].reshape",
        ),
        wrong("pairs of equal paths", "ctrl.noise.antithetic", "[value, -value]", "[value, value]"),
        wrong(
            "weights of another path's pair",
            "ctrl.noise.antithetic",
            "noise.weights.repeat_interleave(2)",
            "noise.weights.repeat(2)",
        ),
    ],
)
def gaussian_quadrature(setting: Setting) -> Iterator[Check]:
    """Mixed moments of two increments and an action's normals, and where exactness ends."""
    nodes = 3
    steps = setting.tensor(STEPS)
    noise = ctrl.noise.gauss_hermite(steps, nodes=nodes, action=(1,))
    assert noise.weights is not None
    assert noise.actions is not None
    w, z = noise.increments[..., 0], noise.actions[..., 0]
    one, other, drawn = w[:, 0], w[:, 1], z[:, 0]
    powers = [(a, b, c) for a in range(6) for b in range(6) for c in (0, 2, 3, 4)]
    moments = [float(noise.weights @ (one**a * other**b * drawn**c)) for a, b, c in powers]
    want = [
        normal_moment(a, STEPS[0]) * normal_moment(b, STEPS[1]) * normal_moment(c, 1.0)
        for a, b, c in powers
    ]
    yield expectation("moments up to degree 2 nodes - 1", moments, want)
    short = [
        normal_moment(2 * nodes, h) - float(noise.weights @ w[:, k] ** (2 * nodes))
        for k, h in enumerate(STEPS)
    ]
    yield expectation(
        "what degree 2 nodes is short by", short, [missed_by_quadrature(nodes, h) for h in STEPS]
    )
    random = setting.tensor([0.2, 0.5, 0.3])  # uneven weights
    few = ctrl.Noise(setting.tensor([[0.3, -1.2], [0.8, 0.5], [-0.4, 0.9]]), weights=random)
    pairs = ctrl.noise.antithetic(few)
    assert pairs.weights is not None
    x = pairs.increments
    mirrored = torch.stack([few.increments, -few.increments], dim=1)
    yield pathwise("antithetic pairs, side by side", x.view(3, 2, 2), mirrored)
    even = (pairs.weights @ x.square(), random @ few.increments.square())
    yield expectation("even moments of antithetic pairs", *even)


COARSE, FINE = (0.0, 0.3, 0.8), (0.0, 0.1, 0.3, 0.45, 0.7, 0.8)
REFINE = "ctrl.noise.refine"


@claim(
    statement="""
        refine adds a Brownian bridge: given the coarse increments c, the fine ones are
        N(H A' (A H A')^{-1} c, H - H A' (A H A')^{-1} A H); coarsen is A, and undoes it exactly.
        """,
    source="Karatzas & Shreve, section 5.6.B; conditioning of Gaussian vectors",
    wrongs=[
        wrong(
            "bridge's variance without its pin",
            REFINE,
            "math.sqrt(h * (rest - h) / rest)",
            "math.sqrt(h)",
        ),
        wrong(
            "variance for standard deviation",
            REFINE,
            "math.sqrt(h * (rest - h) / rest)",
            "(h * (rest - h) / rest)",
        ),
        wrong("mean not shared by time", REFINE, "(h / rest)", "0.5"),
        wrong(
            "remaining time not reduced",
            REFINE,
            "rest, h = times[b] - times[j],",
            "rest, h = times[b] - times[a],",
        ),
        wrong("remaining increment not reduced", REFINE, "left = left - one", "left = left"),
        wrong(
            "one normal for a whole coarse step",
            REFINE,
            "normal = torch.empty_like(left).normal_(generator=generator)",
            "normal = torch.empty_like(left).normal_(generator=generator) if j == a else normal",
        ),
        wrong(
            "the generator advanced twice",
            REFINE,
            "normal_(generator=generator)",
            "normal_(generator=generator).normal_(generator=generator)",
        ),
        wrong("no noise", REFINE, "+ normal *", "+ 0 * normal *"),
        wrong("mean for sum", "ctrl.noise.coarsen", "a:b].sum(1)", "a:b].mean(1)"),
        wrong(
            "last fine step left out",
            "ctrl.noise.coarsen",
            "a:b].sum(1)",
            "a:max(b - 1, a + 1)].sum(1)",
        ),
    ],
)
def brownian_bridge(setting: Setting) -> Iterator[Check]:
    """The law of refined increments, read off the linear map that makes them."""
    paths, inner = 24, 3  # inner nodes, each with a normal
    coarse, fine = setting.tensor(COARSE), setting.tensor(FINE)
    coarse_increments = coarse.new_empty(paths, 2).normal_(generator=setting.generator("given"))
    refined = ctrl.noise.refine(
        coarse_increments, coarse, fine, generator=setting.generator("bridge")
    )
    again = setting.generator("bridge")
    normals = [
        torch.empty_like(coarse_increments[:, 0]).normal_(generator=again) for _ in range(inner)
    ]
    inputs = torch.cat([coarse_increments, torch.stack(normals, dim=1)], dim=1).double()
    matrix = torch.linalg.lstsq(inputs, refined.double()).solution.T  # [fine, coarse + normals]
    gain, covariance = bridge(COARSE, FINE)
    yield pathwise("nothing but the increments and one normal a node", inputs @ matrix.T, refined)
    yield expectation("mean given the coarse increments", matrix[:, :2], gain)
    root = matrix[:, 2:]
    yield expectation("covariance given the coarse increments", root @ root.T, covariance)
    yield pathwise(
        "coarsen undoes refine", ctrl.noise.coarsen(refined, fine, coarse), coarse_increments
    )
    probes = torch.eye(len(FINE) - 1).to(fine)
    yield pathwise("coarsen sums", ctrl.noise.coarsen(probes, fine, coarse).T, sums(COARSE, FINE))


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


KEY, NUMBERS = "ctrl.noise.PathStreams._key", "ctrl.noise.PathStreams._numbers"
ROWS, ALIKE = "ctrl.drawn_ahead.rows", "increments and actions alike"


@claim(
    statement="""
        The noise of a path depends on (seed, name, index of the path, step) alone: the same
        whether 1, 2 or 4 processes draw it, and different for every request. Streams differ in
        every part of their names; seed and rank are never added. A generator is used once.
        """,
    source="Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3; verl-omni issue 561",
    wrongs=[
        wrong(
            "numbers local to a process",
            NUMBERS,
            "range(self.first_path * width, (self.first_path + paths) * width)",
            "range(paths * width)",
        ),
        wrong(
            "one path too far",
            NUMBERS,
            "range(self.first_path * width, (self.first_path + paths) * width)",
            "range((self.first_path + bool(self.first_path)) * width, (self.first_path + "
            "bool(self.first_path) + paths) * width)",
        ),
        wrong(
            "the first paths of a group",
            ROWS,
            "row[begin : begin + len(numbers)]",
            "row[: len(numbers)]",
        ),
        wrong("one noise for every group of numbers", ROWS, "group=group,", "group=0,"),
        wrong("seed + rank", KEY, "key_of(self.seed,", "key_of(self.seed + (self.first_path > 0),"),
        wrong(ALIKE, KEY, "kind, str(dtype)", "str(dtype)"),
        wrong(
            "the same noise at every step",
            ROWS,
            "row[begin : begin + len(numbers)]",
            "out[0, begin : begin + len(numbers)]",
        ),
        wrong(
            "widths of other steps",
            "ctrl.noise_sources.Streamed.__init__",
            "grid.steps.tolist()",
            "grid.steps.flip(0).tolist()",
        ),
        wrong(
            "the generator advanced twice a step",
            "ctrl.noise_sources.Drawn.increment",
            "fill_increments(into.unsqueeze(0), self.widths[k : k + 1], self.generator)",
            "[fill_increments(into[None], self.widths[k : k + 1], self.generator) for _ in '12']",
        ),
        wrong("the seed left out of a name", STREAM, "repr((seed, *name))", "repr(name)"),
        wrong(
            "numbers added to the seed",
            STREAM,
            "repr((seed, *name))",
            "repr((seed + sum(p for p in name if isinstance(p, int)), *map(type, name)))",
        ),
        wrong(
            "parts joined without a boundary",
            STREAM,
            "repr((seed, *name))",
            '"".join(map(str, (seed, *name)))',
        ),
        wrong("low bits of the seed", STREAM, "repr((seed, *name))", "repr((seed % 2**32, *name))"),
        wrong(
            "order of the parts lost",
            STREAM,
            "repr((seed, *name))",
            "repr((seed, *sorted(name, key=str)))",
        ),
        wrong(
            "the index of a sample left out",
            "ctrl.noise.normals_by_sample",
            "*name, index)",
            "*name)",
        ),
        wrong(
            "index within the batch",
            "ctrl.noise.normals_by_sample",
            "for index in samples",
            "for index in range(len(samples))",
        ),
    ],
)
def random_streams(setting: Setting) -> Iterator[Check]:
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


def batches(draw: Callable[[int], Tensor]) -> Iterator[Tensor]:
    """draw(0), draw(1), ... without end."""
    return (draw(k).flatten() for k in count())


INCREMENTS, PIECES = "ctrl.noise.brownian_increments", "ctrl.torchsde_solver.TorchSDE._pieces"
FILL = "ctrl.noise.fill_increments"


@claim(
    statement="""
        Increments are independent N(0, h), over steps and paths and of the actions' normals; the
        time integral that srk draws is N(h W / 2, h^3 / 12) given the increment W.
        """,
    source="Kloeden & Platen, sections 1.8, 10.4; Foster, Lyons & Oberhauser 2020",
    wrongs=[
        wrong("h for sqrt(h)", INCREMENTS, "step_sizes.sqrt()", "step_sizes"),
        wrong("standard normals", FILL, "rows.mul_(widths[0])", "rows.mul_(1)"),
        wrong("variance + 10 %", FILL, "rows.mul_(widths[0])", "rows.mul_(1.05 * widths[0])"),
        wrong(
            "uniform numbers of the same variance",
            FILL,
            "rows.normal_(generator=generator)",
            "rows.uniform_(-(3**0.5), 3**0.5, generator=generator)",
        ),
        wrong(
            "one noise for all paths of a group",
            INCREMENTS,
            "return drawn.movedim(0, 1)",
            "return drawn[:, :1].expand_as(drawn).movedim(0, 1)",
        ),
        wrong(
            "one noise for all steps",
            INCREMENTS,
            "return drawn.movedim(0, 1)",
            "return drawn[:1].expand_as(drawn).movedim(0, 1)",
        ),
        wrong(ALIKE, KEY, "kind, str(dtype)", "str(dtype)"),
        wrong(
            "integral's variance h^3 / 3", PIECES, "h * math.sqrt(h / 12)", "h * math.sqrt(h / 3)"
        ),
        wrong("integral's mean h W", PIECES, "0.5 * h * part", "h * part"),
    ],
)
def independent_increments(setting: Setting) -> Iterator[Sampled]:
    """Second and fourth moments and cross-correlations, by sequential tests."""
    steps = setting.tensor(STEPS)
    widths = steps.sqrt()[:, None]

    def normals(name: str, k: int) -> Tensor:
        generator = setting.generator(f"{name} {k}")
        return ctrl.noise.brownian_increments(steps, 4000, (1,), generator=generator) / widths

    yield sampled(
        "second moment of an increment, over h",
        batches(lambda k: normals("second", k)[:, 0].square()),
        1.0,
        variance=2.1,
    )
    yield sampled(
        "fourth moment of an increment, over 3 h^2",
        batches(lambda k: normals("fourth", k)[:, 1] ** 4 / 3),
        1.0,
        variance=11.5,
    )
    yield sampled(
        "correlation of two steps",
        batches(lambda k: normals("steps", k).prod(1)),
        0.0,
        variance=1.1,
        scale=1.0,
    )
    yield sampled(
        "correlation of two paths",
        batches(lambda k: normals("paths", k)[:, 0].view(-1, 2).prod(1)),
        0.0,
        variance=1.1,
        scale=1.0,
    )

    def of_streams(k: int) -> Tensor:
        streams = PathStreams(setting.seed, ("kinds", k))
        like = widths.new_empty(1, 1)
        one, other = (next(streams.rows(kind, 4096, like)) for kind in ("increments", "actions"))
        return one * other

    yield sampled(
        "correlation of increments and actions", batches(of_streams), 0.0, variance=1.1, scale=1.0
    )
    solver, h = ctrl.TorchSDE("srk"), STEPS[0]

    def integrals(k: int) -> tuple[Tensor, Tensor]:
        w = normals("areas", k)[:, 0] * widths[0]
        begin, end = torch.tensor([0.2, 0.2 + h], dtype=torch.float64)
        ((_, _, piece),) = solver._pieces(begin, end, w, None)
        return w, piece.integral

    def excess(k: int) -> Tensor:
        w, integral = integrals(k)
        return (integral - h * w / 2).square() * 12 / h**3

    def together(k: int) -> Tensor:
        w, integral = integrals(k)
        return w * integral * 2 / h**2

    yield sampled("variance of the integral given W", batches(excess), 1.0, variance=2.1)
    yield sampled("covariance of the integral and W", batches(together), 1.0, variance=2.6)
