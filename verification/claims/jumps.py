"""Jumps: Merton's series under the generator, and Girsanov's theorem for intensities."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.stats import norm, poisson
from torch import Tensor

import ctrl
from ctrl.jumps import DiscreteMarks, ExponentialMarks, Jumps, NormalMarks
from verification.claim import (
    Check,
    Setting,
    claim,
    expectation,
    limit,
    pathwise,
    rounding,
    stated,
    wrong,
)
from verification.closed_form.jumps import LinearIntensity, Merton, count_cells, poisson_kl
from verification.cubature import mean

M, L = Merton(), LinearIntensity()
NOWHERE = ctrl.DeterministicPolicy(lambda t, x: torch.zeros_like(x))


def merton_sde() -> ctrl.ControlledSDE:
    """Log-price."""
    pull = M.rate - 0.5 * M.noise**2 - M.intensity * M.k
    jumps = Jumps(
        lambda t, x, a: torch.full_like(x[:, 0], M.intensity),
        lambda t, x, a, z: z,
        NormalMarks(M.mean, M.std, nodes=40),
    )
    return ctrl.ControlledSDE(
        lambda t, x, a: torch.full_like(x, pull), lambda t, x: M.noise, jumps=jumps
    )


def merton_value(t: Tensor, x: Tensor) -> Tensor:
    """Merton's series in torch, to be differentiated."""
    n = torch.arange(18.0, dtype=x.dtype)  # numbers of jumps
    to_go, grown = M.horizon - t, M.intensity * (1 + M.k) * (M.horizon - t)
    variance = M.noise**2 * to_go + n * M.std**2
    growth = (M.rate - M.intensity * M.k) * to_go + n * math.log(1 + M.k)
    root = variance.sqrt()
    d1 = (x - math.log(M.strike) + growth + 0.5 * variance) / root
    strike = M.strike * (-growth).exp()
    above, paid = (torch.erfc(-d * 0.5**0.5) / 2 for d in (d1, d1 - root))
    worth = x.exp() * above - strike * paid
    return worth @ (n * grown.log() - grown - torch.lgamma(n + 1)).exp()


def enumerated(setting: Setting, steps: int) -> tuple[ctrl.TimeGrid, ctrl.Noise]:
    """Every number of jumps of every step, with its probability under the chain of ``L``."""
    times = np.linspace(0, 0.8, steps + 1)
    tree = [(1.0, L.start, ())]  # probability, state, normals
    for h in np.diff(times):
        grown = []
        for weight, x, normals in tree:
            mass, middle = count_cells(h * (L.base + L.slope * x), 14 if steps < 4 else 6)
            after = x + h * L.pull * x
            grown += [
                (weight * p, after + n * L.size, (*normals, z))
                for n, (p, z) in enumerate(zip(mass, middle, strict=True))
            ]
        tree = grown
    jumps = setting.tensor([normals for _, _, normals in tree])[..., None]
    weight = setting.tensor([weight for weight, _, _ in tree])
    return ctrl.TimeGrid(setting.tensor(times)), ctrl.Noise(
        0 * jumps, weights=weight / weight.sum(), jumps=jumps
    )


def controlled(noise: float = 0.0) -> ctrl.ControlledSDE:
    """L's equation with noise, the action in its units, and added to the intensity."""
    jumps = Jumps(
        lambda t, x, a: L.base + L.slope * x[:, 0].clamp_min(0) + a[:, 0],
        lambda t, x, a, z: torch.full_like(x, L.size),
    )
    return ctrl.ControlledSDE(
        lambda t, x, a: L.pull * x + noise * a, lambda t, x: noise, jumps=jumps
    )


def rolled_out(setting: Setting, steps: int) -> ctrl.Paths:
    """L's chain with all its jumps."""
    grid, noise = enumerated(setting, steps)
    start = setting.tensor(L.start).expand(len(noise.increments), 1)
    return ctrl.simulate(ctrl.ControlProblem(controlled(), 1.0), NOWHERE, start, grid, noise=noise)


JUMPS, GIRSANOV = "ctrl.jumps", "ctrl.girsanov"


