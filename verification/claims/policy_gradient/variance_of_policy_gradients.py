"""What the estimators of the policy gradient differ by: their variance, exactly.

All have one mean, and on any grid these variances (closed forms, for a linear reward).
Where the action is drawn (view A) and weighs the return, the variance grows like 1/h; with
V for a baseline it still does, with a smaller constant; with dV it stays finite. Where the
next state is decided (view B) it stays finite for all, and with dV tends to 0 here. So what
is gained in continuous time is not another gradient but less variance.

A mean cannot tell whether a baseline is there, or which of two unbiased estimators was computed.
Here the gradient of every single path is taken, on quadrature paths, and its variance has a closed
form: the reward is linear, so all is products of normals.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import policy_gradient as pg
from ctrl.value import Value
from verification.claim import Check, Setting, expectation, limit
from verification.closed_form import score_products
from verification.closed_form.score_products import LinearReward
from verification.cubature import mean, point_start
from verification.problems.exploratory_lq import to_zero

SOURCE = (
    '"Score as Action", arXiv 2502.01819, Theorem 4.1 (dV for the return of DDPO); moments of '
    "normals"
)

P = LinearReward()
HORIZON = 0.9
UNEVEN = np.array([0.0, 0.3, 0.5, 0.9])


def problem(p: LinearReward) -> ctrl.ControlProblem:
    """A linear reward at the horizon."""
    sde = ctrl.ControlledSDE(lambda t, x, a: p.drift_slope * x + p.push * a, lambda t, x: p.noise)
    return ctrl.ControlProblem(
        sde, HORIZON, terminal_reward=lambda x: p.weight * x[:, 0], discount=p.discount
    )


def chain_value(setting: Setting, p: LinearReward, nodes: np.ndarray) -> Value:
    """V of the chain at its nodes."""
    times, rows = setting.tensor(nodes), setting.tensor(score_products.chain_value(p, nodes))

    def value(t: Tensor, x: Tensor) -> Tensor:
        slope, constant = rows[(times - t).abs().argmin()].unbind()
        return (slope * x + constant).squeeze(1)

    return value


def variances(setting: Setting, nodes: np.ndarray, drawn: bool) -> Tensor:
    """Variance of one path's gradient in the offset: with the return, less V, and with dV."""
    grid = ctrl.TimeGrid(setting.tensor(nodes))
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=3, action=(1,) if drawn else None)
    start = point_start(noise, [P.start])
    offset = torch.full_like(start, P.offset).requires_grad_()  # one for each path
    policy = (
        ctrl.GaussianPolicy(lambda t, x: offset, P.std)
        if drawn
        else ctrl.DeterministicPolicy(lambda t, x: offset)
    )
    view = pg.DrawnActions() if drawn else pg.Transitions(ctrl.EulerMaruyama())
    stated, value = problem(P), chain_value(setting, P, nodes)
    paths = ctrl.simulate(stated, policy, start, grid, noise=noise)
    by_estimator = []
    for each in (
        pg.return_gradient(stated, policy, paths, decisions=view),
        pg.return_gradient(stated, policy, paths, value, view),
        pg.temporal_difference_gradient(stated, policy, value, paths, view),
    ):
        (slope,) = torch.autograd.grad(each.sum(), offset)
        by_estimator.append(mean(slope.square(), paths) - mean(slope, paths).square())
    return torch.stack(by_estimator).squeeze(1)


def checks(setting: Setting) -> Iterator[Check]:
    """Six variances on an uneven grid, and what they tend to."""
    names = ("the return", "the return less V", "dV")
    exact = (score_products.drawn(P, UNEVEN), score_products.transitions(P, UNEVEN))
    for view, drawn, one in zip(("drawn action", "next state"), (True, False), exact, strict=True):
        drawn_variances = variances(setting, UNEVEN, drawn)
        for name, got, want in zip(names, drawn_variances, one, strict=True):
            yield expectation(f"{view}: variance with {name}", got, want)
    diverging, finite = score_products.limits(P, HORIZON)
    scaled, plain = [], []
    for steps in (1, 2, 3):
        nodes = np.linspace(0, HORIZON, steps + 1)
        scaled.append(variances(setting, nodes, drawn=True)[:2] * HORIZON / steps)
        plain.append(variances(setting, nodes, drawn=False)[:2])
    yield limit("drawn action: h times the variance, steps to 0", to_zero(*scaled), diverging)
    yield limit("next state: the variance, steps to 0", to_zero(*plain), finite)


MISTAKES = """
ctrl.policy_gradient.return_gradient
    baseline omitted | if baseline is not None: => if False:
    baseline of the start at every step | problem, paths)[:, :-1] => problem, paths)[:, :1]
    baseline added | ahead - values => ahead + values
ctrl.policy_gradient._summed
    score halved | (log_prob * advantages => (0.5 * log_prob * advantages
    every action's score with one step's advantage | log_prob * advantages.detach()
        => log_prob.mean(1, keepdim=True) * advantages.detach()
    advantage standardised over the paths | advantages.detach() => (advantages / advantages.std(0)).detach()
shared
    infinite rate taken for 0
    outer discount missing
    transition's score divided by s for s^2
"""
