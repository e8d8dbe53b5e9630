"""Command line: names become objects here, at the edge, and nowhere else.

python -m diffusion_envs.sd15 --model tiny --reward jpeg-compressibility --output runs/demo
python -m diffusion_envs.sd15 --objective grpo --group 8 --clip 0.5 --reward red --output runs/red
python -m diffusion_envs.sd15 --objective grpo --help
python -m diffusion_envs.sd15 --resume runs/demo
python -m diffusion_envs.sd15 evaluate runs/demo --steps 10 25 50 100 --samplers ddim dpm++ heun
"""

import dataclasses
import difflib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from diffusion_envs import objectives, rewards, samplers
from diffusion_envs.cifar10.data import CLASSES
from diffusion_envs.objectives.distributional import FirstVariation, NearTarget, mean_reward
from diffusion_envs.preferences import MissingChoicesError, Recorded
from diffusion_envs.runs.early_stopping import StopRule
from diffusion_envs.training.kl_controller import TargetKL
from diffusion_envs.training.trainer import NonFiniteError, PreflightError
from diffusion_envs.training.update_size import UpdateSize

PROGRAM = "python -m diffusion_envs.sd15"
REWARDS: dict[str, Callable[[], rewards.Reward]] = {
    "prompt-alignment": lambda: rewards.PromptAlignment("reward"),
    "jpeg-compressibility": rewards.JpegCompressibility,
    "jpeg-incompressibility": rewards.JpegIncompressibility,
    "red": lambda: rewards.Colour("red"),
    "green": lambda: rewards.Colour("green"),
    "blue": lambda: rewards.Colour("blue"),
}
JUDGES: dict[str, dict[str, Callable[[], rewards.Reward]]] = {
    "prompt-alignment": {"judge": lambda: rewards.PromptAlignment("judge")},
}
OBJECTIVES = {
    "adjoint-matching": objectives.AdjointMatching,
    "dxmi-continuous-released": objectives.ContinuousDxMIReleased,
    "dxmi-continuous": objectives.ContinuousDxMI,
    "dxmi": objectives.DxMI,
    "align-prop": objectives.AlignProp,
    "draft": objectives.DRaFT,
    "refl": objectives.ReFL,
    "dense-reward": objectives.DenseReward,
    "d3po": objectives.D3PO,
    "ddpo": objectives.DDPO,
    "ddpo-sf": objectives.DDPOScoreFunction,
    "distributional": objectives.DistributionalOptimisation,
    "dpok": objectives.DPOK,
    "grpo": objectives.GRPO,
    "tdpo": objectives.TDPO,
    "tdpo-r": objectives.TDPOReset,
    "nft": objectives.DiffusionNFT,
    "ram": objectives.ReinforceAdjointMatching,
    "score-as-action": objectives.ScoreAsAction,
    "score-as-action-sampled": objectives.ScoreAsActionSampled,
    "score-as-action-released": objectives.ScoreAsActionReleased,
}
SAMPLERS: dict[str, Callable[[float], samplers.Sampler]] = {  # of eta
    "ddim": samplers.DDIM,
    "ddim-ode": lambda eta: samplers.DDIM(0.0),
    "dpm++": lambda eta: samplers.Scheduler("DPMSolverMultistepScheduler"),
    "unipc": lambda eta: samplers.Scheduler("UniPCMultistepScheduler"),
    "heun": lambda eta: samplers.Scheduler("HeunDiscreteScheduler"),
}
CLASS_PROMPTS = tuple(f"a photo of a{'n' if name[0] in 'aeiou' else ''} {name}" for name in CLASSES)