@claim(
    statement="""
        X jumps by sizes(t, X, a, z) at the rate intensity(t, X, a): L V gains intensity E_z[V(t, x
        + sizes) - V(t, x)], under which Merton's series for a call on e^X is a martingale with
        discount. A step draws the number of its jumps from Poisson's law with the intensity of its
        left end, exactly; means of functions of the path are of order 1 in the step.
        """,
    source="Merton 1976, J. Financial Economics 3; Oksendal & Sulem, Theorem 1.22",
    wrongs=[
        wrong("V(x + size) for the difference", f"{JUMPS}.Jumps.rate_of_change", " - here)", ")"),
        wrong(
            "intensity missing in the generator",
            f"{JUMPS}.Jumps.rate_of_change",
            "return rate * change",
            "return change",
        ),
        wrong("generator without jumps", "ctrl.value.generator", "in sde.jump_kinds", "in ()"),
        wrong(
            "variance for the std of marks",
            f"{JUMPS}.NormalMarks.rule",
            "self.std * points",
            "self.std**2 * points",
        ),
        wrong(
            "the same in the draws",
            f"{JUMPS}.NormalMarks.from_normals",
            "self.std * normals",
            "self.std**2 * normals",
        ),
        wrong(
            "rate for the mean of exponential marks",
            f"{JUMPS}.ExponentialMarks.from_normals",
            "-self.mean *",
            "-1 / self.mean *",
        ),
        wrong(
            "rate for the mean in their rule",
            f"{JUMPS}.ExponentialMarks.rule",
            "self.mean * points",
            "points / self.mean",
        ),
        wrong(
            "values equally likely",
            f"{JUMPS}.DiscreteMarks.rule",
            "np.array(self.probabilities)",
            "0 * np.array(self.probabilities) + 1 / 3",
        ),
        wrong(
            "Merton's intensity not that of the price's measure",
            "verification.claims.jumps.merton_value",
            "M.intensity * (1 + M.k) * (",
            "M.intensity * (",
        ),
        wrong(
            "marks by the lower tail",
            f"{JUMPS}.DiscreteMarks.from_normals",
            "ndtr(normals)",
            "ndtr(-normals)",
        ),
        wrong(
            "one jump a step at most",
            f"{JUMPS}.add_jumps",
            "while bool((",
            "while j < 1 and bool((",
        ),
        wrong(
            "intensity after the step",
            f"{JUMPS}.add_jumps",
            "kind.intensity_at(t, before, actions)",
            "kind.intensity_at(t, after, actions)",
        ),
        wrong("P(N > n) off by one", f"{JUMPS}.poisson_counts", "count + 1, ", "count + 2, "),
        wrong("intensity not times h", f"{JUMPS}.add_jumps", "expected = h *", "expected = 1.0 *"),
    ],
    why_double="V's residual in float32 is round-off of its second derivative",
)
def jump_diffusions(setting: Setting) -> Iterator[Check]:
    """The generator, the law of a step, and the order."""
    x = setting.tensor([[-0.4], [-0.1], [0.05], [0.2], [0.5]])
    sde = merton_sde()
    problem = ctrl.ControlProblem(sde, M.horizon, discount=M.rate)
    for t in (0.0, 0.4):
        value = merton_value(setting.tensor(t), x)
        want = M.call(np.exp(x.numpy()[:, 0]), M.horizon - t)
        yield pathwise(f"Merton's series at {t}", value, want)
        q = ctrl.q_learning.q_rate(problem, merton_value, setting.tensor(t), x, 0 * x)
        residual = pathwise(f"d_t V + L V - r V at {t}", q, 0 * q, M.intensity)
        yield stated(residual, units=rounding(18 * 40))

    few = setting.tensor([[-1.2], [-0.3], [0.4], [1.7]])
    for marks, want in (
        (NormalMarks(0.3, 0.7), 0.3 + 0.7 * few[:, 0].numpy()),
        (ExponentialMarks(0.7), -0.7 * norm.logsf(few[:, 0])),
        (DiscreteMarks((2.0, -1.0, 5.0), (0.2, 0.5, 0.3)), np.array([2.0, -1.0, -1.0, 5.0])),
    ):
        name = type(marks).__name__
        yield pathwise(f"{name}: quantiles", marks.from_normals(few)[:, 0], want)
        weights, points = marks.rule(few)
        got = [float((weights * points[:, 0] ** k).sum()) for k in (1, 2)]
        exact = {"NormalMarks": (0.3, 0.58), "ExponentialMarks": (0.7, 0.98)}
        yield expectation(f"{name}: moments", got, list(exact.get(name, (1.4, 8.8))))

    given = setting.tensor([norm.ppf(poisson.cdf(n - 1, 2.4) + 0.5 * poisson.pmf(n, 2.4))
                            for n in range(8)])  # fmt: skip
    counts = ctrl.jumps.poisson_counts(given, torch.full_like(given, 2.4))
    yield pathwise("numbers of jumps by their quantiles", counts, np.arange(8.0))

    errors = []
    for steps in (1, 2, 4):
        paths = rolled_out(setting, steps)
        got = mean(paths.states[:, -1, 0], paths)
        if steps < 4:
            want = L.chain_mean(paths.grid.nodes.numpy())
            yield expectation(f"mean of the chain, {steps} steps", got, want)
        errors.append(float(got) - L.mean(0.8))
    yield limit("order of the mean", math.log2(errors[1] / errors[2]), 1.0)


def towards(intensity: float) -> ctrl.DeterministicPolicy:
    """A policy that adds to the intensity."""
    return ctrl.DeterministicPolicy(lambda t, x: intensity * (1 + 0.5 * x.square()))


