"""A run that over-optimises is stopped, exports its best model, and resumes bit for bit.

The reward is redness and the judge blueness, without a KL term: at first pictures get brighter and
both rise, then red is bought with blue.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion_envs import rewards
from diffusion_envs.objectives import DDPO, ScoreAsAction
from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.early_stopping import StopRule
from diffusion_envs.runs.report import write_report
from diffusion_envs.training.kl_controller import TargetKL
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.sd15.calling import finetune

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

ADAPTER = "pytorch_lora_weights.safetensors"
SETTINGS = {
    "prompts": ["a photo of a cat", "a photo of a ship"],
    "judges": {"blue": rewards.Colour("blue")},
    "objective": ScoreAsAction(learning_rate=0.01, kl_weight=1e-6, denoised=False, clip=2.0),
    "steps": 2,
    "guidance": 1.0,
    "updates": 12,
    "size": UpdateSize(samples=8, batch=16, value_epochs=1),
    "lora_rank": 2,
    "evaluation_samples": 8,
    "picture_every": 2,
    "progress": False,
    "device": "cpu",
}
RULE = StopRule(z=3.0, every=2, samples=8)


@pytest.fixture(scope="module", autouse=True)
def runs_as_users_make_them() -> Iterator[None]:
    """Whole runs, a dozen of them: their calls are checked where other tests make them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxtyping.config.jaxtyping_disable", True)
        yield


class Red:
    """Redness, during whose n-th call the user presses Ctrl-C."""

    def __init__(self, at: int = -1) -> None:
        self.calls, self.at = 0, at

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return rewards.Colour("red")(images, prompts)


def lines(path: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "memory")} for line in found]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    return folder, finetune(reward=Red(), output=folder, stop=RULE, **SETTINGS)


def test_it_stops_when_the_judge_falls_and_exports_the_best_model(stopped):
    folder, run = stopped
    summary = json.loads((folder / "summary.json").read_text())
    last = summary["stop"]["update"]
    assert run.stopped is not None
    assert run.stopped == summary["stop"]["reason"]
    assert "judge blue had fallen" in run.stopped
    assert run.update == summary["update"] < last < 12
    assert [line["update"] for line in lines(folder / "metrics.jsonl")] == list(range(1, last + 1))
    # retention has dropped that checkpoint from the newest two, but not from the best
    assert (folder / "best" / f"step-{run.update:06d}").is_dir()
    best = checkpoint.load(folder / "best" / f"step-{run.update:06d}").state["adapter"]
    newest = checkpoint.latest(folder / "checkpoints").state["adapter"]
    exported = sorted(load_file(folder / ADAPTER).values(), key=lambda t: t.flatten()[0].item())
    kept = sorted((t for t in best), key=lambda t: t.flatten()[0].item())
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(exported, kept, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(best, newest, strict=True))


def test_the_report_says_why_and_when(stopped):
    folder, run = stopped
    page = write_report(folder).read_text()
    last = json.loads((folder / "summary.json").read_text())["stop"]["update"]
    assert f"Stopped after update {last}: judge blue had fallen" in page
    assert f"The exported model is that of update {run.update}" in page
    assert "noise alone makes a judge stop such a run with probability at most" in page
    assert "diversity of pixels" in page
    assert run.over_optimisation.sentence.split("(")[0] in page


def test_over_optimisation_metrics_are_logged(stopped):
    folder, run = stopped
    log = lines(folder / "over_optimisation.jsonl")
    last = json.loads((folder / "summary.json").read_text())["stop"]["update"]
    assert [line["update"] for line in log] == list(range(2, last + 1, 2))
    for name in ("judge_gain.blue", "diversity_gain.pixels", "distance.pixels", "path_kl"):
        assert name in log[0]
        assert name in run.metrics
    assert log[-1]["distance.pixels"]["mean"] > log[0]["distance.pixels"]["mean"] > 0


