"""Losses that a run takes, on a roll-out of numbers, with a model that is written out in numpy.

The model is what a run's is: a pretrained score, which is not linear and mixes the coordinates, and
an adapter, which is linear. Sampler, environment, roll-out and the losses of an update are the
shipped ones; states, noises, actions, rewards and values are numbers without symmetry, such that
log-ratios lie on both sides of a clip and advantages have both signs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ctrl.devices import as_like
from ctrl.noise import stream
from diffusion_envs.environment import Environment
from diffusion_envs.models.exact import AffineCorrection, CorrectedScore
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.objectives import Objective, Rollout, Rows
from diffusion_envs.objectives.protocol import Update, Values
from diffusion_envs.samplers import DDIM, BoundDDIM, GaussianSteps
from diffusion_envs.training.update_size import UpdateSize
from verification.claim import Setting
from verification.closed_form import objectives as exact
from verification.closed_form.samplers import Nodes, ddim_law, integrated_rates
from verification.closed_form.vp_gaussian import VPGaussian
from verification.problems import table

PATHS, STEPS, DIM, ETA = 6, 4, 3, 0.7
LEVELS = VPGaussian(np.zeros(1), np.eye(1), 0.4, 2.6)
ENTRIES = 11  # of the table, of which trailing steps visit some: steps of uneven length
NODES = Nodes.of(LEVELS, np.array([11, 8, 6, 3, 1]) / ENTRIES)
ORDER = np.array([2, 0, 3, 1])  # in which steps come
CENTRE = np.array([0.4, -0.3, 0.8])
MIXED = np.array([[0.7, 0.4, -0.2], [-0.3, 0.9, 0.5], [0.6, -0.1, 1.1]])
GAIN = np.array([[0.11, -0.07, 0.05], [0.04, 0.09, -0.06], [-0.08, 0.03, 0.12]])
SHIFT = np.array([0.17, -0.12, 0.08])
PROMPTS = np.array([0, 1, 1, 0, 1, 2])
REWARDS = np.array([0.9, -1.3, 0.4, 2.2, -0.6, 1.1])


def wave(*shape: int, size: float = 1.0, phase: float = 0.0) -> np.ndarray:
    """Numbers without symmetry, of this size."""
    return size * np.cos(1.7 * np.arange(1.0, 1 + np.prod(shape)) ** 1.3 + phase).reshape(shape)


def pretrained(step: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Score of the pretrained model, of rows [n, dim]; or at alpha-bar levels if not integer."""
    alpha = (NODES.alpha[step] if step.dtype.kind == "i" else np.sqrt(step))[:, None]
    return (alpha * CENTRE - x) / (1 - 0.4 * alpha**2) + 0.15 * np.sin(x @ MIXED.T)


