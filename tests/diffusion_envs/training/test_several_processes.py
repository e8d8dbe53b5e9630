"""One, two, three and four processes, of which each has another number of samples, do the same.

Everything is float64, so that what differs is a mistake: samples, advantages, gradients, value
networks, counts and logged numbers, of two updates.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_envs.environment import Environment
from diffusion_envs.exact.problems import GaussianProblem, table
from diffusion_envs.models.exact import CorrectedScore
from diffusion_envs.objectives import (
    D3PO,
    DDPO,
    GRPO,
    AdjointMatching,
    DiffusionNFT,
    DRaFT,
    DxMIFromData,
    Objective,
    ReinforceAdjointMatching,
    ScoreAsAction,
    ZerothOrderAdjointMatching,
)
from diffusion_envs.rewards import Weighted
from diffusion_envs.rollout import Share
from diffusion_envs.samplers import DDIM
from diffusion_envs.training import parallel
from diffusion_envs.training.optimisers import AdamW, NaturalGradient, Optimiser
from diffusion_envs.training.trainer import Trainer, dealt
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.training.processes import run_worlds
from verification.problems.training_loop import Process

WORLDS = (2, 3, 4)
ADAMW = AdamW()
PATHS, STEPS = 14, 3  # of four processes each has 3 or 4 paths, or 1 or 2 groups of two


@dataclass(frozen=True)
class Case:
    """What is trained, and in which pieces."""

    objective: Objective
    minibatches: int = 1  # 7: of one group, or of two paths, so that most processes have none
    train_steps: int | None = None
    clip: float = 1e9  # where it acts, a gradient's size is not seen
    optimiser: Optimiser = ADAMW


CASES: dict[str, Case] = {
    "score-as-action": Case(ScoreAsAction(kl_weight=0.3, learning_rate=0.02)),
    "clipped": Case(ScoreAsAction(kl_weight=0.3, learning_rate=0.02), clip=0.01),
    "ddpo": Case(DDPO(learning_rate=0.02), minibatches=7),
    "some steps": Case(DDPO(learning_rate=0.02), minibatches=7, train_steps=2),
    "grpo": Case(GRPO(group=2, learning_rate=0.02, shared_start=True), minibatches=7),
    "parts": Case(GRPO(group=2, learning_rate=0.02, advantage="parts", whole_batch_std=True)),
    "d3po": Case(D3PO(learning_rate=0.02)),
    "adjoint matching": Case(AdjointMatching(kl_weight=0.3, learning_rate=0.02)),
    "draft": Case(DRaFT(last=2, kl_weight=0.1, learning_rate=0.02)),
    "dxmi from data": Case(DxMIFromData(learning_rate=0.02, energy_width=4)),
    "nft": Case(DiffusionNFT(learning_rate=0.02), minibatches=7),
    "ram": Case(ReinforceAdjointMatching(learning_rate=0.02)),
    "natural gradient": Case(DDPO(learning_rate=0.02), optimiser=NaturalGradient(share=0.04)),
}
# what perturbs its rewards is drawn process by process, as it is batch by batch
OWN_DRAWS = {"zeroth order": Case(ZerothOrderAdjointMatching(pairs=1, learning_rate=0.02))}


class Data:
    """What samples should look like."""

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, 2, generator=generator)


class Near:
    """Squared distance from 0; it counts the states that it was asked for."""

    def __init__(self) -> None:
        self.counts = Counter[str]()  # names that no process knows before

    def __call__(self, states: Tensor, prompts: Sequence[str]) -> Tensor:
        self.counts["asked"] += len(states)
        return states.square().sum(1)


def in_double() -> Environment:
    """The exact problem with noise, network and rewards in float64."""
    environment = GaussianProblem().environment(DDIM(0.8).bind(table(), STEPS), 5)
    assert isinstance(environment.model, CorrectedScore)
    environment.model.correction.double()
    normals: Any = environment._normals
    double: Any = environment
    double._normals = lambda *asked: normals(*asked).double()
    return environment


def seen(case: Case, accelerator: Accelerator) -> dict[str, Any]:
    """What two updates of one process see and leave."""
    environment, objective = in_double(), case.objective
    if objective.compares_parts:
        near = Near()
        environment.reward = Weighted({"own": (environment.reward, 1.0), "near": (near, -2.0)})
    size = UpdateSize(
        samples=PATHS,
        minibatches=case.minibatches,
        train_steps=case.train_steps,
        batch=5,
        value_batch=2 * (STEPS + 1),
        value_epochs=2,
        max_gradient_norm=case.clip,
    )
    trainer = Trainer(
        environment,
        objective,
        size,
        accelerator=accelerator,
        data=Data() if objective.needs_data else None,
        optimiser=case.optimiser,
    )
    if trainer.critic is not None:
        trainer.critic.network.double()
        if trainer.critic.usual_moves is not None:
            critic: Any = trainer.critic
            critic.usual_moves = critic.usual_moves.double()
    told: dict[str, Any] = {}
    for update in range(2):
        rollout = trainer.sample().rollout
        told |= {f"states {update}": rollout.states, f"rewards {update}": rollout.rewards}
        losses: Any = trainer.losses(rollout)
        if hasattr(losses, "advantages"):
            told[f"advantages {update}"] = losses.advantages
        environment.reward_queries = environment.model.calls = 0
        line = trainer.step()
        told |= {f"{n} {update}": float(getattr(v, "mean", v)) for n, v in line.items()}
        told |= {
            f"gradient {update}.{k}": p.grad.clone()
            for k, p in enumerate(trainer.parameters)
            if p.grad is not None
        }
        if trainer.critic is not None:
            state = trainer.critic.network.state_dict()
            told |= {f"critic {update}.{k}": v.clone() for k, v in state.items()}
            if trainer.critic.usual_moves is not None:
                told[f"moves {update}"] = trainer.critic.usual_moves
        told |= {f"adapter {update}.{k}": p.detach() * 1 for k, p in enumerate(trainer.parameters)}
    return told


ROWS = ("states", "rewards", "advantages")  # of one process's samples; the rest is common to all
LOCAL = ("seconds", "memory")


def main(folder: Path) -> None:
    """One of several processes: everything is run, and written down."""
    world = parallel.start("cpu")
    cases = {name: seen(case, world) for name, case in (CASES | OWN_DRAWS).items()}
    torch.save(cases, folder / f"{world.process_index} of {world.num_processes}.pt")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, dict[str, Any]]]]:
    """What the processes of each world saw."""
    folder = tmp_path_factory.mktemp("processes")
    run_worlds(__name__, folder, sizes=WORLDS)
    return {
        size: [torch.load(folder / f"{k} of {size}.pt", weights_only=True) for k in range(size)]
        for size in WORLDS
    }


def deviation(value: Any, expected: Any) -> float:
    """Of one tensor from another, relative to its norm."""
    one, other = (torch.as_tensor(v, dtype=torch.float64) for v in (value, expected))
    assert one.shape == other.shape
    gap, size = float((one - other).norm()), float(other.norm())
    return gap / size if size else gap


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """What one process sees."""
    return {name: seen(case, Process()) for name, case in (CASES | OWN_DRAWS).items()}


# Sums in another order: a few units of round-off of float64 (2e-16), of which the optimiser's
# second moments and the exponential of a log-ratio make at most 700 here. The mildest mistake, a
# mean of the means of shares that differ by one path, changes a gradient by 3 %.
SAME = 1e-12
LEFT = ("natural_residual",)  # what conjugate gradients leave of a small equation is round-off


@pytest.mark.slow
@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_processes_does_as_one(name, size, alone, worlds):
    every = [of_process[name] for of_process in worlds[size]]
    for what, value in alone[name].items():
        kind = what.rpartition(" ")[0]
        if kind in LOCAL + LEFT:
            continue
        if kind in ROWS:
            together = torch.cat([told[what] for told in every])
        else:
            together = every[0][what]
            for told in every[1:]:
                assert torch.equal(torch.as_tensor(told[what]), torch.as_tensor(together)), what
        assert deviation(together, value) <= SAME, what


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN_DRAWS)
def test_processes_agree_where_each_draws_by_itself(name, alone, worlds):
    """Samples, rewards and counts are those of one process; the weights are the same on all."""
    one, every = alone[name], [of_process[name] for of_process in worlds[2]]
    for what, value in one.items():
        kind = what.rpartition(" ")[0]
        if kind in ("network_calls", "reward_queries") or what in ("states 0", "rewards 0"):
            joined = [told[what] for told in every]
            together = torch.cat(joined) if kind in ROWS else joined[0]
            assert deviation(together, value) <= SAME, what
        if kind in ("adapter", "gradient"):
            assert torch.equal(every[0][what], every[1][what])
    changed = [deviation(every[0][what], one[what]) for what in one if what.startswith("gradient")]
    assert max(changed) > 1e-3  # other draws: else both processes drew the first one's


def test_shares_cover_all_groups_and_differ_by_one_at_most():
    for groups in range(1, 12):
        for processes in range(1, groups + 1):
            shares = [Share.even(groups, 3, k, processes) for k in range(processes)]
            assert [p for share in shares for p in share.paths] == list(range(3 * groups))
            sizes = {len(share.groups) for share in shares}
            assert max(sizes) - min(sizes) <= 1
            assert sum(share.weight for share in shares) == pytest.approx(1)


@pytest.mark.parametrize("minibatches", [1, 2, 3, 4, 6, 12])
def test_every_group_is_in_one_minibatch_and_neighbours_are_in_different_ones(minibatches):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    parts = dealt(order, minibatches)
    assert sorted(torch.cat(parts).tolist()) == list(range(12))
    for part in parts:
        assert sorted((part // minibatches).tolist()) == list(range(12 // minibatches))
        places = [order.tolist().index(group) for group in part.tolist()]
        assert places == sorted(places)  # as drawn
    if minibatches == 1:
        assert torch.equal(parts[0], order)
