"""Losses of re-noised data, as a run takes them, against their formulas.

x = alpha x0 + sigma epsilon. NFT: c [r w+ |x+ - x0|^2 + (1 - r) w- |x- - x0|^2] / beta +
weight |v - v_pre|^2 with w = 1 / mean |error| held; RAM: |v - [v_pre + R (epsilon - x0 - v)]|^2
of the rectified flow, the bracket held, and less the slope of the path cost to come;
Diffusion-DPO: -log sigmoid(L_w - L_l), L = -omega / 2 (|epsilon_th - epsilon|^2 -
|epsilon_pre - epsilon|^2); distributional optimisation: weight |epsilon_th - epsilon|^2.

Levels and noises are drawn, everything else is a formula: the rows are those that ``NoisedLosses``
makes, the state between is conditioned by precisions, slopes are complex steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ctrl.noise import stream
from diffusion_envs import objectives
from diffusion_envs.objectives.noised_data import drawn_levels, drawn_noise
from verification.claim import Check, Setting, pathwise
from verification.closed_form import objectives as exact
from verification.problems.losses import ADVANTAGES, DIM, ENTRIES, PATHS, half_trained, update
from verification.problems.noised_data import ALPHA_BAR, DRAWS, SIGNS, Noised, between, numbers

SOURCE = (
    "arXiv 2509.16117 (DiffusionNFT), 2605.10759 equation 17 (RAM), 2311.12908 equation 14 "
    "(Diffusion-DPO), 2502.02954 (distributional optimisation)"
)

KL_WEIGHT = 1.7


def _nft(beta: float, weighted: bool, velocity_weight: float) -> Callable[[Noised], np.ndarray]:
    def losses(rows: Noised) -> np.ndarray:
        clipped = exact.clip(rows.advantage, -0.9, 0.9)
        optimal = 0.5 + clipped / (2 * 0.9)
        old = rows.x0(half_trained(ALPHA_BAR[rows.timestep], rows.x))
        total = np.zeros(len(rows.x))
        for share, sign in ((optimal, 1), (1 - optimal, -1)):
            error, held = (
                old + sign * beta * (rows.x0(score) - old) - rows.data
                for score in (rows.mean, rows.held)
            )
            size = np.mean(np.abs(held), axis=1) if weighted else 1.0
            total = total + share * np.mean(error**2, axis=1) / size
        velocity, reference = (
            rows.alpha * rows.velocity(score, rows.sigma / rows.alpha)
            for score in (rows.mean, rows.pretrained)
        )
        distance = np.mean((velocity - reference) ** 2, axis=1)
        return 0.9 * total / beta + velocity_weight * distance

    return losses


def _ram(rows: Noised) -> np.ndarray:
    weight = (rows.advantage / KL_WEIGHT)[:, None]
    held = rows.velocity(rows.held)
    target = rows.velocity(rows.pretrained) + weight * (rows.noise - rows.data - held)
    per_score = rows.sigma * (1 + rows.sigma / rows.alpha)  # velocity for minus the score
    if rows.cost is not None:
        cost, score = rows.cost
        depth = -2 * np.log(rows.alpha[:, 0])
        here = depth / 2 * np.sum((rows.held - rows.pretrained) ** 2, axis=1)
        target = target + per_score * (cost - here)[:, None] * (score - rows.held)
    gap = (rows.velocity(rows.mean) - target) / (1 + rows.sigma / rows.alpha)
    return np.sum(gap**2, axis=1)


def _dpo(omega: Callable[[Noised], np.ndarray]) -> Callable[[Noised], np.ndarray]:
    def losses(rows: Noised) -> np.ndarray:
        errors = [
            np.sum((-rows.sigma * score - rows.noise) ** 2, axis=1)
            for score in (rows.mean, rows.pretrained)
        ]
        gain = -0.5 * omega(rows) * (errors[0] - errors[1])
        return exact.preferred_pairs(gain, rows.advantage, 1.0)

    return losses


def _in_nats(rows: Noised) -> np.ndarray:
    before = np.concatenate([[1.0], ALPHA_BAR])[rows.timestep]
    rate = ENTRIES * np.log(before / ALPHA_BAR[rows.timestep])
    return 0.35 * rate / (1 - ALPHA_BAR[rows.timestep])


COMPARED: dict[str, tuple[Any, Callable[[Noised], np.ndarray]]] = {
    "NFT": (
        objectives.DiffusionNFT(beta=0.7, advantage_clip=0.9, velocity_weight=0.4),
        _nft(0.7, True, 0.4),
    ),
    "NFT without weights": (
        objectives.DiffusionNFT(beta=0.7, advantage_clip=0.9, velocity_weight=0.4, weighted=False),
        _nft(0.7, False, 0.4),
    ),
    "RAM": (objectives.ReinforceAdjointMatching(kl_weight=KL_WEIGHT), _ram),
    "RAM with the path cost": (
        objectives.ReinforceAdjointMatching(kl_weight=KL_WEIGHT, path_cost=True),
        _ram,
    ),
    "Diffusion-DPO": (
        objectives.DiffusionDPO(beta_per_pixel=2.3),
        _dpo(lambda rows: np.full(len(rows.x), 2.3 / DIM)),
    ),
    "Diffusion-DPO in nats": (objectives.DiffusionDPO(beta=0.35), _dpo(_in_nats)),
    "distributional optimisation": (
        objectives.DistributionalOptimisation(),
        lambda rows: rows.advantage * np.sum((rows.sigma * rows.mean + rows.noise) ** 2, axis=1),
    ),
}


def checks(setting: Setting) -> Iterator[Check]:
    """What is drawn; losses of all rows, their slopes in the current scores, and their mean."""
    timestep = drawn_levels(8, 3, 1, 17, stream(setting.seed, "levels")).double()
    own = np.sort(timestep[:, :2].flatten().numpy())  # the third of a path is the first again
    yield pathwise("levels: one in each equal interval", own, np.arange(1.0, 17.0))
    noise = drawn_noise(8, 3, (DIM,), stream(setting.seed, "noise")).double()
    pair = torch.cat([timestep[:, 2] - timestep[:, 0], (noise[:, 2] + noise[:, 0]).flatten()])
    yield pathwise("levels and noise of a pair", pair, np.zeros(8 + 8 * DIM), scale=1.0)

    for name, (objective, formula) in COMPARED.items():
        losses = objective.losses_of(update(setting, objective))
        size = objective.group
        groups = torch.arange(PATHS // size)
        each = torch.cartesian_prod(groups, torch.arange(DRAWS), torch.arange(size))
        group, draw, member = each.unbind(1)
        pairs = torch.stack([group * size + member, draw], dim=1)
        path = pairs[:, 0].numpy()
        weights = SIGNS[path] if size == 2 else ADVANTAGES[path, 0]
        rows = replace(losses.rows(pairs), advantage=setting.tensor(weights))
        found = objective.loss(rows)
        (slope,) = torch.autograd.grad(found.sum(), rows.mean)
        plain = numbers(losses, pairs.numpy(), weights)
        if objective.needs_bridge:
            plain = replace(plain, cost=between(setting, plain, pairs.numpy()))

        def free(mean: np.ndarray, plain: Noised = plain, formula: Any = formula) -> np.ndarray:
            return formula(replace(plain, mean=mean))

        want = np.concatenate([formula(plain), exact.slope(free, plain.mean, size).ravel()])
        yield pathwise(name, torch.cat([found.detach(), slope.flatten()]), want)

    objective = objectives.DistributionalOptimisation()
    made = update(setting, objective, batch=7)
    losses = objective.losses_of(made)
    pairs = torch.cartesian_prod(torch.arange(PATHS), torch.arange(DRAWS))
    total = sum(losses.losses(torch.arange(PATHS), made.stream("order")))
    assert isinstance(total, torch.Tensor)
    drawn = numbers(
        losses, pairs.numpy(), objective.advantages(made.rollout).cpu().numpy()[pairs[:, 0]]
    )
    mean = np.mean(COMPARED["distributional optimisation"][1](drawn))
    yield pathwise("mean over all noised states, in pieces", total, float(mean))


MISTAKES = r"""
diffusion_envs.objectives.noised_data.drawn_levels
    levels of independent draws | torch.randperm(paths * own, generator=generator).double()
        => torch.randint(paths * own, (paths * own,), generator=generator).double()
    pairs of different levels | timesteps[:, : draws - own] => timesteps[:, : draws - own].flip(0)
