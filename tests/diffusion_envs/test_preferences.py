"""Preferences from a reward, recorded choices or a function; and runs that wait for people."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffusion_envs import rewards
from diffusion_envs.objectives import D3PO, DenseReward, Objective
from diffusion_envs.preferences import (
    BradleyTerry,
    FromReward,
    MissingChoicesError,
    Preference,
    Recorded,
    compare,
)
from diffusion_envs.runs import command_line
from diffusion_envs.runs.human_choices import leave
from diffusion_envs.sd15.__main__ import FAMILY
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.objectives.small_runs import numbers, trainer
from tests.diffusion_envs.sd15.calling import finetune

SAMPLES, GROUP = range(8, 14), 2
REWARDS = torch.tensor([0.3, 1.0, -2.0, -2.0, 5.0, 4.0])
IMAGES = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "a", "b", "b", "c", "c"]


def ask(preference: Preference, group: int = GROUP) -> list[float]:
    return compare(preference, IMAGES, PROMPTS, REWARDS, SAMPLES, group).tolist()


def record(folder: Path, *lines: object) -> Recorded:
    path = folder / "choices.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return Recorded(path)


def lower_number(
    images: Tensor, prompts: Sequence[str], rewards: Tensor, samples: range, group: int
) -> list[float]:
    """A function that prefers the sample made first."""
    return [-float(i) for i in samples]


# -- what they answer -----------------------------------------------------------------------------


def test_a_reward_prefers_the_larger():
    pairs = zip(
        REWARDS.view(-1, 2).tolist(), torch.tensor(ask(FromReward())).view(-1, 2), strict=True
    )
    for (first, second), (a, b) in pairs:
        assert (first > second) == bool(a > b)
        assert (first < second) == bool(a < b)


def test_recorded_choices_are_places_in_their_order(tmp_path):
    made = record(
        tmp_path, {"order": [9, 8]}, "", {"order": [12, 13]}, {"order": [10, 11], "by": "me"}
    )
    assert ask(made) == [-1, 0, 0, -1, 0, -1]


def test_orders_of_larger_groups(tmp_path):
    made = record(tmp_path, {"order": [9, 10, 8]}, {"order": [13, 12, 11]})
    assert ask(made, group=3) == [-2, 0, -1, -2, -1, 0]


def test_the_last_word_about_a_group_counts(tmp_path):
    lines = [{"order": o} for o in ([8, 9], [10, 11], [12, 13], [9, 8])]
    assert ask(record(tmp_path, *lines))[:2] == [-1, 0]


def test_bradley_terry_choices_have_its_odds():
    """Plackett and Luce's for three: the best first in proportion to exp(reward / temperature)."""
    n, temperature = 9000, 1.7
    rewards = torch.tensor([0.4, -1.3, 2.0]).repeat(n)
    made = BradleyTerry(temperature, seed=3)
    answer = made(torch.zeros(3 * n), ["-"] * 3 * n, rewards, range(3 * n), 3).view(n, 3)
    odds = (rewards[:3] / temperature).softmax(0)
    best = answer.argmax(1)
    for k in range(3):
        share = (best == k).double().mean()
        assert abs(share - odds[k]) < 5 * 0.5 / n**0.5
    beaten = (answer[:, 0] > answer[:, 2]).double().mean()
    assert abs(beaten - torch.sigmoid((rewards[0] - rewards[2]) / temperature)) < 5 * 0.5 / n**0.5


def test_bradley_terry_noise_is_the_samples_own():
    made = BradleyTerry(seed=3)
    whole = ask(made)
    part = made(IMAGES[2:], PROMPTS[2:], REWARDS[2:], SAMPLES[2:], 2)
    torch.testing.assert_close(part.float(), torch.tensor(whole[2:]))
    assert ask(BradleyTerry(seed=4)) != whole
    with pytest.raises(ValueError, match="temperature must be positive"):
        BradleyTerry(0.0)


