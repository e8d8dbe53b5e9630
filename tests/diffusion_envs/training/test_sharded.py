"""Weights sharded between two processes: the numbers of one process, in half the memory."""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion_envs.environment import Environment
from diffusion_envs.objectives import ScoreAsAction
from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.exported import load_exported
from diffusion_envs.runs.tracking import read_metrics
from diffusion_envs.samplers import DDIM
from diffusion_envs.sd15 import Run, StableDiffusion
from diffusion_envs.training.optimisers import AdamW8bit, NaturalGradient
from diffusion_envs.training.requirements import require_shardable
from diffusion_envs.training.sharded import Shards, clip_gradients, is_shard, local
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.models.small_pipelines import small_pipeline
from tests.diffusion_envs.sd15.calling import finetune
from tests.diffusion_envs.training.processes import run_worlds
from verification.problems.training_loop import Process

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

# Of five groups in two minibatches one process has two and the other three, in an order of chance.
SIZE = UpdateSize(
    samples=10, minibatches=2, batch=4, value_batch=10_000, value_epochs=1, average=0.5
)
OBJECTIVE = ScoreAsAction(kl_weight=0.1, learning_rate=1e-4)
CPU = torch.device("cpu")
LOGGED = ("gradient_norm", "reward", "path_kl", "value_loss")


