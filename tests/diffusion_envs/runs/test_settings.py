"""What a run was started with is stored so that it can be made again, or is asked for by name."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_envs import rewards, samplers
from diffusion_envs.objectives import ContinuousDxMI, DistributionalOptimisation, NearTarget
from diffusion_envs.preferences import BradleyTerry, Recorded
from diffusion_envs.runs.early_stopping import StopRule
from diffusion_envs.runs.method_names import OBJECTIVES
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.settings import Unnamed, describe, differences, rebuild
from diffusion_envs.sd15 import StableDiffusion
from diffusion_envs.training.kl_controller import TargetKL
from diffusion_envs.training.update_size import UpdateSize

OPTIONS = RunOptions(
    evaluation_samples=7,
    judges={"blue": rewards.Colour("blue")},
    target_kl=TargetKL(0.3, rate=0.2),
    stop=StopRule(z=2.5, max_path_kl=4.0, every=3, samples=5),
    preference=BradleyTerry(0.7),
)

SUM = rewards.Weighted({"path": (rewards.Colour("green"), 1.5)}, normalise={"path": (0.0, 2.0)})


def stored(value: Any) -> Any:
    """What a file gives back."""
    return json.loads(json.dumps(describe(value), allow_nan=False))


@pytest.mark.parametrize(
    "value",
    [
        StableDiffusion("tiny", guidance=1.5, lora_targets=["to_q"], resolution=32),
        rewards.PromptAlignment("judge"),
        rewards.JpegCompressibility,
        rewards.Weighted(
            {"a": (rewards.Colour("blue"), 1.0), "b": (rewards.JpegCompressibility(), -2.0)}
        ),
        rewards.Weighted(
            {"class": (rewards.Limited(rewards.Colour(), upper=0.3), 1.0), "name": (SUM, 0.5)},
            normalise={"name": (0.1, 2.0)},
        ),
        rewards.Cached(rewards.Threshold(rewards.Colour(), at=0.1), size=7),
        samplers.Scheduler("UniPCMultistepScheduler", (("solver_order", 3),)),
        samplers.DDIM(0.3),
        UpdateSize(samples=6, train_steps=2),
        OPTIONS,
        ContinuousDxMI(gain_clip=math.inf),
        DistributionalOptimisation(first_variation=NearTarget(0.5)),
        *(kind() for kind in OBJECTIVES.values()),
    ],
    ids=lambda value: getattr(value, "label", type(value).__name__),
)
def test_everything_of_a_run_comes_back_from_its_file(value):
    again = rebuild(stored(value))
    assert again == value
    assert differences(stored(value), stored(again)) == []


def test_paths_are_absolute_so_that_a_run_is_resumed_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    kept = [stored(StableDiffusion("model")), stored(RunOptions(preference=Recorded("a.jsonl")))]
    kept.append(stored({"file": Path("weights.safetensors")}))
    monkeypatch.chdir("/")
    model, options, other = (rebuild(each) for each in kept)
    assert model.model == str(tmp_path / "model")
    assert Path(options.preference.path) == tmp_path / "a.jsonl"
    assert other == {"file": tmp_path / "weights.safetensors"}


class Counting:
    """A reward that no name leads back to: how it was made is not known."""

    def __call__(self, images: Any, prompts: Any) -> Any:
        return images.mean((1, 2, 3))


def of_a_script(images: Any, prompts: Any) -> Any:
    return images.mean((1, 2, 3))


def test_what_has_no_name_is_said_to_have_none(monkeypatch):
    monkeypatch.setattr(of_a_script, "__module__", "__main__")
    objects = {"reward": lambda images, prompts: 0, "other": Counting(), "script": of_a_script}
    objects["options"] = RunOptions(judges={"mine": Counting()})
    again = rebuild(stored(objects))
    for name in ("reward", "other", "script"):
        assert isinstance(again[name], Unnamed)
        assert again[name].setting == name
    assert "of a script" in again["script"].why
    assert again["options"].judges["mine"].setting == "options.judges.mine"


MODULE = """
class Mine:
    def __init__(self, weight=2.0):
        self.weight = weight
    def __call__(self, images, prompts):
        return self.weight * images.mean((1, 2, 3))

def plain(images, prompts):
    return images.mean((1, 2, 3))

