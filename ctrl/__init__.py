"""Exploratory continuous-time control: SDEs, policies, path likelihoods, advantages by a rate.

Three nouns (problem, policy, paths) and pure functions of them.
"""

from ctrl import (
    adjoint_matching,
    agents,
    chains,
    girsanov,
    jumps,
    linear,
    martingale,
    mean_field,
    noise,
    off_policy,
    phibe,
    policy_gradient,
    problems,
    q_learning,
    recorded,
    risk_sensitive,
    stopping,
    transitions,
    trust_region,
    value,
)
from ctrl.estimate import Estimate
from ctrl.exploration import exploratory_sde
from ctrl.jumps import Jumps
from ctrl.martingale import LinearValue
from ctrl.memory import PolicyWithMemory
from ctrl.noise import Noise
from ctrl.paths import Paths, TimeGrid, ito_sum, time_integral, uniform_grid
from ctrl.policy import (
    DeterministicPolicy,
    GaussianPolicy,
    MultivariateGaussianPolicy,
    Policy,
    RandomPolicy,
    policy_kl,
)
from ctrl.problem import ControlProblem
from ctrl.returns import regularised_rewards, returns_to_go, running_rewards
from ctrl.sde import ControlledSDE
from ctrl.simulate import simulate, simulate_end
from ctrl.solvers import (
    BlackBox,
    DriftImplicitEuler,
    EulerMaruyama,
    Heun,
    Milstein,
    Solver,
    TamedEuler,
    TransitionSolver,
)
from ctrl.squashed_policy import SquashedGaussianPolicy, entropy_estimates
from ctrl.torchsde_solver import TorchSDE
from ctrl.value import Value

__version__ = "0.1.0"  # the one place; the package's metadata read it here

__all__ = [
    "BlackBox",
    "ControlProblem",
    "ControlledSDE",
    "DeterministicPolicy",
    "DriftImplicitEuler",
    "Estimate",
    "EulerMaruyama",
    "GaussianPolicy",
    "Heun",
    "Jumps",
    "LinearValue",
    "Milstein",
    "MultivariateGaussianPolicy",
    "Noise",
    "Paths",
    "Policy",
    "PolicyWithMemory",
    "RandomPolicy",
    "Solver",
    "SquashedGaussianPolicy",
    "TamedEuler",
    "TimeGrid",
    "TorchSDE",
    "TransitionSolver",
    "Value",
    "adjoint_matching",
    "agents",
    "chains",
    "entropy_estimates",
    "exploratory_sde",
    "girsanov",
    "ito_sum",
    "jumps",
    "linear",
    "martingale",
    "mean_field",
    "noise",
    "off_policy",
    "phibe",
    "policy_gradient",
    "policy_kl",
    "problems",
    "q_learning",
    "recorded",
    "regularised_rewards",
    "returns_to_go",
    "risk_sensitive",
    "running_rewards",
    "simulate",
    "simulate_end",
    "stopping",
    "time_integral",
    "transitions",
    "trust_region",
    "uniform_grid",
    "value",
]
