"""Random increments: moments and independence, by sequential tests.

Increments are independent N(0, h), over steps and paths and of the actions' normals; the
time integral that srk draws is N(h W / 2, h^3 / 12) given the increment W.
"""

from collections.abc import Callable, Iterator
from itertools import count

import torch
from torch import Tensor

import ctrl
from ctrl.noise import PathStreams
from verification.claim import Sampled, Setting, sampled

SOURCE = "Kloeden & Platen, sections 1.8, 10.4; Foster, Lyons & Oberhauser 2020"

STEPS = (0.3, 0.55)


def batches(draw: Callable[[int], Tensor]) -> Iterator[Tensor]:
    """draw(0), draw(1), ... without end."""
    return (draw(k).flatten() for k in count())


def checks(setting: Setting) -> Iterator[Sampled]:
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


MISTAKES = """
ctrl.noise.brownian_increments
    h for sqrt(h) | step_sizes.sqrt() => step_sizes
    one noise for all paths of a group | return drawn.movedim(0, 1)
        => return drawn[:, :1].expand_as(drawn).movedim(0, 1)
    one noise for all steps | return drawn.movedim(0, 1) => return drawn[:1].expand_as(drawn).movedim(0, 1)
ctrl.noise.fill_increments
    standard normals | rows.mul_(widths[0]) => rows.mul_(1)
    variance + 10 % | rows.mul_(widths[0]) => rows.mul_(1.05 * widths[0])
    uniform numbers of the same variance | rows.normal_(generator=generator)
        => rows.uniform_(-(3**0.5), 3**0.5, generator=generator)
ctrl.torchsde_solver.TorchSDE._pieces
    integral's variance h^3 / 3 | h * math.sqrt(h / 12) => h * math.sqrt(h / 3)
    integral's mean h W | 0.5 * h * part => h * part
shared
    increments and actions alike
"""
