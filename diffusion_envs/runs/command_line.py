"""The command line of a model family: names become objects here, at the edge, and nowhere else.

Its options are the fields of the dataclasses that Python uses (the family's model, ``UpdateSize``,
``RunOptions``, ``StopRule``, the objective), with their descriptions and defaults. To resume a run
is to take the fields of the run as defaults.
"""

import dataclasses
import difflib
import inspect
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import docstring_parser
import tyro
from rich.console import Console
from rich.table import Table

from diffusion_envs import objectives, rewards, samplers
from diffusion_envs.models.trainable import LEARNING_RATE_OF_ALL
from diffusion_envs.preferences import MissingChoicesError
from diffusion_envs.rewards import registry
from diffusion_envs.rewards.registry import OWN
from diffusion_envs.runs import presets
from diffusion_envs.runs.early_stopping import StopRule
from diffusion_envs.runs.estimate import RunCost, estimate
from diffusion_envs.runs.finetune import finetune
from diffusion_envs.runs.interruption import interruptible
from diffusion_envs.runs.method_names import (
    CLASS_PROMPTS,
    JUDGES_OF,
    OBJECTIVES,
    OPTIMISERS,
    SAMPLERS,
    class_named,
    name_of,
    sampler_named,
)
from diffusion_envs.runs.option_words import STOP, WORDS, reward_words, variation_name
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.prompts import COLUMN, from_words, read_prompts
from diffusion_envs.runs.run_folder import read_settings
from diffusion_envs.runs.settings import Unnamed, describe, differences, rebuild
from diffusion_envs.runs.summary import Run
from diffusion_envs.training import optimisers
from diffusion_envs.training.trainer import NonFiniteError, PreflightError
from diffusion_envs.training.update_size import UpdateSize

_FLAGS = {"preference": "preferences"} | {name: flag for flag, name in STOP.items()}
_NEVER, _REWARD = StopRule(z=None), registry.Words(("prompt-alignment",))
ModelOptions = TypeVar("ModelOptions")
ObjectiveSettings = TypeVar("ObjectiveSettings")
OptimiserSettings = TypeVar("OptimiserSettings")


