"""Policy iteration with entropy: Newton's method, and what its rate of convergence is.

Evaluate a policy, take the Gibbs policy of its q-rate, again. On a linear-quadratic problem this is
Newton's method on the Riccati equation, step by step and to round-off (Kleinman 1968), so it is
monotone and quadratic, and its constants do not know the temperature. In general

    V* - V^{n+1} = (rho - L^{pi_n})^{-1} gam KL(pi_n || pi*) <= osc_a(L^a(V* - V^n))^2 / (8 gam rho)

so that it is geometric with any ratio once near enough (Tang & Zhou 2024), where "near" shrinks
with the temperature. What blows up as gam -> 0 is this constant, not the iteration.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import agents, bellman
from ctrl.action_grid import gauss_legendre
from ctrl.linear import LinearGaussian, LinearQuadratic
from ctrl.markov_chain import MarkovChain, markov_chain
from ctrl.state_grid import Axis
from verification.claim import Check, Setting, bound, claim, expectation, limit, pathwise, wrong
from verification.claims.lq import WHY_DOUBLE, X, flat, numbers, production, published, scalar
from verification.closed_form import lq as exact_lq
from verification.closed_form import policy_iteration as exact

ITERATIONS = 5
VALUE, GREEDY = "ctrl.linear.lq.value_rate", "ctrl.linear.lq.greedy"


@dataclass(frozen=True, eq=False)
class LawPolicy:
    """A linear-Gaussian law as a policy that still knows its law."""

    law: LinearGaussian
    is_random: bool = True

    def mean(self, t: Tensor, states: Tensor) -> Tensor:
        """K x + k."""
        return self.law.mean(states)

    def act(
        self, mean: Tensor, t: Tensor, noise: Tensor | None, states: Tensor | None = None
    ) -> Tensor:
        """Draw actions like the law's own policy."""
        return self.law.policy().act(mean, t, noise)


def iterates(lq: LinearQuadratic, iterations: int) -> list[ctrl.linear.Stationary]:
    """Values of the policies that policy iteration goes through, from an arbitrary one."""
    values = list[ctrl.linear.Stationary]()
    law = LinearGaussian(0 * lq.R - 0.1, 0 * lq.l + 0.2, lq.N)

    def evaluate(policy: ctrl.Policy) -> ctrl.Value:
        assert isinstance(policy, LawPolicy)
        values.append(ctrl.linear.evaluate_lq_discounted(lq, policy.law))
        return values[-1].value

    def improve(value: ctrl.Value) -> ctrl.Policy:
        return LawPolicy(ctrl.linear.improve_lq(lq, values[-1].quadratic))

    for _ in agents.policy_iteration(LawPolicy(law), evaluate, improve, iterations):
        pass
    return values


