"""Proofs with symbols: the identities hold for all values, not only where they were measured.

The formulas are those of ``verification.symbolic``; mistakes are planted there. What these prove is
the mathematics behind the other claims and behind ``closed_form``: a wrong formula in the
documentation would be wrong here, whatever the code does.
"""

from collections.abc import Iterator

import sympy as sp

from verification import symbolic as f
from verification.claim import Check, Setting, claim, proof, wrong

SYMBOLS = "symbols have no precision"
HERE = "verification.symbolic."


@claim(
    statement="""
        One Euler step: log of the ratio of the two Gaussian transition densities
        = u dW + u^2 h / 2 with u = (b - b_ref) / g, for every dW; its mean under P is u^2 h / 2.
        """,
    source='Karatzas & Shreve 3.5; "Score as Action", arXiv 2502.01819, Theorem 3.1',
    wrongs=[
        wrong("factor 1/2 dropped", HERE + "log_ratio", "step / 2", "step"),
        wrong("sign of the quadratic term", HERE + "log_ratio", "increment +", "increment -"),
        wrong(
            "sign of the stochastic integral",
            HERE + "log_ratio",
            "return control",
            "return -control",
        ),
        wrong("diffusion not squared", HERE + "transition_log_ratio", "g**2 * h", "g * h"),
    ],
    why_double=SYMBOLS,
)
def proof_of_girsanov(setting: Setting) -> Iterator[Check]:
    """Girsanov's density, step by step."""
    increment, drift, reference = sp.symbols("dW drift reference", real=True)
    ratio = f.log_ratio((drift - reference) / f.g, increment, f.h)
    densities = f.transition_log_ratio(drift, reference, increment)
    yield proof("log-ratio - difference of the log-densities", f.remainder(ratio - densities))
    average = f.mean_of(ratio, increment, sp.Integer(0), f.h)
    energy = ((drift - reference) / f.g) ** 2 * f.h / 2
    yield proof("its mean - u^2 h / 2", f.remainder(average - energy))


@claim(
    statement="""
        Ornstein-Uhlenbeck: m' = y - N m and P' = g^2 - 2 N P are solved by the closed forms, and
        the path KL's closed form grows by E|u|^2 / 2 and starts at 0.
        """,
    source="Karatzas & Shreve 5.6 (linear equations), 3.5 (Girsanov)",
    wrongs=[
        wrong("mean decays twice as fast", HERE + "ou_mean", "exp(-N", "exp(-2 * N"),
        wrong("variance decays like the mean", HERE + "ou_variance", "-2 * N", "-N"),
        wrong("stationary variance g^2 / N", HERE + "ou_variance", "(2 * N)", "N"),
        wrong("cross term once", HERE + "ou_path_kl", "- 2 * N * y * first", "- N * y * first"),
        wrong(
            "elapsed time off by one",
            HERE + "ou_path_kl",
            "y**2 * time)",
            "y**2 * (time - 1))",
        ),
        wrong(
            "spread of the start left out", HERE + "ou_path_kl", "(P - limit) * e2", "-limit * e2"
        ),
        wrong("factor 1/2 dropped", HERE + "ou_path_kl", "/ (2 * g**2)", "/ g**2"),
        wrong("diffusion not squared", HERE + "ou_kl_rate", "2 * g**2", "2 * g"),
    ],
    why_double=SYMBOLS,
)
def proof_of_the_ornstein_uhlenbeck_kl(setting: Setting) -> Iterator[Check]:
    """The closed forms of Ornstein-Uhlenbeck laws solve their own equations."""
    mean, variance = f.ou_mean(f.t), f.ou_variance(f.t)
    yield proof("m' - (y - N m)", f.remainder(sp.diff(mean, f.t) - (f.y - f.N * mean)))
    rate = f.g**2 - 2 * f.N * variance
    yield proof("P' - (g^2 - 2 N P)", f.remainder(sp.diff(variance, f.t) - rate))
    grown = sp.diff(f.ou_path_kl(f.t), f.t) - f.ou_kl_rate(f.t)
    yield proof("d KL / dt - E|u|^2 / 2", f.remainder(grown))
    yield proof("KL over no time", f.remainder(f.ou_path_kl(sp.Integer(0))))


