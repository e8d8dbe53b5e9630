"""Learned rewards from local files, by name on the command line: two updates, and golden scores."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion_envs import rewards
from diffusion_envs.runs import command_line
from diffusion_envs.runs.settings import rebuild
from diffusion_envs.sd15.__main__ import FAMILY
from tests.diffusion_envs.rewards.learned import CASES, Case

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

BY_NAME = {case.weights.reward: case for case in reversed(CASES)}  # the published scale is first
SMALL = [
    *("--steps", "2", "--updates", "2", "--samples", "2", "--evaluation-samples", "2"),
    *("--lora-rank", "1", "--device", "cpu"),
]


def run(*arguments: str | Path) -> int:
    return command_line.main(FAMILY, [str(word) for word in arguments])


@pytest.fixture
def files(tmp_path):
    """Random weights of one reward in the published layout: tensors, and the folder."""

    def write(case: Case):
        tensors = case.state(torch.Generator().manual_seed(16))
        (folder := tmp_path / f"model of {case.weights.reward}").mkdir()
        return tensors, case.write(folder, tensors)

    return write


def golden(case: Case, tensors, images):
    """What the published formula gives the pictures of the first two prompts."""
    return case.scores(tensors, images, case.rows[:2])


@pytest.mark.parametrize("name", ["clip-score", "image-reward"])
def test_a_learned_reward_trains_and_scores_as_published(name, files, tmp_path):
    case, output = BY_NAME[name], tmp_path / "run"
    tensors, folder = files(case)
    words = ["--reward", name, "--reward-model", folder, "--prompts", *case.prompts[:2]]
    assert run(*words, "--output", output, *SMALL) == 0
    before = load_file(output / "evaluation" / "before.safetensors")
    torch.testing.assert_close(
        before["rewards"].double(),
        golden(case, tensors, before["images"]),
        rtol=0,
        atol=1e-5 * case.unit,
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2]
    # the folder of a run is enough to go on with it
    stored = rebuild(json.loads((output / "config.json").read_text())["settings"]["reward"])
    assert stored == case.make(folder)
    assert run("--resume", output, "--updates", "3") == 0


def test_a_sum_of_learned_rewards_trains_with_learned_judges(files, tmp_path):
    cases = {
        name: BY_NAME[name] for name in ("clip-score", "pick-score", "aesthetic-v1", "aesthetic")
    }
    made = {name: files(case) for name, case in cases.items()}
    output, prompts = tmp_path / "run", cases["clip-score"].prompts[:2]
    models = [f"{name}={folder}" for name, (_, folder) in made.items()]
    words = ["--reward", "clip-score=1", "pick-score=-0.5", "jpeg-compressibility=2"]
    judges = ["--judges", "people=aesthetic-v1", "taste=aesthetic", "--reward-model", *models]
    assert run(*words, *judges, "--prompts", *prompts, "--output", output, *SMALL) == 0
    before = load_file(output / "evaluation" / "before.safetensors")
    images = before["images"]
    scores = {name: golden(case, made[name][0], images) for name, case in cases.items()}
    jpeg = rewards.JpegCompressibility()(images, prompts)
    expected = scores["clip-score"] - 0.5 * scores["pick-score"] + 2 * jpeg
    size = cases["clip-score"].unit + 0.5 * cases["pick-score"].unit
    torch.testing.assert_close(before["rewards"].double(), expected, rtol=0, atol=1e-5 * size)
    for judge, name in {"people": "aesthetic-v1", "taste": "aesthetic"}.items():
        torch.testing.assert_close(
            before[f"judged.{judge}"].double(),
            scores[name],
            rtol=0,
            atol=1e-5 * cases[name].unit,
        )
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"reward.clip-score", "reward.pick-score", "reward.jpeg-compressibility"} <= set(last)


def test_a_model_that_is_not_there_is_listed_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    words = ["--reward", "image-reward", "--reward-model", tmp_path / "empty"]
    assert run(*words, "--output", tmp_path / "run", *SMALL) == 2
    said = capsys.readouterr().err
    assert "vocab.txt" in said
    assert "diffusion_envs.rewards fetch image-reward" in said
    assert not (tmp_path / "run").exists()
