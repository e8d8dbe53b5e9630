"""Formulas as symbols, one function a formula, for the proofs in ``claims.symbolic``.

Each is written twice, by two routes, and a proof shows that the two agree for all values of all
symbols. A proof is by ``remainder``: the difference is first evaluated to fifty digits at a point
of unequal rational numbers, which refutes a wrong identity and measures by how much; what is not
refuted must simplify to 0.
"""

import math

import sympy as sp

x, y, a, m, k, t, u, v, s = sp.symbols("x y a m k t u v s", real=True)
h, g, P, N, gam, b, T, S, sa = sp.symbols("h g P N gam b T S sa", positive=True)

_POINT = [
    sp.Rational(p, q)
    for p, q in zip((3, 5, 7, 11, 13, 17, 19, 23), (7, 11, 5, 13, 17, 11, 23, 19), strict=True)
]
_REFUTED = sp.Float("1e-30")


def remainder(difference: sp.Expr) -> float:
    """0 where an expression is proven to vanish, its size at a point where it does not.

    Raises:
        ArithmeticError: it vanishes at the point, but cannot be simplified to 0.
    """
    symbols = sorted(difference.free_symbols, key=str)
    point = {symbol: _POINT[i % 8] + i // 8 for i, symbol in enumerate(symbols)}
    value = sp.N(difference.subs(list(point.items())), 50)
    size = abs(sp.N(value, 50))
    if not size.is_number or size is sp.nan:
        return math.nan
    if size > _REFUTED:
        return float(size)
    if sp.simplify(difference) != 0:
        raise ArithmeticError(f"neither refuted nor proven: {difference}")
    return 0.0


def normal(z: sp.Expr, mean: sp.Expr, variance: sp.Expr) -> sp.Expr:
    """The density of N(mean, variance)."""
    return sp.exp(-((z - mean) ** 2) / (2 * variance)) / sp.sqrt(2 * sp.pi * variance)


def mean_of(value: sp.Expr, z: sp.Symbol, centre: sp.Expr, variance: sp.Expr) -> sp.Expr:
    """E value(Z) of Z ~ N(centre, variance), for a polynomial in Z: term by term by its moments."""
    e = sp.Dummy("e", real=True)
    polynomial = sp.Poly(sp.expand(value.subs(z, centre + e)), e)
    total = sp.Integer(0)
    for (power,), coefficient in polynomial.terms():
        if power % 2 == 0:
            total += coefficient * sp.factorial2(power - 1) * variance ** (power // 2)
    return total


# -- Girsanov ------------------------------------------------------------------------------------


def log_ratio(control: sp.Expr, increment: sp.Expr, step: sp.Expr) -> sp.Expr:
    """log dP/dP_ref of one Euler step: u dW + u^2 h / 2."""
    return control * increment + control**2 * step / 2


def transition_log_ratio(drift: sp.Expr, reference: sp.Expr, increment: sp.Expr) -> sp.Expr:
    """The same from the step's two Gaussian densities, noise g, step h."""
    after = x + drift * h + g * increment
    own, other = x + drift * h, x + reference * h
    return ((after - other) ** 2 - (after - own) ** 2) / (2 * g**2 * h)


# -- Ornstein-Uhlenbeck --------------------------------------------------------------------------


def ou_mean(time: sp.Expr) -> sp.Expr:
    """E X_t of dX = (y - N X) dt + g dW from N(m, P)."""
    return y / N + (m - y / N) * sp.exp(-N * time)


def ou_variance(time: sp.Expr) -> sp.Expr:
    """Var X_t of the same."""
    limit = g**2 / (2 * N)
    return limit + (P - limit) * sp.exp(-2 * N * time)


def ou_path_kl(time: sp.Expr) -> sp.Expr:
    """Its path KL from dX = g dW over [0, t] (the reference: no pull, no shift)."""
    limit, centre = g**2 / (2 * N), y / N
    e1, e2 = (1 - sp.exp(-N * time)) / N, (1 - sp.exp(-2 * N * time)) / (2 * N)
    first = centre * time + (m - centre) * e1
    second = centre**2 * time + 2 * centre * (m - centre) * e1 + (m - centre) ** 2 * e2
    variance_integral = limit * time + (P - limit) * e2
    return (N**2 * (variance_integral + second) - 2 * N * y * first + y**2 * time) / (2 * g**2)


def ou_kl_rate(time: sp.Expr) -> sp.Expr:
    """E |u|^2 / 2 at a time: what the path KL grows by."""
    drift_mean, drift_variance = y - N * ou_mean(time), N**2 * ou_variance(time)
    return (drift_mean**2 + drift_variance) / (2 * g**2)


# -- Fokker-Planck -------------------------------------------------------------------------------


def fokker_planck(density: sp.Expr, drift: sp.Expr, variance: sp.Expr) -> sp.Expr:
    """d_t p + d_x (drift p) - variance / 2 d_xx p: 0 for the law of the SDE; time t."""
    return sp.diff(density, t) + sp.diff(drift * density, x) - variance / 2 * sp.diff(density, x, 2)


def noised(signal: sp.Expr) -> sp.Expr:
    """The density of N(alpha m, alpha^2 S + 1 - alpha^2): data N(m, S), noised."""
    return normal(x, signal * m, signal**2 * S + 1 - signal**2)


def generation_drift(score: sp.Expr, rate: sp.Expr, eta: sp.Expr) -> sp.Expr:
    """beta x / 2 + (1 + eta^2) / 2 beta score: the eta family of generation SDEs."""
    return rate * x / 2 + (1 + eta**2) / 2 * rate * score


def tweedie(signal: sp.Expr) -> sp.Expr:
    """E[Y_0 | Y_s = x] = (x + sigma_s^2 score) / alpha_s."""
    score = sp.diff(sp.log(noised(signal)), x)
    return (x + (1 - signal**2) * score) / signal


def posterior_mean(signal: sp.Expr) -> sp.Expr:
    """The same by Bayes' rule for Gaussians."""
    gain = signal * S / (signal**2 * S + 1 - signal**2)
    return m + gain * (x - signal * m)


# -- Hamilton-Jacobi-Bellman ---------------------------------------------------------------------


def hamiltonian(slope: sp.Expr, curvature: sp.Expr, action: sp.Expr) -> sp.Expr:
    """H of dX = (y X + u a) dt + g dW and reward -(s X^2 + N a^2) / 2."""
    drift = y * x + u * action
    return drift * slope + g**2 / 2 * curvature - (s * x**2 + N * action**2) / 2


def soft_maximum(slope: sp.Expr, curvature: sp.Expr) -> sp.Expr:
    """gam log int exp(H / gam) da = max_a H + gam / 2 log(2 pi gam / N)."""
    best = u * slope / N
    return hamiltonian(slope, curvature, best) + gam / 2 * sp.log(2 * sp.pi * gam / N)


def soft_maximum_by_integration(slope: sp.Expr, curvature: sp.Expr) -> sp.Expr:
    """The same integral: a Gaussian in a, by completing the square in its coefficients."""
    c2, c1, c0 = sp.Poly(sp.expand(hamiltonian(slope, curvature, a)), a).all_coeffs()
    exponent = (c0 - c1**2 / (4 * c2)) / gam
    return gam * (exponent + sp.log(sp.pi * gam / -c2) / 2)


def gibbs(slope: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    """Mean and variance of pi*: u V_x / N and gam / N."""
    return u * slope / N, gam / N


def riccati(p: sp.Expr) -> sp.Expr:
    """p' of V = -p x^2 / 2 + c, optimal: -2 y p + u^2 p^2 / N - s."""
    return -2 * y * p + u**2 * p**2 / N - s


def lq_constant_rate(p: sp.Expr) -> sp.Expr:
    """c' of the same: g^2 p / 2 - gam / 2 log(2 pi gam / N)."""
    return g**2 * p / 2 - gam / 2 * sp.log(2 * sp.pi * gam / N)


def hjb_of_lq(p: sp.Expr) -> sp.Expr:
    """d_t V + gam log int exp(H / gam) da for V = -p x^2 / 2 + c: 0 at the optimum."""
    value_t = -riccati(p) * x**2 / 2 + lq_constant_rate(p)
    return value_t + soft_maximum(-p * x, -p)


def cole_hopf_value(mean: sp.Expr, variance: sp.Expr, curvature: sp.Expr) -> sp.Expr:
    """b log E exp(r(X_T) / b) of r = -curvature x^2 / 2, X_T ~ N(mean, variance)."""
    lam = curvature / b
    return b * (-sp.log(1 + variance * lam) / 2 - lam * mean**2 / (2 * (1 + variance * lam)))


def cole_hopf_residual(mean: sp.Expr, variance: sp.Expr, curvature: sp.Expr) -> sp.Expr:
    """d_t V + g^2 / 2 V_xx + g^2 / (2 b) V_x^2: 0 where V is the optimal value."""
    V = cole_hopf_value(mean, variance, curvature)
    return sp.diff(V, t) + g**2 / 2 * sp.diff(V, x, 2) + g**2 / (2 * b) * sp.diff(V, x) ** 2


# -- policy gradient -----------------------------------------------------------------------------


def score_of_mean(action: sp.Expr, mean: sp.Expr, variance: sp.Expr) -> sp.Expr:
    """d log N(a; mean, variance) / d mean."""
    return (action - mean) / variance


def q_rate(action: sp.Expr) -> sp.Expr:
    """q with a terminal reward only: g^2 V_x (a - mean), V_x = v."""
    return g**2 * v * (action - m)


def gradient_by_q(variance: sp.Expr) -> sp.Expr:
    """E[ d log pi q ] for a drawn action."""
    return mean_of(score_of_mean(a, m, variance) * q_rate(a), a, m, variance)


def gradient_pathwise() -> sp.Expr:
    """The same without any exploration: g^2 d mean V_x."""
    return g**2 * v


# -- calculus ------------------------------------------------------------------------------------


def ito_correction(diffusion: sp.Expr) -> sp.Expr:
    """Stratonovich drift minus Ito drift: - sigma sigma' / 2."""
    return -diffusion * sp.diff(diffusion, x) / 2


def heun_mean(drift: sp.Expr, diffusion: sp.Expr) -> sp.Expr:
    """E of one Heun step minus x, to first order in h, by expanding in the increment."""
    e = sp.Symbol("e", real=True)
    slope = sp.diff(diffusion, x)
    predicted = diffusion + slope * diffusion * e  # + higher orders, of mean O(h^2)
    change = drift * h + (diffusion + predicted) / 2 * e
    return mean_of(change, e, sp.Integer(0), h)


# -- flow matching -------------------------------------------------------------------------------


def score_from_velocity(velocity: sp.Expr, time: sp.Expr) -> sp.Expr:
    """score = -(x + (1 - t) v) / t of X_t = (1 - t) X_0 + t eps (0 data, 1 noise)."""
    return -(x + (1 - time) * velocity) / time


def velocity(time: sp.Expr) -> sp.Expr:
    """E[eps - X_0 | X_t = x] for X_0 ~ N(m, S), by regression."""
    variance = (1 - time) ** 2 * S + time**2
    covariance = time - (1 - time) * S
    return -m + covariance / variance * (x - (1 - time) * m)


def flow_score(time: sp.Expr) -> sp.Expr:
    """The score of X_t, from its density."""
    return sp.diff(sp.log(normal(x, (1 - time) * m, (1 - time) ** 2 * S + time**2)), x)
