"""The critic: what it says of every node, its loss of returns to go, and its gradient.

V = c_skip r(x0_hat) + c_out F(t, x), F = location + scale * network, and r at the end. Returns
to go charge the step's own cost too, G_k = r - b sum_{j >= k} cost_j; the loss is
int (G - V)^2 over the horizon, and h (F(T, x) - r)^2 where a value's own slope is used there.

The network is a multilayer perceptron, written out in numpy; slopes in its last layer are complex
steps.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from diffusion_envs import objectives
from diffusion_envs.objectives.tdpo import active_neurons
from diffusion_envs.training.critic import Critic
from diffusion_envs.training.value_network import constant_weights, cosine_weights, linear_weights
from verification.claim import Check, Setting, pathwise
from verification.closed_form import objectives as exact
from verification.problems import losses as case
from verification.problems.training_loop import Process

SOURCE = (
    '"Score as Action", arXiv 2502.01819, value network; Jia & Zhou 2022a, martingale loss; '
    "arXiv 2407.00626, algorithm 1"
)
WHY_DOUBLE = "the critic's clock and costs are float32 whatever the setting, as its network is"
PRECISION = torch.float32

B = 0.7
DENOISED = case.wave(case.PATHS, case.STEPS + 1, size=0.9, phase=0.6)
TIMES = np.tile(case.NODES.s, case.PATHS)
EVERY = case.STATES.reshape(-1, case.DIM)
_ALPHA, _SIGMA = case.NODES.alpha[:-1, None], case.NODES.sigma[:-1, None]
GUESSES = np.concatenate(
    [(case.STATES[:, :-1] + _SIGMA**2 * case.OLD) / _ALPHA, case.STATES[:, -1:]], axis=1
).reshape(-1, case.DIM)


def _layer(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return x @ weight.T + bias


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def hidden(weights: list[np.ndarray], times: np.ndarray, x: np.ndarray) -> list[np.ndarray]:
    """Neurons of the value network on x, a prompt of zeros, the time, its sines and cosines."""
    turns = np.pi / 2 * np.arange(1, 5) * times[:, None]
    seen = [x, 0 * times[:, None], times[:, None], np.sin(turns), np.cos(turns)]
    first = _silu(_layer(np.concatenate(seen, axis=1), *weights[:2]))
    return [first, _silu(_layer(first, *weights[2:4]) + first)]


def residual(weights: list[np.ndarray], times: np.ndarray, x: np.ndarray) -> np.ndarray:
    """F of the value network."""
    answer = _layer(hidden(weights, times, x)[1], *weights[4:])[:, 0]
    return case.REWARDS.mean() + np.std(case.REWARDS, ddof=1) * answer


def values(F: np.ndarray, skip: np.ndarray, out: np.ndarray) -> np.ndarray:
    """skip r(x0_hat) + out F, and r at the end: [paths, nodes]."""
    mixed = skip * DENOISED + out * F.reshape(case.PATHS, case.STEPS + 1)
    return np.concatenate([mixed[:, :-1], case.REWARDS[:, None]], axis=1)


TO_GO = np.stack(
    [
        case.REWARDS - B * sum(case.COSTS[:, j] for j in range(k, case.STEPS))
        for k in range(case.STEPS)
    ]
    + [case.REWARDS],
    axis=1,
)
SKIP, OUT = np.cos(np.pi / 2 * case.NODES.s), np.sin(np.pi / 2 * case.NODES.s)


def _value_loss(V: np.ndarray, end: np.ndarray | None = None) -> np.ndarray:
    paid = np.sum((TO_GO - V)[:, :-1] ** 2 * case.SIZES, axis=1)
    if end is not None:
        paid = paid + case.SIZES[-1] * (end - case.REWARDS) ** 2
    return paid / case.SIZES.sum()


def _critic(setting: Setting, objective: Any, weights: Any = None) -> Critic:
    made = case.environment(setting)
    return Critic(made, objective, case.update_size(), Process(), "claim", weights)


def _values(setting: Setting) -> Iterator[Check]:
    made = case.rollout(setting)
    seen = setting.tensor(DENOISED)
    charged = objectives.ScoreAsAction(kl_weight=B)
    designs = (
        ("sine", None, SKIP, OUT),
        ("linear", linear_weights, 1 - case.NODES.s, case.NODES.s),
        ("cosine", cosine_weights, SKIP, 1 - SKIP),
        ("constant", constant_weights, 1 + 0 * SKIP, 1 + 0 * SKIP),
    )
    for name, design, skip, out in designs:
        critic = _critic(setting, charged, design)
        weights = case.filled(critic.network, setting.dtype)
        critic.calibrate(made.rewards)
        want = values(residual(weights, TIMES, EVERY), skip, out)
        got = critic.values_along(made, seen)
        assert got is not None
        yield pathwise(f"{name} weights: values of all nodes", got, want)
    sees = _critic(setting, objectives.TDPO())
    weights = case.filled(sees.network, setting.dtype)
    sees.calibrate(made.rewards)
    want = values(residual(weights, TIMES, GUESSES), 0 * SKIP, 1 + 0 * OUT)
    got = sees.values_along(made, None)
    assert got is not None
    yield pathwise("values of denoised states", got, want)
    shown = sees.shown(made)
    seen_by = hidden(weights, TIMES, GUESSES)
    want = [np.maximum(x, 0).mean(0) for x in seen_by]
    active = active_neurons(sees.network, shown, 0.9)
    want = np.concatenate([each > 0.9 * each.mean() for each in want]).astype(float)
    yield pathwise("TDPO-R: neurons that are active", torch.cat(active).double(), want)
    node = np.array([2, 0, 4, 1, 3, 4])
    x, path = setting.tensor(case.STATES[:, 1]), torch.arange(case.PATHS, device=setting.device)
    got = sees.at(made)(torch.as_tensor(node, device=setting.device), x, path)
    want = residual(weights, case.NODES.s[node], case.STATES[:, 1])
    yield pathwise("value of any states", got, want)


def _learning(setting: Setting) -> Iterator[Check]:
    made, part = case.rollout(setting), torch.arange(case.PATHS)
    for name, objective in (
        ("score as action", objectives.ScoreAsAction(kl_weight=B)),
        ("DxMI", objectives.ContinuousDxMI(kl_weight=B)),
    ):
        critic = _critic(setting, objective)
        weights = case.filled(critic.network, setting.dtype)
        critic.calibrate(made.rewards)
        seen = setting.tensor(DENOISED) if name == "score as action" else None
        skip, out = (SKIP, OUT) if name == "score as action" else (0 * SKIP, 1 + 0 * OUT)

        def loss(last: np.ndarray, w: Any = weights, s: Any = skip, o: Any = out) -> np.ndarray:
            changed = [*w[:4], last[None, :-1], last[-1:]]
            F = residual(changed, TIMES, EVERY)
            end = F.reshape(case.PATHS, -1)[:, -1] if s[0] == s[-1] else None
            return _value_loss(values(F, s, o), end)

        last = np.concatenate([weights[4].ravel(), weights[5]])
        critic._differentiated(made, seen, setting.tensor(TO_GO), part, of=case.PATHS)
        leave = critic.network.leave
        slopes = torch.cat([case.slope_of(leave.weight).flatten(), case.slope_of(leave.bias)])
        want = exact.slope(loss, last) / case.PATHS / np.var(case.REWARDS, ddof=1)
        yield pathwise(f"{name}: slope of the loss", slopes, want)
        told = critic.improve(made, seen, 0)
        yield pathwise(f"{name}: loss of the returns to go", told["value_loss"], loss(last).mean())


def checks(setting: Setting) -> Iterator[Check]:
    """Values, returns and losses."""
    yield from _values(setting)
    yield from _learning(setting)


MISTAKES = r"""
diffusion_envs.training.critic.Critic.values
    reward of the end forgotten | rollout.rewards[:, None]], dim=1 => values[:, -1:]], dim=1
    times of one path for all | times, denoised_rewards, residual => times.flip(0), denoised_rewards, residual