@dataclass(frozen=True)
class Finetune:
    """Fine-tune a Stable Diffusion model with a reward.

    Attributes:
        model: "tiny", a folder in diffusers' layout, or a hub id.
        reward: prompt-alignment, jpeg-compressibility, jpeg-incompressibility, red, green, blue, or
            your own as my_module:my_function.
        prompts: what to ask for; the ten CIFAR-10 classes if not given.
        output: folder of the run.
        resume: folder of a run to go on with; every other option is then taken from it, except
            updates, which may grow.
        objective: score-as-action, ddpo, dpok, grpo, tdpo, ...; each has settings of its own, which
            follow as options (--objective grpo --help explains grpo's).
        settings: the options that are the objective's own.
        sampler: ddim; or, for objectives that learn from data (nft, ram, distributional), ddim-ode,
            dpm++, unipc or heun.
        eta: stochasticity of ddim; 1 is the SDE, 0 the ODE (which has no density).
        steps: of the sampler.
        updates: of the policy.
        guidance: classifier-free guidance scale; 1 is none.
        schedule: how much of everything an update uses.
        lora_rank: of the adapter.
        lora_targets: names of the layers that get one.
        evaluation_samples: held-out samples, before and after.
        checkpoint_every: updates between checkpoints.
        picture_every: updates between pictures and lines of over-optimisation metrics.
        target_kl: path KL to keep, nats: kl_weight, which is then only where it begins, moves
            after every update.
        stop_z: stop once a judge has fallen by so many standard errors from its best while the
            reward rises (3.5 is a good value); off if not given.
        stop_path_kl: stop once the path KL passes so many nats; off if not given.
        stop_every: updates between the looks of either stop rule.
        preferences: JSON-lines file of people's choices, {"order": [best, ..., worst]} a line, for
            objectives that learn from preferences (d3po, dense-reward); the reward's if not given.
            A run that meets samples without a choice leaves their images and waits to be resumed.
        precision: of the network.
        resolution: pixels a side; the model's own if not given.
        gradient_checkpointing: recompute activations: less memory, more time.
        device: cpu or cuda; what there is if not given.
        seed: of all randomness.
        wandb: log to Weights & Biases too.
    """

    model: str = "tiny"
    reward: str = "prompt-alignment"
    prompts: tuple[str, ...] = CLASS_PROMPTS
    output: Path | None = None
    resume: Path | None = None
    objective: str = "score-as-action"
    settings: tyro.conf.Suppress[tuple[str, ...]] = ()
    sampler: str = "ddim"
    eta: float = 1.0
    steps: int = 20
    updates: int = 50
    guidance: float = 3.0
    schedule: Annotated[UpdateSize, tyro.conf.arg(name="")] = field(default_factory=UpdateSize)
    lora_rank: int = 8
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    evaluation_samples: int = 64
    checkpoint_every: int = 1
    picture_every: int = 10
    target_kl: float | None = None
    stop_z: float | None = None
    stop_path_kl: float | None = None
    stop_every: int = 10
    preferences: str | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    resolution: int | None = None
    gradient_checkpointing: bool = False
    device: Literal["cpu", "cuda"] | None = None
    seed: int = 0
    wandb: bool = False


Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Command(Generic[Kind]):
    """All options of a run whose objective is of this kind, to explain them."""

    options: Annotated[Finetune, tyro.conf.arg(name="")]
    objective_settings: Kind


@dataclass(frozen=True)
class Evaluate:
    """How a fine-tuned model does at other step counts, paired with the pretrained one.

    Attributes:
        run: folder of a finished run.
        steps: step counts to try.
        samplers: ddim (with the run's eta), ddim-ode (eta 0), dpm++, unipc, heun.
        samples: held-out samples of each.
    """

    run: tyro.conf.Positional[Path]
    steps: tuple[int, ...] = (10, 25, 50, 100)
    samplers: tuple[str, ...] = ("ddim",)
    samples: int = 64


