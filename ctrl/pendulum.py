"""The noisy pendulum, steered by a torque: a nonlinear problem with a reference solution."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrl.devices import as_like
from ctrl.hjb import Axis, Solution, solve_discounted, trapezoid
from ctrl.problem import ControlProblem
from ctrl.sde import ControlledSDE


@dataclass(frozen=True, eq=False)
class NoisyPendulum:
    """A problem without closed form, and its answer by finite differences.

    Attributes:
        problem: states (angle, angular velocity), [paths, 2]; actions (torque), [paths, 1]. Angle 0
            is upright; the angle is not wrapped, and everything is periodic in it.
        fastest: angular velocity at which the grid of the reference ends, 1/time.
        strongest: torque at which its action grid ends, 1/time^2.
    """

    problem: ControlProblem
    fastest: float
    strongest: float

    def reference(self, resolution: int = 160, *, action_nodes: int = 41) -> Solution:
        """The optimal value and policy; central differences, of order 2.

        With the default parameters, V at (angle, velocity) and the time on one core:

            resolution   (0, 0)     (pi, 0)    (pi/2, -3/2)   seconds
            40           1.646383   -1.170930   0.999183        0.1
            80           1.645936   -1.156192   1.003947        0.5
            160          1.645856   -1.152492   1.005155        3
            320          1.645838   -1.151567   1.005458       15
            limit        1.645832   -1.151259   1.005559      by extrapolation of the last two

        More action nodes, stronger torques or a grid up to twice the velocity change none of these
        digits; monotone differences tend to the same limit from 1.635, -1.155, 0.986 at 320.

        Args:
            resolution: nodes of the angle, and intervals of the velocity; at least 4, and even for
                a node at (0, 0).
            action_nodes: of the torque. Of temperature 0 the torque is one of them.

        Raises:
            ValueError: the action grid does not resolve the Gibbs policy, or ends where that has
                more than a thousandth of its mass.
        """
        axes = (
            Axis(-math.pi, math.pi, resolution, "periodic"),
            Axis(-self.fastest, self.fastest, resolution + 1),
        )
        actions = trapezoid(-self.strongest, self.strongest, action_nodes)
        solution = solve_discounted(self.problem, axes, actions, differences="central")
        if (lost := float(solution.end_mass.table.max())) > 1e-3:
            raise ValueError(
                f"strongest must be a torque that is never needed, but {self.strongest:g} has "
                f"{lost:.2g} of the optimal policy's mass somewhere; raise it"
            )
        return solution


def noisy_pendulum(
    *,
    gravity: float = 2.0,
    damping: float = 0.4,
    noise: float = 0.8,
    velocity_cost: float = 0.1,
    torque_cost: float = 0.3,
    discount: float = 0.5,
    temperature: float = 0.1,
    fastest: float = 6.0,
    strongest: float = 8.0,
) -> NoisyPendulum:
    """Swing up and balance, paid for being upright.

        d angle    = velocity dt
        d velocity = (gravity sin(angle) - damping velocity + torque) dt + noise dW
        reward     = cos(angle) - (velocity_cost velocity^2 + torque_cost torque^2) / 2

    per unit of time, discounted, without end. The optimal policy is Gaussian with variance
    temperature / torque_cost, in every state.

    Args:
        gravity: over length, 1/time^2.
        damping: 1/time.
        noise: of the velocity, 1/time^(3/2), positive.
        velocity_cost: reward time.
        torque_cost: reward time^3, positive.
        discount: positive, 1/time.
        temperature: reward per nat of entropy and unit of time.
        fastest: angular velocity at which the grid of the reference ends, 1/time.
        strongest: torque at which its action grid ends, 1/time^2.

    Raises:
        ValueError: a number is out of its range.
    """
    numbers = {"gravity": gravity, "damping": damping, "velocity_cost": velocity_cost}
    positive = {"noise": noise, "torque_cost": torque_cost, "discount": discount}
    positive |= {"fastest": fastest, "strongest": strongest}
    for name, number in (numbers | positive).items():
        if not math.isfinite(number) or number < 0 or (name in positive and number == 0):
            least = "positive" if name in positive else "at least 0"
            raise ValueError(f"{name} must be {least} and finite, got {number}")

    def drift(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        angle, velocity = x[:, 0], x[:, 1]
        force = gravity * angle.sin() - damping * velocity + a[:, 0]
        return torch.stack([velocity, force], dim=-1)

    def diffusion(t: Tensor, x: Tensor) -> Tensor:
        return as_like(torch.tensor([0.0, noise], dtype=torch.float64), x).expand_as(x)

    def reward(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        cost = velocity_cost * x[:, 1].square() + torque_cost * a[:, 0].square()
        return x[:, 0].cos() - 0.5 * cost

    problem = ControlProblem(
        ControlledSDE(drift, diffusion),
        horizon=math.inf,
        running_reward=reward,
        discount=discount,
        temperature=temperature,
    )
    return NoisyPendulum(problem, fastest, strongest)
