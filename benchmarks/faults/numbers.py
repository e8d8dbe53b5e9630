"""Numbers that are none, in every objective: nothing of them reaches weights, moments or logs.

Each fault is done to the second update of a small run on a problem with a known law. Either the
step is refused, before the optimiser and with what it takes to repeat it, or all that it leaves is
finite.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.faults import small_run
from benchmarks.faults.row import Row
from diffusion_envs.environment import Sample
from diffusion_envs.exact.problems import GaussianProblem, table
from diffusion_envs.objectives import Objective
from diffusion_envs.rewards import RewardError
from diffusion_envs.runs.method_names import OBJECTIVES
from diffusion_envs.samplers import DDIM
from diffusion_envs.training.loss_scale import LossScale
from diffusion_envs.training.refusal import NonFiniteError, RefusedStep
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

SAMPLES = ("ddpo", "score-as-action", "nft", "draft", "grpo")  # of the short part
_Fault = Callable[[Trainer], None]


class Data:
    """What samples should look like, for objectives that learn from data."""

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Standard normals."""
        return torch.randn(n, 2, generator=generator)


def trainer(kind: type[Objective], refused: list[RefusedStep]) -> Trainer:
    """A small run of an objective as it is by default, with groups of two where it has groups."""
    objective = kind()
    for name in ("group", "members"):
        if name in {f.name for f in dataclasses.fields(objective)}:
            objective = dataclasses.replace(objective, **{name: 2})
    environment = GaussianProblem().environment(DDIM(1.0).bind(table(), 3), 11)
    return Trainer(
        environment,
        objective,
        UpdateSize(samples=8, batch=8, value_epochs=1, train_steps=None),
        accelerator=Accelerator(cpu=True),
        data=Data() if objective.needs_data else None,
        refused=refused.append,
    )


# -- faults --------------------------------------------------------------------------------------


def _sampled(run: Trainer, change: Callable[[Sample], Sample]) -> None:
    own = run.sample
    run.sample = lambda: change(own())


def _rewarded(run: Trainer, reward: Callable[[Tensor], Tensor]) -> None:
    """Other rewards than the sampled ones, past the check of the contract."""

    def change(sample: Sample) -> Sample:
        rollout, denoised = sample.rollout, sample.denoised_rewards
        changed = {"rewards": reward(rollout.rewards.clone())}
        if rollout.preferences is not None:
            changed["preferences"] = changed["rewards"]
        if denoised is not None:
            denoised = reward(denoised.clone())
        rollout = dataclasses.replace(rollout, **changed)
        return dataclasses.replace(sample, rollout=rollout, denoised_rewards=denoised)

    _sampled(run, change)


def one_reward(value: float) -> _Fault:
    """One sample's reward is this."""

    def fault(run: Trainer) -> None:
        def changed(rewards: Tensor) -> Tensor:
            rewards[2] = value
            return rewards

        _rewarded(run, changed)

    return fault


def all_rewards(run: Trainer) -> None:
    """All rewards are equal, and so is their group's standard deviation 0."""
    _rewarded(run, lambda rewards: torch.full_like(rewards, 0.25))


def large_rewards(run: Trainer) -> None:
    """Rewards as large as the contract lets through."""
    _rewarded(run, lambda rewards: 1e15 * rewards.sign())


def lost_path(run: Trainer) -> None:
    """One path is not finite, and nor is what follows from it."""

    def change(sample: Sample) -> Sample:
        rollout = sample.rollout
        for value in (rollout.states, rollout.means, rollout.actions):
            value[3] = math.nan
        return sample

    _sampled(run, change)


