"""First exits: rewards that end at a wall, likelihood ratios up to it, Fleming's transform.

A path that leaves a domain at tau ends there: r is paid until tau, then the exit's reward,
and M_t = e^{-d t} V + int_0^t e^{-d s} r ds stops at tau, where V is what is paid; the
likelihood ratio of two policies is that of the increments up to tau. For dX = a dt + dW on
(-1, 1) and the cost a^2/2 + w^2/2 until the exit, phi = exp(-V) is linear (Fleming):
V = -log(cosh(w x) / cosh(w)), a* = w tanh(w x); with a = 0 and cost 1, V = 1 - x^2.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import hjb
from verification.claim import Check, Setting, limit, pathwise
from verification.closed_form import first_exit as exact
from verification.problems.first_exit import MOTION, SDE, WALLS

SOURCE = "Fleming 1978, Exit probabilities and optimal stochastic control; Jia & Zhou 2022a"
WHY_DOUBLE = "the grids of ctrl.hjb are in float64"

OTHER, DISCOUNT, W, PAID = -0.5, 0.4, 1.4, 0.7
PUSHED = ctrl.DeterministicPolicy(lambda t, x: MOTION.drift + 0 * x)
REFERENCE = ctrl.DeterministicPolicy(lambda t, x: OTHER + 0 * x)
TIMES = np.array([0.0, 0.1, 0.35, 0.5, 0.9])  # uneven


def problem(setting: Setting) -> ctrl.ControlProblem:
    """A discounted problem that pays at its exit, by the time and the place."""
    return ctrl.ControlProblem(
        SDE, 0.9, lambda t, x, a: 0.7 - x[:, 0] + 0.2 * t, lambda x: 0.3 + x[:, 0].square(),
        DISCOUNT, 0.0, WALLS, lambda t, x: 1.5 - t + 0.6 * x[:, 0],
    )  # fmt: skip


def guess(t: Tensor, x: Tensor) -> Tensor:
    """Any function: V."""
    return (0.4 + t) * x[:, 0].square() - x[:, 0] + 2


def fleming(t: Tensor, x: Tensor) -> Tensor:
    """V* of the exit problem."""
    return (torch.cosh(W * x[:, 0]) / math.cosh(W)).log()


def at_wall(x: Tensor) -> Tensor:
    """What is paid at the exit, by both walls the same."""
    return PAID + 0 * x[:, 0]


def exit_problem() -> ctrl.ControlProblem:
    """To leave (-1, 1) soon, and with little effort."""
    return ctrl.ControlProblem(
        ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 1.0), math.inf,
        lambda t, x, a: -0.5 * (a.square().sum(1) + W**2), at_wall, domain=WALLS,
    )  # fmt: skip


def sampled(setting: Setting) -> tuple[ctrl.Paths, np.ndarray, exact.Stopped]:
    """Paths by ctrl and by a plain loop, from the same random numbers."""
    generator = setting.generator("exits")
    grid = ctrl.TimeGrid(setting.tensor(TIMES))
    unit = torch.randn(60, 4, 1, generator=generator, dtype=setting.dtype, device=setting.device)
    dw = unit * grid.steps.sqrt()[:, None]
    uniform = torch.rand(60, 4, generator=generator, dtype=setting.dtype, device=setting.device)
    start = setting.tensor(np.linspace(-0.8, 0.8, 60))[:, None]
    noise = ctrl.Noise(dw, exits=uniform)
    paths = ctrl.simulate(problem(setting), PUSHED, start, grid, noise=noise)
    drawn = dw[..., 0].double().cpu().numpy()
    numbers = uniform.double().cpu().numpy()
    stop = exact.stopped(MOTION, start[:, 0].double().cpu().numpy(), TIMES, drawn, numbers)
    return paths, drawn, stop


def checks(setting: Setting) -> Iterator[Check]:
    """Against one path after the other, written out; and Fleming's transform on a grid."""
    paths, dw, stop = sampled(setting)
    assert paths.ends is not None
    assert paths.terminated is not None
    yield pathwise("states, at rest after the exit", paths.states[..., 0], stop.states)
    yield pathwise("ends", paths.ends.double(), stop.ends.astype(float))
    x, t, end = stop.states, TIMES, stop.states[:, -1]
    rate = 0.7 - x[:, :-1] + 0.2 * t[:-1]
    paid = np.where(stop.left, 1.5 - t[stop.ends] + 0.6 * end, 0.3 + end**2)
    one = problem(setting)
    runs = np.arange(4) < stop.ends[:, None]
    want = (rate * np.diff(t) * runs).sum(1)
    yield pathwise("reward until the exit", ctrl.running_rewards(one, paths).sum(1), want)
    want = exact.worth(stop, t, DISCOUNT, rate, paid)
    yield pathwise("discounted return", ctrl.returns_to_go(one, paths)[:, 0], want)
    dm = ctrl.martingale.increments(guess, one, paths)
    summed = (ctrl.value.discount_factors(one, paths) * dm).sum(1)
    begin = 0.4 * x[:, 0] ** 2 - x[:, 0] + 2
    yield pathwise("M at the end, less V at the start", summed, want - begin)
    got = ctrl.girsanov.log_ratio(SDE, PUSHED, REFERENCE, paths)
    ratio = exact.log_ratio(MOTION, OTHER, stop, t, dw)
    yield pathwise("likelihood ratio up to the exit", got, ratio)
    each = ctrl.transitions.log_ratio(SDE, ctrl.EulerMaruyama(), PUSHED, REFERENCE, paths)
    yield pathwise("likelihood ratio of the steps up to the exit", each.sum(1), ratio)

    states = np.linspace(-0.9, 0.9, 7)
    inside, best = setting.tensor(states)[:, None], setting.tensor(W * np.tanh(W * states))[:, None]
    zero = setting.tensor(0.0)
    worse = setting.tensor([[0.8], [-0.3], [0.5], [0.4], [-0.6], [0.2], [0.7]])
    q = ctrl.q_learning.q_rate(exit_problem(), fleming, zero, inside, best)
    yield pathwise("Fleming: q-rate of the best action", q, 0 * states, scale=1.0)
    q = ctrl.q_learning.q_rate(exit_problem(), fleming, zero, inside, best + worse)
    want = -0.5 * worse[:, 0].cpu().numpy() ** 2
    yield pathwise("Fleming: q-rate of others, -(a - a*)^2 / 2", q, want)
    axes = [(hjb.Axis(-1.0, 1.0, nodes),) for nodes in (11, 21)]
    actions = hjb.trapezoid(-1.5, 1.5, 151)
    coarse, fine = (hjb.solve_discounted(exit_problem(), each, actions) for each in axes)
    at = axes[0][0].points().numpy()
    last = (4 * fine.value.table[0, ::2] - coarse.value.table[0]) / 3
    yield limit(
        "Fleming: value on a grid, as its spacing vanishes", last, PAID + exact.fleming(at, W)
    )
    clock = ctrl.ControlProblem(
        SDE, math.inf, lambda t, x, a: 1 + 0 * x[:, 0], at_wall, domain=WALLS
    )
    coarse, fine = (hjb.evaluate_discounted(clock, PUSHED, each).table[0] for each in axes)
    last = (4 * fine[::2] - coarse) / 3
    yield limit(
        "mean exit time on a grid, as its spacing vanishes", last, PAID + MOTION.exit_time(at)
    )


