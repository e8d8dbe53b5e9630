"""DDIM's transitions as decisions: their densities, ratios and divergences.

The log-ratio of DDIM's transitions under two scores is shift . z - |shift|^2 / 2, z the
noise that was drawn and shift the change of the mean in units of the step's deviation,
summed over coordinates; its mean is minus, and that under the other score plus, the KL of
the step. A last step without noise has neither: a policy gradient must leave it out.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

import ctrl
from diffusion_envs.objectives.path_steps import transition_kl, transition_log_ratio
from diffusion_envs.samplers import DDIM, BoundDDIM
from verification.claim import Check, Setting, array, expectation, pathwise
from verification.closed_form.gaussian_law import independent_log_density
from verification.closed_form.samplers import Nodes, ddim_law
from verification.closed_form.vp_gaussian import COVARIANCE, MEAN, VPGaussian
from verification.problems import table
from verification.problems.losses import rows_of_steps

SOURCE = "arXiv 2010.02502, equations 12 and 16; arXiv 2305.13301 (transitions as decisions)"

MODEL = VPGaussian(MEAN, COVARIANCE, 0.4, 2.6)
ETA, STEPS = 0.8, 5
STEP = np.array([3, 0, 2, 1, 4, 0])  # of each row: mixed
OF_A_PATH = [1, 3, 2, 0, 4]  # rows that stand in for the steps 0, 1, 2, 3, 4 of a path
STATES = np.array([[0.4, -0.9], [-1.3, 0.25], [2.1, 0.7], [0.1, 1.2], [-0.6, -0.35], [0.9, 1.6]])
NORMALS = np.array([[-0.4, 0.65], [1.15, -0.8], [0.25, -1.7], [0.8, 0.3], [-1.2, 0.5], [0.6, -0.2]])
OLD = -0.9 * STATES + np.array([0.3, -0.2])  # scores that sampled
NEW = OLD + 0.35 * np.sin(STATES) + np.array([0.15, 0.4])  # scores in question


def sampler() -> BoundDDIM:
    """DDIM on a table whose last entry it ends at, so that every step has noise."""
    return DDIM(ETA).bind(table(MODEL, STEPS + 1), STEPS)


def checks(setting: Setting) -> Iterator[Check]:
    """Rows of mixed steps, and whole paths through ctrl, against densities in numpy."""
    ddim = sampler()
    nodes = Nodes.of(MODEL, (STEPS + 1 - np.arange(STEPS + 1)) / (STEPS + 1))
    means, stds = ddim_law(nodes, ETA, STEP, STATES, OLD)
    new_means = ddim_law(nodes, ETA, STEP, STATES, NEW)[0]
    after = means + stds * NORMALS
    step = torch.as_tensor(STEP)
    x, z, old, new = (setting.tensor(v) for v in (STATES, NORMALS, OLD, NEW))
    yield pathwise("mean of the next state", ddim.mean(step, x, old), means)
    ratio = independent_log_density(after, new_means, stds**2) - independent_log_density(
        after, means, stds**2
    )
    rows = rows_of_steps(ddim, step, z, new, old)
    yield pathwise("log-ratio of rows, against densities", transition_log_ratio(rows), ratio)
    kl = np.sum(((new_means - means) / stds) ** 2, axis=-1) / 2
    yield pathwise("KL of rows", transition_kl(rows), kl)
    whole = ddim.chain_kl(new[OF_A_PATH][None], old[OF_A_PATH][None])
    yield pathwise("KL of the chain's steps", whole, kl[OF_A_PATH][None])
    rule, weights = np.polynomial.hermite_e.hermegauss(2)
    mean_ratio = sum(
        w / weights.sum() * transition_log_ratio(replace(rows, noise=torch.full_like(z, node)))
        for node, w in zip(rule, weights, strict=True)
    )
    yield expectation("mean log-ratio is minus the KL", -mean_ratio, kl)

    policy = ctrl.DeterministicPolicy(lambda t, x: -(1.3 - 0.4 * t) * x + 0.35)
    reference = ctrl.DeterministicPolicy(lambda t, x: -x + 0.2 * t)
    widths = ddim.grid.steps.sqrt().to(x)[None, :, None]
    drawn = setting.tensor(np.stack([np.roll(NORMALS, k, 0)[:STEPS] for k in range(3)]))
    problem = ctrl.ControlProblem(ddim.sde, horizon=1.0)
    noise = ctrl.Noise(drawn * widths)
    paths = ctrl.simulate(problem, policy, x[:3], ddim.grid, solver=ddim, noise=noise)
    states = [STATES[:3]]
    log_probs, log_ratios, kls = [], [], []
    for k in range(STEPS):
        row, now, t = np.full(3, k), states[-1], 1 - nodes.s[k]
        mean, std = ddim_law(nodes, ETA, row, now, -(1.3 - 0.4 * t) * now + 0.35)
        other = ddim_law(nodes, ETA, row, now, -now + 0.2 * t)[0]
        states.append(mean + std * array(drawn[:, k]))
        log_probs.append(independent_log_density(states[-1], mean, std**2))
        log_ratios.append(log_probs[-1] - independent_log_density(states[-1], other, std**2))
        kls.append(np.sum(((mean - other) / std) ** 2, axis=-1) / 2)
    yield pathwise("paths", paths.states, np.stack(states, axis=1))
    of = (ddim.sde, ddim, policy)
    path_log_prob = ctrl.transitions.log_prob(*of, paths)
    yield pathwise("log-probability along paths", path_log_prob, np.stack(log_probs, axis=1))
    path_log_ratio = ctrl.transitions.log_ratio(*of, reference, paths)
    yield pathwise("log-ratio along paths", path_log_ratio, np.stack(log_ratios, axis=1))
    path_kl = ctrl.transitions.transition_kl(*of, reference, paths)
    yield pathwise("KL along paths", path_kl, np.stack(kls, axis=1))

    noiseless = DDIM(ETA).bind(table(MODEL, STEPS, spacing="trailing", final_is_one=True), STEPS)
    try:
        noiseless.transition_kl(step, new, old)
        refused = 0.0
    except ValueError:
        refused = 1.0
    yield pathwise("a last step without noise is refused", refused, 1.0)


MISTAKES = """
diffusion_envs.samplers.BoundDDIM._whitened
    variance of another step | self.std, step => self.std.roll(1), step
    variance for standard deviation | self.std, step => self.std**2, step