def everything_equal(run: Trainer) -> None:
    """All paths are one path: no variance in states, noises or rewards."""

    def change(sample: Sample) -> Sample:
        rollout = sample.rollout
        same = {
            f.name: value[:1].expand_as(value).clone()
            for f in dataclasses.fields(rollout)
            if isinstance(value := getattr(rollout, f.name), Tensor) and f.name != "step_sizes"
        }
        denoised = sample.denoised_rewards
        if denoised is not None:
            denoised = denoised[:1].expand_as(denoised).clone()
        return dataclasses.replace(
            sample, rollout=dataclasses.replace(rollout, **same), denoised_rewards=denoised
        )

    _sampled(run, change)


def far_policy(run: Trainer) -> None:
    """The policy is so far from the one that sampled that their ratio overflows."""
    own = run._improve

    def improve(sample: Sample) -> dict[str, Any]:
        for parameter in run.parameters:
            parameter.data.add_(300.0)
        return own(sample)

    run._improve = improve


def spoilt_gradient(run: Trainer) -> None:
    """One entry of a gradient is NaN, on this process of all."""
    own = run.gradients.differentiate

    def differentiate(*arguments: Any) -> None:
        own(*arguments)
        gradient = run.parameters[0].grad
        if gradient is None:
            gradient = run.parameters[0].grad = torch.zeros_like(run.parameters[0])
        gradient.view(-1)[0] = math.nan

    vars(run.gradients)["differentiate"] = differentiate


def half_precision(run: Trainer) -> None:
    """A gradient of float16 that overflows at every scale of the loss."""
    run.gradients.loss_scale = LossScale.of(torch.float16)
    own = run.gradients.differentiate

    def differentiate(*arguments: Any) -> None:
        own(*arguments)
        run.parameters[0].grad = torch.full_like(run.parameters[0], math.inf)

    vars(run.gradients)["differentiate"] = differentiate


# -- what must hold ------------------------------------------------------------------------------

MUST_REFUSE = "refused, before the optimiser"
MAY_REFUSE = "refused, or all that it leaves is finite"
MUST_GO_ON = "goes on, and all that it leaves is finite"
FAULTS: dict[str, tuple[_Fault, str]] = {
    "a reward of NaN": (one_reward(math.nan), MAY_REFUSE),
    "a reward of +inf": (one_reward(math.inf), MAY_REFUSE),
    "a reward of -inf": (one_reward(-math.inf), MAY_REFUSE),
    "a reward of 1e38": (one_reward(1e38), MAY_REFUSE),
    "rewards of +-1e15": (large_rewards, MAY_REFUSE),
    "a path that is not finite": (lost_path, MAY_REFUSE),
    "a policy so far away that the ratio overflows": (far_policy, MAY_REFUSE),
    "a NaN in a gradient": (spoilt_gradient, MUST_REFUSE),
    "a float16 gradient that overflows at every scale": (half_precision, MUST_REFUSE),
    "groups of equal rewards": (all_rewards, MUST_GO_ON),
    "no variance in anything": (everything_equal, MUST_GO_ON),
}


def outcome(kind: type[Objective], fault: _Fault, promise: str) -> str | None:
    """What is wrong after a fault, in words; None if the promise was kept."""
    refused = list[RefusedStep]()
    run = trainer(kind, refused)
    run.step()
    own, before = run._improve, dict[str, Tensor]()

    def improve(sample: Sample) -> dict[str, Any]:
        before.update(_tensors(run.state()))
        return own(sample)

    run._improve = improve
    fault(run)  # what it changes on purpose, it changes before that
    try:
        numbers = run.step()
    except (NonFiniteError, RewardError) as error:  # the latter where the reward is asked again
        if promise == MUST_GO_ON:
            return f"was refused: {error}"
        told = isinstance(error, NonFiniteError)
        return _after_refusal(run, refused if told else None, before)
    if promise == MUST_REFUSE:
        return "was not refused"
    if bad := _not_finite(run.state()):
        return f"{bad} is not finite"
    lines = {k: v.as_dict() if hasattr(v, "as_dict") else v for k, v in numbers.items()}
    if bad := _not_finite(lines):
        return f"{bad}, in the log, is not finite"
    return None


