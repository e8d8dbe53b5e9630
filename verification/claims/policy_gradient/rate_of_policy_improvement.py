"""The rate of policy improvement far from linear-quadratic problems, on a circle.

Any dynamics, bounded actions: with V^{n+1} the value of the Gibbs policy pi_n of V^n,
V* - V^{n+1} = (rho - L^{pi_n})^{-1} gam KL(pi_n || pi*), hence V^n increases and
|V* - V^{n+1}| <= osc_a(L^a(V* - V^n))^2 / (8 gam rho): geometric with any ratio eta in
(0, 1) from some n on. To second order gam KL = Var_{pi*}(L^a(V* - V^n)) / (2 gam): the
constant blows up like 1/gam where actions tie.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import bellman
from ctrl.action_grid import gauss_legendre
from ctrl.markov_chain import MarkovChain, markov_chain
from ctrl.state_grid import Axis
from verification.claim import Check, Setting, bound, expectation, limit, pathwise
from verification.closed_form import policy_iteration as exact

SOURCE = "Tang & Zhou 2024, arXiv 2411.01302, section 4; identity and constants derived here"
WHY_DOUBLE = "sparse linear algebra of the chains is in float64"


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


def checks(setting: Setting) -> Iterator[Check]:
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


MISTAKES = """
ctrl.bellman.gibbs
    temperature inverse | H / temp => H * temp
    temperature halved | H / temp => 2 * H / temp
    outer temperature missing | return temperature * n => return n
    weights of the actions missing | weights.log() => 0*weights
ctrl.markov_chain.MarkovChain.hamiltonian
    reward missing | self.rewards.clone() => 0 * self.rewards
ctrl.markov_chain.MarkovChain.resolvent
    rates of the mean action | (self.rates * mass) => (self.rates / 3)
verification.claims.policy_gradient.rate_of_policy_improvement.largest_error
    constant of the bound halved | 8 * gam => 16 * gam
shared
    soft-min for soft-max
    noise of a step without its half
"""
