"""Fine-tuning end to end on the embedded model: resume, export, preflight, bad input."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from ctrl.noise import normals_by_sample
from diffusion_envs import cifar10, objectives, rewards, samplers, sd15
from diffusion_envs.models.folders import tiny_folder
from diffusion_envs.prompt import Prompt
from diffusion_envs.runs.early_stopping import StopRule
from diffusion_envs.runs.evaluation import HELD_OUT, evaluate
from diffusion_envs.runs.exported import load_exported
from diffusion_envs.runs.finetune import make_environment
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.run_folder import read_settings
from diffusion_envs.runs.settings import rebuild
from diffusion_envs.runs.tracking import TRAINING_BY_PROMPT, read_metrics
from diffusion_envs.runs.transfer import transfer
from diffusion_envs.sd15 import StableDiffusion
from diffusion_envs.training.trainer import PreflightError
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.sd15.calling import finetune

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

PROMPTS = ["a photo of a cat", "a photo of a ship"]
SMALL = {
    "prompts": PROMPTS,
    "steps": 3,
    "updates": 3,
    "size": UpdateSize(samples=4, batch=8, value_epochs=1),
    "lora_rank": 2,
    "evaluation_samples": 4,
    "picture_every": 2,
    "progress": False,
    "device": "cpu",
}


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "memory")} for line in found]


class Interrupted:
    """A reward during whose n-th call the user presses Ctrl-C."""

    def __init__(self, at: int) -> None:
        self.calls, self.at = 0, at

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return rewards.Colour("red")(images, prompts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finetune(reward=Interrupted(at=-1), output=folder, **SMALL)
    return folder


# One evaluation is 1 reward call, an update 2: the cut points fall before the first update, inside
# the first, and inside the third.
@pytest.mark.parametrize("at", [1, 3, 6])
def test_an_interrupted_run_resumes_to_the_same_numbers_bit_for_bit(finished, tmp_path, at):
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt) as stopped:
        finetune(reward=Interrupted(at), output=folder, **SMALL)
    (note,) = stopped.value.__notes__  # which Python shows below the traceback
    assert note == f"stopped; the same call with resume=True goes on with the run in {folder}"
    torch.rand(7)  # the global stream must not matter
    finetune(reward=Interrupted(at=-1), output=folder, resume=True, **SMALL)
    assert lines(folder) == lines(finished)
    name = "pytorch_lora_weights.safetensors"
    whole, cut = load_file(finished / name), load_file(folder / name)
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    one, other = (json.loads((f / "summary.json").read_text()) for f in (finished, folder))
    assert one == other


def test_a_run_leaves_everything_that_it_promises(finished):
    for name in (
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "pytorch_lora_weights.safetensors",
        "samples/step-000000.png",
        "samples/step-000002.png",
        "samples/step-000003.png",
        "checkpoints/step-000003/manifest.json",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "tensorboard").iterdir())
    log = lines(finished)
    assert [line["update"] for line in log] == [1, 2, 3]
    assert log[0]["path_kl"]["mean"] == pytest.approx(0, abs=1e-6)  # a fresh adapter
    assert log[-1]["path_kl"]["mean"] > 0
    # 4 samples: 4 images and 4 x 3 denoised ones an update; guided sampling, reference and training
    assert [line["reward_queries"] for line in log] == [16, 32, 48]
    rows = 4 * 3 * 2
    assert log[0]["network_calls"] == 3 * rows  # the preflight's are in no budget
    assert log[1]["network_calls"] - log[0]["network_calls"] == 3 * rows


def test_plain_diffusers_makes_the_fine_tuned_images(finished):
    pipe = StableDiffusionPipeline.from_pretrained(
        tiny_folder(), dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(finished))
    assert isinstance(pipe.scheduler, DDIMScheduler)
    latents = normals_by_sample((4, 8, 8), seed=0, name=(HELD_OUT, "start"), samples=range(2))
    settings = {"guidance_scale": 3.0, "num_inference_steps": 3, "eta": 0.0, "output_type": "pt"}
    theirs = pipe(PROMPTS, latents=latents, **settings).images
    model = small_model()
    environment = environment_of(model, samplers.DDIM(0.0))
    untouched = evaluate(environment, 2).images
    load_exported(model, finished)
    ours = evaluate(environment, 2).images
    # float32 networks called with other batch shapes agree to about 1e-6 a call
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (
        ours - untouched
    ).abs().max() > 1e-3  # the adapter matters, so the agreement means something


JUDGED = {"reward": rewards.Colour("red"), "prompts": PROMPTS, "seed": 0}


def small_model() -> Any:
    return StableDiffusion(lora_rank=2).load(device=torch.device("cpu"), batch=8, seed=0)


def environment_of(model: Any, sampler: samplers.DDIM):
    return make_environment(model, sampler=sampler, steps=3, **JUDGED)


def test_transfer_judges_other_step_counts_and_the_ode(finished):
    kinds = [samplers.DDIM(1.0), samplers.DDIM(0.0)]
    rows = transfer(finished, small_model(), **JUDGED, steps=[2, 5], samplers=kinds, samples=4)
    assert [(row.sampler, row.steps) for row in rows] == [
        ("DDIM eta 1", 2),
        ("DDIM eta 1", 5),
        ("DDIM eta 0", 2),
        ("DDIM eta 0", 5),
    ]
    assert len(json.loads((finished / "transfer.json").read_text())) == 4
    assert "DDIM eta 0" in (finished / "report.html").read_text()


def test_a_sample_is_the_same_in_any_batch():
    environment = environment_of(small_model(), samplers.DDIM(1.0))
    whole = evaluate(environment, 6, batch=6)
    parts = evaluate(environment, 6, batch=4)
    torch.testing.assert_close(whole.images, parts.images, rtol=0, atol=1e-4)  # as above


@pytest.mark.parametrize(
    "objective", [objectives.ScoreAsActionSampled(), objectives.ScoreAsActionReleased()]
)
def test_the_other_objectives_run_in_the_same_loop(objective, tmp_path):
    run = finetune(
        reward=rewards.JpegCompressibility(),
        objective=objective,
        output=tmp_path / "run",
        **SMALL | {"updates": 1},
    )
    assert run.path_kl.mean > 0


def test_training_on_an_ode_is_refused_before_anything_is_written(tmp_path):
    for objective in (objectives.ScoreAsAction(), objectives.ScoreAsActionSampled()):
        with pytest.raises(ValueError, match="density"):
            finetune(
                reward=rewards.Colour(),
                objective=objective,
                sampler=samplers.DDIM(0.0),
                output=tmp_path / "no",
                **SMALL,
            )
    assert not (tmp_path / "no").exists()


def test_time_subsampling_is_unbiased():
    """The gradient with one step a path, averaged over all choices, is that with all steps."""
    from diffusion_envs.training import parallel
    from diffusion_envs.training.trainer import Trainer

    model = small_model()
    trainer = Trainer(
        environment_of(model, samplers.DDIM(1.0)),
        objectives.ScoreAsAction(),
        replace(SMALL["size"], samples=2),
        accelerator=parallel.start(),
    )
    rollout = trainer.sample().rollout
    update_losses = trainer.losses(rollout)

    def gradient(which: Tensor) -> Tensor:
        for parameter in model.parameters:
            parameter.grad = None
        losses = trainer.objective.loss(update_losses.rows(which))
        (losses.sum() * 3 / len(which)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters if p.grad is not None])

    paths = torch.arange(2)
    every = gradient(torch.cartesian_prod(paths, torch.arange(3)))
    singles = [gradient(torch.stack([paths, torch.full((2,), k)], dim=1)) for k in range(3)]
    mean = torch.stack(singles).mean(0)
    assert every.abs().max() > 0
    torch.testing.assert_close(mean, every, rtol=1e-3, atol=float(1e-4 * every.abs().max()))


def test_preflight_refuses_an_adapter_that_is_not_fresh(tmp_path, monkeypatch):
    from diffusion_envs.models import adapters

    attach = adapters.attach_lora

    def spoiled(*args: Any, **settings: Any) -> list[torch.nn.Parameter]:
        parameters = attach(*args, **settings)
        for parameter in parameters:
            parameter.data.fill_(0.05)
        return parameters

    monkeypatch.setattr(adapters, "attach_lora", spoiled)
    with pytest.raises(PreflightError, match="path KL"):
        finetune(reward=rewards.Colour(), output=tmp_path / "run", **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": [""]}, "prompts"),
        ({"prompts": ["a cat " * 40]}, "tokens"),
        ({"steps": 0}, "steps"),
        ({"steps": 2000}, "steps"),
        ({"updates": -1}, "updates"),
        ({"guidance": float("nan")}, "guidance"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"lora_targets": ["nothing"]}, "nothing"),
        ({"evaluation_samples": 1}, "evaluation_samples"),
        ({"precision": "float8"}, "precision"),
        ({"precision": "float16"}, "float16"),
        ({"resolution": 18}, "resolution"),
        ({"model": ""}, "model"),
        ({"judges": {"same": rewards.Colour("red")}}, "judge"),
        ({"size": UpdateSize(samples=4, train_steps=9)}, "train_steps"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune(reward=rewards.Colour("red"), output=tmp_path / "run", **SMALL | change)
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_one_string_are_refused(tmp_path):
    with pytest.raises(TypeError, match="list of strings"):
        finetune(
            reward=rewards.Colour(), output=tmp_path, **SMALL | {"prompts": "a photo of a cat"}
        )


def test_a_reward_that_fails_stops_the_run_and_keeps_it(tmp_path):
    def bad(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.full((len(images),), float("nan"))

    with pytest.raises(rewards.RewardError, match="bad must be finite"):
        finetune(reward=bad, output=tmp_path / "run", **SMALL)
    assert (tmp_path / "run" / "config.json").is_file()


def test_held_out_samples_are_asked_for_with_prompts_of_their_own(tmp_path):
    asked: list[set[str]] = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        asked.append(set(prompts))
        return rewards.Colour("red")(images, prompts)

    held_out = ("a photo of a dog", "a photo of a truck")
    rule = StopRule(z=None, max_path_kl=1e6, every=2, samples=4)
    finetune(
        reward=reward,
        output=tmp_path / "run",
        **SMALL | {"evaluation_prompts": held_out, "stop": rule, "frontier_samples": 4},
    )
    evaluations = 2 + 1 + 2 + 1  # before and after, on the way, of the stop rule, the frontier
    assert sum(prompts == set(held_out) for prompts in asked) == evaluations
    assert {frozenset(prompts) for prompts in asked} == {frozenset(PROMPTS), frozenset(held_out)}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["by_prompt"]) == set(held_out)
    assert summary["frontier"]["prompts"] == 2


def test_columns_reach_the_reward_and_held_out_prompts_are_never_trained_on(tmp_path):
    """At another guidance than training's; a resumed run and ``evaluate`` have them all again."""
    prompts = [Prompt(f"a photo of a {w}", {"word": w}) for w in ("cat", "dog", "ship", "frog")]
    asked: list[list[str]] = []

    def reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        asked.append([prompt.metadata["word"] for prompt in prompts])
        return rewards.Colour("red")(images, prompts)

    settings = SMALL | {
        "prompts": prompts,
        "held_out": 0.25,
        "evaluation_guidance": 1.0,
        "updates": 1,
    }
    run = finetune(reward=reward, output=tmp_path / "run", **settings)
    (held_out,) = {word for words in asked[:1] for word in words}
    trained = {word for words in asked for word in words} - {held_out}
    assert len(trained) == 3
    assert all({held_out} == set(words) or held_out not in words for words in asked)
    lines = (tmp_path / "run" / "evaluation" / "by_prompt.jsonl").read_text().splitlines()
    (told,) = map(json.loads, lines)
    assert told["prompt"] == f'a photo of a {held_out} {{"word": "{held_out}"}}'
    assert told["after"]["mean"] == run.reward.mean
    logged = read_metrics(tmp_path / "run" / TRAINING_BY_PROMPT)
    assert [line["update"] for line in logged] == [1]
    places = {k for line in logged for k in line["prompt"]}
    assert {prompts[k].metadata["word"] for k in places} == trained
    read = rebuild(read_settings(tmp_path / "run"))["prompts"]
    assert [p.metadata for p in read] == [p.metadata for p in prompts]
    guided = finetune(reward=reward, output=tmp_path / "same", **settings | {"guidance": 1.0})
    assert guided.reward_before == run.reward_before
    again = finetune(reward=reward, output=tmp_path / "run", **settings, resume=True)
    assert again.reward == run.reward


