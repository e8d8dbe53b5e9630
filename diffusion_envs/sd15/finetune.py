"""Fine-tune a Stable Diffusion pipeline with a reward: from prompts to an adapter and a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from ctrl import Estimate
from diffusion_envs import rewards, samplers
from diffusion_envs.objectives import Objective, ScoreAsAction
from diffusion_envs.sd15 import pipeline
from diffusion_envs.sd15.build import ATTENTION, Model, build
from diffusion_envs.training import checkpoint, parallel
from diffusion_envs.training.evaluation import Evaluation, evaluate
from diffusion_envs.training.loop import Schedule, Trainer
from diffusion_envs.training.progress import bar
from diffusion_envs.training.report import write_report
from diffusion_envs.training.run_folder import describe, open_run, write_json
from diffusion_envs.training.tracking import Tracker

PICTURES = 32  # in the grid of a step


@dataclass(frozen=True)
class Run:
    """What a finished run has to show. Estimates are over held-out seeds."""

    folder: Path
    lora: Path  # the exported adapter, for pipe.load_lora_weights(run.folder)
    report: Path
    reward_before: Estimate
    reward: Estimate
    reward_gain: Estimate  # after minus before, paired by seed
    path_kl: Estimate  # of the fine-tuned model from the pretrained one, nats
    judge_gains: Mapping[str, Estimate]  # after minus before, by held-out reward


def finetune(
    *,
    reward: rewards.Reward,
    prompts: Sequence[str],
    output: str | Path,
    model: str | Path = pipeline.TINY,
    objective: Objective | None = None,
    sampler: samplers.DDIM | None = None,
    steps: int = 20,
    updates: int = 50,
    guidance: float = 3.0,
    schedule: Schedule | None = None,
    lora_rank: int = 8,
    lora_targets: Sequence[str] = ATTENTION,
    judges: Mapping[str, rewards.Reward] | None = None,
    evaluation_samples: int = 64,
    checkpoint_every: int = 1,
    picture_every: int = 10,
    precision: str = "float32",
    resolution: int | None = None,
    gradient_checkpointing: bool = False,
    device: str | None = None,
    seed: int = 0,
    resume: bool = False,
    wandb: bool = False,
    progress: bool = True,
    command: Mapping[str, Any] | None = None,
) -> Run:
    """Fine-tune ``model`` so that its images earn more ``reward``, near its pretrained self.

    The run can be stopped at any moment and resumed with the same arguments and ``resume=True``:
    on one
    machine, with the same versions and thread count, to the same numbers bit for bit.

    Args:
        reward: (images [n, 3, h, w] in [0, 1], prompts) -> [n]; larger is better.
        prompts: what to ask for; samples take them in turn.
        output: folder of the run (``docs/run_folder.md`` says what is in it).
        model: "tiny", a folder in diffusers' layout, or a hub id.
        objective: the method; ``ScoreAsAction()`` if not given.
        sampler: how images are made; ``DDIM(eta=1.0)`` if not given.
        steps: of the sampler.
        updates: of the policy.
        guidance: classifier-free guidance scale of the policy; 1 is none.
        schedule: samples, epochs, batch and rates of an update.
        lora_rank: of the adapter.
        lora_targets: the layers that get one.
        judges: rewards that only judge, by name; the reward itself is refused.
        evaluation_samples: held-out samples, before and after, paired by seed.
        checkpoint_every: updates.
        picture_every: updates.
        precision: of the network: "float32", "bfloat16" or (CUDA only) "float16".
        resolution: pixels a side; the model's own if not given.
        gradient_checkpointing: recompute activations: less memory, more time.
        device: "cpu" or "cuda"; what there is if not given.
        seed: of all randomness.
        resume: go on with the run in ``output``.
        wandb: log to Weights & Biases too.
        progress: show a progress bar.
        command: the command line's options, stored so that it can resume by itself.

    Returns:
        Folder, adapter, report, and estimates on held-out seeds.

    Raises:
        ValueError: an argument is out of range, or arguments do not go together.
        FileExistsError: ``output`` holds something and ``resume`` is not asked for.
        FileNotFoundError: the model or the run to resume is not there.
        RewardError: the reward raises or returns something unusable.
        PreflightError: what must hold before the first update does not.
        CheckpointError: a checkpoint cannot be written or read.
    """
    objective = objective or ScoreAsAction()
    sampler = sampler or samplers.DDIM()
    schedule = schedule or Schedule()
    judges = judges or {}
    arguments = {
        name: value
        for name, value in locals().items()
        if name not in ("output", "resume", "progress", "command", "wandb", "device")
    }
    _check(arguments)
    accelerator = parallel.start()
    if device is not None and torch.device(device).type != accelerator.device.type:
        accelerator = Accelerator(cpu=torch.device(device).type == "cpu")
    built = build(
        model=model,
        reward=reward,
        prompts=prompts,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        batch=schedule.batch,
        lora_rank=lora_rank,
        lora_targets=lora_targets,
        precision=precision,
        resolution=resolution,
        device=accelerator.device,
        seed=seed,
    )
    if gradient_checkpointing:
        built.pipe.unet.enable_gradient_checkpointing()
    trainer = Trainer(
        built.environment, objective, schedule, built.parameters, accelerator=accelerator
    )
    main = accelerator.is_main_process
    folder = Path(output)
    if main:
        settings = {name: describe(value) for name, value in arguments.items()}
        folder = open_run(folder, settings, resume=resume, command=command)
    accelerator.wait_for_everyone()
    if resume and (found := checkpoint.latest(folder / "checkpoints")):
        trainer.load_state(found.state)
    before = _before(built, folder, evaluation_samples, judges, schedule.batch) if main else None
    with Tracker(folder, first_update=trainer.update, wandb=wandb, enabled=main) as tracker:
        if main and before is not None and trainer.update == 0:
            tracker.pictures(0, before.images[:PICTURES], before.prompts[:PICTURES])
        bar_shown = progress and main
        with bar("fine-tuning", updates, done=trainer.update, shown=bar_shown) as advance:
            for numbers in trainer.updates(updates):
                done = numbers["update"]
                tracker.log(numbers)
                advance(f"reward {numbers['reward']}  path KL {numbers['path_kl']} nats")
                if not main:
                    continue
                if done % picture_every == 0 and done < updates:
                    pictures = evaluate(built.environment, PICTURES, batch=schedule.batch)
                    tracker.pictures(done, pictures.images, pictures.prompts)
                if done % checkpoint_every == 0 or done == updates:
                    checkpoint.save(folder / "checkpoints", done, trainer.state())
        accelerator.wait_for_everyone()
        after = evaluate(built.environment, evaluation_samples, judges=judges, batch=schedule.batch)
        if main:
            tracker.pictures(updates, after.images[:PICTURES], after.prompts[:PICTURES])
    before = before or after  # other processes have nothing to report
    return _finish(folder, built.pipe.unet, before, after, list(prompts), write=main)


def _check(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that can be judged before anything is loaded."""
    if not callable(arguments["reward"]):
        raise TypeError(f"reward must be callable, got {arguments['reward']!r}")
    prompts = arguments["prompts"]
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of strings, got the string {prompts!r}")
    if not prompts:
        raise ValueError("prompts must name at least one prompt, got none")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompts must be non-empty strings, got {prompt!r}")
    least = {"steps": 1, "updates": 0, "evaluation_samples": 2}
    least |= {"checkpoint_every": 1, "picture_every": 1, "lora_rank": 1}
    for name, bound in least.items():
        value = arguments[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < bound:
            raise ValueError(f"{name} must be an integer of at least {bound}, got {value!r}")
    objective, sampler = arguments["objective"], arguments["sampler"]
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an objective, got {objective!r}")
    if not sampler.has_density:
        raise ValueError(
            f"{sampler} is an ODE: its transitions have no density, and the path KL between two "
            f"ODEs is "
            "infinite; train with eta > 0 (the result can be evaluated at eta = 0)"
        )
    if objective.needs_reward_gradient and not getattr(
        arguments["reward"], "differentiable", False
    ):
        raise ValueError(
            f"{type(objective).__name__} needs a reward with a gradient; "
            f"{rewards.reward_name(arguments['reward'])} does not declare differentiable = True"
        )
    for name, judge in arguments["judges"].items():
        if judge is arguments["reward"] or judge == arguments["reward"]:
            raise ValueError(
                f"judge {name!r} is the reward itself; nothing may judge its own training"
            )


def _before(
    built: Model,
    folder: Path,
    samples: int,
    judges: Mapping[str, rewards.Reward],
    batch: int,
) -> Evaluation:
    """The pretrained model on held-out seeds: from the run's folder, or made and put there."""
    path = folder / "evaluation" / "before.safetensors"  # only the adapter lies at the top
    prompts = [
        built.environment.prompts[i % len(built.environment.prompts)] for i in range(samples)
    ]
    if path.is_file():
        stored = load_file(path)
        return Evaluation(
            rewards=stored["rewards"],
            judged={name: stored[f"judged.{name}"] for name in judges},
            path_kl=stored["path_kl"],
            images=stored["images"],
            prompts=prompts,
        )
    made = evaluate(built.environment, samples, judges=judges, batch=batch, pretrained=True)
    tensors = {"rewards": made.rewards, "path_kl": made.path_kl, "images": made.images}
    tensors |= {f"judged.{name}": value for name, value in made.judged.items()}
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
    partial.replace(path)
    return made


def _finish(
    folder: Path,
    unet: nn.Module,
    before: Evaluation,
    after: Evaluation,
    prompts: list[str],
    *,
    write: bool,
) -> Run:
    """Export the adapter, write summary and report, and say how it went."""
    gain = Estimate.of(after.rewards - before.rewards)
    judge_gains = {
        name: Estimate.of(value - before.judged[name]) for name, value in after.judged.items()
    }
    run = Run(
        folder=folder,
        lora=folder / "pytorch_lora_weights.safetensors",
        report=folder / "report.html",
        reward_before=Estimate.of(before.rewards),
        reward=Estimate.of(after.rewards),
        reward_gain=gain,
        path_kl=Estimate.of(after.path_kl),
        judge_gains=judge_gains,
    )
    if write:
        pipeline.export_lora(unet, folder)
        summary: dict[str, Any] = {
            "prompts": prompts,
            "path_kl": run.path_kl.as_dict(),
            "reward": {
                "before": run.reward_before.as_dict(),
                "after": run.reward.as_dict(),
                "difference": gain.as_dict(),
            },
            "judges": {
                name: {
                    "before": Estimate.of(before.judged[name]).as_dict(),
                    "after": Estimate.of(after.judged[name]).as_dict(),
                    "difference": judge_gains[name].as_dict(),
                }
                for name in judge_gains
            },
        }
        write_json(folder / "summary.json", summary)
        write_report(folder)
    return run
