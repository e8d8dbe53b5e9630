"""The exploratory SDE of Wang, Zariphopoulou & Zhou: drawing an action ever more often averages.

Actions a ~ pi(. | t, x), drawn ever more often, give X the law of the exploratory SDE
dX = E[b] dt + (E[sigma sigma'])^(1/2) dW. If b is affine in a and sigma free of it, that is
the SDE under the mean action: the spread of pi drops out, but for O(h) on a grid.
False: the same with E[sigma], or with sigma at the mean action.

    dX = b~ dt + sigma~ dW,   b~ = E b(t, x, a),   sigma~ sigma~' = E sigma sigma' (t, x, a)

It is the squares of the diffusion that average: sigma at the mean action, or the mean of sigma,
give another law. Where the drift is affine in the action and the diffusion does not depend on it,
the covariance of the actions drops out, and on a grid it is seen in first order of the step only.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import ctrl
from verification.claim import Check, Setting, array, expectation, limit, pathwise
from verification.closed_form import exploratory as exact
from verification.cubature import mean, point_start

SOURCE = "Wang, Zariphopoulou & Zhou 2020, JMLR 21, equations 6 and 8"

P = exact.Scalar()
PLANE = exact.Plane()
STEPS = (16, 32, 64)  # for the limits


def scalar_sde(p: exact.Scalar) -> ctrl.ControlledSDE:
    """Diffusion and drift depend on the action, in second degree too."""
    return ctrl.ControlledSDE(
        lambda t, x, a: p.A * x + p.B * a + p.E * a.square(),
        lambda t, x, a: p.C * x + p.D * a + p.G * a.square(),
        controls_diffusion=True,
    )


def free_sde(p: exact.Scalar) -> ctrl.ControlledSDE:
    """An affine drift, and a diffusion that no action reaches."""
    return ctrl.ControlledSDE(lambda t, x, a: p.A * x + p.B * a, lambda t, x: p.noise)


def drawing(p: exact.Scalar) -> ctrl.GaussianPolicy:
    """a ~ N(m x + n, s^2)."""
    return ctrl.GaussianPolicy(lambda t, x: p.m * x + p.n, p.s)


def moments_after(
    sde: ctrl.ControlledSDE, policy: ctrl.Policy, steps: int, setting: Setting
) -> Tensor:
    """E X_T^k, k = 1 .. 4, on a uniform grid: one step of production code, as a matrix, to a power.

    The mean of X'^k given X is a polynomial of degree k, found from its values at five states.
    """
    h = P.horizon / steps
    action = (1,) if policy.is_random else None
    rule = ctrl.noise.gauss_hermite(setting.tensor([h]), nodes=3, action=action)
    points = setting.tensor(np.linspace(-1.0, 1.0, exact.ORDER + 1))
    assert rule.weights is not None
    many, states = len(rule.increments), len(points)
    noise = ctrl.Noise(
        rule.increments.repeat(states, 1, 1),
        None if rule.actions is None else rule.actions.repeat(states, 1, 1),
        rule.weights.repeat(states) / states,
    )
    start = points.repeat_interleave(many)[:, None]
    grid = ctrl.uniform_grid(h, 1, device=setting.device)
    end = ctrl.simulate_end(ctrl.ControlProblem(sde, h), policy, start, grid, noise=noise)
    powers = torch.arange(exact.ORDER + 1, device=points.device)
    after = (end.view(states, many, 1) ** powers * rule.weights[:, None]).sum(1)
    transfer = torch.linalg.solve(points[:, None] ** powers, after).T
    begin = setting.tensor(P.start) ** powers
    return (torch.linalg.matrix_power(transfer, steps) @ begin)[1:]


def vanishing_step(sde: ctrl.ControlledSDE, policy: ctrl.Policy, setting: Setting) -> Tensor:
    """The limit of ``moments_after``, extrapolated twice."""
    one, two, three = (moments_after(sde, policy, steps, setting) for steps in STEPS)
    return (8 * three - 6 * two + one) / 3


def checks(setting: Setting) -> Iterator[Check]:
    """At points, on a grid, and in the limit."""
    p, policy, t = P, drawing(P), setting.tensor(0.3)
    x = setting.tensor([[0.4], [-1.1], [0.9]])
    averaged = ctrl.exploratory_sde(scalar_sde(p), policy)
    a, at = policy.mean(t, x), array(x)
    drift = averaged.drift_at(t, x, a)
    yield pathwise("drift at points, quadratic in the action", drift, exact.averaged_drift(p, at))
    square = torch.as_tensor(averaged.diffusion_at(t, x, a)).square()
    yield pathwise("squared diffusion at points", square, exact.averaged_square(p, at))

    scale, F, J = (setting.tensor(each) for each in (PLANE.L, PLANE.F, PLANE.J))
    plane = ctrl.ControlledSDE(
        lambda t, x, a: torch.stack([a[:, 0] * a[:, 1], x[:, 0] + a[:, 1]], dim=1),
        lambda t, x, a: (x @ F.T + a @ J.T).unsqueeze(-1),
        "general",
        1,
        controls_diffusion=True,
    )
    many = ctrl.MultivariateGaussianPolicy(lambda t, x: 0.7 * x - 0.2, scale)
    both = ctrl.exploratory_sde(plane, many, nodes=4, state_dim=2)
    x = setting.tensor([[0.2, -0.5], [0.9, 0.1]])
    a = many.mean(t, x)
    drift, covariance = exact.plane_averages(PLANE, array(x), array(a))
    yield pathwise("drift at points, a product of two actions", both.drift_at(t, x, a), drift)
    sigma = both.columns(t, x, a)
    yield pathwise("covariance at points, dependent actions", sigma @ sigma.mT, covariance)

    p = replace(P, E=0.0, G=0.0)  # moments are polynomials
    sde, nodes = scalar_sde(p), setting.tensor([0.0, 0.2, 0.5])
    grid = ctrl.TimeGrid(nodes)
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=4, action=(1,))
    start = point_start(noise, [p.start])
    paths = ctrl.simulate(ctrl.ControlProblem(sde, 0.5), policy, start, grid, noise=noise)
    chain_moments = torch.stack([mean(paths.states[:, -1, 0] ** k, paths) for k in range(1, 5)])
    chain = exact.chain_moments(p, np.diff([0.0, 0.2, 0.5]))
    yield expectation("moments 1 to 4 of the chain that draws its actions", chain_moments, chain)

    law = exact.moments(p)
    still = ctrl.DeterministicPolicy(policy.mean)
    drawn_moments = vanishing_step(sde, policy, setting)
    yield limit("moments of drawn actions, as steps vanish: the averaged SDE's", drawn_moments, law)
    averaged_moments = vanishing_step(ctrl.exploratory_sde(sde, policy), still, setting)
    yield limit("moments of the averaged SDE, as steps vanish", averaged_moments, law)

    free = free_sde(p)
    alone = exact.moments(p, controlled=False)
    free_moments = vanishing_step(ctrl.exploratory_sde(free, policy), still, setting)
    yield limit("diffusion free of the action: the law under the mean action", free_moments, alone)
    if setting.dtype == torch.float64:
        rates = []
        for steps in STEPS:
            drawn, kept = (moments_after(free, each, steps, setting) for each in (policy, still))
            excess = (drawn[1] - drawn[0] ** 2) - (kept[1] - kept[0] ** 2)
            rates.append(float(excess) * steps / p.horizon)
        excess_rate = (8 * rates[2] - 6 * rates[1] + rates[0]) / 3
        rate = exact.excess_variance_rate(p)
        yield limit(
            "diffusion free of the action: variance in excess, per step size", excess_rate, rate
        )


MISTAKES = r"""
ctrl.exploration.exploratory_sde
    mean of sigma for that of its square | `            squares = [\n                weight * (torch.ones_like(states) * sde.diffusion_at(t, states, a)).square()\n                for weight, a in drawn(t, states, mean)\n            ]\n            return torch.stack(squares).sum(0).sqrt()`
        => `            roots = [\n                weight * (torch.ones_like(states) * sde.diffusion_at(t, states, a))\n                for weight, a in drawn(t, states, mean)\n            ]\n            return torch.stack(roots).sum(0)`
    diffusion at the mean action | `            squares = [\n                weight * (torch.ones_like(states) * sde.diffusion_at(t, states, a)).square()\n                for weight, a in drawn(t, states, mean)\n            ]\n            return torch.stack(squares).sum(0).sqrt()`
        => `            return torch.ones_like(states) * sde.diffusion_at(t, states, mean)`
    drift at the mean action | return torch.stack(each).sum(0)\n => return sde.drift_at(t, states, mean)\n
    matrix noise: the columns average, not sigma sigma' | covariance = torch.stack([weight * s @ s.mT for weight, s in each]).sum(0)
        => s = torch.stack([weight * s for weight, s in each]).sum(0); covariance = s @ s.mT
    matrix noise: the covariance is taken for its root | scales.clamp_min(0).sqrt() => scales.clamp_min(0)
    spread of the actions counted as noise of the state | return ControlledSDE(drift, sde.diffusion, sde.noise, sde.noise_dim)
        => return ControlledSDE(drift, lambda t, x: math.hypot(sde.diffusion(t, x), policy.std))
ctrl.exploration.drawn_actions
    nodes of the other Hermite polynomials | np.polynomial.hermite_e.hermegauss => np.polynomial.hermite.hermgauss
shared
    scale transposed
    variance for standard deviation
    the same draw at every step
"""
