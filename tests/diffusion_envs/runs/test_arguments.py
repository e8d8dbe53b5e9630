"""Arguments of ``finetune`` of another kind are refused before anything is loaded or written."""

import re
from typing import Any

import pytest

from diffusion_envs import cifar10, objectives, rewards, samplers, sd15
from diffusion_envs.rewards.registry import REWARDS
from diffusion_envs.runs.estimate import estimate
from diffusion_envs.runs.method_names import OBJECTIVES, OPTIMISERS, SAMPLERS
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.training import optimisers

# Types are checked at every call in tests only: users see what ``finetune`` says itself.
pytestmark = pytest.mark.usefixtures("as_users_run_it")


def grey(images, prompts):
    return images.mean((1, 2, 3))


class Grey:
    """A reward that is an object."""

    def __call__(self, images, prompts):
        return grey(images, prompts)


def refused(tmp_path: Any, **other: Any) -> str:
    """What is said of one argument; nothing is left in the folder of the run."""
    usual = {"reward": grey, "prompts": ["a cat", "a dog"], "output": tmp_path / "run"}
    with pytest.raises(TypeError) as error:
        sd15.finetune(**usual | other)
    assert not (tmp_path / "run").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("objective", "grpo", "an objective, got 'grpo': objective=objectives.GRPO()"),
        ("objective", "DRaFT", "an objective, got 'DRaFT': objective=objectives.DRaFT()"),
        ("objective", "ppo", "an objective, got 'ppo': objective=objectives.ScoreAsAction()"),
        (
            "objective",
            objectives.DPOK,
            "an object, got the class DPOK: make one, objective=objectives.DPOK(...)",
        ),
        ("objective", 3, "an objective, got 3: objective=objectives.ScoreAsAction()"),
        ("sampler", "heun", "a sampler, got 'heun': sampler=samplers.Scheduler("),
        (
            "sampler",
            "EulerDiscreteScheduler",
            "a sampler, got 'EulerDiscreteScheduler': "
            "sampler=samplers.Scheduler('EulerDiscreteScheduler')",
        ),
        ("sampler", samplers.CPS, "an object, got the class CPS: make one, sampler=samplers.CPS("),
        ("sampler", 20, "a sampler, got 20: sampler=samplers.DDIM()"),
        (
            "optimiser",
            "scaled-lora",
            "an optimiser, got 'scaled-lora': optimiser=optimisers.ScaledLoRA()",
        ),
        (
            "optimiser",
            optimisers.BoundedAdamW,
            "an object, got the class BoundedAdamW: make one, optimiser=optimisers.BoundedAdamW(",
        ),
        ("size", {"samples": 6}, "an UpdateSize, got {'samples': 6}: size=UpdateSize(samples=6)"),
        ("size", 6, "an UpdateSize, got 6: size=UpdateSize(samples=6)"),
        ("size", {"sample": 6}, "size=UpdateSize(samples=...)"),
        ("options", {"held_out": 2}, "a RunOptions, got {'held_out': 2}: options=RunOptions(held_"),
        ("options", None, "a RunOptions, got None: options=RunOptions(evaluation_samples=...)"),
        ("seed", None, "an int, got None"),
        ("seed", 2.5, "an int, got 2.5"),
        ("reward", Grey, "a function or an object, got the class Grey: make one, Grey(...)"),
        ("reward", "red", "callable, got 'red': from Python it is rewards.Colour(channel='red')"),
        ("reward", "my.py:grey", "callable, got 'my.py:grey': from Python import the function"),
        ("reward", [grey, Grey()], "for a sum of several pass rewards.Weighted("),
        ("reward", None, "callable, got None: pass a function of images and prompts"),
    ],
)
def test_what_is_of_another_kind_is_told_with_what_to_pass(argument, value, said, tmp_path):
    message = refused(tmp_path, **{argument: value})
    assert message.startswith(f"{argument} must "), message
    assert said in message, message


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("objective", "grpo", "objective=objectives.GRPO()"),
        ("sampler", samplers.DDIM, "sampler=samplers.DDIM(...)"),
        ("size", {"samples": 6}, "size=UpdateSize(samples=6)"),
        ("reward", Grey, "make one, Grey(...)"),
    ],
)
def test_what_a_run_would_cost_is_refused_alike(argument, value, said):
    usual = {"reward": grey, "prompts": ["a cat"]}
    with pytest.raises(TypeError, match=f"^{argument} must be .*{re.escape(said)}$"):
        estimate(sd15.StableDiffusion("tiny"), **usual | {argument: value})