def test_a_model_without_guidance_has_no_other_guidance_at_evaluation(tmp_path):
    options = RunOptions(evaluation_guidance=2.0)
    with pytest.raises(ValueError, match="UnconditionalUNet has none: leave it out"):
        cifar10.finetune(output=tmp_path / "run", options=options)
    assert not (tmp_path / "run").exists()


def test_folders_of_other_runs_are_never_overwritten(finished, tmp_path):
    before = (finished / "metrics.jsonl").read_text()
    with pytest.raises(FileExistsError, match="another run"):
        finetune(reward=rewards.Colour(), output=finished, **SMALL)
    with pytest.raises(ValueError, match="guidance"):
        finetune(reward=Interrupted(-1), output=finished, resume=True, **SMALL, guidance=1.5)
    with pytest.raises(FileNotFoundError, match="resume"):
        finetune(reward=rewards.Colour(), output=tmp_path / "none", resume=True, **SMALL)
    assert (finished / "metrics.jsonl").read_text() == before


def test_folders_that_are_not_pipelines_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="lacks"):
        finetune(reward=rewards.Colour(), model=tmp_path, output=tmp_path / "run", **SMALL)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        finetune(reward=rewards.Colour(), model="./nowhere", output=tmp_path / "run", **SMALL)


@pytest.mark.parametrize(
    ("name", "value", "place"),
    [
        (
            "guidance",
            1.0,
            r"model=sd15\.StableDiffusion\(\.\.\.\), StableDiffusion\(guidance=1\.0\)",
        ),
        ("samples", 8, r"size=UpdateSize\(\.\.\.\), UpdateSize\(samples=8\)"),
        ("evaluation_samples", 4, r"options=RunOptions\(\.\.\.\)"),
    ],
)
def test_an_option_of_another_place_is_refused_with_its_place(name, value, place, tmp_path):
    with pytest.raises(TypeError, match=f"^{name} is no argument of finetune: .*{place}"):
        sd15.finetune(
            reward=rewards.Colour("red"),
            prompts=["a cat"],
            output=tmp_path / "run",
            **{name: value},
        )
    assert not (tmp_path / "run").exists()


def test_a_run_is_shown_in_a_few_lines(tmp_path):
    options = RunOptions(
        evaluation_samples=3, judges={"blue": rewards.Colour("blue")}, progress=False
    )
    run = sd15.finetune(
        reward=rewards.Weighted({"red": (rewards.Colour("red"), 0.5)}),
        prompts=PROMPTS[:1],
        output=tmp_path / "run",
        steps=2,
        updates=1,
        size=UpdateSize(samples=2),
        options=options,
    )
    shown = str(run)
    assert shown == repr(run)
    assert len(shown) < 1500
    for part in (run.folder, run.reward_before, run.reward, run.reward_gain, run.path_kl):
        assert str(part) in shown
    assert f"judge blue: {run.judge_gains['blue']} higher" in shown
    assert f"part red: {run.part_gains['red']} higher" in shown
    assert run.over_optimisation.sentence in shown
    assert shown.endswith(f"report:   {run.report}")


def test_a_model_is_loaded_without_a_warning_of_what_is_not_so(caplog, tmp_path):
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, "diffusers"):
            StableDiffusion("tiny").load(device=torch.device("cpu"), batch=2, seed=0)
    finally:
        logger.removeHandler(caplog.handler)
    assert "should be kept in float32" not in caplog.text
