"""First exit from a domain: crossings between nodes, and what a path is worth that ends there."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import hjb
from ctrl.stopping import AtNodes, BridgeCorrected, Domain, Interval, Step
from verification.claim import Check, Setting, claim, expectation, limit, pathwise, wrong
from verification.closed_form import first_exit as exact

MOTION = exact.Motion(0.3, 0.9)
WELL = exact.Well(0.8, 0.7, 0.4)
OTHER, DISCOUNT, W, PAID = -0.5, 0.4, 1.4, 0.7
WALLS, FLOOR = Interval(-1.0, 1.0), Interval(0.0, math.inf)
SDE = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: MOTION.noise)
PUSHED = ctrl.DeterministicPolicy(lambda t, x: MOTION.drift + 0 * x)
REFERENCE = ctrl.DeterministicPolicy(lambda t, x: OTHER + 0 * x)
TIMES = np.array([0.0, 0.1, 0.35, 0.5, 0.9])  # uneven
CROSSED, ACROSS = "ctrl.stopping.BridgeCorrected.crossed", "ctrl.stopping._across"
EXITS, ABSORBED = "ctrl.stopping.BridgeCorrected.exits", "ctrl.simulate._absorbed"


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
    stays = stays.view(nodes, nodes).cpu().double().numpy()
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


@claim(
    statement="""
        Between two nodes inside, at distances d0 and d1 from a flat wall, the bridge of an Euler
        step crosses it with probability exp(-2 d0 d1 / (|sigma' n|^2 h)), whatever the drift. So
        decided, the exit of Brownian motion with drift through one wall has its exact law at the
        nodes of any grid; the mean exit time, exits recorded at the end of their step, has an error
        of order 1 (h/2 for constant coefficients; here with coefficients of the state too), where
        exits seen at the nodes alone have order 1/2.
        """,
    source="Gobet 2000, Stochastic Processes and their Applications 87; Bachelier's reflection",
    why_double="orders of small differences",
    wrongs=[
        wrong("2 missing in the exponent", CROSSED, "-2 * distance", "-distance"),
        wrong("4 for 2", CROSSED, "-2 * distance", "-4 * distance"),
        wrong("step size missing", CROSSED, "h * _across", "_across"),
        wrong("sqrt(h) for h", CROSSED, "h * _across", "h**0.5 * _across"),
        wrong("sigma for its square", ACROSS, "scaled.square()", "scaled.abs()"),
        wrong("the distance before alone", CROSSED, "distance * beyond", "distance * distance"),
        wrong("the distance after alone", CROSSED, "distance * beyond", "beyond * beyond"),
        wrong("nodes alone", CROSSED, "torch.exp(-2 * distance * beyond / variance)", "0 * beyond"),
        wrong("a wall a little inside", "ctrl.stopping.AtNodes.exits", "<= 0", "<= 0.1"),
    ],
)  # fmt: skip
def exits_between_nodes(setting: Setting) -> Iterator[Check]:
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


@claim(
    statement="""
        A path that leaves a domain at tau ends there: r is paid until tau, then the exit's reward,
        and M_t = e^{-d t} V + int_0^t e^{-d s} r ds stops at tau, where V is what is paid; the
        likelihood ratio of two policies is that of the increments up to tau. For dX = a dt + dW on
        (-1, 1) and the cost a^2/2 + w^2/2 until the exit, phi = exp(-V) is linear (Fleming):
        V = -log(cosh(w x) / cosh(w)), a* = w tanh(w x); with a = 0 and cost 1, V = 1 - x^2.
        """,
    source="Fleming 1978, Exit probabilities and optimal stochastic control; Jia & Zhou 2022a",
    why_double="the grids of ctrl.hjb are in float64",
    wrongs=[
        wrong("a path goes on outside", ABSORBED, "x, runs = after, runs & ~leaves", "x = after"),
        wrong("coefficients asked at the start", ABSORBED, "(_beside(runs, x), x, start)",
              "(_beside(~runs, x), x, start)"),
        wrong("absorbed at the node, not at the wall", EXITS, "step.after, wall)",
              "step.after, wall)[0:0].new_tensor(0) + step.after"),
        wrong("a node outside is none", CROSSED, "variance), 1)", "variance), 0)"),
        wrong("the other wall", EXITS, "(share <= level", "(share > level"),
        wrong("absorbed with the chance to stay", EXITS, "step.uniform < touched",
              "step.uniform > touched"),
        wrong("the exit paid at the horizon", "ctrl.paths.at_exits", "[paths.ends]",
              "[0 * paths.ends - 1]"),
        wrong("terminal reward at the exit", "ctrl.paths.at_exits", "if reward is None or",
              "if True or"),
        wrong("rewards after the exit", "ctrl.paths.over_steps", "return while_running(",
              "return (lambda one, other: one)("),
        wrong("discount after the exit", "ctrl.paths.returns_to_go",
              "torch.where(runs[k], ahead, terminal)", "ahead"),
        wrong("V not pinned at the exit", "ctrl.value._pinned", "torch.where(ended &",
              "torch.where(False & ended &"),
        wrong("V pinned a node late", "ctrl.value._pinned", "(0, 1), value=True)",
              "(1, 0), value=False)"),
        wrong("dM after the exit", "ctrl.value.martingale_increments",
              "return while_running(dm, paths)", "return dm"),
        wrong("controls after the exit", "ctrl.girsanov.controls",
              "while_running(torch.stack(each, dim=1), stopped)", "torch.stack(each, dim=1)"),
        wrong("density of the wall for that of the step", "ctrl.transitions.proposals",
              "torch.where(stops, mean + std * unit, state)", "state"),
        wrong("a reflecting wall", "ctrl.markov_chain.MarkovChain.residual",
              "torch.where(self.absorbing, self.paid - v, inside)", "inside"),
        wrong("noise of a step without its half", "ctrl.markov_chain._rates",
              "covariance[..., i, i] / (2 * h * h)", "covariance[..., i, i] / (h * h)"),
        wrong("sign of the cost in q", "ctrl.q_learning.q_rate",
              "rate = rate + one_a_path", "rate = rate - one_a_path"),
    ],
)  # fmt: skip
def exit_problems(setting: Setting) -> Iterator[Check]:
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
