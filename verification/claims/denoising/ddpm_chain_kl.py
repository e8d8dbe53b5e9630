"""The KL of a sampler's chain: vanishing for Euler-Maruyama, not for DDPM.

The KL between the chain of DDPM (variance beta-tilde) and the exact reverse process on the
same grid does not vanish as steps shrink: KL(exact || DDPM) -> gamma / 2 = 0.28861 nats per
dimension, KL(DDPM || exact) -> (1 - gamma) / 2, gamma being Euler's constant. That of
Euler-Maruyama is O(1/N).

Near the data the exact reverse step has variance beta, DDPM's is beta-tilde, and j steps before the
end their ratio is (j - 1) / j however many steps there are. The logarithms add up to Euler's
constant: KL(exact || DDPM) -> gamma / 2 = 0.28861 per dimension of data with a density, and
KL(DDPM || exact) -> (1 - gamma) / 2 = 0.21139. So DDPM's path KL is no test of its convergence.
"""

from collections.abc import Iterator

import numpy as np

from diffusion_envs.exact import gaussian, linear_policy
from diffusion_envs.exact.gaussian import Affine
from diffusion_envs.exact.linear_policy import Steps
from diffusion_envs.samplers import DDIM
from verification.claim import Check, Setting, expectation, limit
from verification.closed_form import samplers as closed
from verification.closed_form.extrapolation import extrapolated
from verification.closed_form.gaussian_law import Normal
from verification.closed_form.vp_gaussian import VPGaussian
from verification.problems import gaussian_data, table, vp_linear

SOURCE = "by hand, from equations 6 and 7 of arXiv 2006.11239; data with a density"
WHY_DOUBLE = "KLs of ten thousand steps are sums of squares of differences near round-off"

DATA = Normal(np.array([0.8]), np.array([[0.5]]))
MODEL = VPGaussian(*DATA, 2.0, 2.0)
RISING = VPGaussian(*DATA, 0.4, 2.6)
TABLES = Setting()  # samplers' tables are in double precision on the CPU, whatever runs
FINE = (1000, 4000, 16000)


def numbers(step: Affine) -> closed.Chain:
    """A chain out of production code."""
    parts = (step.matrix[:, 0, 0], step.shift[:, 0], step.covariance[:, 0, 0])
    return closed.Chain(*(part.numpy() for part in parts))


def chains(count: int, model: VPGaussian = MODEL) -> dict[str, closed.Chain]:
    """Production's chains from s = 1 to s = 1 / count: DDPM's very last step has no density."""
    data, schedule = gaussian_data(TABLES, DATA), vp_linear(model)
    none = 0 * data.covariance, 0 * data.mean
    sampler = DDIM(1.0).bind(table(model, count), count - 1)
    s = sampler.noising_times
    euler = Steps.of_euler(schedule, s)
    return {
        "exact": numbers(gaussian.transition(data, schedule, s[:-1], s[1:])),
        "DDPM": numbers(linear_policy.chain(data, sampler.table, Steps.of(sampler), *none)),
        "Euler": numbers(linear_policy.chain(data, schedule, euler, *none)),
    }


def divergence(chain: closed.Chain, reference: closed.Chain, model: VPGaussian = MODEL) -> float:
    """KL(chain || reference) from the exact law of the start."""
    return chain.kl(reference, model.noised(1.0))


def without_logarithm(counts: tuple[int, ...], values: list[float]) -> float:
    """The limit of errors (a + b log N) / N, from three counts."""
    n = np.array(counts, dtype=np.float64)
    columns = np.stack([np.ones_like(n), 1 / n, np.log(n) / n], axis=1)
    return float(np.linalg.solve(columns, np.array(values))[0])


def checks(setting: Setting) -> Iterator[Check]:
    """Chain KLs by production's steps: against independent recursions, and in the limit."""
    for model, beta in ((MODEL, "constant"), (RISING, "rising")):
        s, start = np.arange(100, 0, -1) / 100, model.noised(1.0)
        laws, exact = chains(100, model), closed.exact_chain(model, s)
        for name, want in (
            ("DDPM", closed.ddpm_chain(model, s)),
            ("Euler", closed.euler_chain(model, s)),
        ):
            got = [
                divergence(laws["exact"], laws[name], model),
                divergence(laws[name], laws["exact"], model),
            ]
            answer = [exact.kl(want, start), want.kl(exact, start)]
            yield expectation(f"{name}, beta {beta}, 100 steps: both directions", got, answer)
    refined = [chains(count) for count in (100, 1000, 10_000)]
    published = [divergence(c["exact"], c["DDPM"]) for c in refined]
    yield limit("KL(exact || DDPM) as published", published, [0.23503, 0.27973, 0.28737])
    fine = {count: chains(count) for count in FINE}
    towards = [divergence(c["exact"], c["DDPM"]) for c in fine.values()]
    limit_kl = without_logarithm(FINE, towards)
    yield limit("KL(exact || DDPM), many steps", limit_kl, closed.EULER_GAMMA / 2)
    away = [divergence(c["DDPM"], c["exact"]) for c in fine.values()]
    yield limit(
        "KL(DDPM || exact), many steps", without_logarithm(FINE, away), (1 - closed.EULER_GAMMA) / 2
    )
    counts = (250, 500, 1000, 2000)
    euler = [chains(count) for count in counts]
    kls = [divergence(c["exact"], c["Euler"]) for c in euler]
    yield limit("Euler: order of its chain KL", float(np.log2(kls[-2] / kls[-1])), 1.0)
    vanishing = float(extrapolated(kls))
    yield limit("Euler: what its chain KL tends to", vanishing, 0.0, scale=closed.EULER_GAMMA / 2)


MISTAKES = """
diffusion_envs.samplers.BoundDDIM.std
    eta ignored: no noise | self.eta * self.sigma[1:] => 1e-3 * self.sigma[1:]
    beta for beta-tilde | `self.sigma[1:] / self.sigma[:-1] * ` => ``
    sigma exchanged in beta-tilde | self.sigma[1:] / self.sigma[:-1] * kept.sqrt() => (self.sigma[1:] * kept).sqrt()
    variance for standard deviation | kept.sqrt() => kept
    beta-tilde of the step before | -self.integrated_g2) => -self.integrated_g2.roll(1))
    variance 1 % too large | return self.eta => return 1.005 * self.eta
diffusion_envs.exact.gaussian.transition
    exact step: variance of the marginal | last - values.square() * first => last
diffusion_envs.exact.linear_policy.Steps.of_euler
    Euler: noise 1 % too large | eta * (g2 * h) => eta * (1.01 * g2 * h)
    Euler: drift halved | 0.5 * (1 + eta**2) * g2 * h => 0.5 * g2 * h
verification.claims.denoising.ddpm_chain_kl.divergence
    roles of the two laws exchanged | chain.kl(reference, model => reference.kl(chain, model
shared
    mean: noise not taken out of the direction
    score of the data's mean
    Euler: rates at the right end
"""