def test_a_function_may_answer_a_list():
    assert ask(lower_number) == [-8, -9, -10, -11, -12, -13]


@pytest.mark.parametrize(
    "answer", [[1.0], [0.0] * 7, [0.0] * 5 + [float("nan")], [0.0] * 5 + [float("inf")]]
)
def test_an_answer_of_another_form_is_refused(answer):
    def odd(*_: object) -> list[float]:
        return answer

    with pytest.raises(ValueError, match="odd must answer one finite number for each of 6"):
        ask(odd)


@given(st.permutations(list(SAMPLES)))
def test_recorded_orders_say_the_same_as_the_reward_they_came_from(tmp_path_factory, order):
    made = record(tmp_path_factory.mktemp("p"), {"order": order})
    answer = torch.tensor(ask(made, group=6))
    assert [SAMPLES[k] for k in answer.argsort(descending=True).tolist()] == order


# -- what is missing or wrong ---------------------------------------------------------------------


def test_missing_groups_are_named_with_their_images(tmp_path):
    with pytest.raises(
        MissingChoicesError, match=r"no choice for 2 groups .*\[8, 9\] \('a'\)"
    ) as e:
        ask(record(tmp_path, {"order": [11, 10]}, {"order": [8, 10]}))
    assert e.value.groups == [[8, 9], [12, 13]]
    assert e.value.images is not None
    assert torch.equal(e.value.images, IMAGES[[0, 1, 4, 5]])
    assert e.value.prompts == ["a", "a", "c", "c"]


def test_a_file_that_is_not_there_yet_lacks_every_group(tmp_path):
    with pytest.raises(MissingChoicesError, match=r"there is no such file yet.* 3 groups"):
        ask(Recorded(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[8, 9]",
        "3",
        {"best": 8},
        {"order": 8},
        {"order": [8]},
        {"order": [8, 8]},
        {"order": [8, "9"]},
        {"order": [8, 9.5]},
        {"order": [True, 9]},
    ],
)
def test_a_damaged_line_is_named(line, tmp_path):
    with pytest.raises(ValueError, match="line 2"):
        ask(record(tmp_path, {"order": [8, 9]}, line))


def test_images_are_left_by_their_numbers(tmp_path):
    with pytest.raises(MissingChoicesError) as caught:
        ask(record(tmp_path, {"order": [11, 10]}))
    mine = tmp_path / "to_choose" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    (mine.parent / "sample-000003.png").write_bytes(b"of an earlier stop")
    place = leave(tmp_path, caught.value)
    names = sorted(path.name for path in place.iterdir())
    expected = [f"sample-{k:06d}.png" for k in (8, 9, 12, 13)]
    expected += ["group-000008.png", "group-000012.png", "groups.jsonl", "notes.txt"]
    assert names == sorted(expected)
    seen = np.asarray(Image.open(place / "sample-000013.png"))
    want = (IMAGES[5] * 255).round().byte().permute(1, 2, 0).numpy()
    assert (seen == want).all()
    lines = [json.loads(line) for line in (place / "groups.jsonl").read_text().splitlines()]
    assert lines == [{"order": [8, 9], "prompt": "a"}, {"order": [12, 13], "prompt": "c"}]


# -- in runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [D3PO(learning_rate=1e-2), DenseReward(members=2)])
def test_the_loop_learns_from_the_preference_that_it_is_given(objective):
    plain = trainer(objective)
    same = trainer(objective, FromReward())
    opposite = trainer(objective, lambda images, prompts, rewards, samples, group: -rewards)
    logs = [numbers(run, 2) for run in (plain, same, opposite)]
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_better_rewards_follow_from_preferences_and_worse_from_their_opposite():
    gains = []
    for sign in (1.0, -1.0):
        run = trainer(
            D3PO(beta=1.0, clip=float("inf"), learning_rate=0.03),
            lambda images, prompts, rewards, samples, group, sign=sign: sign * rewards,
            samples=32,
        )
        log = numbers(run, 12)
        gains.append(log[-1]["reward"].mean - log[0]["reward"].mean)
    assert gains[0] > 0.2
    assert gains[1] < -0.2


