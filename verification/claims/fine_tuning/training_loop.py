"""The training loop: one update in the midst of a run, against gradients by hand.

Before the first gradient step on a roll-out the ratio of new to old policy is 1 in every
row; the gradient is that of -sum_k A_k grad log p(x_{k+1} | x_k) + kl_weight path KL,
averaged over paths, in however many pieces it is accumulated; the KL that is reported is
the KL that is trained; the pretrained weights do not move.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

from ctrl.noise import stream
from diffusion_envs.objectives import ScoreAsAction
from diffusion_envs.objectives.path_steps import PathLosses, Rows, path_kl_rate
from diffusion_envs.samplers.ddim import BoundDDIM
from diffusion_envs.training.trainer import Trainer
from verification.claim import Check, Setting, array, pathwise, rounding, stated
from verification.closed_form import linear_adapter
from verification.closed_form.linear_adapter import Sampler
from verification.problems import training_loop as case

SOURCE = '"Score as Action", arXiv 2502.01819, Theorems 3.1 and 4.1; Schulman et al. 2017'
WHY_DOUBLE = "the loop's networks, states and rewards are float32 whatever the setting"
PRECISION = torch.float32


def sampler_of(made: Trainer) -> BoundDDIM:
    """Its sampler."""
    sampler = made.environment.sampler
    assert isinstance(sampler, BoundDDIM)
    return sampler


def by_hand(made: Trainer) -> tuple[Sampler, np.ndarray, np.ndarray]:
    """The sampler's tables and the adapter."""
    network = case.network_of(made)
    alpha_bar = sampler_of(made).alpha_bar.numpy()
    a, b = (array(p) for p in (network.a, network.b))
    return Sampler(case.ETA, alpha_bar), a, b


def units_of_ratio(rows: Rows) -> float:
    """Units by which a log-ratio that is 0 may be off, the network being asked in other batches.

    As in ``objectives.path_steps.log_ratio_rounding``, but for this network: a predicted noise is a
    sum of 16 + 3 + 1 + 2 terms, and guidance multiplies the roundings of its branches by 1.7 and
    0.7. A score may so be off by sqrt(22) * 1.84 = 8.6 units of |score|, and <shift, z> by 6 times
    that in units of the transition's standard deviation. An advantage is multiplied by the ratio,
    so a loss is off by as much. Of a gradient, a mean over rows whose ratios are off by independent
    normal variables, one standard deviation is left.
    """
    size = (rows.old_mean.flatten(1).norm(dim=1) * (rows.score_gain / rows.std).abs()).max()
    return rounding(16 + 3 + 1 + 2, 6 * math.hypot(1.7, 0.7) * size.item())


def checks(setting: Setting) -> Iterator[Check]:
    """One update in the midst of a run, against gradients by hand."""
    made = case.trainer(setting)
    rollout = made.sample().rollout
    s, a, b = by_hand(made)
    x = case.flat(rollout.states[:, :-1])
    costs = linear_adapter.path_kl(s, a, b, x)
    yield pathwise("path KL of every step, by hand", rollout.costs, costs)
    order = torch.randperm(case.SAMPLES * case.STEPS, generator=stream(setting.seed, "rows"))
    which = torch.cartesian_prod(torch.arange(case.SAMPLES), torch.arange(case.STEPS))[order]
    objective = made.objective
    assert isinstance(objective, ScoreAsAction)
    with torch.no_grad():
        update = made.losses(rollout)
        assert isinstance(update, PathLosses)
        advantages = update.advantages
        rows = update.rows(which)
        pieces = [update.rows(piece) for size in (1, 5, 24) for piece in which.split(size)]
        ratio = torch.cat([objective.log_ratio(piece) for piece in pieces]).exp()
        trained, losses = path_kl_rate(rows), objective.loss(rows)
    check = pathwise("ratio before the first step is 1", ratio, torch.ones_like(ratio))
    yield stated(check, units=units_of_ratio(rows))
    path, step = which.unbind(1)
    yield pathwise("path KL of a row that is trained", trained, costs[path, step])
    a_k = array(advantages[path, step])
    check = pathwise("loss of a row", losses, case.KL_WEIGHT * costs[path, step] - a_k)
    share = float(np.abs(a_k).max()) / losses.abs().max().item()
    yield stated(check, units=share * units_of_ratio(rows))
    after = rollout.states[path, step + 1]
    mean = sampler_of(made).mean(step, rollout.states[path, step], rows.old_mean)
    std = torch.as_tensor(s.std).to(after)[step].view(-1, 1, 1, 1)
    yield pathwise("a row's noise leads to its next state", mean + std * rows.noise, after)
    want = linear_adapter.gradient(
        s, a, b, x, case.flat(rollout.noises), array(advantages), case.KL_WEIGHT
    )
    for batch in (24, 13, 3):
        one = case.trainer(setting, batch=batch)
        network = case.network_of(one)
        network.b.grad = 1e4 * torch.ones_like(network.b)  # of the update before
        frozen = [network.base.clone(), network.context.clone(), network.time.clone()]
        numbers = one.step()
        for name, parameter, grad in zip("AB", (network.a, network.b), want, strict=True):
            slope = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            check = pathwise(f"gradient in {name}, {batch} rows at once", slope, grad)
            yield stated(check, units=units_of_ratio(rows) / 6)
    kept = torch.cat([w.flatten() for w in (network.base, network.context, network.time)])
    yield pathwise("pretrained weights", kept, torch.cat([w.flatten() for w in frozen]))
    yield pathwise("path KL that is reported", numbers["path_kl"].mean, costs.sum(1).mean())