@claim(
    statement="""
        Time reversal: with the exact score, dX = [beta x / 2 + (1 + eta^2) / 2 beta score] dt
        + eta sqrt(beta) dW has the noised laws N(alpha m, alpha^2 S + 1 - alpha^2) as marginals,
        for every eta: eta = 1 is the reverse SDE, eta = 0 the probability-flow ODE.
        """,
    source="Anderson 1982; Song et al. 2021, section 4; Zhang & Chen 2022, 2204.13902",
    wrongs=[
        wrong(
            "score weight 1 for (1 + eta^2) / 2",
            HERE + "generation_drift",
            "(1 + eta**2) / 2 * ",
            "",
        ),
        wrong(
            "probability-flow factor 1/2 dropped",
            HERE + "generation_drift",
            "(1 + eta**2) / 2",
            "(1 + eta**2)",
        ),
        wrong("sign of the score", HERE + "generation_drift", "+ (1 +", "- (1 +"),
        wrong("sign of the drift", HERE + "generation_drift", "return rate", "return -rate"),
        wrong("alpha for alpha^2 in the variance", HERE + "noised", "signal**2 * S", "signal * S"),
        wrong("diffusion term not halved", HERE + "fokker_planck", "- variance / 2", "- variance"),
    ],
    why_double=SYMBOLS,
)
def proof_of_time_reversal(setting: Setting) -> Iterator[Check]:
    """The Fokker-Planck equation of the generation SDE is solved by the noised laws."""
    rate, eta = sp.symbols("beta eta", positive=True)
    density = f.noised(sp.exp(-rate * (f.T - f.t) / 2))  # constant beta, noising time T - t
    score = sp.diff(sp.log(density), f.x)
    drift = f.generation_drift(score, rate, eta)
    left = f.fokker_planck(density, drift, eta**2 * rate) / density
    yield proof("Fokker-Planck residual, every eta", f.remainder(left))
    flow = f.fokker_planck(density, f.generation_drift(score, rate, sp.Integer(0)), sp.Integer(0))
    yield proof("continuity equation of the ODE", f.remainder(flow / density))


@claim(
    statement="""
        Tweedie: E[Y_0 | Y_s = x] = (x + sigma_s^2 score(x)) / alpha_s, which for data N(m, S) is
        m + alpha S / (alpha^2 S + sigma^2) (x - alpha m); and its derivative in x is
        Var(Y_0 | x) alpha / sigma^2, with Var(Y_0 | x) = sigma^2 S / (alpha^2 S + sigma^2).
        """,
    source="Robbins 1956; Efron 2011; Bayes' rule for Gaussians",
    wrongs=[
        wrong(
            "sigma for sigma^2",
            HERE + "tweedie",
            "(1 - signal**2) * score",
            "sp.sqrt(1 - signal**2) * score",
        ),
        wrong("alpha^2 for alpha", HERE + "tweedie", "/ signal", "/ signal**2"),
        wrong("sign of the score", HERE + "tweedie", "(x + ", "(x - "),
        wrong("gain S / variance", HERE + "posterior_mean", "signal * S /", "S /"),
        wrong("mean not scaled", HERE + "posterior_mean", "(x - signal * m)", "(x - m)"),
    ],
    why_double=SYMBOLS,
)
def proof_of_tweedie(setting: Setting) -> Iterator[Check]:
    """Tweedie's formula against Bayes' rule."""
    alpha = sp.Symbol("alpha", positive=True)
    formula = f.tweedie(alpha)
    yield proof("Tweedie - Bayes", f.remainder(formula - f.posterior_mean(alpha)))
    noise = 1 - alpha**2
    posterior_variance = noise * f.S / (alpha**2 * f.S + noise)
    left = sp.diff(formula, f.x) - posterior_variance * alpha / noise
    yield proof("its derivative - Var alpha / sigma^2", f.remainder(left))


