"""Gauss-Hermite noise: which moments it has exactly, and where exactness ends.

The weighted mean over gauss_hermite's paths is the expectation of every polynomial of
degree up to 2 nodes - 1 in each increment and each action's normal; at degree 2 nodes it
is short by nodes! h^nodes. Antithetic pairs keep even moments and make odd ones 0.
"""

from collections.abc import Iterator

import torch

import ctrl
from verification.claim import Check, Setting, expectation, pathwise
from verification.closed_form.brownian_bridge import missed_by_quadrature, normal_moment

SOURCE = "Golub & Welsch 1969; Hammersley & Morton 1956"

STEPS = (0.3, 0.55)


def checks(setting: Setting) -> Iterator[Check]:
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


MISTAKES = r"""
ctrl.noise.gauss_hermite
    steps exchanged | step_sizes.sqrt()[:, None] => step_sizes.sqrt().flip(0)[:, None]
    physicists' polynomials | hermite_e.hermegauss => hermite.hermgauss
    weights not normalised [ValueError] | masses / masses.sum() => masses
    all weights equal | masses / masses.sum() => 0 * masses + 1 / nodes
    a node less | hermegauss(nodes)\n => hermegauss(nodes := nodes - 1)\n
    actions in units of the increments | split[..., width:].reshape
        => (split[..., width:] * step_sizes.sqrt()[:, None]).reshape
    one normal for increment and action | split[..., width:].reshape => split[..., :width].reshape
ctrl.noise.antithetic
    pairs of equal paths | [value, -value] => [value, value]
    weights of another path's pair | noise.weights.repeat_interleave(2) => noise.weights.repeat(2)
shared
    h for sqrt(h)
"""
