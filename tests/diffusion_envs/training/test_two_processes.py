"""Two processes against one: the same samples, advantages, gradients, critic and counts."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_envs.exact.problems import GaussianProblem, table
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
)
from diffusion_envs.rewards import Weighted
from diffusion_envs.samplers import DDIM
from diffusion_envs.training.optimisers import AdamW, NaturalGradient
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.training.processes import run_two
from verification.claims.training_loop import Process

PATHS, STEPS = 8, 3
OBJECTIVES: dict[str, Objective] = {
    "score-as-action": ScoreAsAction(kl_weight=0.3, learning_rate=0.02),
    "ddpo": DDPO(learning_rate=0.02),
    "grpo": GRPO(group=2, learning_rate=0.02, shared_start=True),
    "parts": GRPO(group=2, learning_rate=0.02, advantage="parts", whole_batch_std=True),
    "d3po": D3PO(learning_rate=0.02),
    "adjoint matching": AdjointMatching(kl_weight=0.3, learning_rate=0.02),
    "draft": DRaFT(last=2, kl_weight=0.1, learning_rate=0.02),
    "dxmi from data": DxMIFromData(learning_rate=0.02, energy_width=4),
}
FROM_DATA: dict[str, Objective] = {  # their noise is drawn process by process
    "nft": DiffusionNFT(learning_rate=0.02),
    "ram": ReinforceAdjointMatching(learning_rate=0.02),
    "natural gradient": DDPO(learning_rate=0.02),  # so are the rows of its metric
}
# A clip that acts on every gradient here sees whether it comes before the mean over processes; with
# none that acts, a sum for the mean is seen.
CLIPS = {"clipped": 0.01, "not clipped": 1e9}


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


def seen(objective: Objective, accelerator: Accelerator, clip: float) -> dict[str, Any]:
    """What two updates of one process see and leave."""
    environment = GaussianProblem().environment(DDIM(0.8).bind(table(), STEPS), 5)
    size = UpdateSize(
        samples=PATHS, batch=100, value_batch=10_000, value_epochs=2, max_gradient_norm=clip
    )
    if objective is OBJECTIVES["parts"]:
        near = Near()
        environment.reward = Weighted({"own": (environment.reward, 1.0), "near": (near, -2.0)})
    data = Data() if objective.needs_data else None
    optimiser = (
        NaturalGradient(share=0.5) if objective is FROM_DATA["natural gradient"] else AdamW()
    )
    trainer = Trainer(
        environment, objective, size, accelerator=accelerator, data=data, optimiser=optimiser
    )
    told: dict[str, Any] = {}
    for update in range(2):
        (line,) = trainer.updates(update + 1)
        told |= {
            f"{name} {update}": float(getattr(line[name], "mean", line[name])) for name in line
        }
        told |= {
            f"gradient {update}.{k}": p.grad.clone()
            for k, p in enumerate(trainer.parameters)
            if p.grad is not None
        }
    rollout = trainer.sample().rollout
    told |= {"states": rollout.states, "rewards": rollout.rewards}
    losses: Any = trainer.losses(rollout)
    if hasattr(losses, "advantages"):
        told["advantages"] = losses.advantages
    if trainer.critic is not None:
        told |= {f"critic.{k}": v for k, v in trainer.critic.network.state_dict().items()}
        if trainer.critic.usual_moves is not None:
            told["usual_moves"] = trainer.critic.usual_moves
    told |= {f"adapter.{k}": p.detach() for k, p in enumerate(trainer.parameters)}
    return told


ROWS = ("states", "rewards", "advantages")  # of one process's samples; the rest is common to all
LOCAL = ("seconds", "memory")


def main(folder: Path) -> None:
    """One of two processes: everything is run, and written down."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    found = {
        f"{name}, {clip}": seen(made, accelerator, width)
        for name, made in (OBJECTIVES | FROM_DATA).items()
        for clip, width in CLIPS.items()
    }
    torch.save(found, folder / f"{accelerator.process_index}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What the two processes saw."""
    folder = tmp_path_factory.mktemp("processes")
    code = "import sys; from pathlib import Path; from tests.diffusion_envs.training."
    code += "test_two_processes import main; main(Path(sys.argv[1]))"
    run_two(code, folder)
    return [torch.load(folder / f"{k}.pt", weights_only=True) for k in range(2)]


def close(found: Any, expected: Any, what: str) -> None:
    """Equal up to the round-off of float32 sums in another order, after two updates.

    The networks see rows in other batches: some 100 units of round-off in a gradient, of which the
    optimiser's second moments make as much again. The mildest mistake, a clip before the mean,
    changes a gradient by 10 %.
    """
    torch.testing.assert_close(
        torch.as_tensor(found),
        torch.as_tensor(expected),
        rtol=1e-3,
        atol=1e-5,
        msg=lambda text: f"{what}: {text}",
    )


@pytest.mark.slow
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_do_as_one(name, clip, both):
    one = seen(OBJECTIVES[name], Process(), CLIPS[clip])
    first, second = (each[f"{name}, {clip}"] for each in both)
    for what, value in one.items():
        if what.split()[0] in LOCAL:
            continue
        if what in ROWS:
            close(torch.cat([first[what], second[what]]), value, what)
            continue
        close(first[what], value, what)
        assert torch.equal(torch.as_tensor(first[what]), torch.as_tensor(second[what])), what


@pytest.mark.slow
@pytest.mark.parametrize("name", FROM_DATA)
def test_two_processes_agree_where_each_draws_its_own_noise(name, both):
    """Samples, advantages and counts are those of one process; the weights are the same on both."""
    one = seen(FROM_DATA[name], Process(), CLIPS["clipped"])
    first, second = (each[f"{name}, clipped"] for each in both)
    for what, value in one.items():
        if what.startswith(("adapter", "gradient 0", "gradient 1", "network_calls", "reward 0")):
            assert torch.equal(torch.as_tensor(first[what]), torch.as_tensor(second[what])), what
        if what.startswith(("network_calls", "reward_queries", "reward 0")):
            close(first[what], value, what)
    moved = max(float((one[w] - first[w]).abs().max()) for w in one if w.startswith("adapter"))
    assert moved > 0  # other noise: else both processes drew the first one's


def critic_after(index: int) -> list[Tensor]:
    """A critic's weights after one update of small batches, as one of two processes fits it."""
    environment = GaussianProblem().environment(DDIM(0.8).bind(table(), STEPS), 5)
    size = UpdateSize(samples=PATHS, value_batch=2 * (STEPS + 1), value_epochs=1)
    trainer = Trainer(environment, OBJECTIVES["score-as-action"], size, accelerator=Process())
    sample = trainer.sample()
    assert trainer.critic is not None
    trainer.critic.accelerator = Process(index, 2)
    trainer.critic.improve(sample.rollout, sample.denoised_rewards, 0)
    return [p.detach() for p in trainer.critic.network.parameters()]


def test_each_process_shuffles_its_own_way():
    """The same roll-out, fitted by the first and by the second of two processes."""
    first, again, second = critic_after(0), critic_after(0), critic_after(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