MISTAKES = r"""
diffusion_envs.objectives.path_steps.PathLosses.rows
    old log-density not detached from the new | old_mean=stored("means") => old_mean=mean
    the pretrained policy for the old one | old_mean=stored("means") => old_mean=stored("reference_scores")
    advantages not shuffled with their rows | advantage=self.advantages[path, step]
        => advantage=self.advantages[path.sort()[0], step]
    noise of another step | noise=stored("noises") => noise=rollout.noises[path, step - 1]
    prompts not shuffled with their rows | rollout.condition[which[:, 0]] => rollout.condition[which[:, 0].flip(0)]
diffusion_envs.environment.Environment._simulated
    adapter ignored while sampling | `            means.append(self._act(states, timestep.expand(len(states)), conditions))`
        => `            with self.model.pretrained():\n                means.append(self._act(states, timestep.expand(len(states)), conditions))`
diffusion_envs.models.adapters.AdapterSwitch._switch
    the reference is the policy itself | self.disable() => pass
    the adapter stays off after the reference | self.enable() => pass
diffusion_envs.objectives.score_as_action.ScoreAsAction.loss
    sign of the KL in the loss | return self._kl_cost => return -self._kl_cost
    sign of the gain in the loss | self._kl_cost(rows) - self._gain(rows) => self._kl_cost(rows) + self._gain(rows)
diffusion_envs.objectives.path_steps.path_kl_rate
    KL reported is not the KL trained: half | 0.5 * rows => 1.0 * rows
diffusion_envs.samplers.BoundDDIM.path_kl
    KL of the ancestral sampler reported | factor=self.kl_factor => factor=1.0
diffusion_envs.objectives.path_steps.PathLosses.losses
    accumulation divides twice | .sum() * steps / len(which) => .mean() * steps / len(which)
    accumulation never divides | .sum() * steps / len(which) => .mean() * steps
    sum over rows for the mean over paths | .sum() * steps / len(which) => .sum()
    last partial batch left out | in mine.split( => in mine[: len(mine) // self.batch * self.batch].split(
diffusion_envs.training.gradients.Gradients.differentiate
    gradient of the last piece alone | loss.backward() => self.optimiser.zero_grad(); loss.backward()
    gradient kept from the update before | self.optimiser.zero_grad(set_to_none=True) => pass
diffusion_envs.training.trainer.Trainer.__init__
    pretrained weights trained | [{"params": environment.model.parameters}]
        => [{"params": environment.model.score.unet.parameters()}]
diffusion_envs.objectives.path_steps.transition_log_ratio
    transition's noise of another variance in the ratio | (rows.score_gain / rows.std)
        => (rows.score_gain / rows.std.square())
shared
    timestep of another step
    path KL of full noise
"""