def chain_log_ratio(paths: ctrl.Paths, noise: float, extra: float, extra_ref: float) -> np.ndarray:
    """Of the transition laws: Gaussian times Poisson, by scipy."""
    assert paths.jumps is not None
    x, n = paths.states[..., 0].numpy(), paths.jumps.numpy()[..., 0]
    h = np.diff(paths.grid.nodes.numpy())
    before = x[:, :-1]
    continuous = x[:, 1:] - L.size * n
    total = np.zeros(len(x))
    for sign, more in ((1, extra), (-1, extra_ref)):
        a = more * (1 + 0.5 * before**2)
        middle = before + h * (L.pull * before + noise * a)
        each = norm.logpdf(continuous, middle, noise * np.sqrt(h))
        each = each + poisson.logpmf(n, h * (L.base + L.slope * np.maximum(before, 0) + a))
        total = total + sign * each.sum(1)
    return total


@claim(
    statement="""
        Where a policy moves the intensity l of jumps, and not their sizes, dP/dP_ref of a path has
        the factor prod (l / l_ref) over jumps times exp(-int (l - l_ref) dt), and the path KL the
        part E int (l log(l / l_ref) - l + l_ref) dt; of constant intensities it is that of Poisson
        laws. On every path the log-ratio is that of the scheme's transitions.
        """,
    source="Bremaud 1981, VI.2, VI.3; Jacod & Shiryaev, III.5",
    wrongs=[
        wrong("KL without its compensator", f"{JUMPS}.intensity_kl", " - rate + reference)", ")"),
        wrong(
            "KL the other way around",
            f"{JUMPS}.intensity_kl",
            "rate * ratio.log() - rate + reference",
            "reference - reference * (1 + ratio.log()) + rate - reference",
        ),
        wrong("KL of jumps missing", f"{GIRSANOV}.path_kl", "rates = rates + ", "_ = "),
        wrong(
            "log-ratio without its compensator",
            f"{JUMPS}.intensity_log_ratio",
            " - (rate - reference) * h",
            "",
        ),
        wrong(
            "sign of the compensator",
            f"{JUMPS}.intensity_log_ratio",
            "- (rate - reference) * h",
            "+ (rate - reference) * h",
        ),
        wrong(
            "log-ratio of jumps inverted",
            f"{JUMPS}.intensity_log_ratio",
            "counts * ratio.log()",
            "-counts * ratio.log()",
        ),
        wrong(
            "log-ratio of jumps missing",
            f"{GIRSANOV}.log_ratio",
            "paths.grid) + jumped",
            "paths.grid)",
        ),
        wrong(
            "both intensities at the policy's action",
            f"{GIRSANOV}.intensities",
            "kind.intensity_at(t, x, a_ref)",
            "kind.intensity_at(t, x, a)",
        ),
    ],
)
def girsanov_for_intensities(setting: Setting) -> Iterator[Check]:
    """Poisson laws, transitions, and mean 1 of the ratio."""
    grid = ctrl.TimeGrid(setting.tensor([0.0, 0.3, 0.8]))
    constant = ctrl.ControlledSDE(
        lambda t, x, a: 0 * x,
        lambda t, x: 1.0,
        jumps=Jumps(lambda t, x, a: a[:, 0], lambda t, x, a, z: torch.ones_like(x)),
    )
    one, other = (
        ctrl.DeterministicPolicy(lambda t, x, rate=rate: torch.full_like(x, rate))
        for rate in (1.7, 0.6)
    )
    still = ctrl.Paths(setting.tensor([[[0.0], [1.0], [1.0]]]), None, None, grid)
    kl = ctrl.girsanov.path_kl(constant, one, other, still)
    yield expectation("KL of Poisson processes", kl[0], poisson_kl(1.7, 0.6, 0.8))

    noise, extra, extra_ref = 0.5, 0.9, 0.2
    policy, reference = towards(extra), towards(extra_ref)
    sde = controlled(noise)
    problem = ctrl.ControlProblem(sde, 1.0)
    start = setting.tensor([0.4, 0.8, 1.1, 1.6]).repeat(16)[:, None]
    paths = ctrl.simulate(problem, policy, start, grid, generator=setting.generator("paths"))
    ratio = ctrl.girsanov.log_ratio(sde, policy, reference, paths)
    want = chain_log_ratio(paths, noise, extra, extra_ref)
    yield pathwise("log-ratio of the transitions", ratio, want)

    silent = controlled()
    paths = rolled_out(setting, 2)
    back = ctrl.girsanov.log_ratio(silent, NOWHERE, towards(0.4), paths)
    yield expectation("mean 1 of the ratio", mean((-back).exp(), paths), 1.0)
    kl = ctrl.girsanov.path_kl(silent, NOWHERE, towards(0.4), paths)
    yield expectation("KL is the mean of the log-ratio", mean(kl, paths), mean(back, paths))
