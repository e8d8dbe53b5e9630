"""Eight rows at once, twice four or eight times one: one gradient, up to float32 rounding."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrl.noise import stream
from diffusion_envs.objectives import (
    DDPO,
    GRPO,
    TDPO,
    AdjointMatching,
    AlignProp,
    DenseReward,
    DiffusionDPO,
    DiffusionNFT,
    DRaFT,
    Objective,
    ReFL,
    ReinforceAdjointMatching,
    ScoreAsAction,
)
from diffusion_envs.objectives.path_steps import score_rounding
from diffusion_envs.training.trainer import Trainer
from tests.diffusion_envs.objectives.small_runs import trainer
from verification.planting import Edit, planted

PATHS = 8
KINDS = "diffusion_envs.objectives"
# Of every kind, alone, in groups and with steps that are joined: eight rows, or 32 where a loss is
# of all steps.
CASES: dict[str, tuple[Objective, dict[str, Any]]] = {
    "steps": (DDPO(), {"train_steps": 1}),
    "all steps": (ScoreAsAction(), {}),
    "steps of groups": (GRPO(group=2, kl_weight=0.1), {"train_steps": 1}),
    "steps with targets": (AdjointMatching(), {"train_steps": 1}),
    "steps that are joined": (DenseReward(members=2), {}),
    "steps with states of a critic": (TDPO(), {"train_steps": 1}),
    "data": (DiffusionNFT(draws=1), {}),
    "data with bridges": (ReinforceAdjointMatching(draws=1, path_cost=True), {}),
    "data of pairs": (DiffusionDPO(draws=1), {}),
    "last steps": (DRaFT(last=3, kl_weight=0.3), {}),
    "one step, drawn": (ReFL(enough=1e3), {}),
    "last steps, drawn": (AlignProp(place_std=0.5, target=1e3), {}),
}


class Recorded:
    """Losses that note the gradient of every piece."""

    def __init__(self, losses: Any, run: Trainer, sizes: list[float]) -> None:
        self.of, self.run, self.sizes = losses, run, sizes
        self.check_fresh, self.numbers = losses.check_fresh, losses.numbers

    def losses(self, groups: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        before = torch.zeros(())
        for loss in self.of.losses(groups, generator):
            yield loss
            after = gradient(self.run)
            self.sizes.append(float((after - before).norm()))
            before = after


def gradient(run: Trainer) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in run.parameters if p.grad is not None])


def after_an_update(case: str, batch: int) -> tuple[Tensor, list[float]]:
    """The gradient that the optimiser read, unclipped, and the size of each piece's."""
    objective, size = CASES[case]
    run = trainer(objective, **{"samples": PATHS, "batch": batch, "max_gradient_norm": 1e30} | size)
    with torch.no_grad():
        for k, parameter in enumerate(run.parameters):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=stream(k, "perturb")))
    run.update = 1  # in the midst of a run: the adapter is not fresh
    sizes, own = list[float](), run.losses
    run.losses = lambda rollout: Recorded(own(rollout), run, sizes)
    run.step()
    return gradient(run), sizes


def deviation(case: str) -> float:
    """|difference of the gradients|, in units of what float32 rounding may make of it.

    A row's score rounds by ``score_rounding`` of its size where other rows are beside it, and with
    it what the row's gradient is proportional to.
    """
    whole, _ = after_an_update(case, 32)
    _, sizes = after_an_update(case, 1)
    gaps = [float((after_an_update(case, b)[0] - whole).norm()) for b in (8, 4, 3, 1)]
    return max(gaps) / (score_rounding(torch.float32) * sum(sizes))


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_add_up_to_one_gradient(case):
    assert deviation(case) < 1


@pytest.mark.parametrize(
    ("losses", "case"),
    [
        ("path_steps.PathLosses", "steps"),
        ("path_steps.PathLosses", "steps that are joined"),
        ("noised_data.NoisedLosses", "data of pairs"),
        ("last_steps.LastLosses", "last steps"),
    ],
)
def test_a_piece_of_the_wrong_weight_is_noticed(losses, case):
    """Its mean instead of its share: one in eight rows counts as all of them."""
    rows = "paths" if losses.startswith("last") else "which"
    wrong = Edit(f"{KINDS}.{losses}.losses", f"/ len({rows})", "/ len(piece)")
    with planted(wrong):
        assert deviation(case) > 100
