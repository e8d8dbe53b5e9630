"""The table of faults about memory and numbers can fail: a mistake is planted in each part."""

import dataclasses
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.faults import bad_rewards, memory, numbers, resume_points
from diffusion_envs import rewards
from diffusion_envs.objectives import DDPO
from diffusion_envs.rewards import contract
from diffusion_envs.runs.method_names import OBJECTIVES
from diffusion_envs.training.trainer import Trainer
from verification.planting import Edit, planted


def test_pieces_of_another_weight_are_seen_by_memory():
    wrong = Edit(
        "diffusion_envs.objectives.path_steps.PathLosses.losses", "/ len(which)", "/ len(piece)"
    )
    objective, size = memory.KINDS["ddpo"]
    with planted(wrong):
        gap, _ = memory.deviation(objective, 3, backward=False, **size)
    assert gap > 0.1
    gap, _ = memory.deviation(objective, 3, backward=False, **size)
    assert gap <= memory.TOLERANCE


def test_an_allocator_counts_what_lives_and_refuses_more():
    with memory.Allocator() as plain:
        kept = [torch.ones(1000) for _ in range(3)]
        del kept[0]
        kept.append(torch.ones(500) + 0.5)
    assert 4 * 3000 <= plain.peak <= 4 * 4000
    with memory.Allocator(13_000) as small:
        for _ in range(20):
            kept = [torch.ones(1000) + 1]  # the one before is given back
        try:
            kept = [torch.ones(1000) for _ in range(4)]
        except torch.OutOfMemoryError:
            assert small.refused == 1
        else:
            raise AssertionError("16,000 bytes fitted into 13,000")


def test_a_gradient_that_nobody_looks_at_is_seen_by_numbers():
    kind, (fault, promise) = OBJECTIVES["ddpo"], numbers.FAULTS["a NaN in a gradient"]
    assert numbers.outcome(kind, fault, promise) is None
    with patch("diffusion_envs.training.sharded.clip_gradients", lambda parameters, most: 1.0):
        assert numbers.outcome(kind, fault, promise) == "was not refused"
        assert numbers.outcome(kind, fault, numbers.MAY_REFUSE) == "adapter.0 is not finite"


def test_a_contract_that_lets_infinity_through_is_seen_by_bad_rewards():
    with patch.object(contract, "_finite", lambda values, name, prompts: values.float()):
        row = bad_rewards.fuzzed(300)
    assert not row.whole
    assert bad_rewards.fuzzed(300).whole


def test_state_that_is_not_loaded_is_seen_by_resume_points(tmp_path: Path):
    """In this process, which has differentiated: without forks."""
    setting = dataclasses.replace(
        resume_points.SETTINGS["a natural gradient"], objective=DDPO(learning_rate=3e-3)
    )
    with patch.object(resume_points, "UPDATES", 6):
        whole = resume_points._whole(setting, tmp_path)

        def difference(without: tuple[str, ...] | None) -> str | None:
            place = tmp_path / "after-4"
            return resume_points.difference(
                whole, resume_points._resumed(setting, place, 4, without)
            )

        assert difference(None) is None
        assert difference(("optimiser",)) is not None
        load = Trainer.load_state

        def forgetful(run: Trainer, state: Any) -> None:
            load(run, state)
            run.update -= 1

        with patch.object(Trainer, "load_state", forgetful):
            assert difference(None) is not None
    assert isinstance(whole["adapter"], str)


def test_a_reward_of_another_form_is_no_other_reward():
    values = torch.tensor([0.25, -1.5, 3.0])
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    for form in bad_rewards._FORMS.values():

        def my_reward(pictures: Tensor, prompts: Any, form: Any = form) -> Any:
            return form(values)

        assert torch.equal(rewards.score(my_reward, images, ["a", "b", "c"]), values)
