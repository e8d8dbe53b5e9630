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
    returns_to_go,
    running_rewards,
    time_integral,
    uniform_grid,
)
from ctrl.policy import DeterministicPolicy, GaussianPolicy, Policy
from ctrl.problem import ControlProblem
from ctrl.sde import ControlledSDE
from ctrl.simulate import simulate
from ctrl.solvers import EulerMaruyama, Solver, TransitionSolver

__all__ = [
    "ControlProblem",
    "ControlledSDE",
    "DeterministicPolicy",
    "Estimate",
    "EulerMaruyama",
    "GaussianPolicy",
    "Noise",
    "Paths",
    "Policy",
    "Solver",
    "TimeGrid",
    "TransitionSolver",
    "girsanov",
    "ito_sum",
    "noise",
    "policy_gradient",
    "returns_to_go",
    "running_rewards",
    "simulate",
    "time_integral",
    "transitions",
    "uniform_grid",
]