@claim(
    statement="""
        Linear-quadratic problems: V^{n+1}, the value of the Gibbs policy of V^n, is Newton's step
        from V^n on the Riccati equation F(S, e, c) = 0, to round-off. So V^n <= V^{n+1}, and the
        error of S obeys e_{n+1} / e_n^2 -> F''/(2 F'), whatever the temperature.
        """,
    source="Kleinman 1968; Wang & Zhou 2020, Theorem 4; Tang & Zhou 2024, section 4",
    wrongs=[
        wrong(
            "one step of improvement only half way",
            GREEDY,
            "LinearGaussian(gains[..., :-1],",
            "LinearGaussian(0.5 * gains[..., :-1],",
        ),
        wrong("inverse of the temperature", GREEDY, "covariance = temp", "covariance = 1 / temp"),
        wrong(
            "improvement blind to the noise of the action",
            GREEDY,
            "(curvature(lq, S))",
            "(lq.N)",
        ),
        wrong("improvement blind to the mixed cost", GREEDY, ".sum(-3) - lq.R", ".sum(-3)"),
        wrong(
            "worse actions taken for better ones",
            GREEDY,
            "return LinearGaussian(gains[..., :-1], gains[..., -1],",
            "return LinearGaussian(gains[..., :-1], -gains[..., -1],",
        ),
        wrong(
            "gain that shrinks with the temperature",
            GREEDY,
            "LinearGaussian(gains[..., :-1],",
            "LinearGaussian(gains[..., :-1] / (1 + temperature[..., None, None]),",
        ),
        wrong("price of drawing missing", VALUE, "constant - drawn + _ent", "constant + _ent"),
        wrong("sign of the entropy", VALUE, "- drawn + _entropy", "- drawn - _entropy"),
        wrong(
            "evaluation stops at the old policy",
            "ctrl.agents.policy_iteration.policy_iteration",
            "policy = improve(value)",
            "improve(value)",
        ),
        wrong(
            "discount missing in the evaluation",
            "ctrl.linear.riccati._closed_loop",
            "kept = lq.A - 0.5 * ",
            "kept = lq.A - 0 * ",
        ),
    ],
    why_double=WHY_DOUBLE,
)
def policy_iteration_is_newtons_method(setting: Setting) -> Iterator[Check]:
    """Every step against Newton's, in several dimensions; the constant in one."""
    lq = replace(exact_lq.example(), discount=1.3)
    solutions = iterates(production(lq, setting), ITERATIONS)
    rows = [flat(each.quadratic) for each in solutions]
    newton = np.stack([exact.newton(lq, row.cpu().numpy()) for row in rows[:-1]])
    yield pathwise("each step is Newton's", torch.stack(rows[1:]), newton)
    x = torch.as_tensor(X, device=setting.device)
    values = torch.stack([each.quadratic(x) for each in solutions])
    yield bound("no step makes the policy worse", values[:-1], values[1:])
    p = exact_lq.DISCOUNTED
    steps = iterates(scalar(p, setting), 6)
    yield expectation(
        "the end of the iteration: value and rate", numbers(steps[-1])[:3], published(p)[:3]
    )
    best = exact_lq.solve_scalar(p).k2
    error = [float(each.quadratic.hessian) - best for each in steps]
    name = "e_{n+1} / e_n^2, as the error vanishes"
    yield limit(name, error[3] / error[2] ** 2, exact.scalar_constant(p))
    hot = iterates(scalar(replace(p, temperature=7 * p.temperature), setting), 4)
    both = [float(each.quadratic.hessian) for each in hot]
    cold = [float(each.quadratic.hessian) for each in steps[:4]]
    yield pathwise("the errors of S do not know the temperature", both, cold)


def circle(p: exact.Circle) -> tuple[MarkovChain, Tensor]:
    """Production's chain on the circle, and the weights of its actions."""
    problem = ctrl.ControlProblem(
        ctrl.ControlledSDE(
            lambda t, x, a: p.c * x.cos() + a * (1 + p.s * x.sin()), lambda t, x: p.noise
        ),
        math.inf,
        lambda t, x, a: (p.u * x.cos() + p.w * (2 * x).sin() - p.price * a.square()).squeeze(1),
        discount=p.discount,
        temperature=p.temperature,
    )
    actions = gauss_legendre(-p.most, p.most, p.actions)
    axes = (Axis(-math.pi, math.pi, p.points, "periodic"),)
    return markov_chain(problem, axes, 0.0, actions.nodes.unsqueeze(1)), actions.weights


