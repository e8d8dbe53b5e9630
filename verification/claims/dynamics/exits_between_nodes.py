"""Exits between the nodes of a grid, by Brownian bridges: order one instead of one half.

Between two nodes inside, at distances d0 and d1 from a flat wall, the bridge of an Euler
step crosses it with probability exp(-2 d0 d1 / (|sigma' n|^2 h)), whatever the drift. So
decided, the exit of Brownian motion with drift through one wall has its exact law at the
nodes of any grid; the mean exit time, exits recorded at the end of their step, has an error
of order 1 (h/2 for constant coefficients; here with coefficients of the state too), where
exits seen at the nodes alone have order 1/2.
"""

import math
from collections.abc import Iterator

import numpy as np

import ctrl
from ctrl.stopping import AtNodes, BridgeCorrected, Domain, Step
from verification.claim import Check, Setting, array, expectation, limit
from verification.closed_form import first_exit as exact
from verification.problems.first_exit import FLOOR, MOTION, SDE, WALLS

SOURCE = "Gobet 2000, Stochastic Processes and their Applications 87; Bachelier's reflection"
WHY_DOUBLE = "orders of small differences"

WELL = exact.Well(0.8, 0.7, 0.4)


def kernel(
    setting: Setting,
    law: exact.Motion | exact.Well,
    rule: AtNodes | BridgeCorrected,
    domain: Domain,
    ends: tuple[float, float],
    h: float,
    nodes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Points x and K(x, y) w(y): the scheme's transition from x to y in a step, if it stays."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    low, high = ends
    y = low + (high - low) * (points + 1) / 2
    pairs = setting.tensor(np.stack(np.meshgrid(y, y, indexing="ij"), -1)).reshape(-1, 2)
    x, after, begin, end = pairs[:, :1], pairs[:, 1:], setting.tensor(0.0), setting.tensor(h)
    step = Step(sde_of(law), begin, end, x, after, 0 * x, None)
    if isinstance(rule, BridgeCorrected):
        stays = (1 - rule.crossed(domain, step)).prod(1)
    else:
        stays = 1 - rule.exits(domain, step)[0].to(pairs)
    stays = array(stays.view(nodes, nodes))
    density = law.density(y[:, None], y[None], h)
    return y, density * stays * weights * (high - low) / 2


def sde_of(law: exact.Motion | exact.Well) -> ctrl.ControlledSDE:
    """Whose step has that law; the drift does not count between two nodes."""
    if isinstance(law, exact.Motion):
        return SDE
    return ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: law.noise + law.bend * x.square())


def mean_exit_time(
    setting: Setting, law: exact.Motion | exact.Well, rule: AtNodes | BridgeCorrected, h: float
) -> float:
    """E tau of the scheme from the middle: h (1 - K)^{-1} 1, at an odd number of points."""
    y, k = kernel(setting, law, rule, WALLS, (-1.0, 1.0), h, 121)
    return h * float(np.linalg.solve(np.eye(len(y)) - k, np.ones(len(y)))[60])


def checks(setting: Setting) -> Iterator[Check]:
    """Kernels of the scheme's own transition, to the last digit, and their orders."""
    h = 0.2
    y, k = kernel(setting, MOTION, BridgeCorrected(), FLOOR, (0.0, 6.0), h, 161)
    stays = np.ones(len(y))
    near = y < 1.5  # what is lost beyond 6 has no digits
    for steps in (1, 2, 3):
        stays = k @ stays
        law = [MOTION.survival(d, steps * h) for d in y[near]]
        yield expectation(f"no visit to a wall within {steps} steps", stays[near], np.array(law))
    sizes, time = (0.04, 0.02, 0.01), float(MOTION.exit_time(np.array(0.0)))
    for name, rule, order in (("bridges", BridgeCorrected(), 1.0), ("nodes", AtNodes(), 0.5)):
        missed = [mean_exit_time(setting, MOTION, rule, h) - time for h in sizes]
        got = math.log2(abs(missed[1] / missed[2]))
        curve = zip(sizes, missed, strict=True)
        yield limit(f"mean exit time, exits by {name}: order", got, order, curve=curve)
    for name, law, limiting in (
        ("mean exit time", MOTION, time),
        ("... of a well, noise of the state", WELL, WELL.exit_time()),
    ):
        rows = [mean_exit_time(setting, law, BridgeCorrected(), h) for h in sizes]
        yield limit(f"{name} as steps vanish", 2 * rows[2] - rows[1], limiting)


MISTAKES = """
ctrl.stopping.BridgeCorrected.crossed
    2 missing in the exponent | -2 * distance => -distance
    4 for 2 | -2 * distance => -4 * distance
    step size missing | h * _across => _across
    sqrt(h) for h | h * _across => h**0.5 * _across
    the distance before alone | distance * beyond => distance * distance
    the distance after alone | distance * beyond => beyond * beyond
    nodes alone | exponent.exp() => 0 * beyond
ctrl.stopping._across
    sigma for its square | scaled.square() => scaled.abs()
ctrl.stopping.AtNodes.exits
    a wall a little inside | <= 0 => <= 0.1
"""