def same(one: Path, other: Path) -> None:
    for name in ("metrics.jsonl", "over_optimisation.jsonl"):
        assert lines(one / name) == lines(other / name)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    assert summaries[0] == summaries[1]
    first, second = (load_file(folder / ADAPTER) for folder in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


# One call each: the pretrained model (twice: evaluation, stop rule), then of every update its
# samples, and of every second one pictures and evaluation. So: in the first one, in that of update
# 6, and in the last evaluation of a run that stopped at update 8.
@pytest.mark.parametrize("at", [2, 14, 19])
def test_an_interrupted_run_stops_at_the_same_update_bit_for_bit(stopped, tmp_path, at):
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        finetune(reward=Red(at), output=folder, stop=RULE, **SETTINGS)
    finetune(reward=Red(), output=folder, stop=RULE, resume=True, **SETTINGS)
    same(folder, stopped[0])


def test_a_crash_between_the_best_model_and_its_checkpoint_loses_neither(
    stopped, tmp_path, monkeypatch
):
    folder, save = tmp_path / "cut", checkpoint.save

    def crashing(where: Path, step: int, state: Any, **settings: Any) -> Path:
        if where.name == "checkpoints" and step == stopped[1].update:
            raise KeyboardInterrupt
        return save(where, step, state, **settings)

    monkeypatch.setattr(checkpoint, "save", crashing)
    with pytest.raises(KeyboardInterrupt):
        finetune(reward=Red(), output=folder, stop=RULE, **SETTINGS)
    monkeypatch.setattr(checkpoint, "save", save)
    found = sorted(path.name for path in (folder / "best").iterdir())
    assert found[-1] == f"step-{stopped[1].update:06d}"
    assert len(found) == 2  # the one before, which the newest checkpoint calls the best, too
    finetune(reward=Red(), output=folder, stop=RULE, resume=True, **SETTINGS)
    same(folder, stopped[0])


def test_a_rule_that_sees_nothing_leaves_the_run_as_it_is(tmp_path):
    few = SETTINGS | {"updates": 4}
    folder, patient = tmp_path / "ruled", StopRule(z=1000.0, every=2, samples=8)
    ruled = finetune(reward=Red(), output=folder, stop=patient, **few)
    plain = finetune(reward=Red(), output=tmp_path / "plain", **few)
    assert ruled.stopped is None
    assert plain.stopped is None
    assert ruled.update == plain.update == 4
    assert ruled.reward == plain.reward
    assert ruled.metrics == plain.metrics
    assert lines(folder / "metrics.jsonl") == lines(tmp_path / "plain" / "metrics.jsonl")
    assert "The stop rule did not end the run" in (folder / "report.html").read_text()
    assert "stop rule" not in (tmp_path / "plain" / "report.html").read_text()


def test_a_steered_run_logs_its_weight_and_resumes(tmp_path):
    objective = replace(SETTINGS["objective"], kl_weight=0.01)
    few = SETTINGS | {"updates": 4, "objective": objective}
    few |= {"target_kl": TargetKL(0.05, rate=0.5)}
    finetune(reward=Red(), output=tmp_path / "whole", **few)
    with pytest.raises(KeyboardInterrupt):
        finetune(reward=Red(at=5), output=tmp_path / "cut", **few)
    finetune(reward=Red(), output=tmp_path / "cut", resume=True, **few)
    same(tmp_path / "whole", tmp_path / "cut")
    weights = [line["kl_weight"] for line in lines(tmp_path / "cut" / "metrics.jsonl")]
    assert weights[:2] == [0.01, pytest.approx(0.01 * math.exp(-0.5))]  # a fresh adapter: 0 nats
    assert len(weights) == 4
    assert "kl_weight (reward per nat)" in (tmp_path / "cut" / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": DDPO(), "target_kl": TargetKL(1.0)}, "DDPO has none"),
        ({"judges": {}, "stop": RULE}, "stop needs a judge"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune(reward=Red(), output=tmp_path / "run", **SETTINGS | change)
    assert not (tmp_path / "run").exists()
