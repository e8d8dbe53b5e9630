"""A finished run's export: its card, written again, merged, pushed to a stand-in of the hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from diffusion_envs import rewards
from diffusion_envs.models.exports import ExportError
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.command_line import main
from diffusion_envs.runs.model_card import card
from diffusion_envs.runs.prompts import split
from diffusion_envs.runs.publishing import export
from diffusion_envs.sd15.__main__ import FAMILY
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.models.small_pipelines import small_pipeline
from tests.diffusion_envs.sd15.calling import finetune

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

PROMPTS = ["a cat", "a | ship", *(f"number {n}" for n in range(5))]
SETTINGS = {
    "reward": rewards.Colour("red"),
    "prompts": PROMPTS,
    "steps": 2,
    "updates": 2,
    "size": UpdateSize(samples=4, batch=8, value_epochs=1, average=0.6),
    "guidance": 2.0,
    "evaluation_samples": 7,
    "progress": False,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model in a folder whose whole name is nobody's business."""
    folder = tmp_path_factory.mktemp("private") / "somebodys-model"
    small_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["lora", "all"])
def finished(request, base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    finetune(base, output=folder, trains=request.param, **SETTINGS)
    return folder


def test_what_is_exported_and_stored_is_the_running_mean(finished):
    """Of all weights too; the mean of two updates is half way between them."""
    stored = checkpoint.latest(finished / "exported")
    state = checkpoint.latest(finished / "checkpoints")
    assert stored is not None
    assert state is not None
    last, mean = state.state["adapter"], state.state["mean"]
    assert len(last) == len(stored.state["parameters"])
    assert all(torch.equal(a, b) for a, b in zip(mean, stored.state["parameters"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(mean, last, strict=True))
    if (finished / "pipeline").is_dir():
        unet = load_file(finished / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
        names = [name for name, _ in small_pipeline().unet.named_parameters()]
        assert all(torch.equal(unet[n], tensor) for n, tensor in zip(names, mean, strict=True))


def test_the_card_says_what_it_is_and_nothing_of_this_machine(finished, base):
    read = ModelCard.load(finished / "README.md")
    whole = (finished / "pipeline").is_dir()
    assert read.data.library_name == "diffusers"
    assert read.data.pipeline_tag == "text-to-image"
    assert read.data.base_model is None  # a folder's name is no id
    assert ("lora" in read.data.tags) != whole
    text = read.text
    for words in (
        "The UNet of `somebodys-model`" if whole else "A LoRA adapter of `somebodys-model`",
        "ScoreAsAction with the reward `Colour`",
        "7 in training, the first 5 of them",
        "- a \\| ship",
        "Path KL from the pretrained model: ",
        "| objective.kl_weight | 0.1 |",
        "| updates (exported: of update) | 2 (2) |",
        "guidance_scale=2.0",
        "Not stated.",
    ):
        assert words in text, words
    assert ("load_lora_weights" in text) != whole
    assert ("ComfyUI" in text) != whole
    assert str(base.parent) not in text
    assert base.parent.name not in text


def test_the_card_tells_held_out_prompts_and_the_negative_one_from_those_of_training(
    finished, tmp_path
):
    config = json.loads((finished / "config.json").read_text())
    config["settings"]["options"]["held_out"] = 2
    config["settings"]["model"]["negative_prompt"] = 'a red "dog"'
    for name in ("metrics.jsonl", "summary.json"):
        shutil.copy(finished / name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = card(tmp_path)
    training, held_out = split(len(PROMPTS), 2, config["settings"]["seed"])
    assert "5 in training:" in text
    held_out_part = text.split("2 of held-out samples:")[1].split("##")[0]
    for k, prompt in enumerate(PROMPTS):
        assert (prompt.replace("|", "\\|") in held_out_part) == (k in held_out)
    assert len(training) == 5
    assert r'negative_prompt="a red \"dog\""' in text


@pytest.mark.parametrize("words", [[], ["--merged"]])
def test_the_command_writes_again_and_merges(finished, base, tmp_path, words, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("pytorch_lora_weights.safetensors", "README.md"):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "pipeline", ignore_errors=True)
    merged = tmp_path / "models" / "mine"
    assert main(FAMILY, ["export", str(run), *words, *([str(merged)] if words else [])]) == 0
    assert (run / "README.md").is_file()
    plain = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    if words:
        assert f"merged: {merged}" in capsys.readouterr().out
        assert "load_lora_weights" not in (merged / "README.md").read_text()
        plain = StableDiffusionPipeline.from_pretrained(merged, safety_checker=None)
    elif (run / "pipeline").is_dir():
        plain = StableDiffusionPipeline.from_pretrained(run / "pipeline", safety_checker=None)
    else:
        plain.load_lora_weights(run)
    plain.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    theirs = plain("a cat", latents=latents, guidance_scale=2.0, **settings).images
    ours = pictures(finished, base, latents)
    # a network of a few thousand weights in float32, merged or not: some 1e-6 a call
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def pictures(finished: Path, base: Path, latents: torch.Tensor) -> torch.Tensor:
    """Of our own network with the exported numbers, by plain diffusers' loop."""
    trains = json.loads((finished / "config.json").read_text())["settings"]["model"]["trains"]
    model = TextToImageUNet.load(base, trains=trains)
    stored = checkpoint.latest(finished / "exported")
    assert stored is not None
    for parameter, tensor in zip(model.parameters, stored.state["parameters"], strict=True):
        parameter.data.copy_(tensor)
    model.pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "output_type": "pt", "guidance_scale": 2.0}
    return model.pipe("a cat", latents=latents, **settings).images


class Hub:
    """Stands in for the hub: somebody is logged in, or nobody is, or it takes nothing."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls, self.files = fails, list[str](), dict[str, int]()

    def whoami(self) -> None:
        self._called("whoami")

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> str:
        self._called(f"create {repository} {private} {exist_ok}")
        return f"https://hub/{repository}"

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
        self._called(f"upload {repo_id}")
        place = Path(folder_path)
        files = [path for path in place.rglob("*") if path.is_file()]
        self.files = {str(path.relative_to(place)): path.stat().st_size for path in files}

    def _called(self, words: str) -> None:
        self.calls.append(words)
        if self.fails and words.startswith(self.fails):
            raise RuntimeError("no token\nand more")


def test_what_is_pushed_is_what_was_exported_with_its_card(finished, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert export(finished, push="me/demo", private=True) == ["pushed: https://hub/me/demo"]
    assert hub.calls == ["whoami", "create me/demo True True", "upload me/demo"]
    whole = (finished / "pipeline").is_dir()
    if whole:
        assert {"README.md", "model_index.json"} < hub.files.keys()
        assert "unet/diffusion_pytorch_model.safetensors" in hub.files
    else:
        names = {"README.md", "lora_kohya.safetensors", "pytorch_lora_weights.safetensors"}
        assert hub.files.keys() == names
    assert all(hub.files.values())


def test_what_the_hub_does_not_take_is_still_there(finished, monkeypatch, tmp_path):
    held = sorted(path for path in finished.rglob("*"))
    for fails, kind, words in (
        ("whoami", PermissionError, "nothing was written or pushed: no token. Log in by hf auth"),
        ("create", ConnectionError, f"did not take me/demo: no token. All .* in {finished}"),
        ("upload", ConnectionError, "push again"),
    ):
        hub = Hub(fails)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda hub=hub: hub)
        with pytest.raises(kind, match=words):
            export(finished, tmp_path / "merged" if fails == "whoami" else None, "me/demo")
    assert not (tmp_path / "merged").exists()
    assert sorted(path for path in finished.rglob("*")) == held


def test_a_damaged_adapter_is_not_pushed(finished, monkeypatch, tmp_path):
    if (finished / "pipeline").is_dir():
        pytest.skip("a whole model has no digest")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "lora_kohya.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 16  # of the last number
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"lora_kohya\.safetensors is damaged: its sha256"):
        export(tmp_path / "run", push="me/demo")


def test_bad_commands_are_refused_before_anything_is_loaded(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(TextToImageUNet, "load", None)
    for push in ("demo", "me/you/demo", "me/", "https://hub/me/demo"):
        with pytest.raises(ValueError, match="as USER/NAME, got"):
            export(finished, push=push)
    with pytest.raises(FileNotFoundError, match="run must be the folder of a run"):
        export(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="new or empty folder"):
        export(finished, tmp_path)


def test_a_merged_model_that_is_read_back_otherwise_is_refused(finished, tmp_path, monkeypatch):
    from diffusion_envs.models import exports

    monkeypatch.setattr(exports, "compare_outputs", _differ)
    with pytest.raises(ExportError, match="other outputs"):
        export(finished, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def _differ(*_: Any) -> None:
    raise ExportError("other outputs")
