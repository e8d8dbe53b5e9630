"""Jump rates as the control: likelihood ratios and KLs of chains, and the tilt by Doob's transform.

log dP/dP0 = sum over jumps log Q/Q0 - int (lambda - lambda0) dt, whose mean under P is
KL(P || P0) = E int sum_y (Q log Q/Q0 - Q + Q0) dt. Over laws, E[int r dt + g(X_T)] - b KL
is at most V = b log h, h = e^{(Q0 + r/b)(T - t)} e^{g/b}, attained by the rates
Q0[x, y] h(y)/h(x); -V' = r + b sum_y Q0 (e^{(V(y)-V(x))/b} - 1).

Four states, rates that change once. Likelihood ratios are compared with densities of paths, the
path KL with the KL of states at ever finer times, the tilt with its nonlinear Bellman equation.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import chains
from verification.claim import Check, Setting, bound, expectation, limit, pathwise
from verification.closed_form import chains as exact

SOURCE = "Bremaud 1981, Point Processes and Queues, VI.2; Fleming & Soner 2006, VI"
WHY_DOUBLE = "the answers are extrapolated, or integrated to the twelfth digit"

TIMES = [[0.2, 0.45, 0.9, 1.3], [0.7, 1.1, 1.3, 1.3], [0.1, 0.5, 0.6, 1.2]]
STATES = [[0, 2, 1, 3, 3], [3, 0, 2, 2, 2], [1, 1, 0, 3, 2]]  # the last path waits at its first
BETWEEN = 0.37
ONE_WAY, ONE_WAY_REFERENCE, LONG = 0.8, 1.3, 1.7


def grid(setting: Setting) -> ctrl.TimeGrid:
    """Where the rates change."""
    return ctrl.TimeGrid(setting.tensor(exact.NODES))


def rates(setting: Setting, off_diagonal: np.ndarray) -> chains.JumpRates:
    """A chain of the closed form."""
    return chains.JumpRates(grid(setting), chains.with_diagonal(setting.tensor(off_diagonal)))


def tilted(setting: Setting) -> chains.Tilted:
    """The optimum, from the reference."""
    return chains.tilt(
        rates(setting, exact.REFERENCE),
        exact.KL_WEIGHT,
        setting.tensor(exact.TERMINAL),
        setting.tensor(exact.RUNNING),
    )


def log_densities(rates: np.ndarray) -> list[float]:
    """Of the paths above; where one goes nowhere, it has not jumped."""
    each = []
    for times, states in zip(TIMES, STATES, strict=True):
        real = [i for i in range(len(times)) if states[i] != states[i + 1]]
        walked = [states[0], *(states[i + 1] for i in real)]
        each.append(exact.log_density(rates, [times[i] for i in real], walked))
    return each


def one_way(setting: Setting) -> tuple[Tensor, Tensor]:
    """E log dP/dP0 by quadrature over the time of the only jump; and the path KL."""
    even = ctrl.TimeGrid(setting.tensor([0.0, LONG]))
    chain, reference = (
        chains.held(chains.with_diagonal(setting.tensor([[0.0, rate], [0.0, 0.0]])), even)
        for rate in (ONE_WAY, ONE_WAY_REFERENCE)
    )
    nodes, weights = np.polynomial.legendre.leggauss(20)
    times = 0.5 * LONG * (nodes + 1)
    density = 0.5 * LONG * weights * ONE_WAY * np.exp(-ONE_WAY * times)
    masses = setting.tensor([*density, np.exp(-ONE_WAY * LONG)])
    states = torch.tensor([[0, 1]] * len(times) + [[0, 0]])
    jumps = chains.JumpPaths(setting.tensor([*times, LONG])[:, None], states, even)
    mean = masses @ chains.log_ratio(chain, reference, jumps)
    return mean, chains.path_kl(chain, reference, setting.tensor([1.0, 0.0]))


def attained(setting: Setting, pieces: int) -> float:
    """Reward less b KL of the tilt's rates held over parts of steps."""
    nodes = np.concatenate(
        [np.linspace(a, b, pieces, endpoint=False) for a, b in ((0.0, 0.5), (0.5, 1.3))] + [[1.3]]
    )
    fine = ctrl.TimeGrid(setting.tensor(nodes))
    matrices = chains.with_diagonal(setting.tensor(exact.REFERENCE)).repeat_interleave(pieces, 0)
    reference = chains.JumpRates(fine, matrices)
    terminal, running = setting.tensor(exact.TERMINAL), setting.tensor(exact.RUNNING)
    best = chains.tilt(reference, exact.KL_WEIGHT, terminal, running).held()
    start = setting.tensor(exact.START)
    earned = (best.occupations(start) @ running).sum() + best.marginals(start)[-1] @ terminal
    return float(earned - exact.KL_WEIGHT * chains.path_kl(best, reference, start))


