"""The exploratory LQ problem of ``closed_form.lq_chain`` as users write it, on quadrature paths."""

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl.value import Value
from verification.claim import Setting
from verification.closed_form import lq_policies
from verification.closed_form.lq_chain import LQChain
from verification.cubature import mean, point_start

P = LQChain()
HORIZON = 0.9
NODES = np.array([0.0, 0.3, 0.5, 0.9])  # uneven


def problem(p: LQChain) -> ctrl.ControlProblem:
    """Dynamics, rewards, discount and temperature."""

    def diffusion(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return p.noise + p.noise_slope * x + p.noise_push * a

    def reward(t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return -0.5 * (p.state_cost * x.square() + p.action_cost * a.square()).squeeze(1)

    sde = ctrl.ControlledSDE(
        lambda t, x, a: p.drift_slope * x + p.push * a,
        diffusion if p.noise_push or p.noise_slope else lambda t, x: p.noise,
        controls_diffusion=bool(p.noise_push or p.noise_slope),
    )
    return ctrl.ControlProblem(
        sde,
        HORIZON,
        reward,
        lambda x: (p.terminal_slope * x - 0.5 * p.terminal_cost * x.square()).squeeze(1),
        p.discount,
        p.temperature,
    )


def parameters(setting: Setting, theta: np.ndarray) -> list[Tensor]:
    """Gain, offset and log-std, to be differentiated."""
    return [setting.tensor(float(value)).requires_grad_() for value in theta]


def policy(gain: Tensor, offset: Tensor, log_std: Tensor) -> ctrl.GaussianPolicy:
    """a ~ N(gain x + offset, e^{2 log_std})."""
    return ctrl.GaussianPolicy(lambda t, x: gain * x + offset, lambda t: log_std.exp())


def deterministic(gain: Tensor, offset: Tensor) -> ctrl.DeterministicPolicy:
    """a = gain x + offset."""
    return ctrl.DeterministicPolicy(lambda t, x: gain * x + offset)


def quadratic(v: Tensor, x: Tensor) -> Tensor:
    """A row of ``closed_form.lq_policies`` at states [paths, dim]."""
    y = torch.cat([torch.ones_like(x[:, :1]), x], 1)
    return (y @ v.view(y.shape[1], -1) * y).sum(1)


def on_nodes(setting: Setting, nodes: np.ndarray, rows: np.ndarray) -> Value:
    """A row a node."""
    times, table = setting.tensor(nodes), setting.tensor(rows)
    return lambda t, x: quadratic(table[(times - t).abs().argmin()], x)


def series_in_time(series: Tensor, t: Tensor) -> Tensor:
    """sum_j series[j] t^j."""
    total = torch.zeros_like(series[0])
    for each in series.flip(0):
        total = total * t + each
    return total


def chain_value(setting: Setting, p: LQChain, theta: np.ndarray, nodes: np.ndarray) -> Value:
    """V of the chain at its nodes; at the horizon, where V is pinned, anything."""
    rows = lq_policies.chain_value(p, theta, nodes)
    rows[-1] = 0.4
    return on_nodes(setting, nodes, rows)


def continuous_value(setting: Setting, p: LQChain, theta: np.ndarray) -> Value:
    """V of the continuous-time problem."""
    series = setting.tensor(lq_policies.value_series(p, theta))
    return lambda t, x: quadratic(series_in_time(series, HORIZON - t), x)


def gradient(each: Tensor, paths: ctrl.Paths, theta: list[Tensor]) -> Tensor:
    """The mean of an estimator, as users take it: one backward pass."""
    return torch.stack(torch.autograd.grad(mean(each, paths), theta))


def drawn_paths(
    setting: Setting, p: LQChain, theta: list[Tensor], nodes: np.ndarray, rule: int = 3
) -> ctrl.Paths:
    """Quadrature paths of the drawn actions: every variable enters to the fourth degree at most."""
    grid = ctrl.TimeGrid(setting.tensor(nodes))
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=rule, action=(1,))
    start = point_start(noise, [p.mean])
    return ctrl.simulate(problem(p), policy(*theta), start, grid, noise=noise)


def silent_paths(
    setting: Setting, p: LQChain, theta: list[Tensor], nodes: np.ndarray, rule: int = 3
) -> ctrl.Paths:
    """Quadrature paths of the mean action."""
    grid = ctrl.TimeGrid(setting.tensor(nodes))
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=rule)
    start = point_start(noise, [p.mean])
    return ctrl.simulate(problem(p), deterministic(*theta[:2]), start, grid, noise=noise)


def to_zero(one: Tensor, two: Tensor, three: Tensor) -> Tensor:
    """At h = 0, the parabola in h through values found with one, two and three equal steps."""
    return (one - 8 * two + 9 * three) / 2