MISTAKES = """
ctrl.simulate._absorbed
    a path goes on outside | x, runs = after, runs & ~leaves => x = after
    coefficients asked at the start | (_beside(runs, x), x, start) => (_beside(~runs, x), x, start)
ctrl.stopping.BridgeCorrected.exits
    absorbed at the node, not at the wall | exits[some], wall) => exits[some], wall) * 0 + exits[some]
    the other wall | (share <= level => (share > level
    absorbed with the chance to stay | step.uniform < touched => step.uniform > touched
ctrl.stopping.BridgeCorrected.crossed
    a node outside is none | exponent.exp(), 1) => exponent.exp(), 0)
ctrl.returns.at_exits
    the exit paid at the horizon | [paths.ends] => [0 * paths.ends - 1]
    terminal reward at the exit | if reward is None or => if True or
ctrl.paths.over_steps
    rewards after the exit | return while_running( => return (lambda one, other: one)(
ctrl.returns.returns_to_go
    discount after the exit | torch.where(runs[k], ahead, terminal) => ahead
ctrl.value._pinned
    V not pinned at the exit | torch.where(ended & => torch.where(False & ended &
    V pinned a node late | (0, 1), value=True) => (1, 0), value=False)
ctrl.value.martingale_increments
    dM after the exit | return while_running(dm, paths) => return dm
ctrl.girsanov.controls
    controls after the exit | while_running(torch.stack(each, dim=1), stopped) => torch.stack(each, dim=1)
ctrl.transitions.proposals
    density of the wall for that of the step | torch.where(stops, mean + std * unit, state) => state
ctrl.markov_chain.MarkovChain.residual
    a reflecting wall | torch.where(self.absorbing, self.paid - v, inside) => inside
ctrl.q_learning.q_rate
    sign of the cost in q | rate = rate + one_a_path => rate = rate - one_a_path
shared
    noise of a step without its half
"""