diffusion_envs.objectives.noised_data.drawn_noise
    pairs of equal noise | -noise[:, : draws - own] => noise[:, : draws - own]
diffusion_envs.objectives.noised_data.NoisedLosses.__init__
    levels: a timestep's int g^2 without their number | -len(log_abar) * torch.cat => -torch.cat
    the current policy for the old one | with old(): => if True:
    the trained policy for the pretrained one | with environment.pretrained(): => if True:
diffusion_envs.objectives.noised_data.NoisedLosses._levels
    signal for noise | abar.sqrt(), (1 - abar).sqrt() => (1 - abar).sqrt(), abar.sqrt()
    alpha-bar for alpha | abar.sqrt(), (1 => abar, (1
diffusion_envs.objectives.noised_data.NoisedLosses._bridge
    cost between: 1/2 missing | 0.5 * as_like(depth => as_like(depth
    score between: sign | -(noised - ratio => (noised - ratio
    score between: of the whole way | / variance\n => \n
diffusion_envs.denoising.noising_bridge
    state between: noise of the whole way | sigma * (added / total).sqrt() => sigma * added.sqrt()
    state between: drawn to the data only | * (noised - ratio * alpha * data) => * (noised - noised)
diffusion_envs.objectives.noised_data.NoisedLosses.losses
    sum over rows for their mean | .sum() / len(which) => .sum()
    mean of pieces summed | .sum() / len(which) => .mean()
diffusion_envs.objectives.noised_data.NoisedLosses.rows
    noise of another path | noise=self.noise[path, draw] => noise=self.noise[path.flip(0), draw]
diffusion_envs.objectives.nft.optimality
    NFT: not centred at 1/2 | 0.5 + advantage => advantage
    NFT: range of the advantage not halved | / (2 * advantage_clip) => / advantage_clip
diffusion_envs.objectives.nft.DiffusionNFT.loss
    NFT: negative is the positive | (1 + self.beta) * old - self.beta * new => self.beta * new + (1 - self.beta) * old
    NFT: beta not divided out | (pulled + pushed) / self.beta => (pulled + pushed)
    NFT: good and bad exchanged | (1 - r) * self._error => r * self._error
    NFT: weight of the velocity | self.velocity_weight * distance => distance
diffusion_envs.objectives.nft.DiffusionNFT._error
    NFT: weights not held | error.detach().abs() => error.abs()
    NFT: root mean square for the mean size | error.detach().abs().mean(1) => error.detach().square().mean(1).sqrt()
diffusion_envs.denoising.v_from_score
    velocity: sign of the data | alpha * epsilon - sigma => alpha * epsilon + sigma
diffusion_envs.objectives.ram.ReinforceAdjointMatching.loss
    RAM: three times the pull | (rows.advantage / self.kl_weight) => (3 * rows.advantage / self.kl_weight)
    RAM: cost at the noised state halved | -rows.alpha.log() * gap => -0.5 * rows.alpha.log() * gap
    RAM: sign of the path cost | wanted - cost => wanted + cost
diffusion_envs.objectives.diffusion_dpo.DiffusionDPO.weight
    Diffusion-DPO: sum for the mean | ` / rows.mean[0].numel()` => ``
    Diffusion-DPO: nats forgotten | self.beta * rows.path_kl_gain => rows.path_kl_gain
    Diffusion-DPO: errors of the score | self.beta_per_pixel * rows.sigma.square() => self.beta_per_pixel * rows.sigma
diffusion_envs.objectives.diffusion_dpo.DiffusionDPO.loss
    Diffusion-DPO: 1/2 missing | -0.5 * self.weight => -1.0 * self.weight
    Diffusion-DPO: the sign of the choice | (own - pretrained) => (pretrained - own)
    Diffusion-DPO: learned from ties | torch.where(sign == 0, 0 * loss, loss) => loss
diffusion_envs.objectives.distributional.DistributionalOptimisation.loss
    distributional: error of the score | -sigma * rows.mean - rows.noise => rows.mean - rows.noise
    distributional: not weighed | rows.advantage * error => error
shared
    standard deviation for variance in Tweedie's formula
    RAM: anchored at the current model
    RAM: target not held
    RAM: no baseline
    RAM: b for 1/b
"""