def test_nothing_moves_while_choices_are_missing(tmp_path):
    run = trainer(D3PO(), Recorded(tmp_path / "none.jsonl"))
    before = [p.detach().clone() for p in run.parameters]
    with pytest.raises(MissingChoicesError):
        run.step()
    assert run.update == 0
    assert all(torch.equal(p, q) for p, q in zip(run.parameters, before, strict=True))


SMALL = {
    "reward": rewards.Colour("red"),
    "prompts": ["a photo of a cat", "a photo of a ship"],
    "objective": D3PO(learning_rate=1e-2),
    "steps": 2,
    "updates": 2,
    "size": UpdateSize(samples=4, batch=8),
    "lora_rank": 1,
    "evaluation_samples": 2,
    "progress": False,
    "device": "cpu",
}


@pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely
def test_a_run_waits_for_people_and_ends_as_one_that_never_waited(tmp_path):
    folder, path = tmp_path / "waiting", tmp_path / "choices.jsonl"
    settings = SMALL | {"output": folder, "preference": Recorded(path)}
    with pytest.raises(MissingChoicesError, match="to_choose"):
        finetune(**settings)
    assert not (folder / "metrics.jsonl").is_file() or not (folder / "metrics.jsonl").read_text()
    for pairs in ([[0, 1], [2, 3]], [[4, 5], [6, 7]]):
        left = sorted(p.name for p in (folder / "to_choose").glob("sample-*.png"))
        assert left == [f"sample-{k:06d}.png" for pair in pairs for k in pair]
        with path.open("a") as file:  # the sample made first is preferred
            file.writelines(json.dumps({"order": pair}) + "\n" for pair in pairs)
        if pairs[0][0] == 0:
            with pytest.raises(MissingChoicesError):
                finetune(**settings, resume=True)
    finetune(**settings, resume=True)
    other = tmp_path / "asked"
    finetune(**SMALL | {"output": other, "preference": lower_number})
    name = "pytorch_lora_weights.safetensors"
    one, two = load_file(folder / name), load_file(other / name)
    assert all(torch.equal(one[k], two[k]) for k in two)
    costs = [
        [
            json.loads(line)["reward_queries"]
            for line in (f / "metrics.jsonl").read_text().split("\n")[:-1]
        ]
        for f in (folder, other)
    ]
    assert costs[0] == costs[1] == [4, 8]


@pytest.mark.filterwarnings("default")
def test_the_command_line_waits_and_goes_on(tmp_path, capsys):
    folder, path = tmp_path / "run", tmp_path / "choices.jsonl"
    small = ["--steps", "2", "--updates", "1", "--samples", "2", "--evaluation-samples", "2"]
    start = ["--output", folder, "--reward", "red", "--objective", "d3po", "--preferences", path]
    assert (
        command_line.main(
            FAMILY, [str(a) for a in [*start, *small, "--lora-rank", "1", "--device", "cpu"]]
        )
        == 3
    )
    said = capsys.readouterr().err
    assert "waiting" in said
    assert str(folder / "to_choose") in said
    assert f"--resume {folder}" in said
    path.write_text((folder / "to_choose" / "groups.jsonl").read_text())
    assert command_line.main(FAMILY, ["--resume", str(folder)]) == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


def test_choices_without_an_objective_that_learns_from_them_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ScoreAsAction learns from rewards"):
        finetune(
            reward=rewards.Colour("red"),
            prompts=["a photo of a cat"],
            output=tmp_path / "run",
            preference=Recorded("choices.jsonl"),
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [FromReward, lambda: Recorded("x.jsonl"), lambda: lower_number])
def test_they_meet_the_protocol(kind):
    assert isinstance(kind(), Preference)


def test_only_some_objectives_need_preferences():
    assert not Objective.needs_preferences
    assert D3PO.needs_preferences
    assert DenseReward.needs_preferences
