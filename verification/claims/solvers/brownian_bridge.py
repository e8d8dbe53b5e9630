"""Brownian bridges: the law of refined increments.

refine adds a Brownian bridge: given the coarse increments c, the fine ones are
N(H A' (A H A')^{-1} c, H - H A' (A H A')^{-1} A H); coarsen is A, and undoes it exactly.
"""

from collections.abc import Iterator

import torch

import ctrl
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form.brownian_bridge import bridge, sums

SOURCE = "Karatzas & Shreve, section 5.6.B; conditioning of Gaussian vectors"

COARSE, FINE = (0.0, 0.3, 0.8), (0.0, 0.1, 0.3, 0.45, 0.7, 0.8)


def checks(setting: Setting) -> Iterator[Check]:
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


MISTAKES = """
ctrl.noise.refine
    bridge's variance without its pin | math.sqrt(h * (rest - h) / rest) => math.sqrt(h)
    variance for standard deviation | math.sqrt(h * (rest - h) / rest) => (h * (rest - h) / rest)
    mean not shared by time | (h / rest) => 0.5
    remaining time not reduced | rest, h = times[b] - times[j], => rest, h = times[b] - times[a],
    remaining increment not reduced | left = left - one => left = left
    one normal for a whole coarse step | normal = torch.empty_like(left).normal_(generator=generator)
        => normal = torch.empty_like(left).normal_(generator=generator) if j == a else normal
    the generator advanced twice | normal_(generator=generator)
        => normal_(generator=generator).normal_(generator=generator)
    no noise | + normal * => + 0 * normal *
ctrl.noise.coarsen
    mean for sum | a:b].sum(1) => a:b].mean(1)
    last fine step left out | a:b].sum(1) => a:max(b - 1, a + 1)].sum(1)
"""
