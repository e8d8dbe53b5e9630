"""Fine-tune a diffusion model with a reward: from prompts to an export and a report."""

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from diffusion_envs import rewards, samplers
from diffusion_envs.environment import Environment
from diffusion_envs.models.protocol import Model
from diffusion_envs.objectives import Objective, ScoreAsAction
from diffusion_envs.runs import checkpoint, perceptual
from diffusion_envs.runs.arguments import refuse_unknown, require_kinds
from diffusion_envs.runs.callbacks import Callbacks
from diffusion_envs.runs.early_stopping import EarlyStopping
from diffusion_envs.runs.early_stopping import check as check_stop
from diffusion_envs.runs.estimate import require_room_for
from diffusion_envs.runs.exported import export
from diffusion_envs.runs.further_samples import require_pretrained_sampler
from diffusion_envs.runs.human_choices import leaving_images
from diffusion_envs.runs.interruption import interruptible, telling
from diffusion_envs.runs.model_card import write_card
from diffusion_envs.runs.monitoring import Evaluations, Logging
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.progress import ProgressBar
from diffusion_envs.runs.prompts import read_prompts, split
from diffusion_envs.runs.refused import RefusedSteps
from diffusion_envs.runs.resuming import Checkpoints
from diffusion_envs.runs.run_folder import open_run
from diffusion_envs.runs.run_frontier import compare
from diffusion_envs.runs.settings import describe
from diffusion_envs.runs.summary import Run, summarise
from diffusion_envs.runs.tracking import Tracker, require_wandb
from diffusion_envs.training import parallel
from diffusion_envs.training.optimisers import AdamW, Optimiser
from diffusion_envs.training.requirements import require_inputs
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

_SIZE, _OPTIONS = UpdateSize(), RunOptions()


@runtime_checkable
class Loadable(Protocol):
    """Names a model and how it is used, such as ``sd15.StableDiffusion``: a frozen dataclass."""

    @property
    def device(self) -> str | None:
        """Either "cpu" or "cuda"; None for what there is."""
        ...

    def load(self, *, device: torch.device, batch: int, seed: int) -> Model:
        """The model with a fresh adapter, on a device, with so many rows at once."""
        ...


@runtime_checkable
class Guided(Protocol):
    """A loaded model that can be used at another classifier-free guidance scale."""

    def with_guidance(self, scale: float, /) -> Model:
        """The same network and adapter at another scale, with calls counted apart."""
        ...