made = Mine(3.0)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module beside them, which later is not on the path any more."""
    (tmp_path / "judged_by_me.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "judged_by_me"
    sys.modules.pop("judged_by_me", None)


@pytest.mark.parametrize(("name", "weight"), [("Mine", 2.0), ("made", 3.0), ("plain", None)])
def test_a_reward_by_name_comes_back_by_its_name_from_another_directory(
    name, weight, module, monkeypatch
):
    kept = stored(rewards.load(f"{module}:{name}"))
    sys.modules.pop(module)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != kept["folder"]])
    again = rebuild(kept)
    assert getattr(again, "weight", None) == weight
    assert differences(kept, stored(again)) == []
    Path(kept["folder"], f"{module}.py").unlink()
    sys.modules.pop(module)
    lost = rebuild(kept, "reward")
    assert isinstance(lost, Unnamed)
    assert "cannot be imported any more" in lost.why


def test_a_reward_in_a_file_comes_back_from_its_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "of-mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    kept = [stored(rewards.load(f"of-mine.py:{name}")) for name in ("plain", "Mine")]
    kept.append(stored(rewards.Weighted({"a": (rewards.load("./of-mine.py:plain"), 2.0)})))
    monkeypatch.chdir("/")
    for each in kept:
        again = rebuild(each)
        assert stored(again) == each
        assert differences(each, stored(again)) == []
    assert kept[0]["folder"] == str(tmp_path)
    (tmp_path / "moved").mkdir()
    (tmp_path / "of-mine.py").rename(tmp_path / "moved" / "of-mine.py")
    lost = rebuild(kept[0], "reward")
    assert isinstance(lost, Unnamed)
    assert "cannot be loaded any more" in lost.why
    moved = rewards.load(f"{tmp_path}/moved/of-mine.py:plain")
    assert differences(kept[0], stored(moved)) == []
    assert differences(kept[0], stored(rewards.load(f"{tmp_path}/moved/of-mine.py:made")))


def test_differences_are_named_to_the_field():
    model = StableDiffusion(guidance=3.0, device="cuda")
    run = stored({"model": model, "options": OPTIONS, "updates": 3, "seed": 0})
    changed = dataclasses.replace(OPTIONS, picture_every=2, progress=False, wandb=True)
    now = {"model": StableDiffusion(guidance=1.5), "options": changed, "updates": 9, "seed": 0}
    assert differences(run, stored(now)) == [
        ("model.guidance", 3.0, 1.5),
        ("options.picture_every", 10, 2),
    ]


def test_fields_that_were_added_since_had_their_default():
    now = stored(UpdateSize(samples=4))
    then = {name: value for name, value in now.items() if name not in ("warm_up", "schedule")}
    assert differences(then, now) == []
    assert differences(then, stored(UpdateSize(samples=4, warm_up=3))) == [("warm_up", 0, 3)]


def test_a_reward_of_another_class_differs_but_one_without_a_name_is_let_through():
    red = {"reward": rewards.Colour("red")}
    jpeg = {"reward": rewards.JpegCompressibility()}
    assert differences(stored(red), stored(jpeg)) == [("reward", "Colour", "JpegCompressibility")]
    nameless = {"reward": lambda images, prompts: 0}
    assert differences(stored(nameless), stored(red)) == []
    assert differences(stored({"reward": Counting()}), stored(jpeg)) == []


def test_fields_of_another_version_are_named():
    kept = stored(samplers.DDIM(0.5))
    kept["eta"] = "much"
    with pytest.raises(ValueError, match=r"sampler was stored by another version of .*DDIM"):
        rebuild(kept, "sampler")


@dataclasses.dataclass(frozen=True)
class Confusing:
    """Its fields have the names that say which class a setting is of."""

    name: str
    folder: Path
    loaded: int = 3
    function: str = "f"


def test_fields_may_be_called_as_what_says_the_class(tmp_path):
    value = Confusing("mine", tmp_path)
    again = rebuild(stored(value))
    assert again == value
    other = stored(dataclasses.replace(value, name="other", folder=tmp_path / "other"))
    names = {name for name, _, _ in differences(stored(value), other)}
    assert names == {"folder (field).path", "name (field)"}


def test_a_scheduler_of_a_run_of_before_is_read():
    """Then its field ``name`` stood where the class's name stands."""
    kept = stored(samplers.Scheduler("UniPCMultistepScheduler"))
    kept["name"] = kept.pop("name (field)")
    assert rebuild(kept) == samplers.Scheduler("UniPCMultistepScheduler")


def test_a_loaded_reward_in_a_sum_is_loaded_again(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def f(images, prompts):\n    return len(images) * [1]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    made = rewards.Weighted({"mine": (rewards.load("my_rewards:f"), 2.0)})
    described = stored(made)
    assert described["terms"]["mine"][0]["function"] == "my_rewards:f"
    again = rebuild(described)
    assert again == made
    monkeypatch.delitem(sys.modules, "my_rewards")


def test_a_nameless_reward_in_a_sum_is_named_when_it_is_asked_for():
    described = stored(rewards.Weighted({"mine": (lambda images, prompts: images, 2.0)}))
    images = torch.rand(2, 3, 4, 4)
    with pytest.raises(rewards.RewardError, match=r"reward mine of Weighted.*terms.mine\[0\] was"):
        rebuild(described, "reward")(images, ["", ""])


def test_another_weight_in_a_sum_is_another_setting():
    one, other = (stored(rewards.Weighted({"red": (rewards.Colour(), w)})) for w in (1.0, 2.0))
    assert differences(one, other, "reward") == [("reward.terms.red[1]", 1.0, 2.0)]
    assert differences(one, stored(SUM), "reward")
    nameless = stored(rewards.Weighted({"red": (lambda images, prompts: images, 1.0)}))
    assert differences(one, nameless, "reward") == []
