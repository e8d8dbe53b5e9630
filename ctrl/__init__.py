"""Exploratory continuous-time control: SDEs, policies, path likelihoods, advantages by a rate.

Three nouns (problem, policy, paths) and pure functions of them.
"""

from ctrl import girsanov, noise, policy_gradient, transitions
from ctrl.estimate import Estimate
from ctrl.noise import Noise
from ctrl.paths import (
    Paths,
    TimeGrid,
    ito_sum,
    regularised_rewards,
    returns_to_go,
    running_rewards,
    time_integral,
    uniform_grid,
)
from ctrl.policy import (
    DeterministicPolicy,
    GaussianPolicy,
    MultivariateGaussianPolicy,
    Policy,
    RandomPolicy,
    policy_kl,
)
from ctrl.problem import ControlProblem
from ctrl.sde import ControlledSDE
from ctrl.simulate import simulate
from ctrl.solvers import BlackBox, EulerMaruyama, Heun, Milstein, Solver, TransitionSolver

__all__ = [
    "BlackBox",
    "ControlProblem",
    "ControlledSDE",
    "DeterministicPolicy",
    "Estimate",
    "EulerMaruyama",
    "GaussianPolicy",
    "Heun",
    "Milstein",
    "MultivariateGaussianPolicy",
    "Noise",
    "Paths",
    "Policy",
    "RandomPolicy",
    "Solver",
    "TimeGrid",
    "TransitionSolver",
    "girsanov",
    "ito_sum",
    "noise",
    "policy_gradient",
    "policy_kl",
    "regularised_rewards",
    "returns_to_go",
    "running_rewards",
    "simulate",
    "time_integral",
    "transitions",
    "uniform_grid",
]
