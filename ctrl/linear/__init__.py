"""Exact answers: linear SDEs, Gaussian laws, KL-regularised and linear-quadratic control.

Functions of float64 tensors, batched over leading dimensions and differentiable.
"""

from ctrl.linear.gaussian import (
    Affine,
    Gaussian,
    Transition,
    gaussian_kl,
    gaussian_moments,
    linear_path_kl,
    ornstein_uhlenbeck_path_kl,
    ornstein_uhlenbeck_terminal_kl,
    transition,
)
from ctrl.linear.kl_control import Tilted, kl_optimal_drift, kl_optimal_value, tilt
from ctrl.linear.lq import LinearGaussian, LinearQuadratic, Quadratic, TimeVarying, improve_lq
from ctrl.linear.riccati import (
    FiniteHorizon,
    Stationary,
    cost_of_exploration,
    evaluate_lq,
    evaluate_lq_discounted,
    evaluate_lq_ergodic,
    solve_lq,
    solve_lq_discounted,
    solve_lq_ergodic,
    solve_lq_switching,
)

__all__ = [
    "Affine",
    "FiniteHorizon",
    "Gaussian",
    "LinearGaussian",
    "LinearQuadratic",
    "Quadratic",
    "Stationary",
    "Tilted",
    "TimeVarying",
    "Transition",
    "cost_of_exploration",
    "evaluate_lq",
    "evaluate_lq_discounted",
    "evaluate_lq_ergodic",
    "gaussian_kl",
    "gaussian_moments",
    "improve_lq",
    "kl_optimal_drift",
    "kl_optimal_value",
    "linear_path_kl",
    "ornstein_uhlenbeck_path_kl",
    "ornstein_uhlenbeck_terminal_kl",
    "solve_lq",
    "solve_lq_discounted",
    "solve_lq_ergodic",
    "solve_lq_switching",
    "tilt",
    "transition",
]