def finetune(
    model: Loadable | Model,
    *,
    reward: rewards.Reward,
    prompts: Iterable[str] | Path,
    output: str | Path,
    objective: Objective | None = None,
    optimiser: Optimiser | None = None,
    sampler: samplers.Sampler | None = None,
    steps: int = 20,
    updates: int = 50,
    size: UpdateSize = _SIZE,
    options: RunOptions = _OPTIONS,
    seed: int = 0,
    resume: bool = False,
) -> Run:
    """Fine-tune ``model`` so that its images earn more ``reward``, near its pretrained self.

    The run can be stopped at any moment and resumed with the same arguments and ``resume=True``: on
    one machine, with the same versions and thread count, to the same numbers bit for bit.

    Args:
        model: what to load (a ``Loadable``, such as ``sd15.StableDiffusion``), or a loaded model.
        reward: (images [n, 3, h, w] in [0, 1], prompts) -> [n]; larger is better.
        prompts: what to ask for, or a file of it (``runs.prompts``); samples take them in turn.
        output: folder of the run (``docs/run_folder.md`` says what is in it).
        objective: the method; ``ScoreAsAction()`` if left out.
        optimiser: how a gradient becomes a step; ``AdamW()`` if left out.
        sampler: how images are made; ``DDIM(eta=1.0)`` if left out. Objectives that learn from data
            (DiffusionNFT, ReinforceAdjointMatching, DistributionalOptimisation) take any,
            ``Scheduler("DPMSolverMultistepScheduler")`` for one.
        steps: of the sampler.
        updates: of the policy; a run that is resumed may get more.
        size: samples, epochs, batch and rates of an update.
        options: how the run is watched, stored and stopped.
        seed: of all randomness.
        resume: go on with the run in ``output``.

    Returns:
        Folder, export, report, and estimates on held-out seeds.

    Raises:
        TypeError: an argument is of another kind; the message says what to pass.
        ValueError: an argument is out of range, or arguments do not go together; or the device is
            not there; or a run is resumed with other settings or another reward.
        FileExistsError: ``output`` holds something and ``resume`` is not asked for, or another
            process is at work in it.
        FileNotFoundError: the model or the run to resume is not there.
        RewardError: the reward raises or returns something unusable, or is late.
        PreflightError: what must hold before the first update does not.
        NonFiniteError: an update is refused, as its numbers are not finite; it is kept in the
            run's folder and can be repeated (``runs.refused``).
        MemoryLimitError: memory runs out however few rows go through the network at once.
        CheckpointError: a checkpoint cannot be written or read.
        LostProcessError: another process died, hangs or is too late; the last whole update is kept.
        MissingChoicesError: recorded choices do not reach as far as the samples; the images to
            choose from are in the run's folder, and the run can be resumed.
    """
    objective = ScoreAsAction() if objective is None else objective
    sampler = samplers.DDIM() if sampler is None else sampler
    require_kinds(
        reward=reward,
        objective=objective,
        optimiser=optimiser,
        sampler=sampler,
        size=size,
        options=options,
        seed=seed,
        output=output,
    )
    prompts = read_prompts(prompts)
    optimiser = None if optimiser == AdamW() else optimiser  # stored as runs of before are
    settings = {
        name: describe(value)
        for name, value in locals().items()
        if name not in ("output", "resume")
    }
    training, held_out_prompts = options.prompts_of(prompts, seed)
    places = range(len(prompts))
    if options.held_out:
        places, _ = split(len(prompts), options.held_out, seed)
    _check(reward, objective, sampler, steps, updates, options)
    size.require_updates(updates)
    with interruptible() as interruption, ExitStack() as stack:
        device = None if model.device is None else str(model.device)
        accelerator = parallel.start(device, options.process_timeout)
        stack.enter_context(parallel.telling_others())
        main = accelerator.is_main_process
        if not isinstance(model, Model):
            model = model.load(device=accelerator.device, batch=size.batch, seed=seed)
        environment = make_environment(
            model,
            sampler=sampler,
            steps=steps,
            reward=reward,
            prompts=training,
            seed=seed,
            batch=size.batch,
            reward_timeout=options.reward_timeout,
            overlap=options.overlap,
        )
        held_out = environment
        if held_out_prompts is not training or options.evaluation_guidance is not None:
            held_out = evaluated(environment, held_out_prompts, options.evaluation_guidance)
        require_pretrained_sampler(environment, options.frontier_samples)
        trainer = Trainer(
            environment,
            objective,
            size,
            accelerator=accelerator,
            preference=options.preference,
            data=options.data,
            target_kl=options.target_kl,
            log_path_kl=options.log_path_kl,
            optimiser=optimiser or AdamW(),
        )
        require_room_for(trainer)
        folder = Path(output).expanduser()
        if main:
            stack.enter_context(open_run(folder, settings, resume=resume))
            again = f"stopped; the same call with resume=True goes on with the run in {folder}"
            stack.enter_context(telling(again))
        parallel.wait(accelerator)

        stopping = None
        if options.stop is not None:
            place = folder / "best"
            stopping = EarlyStopping.of(
                options.stop, trainer, held_out, place, options.judges, size.batch
            )
        ruled = [] if stopping is None else [stopping]
        checkpoints = Checkpoints(folder / "checkpoints", trainer, options.checkpoint_every, ruled)
        checkpoints.load()
        trainer.refused = RefusedSteps(folder, trainer, checkpoints)
        tracker = stack.enter_context(
            Tracker(
                folder,
                first_update=trainer.update,
                picture_every=options.picture_every,
                wandb=options.wandb,
                wandb_name=options.wandb_name,
                enabled=main,
            )
        )
        evaluations = Evaluations(trainer, held_out, tracker, folder, options, size.batch, updates)
        bar = ProgressBar(updates, done=trainer.update, shown=options.progress and main)
        logging = Logging(tracker, trainer, places)
        callbacks = Callbacks([logging, bar, evaluations, *ruled, checkpoints], accelerator)

        with parallel.ending_together(accelerator), callbacks.running() as reason:
            total = updates if reason is None else trainer.update
            for numbers in leaving_images(trainer.updates(total), folder, accelerator):
                reason = callbacks.after(numbers)
                interruption.check()
                if reason is not None:
                    break
        parallel.wait(accelerator)

        stop = None
        if stopping is not None:
            stop = stopping.summary(trainer.update, reason, updates, len(options.judges))
            if reason is not None:
                best = parallel.broadcast_from_main(stopping.decision.best, accelerator)
                trainer.load_state(checkpoint.load(folder / "best" / f"step-{best:06d}").state)
        before, after, metrics = evaluations.last(finished=reason is None)
        learned = environment.sampler.parameters
        with trainer.averaged():
            exported = export(model, folder, trainer.update, learned) if main else folder
        frontier = compare(
            held_out,
            before,
            after,
            folder / "evaluation" / "frontier.safetensors",
            samples=options.frontier_samples,
            kl_weight=trainer.objective.reward_per_nat,
            batch=size.batch,
            progress=options.progress and main,
            accelerator=accelerator,
        )
        run = summarise(
            folder,
            exported,
            before,
            after,
            metrics,
            update=trainer.update,
            stop=stop,
            write=main,
            frontier=frontier,
        )
        if main:
            write_card(folder)
        parallel.wait(accelerator)  # torchrun takes the first that ends for the end of all
        return run