@claim(
    statement="""
        Soft maximum: gam log int exp(H / gam) da = max_a H + gam / 2 log(2 pi gam / N) for
        H concave in a; pi* = N(u V_x / N, gam / N) attains it. V = -p x^2 / 2 + c solves the HJB
        equation if and only if p and c solve
        p' = -2 y p + u^2 p^2 / N - s and c' = g^2 p / 2 - gam / 2 log(2 pi gam / N).
        """,
    source="Wang, Zariphopoulou & Zhou 2020, sections 3, 4; Jia & Zhou 2022b",
    wrongs=[
        wrong(
            "an e too many: log(2 pi e gam / N)",
            HERE + "soft_maximum",
            "2 * sp.pi * gam / N",
            "2 * sp.pi * sp.E * gam / N",
        ),
        wrong("soft minimum", HERE + "soft_maximum", "best) +", "best) -"),
        wrong("N / gam for gam / N", HERE + "gibbs", "gam / N", "N / gam"),
        wrong("mean halved", HERE + "gibbs", "u * slope / N", "u * slope / (2 * N)"),
        wrong("second-order term not halved", HERE + "hamiltonian", "g**2 / 2", "g**2"),
        wrong("diffusion not squared", HERE + "hamiltonian", "g**2 / 2", "g / 2"),
        wrong("Riccati: A for 2 A", HERE + "riccati", "-2 * y * p", "-y * p"),
        wrong("Riccati: sign of the state cost", HERE + "riccati", "/ N - s", "/ N + s"),
        wrong(
            "log-partition left out",
            HERE + "lq_constant_rate",
            "- gam / 2 * sp.log(2 * sp.pi * gam / N)",
            "",
        ),
    ],
    why_double=SYMBOLS,
)
def proof_of_the_exploratory_riccati_equation(setting: Setting) -> Iterator[Check]:
    """Gibbs policies, the soft maximum, and the HJB equation of exploratory LQ."""
    slope, curvature, p = sp.symbols("slope curvature p", real=True)
    soft = f.soft_maximum(slope, curvature)
    left = soft - f.soft_maximum_by_integration(slope, curvature)
    yield proof("soft maximum - the Gaussian integral", f.remainder(left))
    mean, variance = f.gibbs(slope)
    averaged = f.mean_of(f.hamiltonian(slope, curvature, f.a), f.a, mean, variance)
    entropy = sp.log(2 * sp.pi * sp.E * variance) / 2
    left = averaged + f.gam * entropy - soft
    yield proof("E_pi*[H - gam log pi*] - soft maximum", f.remainder(left))
    hessian = sp.Symbol("V_xx", real=True)
    by_hand = f.y * f.x * slope + f.u * f.a * slope + f.g**2 * hessian / 2
    by_hand -= (f.s * f.x**2 + f.N * f.a**2) / 2
    left = f.hamiltonian(slope, hessian, f.a) - by_hand
    yield proof("the Hamiltonian, written out", f.remainder(left))
    yield proof("HJB residual of the quadratic value", f.remainder(sp.expand(f.hjb_of_lq(p))))


@claim(
    statement="""
        Cole-Hopf: V = b log E exp(r(X_T) / b) solves d_t V + g^2 / 2 V_xx + g^2 / (2 b) V_x^2 = 0,
        here for r = -c x^2 / 2 and Brownian motion from X_t = x. Temperature b outside the
        logarithm and 1 / b inside.
        """,
    source="Fleming & Soner, chapter VI; Dai Pra 1991",
    wrongs=[
        wrong("b for 1 / b", HERE + "cole_hopf_value", "curvature / b", "curvature * b"),
        wrong("outer b dropped", HERE + "cole_hopf_value", "return b * (", "return ("),
        wrong(
            "log-determinant left out",
            HERE + "cole_hopf_value",
            "-sp.log(1 + variance * lam) / 2 - lam",
            "-lam",
        ),
        wrong("control term not halved", HERE + "cole_hopf_residual", "g**2 / (2 * b)", "g**2 / b"),
        wrong(
            "diffusion term not halved",
            HERE + "cole_hopf_residual",
            "g**2 / 2 * sp.diff(V, x, 2)",
            "g**2 * sp.diff(V, x, 2)",
        ),
    ],
    why_double=SYMBOLS,
)
def proof_of_cole_hopf(setting: Setting) -> Iterator[Check]:
    """The value of KL-regularised control is a logarithmic expectation."""
    curvature = sp.Symbol("c", positive=True)
    left = f.cole_hopf_residual(f.x, f.g**2 * (f.T - f.t), curvature)
    yield proof("HJB residual", f.remainder(left))
    ending = f.cole_hopf_value(f.x, sp.Integer(0), curvature) + curvature * f.x**2 / 2
    yield proof("V(T, x) - r(x)", f.remainder(ending))


