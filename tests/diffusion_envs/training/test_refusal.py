"""Steps that are refused: nothing that is no number is learned from, and what it was is kept."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.faults.numbers import lost_path, one_reward
from diffusion_envs import rewards, sd15
from diffusion_envs.environment import Sample
from diffusion_envs.objectives import (
    DDPO,
    GRPO,
    TDPO,
    AdjointMatching,
    DRaFT,
    Objective,
    ReinforceAdjointMatching,
    ScoreAsAction,
)
from diffusion_envs.runs.checkpoint import CheckpointError
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.refused import place_of, repeat
from diffusion_envs.runs.repeating import trainer_of
from diffusion_envs.training.kl_controller import TargetKL
from diffusion_envs.training.refusal import NonFiniteError, RefusedStep
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.objectives.small_runs import trainer


def weights(run: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in run.parameters]


def assert_unchanged(run: Trainer, before: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(weights(run), before, strict=True))
    for state in run.optimiser.state_dict().get("state", {}).values():
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in state.values())


@pytest.mark.parametrize(
    "objective", [DDPO(), AdjointMatching(), DRaFT(), ReinforceAdjointMatching()]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_none_is_refused_also_where_the_loss_does_not_read_it(objective, value):
    run, refused = trainer(objective), list[RefusedStep]()
    run.refused = refused.append
    run.step()
    before = weights(run)
    one_reward(value)(run)
    with pytest.raises(NonFiniteError, match="no weight was changed by it"):
        run.step()
    assert_unchanged(run, before)
    (step,) = refused
    assert (step.update, step.process, step.samples) == (2, 0, range(12, 24))
    assert step.prompts == ["-"] * 12
    assert not math.isfinite(float(step.rollout.rewards[2]))


def test_a_ratio_that_overflows_is_refused_by_name_though_the_clip_keeps_the_gradient_finite():
    """The clipped loss has no gradient there: without the check a log would hold infinity."""
    run = trainer(DDPO())
    run.step()
    losses = run.losses(run.sample().rollout)
    run.losses = lambda rollout: losses
    own = losses.numbers
    losses.numbers = lambda: own() | {"ratio_max": math.inf}
    before = weights(run)
    with pytest.raises(NonFiniteError, match="norm is nan at update 2, as ratio_max is inf"):
        run.step()
    assert_unchanged(run, before)


def test_a_path_kl_that_the_weight_cannot_follow_is_refused():
    run = trainer(ScoreAsAction(), log_path_kl=True)
    run.target_kl = TargetKL(0.1)
    run.step()
    lost_path(run)
    before = weights(run)
    with pytest.raises(NonFiniteError):
        run.step()
    assert_unchanged(run, before)


def test_a_critic_takes_no_units_from_rewards_that_are_none():
    run = trainer(ScoreAsAction())
    one_reward(math.inf)(run)
    own = run.environment.sample

    def sample(*arguments: Any, **named: Any) -> Any:
        made = own(*arguments, **named)
        made.rollout.rewards[1] = math.nan
        return made

    run.environment.sample = sample
    with pytest.raises(NonFiniteError, match="the first rewards are not finite"):
        run.step()
    assert run.critic is not None
    assert all(torch.isfinite(value).all() for value in run.critic.network.state_dict().values())


# without a KL, whose gradient between equal policies is 0 up to round-off
@pytest.mark.parametrize("objective", [GRPO(group=3, kl_weight=0.0), DDPO(), TDPO()])
def test_rewards_without_variance_have_no_gradient_and_no_nan(objective: Objective):
    run = trainer(objective, value_epochs=1)
    run.environment.score_images = lambda reward, states, prompts: torch.full((len(states),), -3.7)
    numbers = run.step()
    assert numbers["gradient_norm"] == 0
    assert all(math.isfinite(v) for v in numbers.values() if isinstance(v, float))


# -- what a run keeps of it --------------------------------------------------------------------


def spoilt(update: int) -> Callable[..., Any]:
    """A trainer's gradients are NaN in one update."""
    own = Trainer._improve

    def improve(run: Trainer, sample: Sample) -> dict[str, Any]:
        differentiate = run.gradients.differentiate

        def spoil(*arguments: Any) -> None:
            differentiate(*arguments)
            gradient = run.parameters[-1].grad
            assert gradient is not None
            gradient.view(-1)[3] = math.nan

        if run.update == update - 1:
            vars(run.gradients)["differentiate"] = spoil
        return own(run, sample)

    return improve


@pytest.mark.slow
def test_a_run_keeps_what_it_refused_and_the_step_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_improve", spoilt(3))
    folder: Path = tmp_path / "run"
    with pytest.raises(NonFiniteError, match="at update 3"):
        sd15.finetune(
            sd15.StableDiffusion("tiny", device="cpu", lora_rank=2),
            reward=rewards.Colour("green"),
            prompts=["a photo of a frog"],
            objective=DDPO(),
            output=folder,
            steps=2,
            updates=4,
            size=UpdateSize(samples=3, batch=8, minibatches=3),
            options=RunOptions(evaluation_samples=2, progress=False, checkpoint_every=9),
            seed=6,
        )
    place = place_of(folder, 3)
    told = json.loads((place / "refused.json").read_text())
    assert (told["update"], told["seed"], told["samples"]) == (3, 6, [6, 9])
    assert told["prompts"] == ["a photo of a frog"] * 3
    assert told["checkpoint"] == "step-000002"
    kept = load_file(place / "process-0.safetensors")
    assert kept["rewards"].tolist() == pytest.approx(told["rewards"])
    assert kept["states"].shape[:2] == (3, 3)
    with pytest.raises(NonFiniteError, match="norm is nan at update 3"):
        repeat(trainer_of(folder), place)
    monkeypatch.undo()
    again = trainer_of(folder)
    numbers = repeat(again, str(place))
    assert numbers["update"] == 3
    assert numbers["reward"].mean == pytest.approx(sum(told["rewards"]) / 3, rel=1e-6)
    with pytest.raises(CheckpointError, match="holds no state"):
        repeat(again, tmp_path)
