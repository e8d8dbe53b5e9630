"""What an update's losses cost in network calls, and which scores they use."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from ctrl.noise import stream
from diffusion_envs.objectives import (
    DiffusionNFT,
    DistributionalOptimisation,
    NoisedObjective,
    ReinforceAdjointMatching,
)
from diffusion_envs.objectives.noised_data import NoisedLosses, drawn_levels, drawn_noise
from diffusion_envs.training.trainer import Trainer
from tests.diffusion_envs.objectives.small_runs import numbers, trainer

PATHS, STEPS, DRAWS = 12, 4, 3
SAMPLED, NOISED = PATHS * STEPS, PATHS * DRAWS
ON_POLICY = DiffusionNFT(draws=DRAWS, old_decay_rate=0.0)


def calls(run: Trainer, updates: int) -> list[int]:
    """Network calls of every update."""
    totals = [line["network_calls"] for line in numbers(run, updates)]
    return [now - before for now, before in zip(totals, [0, *totals], strict=False)]


# How often all noised states go through the network: in the first update, and in the next.
NETWORK_CALLS: dict[str, tuple[NoisedObjective, dict[str, int], tuple[int, int]]] = {
    "nft, which samples from an older policy from its second update on": (
        DiffusionNFT(draws=DRAWS),
        {},
        (2, 3),  # current and pretrained; then old too
    ),
    "nft without a charge": (DiffusionNFT(draws=DRAWS, velocity_weight=0.0), {}, (1, 2)),
    "nft on policy": (ON_POLICY, {}, (2, 2)),
    "nft on policy, two passes": (ON_POLICY, {"epochs": 2}, (3, 3)),
    "nft on policy, two optimiser steps": (ON_POLICY, {"minibatches": 2}, (3, 3)),
    "ram": (ReinforceAdjointMatching(draws=DRAWS), {}, (2, 2)),
    "ram, two optimiser steps": (
        ReinforceAdjointMatching(draws=DRAWS),
        {"minibatches": 2},
        (2, 2),
    ),
    "ram with path cost": (ReinforceAdjointMatching(draws=DRAWS, path_cost=True), {}, (4, 4)),
    "distributional": (DistributionalOptimisation(draws=DRAWS), {}, (1, 1)),
}


@pytest.mark.parametrize("case", NETWORK_CALLS.values(), ids=NETWORK_CALLS)
def test_data_cost_the_network_calls_that_their_loss_needs(case):
    """And what the log's path KL takes, where it is asked for, is counted apart."""
    objective, size, passes = case
    for asked, monitoring in ((False, 0), (True, 2 * SAMPLED)):
        run = trainer(objective, log_path_kl=asked, **size)
        assert calls(run, 2) == [SAMPLED + k * NOISED for k in passes]
        assert run.environment.monitoring_calls == monitoring


def losses_of(run: Trainer, objective: NoisedObjective, old: Any) -> NoisedLosses:
    """Losses of the run's samples, the same for every ``old``."""
    rollout = run.sample().rollout
    advantages = objective.advantages(rollout)
    generator = stream(3, "noise")
    return NoisedLosses(run.environment, objective, rollout, advantages, generator, old, batch=10)


def perturb(run: Trainer) -> None:
    """Change the adapter's weights."""
    with torch.no_grad():
        for k, parameter in enumerate(run.parameters):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream(k, "perturb")))


def test_old_scores_are_the_first_passes_own():
    """Those that no call was spent on, before and after the weights change."""
    run = trainer(ON_POLICY)
    perturb(run)
    free, paid = (losses_of(run, ON_POLICY, old) for old in (None, nullcontext))
    which = torch.cartesian_prod(torch.arange(PATHS), torch.arange(DRAWS))
    shuffled = which[torch.randperm(len(which), generator=stream(1, "rows"))]
    for piece in shuffled.split(7):
        one, other = free.rows(piece), paid.rows(piece)
        torch.testing.assert_close(one.old_mean, other.old_mean, rtol=1e-5, atol=1e-6)
        assert one.old_mean is not None
        assert not one.old_mean.requires_grad
    perturb(run)
    now, then = free.rows(which), paid.rows(which)
    torch.testing.assert_close(now.old_mean, then.old_mean, rtol=1e-5, atol=1e-6)
    assert now.old_mean is not None
    assert (now.old_mean - now.mean).abs().max() > 0.05


def test_the_gap_that_is_logged_is_that_of_the_losses_epsilon():
    run = trainer(ON_POLICY)
    perturb(run)
    made = losses_of(run, ON_POLICY, None)
    list(made.losses(torch.arange(PATHS), stream(0, "unused")))
    which = torch.cartesian_prod(torch.arange(PATHS), torch.arange(DRAWS))
    with torch.no_grad():
        rows = made.rows(which)
    assert rows.reference_score is not None
    sigma = rows.sigma[:, None].double()
    gap = sigma * (rows.mean.double() - rows.reference_score.double())
    found = made.numbers()["epsilon_gap"]
    assert found == pytest.approx(gap.square().mean().item(), rel=1e-5)
    assert found > 1e-4


def test_scores_that_nobody_needs_are_not_there():
    run = trainer(DistributionalOptimisation(draws=DRAWS))
    made = losses_of(run, DistributionalOptimisation(draws=DRAWS), None)
    which = torch.tensor([[0, 0], [3, 1]])
    rows = made.rows(which)
    assert rows.old_mean is None
    assert rows.reference_score is None
    assert "epsilon_gap" not in made.numbers()
    for needy in (ON_POLICY, ReinforceAdjointMatching()):
        with pytest.raises(AssertionError):
            needy.loss(rows)


# -- what is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize(("draws", "own"), [(1, 1), (2, 1), (5, 3), (6, 3)])
def test_noise_levels_are_spread_evenly_and_shared_by_pairs(draws, own, generator):
    """From 7 levels, 2 and on, for 7 * 4 paths: each level as often as any other."""
    found = drawn_levels(28, draws, 2, 9, generator)
    assert found.shape == (28, draws)
    assert found[:, :own].flatten().bincount(minlength=9).tolist() == [0, 0] + 7 * [4 * own]
    assert torch.equal(found[:, own:], found[:, : draws - own])


def test_every_place_has_every_noise_level_with_equal_probability(generator):
    """Though only 3 paths are drawn together: the levels' counts at one place are multinomial."""
    runs, levels = 20_000, 5
    found = torch.stack([drawn_levels(3, 2, 0, levels, generator)[0, 0] for _ in range(runs)])
    share = found.bincount(minlength=levels) / runs
    error = (0.2 * 0.8 / runs) ** 0.5
    assert (share - 0.2).abs().max() < 5.5 * error < 0.02


@pytest.mark.parametrize(("draws", "own"), [(1, 1), (2, 1), (5, 3), (6, 3)])
def test_the_noise_of_a_pair_is_opposite(draws, own, generator):
    found = drawn_noise(4000, draws, (2, 3), generator)
    assert found.shape == (4000, draws, 2, 3)
    assert torch.equal(found[:, own:], -found[:, : draws - own])
    size = found[:, :own].numel()
    assert abs(found[:, :own].mean().item()) < 5 / size**0.5
    assert found[:, :own].square().mean().item() == pytest.approx(1, abs=5 * (2 / size) ** 0.5)