def blue(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean of a channel."""
    return images[:, 2].mean((1, 2))


def trainer_of(folder: Path, accelerator: Any, *, sharded: bool) -> Trainer:
    """All weights of a small model train, beside their running mean and the frozen copy."""
    named = StableDiffusion(
        folder, trains="all", sharded=sharded, guidance=2.0, gradient_checkpointing=sharded
    )
    model = named.load(device=CPU, batch=4, seed=0)
    environment = Environment(
        model=model,
        sampler=DDIM(1.0).bind(model.table, 2, model.prediction_type),
        reward=blue,
        prompts=["a cat", "a ship"],
        seed=3,
        batch=4,
    )
    return Trainer(environment, OBJECTIVE, SIZE, accelerator=accelerator)


def seen(trainer: Trainer, total: int) -> dict[str, Any]:
    """What the log says of the updates up to this one, and the weights after it."""
    told: dict[str, Any] = {}
    for line in trainer.updates(total):
        values = {name: line[name] for name in LOGGED if name in line}
        told |= {f"{k} {trainer.update}": float(getattr(v, "mean", v)) for k, v in values.items()}
    state = trainer.state()
    flat = {what: [t.flatten() for t in state[what]] for what in ("adapter", "mean")}
    return told | {what: torch.cat(parts).clone() for what, parts in flat.items()}


def held(trainer: Trainer) -> int:
    """Bytes of weights, those that sampled, mean, gradients, moments, frozen copy here."""
    model: Any = trainer.environment.model
    states = trainer.optimiser.state_dict()["state"].values()
    gradients = [p.grad for p in trainer.parameters if p.grad is not None]
    frozen = [*model.score.adapter.pretrained.parameters()]
    assert len(gradients) == len(states) == len(frozen) == len(trainer.parameters)
    moments = [each[name] for each in states for name in ("exp_avg", "exp_avg_sq")]
    every = [*trainer.parameters, *trainer.old, *trainer.mean, *gradients, *moments, *frozen]
    memory = {
        (m := local(tensor.detach()).untyped_storage()).data_ptr(): m.nbytes() for tensor in every
    }
    return sum(memory.values())


@contextmanager
def counting_whole(networks: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Within it, the most numbers of these networks that were whole at once so far."""
    most = [0]

    def count(*_: Any) -> None:
        whole = [p.numel() for n in networks for p in n.parameters() if not is_shard(p)]
        most[0] = max(most[0], sum(whole))

    layers = [m for n in networks for m in n.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    yield most
    for hook in hooks:
        hook.remove()


def gradients_of(process: int, processes: int) -> list[Tensor]:
    """Of a float64 network, called three times in a row, and of its frozen copy, in two pieces.

    Before that each process calls both another number of times, for the gradient of their input.
    """
    unet = small_pipeline().unet.double()
    frozen = copy.deepcopy(unet).requires_grad_(False)
    unet.conv_in.weight.data.mul_(1.1)  # now they differ
    shards = Shards.of(unet, frozen, CPU, offloaded=True) if processes > 1 else Shards()
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(4, 4, 8, 8, generator=generator, dtype=torch.float64)
    words = torch.randn(4, 3, 24, generator=generator, dtype=torch.float64)

    def ask(network: Any, rows: Tensor, states: Tensor) -> Tensor:
        return network(states, 100 * rows, encoder_hidden_states=words[rows]).sample

    slopes, every = list[Tensor](), torch.arange(4)
    with shards.unsharded():
        for _ in range(1 + process):
            leaf = states.clone().requires_grad_()
            gap = (ask(unet, every, leaf) - ask(frozen, every, leaf)).square().sum()
            slopes = [*torch.autograd.grad(gap, leaf)]
    mine = every.chunk(processes)[process]
    for rows in mine.chunk(2):
        x = states[rows]
        for _ in range(3):
            x = x + 0.1 * ask(unet, rows, x)
        gap = (x - ask(frozen, rows, x)).square().sum() / len(mine)
        gap.backward()
    parameters = [*unet.parameters()]
    norm = clip_gradients(parameters, 0.1)
    gradients = [p.grad for p in parameters if p.grad is not None]
    whole = [getattr(g, "full_tensor", g.clone)() for g in gradients]
    return [torch.tensor(norm), *slopes, *whole]


def main(folder: Path) -> None:
    """One of two processes: what the tests below read."""
    accelerator = Accelerator(cpu=True)
    told: dict[str, Any] = {"gradients": gradients_of(accelerator.process_index, 2)}
    trainer = trainer_of(folder / "base", accelerator, sharded=True)
    model: Any = trainer.environment.model
    networks, improve = (model.score.unet, model.score.adapter.pretrained), trainer._improve_adapter

    def counted(losses: Any, rollout: Any) -> dict[str, float]:
        with counting_whole(networks) as most:
            numbers = improve(losses, rollout)
        told["whole"] = max(most[0], told.get("whole", 0))
        return numbers

    trainer._improve_adapter = counted
    told["first"] = seen(trainer, 1)
    trainer.load_state(checkpoint.load(folder / "one" / "step-000001").state)
    told["second"] = seen(trainer, 2)
    told["bytes"] = held(trainer)
    state = trainer.state()
    if accelerator.is_main_process:
        checkpoint.save(folder / "two", 2, state)
    run(folder, updates=1, sharded=True)
    torch.save(told, folder / f"{accelerator.process_index}.pt")


def run(folder: Path, updates: int, **more: Any) -> Run:
    """A whole run; of its held-out samples one process has one more than the other."""
    return finetune(
        folder / "base",
        output=folder / "run",
        trains="all",
        prompts=["a cat", "a ship"],
        reward=blue,
        updates=updates,
        steps=2,
        guidance=2.0,
        evaluation_samples=3,
        frontier_samples=3,
        progress=False,
        device="cpu",
        size=SIZE,
        objective=OBJECTIVE,
        seed=3,
        **more,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer, dict[str, Any]]:
    """One process: its trainer after two updates, and what it saw; the first one's checkpoint."""
    folder = tmp_path_factory.mktemp("sharded")
    small_pipeline().save_pretrained(folder / "base")
    trainer = trainer_of(folder / "base", Process(), sharded=True)  # of one process: no shards
    told = {"first": seen(trainer, 1)}
    checkpoint.save(folder / "one", 1, trainer.state())
    told["second"] = seen(trainer, 2)
    return folder, trainer, told


@pytest.fixture(scope="module")
def both(alone: tuple[Path, Trainer, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the two processes saw."""
    run_worlds(__name__, alone[0])
    return [torch.load(alone[0] / f"{k}.pt", weights_only=True) for k in range(2)]


# Sums in another order: of a network's gradient, some 100 units of round-off; in float32 the second
# moments of the optimiser, which divide by the gradient's size, make 100 times as much of it where
# it is small. A mean for the sum is wrong by 50 %, a clip of the shards apart by 10 %.
ROUND_OFF = {torch.float64: 2**7 * 2.0**-52, torch.float32: 2**14 * 2.0**-23}


def close(ours: Any, theirs: Any, size: Any, what: str) -> None:
    """Equal up to round-off, relative to this size."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    kind = torch.float64 if ours.dtype == torch.float64 and ours.dim() else torch.float32
    gap = float((ours - theirs).norm()) / float(torch.as_tensor(size).norm())
    assert gap <= ROUND_OFF[kind], f"{what} differs by {gap:.2g}"


@pytest.mark.slow
def test_gradients_of_shards_are_those_of_one_process_and_clipped_together(both):
    one = gradients_of(0, 1)
    norm = one[0] * 1.0
    assert norm > 1  # the clip acts
    for told in both:
        for k, (ours, theirs) in enumerate(zip(told["gradients"], one, strict=True)):
            close(ours[None], theirs[None], theirs if k < 2 else torch.tensor(0.1), f"tensor {k}")


@pytest.mark.slow
def test_updates_of_shards_are_those_of_one_process(alone, both):
    _, trainer, one = alone
    model: Any = trainer.environment.model
    start = torch.cat([p.flatten() for p in model.score.adapter.pretrained.parameters()])
    for part, lines in one.items():
        for name, value in lines.items():
            ours = both[0][part][name]
            if not isinstance(value, Tensor):
                close(ours, value, max(abs(value), 1e-3), name)
                assert both[1][part][name] == ours, name
                continue
            moved = value - start
            assert moved.norm() > 1e-3
            close(ours, value, moved, f"{name}, {part}")


@pytest.mark.slow
def test_each_process_holds_half_and_updates_make_only_blocks_whole(alone, both):
    _, trainer, _ = alone
    numbers = sum(p.numel() for p in trainer.parameters)
    for told in both:
        assert told["bytes"] <= 0.55 * held(trainer)  # tensors of uneven length are padded
        assert told["whole"] <= 0.2 * 2 * numbers


@pytest.mark.slow
def test_a_checkpoint_of_shards_goes_on_in_one_process(alone, both):
    folder, trainer, _ = alone
    stored = checkpoint.load(folder / "two" / "step-000002").state
    own = trainer.state()
    again = trainer_of(folder / "base", Process(), sharded=False)
    again.load_state(stored)
    mine, theirs = again.optimiser.state_dict(), own["optimiser"]
    assert mine["param_groups"] == theirs["param_groups"]
    for k, each in theirs["state"].items():
        assert mine["state"][k]["step"] == each["step"]
    line, expected = next(again.updates(3)), next(trainer.updates(3))
    for name in ("gradient_norm", "path_kl"):
        ours, theirs = (float(getattr(each[name], "mean", each[name])) for each in (line, expected))
        close(ours, theirs, theirs, name)


@pytest.mark.slow
def test_a_run_of_shards_exports_its_mean_and_goes_on_in_one_process(alone, both):
    folder, trainer, one = alone
    stored = checkpoint.load(folder / "run" / "checkpoints" / "step-000001").state
    written = load_file(folder / "run" / "pipeline/unet/diffusion_pytorch_model.safetensors")
    names = [name for name, _ in trainer.environment.model.score.unet.named_parameters()]
    for name, mean in zip(names, stored["mean"], strict=True):
        assert torch.equal(written[name], mean), name
    assert load_exported(trainer.environment.model, folder / "run") == 1
    ended = run(folder, updates=2, resume=True)
    first, second = read_metrics(folder / "run" / "metrics.jsonl")
    norm = one["first"]["gradient_norm 1"]
    close(first["gradient_norm"], norm, norm, "the first gradient")
    for line in (first, second):  # rewards also of denoised pictures; and two branches, thrice
        asked = SIZE.samples * 2 * line["update"]
        assert (line["reward_queries"], line["network_calls"]) == (asked * 3 // 2, asked * 6)
    assert ended.exported == folder / "run" / "pipeline"
    frontier = json.loads((folder / "run" / "frontier.json").read_text())
    assert frontier["samples"] == 3 + 3  # none was made twice


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"trains": "lora"}, "sharded must be left out where a LoRA trains"),
        ({"compile": True}, "compile must be left out with sharded"),
        ({"channels_last": True}, "channels_last must be left out with sharded"),
        ({"guidance_knots": 3}, "guidance_knots must be 0 with sharded, got 3"),
    ],
)
def test_what_cannot_be_sharded_is_refused_by_name(named, words):
    with pytest.raises(ValueError, match=words):
        StableDiffusion(**({"trains": "all", "sharded": True} | named))


def test_optimisers_that_see_whole_tensors_are_refused():
    shards = Shards([nn.Linear(2, 2)])
    for optimiser in (NaturalGradient(), AdamW8bit()):
        with pytest.raises(ValueError, match=f"{type(optimiser).__name__} is not for sharded"):
            require_shardable(shards, optimiser)
        require_shardable(Shards(), optimiser)


def test_whole_tensors_of_shards_are_refused_where_they_are_not_whole():
    network = nn.Linear(2, 2)
    shards = Shards([network])
    for ask in (lambda: shards.plain(network), lambda: shards.values([])):
        with pytest.raises(ValueError, match=r"enter trainer\.averaged\(\)"):
            ask()