@claim(
    statement="""
        Policy gradient with a terminal reward: q = g^2 V_x (a - mean) gives
        E[d log pi / d mean q] = g^2 V_x, whatever the exploration's variance, and a baseline that
        does not see the action adds nothing; the gradient in the variance is 0.
        """,
    source='"Score as Action", arXiv 2502.01819, Theorem 4.1; Jia & Zhou 2022b, Theorem 2',
    wrongs=[
        wrong(
            "score over std for over variance",
            HERE + "score_of_mean",
            "/ variance",
            "/ sp.sqrt(variance)",
        ),
        wrong("sign of the score", HERE + "score_of_mean", "(action - mean)", "(mean - action)"),
        wrong("g for g^2 in q", HERE + "q_rate", "g**2", "g"),
        wrong("q not centred", HERE + "q_rate", "(action - m)", "(action - m) ** 2"),
    ],
    why_double=SYMBOLS,
)
def proof_of_the_policy_gradient(setting: Setting) -> Iterator[Check]:
    """The likelihood-ratio form and the pathwise form are one."""
    variance = f.sa**2
    left = f.gradient_by_q(variance) - f.gradient_pathwise()
    yield proof("E[d log pi q] - g^2 V_x", f.remainder(left))
    score = ((f.a - f.m) ** 2 / variance - 1) / (2 * variance)  # d log pi / d variance
    scale = f.mean_of(score * f.q_rate(f.a), f.a, f.m, variance)
    yield proof("gradient in the variance", f.remainder(scale))
    baseline = f.mean_of(f.score_of_mean(f.a, f.m, variance) * f.v, f.a, f.m, variance)
    again = f.gradient_by_q(variance) - baseline - f.gradient_pathwise()
    yield proof("the same with a baseline", f.remainder(again))


@claim(
    statement="""
        Ito to Stratonovich: dX = b dt + sigma dW is dX = (b - sigma sigma' / 2) dt + sigma o dW:
        a Heun step with that drift has the mean b h of the Ito equation, to first order in h.
        """,
    source="Kloeden & Platen, Numerical Solution of SDEs, 4.9",
    wrongs=[
        wrong(
            "correction left out",
            HERE + "ito_correction",
            "return -diffusion",
            "return 0 * diffusion",
        ),
        wrong(
            "sign of the correction",
            HERE + "ito_correction",
            "return -diffusion",
            "return diffusion",
        ),
        wrong("without 1/2", HERE + "ito_correction", " / 2", " / 1"),
        wrong("sigma' for sigma sigma'", HERE + "ito_correction", "-diffusion * sp", "-sp"),
        wrong(
            "predictor left out",
            HERE + "heun_mean",
            "diffusion + slope * diffusion * e",
            "diffusion + 0 * e",
        ),
    ],
    why_double=SYMBOLS,
)
def proof_of_the_ito_correction(setting: Setting) -> Iterator[Check]:
    """The correction is what Heun's predictor adds."""
    drift, diffusion = sp.Function("b_")(f.x), sp.Function("sigma")(f.x)
    sample = {drift: sp.sin(f.x) - f.y * f.x, diffusion: f.g + sp.cos(f.x) / 3}
    converted = drift + f.ito_correction(diffusion)
    left = (f.heun_mean(converted, diffusion) - drift * f.h).subs(sample).doit()
    yield proof("mean of a Heun step - b h", f.remainder(sp.expand(left)))


@claim(
    statement="""
        Flow matching, X_t = (1 - t) X_0 + t eps: score = -(x + (1 - t) v) / t with
        v = E[eps - X_0 | X_t = x]; the velocity's shift is -(t / (1 - t)) times the score's shift.
        """,
    source="Lipman et al. 2023, arXiv 2210.02747; arXiv 2605.10759 (0 is data, 1 is noise)",
    wrongs=[
        wrong("t for 1 - t", HERE + "score_from_velocity", "(1 - time)", "time"),
        wrong("sign of the velocity", HERE + "score_from_velocity", "x + (1", "x - (1"),
        wrong("divided by t^2", HERE + "score_from_velocity", "/ time", "/ time**2"),
        wrong(
            "covariance's sign", HERE + "velocity", "time - (1 - time) * S", "time + (1 - time) * S"
        ),
    ],
    why_double=SYMBOLS,
)
def proof_of_the_velocity_and_the_score(setting: Setting) -> Iterator[Check]:
    """Velocities and scores determine each other."""
    time = sp.Symbol("tau", positive=True)
    score = f.score_from_velocity(f.velocity(time), time)
    yield proof("from the velocity - from the density", f.remainder(score - f.flow_score(time)))
    other = f.flow_score(time).subs({f.m: f.k, f.S: f.P})
    shift = f.velocity(time).subs({f.m: f.k, f.S: f.P}) - f.velocity(time)
    left = shift + time / (1 - time) * (other - f.flow_score(time))
    yield proof("shift of v + t / (1 - t) shift of the score", f.remainder(left))