def current(step: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Score of the trained model: the adapter added."""
    return pretrained(step, x) + x @ GAIN.T + SHIFT


def half_trained(step: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Score of the policy that made the data: half of the adapter."""
    return pretrained(step, x) + 0.5 * (x @ GAIN.T + SHIFT)


def reward(x: np.ndarray) -> np.ndarray:
    """Of states without noise; of complex ones too."""
    return x @ np.array([0.6, -0.9, 0.4]) + np.sin(x[..., 0] * x[..., 2]) - 0.3 * x[..., 1] ** 2


def value(node: np.ndarray, x: np.ndarray, path: np.ndarray) -> np.ndarray:
    """V at any states of a node, of rows; of complex ones too."""
    bent = np.sin(0.8 * x + 0.3 * node[:, None]) @ np.array([0.7, -0.5, 0.9])
    return bent + (0.2 + 0.1 * path) * x[:, 0] * x[:, 1]


def _values(node: Tensor, states: Tensor, path: Tensor) -> Tensor:
    bent = (0.8 * states + 0.3 * node.to(states)[:, None]).sin() @ states.new_tensor(
        [0.7, -0.5, 0.9]
    )
    return bent + (0.2 + 0.1 * path.to(states)) * states[:, 0] * states[:, 1]


STATES = wave(PATHS, STEPS + 1, DIM, size=1.2)
NOISES = wave(PATHS, STEPS, DIM, size=1.5, phase=0.4)
WHERE = np.tile(np.arange(STEPS), PATHS)
_X = STATES[:, :-1].reshape(-1, DIM)
_ONE = np.ones((STEPS, 1))
# what a score of 1 adds to the mean, and the standard deviation, of every step
SCORE_GAIN = ddim_law(NODES, ETA, np.arange(STEPS), 0 * _ONE, _ONE)[0][:, 0]
STD = ddim_law(NODES, ETA, np.arange(STEPS), 0 * _ONE, _ONE)[1][:, 0]
STATE_GAIN = ddim_law(NODES, ETA, np.arange(STEPS), _ONE, 0 * _ONE)[0][:, 0]
SIZES = -np.diff(integrated_rates(LEVELS, NODES.s))
FACTOR = ((1 + ETA**2) / (2 * ETA)) ** 2
_AWAY = wave(PATHS, STEPS, DIM, size=0.55, phase=1.1) * (STD / SCORE_GAIN)[:, None]
OLD = current(WHERE, _X).reshape(PATHS, STEPS, DIM) - _AWAY  # scores that sampled
REFERENCE = pretrained(WHERE, _X).reshape(PATHS, STEPS, DIM)
ACTION_STD = 0.35 / NODES.sigma[:-1]  # of drawn scores
ACTIONS = OLD + ACTION_STD[:, None] * wave(PATHS, STEPS, DIM, size=1.3, phase=2.0)
COSTS = 0.3 + wave(PATHS, STEPS, size=0.2, phase=0.7)
VALUES = wave(PATHS, STEPS + 1, size=0.8, phase=0.2)
PARTS = np.stack([REWARDS, wave(PATHS, size=1.4)], axis=1)
PART_WEIGHTS = {"one": 0.7, "other": -0.4}
USUAL_MOVES = np.array([0.7, 0.5, 0.4, 0.2])
PREFERENCES = np.array([0.4, -0.2, 1.3, 1.9, 0.6, 0.6])  # the last pair is a tie
ADVANTAGES = wave(PATHS, STEPS, size=1.4, phase=2.7)


def environment(setting: Setting, sampler: Any = None) -> Environment:
    """The model with its adapter, on DDIM's steps, and the reward."""
    correction = AffineCorrection(DIM, degree=1).to(setting.device, setting.dtype)
    with torch.no_grad():
        correction.gain[0], correction.shift[0] = setting.tensor(GAIN), setting.tensor(SHIFT)

    def score(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        a = alpha[:, None]
        linear = (a * x.new_tensor(CENTRE) - x) / (1 - 0.4 * a.square())
        return linear + 0.15 * (x @ x.new_tensor(MIXED).mT).sin()

    def rewarded(x: Tensor, prompts: Any) -> Tensor:
        plain = x @ x.new_tensor([0.6, -0.9, 0.4]) - 0.3 * x[:, 1].square()
        return plain + (x[:, 0] * x[:, 2]).sin()

    return Environment(
        model=CorrectedScore(score, correction, levels(), DIM, setting.device),
        sampler=sampler or bound(),
        reward=rewarded,
        prompts=["one", "two", "three"],
        seed=7,
        score_images=lambda reward, states, prompts: reward(states, prompts).detach(),
    )


@contextmanager
def halved(made: Environment) -> Iterator[None]:
    """Within this context the policy has half of its adapter."""
    with torch.no_grad():
        for parameter in made.model.parameters:
            parameter.mul_(0.5)
    yield
    with torch.no_grad():
        for parameter in made.model.parameters:
            parameter.mul_(2.0)


def bound() -> BoundDDIM:
    """DDIM's uneven steps, the last of which ends where some noise is left."""
    return DDIM(ETA).bind(levels(), STEPS)


def levels() -> DDPMTable:
    """The model's table of noise levels."""
    return table(LEVELS, ENTRIES, spacing="trailing")


def rollout(setting: Setting, group: int = 1) -> Rollout:
    """All of the numbers."""
    return Rollout(
        states=setting.tensor(STATES),
        means=setting.tensor(OLD),
        actions=setting.tensor(ACTIONS),
        noises=setting.tensor(NOISES),
        reference_scores=setting.tensor(REFERENCE),
        costs=setting.tensor(COSTS),
        values=setting.tensor(VALUES),
        rewards=setting.tensor(REWARDS),
        step_sizes=setting.tensor(SIZES),
        condition=torch.as_tensor(PROMPTS, device=setting.device),
        group=group,
        preferences=setting.tensor(PREFERENCES),
        reward_parts=setting.tensor(PARTS),
        part_weights=PART_WEIGHTS,
    )


def update(
    setting: Setting, objective: Objective, usual_moves: Tensor | None = None, **changes: Any
) -> Update:
    """What the objective makes its losses from."""
    values: Values | None = _values if objective.needs_value else None
    made = rollout(setting, objective.group)
    model = environment(setting)
    whole = Update(
        environment=model,
        rollout=made,
        advantages=lambda function: function(made),
        values=values,
        usual_moves=usual_moves,
        stream=lambda name: stream(setting.seed, "losses", name),
        own_stream=lambda name: stream(setting.seed, "own losses", name),
        old_policy=lambda: halved(model),
        batch=64,
    )
    return replace(whole, **changes)


def which(group: int) -> np.ndarray:
    """(path, step) of every row: groups, then steps, then members."""
    paths = np.arange(PATHS).reshape(-1, 1, group)
    shape = (PATHS // group, STEPS, group)
    steps = np.broadcast_to(ORDER[None, :, None], shape)
    return np.stack([np.broadcast_to(paths, shape).ravel(), steps.ravel()], axis=1)


def rows_of(setting: Setting, objective: Any, **changes: Any) -> Any:
    """All rows of an update, as its losses make them; their advantages are any numbers."""
    pairs = which(objective.group)
    joined = STEPS if objective.joins_steps else 1
    losses = objective.losses_of(update(setting, objective, **changes))
    rows = losses.rows(torch.as_tensor(pairs), joined)
    return replace(rows, advantage=setting.tensor(ADVANTAGES[tuple(pairs.T)]))


def numbers(group: int = 1) -> exact.Steps:
    """The same rows in numpy, from the model's and the sampler's formulas."""
    path, step = which(group).T
    return exact.Steps(
        mean=current(step, STATES[path, step]),
        old=OLD[path, step],
        pretrained=REFERENCE[path, step],
        noise=NOISES[path, step],
        advantage=ADVANTAGES[path, step],
        size=SIZES[step],
        horizon=float(SIZES.sum()),
        gain=SCORE_GAIN[step],
        std=STD[step],
        kl_factor=FACTOR,
    )


Formula = Callable[[exact.Steps], np.ndarray]


@cache  # formulas are the same whatever is planted
def value_and_slope(loss: Formula, group: int = 1) -> np.ndarray:
    """A formula's losses, and the slope of their sum in the current score, one after another."""
    rows = numbers(group)
    slope = exact.slope(lambda mean: loss(replace(rows, mean=mean)), rows.mean)
    return np.concatenate([np.real(loss(rows)), slope.ravel()])


def shipped(setting: Setting, objective: Any, **changes: Any) -> Tensor:
    """The same of the loss that a run takes."""
    rows = rows_of(setting, objective, **changes)
    losses = objective.loss(rows)
    (slope,) = torch.autograd.grad(losses.sum(), rows.mean)
    return torch.cat([losses.detach(), slope.flatten()])


def value_slope(node: np.ndarray, x: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Gradient of V in the states, of rows."""
    return exact.slope(lambda at: value(node, at, path), x)


def next_states(rows: exact.Steps, group: int = 1) -> np.ndarray:
    """x' of every row, by the policy in question and the noise that was drawn."""
    path, step = which(group).T
    mean = STATE_GAIN[step][:, None] * STATES[path, step] + rows.gain[:, None] * rows.mean
    return mean + rows.std[:, None] * rows.noise


def adjoints(reward_slopes: np.ndarray) -> np.ndarray:
    """-grad r, carried back by the Jacobians of the pretrained steps: [paths, nodes, dim]."""
    carried = [-reward_slopes]
    for k in range(STEPS - 1, -1, -1):
        x, alpha = STATES[:, k], NODES.alpha[k]
        bend = 0.15 * np.cos(x @ MIXED.T)[:, :, None] * MIXED
        score = bend - np.eye(DIM) / (1 - 0.4 * alpha**2)
        jacobian = STATE_GAIN[k] * np.eye(DIM) + SCORE_GAIN[k] * score
        carried.append(np.einsum("pij,pi->pj", jacobian, carried[-1]))
    return np.stack(carried[::-1], axis=1)


def filled(network: nn.Module, dtype: torch.dtype) -> list[np.ndarray]:
    """Give a network numbers for weights; they, layer by layer."""
    network.to(dtype)
    weights = []
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            weights.append(wave(*parameter.shape, size=0.35, phase=0.9 * i))
            parameter.copy_(torch.as_tensor(weights[-1]))
    return weights


def update_size() -> UpdateSize:
    """One pass of the value network over all paths at once."""
    return UpdateSize(samples=PATHS, value_epochs=1, value_batch=10**4, value_learning_rate=1e-9)


def slope_of(parameter: Any) -> Tensor:
    """Its gradient, as it is now."""
    assert parameter.grad is not None
    return parameter.grad.clone()


def rows_of_steps(
    sampler: GaussianSteps, step: Tensor, noise: Tensor, action: Tensor, old_action: Tensor
) -> Rows:
    """Rows of these steps as losses get them; the old policy is the pretrained one too."""
    gain, std, size = (
        as_like(table, noise)[step] for table in (sampler.gain, sampler.std, sampler.step_sizes)
    )
    factor = sampler.kl_factor
    return Rows(
        mean=action,
        old_mean=old_action,
        reference_score=old_action,
        noise=noise,
        advantage=torch.zeros_like(std),
        step_size=size,
        horizon=as_like(sampler.step_sizes.sum(), noise),
        score_gain=gain,
        std=std,
        kl_factor=as_like(factor, noise)[step] if isinstance(factor, Tensor) else factor,
    )