@pytest.mark.parametrize("output", [None, 3])
def test_output_is_the_name_of_a_folder(output, tmp_path):
    assert "output must name the folder of the run" in refused(tmp_path, output=output)


@pytest.mark.parametrize("model", [None, object(), 5])
@pytest.mark.parametrize("named", [sd15.StableDiffusion, cifar10.Cifar10Model])
def test_a_model_in_memory_is_told_to_be_saved_first(model, named):
    kind = type(model).__name__
    with pytest.raises(TypeError, match=f"^model must be the name.* got {kind}: .*save_pretrained"):
        named(model)


def test_every_word_of_the_command_line_is_told_as_an_object_that_exists(tmp_path):
    said = {}
    for argument, table in {"objective": OBJECTIVES, "optimiser": OPTIMISERS}.items():
        for name, kind in table.items():
            message = refused(tmp_path, **{argument: name})
            said[name] = message.rpartition(f"{argument}=")[2]
            assert eval(said[name]) == kind(), message
    for name, sampler in SAMPLERS.items():
        message = refused(tmp_path, sampler=name)
        said[name] = message.rpartition("sampler=")[2]
        assert eval(said[name]) == sampler, message
    for name, entry in REWARDS.items():
        message = refused(tmp_path, reward=name)
        said[name] = message.rpartition("from Python it is ")[2]
        if entry.model is None:
            assert eval(said[name]) == entry.make(None), message
        else:
            made = said[name].partition("(")[0]
            assert callable(eval(made)), message
    assert len(set(said.values())) > 40  # no one remedy for all


def test_rewards_that_only_judge_are_by_name():
    made: Any = RunOptions
    for judges in ([rewards.JpegIncompressibility()], rewards.JpegIncompressibility(), "red"):
        with pytest.raises(TypeError, match=r"^judges must be rewards by name, such as \{'sharp'"):
            made(judges=judges)
    with pytest.raises(TypeError, match=r"^judge 'warm' must be callable, got 'red': .*Colour\("):
        made(judges={"warm": "red"})
    with pytest.raises(TypeError, match=r"^judge 'grey' must .* got the class Grey: make one"):
        made(judges={"grey": Grey})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"learning_rate": 2e-5}, "objective=objectives.ScoreAsAction(learning_rate=...)"),
        ({"group": 6}, "objective=objectives.GRPO(group=...)"),
        (
            {"clip": 0.3, "objective": objectives.TDPO()},
            "objective=objectives.TDPO(clip=...)",
        ),
        ({"eta": 0.4}, "sampler=samplers.DDIM(eta=...)"),
        ({"fused": True}, "optimiser=optimisers.AdamW(fused=...)"),
        ({"promts": ["a cat"]}, "(did you mean prompts?)"),
        ({"zzzz": 3}, "; there are model, reward, prompts, output, objective,"),
    ],
)
@pytest.mark.parametrize("family", [sd15, cifar10])
def test_an_argument_that_is_a_setting_says_whose(family, arguments, said, tmp_path):
    name = next(iter(arguments))
    with pytest.raises(TypeError, match=f"^{name} is no argument of finetune.*{re.escape(said)}"):
        family.finetune(reward=grey, prompts=["a cat"], output=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()