diffusion_envs.training.critic.Critic.shown
    times in the order of paths | times.repeat(paths) => times.repeat_interleave(paths)
    TDPO sees the noisy state | sampler.denoised(states[:, :-1], rollout.means) => states[:, :-1]
diffusion_envs.training.critic.Critic.at
    value of the next node | as_like(times, states)[node] => as_like(times, states)[node - 1]
diffusion_envs.training.critic.Critic._fit
    own cost of a step not charged | rollout.costs.flip(1).cumsum(1).flip(1) => (rollout.costs.flip(1).cumsum(1).flip(1) - rollout.costs)
    costs earned | returns - kl_weight * to_go => returns + kl_weight * to_go
    costs so far for those to go | rollout.costs.flip(1).cumsum(1).flip(1) => rollout.costs.cumsum(1)
diffusion_envs.training.critic.Critic._differentiated
    sum over paths learned | losses.sum() / of => losses.sum()
    units of the reward left in the loss | mean / self.network.scale.square() => mean / self.network.scale
diffusion_envs.training.critic.Critic._losses
    end not fitted | losses + rollout.step_sizes[-1] * gap => losses + 0 * gap
    end of unit weight | rollout.step_sizes[-1] * gap.square() => gap.square()
diffusion_envs.objectives.tdpo.active_neurons
    active: against the largest | dormant * activity.mean() => dormant * activity.max()
    active: by the last sample | .transpose(0, 1).flatten(1).mean(1) => .transpose(0, 1).flatten(1)[:, -1]
diffusion_envs.training.value_network._Residual.calibrate
    scale is the variance | self.scale.copy_(std) => self.scale.copy_(std.square())
diffusion_envs.training.value_network._Residual.clock
    cosines for sines | phases.sin(), phases.cos() => phases.cos(), phases.sin()
diffusion_envs.training.value_network._Residual.rewarded
    location forgotten | self.location + self.scale => self.scale
diffusion_envs.training.value_network.linear_weights
    linear weights exchanged | 1 - noising_time, noising_time => noising_time, 1 - noising_time
diffusion_envs.training.value_network.cosine_weights
    cosine: a sine after all | skip, 1 - skip => skip_weights(noising_time)
diffusion_envs.training.value_network.constant_weights
    constant: no network | torch.ones_like(noising_time), torch.ones_like => torch.ones_like(noising_time), torch.zeros_like
shared
    steps not weighted by time
    right end of each step
    sine and cosine exchanged
    half a turn for a quarter
"""
