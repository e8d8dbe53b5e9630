"""Squashed Gaussian policies: an exact density on a bounded interval, and no closed entropy.

a = middle + half tanh(z), z ~ N(m(x), s^2) has log-density log N(z) - log(half
(1 - tanh(z)^2)), which integrates to 1 on (low, high); the KL of two such laws over one
interval is that of the normal laws; the mean is no function of m alone; the score function
has the mean action's slope; the entropy is H(z) + E log(half (1 - tanh(z)^2)), which has
no closed form: closed it is refused, and samples estimate it without bias.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from verification.claim import Check, Setting, array, expectation, pathwise, rounding, stated
from verification.closed_form import squashed as exact
from verification.cubature import mean

SOURCE = "Haarnoja et al. 2018, arXiv 1801.01290, appendix C; integrals by another rule"

SLOPE, SHIFT, STD = -0.7, 0.45, 0.55
OTHER = 0.2, 0.8  # location and standard deviation of a second policy
STATES = (0.3, -0.8, 1.1)
H = 0.4


def policy(shift: float | Tensor = SHIFT) -> ctrl.SquashedGaussianPolicy:
    """Location SLOPE x + shift."""
    latent = ctrl.GaussianPolicy(lambda t, x: SLOPE * x + shift, STD)
    return ctrl.SquashedGaussianPolicy(latent, exact.LOW, exact.HIGH)


def entropy_refused() -> bool:
    """Whether a closed entropy is refused."""
    one = torch.zeros(1, 1, dtype=torch.float64)
    try:
        policy().entropy(one[0, 0], one)
    except ValueError as error:
        return "no closed form" in str(error)
    return False


def checks(setting: Setting) -> Iterator[Check]:
    """Identities at actions and states; exact expectations by Gauss-Hermite nodes."""
    t, pi, x = setting.tensor(0.2), policy(), setting.tensor(STATES)[:, None]
    locations = SLOPE * np.array(STATES) + SHIFT
    z = np.linspace(-2.2, 2.4, 7)
    each = np.repeat(z[None], 3, 0)
    a = setting.tensor(exact.action(each))
    density = torch.stack([pi.log_prob(t, x, one[:, None]) for one in a.unbind(1)], 1)
    want = exact.log_density(exact.action(each), locations[:, None], STD)
    # 1 - tanh^2 is 0.03 at the ends: the action has that many times less digits
    yield stated(pathwise("log-density", density, want), units=rounding(size=30.0))
    m = float(locations[0])
    nodes, masses = exact.grid(m, STD)
    inside = np.abs(nodes) < 4
    at = setting.tensor(exact.action(nodes[inside]))[:, None]
    slopes = exact.HALF / np.cosh(nodes[inside]) ** 2
    width = nodes[1] - nodes[0]
    total = array(pi.log_prob(t, x[:1].expand(len(at), 1), at).exp()) @ slopes
    mass = float(masses[inside].sum())
    yield stated(expectation("mass on the interval", total * width, mass), units=rounding(2000))
    moments = torch.stack([one[0, 0] for one in pi.moments(t, x[:1])])
    yield expectation("mean and standard deviation", moments, exact.moments(m, STD))
    second = ctrl.GaussianPolicy(lambda t, x: OTHER[0] + 0 * x, OTHER[1])
    reference = ctrl.SquashedGaussianPolicy(second, exact.LOW, exact.HIGH)
    yield expectation(
        "KL over one interval", ctrl.policy_kl(pi, reference, t, x[:1])[0], exact.kl(m, STD, *OTHER)
    )

    one = setting.tensor([1.0])
    rule = ctrl.noise.gauss_hermite(one, nodes=48)
    assert rule.increments is not None
    assert rule.weights is not None
    normals = rule.increments[:, :, 0]  # [samples, 1]: standard normals
    estimates = ctrl.entropy_estimates(pi, t, x[:1], normals[:, None])
    want = exact.entropy(m, STD)
    yield expectation("entropy, by estimates", rule.weights @ estimates[:, 0], want)
    yield expectation("a closed entropy, refused", float(entropy_refused()), 1.0)

    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.0)
    problem = ctrl.ControlProblem(sde, H, running_reward=lambda t, x, a: a[:, 0])
    shift = setting.tensor(SHIFT).requires_grad_()
    moving, start = policy(shift), x[:1].expand(len(normals), 1).contiguous()
    still = torch.zeros_like(rule.increments)
    noise = ctrl.Noise(still, normals[:, None], rule.weights)
    grid = ctrl.TimeGrid(setting.tensor([0.0, H]))
    paths = ctrl.simulate(problem, moving, start, grid, noise=noise)
    displaced = mean(paths.states[:, 1, 0], paths) - STATES[0]
    yield expectation("E X of a step", displaced, H * exact.moments(m, STD)[0])
    score = ctrl.policy_gradient.return_gradient(problem, moving, paths)
    (slope,) = torch.autograd.grad(mean(score, paths), shift)
    yield expectation("gradient by the score function", slope, H * exact.slope(m, STD))


MISTAKES = r"""
ctrl.squashed_policy.SquashedGaussianPolicy.log_prob
    no Jacobian in the density | ` - self._log_slope(z)` => ``
    Jacobian added | ` - self._log_slope(z)` => ` + self._log_slope(z)`
ctrl.squashed_policy.SquashedGaussianPolicy._log_slope
    half the interval missing in the Jacobian | (half.log() + squash) => (0 * half + squash)
    slope of tanh taken for 1 - tanh | squash = 2 * (math.log(2) - z - torch.nn.functional.softplus(-2 * z))
        => squash = (1 - torch.tanh(z)).log()
ctrl.squashed_policy.SquashedGaussianPolicy.unsquash
    the middle of the interval forgotten | (actions - middle) / half => actions / half
ctrl.squashed_policy.SquashedGaussianPolicy.moments
    mean action: the squashed location | u = torch.tanh(center + point * std)
        => u = torch.tanh(center + 0 * point * std)
ctrl.squashed_policy._marginal_std
    variance for standard deviation in the mean | return policy.std_at(t, mean, states)
        => return policy.std_at(t, mean, states).square()
ctrl.squashed_policy.entropy_estimates
    entropy of the latent action for that of the action | -policy.log_prob(t, states, action)
        => -policy.latent.log_prob(t, states, policy.unsquash(action))
ctrl.squashed_policy.SquashedGaussianPolicy.entropy
    a closed entropy: that of the normal law | `        raise ValueError(`
        => `        return self.latent.entropy(t, states)\n        raise ValueError(`
ctrl.squashed_policy.SquashedGaussianPolicy.act
    drawn around the mean action, not the location | self.latent.act(center, t, noise, states)
        => self.latent.act(mean, t, noise, states)
shared
    KL of the policies in the other direction
"""
