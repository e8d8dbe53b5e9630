"""Jump diffusions: the generator, the law of a step, and the order of the scheme.

X jumps by sizes(t, X, a, z) at the rate intensity(t, X, a): L V gains intensity E_z[V(t, x
+ sizes) - V(t, x)], under which Merton's series for a call on e^X is a martingale with
discount. A step draws the number of its jumps from Poisson's law with the intensity of its
left end, exactly; means of functions of the path are of order 1 in the step.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.stats import norm, poisson
from torch import Tensor

import ctrl
from ctrl.jumps import DiscreteMarks, ExponentialMarks, Jumps, NormalMarks
from verification.claim import Check, Setting, expectation, limit, pathwise, rounding, stated
from verification.cubature import mean
from verification.problems.jumps import L, M, rolled_out

SOURCE = "Merton 1976, J. Financial Economics 3; Oksendal & Sulem, Theorem 1.22"
WHY_DOUBLE = "V's residual in float32 is round-off of its second derivative"


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


def checks(setting: Setting) -> Iterator[Check]:
    """The marks, the law of a step and the order, and the generator."""
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

    errors = []
    for steps in (1, 2, 4):
        paths = rolled_out(setting, steps)
        got = mean(paths.states[:, -1, 0], paths)
        if steps < 4:
            want = L.chain_mean(paths.grid.nodes.numpy())
            yield expectation(f"mean of the chain, {steps} steps", got, want)
        errors.append(float(got) - L.mean(0.8))
    yield limit("order of the mean", math.log2(errors[1] / errors[2]), 1.0)


MISTAKES = """
ctrl.jumps.Jumps.rate_of_change
    V(x + size) for the difference | ` - here)` => )
    intensity missing in the generator | return rate * change => return change
ctrl.value.generator
    generator without jumps | in sde.jump_kinds => in ()
ctrl.jumps.NormalMarks.rule
    variance for the std of marks | self.std * points => self.std**2 * points
ctrl.jumps.NormalMarks.from_normals
    the same in the draws | self.std * normals => self.std**2 * normals
ctrl.jumps.ExponentialMarks.from_normals
    rate for the mean of exponential marks | -self.mean * => -1 / self.mean *
ctrl.jumps.ExponentialMarks.rule
    rate for the mean in their rule | self.mean * points => points / self.mean
ctrl.jumps.DiscreteMarks.rule
    values equally likely | np.array(self.probabilities) => 0 * np.array(self.probabilities) + 1 / 3
verification.claims.dynamics.jump_diffusions.merton_value
    Merton's intensity not that of the price's measure | M.intensity * (1 + M.k) * ( => M.intensity * (
ctrl.jumps.DiscreteMarks.from_normals
    marks by the lower tail | ndtr(normals) => ndtr(-normals)
ctrl.jumps.add_jumps
    one jump a step at most | while bool(( => while j < 1 and bool((
    intensity after the step | kind.intensity_at(t, before, actions) => kind.intensity_at(t, after, actions)
    intensity not times h | expected = h * => expected = 1.0 *
ctrl.jumps.poisson_counts
    P(N > n) off by one | `count + 1, ` => `count + 2, `
"""