def _after_refusal(
    run: Trainer, refused: list[RefusedStep] | None, before: dict[str, Tensor]
) -> str | None:
    """What a refused step has changed, or does not tell."""
    told = [(step.update, step.stream, step.samples) for step in refused or ()]
    if refused is not None and told != [(2, "train", range(8, 16))]:
        return "a refused step was not told once, with its update and samples"
    if run.update != 1:
        return "a refused step was counted"
    if bad := _not_finite(run.state()):
        return f"{bad} is not finite after the refusal"
    kept = ("adapter", "optimiser", "old", "mean")
    after = _tensors(run.state())
    critic_failed = bool(refused) and "value network" in refused[0].reason
    for name, value in () if critic_failed else before.items():
        if name.startswith(kept) and not torch.equal(value, after[name]):
            return f"{name} was changed by a refused step"
    return None


def _tensors(state: Any, name: str = "") -> dict[str, Tensor]:
    """Copies of all tensors, by where they are."""
    if isinstance(state, Tensor):
        return {name: state.clone()}
    items = state.items() if isinstance(state, dict) else ()
    if isinstance(state, list | tuple):
        items = enumerate(state)
    told = dict[str, Tensor]()
    for key, value in items:
        told |= _tensors(value, f"{name}.{key}" if name else str(key))
    return told


def _not_finite(state: Any, name: str = "") -> str | None:
    """The first number or tensor that is not finite; None if all are."""
    if isinstance(state, Tensor):
        return None if bool(state.isfinite().all()) else name
    if isinstance(state, float):
        return None if math.isfinite(state) else name
    items = state.items() if isinstance(state, dict) else ()
    if isinstance(state, list | tuple):
        items = enumerate(state)
    for key, value in items:
        if (bad := _not_finite(value, f"{name}.{key}" if name else str(key))) is not None:
            return bad
    return None


def repeated(folder: Path) -> Row:
    """A run of the embedded model that is refused leaves what it takes to repeat the step."""
    small_run.uninterrupted()
    place = folder / "run"
    ended = small_run.run(place, _spoilt_third_update)
    left = place / "refused" / "update-000003"
    whole = ended.code == 2 and "no weight was changed" in ended.said
    whole = whole and (left / "refused.json").is_file()
    again = small_run.run(place)
    same = again.code == 0
    numbers = small_run.results(place) if same else {}
    numbers = {name: value for name, value in numbers.items() if not name.startswith("refused/")}
    differs = small_run.first_difference(numbers, small_run.uninterrupted().results)
    held = whole and same and differs is None
    return Row(
        "a gradient that is NaN once",
        "the third update of a run",
        "refused and kept for replay; without the fault the run goes on to the same numbers",
        1,
        int(held),
        "" if held else f"{ended.last}; then {again.last}; {differs} differs",
    )


class _spoilt_third_update:  # a context manager that a child enters
    def __enter__(self) -> None:
        own = Trainer._improve

        def improve(run: Trainer, sample: Sample) -> dict[str, Any]:
            if run.update == 2:
                spoilt_gradient(run)
            return own(run, sample)

        patch.object(Trainer, "_improve", improve).start()

    def __exit__(self, *_: object) -> None:
        """Nothing: the child ends."""


def rows(folder: Path, *, sample: bool) -> Iterator[Row]:
    """Every fault in every objective; then one in a whole run."""
    yield repeated(folder)
    kinds = {name: kind for name, kind in OBJECTIVES.items() if not sample or name in SAMPLES}
    for name, (fault, promise) in FAULTS.items():
        failed = list[str]()
        for method, kind in kinds.items():
            if (wrong := outcome(kind, fault, promise)) is not None:
                failed.append(f"{method}: {wrong}")
        held = len(kinds) - len(failed)
        where = f"update 2 of {len(kinds)} objectives"
        yield Row(name, where, promise, len(kinds), held, failed[0] if failed else "")