def refuse_misplaced(arguments: Mapping[str, Any], model: type, how: str) -> None:
    """Refuse arguments of ``finetune`` that belong to one of its dataclasses.

    Args:
        arguments: what was given.
        model: dataclass of the family's model.
        how: how one says what is of the model.

    Raises:
        TypeError: an argument belongs to the model, the sizes, the options, the objective, the
            sampler or the optimiser, or there is none of this name; the message says what to write.
    """
    places: dict[Any, str] = {
        model: f"how the model is used by model={how}",
        UpdateSize: "sizes of an update by size=UpdateSize(...)",
        RunOptions: "how the run is watched by options=RunOptions(...)",
    }
    for kind, place in places.items():
        for name in arguments.keys() & {f.name for f in dataclasses.fields(kind)}:
            raise TypeError(
                f"{name} is no argument of finetune: say {place}, {kind.__name__}({name}="
                f"{arguments[name]!r})"
            )
    known = inspect.signature(finetune).parameters
    refuse_unknown(arguments, known, arguments.get("objective"))


def make_environment(
    model: Model,
    *,
    sampler: samplers.Sampler,
    steps: int,
    reward: rewards.Reward,
    prompts: Sequence[str],
    seed: int,
    batch: int = 64,
    reward_timeout: float | None = None,
    overlap: int = 0,
) -> Environment:
    """A loaded model with a sampler on its noise levels, a reward and prompts."""
    return Environment(
        model=model,
        sampler=sampler.bind(model.table, steps, model.prediction_type),
        reward=reward,
        prompts=list(prompts),
        seed=seed,
        batch=batch,
        reward_timeout=reward_timeout,
        overlap=overlap,
    )


def evaluated(
    environment: Environment, prompts: Sequence[str], guidance: float | None
) -> Environment:
    """The environment of held-out samples: the same model, at a guidance scale of its own.

    Args:
        environment: that of training.
        prompts: of held-out samples.
        guidance: their classifier-free guidance scale; training's if None.

    Raises:
        ValueError: the model has no guidance.
    """
    model = environment.model
    if guidance is not None:
        if not isinstance(model, Guided):
            raise ValueError(
                f"evaluation_guidance is for models with classifier-free guidance, and "
                f"{type(model).__name__} has none: leave it out"
            )
        model = model.with_guidance(guidance)
    return dataclasses.replace(environment, model=model, prompts=list(prompts))


def _check(
    reward: rewards.Reward,
    objective: Objective,
    sampler: samplers.Sampler,
    steps: int,
    updates: int,
    options: RunOptions,
) -> None:
    """Refuse arguments that can be checked before anything is loaded."""
    for name, value, bound in (("steps", steps, 1), ("updates", updates, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < bound:
            raise ValueError(f"{name} must be an integer of at least {bound}, got {value!r}")
    if objective.needs_steps and not sampler.has_density:
        what = "an ODE" if isinstance(sampler, samplers.DDIM) else "a black box"
        raise ValueError(
            f"{sampler.label} is {what}: its transitions have no density, of which "
            f"{type(objective).__name__} learns; train with DDIM(eta > 0) (the result can be "
            "evaluated with any sampler), or with an objective that learns from data "
            "(DiffusionNFT, ReinforceAdjointMatching, DistributionalOptimisation)"
        )
    stop = options.stop
    if not sampler.has_density and stop is not None and stop.max_path_kl is not None:
        raise ValueError(
            f"max_path_kl needs a path KL, and that of {sampler.label} is infinite or not known; "
            "let a judge stop the run, or train with DDIM(eta > 0)"
        )
    require_inputs(objective, reward, options.preference, options.target_kl, options.data)
    for name, judge in options.judges.items():
        if judge is reward or judge == reward:
            raise ValueError(
                f"judge {name!r} is the reward itself; nothing may judge its own training"
            )
    if stop is not None:
        check_stop(stop, options.judges)
    if options.distance is not None:
        perceptual.weights_file()
    if options.wandb:
        require_wandb()