def _named(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """The entry of a table, or an error that suggests the nearest."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{kind} must be one of {', '.join(table)}, got {name!r}{hint}")


def _reward(name: str) -> rewards.Reward:
    if ":" in name:
        sys.path.insert(0, os.getcwd())  # a user's module beside them
        return rewards.load(name)
    try:
        return _named("reward", name, REWARDS)()
    except ValueError as error:
        raise ValueError(f"{error} (or your own, as my_module:my_function)") from None


def _objective(name: str, settings: Sequence[str]) -> objectives.Objective:
    """The named objective, with the settings that are given as ``--name value``.

    Raises:
        ValueError: there is no such objective or setting.
        SystemExit: a setting is out of range or of the wrong type; the message is printed.
    """
    kind = _named("objective", name, OBJECTIVES)
    made, unknown = tyro.cli(
        kind, args=settings, prog=PROGRAM, registry=_registry, return_unknown_args=True
    )
    if unknown:
        own, others = _flags(kind()), _flags(Finetune()) | _flags(UpdateSize())
        near = difflib.get_close_matches(unknown[0], [*own, *others], n=1, cutoff=0.75)
        raise ValueError(
            f"objective {name} has no setting {' '.join(unknown)}"
            + (f" (did you mean {near[0]}?)" if near else "")
            + f"; its settings are {' '.join(f'{k} {v}' for k, v in own.items())}, and --help "
            "shows the options of every run"
        )
    return made


def _flags(settings: Any) -> dict[str, str]:
    """Options that a dataclass makes, with its values."""
    return {
        "--" + f.name.replace("_", "-"): _variation_name(value) if callable(value) else str(value)
        for f in dataclasses.fields(settings)
        for value in [getattr(settings, f.name)]
    }


_registry = tyro.constructors.ConstructorRegistry()


@_registry.primitive_rule
def _first_variation(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[FirstVariation] | None:
    """A utility of the law of rewards: mean, or near:TARGET."""
    wanted: Any = FirstVariation
    if info.type != wanted:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="mean|near:REWARD",
        instance_from_str=lambda words: _variation(words[0]),
        is_instance=callable,
        str_from_instance=lambda made: [_variation_name(made)],
    )


def _variation(name: str) -> FirstVariation:
    if name == "mean":
        return mean_reward
    kind, _, target = name.partition(":")
    try:
        if kind != "near":
            raise ValueError(kind)
        return NearTarget(float(target))
    except ValueError:
        raise ValueError(f"must be mean or near:REWARD such as near:5.0, got {name!r}") from None


def _variation_name(made: Any) -> str:
    return f"near:{made.target}" if isinstance(made, NearTarget) else "mean"


def _stop(options: Finetune) -> StopRule | None:
    """The rule that the options ask for; judges are watched only if ``stop_z`` is given."""
    if options.stop_z is None and options.stop_path_kl is None:
        return None
    return StopRule(
        z=options.stop_z,
        max_path_kl=options.stop_path_kl,
        every=options.stop_every,
        samples=options.evaluation_samples,
    )


def _resumed(options: Finetune) -> Finetune:
    """The options that the run to resume was started with."""
    assert options.resume is not None
    config = options.resume / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"resume needs a run, but {options.resume} holds no config.json")
    try:
        stored = json.loads(config.read_text())["command"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{config} is damaged: {error}") from error
    if stored is None:
        raise ValueError(
            f"{options.resume} was not started from the command line; resume it in Python"
        )
    changed = {
        f.name
        for f in dataclasses.fields(options)
        if f.name not in ("resume", "updates")
        and getattr(options, f.name) != getattr(Finetune(), f.name)
    }
    if "settings" in changed:
        changed = changed - {"settings"} | {" ".join(options.settings)}
    if changed:
        raise ValueError(
            f"resume takes every option from the run; leave out {', '.join(sorted(changed))}"
        )
    stored["schedule"] = UpdateSize(**stored["schedule"])
    for name in ("prompts", "lora_targets", "settings"):
        stored[name] = tuple(stored[name])
    if options.updates != Finetune().updates:
        stored["updates"] = max(options.updates, stored["updates"])
    return Finetune(**stored | {"output": options.resume, "resume": options.resume})


def run_finetune(options: Finetune) -> None:
    """Fine-tune, and say in words how it went."""
    _quiet_libraries()
    from diffusion_envs.sd15 import finetune  # the function; not by its module, which would hide it

    if options.resume is not None:
        options = _resumed(options)
    if options.output is None:
        raise ValueError("output must name the folder of the run, for example --output runs/demo")
    command = json.loads(json.dumps(dataclasses.asdict(options) | {"output": None, "resume": None}))
    result = finetune(  # pyright: ignore[reportCallIssue]  # the function, not the module
        model=options.model,
        reward=_reward(options.reward),
        prompts=options.prompts,
        output=options.output,
        objective=_objective(options.objective, options.settings),
        sampler=_named("sampler", options.sampler, SAMPLERS)(options.eta),
        steps=options.steps,
        updates=options.updates,
        guidance=options.guidance,
        schedule=options.schedule,
        lora_rank=options.lora_rank,
        lora_targets=options.lora_targets,
        judges={name: make() for name, make in JUDGES.get(options.reward, {}).items()},
        evaluation_samples=options.evaluation_samples,
        checkpoint_every=options.checkpoint_every,
        picture_every=options.picture_every,
        target_kl=None if options.target_kl is None else TargetKL(options.target_kl),
        stop=_stop(options),
        preference=None if options.preferences is None else Recorded(options.preferences),
        precision=options.precision,
        resolution=options.resolution,
        gradient_checkpointing=options.gradient_checkpointing,
        device=options.device,
        seed=options.seed,
        resume=options.resume is not None,
        wandb=options.wandb,
        command=command,
    )
    table = Table(title=f"{options.reward}, {options.evaluation_samples} held-out samples")
    for heading in ("", "before", "after", "paired difference", "standard errors"):
        table.add_column(heading)
    gain = result.reward_gain
    table.add_row("reward", str(result.reward_before), str(result.reward), str(gain), _errors(gain))
    for name, judged in result.judge_gains.items():
        table.add_row(name, "", "", str(judged), _errors(judged))
    console = Console()
    console.print(table)
    if result.path_kl is not None:
        console.print(f"path KL from the pretrained model: {result.path_kl} nats")
    console.print(result.over_optimisation.sentence)
    if result.stopped is not None:
        console.print(f"stopped: {result.stopped}; exported: the model of update {result.update}")
    console.print(f"adapter:  {result.lora}  (pipe.load_lora_weights({str(result.folder)!r}))")
    console.print(f"pictures: {result.folder / 'samples'}")
    console.print(f"report:   {result.report}")


def _errors(estimate: Any) -> str:
    error = estimate.standard_error
    return f"{estimate.mean / error:+.1f}" if error > 0 else "-"


def run_evaluate(options: Evaluate) -> None:
    """Measure step transfer of a finished run; print, plot and store it."""
    _quiet_libraries()
    from diffusion_envs.sd15.build import build
    from diffusion_envs.sd15.transfer import transfer
    from diffusion_envs.training import parallel

    if not (options.run / "config.json").is_file():
        raise FileNotFoundError(f"run must be the folder of a run, but {options.run} holds none")
    run = _resumed(Finetune(resume=options.run))
    kinds = [_named("samplers", name, SAMPLERS)(run.eta) for name in options.samplers]
    built = build(
        model=run.model,
        reward=_reward(run.reward),
        prompts=run.prompts,
        sampler=samplers.DDIM(run.eta),
        steps=run.steps,
        guidance=run.guidance,
        batch=run.schedule.batch,
        lora_rank=run.lora_rank,
        lora_targets=run.lora_targets,
        precision=run.precision,
        resolution=run.resolution,
        device=parallel.start().device,
        seed=run.seed,
    )
    rows = transfer(
        options.run,
        built,
        steps=options.steps,
        samplers=kinds,
        samples=options.samples,
    )
    table = Table(
        title=f"Transfer of {options.run}, {options.samples} held-out samples, paired seeds"
    )
    for heading in ("sampler", "steps", "before", "after", "paired difference"):
        table.add_column(heading)
    for row in rows:
        table.add_row(
            row.sampler, str(row.steps), str(row.before), str(row.after), str(row.difference)
        )
    console = Console()
    console.print(table)
    console.print(
        f"stored in {options.run / 'transfer.json'}; plotted in {options.run / 'report.html'}"
    )


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _quiet_libraries() -> None:
    """Leave the terminal to our own progress bar."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _read(arguments: Sequence[str]) -> Finetune:
    """The options of a run; those that it does not know are the objective's settings.

    Raises:
        SystemExit: an option is of the wrong type, or help is asked for; it is printed.
    """
    asked = [word for word in arguments if word not in ("-h", "--help")]
    options, settings = tyro.cli(Finetune, args=asked, prog=PROGRAM, return_unknown_args=True)
    if len(asked) < len(arguments):
        _help(options.objective)
    return dataclasses.replace(options, settings=tuple(settings))


def _help(name: str) -> None:
    """Explain all options with the settings of this objective; list those of every other."""
    kind = _named("objective", name, OBJECTIVES)
    try:
        tyro.cli(
            tyro.conf.OmitArgPrefixes[Command[kind]],
            args=["--help"],
            prog=PROGRAM,
            description=Finetune.__doc__.splitlines()[0] if Finetune.__doc__ else None,
            registry=_registry,
        )
    finally:
        table = Table("objective", "settings and defaults", title="Every objective")
        for other, made in OBJECTIVES.items():
            table.add_row(other, " ".join(f"{k} {v}" for k, v in _flags(made()).items()))
        Console().print(table)


def main(arguments: list[str]) -> int:
    """Run one command; the verdict is the exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    options: Finetune | Evaluate | None = None
    try:
        if arguments[:1] == ["evaluate"]:
            options = tyro.cli(Evaluate, args=arguments[1:], prog=f"{PROGRAM} evaluate")
            run_evaluate(options)
        else:
            options = _read(arguments)
            run_finetune(options)
    except SystemExit as ended:  # help, or an option of the wrong type: it is printed
        return int(ended.code or 0)
    except KeyboardInterrupt:
        if isinstance(options, Finetune):
            folder = options.resume or options.output
            print(f"\nstopped; go on with: {PROGRAM} --resume {folder}", file=sys.stderr)
        return 130
    except MissingChoicesError as missing:
        folder = options.resume or options.output if isinstance(options, Finetune) else None
        print(f"waiting: {missing}\ngo on with: {PROGRAM} --resume {folder}", file=sys.stderr)
        return 3
    except (ValueError, TypeError, OSError, PreflightError, NonFiniteError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