def checks(setting: Setting) -> Iterator[Check]:
    """Pathwise, by quadrature, and by limits of skeletons and of held rates."""
    chain, reference = rates(setting, exact.RATES), rates(setting, exact.REFERENCE)
    paths = chains.JumpPaths(setting.tensor(TIMES), torch.tensor(STATES), grid(setting))
    apart = np.array(log_densities(exact.RATES)) - log_densities(exact.REFERENCE)
    ratio = chains.log_ratio(chain, reference, paths)
    yield pathwise("log-ratio of paths, against their densities", ratio, apart)
    mean, kl = one_way(setting)
    yield expectation("mean log-ratio of a single jump is its path KL", mean, kl)
    by_hand = (np.log(ONE_WAY / ONE_WAY_REFERENCE) - 1 + ONE_WAY_REFERENCE / ONE_WAY) * (
        1 - np.exp(-ONE_WAY * LONG)
    )
    yield expectation("path KL of a single jump, by hand", kl, by_hand)
    start = setting.tensor(exact.START)
    kl = chains.path_kl(chain, reference, start)
    curve = [(0.65 / n, exact.skeleton_kl(n) - float(kl)) for n in (4, 8, 16)]
    yield limit("path KL, the limit of the states' KL", kl, exact.path_kl(), curve=curve)

    best = tilted(setting)
    yield limit("value, by the Bellman equation", best.values[0], exact.values(0.0))
    V = exact.values(BETWEEN)
    want = exact.REFERENCE[0] * np.exp((V[None, :] - V[:, None]) / exact.KL_WEIGHT)
    yield limit("best rates within a step", best.rates_at(BETWEEN), exact.generator(want))
    law = start
    for P in best.transitions():
        law = law @ P
    yield limit("last state of the tilted chain", law, exact.tilted_law())
    value = float(exact.START @ exact.values(0.0))
    row = [(0.65 / n, attained(setting, n)) for n in (16, 32, 64)]
    once = [(4 * b - a) / 3 for (_, a), (_, b) in itertools.pairwise(row)]
    twice = (8 * once[1] - once[0]) / 7
    curve = [(h, each - value) for h, each in row]
    yield limit("reward less b KL of the best rates", twice, value, curve=curve)
    yield bound("it is no more than V", [each for _, each in row], [value] * 3)


MISTAKES = """
ctrl.chains.log_ratio
    rates of leaving added | gained - (until => gained + (until
    waiting of one law only | rates.leaving - reference.leaving => rates.leaving
    rates of the step before, at a change | paths.times.contiguous(), right=True
        => paths.times.contiguous(), right=False
    ratio of jumps upside down | each[0] - each[1] => each[1] - each[0]
    a jump to where it is counts | torch.where(jumps, each[0]
        => torch.where(jumps | ~jumps, (rates.matrices[step, before, after] / reference.matrices[step, before, after]).log() + 0 * each[0]
ctrl.chains.kl_rate
    KL without - Q + Q0 | ` - Q + Q0` => ``
    KL the other way round | Q, Q0 = ( => Q0, Q = (
ctrl.chains.JumpRates.occupations
    time in a state, of the first law alone | self.marginals(start)[:-1] => start.expand(len(h), n)
    occupation by the matrix transposed | kx,kxy->ky => ky,kxy->kx
ctrl.chains._weighted
    reward not over b | r / kl_weight => r
    running reward dropped | torch.diag(rates - most) => 0
ctrl.chains._earlier
    largest reward not put back | ` + log_factor` => ``
ctrl.chains.tilt
    terminal reward times b | reward / kl_weight => reward * kl_weight
ctrl.chains.Tilted.rates_at
    Doob's transform upside down | log_h - log_h[:, None] => log_h[:, None] - log_h
    h of the end of the step | float(nodes[k + 1]) - t => 0.0
ctrl.chains.Tilted.transitions
    transitions without h | ` + self.log_h[k + 1]` => ``
ctrl.chains.Tilted.values
    value without b | self.kl_weight * self.log_h => self.log_h
"""
