"""Fine-tune a Stable Diffusion pipeline with a reward: from prompts to an adapter and a report."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from ctrl import Estimate
from diffusion_envs import rewards, samplers
from diffusion_envs.models import stable_diffusion_pipeline as pipeline
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.objectives import NoisedObjective, Objective, ScoreAsAction
from diffusion_envs.preferences import Preference
from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.early_stopping import Decision, Look, StopRule, Watch
from diffusion_envs.runs.early_stopping import check as check_stop
from diffusion_envs.runs.evaluation import WATCHED, Evaluation, by_prompt, evaluate
from diffusion_envs.runs.human_choices import leaving_images
from diffusion_envs.runs.over_optimisation import Verdict, embeddings, metrics, verdict
from diffusion_envs.runs.progress import bar
from diffusion_envs.runs.report import write_report
from diffusion_envs.runs.run_folder import describe, open_run, write_json
from diffusion_envs.runs.tracking import OVER_OPTIMISATION, Tracker, read_metrics, require_wandb
from diffusion_envs.sd15.build import ATTENTION, Model, build
from diffusion_envs.training import kl_controller as control
from diffusion_envs.training import parallel
from diffusion_envs.training.requirements import require_inputs
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

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
    path_kl: Estimate | None  # from the pretrained model, nats; None of an ODE or a black box
    judge_gains: Mapping[str, Estimate]  # after minus before, by held-out reward
    metrics: Mapping[str, Estimate]  # of runs/over_optimisation.py: diversity and distance too
    over_optimisation: Verdict  # of the exported model
    update: int  # after which the exported model was taken
    stopped: str | None = None  # why the stop rule ended the run, if it did


def finetune(
    *,
    reward: rewards.Reward,
    prompts: Sequence[str],
    output: str | Path,
    model: str | Path = pipeline.TINY,
    objective: Objective | None = None,
    sampler: samplers.Sampler | None = None,
    steps: int = 20,
    updates: int = 50,
    guidance: float = 3.0,
    schedule: UpdateSize | None = None,
    lora_rank: int = 8,
    lora_targets: Sequence[str] = ATTENTION,
    judges: Mapping[str, rewards.Reward] | None = None,
    evaluation_samples: int = 64,
    checkpoint_every: int = 1,
    picture_every: int = 10,
    target_kl: control.TargetKL | None = None,
    stop: StopRule | None = None,
    preference: Preference | None = None,
    precision: str = "float32",
    resolution: int | None = None,
    gradient_checkpointing: bool = False,
    device: str | None = None,
    seed: int = 0,
    resume: bool = False,
    wandb: bool | str = False,
    progress: bool = True,
    command: Mapping[str, Any] | None = None,
) -> Run:
    """Fine-tune ``model`` so that its images earn more ``reward``, near its pretrained self.

    The run can be stopped at any moment and resumed with the same arguments and ``resume=True``: on
    one machine, with the same versions and thread count, to the same numbers bit for bit.

    Args:
        reward: (images [n, 3, h, w] in [0, 1], prompts) -> [n]; larger is better.
        prompts: what to ask for; samples take them in turn.
        output: folder of the run (``docs/run_folder.md`` says what is in it).
        model: "tiny", a folder in diffusers' layout, or a hub id.
        objective: the method; ``ScoreAsAction()`` if not given.
        sampler: how images are made; ``DDIM(eta=1.0)`` if not given. Objectives that learn from
            data (DiffusionNFT, ReinforceAdjointMatching, DistributionalOptimisation) take any,
            ``Scheduler("DPMSolverMultistepScheduler")`` for one.
        steps: of the sampler.
        updates: of the policy.
        guidance: classifier-free guidance scale of the policy; 1 is none.
        schedule: samples, epochs, batch and rates of an update.
        lora_rank: of the adapter.
        lora_targets: the layers that get one.
        judges: rewards that only judge, by name; the reward itself is refused.
        evaluation_samples: held-out samples, before and after, paired by seed.
        checkpoint_every: updates.
        picture_every: updates between pictures and lines of over-optimisation metrics.
        target_kl: moves the objective's kl_weight so that the path KL tends to a target.
        stop: when to end the run early; then the best model that its looks saw is exported.
        preference: who prefers which sample, for objectives that learn from preferences: the
            reward if not given, ``preferences.Recorded(file)`` for people's choices, or a function.
        precision: of the network: "float32", "bfloat16" or (CUDA only) "float16".
        resolution: pixels a side; the model's own if not given.
        gradient_checkpointing: recompute activations: less memory, more time.
        device: "cpu" or "cuda"; what there is if not given.
        seed: of all randomness.
        resume: go on with the run in ``output``.
        wandb: log to Weights & Biases too: True, or the name of the project ("ctrl" if not given).
        progress: show a progress bar.
        command: the command line's options, stored so that it can resume by itself.

    Returns:
        Folder, adapter, report, and estimates on held-out seeds.

    Raises:
        ValueError: an argument is out of range, or arguments do not go together; or the device is
            not there.
        FileExistsError: ``output`` holds something and ``resume`` is not asked for.
        FileNotFoundError: the model or the run to resume is not there.
        RewardError: the reward raises or returns something unusable.
        PreflightError: what must hold before the first update does not.
        CheckpointError: a checkpoint cannot be written or read.
        MissingChoicesError: recorded choices do not reach as far as the samples; the images to
            choose from are in the run's folder, and the run can be resumed.
    """
    objective = objective or ScoreAsAction()
    sampler = sampler or samplers.DDIM()
    schedule = schedule or UpdateSize()
    judges = judges or {}
    embedders = embeddings(reward, judges)
    arguments = {
        name: value
        for name, value in locals().items()
        if name not in ("output", "resume", "progress", "command", "wandb", "device", "embedders")
    }
    _check(arguments)
    if wandb:
        require_wandb()
    accelerator = parallel.start(device)
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
        assert isinstance(built.environment.model, TextToImageUNet)
        built.environment.model.score.recompute_activations()
    trainer = Trainer(
        built.environment,
        objective,
        schedule,
        accelerator=accelerator,
        target_kl=target_kl,
        preference=preference,
    )
    main = accelerator.is_main_process
    folder = Path(output)
    if main:
        settings = {name: describe(value) for name, value in arguments.items()}
        folder = open_run(folder, settings, resume=resume, command=command)
    accelerator.wait_for_everyone()
    watch = None if stop is None else _watch(stop, built, trainer, folder, judges, schedule.batch)
    if resume and (found := checkpoint.latest(folder / "checkpoints")):
        trainer.load_state(found.state)
        if watch is not None:
            watch.load_state(found.state["looks"])
    before = _before(built, folder, evaluation_samples, judges, schedule.batch) if main else None
    with Tracker(folder, first_update=trainer.update, wandb=wandb, enabled=main) as tracker:
        if main and before is not None and trainer.update == 0:
            tracker.pictures(0, before.images[:PICTURES], before.prompts[:PICTURES])
        bar_shown = progress and main
        if main and watch is not None:
            watch.begin()
        decision = _agreed(watch, accelerator)
        total = updates if decision is None or decision.reason is None else trainer.update
        with bar("fine-tuning", updates, done=trainer.update, shown=bar_shown) as advance:
            for numbers in leaving_images(trainer.updates(total), folder, accelerator):
                done = numbers["update"]
                tracker.log(numbers)
                nats = f"  path KL {numbers['path_kl']} nats" if "path_kl" in numbers else ""
                advance(f"reward {numbers['reward']}{nats}")
                if main and before is not None and done % picture_every == 0 and done < updates:
                    few = min(PICTURES, evaluation_samples)
                    seen = evaluate(built.environment, few, judges=judges, batch=schedule.batch)
                    tracker.pictures(done, seen.images, seen.prompts)
                    tracker.over_optimisation(done, metrics(before, seen, embedders))
                if main and watch is not None:
                    watch.after(done)
                decision = _agreed(watch, accelerator)
                ended = decision is not None and decision.reason is not None
                if main and (done % checkpoint_every == 0 or done == updates or ended):
                    checkpoint.save(folder / "checkpoints", done, _state(trainer, watch))
                if ended:
                    break
        accelerator.wait_for_everyone()
        last, reason = trainer.update, None if decision is None else decision.reason
        if decision is not None and reason is not None:
            best = checkpoint.load(folder / "best" / f"step-{decision.best:06d}")
            trainer.load_state(best.state)
        after = evaluate(built.environment, evaluation_samples, judges=judges, batch=schedule.batch)
        before = before or after  # other processes have nothing to report
        numbers = metrics(before, after, embedders)
        if main:
            tracker.pictures(trainer.update, after.images[:PICTURES], after.prompts[:PICTURES])
            if reason is None:
                tracker.over_optimisation(trainer.update, numbers)
    stopped = None
    if stop is not None:
        bound = stop.false_stop_bound(updates, len(judges))
        when = None if reason is None else last
        stopped = {"update": when, "reason": reason, "false_stop_bound": bound}
    return _finish(
        folder,
        built.environment.model,
        before,
        after,
        list(prompts),
        numbers=numbers,
        update=trainer.update,
        stopped=stopped,
        write=main,
    )


def _state(trainer: Trainer, watch: Watch | None) -> dict[str, Any]:
    """What a checkpoint holds: the trainer's state, and the stop rule's looks."""
    looks = {} if watch is None else {"looks": watch.state()}
    return trainer.state() | looks


def _watch(
    rule: StopRule,
    built: Model,
    trainer: Trainer,
    folder: Path,
    judges: Mapping[str, rewards.Reward],
    batch: int,
) -> Watch:
    """Looks of the rule, on seeds of their own; the best model is kept in ``best/``."""

    def look(update: int, pretrained: bool) -> Look:
        seen = evaluate(
            built.environment,
            rule.samples,
            judges=judges,
            batch=batch,
            pretrained=pretrained,
            stream=WATCHED,
        )
        return Look.of(update, seen)

    def keep(update: int) -> None:
        # two, because the newest is written before the checkpoint that says it is the best
        checkpoint.save(folder / "best", update, trainer.state(), keep=2)

    return Watch(rule, look, keep)


def _agreed(watch: Watch | None, accelerator: Accelerator) -> Decision | None:
    """The main process's decision, on all of them."""
    if watch is None:
        return None
    mine = watch.decision if accelerator.is_main_process else Decision(0)
    stop = parallel.main_says(int(mine.reason is not None), accelerator)
    best = parallel.main_says(mine.best, accelerator)
    return Decision(best, (mine.reason or "the main process says so") if stop else None)


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
    if not (sampler.has_density or isinstance(objective, NoisedObjective)):
        what = "an ODE" if isinstance(sampler, samplers.DDIM) else "a black box"
        raise ValueError(
            f"{sampler.label} is {what}: its transitions have no density, of which "
            f"{type(objective).__name__} learns; train with DDIM(eta > 0) (the result can be "
            "evaluated with any sampler), or with an objective that learns from data "
            "(DiffusionNFT, ReinforceAdjointMatching, DistributionalOptimisation)"
        )
    stop = arguments["stop"]
    if not sampler.has_density and stop is not None and stop.max_path_kl is not None:
        raise ValueError(
            f"max_path_kl needs a path KL, and that of {sampler.label} is infinite or not known; "
            "let a judge stop the run, or train with DDIM(eta > 0)"
        )
    require_inputs(objective, arguments["reward"], arguments["preference"], arguments["target_kl"])
    for name, judge in arguments["judges"].items():
        if judge is arguments["reward"] or judge == arguments["reward"]:
            raise ValueError(
                f"judge {name!r} is the reward itself; nothing may judge its own training"
            )

    if arguments["stop"] is not None:
        check_stop(arguments["stop"], arguments["judges"])


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
    model: Any,
    before: Evaluation,
    after: Evaluation,
    prompts: list[str],
    *,
    numbers: Mapping[str, Estimate],
    update: int,
    stopped: Mapping[str, Any] | None,
    write: bool,
) -> Run:
    """Export the adapter, write summary and report, and say how it went."""
    gain = Estimate.of(after.rewards - before.rewards)
    judge_gains = {
        name: Estimate.of(value - before.judged[name]) for name, value in after.judged.items()
    }
    lines = read_metrics(folder / OVER_OPTIMISATION) if write else []
    final = {name: value.as_dict() for name, value in numbers.items()} | {"update": update}
    said = verdict([line for line in lines if line["update"] < update] + [final])
    assert said is not None  # there is a line
    run = Run(
        folder=folder,
        lora=folder / "pytorch_lora_weights.safetensors",
        report=folder / "report.html",
        reward_before=Estimate.of(before.rewards),
        reward=Estimate.of(after.rewards),
        reward_gain=gain,
        path_kl=numbers.get("path_kl"),
        judge_gains=judge_gains,
        metrics=numbers,
        over_optimisation=said,
        update=update,
        stopped=None if stopped is None else stopped["reason"],
    )
    if write:
        model.export(folder)
        summary: dict[str, Any] = {
            "prompts": prompts,
            "update": update,
            "stop": stopped,
            **({} if run.path_kl is None else {"path_kl": run.path_kl.as_dict()}),
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
        summary["by_prompt"] = {
            prompt: {part: value.as_dict() for part, value in parts.items()}
            for prompt, parts in by_prompt(before, after).items()
        }
        plain = {name: value.as_dict() for name, value in numbers.items()}
        summary["over_optimisation_metrics"] = plain
        summary["over_optimisation"] = dataclasses.asdict(said)
        write_json(folder / "summary.json", summary)
        write_report(folder)
    return run