diffusion_envs.objectives.path_steps.transition_log_ratio
    sign of the quadratic term | - 0.5 => + 0.5
    policies exchanged | rows.mean - rows.old_mean => rows.old_mean - rows.mean
diffusion_envs.samplers.BoundDDIM.transition_kl
    KL without 1/2 | return 0.5 * => return
diffusion_envs.samplers.BoundDDIM.chain_kl
    KL of the step after | torch.arange(actions.shape[1], device=actions.device)
        => torch.arange(actions.shape[1], device=actions.device).roll(1)
diffusion_envs.samplers.BoundDDIM.mean
    mean of the step before | self.gain, step => self.gain.roll(1), step
ctrl.transitions.log_ratio
    along paths: 1/2 dropped | 0.5 * shift => shift
ctrl.transitions._laws
    along paths: state of another node | paths.states[:, :-1] => paths.states[:, 1:]
    along paths: score of another time | mean_action(next(policies), times[k], x)
        => mean_action(next(policies), times[k + 1], x)
diffusion_envs.samplers.BoundDDIM.step
    step driven by unscaled increments | (increment / math.sqrt(float(t1 - t0))) => increment
diffusion_envs.samplers.BoundDDIM._require_density
    zero-noise step in the log-probability | if not self.has_density: => if False:
shared
    KL of rows without 1/2
    log-ratio averaged over coordinates
    log-ratio of transitions: 1/2 dropped
    DDIM: eta ignored
    KL averaged over coordinates
    mean: noise not taken out of the direction
    DDIM: alpha-bar for alpha
    along paths: log-determinant dropped
    along paths: KL without 1/2
"""