def soft_iterates(p: exact.Circle, v: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Values of the Gibbs policies, from the value v on, and their masses."""
    chain, weights = circle(p)
    improve = bellman.gibbs(weights, p.temperature)
    values, masses = [v], list[Tensor]()
    for _ in range(iterations):
        best, mass = improve(chain.hamiltonian(values[-1]))
        residual = best - p.discount * values[-1]
        values.append(values[-1] + chain.resolvent(mass, p.discount, residual))
        masses.append(mass)
    return torch.stack(values), torch.stack(masses)


HAMILTONIAN, RESOLVENT = (
    "ctrl.markov_chain.MarkovChain.hamiltonian",
    ("ctrl.markov_chain.MarkovChain.resolvent"),
)


@claim(
    statement="""
        Any dynamics, bounded actions: with V^{n+1} the value of the Gibbs policy pi_n of V^n,
        V* - V^{n+1} = (rho - L^{pi_n})^{-1} gam KL(pi_n || pi*), hence V^n increases and
        |V* - V^{n+1}| <= osc_a(L^a(V* - V^n))^2 / (8 gam rho): geometric with any ratio eta in
        (0, 1) from some n on. To second order gam KL = Var_{pi*}(L^a(V* - V^n)) / (2 gam): the
        constant blows up like 1/gam where actions tie.
        """,
    source="Tang & Zhou 2024, arXiv 2411.01302, section 4; identity and constants derived here",
    wrongs=[
        wrong("soft-min", "ctrl.bellman.gibbs", "H / temperature + log", "-H / temperature + log"),
        wrong("temperature inverse", "ctrl.bellman.gibbs", "H / temp", "H * temp"),
        wrong("temperature halved", "ctrl.bellman.gibbs", "H / temp", "2 * H / temp"),
        wrong(
            "outer temperature missing", "ctrl.bellman.gibbs", "return temperature * n", "return n"
        ),
        wrong("weights of the actions missing", "ctrl.bellman.gibbs", "weights.log()", "0*weights"),
        wrong("reward missing", HAMILTONIAN, "self.rewards.clone()", "0 * self.rewards"),
        wrong("rates of the mean action", RESOLVENT, "(self.rates * mass)", "(self.rates / 3)"),
        wrong(
            "1/2 of the second-order term missing",
            "ctrl.markov_chain._rates",
            "covariance[..., i, i] / (2 * h * h)",
            "covariance[..., i, i] / (h * h)",
        ),
        wrong(
            "constant of the bound halved",
            "verification.claims.policy_iteration.largest_error",
            "8 * gam",
            "16 * gam",
        ),
    ],
    why_double="sparse linear algebra of the chains is in float64",
)
def rate_of_policy_improvement(setting: Setting) -> Iterator[Check]:
    """On a circle, far from linear-quadratic; references by dense matrices."""
    p = exact.Circle()
    chain = exact.chain(p)
    best = chain.optimum()
    target = chain.gibbs(best)
    x = torch.linspace(-3, 3, p.points, dtype=torch.float64)
    values, masses = soft_iterates(p, 0.3 * x.sin() - 0.2, 6)
    iterated = values.numpy()
    policies = [chain.gibbs(v) for v in iterated[:-1]]
    again = np.stack([chain.value(mass) for mass in policies])
    yield pathwise("each step is the value of the Gibbs policy", values[1:], again)
    yield pathwise("the Gibbs policies", masses, np.stack(policies))
    yield expectation("the end of the iteration: by value iteration", iterated[-1], best)
    error = best - iterated
    identity = [
        chain.resolvent(mass, p.temperature * exact.divergence(mass, target)) for mass in policies
    ]
    yield pathwise("V* - V^{n+1} = (rho - L)^{-1} gam KL", error[1:3], np.stack(identity[:2]))
    yield bound("no step makes the policy worse", values[1:-1], values[2:])
    most = [largest_error(chain.L @ each, p.temperature, p.discount) for each in error[:2]]
    yield bound("|V* - V^{n+1}| <= osc^2 / (8 gam rho)", np.abs(error[1:3]).max(1), np.array(most))

    after, second = next_error(p, 1e-3 * x.cos().numpy())
    yield limit("to second order gam KL is a variance / (2 gam)", after, second)

    wave = 1e-3 * (np.abs(np.arange(p.points) - p.points / 2) - p.points / 4)  # |slope| is constant
    errors = []
    for gam in (p.temperature, p.temperature / 5):
        tied = replace(exact.TIED, temperature=gam)
        chain = exact.chain(tied)
        after, _ = next_error(tied, wave)
        errors.append(after.max())
        most = largest_error(chain.L @ wave, gam, p.discount)
        name = f"the same where actions tie, nearly an equality: temperature {gam:.3g}"
        yield bound(name, after.max(), most)
    yield limit("a fifth of the temperature: five times the error", errors[1] / errors[0], 5.0)


def next_error(p: exact.Circle, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """V* - V^{n+1} where V* - V^n is small and given; and what the second order says."""
    chain = exact.chain(p)
    best = chain.optimum()
    values, _ = soft_iterates(p, torch.from_numpy(best - error), 1)
    mass, rate_errors = chain.gibbs(best), chain.L @ error
    variance = (mass * (rate_errors - (mass * rate_errors).sum(0)) ** 2).sum(0)
    return best - values[1].numpy(), chain.resolvent(mass, variance / (2 * p.temperature))


def largest_error(rate_errors: np.ndarray, gam: float, discount: float) -> float:
    """osc^2 / (8 gam rho) of the rates that an error of the value moves."""
    return float((rate_errors.max(0) - rate_errors.min(0)).max() ** 2 / (8 * gam * discount))