@dataclass(frozen=True)
class Family:
    """A family of models with a command line.

    Attributes:
        program: how it is called.
        model: dataclass of what to load (``runs.finetune.Loadable``), with defaults.
        defaults: of a run's options, such as its reward, where they are the family's own.
        learning_rate: largest of an objective if none is named, as where all weights train; None
            for that of adapters.
        commands: further commands by name, each called with the words that follow it.
    """

    program: str
    model: Callable[..., Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None

    commands: Mapping[str, Callable[[Sequence[str]], None]] = field(default_factory=dict)

    def settings(self, kind: Callable[[], Any]) -> Any:
        """An objective as it is if no setting is named."""
        made = kind()
        if self.learning_rate is None or made.learning_rate <= self.learning_rate:
            return made
        return dataclasses.replace(made, learning_rate=self.learning_rate)


def _explained(name: str) -> Any:
    """An option of ``finetune``, described and defaulted there."""
    documented = {p.arg_name: p.description for p in docstring_parser.parse(_DOC).params}
    return tyro.conf.arg(help=documented[name])


_DOC = finetune.__doc__ or ""
_DEFAULTS = {name: p.default for name, p in inspect.signature(finetune).parameters.items()}


@dataclass(frozen=True, kw_only=True)
class Finetune(Generic[ModelOptions, ObjectiveSettings, OptimiserSettings]):
    """Fine-tune a diffusion model with a reward.

    Attributes:
        reward: prompt-alignment, class-confidence, jpeg-compressibility, jpeg-incompressibility,
            red, green, blue, or your own as my_module:my_function or path/file.py:my_function; or a
            sum of several with their weights, such as red=1 jpeg-compressibility=0.5.
        reward_model: where the model of a learned reward or judge is: a folder, a file, a hub id or
            a URL; NAME=PLACE for each where several need one.
        prompts: what to ask for, or a file: text with one prompt a line, JSON lines, a JSON list
            or CSV, whose further columns reach the reward (docs/run_folder.md); the ten CIFAR-10
            classes if left out, and one that asks for nothing of a model without prompts.
        prompt_column: of a file with columns, the one with the prompt.
        preset: options to begin with, over which those of the command line win: jpeg, aesthetic,
            imagereward, pickscore, or a file of your own (diffusion_envs/presets shows how).
        output: folder of the run.
        resume: folder of a run to go on with; every other option is then the run's. Updates may
            grow; device, progress and wandb may be chosen anew.
        objective: score-as-action, ddpo, dpok, grpo, tdpo, ..., or your own as my_module:MyClass;
            each has settings of its own, which follow as options (--objective grpo --help explains
            grpo's).
        optimiser: adamw, bounded-adamw, natural-gradient, diagonal-metric, scaled-lora, or your own
            as my_module:MyClass; with settings of its own, like the objective.
        sampler: ddim; where betas grow linearly, as CIFAR-10's do, dxmi-10 and ours-4, with learned
            standard deviations dxmi-10-learned and ours-4-learned, which take 10 and 4 steps if
            none are named; or, for objectives that learn from data (nft, ram, distributional),
            ddim-ode, dpm++, unipc, heun, or any scheduler of diffusers by the name of its class.
        eta: stochasticity of ddim: 1, the SDE, if left out; 0 is the ODE (which has no density).
        estimate: only say what the run would cost, peak memory and seconds of an update, without
            loading weights; the exit code is 0 if it fits, 1 if not.
    """

    model: ModelOptions
    reward: rewards.Reward = _REWARD
    reward_model: tuple[str, ...] = ()
    prompts: tuple[str, ...] = CLASS_PROMPTS
    prompt_column: str = COLUMN
    preset: str | None = None
    output: Path | None = None
    resume: Path | None = None
    objective: str = "score-as-action"
    optimiser: str = "adamw"
    sampler: samplers.Sampler = SAMPLERS["ddim"]
    eta: float | None = None
    estimate: bool = False
    steps: Annotated[int, _explained("steps")] = _DEFAULTS["steps"]
    updates: Annotated[int, _explained("updates")] = _DEFAULTS["updates"]
    seed: Annotated[int, _explained("seed")] = _DEFAULTS["seed"]
    size: UpdateSize = field(default_factory=UpdateSize)
    options: RunOptions = field(default_factory=RunOptions)
    stop: StopRule = _NEVER
    objective_settings: ObjectiveSettings
    optimiser_settings: OptimiserSettings

    def arguments(self) -> dict[str, Any]:
        """Those of ``finetune``.

        Raises:
            ValueError: eta is not for this sampler; or something that the run was started with has
                no name.
        """
        sampler, stop = self.sampler, None
        if self.eta is not None:
            if not isinstance(sampler, samplers.DDIM) or sampler == SAMPLERS["ddim-ode"]:
                raise ValueError(f"eta is for the sampler ddim, and this one is {sampler.label}")
            sampler = samplers.DDIM(self.eta)
        if self.stop.z is not None or self.stop.max_path_kl is not None:
            stop = dataclasses.replace(self.stop, samples=self.options.evaluation_samples)
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in (
            "resume",
            "eta",
            "reward_model",
            "prompt_column",
            "preset",
            "estimate",
            "stop",
            "objective_settings",
            "optimiser_settings",
        ):
            del named[name]
        options = dataclasses.replace(self.options, stop=stop)
        named |= {"objective": self.objective_settings, "sampler": sampler, "options": options}
        usual = self.optimiser_settings == optimisers.AdamW()  # as runs of before say it
        named["optimiser"] = None if usual else self.optimiser_settings
        judges = {f"judges {name}": judge for name, judge in options.judges.items()}
        for name, value in {**named, **judges, "preferences": options.preference}.items():
            if isinstance(value, Unnamed):
                option, _, judge = name.partition(" ")
                raise ValueError(
                    f"the {value.setting} of this run was {value.why}; give it with --{option} "
                    + (f"{judge}={OWN}" if judge else OWN)
                )
        return named


@dataclass(frozen=True)
class Evaluate:
    """How a fine-tuned model does at other step counts, paired with the pretrained one.

    Attributes:
        run: folder of a finished run.
        steps: step counts to try.
        samplers: ddim (with the run's eta), ddim-ode (eta 0), dpm++, unipc, heun, dxmi-10, ours-4,
            or the class of a scheduler of diffusers.
        samples: held-out samples of each.
        device: cpu or cuda; the run's if left out.
        reward: as of a run, where its reward has no name of its own, or its model is elsewhere now.
        reward_model: where that is.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    steps: tuple[int, ...] = (10, 25, 50, 100)
    samplers: tuple[str, ...] = ("ddim",)
    samples: int = 64
    device: Literal["cpu", "cuda"] | None = None
    reward: tuple[str, ...] | None = None
    reward_model: tuple[str, ...] = ()


# -- reading a command -----------------------------------------------------------------------------


def _words_by_flag(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Options that stand on the command line, with their words.

    Raises:
        ValueError: one stands there twice.
    """
    flags: list[str] = []
    words: dict[str, list[str]] = {}
    for word in arguments:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flags.append("--" + flag[2:].replace("_", "-").removeprefix("no-"))
            words[flags[-1]] = [value] if equals else []
        elif flags:
            words[flags[-1]].append(word)
    if twice := [flag for flag, times in Counter(flags).items() if times > 1]:
        raise ValueError(f"{twice[0]} stands on the command line twice: give it once")
    return words


def read(family: Family, arguments: Sequence[str]) -> Finetune[Any, Any, Any]:
    """The options of a run: those of the command line, and the run's where one is resumed.

    Raises:
        ValueError: an option is unknown, stands there twice, or is not the run's.
        FileNotFoundError: the run to resume is not there.
        SystemExit: an option is of the wrong type, or help is asked for; it is printed.
    """
    named = _words_by_flag(arguments)
    arguments, preset = _with_preset(arguments, named)
    named |= {option: words[1:] for option, words in preset.items()}
    if named.get("--trains") == ["all"]:
        family = dataclasses.replace(family, learning_rate=LEARNING_RATE_OF_ALL)
    folder = Path(named["--resume"][0]) if named.get("--resume") else None
    default = _fresh(family) if folder is None else _stored(family, folder)
    if named.get("--objective"):
        name = named["--objective"][0]
        kind, own = class_named("objective", name, OBJECTIVES), default.objective_settings
        settings = own if type(own) is kind else family.settings(kind)
        default = dataclasses.replace(default, objective=name, objective_settings=settings)
    if named.get("--optimiser"):
        name = named["--optimiser"][0]
        kind, own = class_named("optimiser", name, OPTIMISERS), default.optimiser_settings
        settings = own if type(own) is kind else kind()
        default = dataclasses.replace(default, optimiser=name, optimiser_settings=settings)
    kind: Any = type(default.objective_settings)
    how: Any = type(default.optimiser_settings)
    try:
        options, unknown = tyro.cli(
            tyro.conf.OmitArgPrefixes[Finetune[family.model, kind, how]],
            args=list(arguments),
            default=default,
            prog=family.program,
            registry=WORDS,
            return_unknown_args=True,
        )
    except SystemExit:
        if {"-h", "--help"} & set(arguments):
            _list_methods()
        raise
    if unknown:
        of = f"preset {named['--preset'][0]}: " if unknown[0] in preset else ""
        raise ValueError(of + _unknown(unknown, options))
    column = options.prompt_column
    if "--prompts" in named:
        prompts = from_words(options.prompts, column=column)
        options = dataclasses.replace(options, prompts=prompts)
    if "--evaluation-prompts" in named:
        words = options.options.evaluation_prompts or ()
        asked = from_words(words, "evaluation_prompts", column=column)
        watched = dataclasses.replace(options.options, evaluation_prompts=asked)
        options = dataclasses.replace(options, options=watched)
    judges = options.options.judges
    if folder is None and "--judges" not in named:
        usual = JUDGES_OF.get(reward_words(options.reward), {})
        judges = {name: registry.Words((judge,)) for name, judge in usual.items()}
    reward, judges = registry.resolve(options.reward, judges, options.reward_model)
    watched = dataclasses.replace(options.options, judges=judges)
    options = dataclasses.replace(options, reward=reward, options=watched)
    if folder is not None:
        _require_the_runs(options, default, named)
        return dataclasses.replace(options, output=folder)
    if "--steps" not in named and (usual := samplers.usual_steps(options.sampler)) is not None:
        options = dataclasses.replace(options, steps=usual)
    if options.output is None and not options.estimate:
        raise ValueError("output must name the folder of the run, for example --output runs/demo")
    return options


def _with_preset(
    arguments: Sequence[str], named: Mapping[str, list[str]]
) -> tuple[list[str], dict[str, list[str]]]:
    """The command line with a preset's options in it, and those by name.

    Raises:
        FileNotFoundError: there is no such preset.
        ValueError: it is named without a name, or beside a run to resume, or has what is no option.
    """
    if "--preset" not in named:
        return list(arguments), {}
    if len(named["--preset"]) != 1:
        raise ValueError("preset must be one name or file, such as --preset jpeg")
    if "--resume" in named:
        raise ValueError("resume takes every option from the run; leave out --preset")
    (name,) = named["--preset"]
    kept = [word for word in arguments if not word.startswith("--preset=")]
    if "--preset" in kept:
        place = kept.index("--preset")
        del kept[place : place + 2]
    return presets.expanded(kept, named, name)


def _fresh(family: Family) -> Finetune[Any, Any, Any]:
    """The options of a run that has not begun, as they are if none is named."""
    return Finetune(
        model=family.model(),
        objective_settings=family.settings(objectives.ScoreAsAction),
        optimiser_settings=optimisers.AdamW(),
        **family.defaults,
    )


def _stored(family: Family, folder: Path) -> Finetune[Any, Any, Any]:
    """The options of the run in a folder.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: it is damaged, or of another family.
    """
    settings = rebuild(read_settings(folder))
    if isinstance(family.model, type) and not isinstance(settings["model"], family.model):
        model = settings["model"]
        what = model.why if isinstance(model, Unnamed) else type(model).__name__
        raise ValueError(
            f"{folder} holds a run of {what}, and {family.program} is for "
            f"{family.model.__name__}: resume it where it was started"
        )
    options, objective = settings.pop("options"), settings.pop("objective")
    names = {kind: name for name, kind in (OBJECTIVES | OPTIMISERS).items()}
    optimiser = settings.pop("optimiser", None) or optimisers.AdamW()
    return Finetune(
        **settings,
        resume=folder,
        objective=names.get(type(objective)) or name_of(objective, {}),
        objective_settings=objective,
        optimiser=names.get(type(optimiser)) or name_of(optimiser, {}),
        optimiser_settings=optimiser,
        options=dataclasses.replace(options, stop=None),
        stop=options.stop or _NEVER,
    )


def _require_the_runs(
    options: Finetune[Any, Any, Any], run: Finetune[Any, Any, Any], named: Mapping[str, list[str]]
) -> None:
    """Refuse options that differ from those of the run that is resumed; updates may grow.

    Raises:
        ValueError: an option differs; it is named.
    """
    assert run.resume is not None
    if options.output not in (None, run.resume):
        raise ValueError(f"resume goes on in its own folder; leave out --output {options.output}")
    stored = read_settings(run.resume)
    wanted = {k: describe(v) for k, v in options.arguments().items() if k != "output"}
    differing = differences(stored, wanted)
    if wanted["updates"] < stored["updates"]:
        differing.append(("updates", stored["updates"], wanted["updates"]))
    words = []
    for setting, then, now in differing:
        names = [part.partition("[")[0] for part in setting.split(".")]
        parts = [_FLAGS.get(name, name).replace("_", "-") for name in names]
        flag = next((f"--{part}" for part in reversed(parts) if f"--{part}" in named), None)
        now = now if flag is None else " ".join(named[flag])
        words.append(f"{flag or setting} {now} (it has {then})".replace("  ", " "))
    if words:
        less = "; updates may grow only" if "--updates" in " ".join(words) else ""
        raise ValueError(
            f"resume takes every option from the run; leave out {', '.join(words)}{less}"
        )


def _settings_of(settings: Any) -> dict[str, str]:
    """Options that a dataclass makes, with its values."""
    return {
        "--" + f.name.replace("_", "-"): variation_name(value) if callable(value) else str(value)
        for f in dataclasses.fields(settings)
        for value in [getattr(settings, f.name)]
    }


def _unknown(words: Sequence[str], options: Finetune[Any, Any, Any]) -> str:
    """What to say of words that are no option: of this objective, optimiser or the command."""
    flag = words[0].partition("=")[0]
    own = _settings_of(options.objective_settings)
    steps = _settings_of(options.optimiser_settings)
    parts = (options, options.model, options.size, options.options)
    common = ["--" + _FLAGS.get(f.name, f.name) for part in parts for f in dataclasses.fields(part)]
    common = [name.replace("_", "-") for name in [*common, *(f"--{flag}" for flag in STOP)]]
    near = difflib.get_close_matches(flag, [*own, *steps, *common], n=1, cutoff=0.75)
    hint = f" (did you mean {near[0]}?)" if near else ""
    if any(flag in _settings_of(kind()) for kind in OBJECTIVES.values()):
        return (
            f"objective {options.objective} has no setting {' '.join(words)}{hint}; its settings "
            f"are {' '.join(f'{k} {v}' for k, v in own.items())}, and --help shows the options of "
            "every run"
        )
    if takers := [name for name, kind in OPTIMISERS.items() if flag in _settings_of(kind())]:
        return (
            f"optimiser {options.optimiser} has no setting {' '.join(words)}{hint}; it is one of "
            f"{', '.join(takers)}"
        )
    return (
        f"there is no option {' '.join(words)}{hint}; --help shows the options of every run, and "
        f"objective {options.objective} has {' '.join(own)}"
    )


def _list_methods() -> None:
    for what, kinds in (("objective", OBJECTIVES), ("optimiser", OPTIMISERS)):
        table = Table(what, "settings and defaults", title=f"Every {what}")
        for name, kind in kinds.items():
            table.add_row(name, " ".join(f"{k} {v}" for k, v in _settings_of(kind()).items()))
        Console().print(table)


# -- carrying it out -------------------------------------------------------------------------------


def _show(run: Run, options: Finetune[Any, Any, Any]) -> None:
    """Say in words how it went."""
    samples, reward = options.options.evaluation_samples, reward_words(options.reward)
    table = Table(title=f"{reward}, {samples} held-out samples")
    for heading in ("", "before", "after", "paired difference", "standard errors"):
        table.add_column(heading)
    gain = run.reward_gain
    table.add_row("reward", str(run.reward_before), str(run.reward), str(gain), _errors(gain))
    for name, part in run.part_gains.items():
        table.add_row(f"part: {name}", "", "", str(part), _errors(part))
    for name, judged in run.judge_gains.items():
        table.add_row(name, "", "", str(judged), _errors(judged))
    console = Console()
    console.print(table)
    if run.path_kl is not None:
        console.print(f"path KL from the pretrained model: {run.path_kl} nats")
    console.print(run.over_optimisation.sentence)
    if run.frontier is not None:
        if run.frontier.fault is not None:
            console.print(f"warning: {run.frontier.fault}", style="bold red")
        console.print(" ".join(run.frontier.sentences))
    if run.stopped is not None:
        console.print(f"stopped: {run.stopped}; exported: the model of update {run.update}")
    console.print(f"exported: {run.exported}")
    console.print(f"pictures: {run.folder / 'samples'}")
    console.print(f"report:   {run.report}")


def _show_cost(cost: RunCost) -> int:
    """Say what a run would cost; the exit code: 0 if it fits."""
    table = Table("", "", title=f"Estimate for this device: {cost.device}", show_header=False)
    for row in cost.rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for note in cost.notes:
        console.print(note)
    if cost.fits:
        return 0
    _say(f"it does not fit: {cost.refusal}")
    return 1


def _errors(estimated: Any) -> str:
    error = estimated.standard_error
    return f"{estimated.mean / error:+.1f}" if error > 0 else "-"


def run_evaluate(family: Family, options: Evaluate) -> None:
    """Measure step transfer of a finished run; print, plot and store it."""
    from diffusion_envs.runs.transfer import transfer
    from diffusion_envs.training import parallel

    if not (options.run / "config.json").is_file():
        raise FileNotFoundError(f"run must be the folder of a run, but {options.run} holds none")
    run = _stored(family, options.run)
    eta = run.sampler.eta if isinstance(run.sampler, samplers.DDIM) else 1.0
    kinds = [sampler_named("samplers", name) for name in options.samplers]
    kinds = [samplers.DDIM(eta) if kind == SAMPLERS["ddim"] else kind for kind in kinds]
    reward = run.reward
    if options.reward is not None:
        reward, _ = registry.resolve(registry.Words(options.reward), {}, options.reward_model)
    if isinstance(reward, Unnamed):
        raise ValueError(f"the reward of this run was {reward.why}; give it with --reward {OWN}")
    device = options.device or run.model.device
    model = run.model.load(
        device=parallel.start(device).device, batch=run.size.batch, seed=run.seed
    )
    rows = transfer(
        options.run,
        model,
        reward=reward,
        prompts=run.options.prompts_of(read_prompts(run.prompts), run.seed)[1],
        guidance=run.options.evaluation_guidance,
        seed=run.seed,
        steps=options.steps,
        samplers=kinds,
        samples=options.samples,
        reward_timeout=run.options.reward_timeout,
    )
    title = f"Transfer of {options.run}, {options.samples} held-out samples, paired seeds"
    table = Table("sampler", "steps", "before", "after", "paired difference", title=title)
    for row in rows:
        estimates = (str(value) for value in (row.before, row.after, row.difference))
        table.add_row(row.sampler, str(row.steps), *estimates)
    console = Console()
    console.print(table)
    console.print(
        f"stored in {options.run / 'transfer.json'}; plotted in {options.run / 'report.html'}"
    )


def _quiet_libraries() -> None:
    """Leave the terminal to our own progress bar."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def main(family: Family, arguments: Sequence[str]) -> int:
    """Run one command; the verdict is the exit code."""
    with interruptible():  # from its first word to its last, not only while it trains
        return _carried_out(family, arguments)


def _carried_out(family: Family, arguments: Sequence[str]) -> int:
    folder: Path | None = None
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's module beside them
    try:
        with interruptible():  # an error that hides a signal is one
            if arguments[:1] == ["evaluate"]:
                words = list(arguments[1:])
                evaluation = tyro.cli(Evaluate, args=words, prog=f"{family.program} evaluate")
                _quiet_libraries()
                run_evaluate(family, evaluation)
            elif arguments and arguments[0] in family.commands:
                _quiet_libraries()
                family.commands[arguments[0]](arguments[1:])
            else:
                words = arguments[1:] if arguments[:1] == ["finetune"] else arguments
                options = read(family, words)
                folder = options.output
                named = options.arguments()
                _quiet_libraries()
                if options.estimate:
                    return _show_cost(estimate(**{k: v for k, v in named.items() if k != "output"}))
                _show(finetune(**named, resume=options.resume is not None), options)
    except SystemExit as ended:  # help, or an option of the wrong type: it is printed
        return int(ended.code or 0)
    except KeyboardInterrupt:
        if folder is not None:
            begun = (folder.expanduser() / "config.json").is_file()
            again = f"go on with: {family.program} --resume {shlex.quote(str(folder))}"
            _say("\nstopped; " + (again if begun else "it had not begun: start it again"))
        else:
            _say("\nstopped: give the command again")
        return 130
    except MissingChoicesError as missing:
        again = f"go on with: {family.program} --resume {shlex.quote(str(folder))}"
        _say(f"waiting: {missing}\n{again}")
        return 3
    except (
        *(ValueError, TypeError, OSError, RuntimeError),
        *(PreflightError, NonFiniteError, FloatingPointError),
    ) as error:
        _say(f"error: {error}")
        return 2
    return 0


def _say(words: str) -> None:
    sys.stderr.write(words + "\n")
