"""Where models come from: what is asked of the hub, and which files are read."""

from pathlib import Path
from typing import Any

import pytest

from diffusion_envs.models import folders
from diffusion_envs.models.folders import local_folder, tiny_folder, variant_of
from diffusion_envs.sd15 import StableDiffusion


class Hub:
    """A pipeline class that downloads into a folder; of half precision only, or nothing at all."""

    def __init__(self, folder: Path, *, kind: str = "Small", variants: tuple = (None,)) -> None:
        self.folder, self.kind, self.variants = folder, kind, variants
        self.asked: list[Any] = []

    def load_config(self, model: str) -> dict[str, str]:
        if self.kind == "":
            raise OSError(f"{model} cannot be reached\nand more")
        return {"_class_name": self.kind}

    def download(self, model: str, *, variant: str | None = None, **settings: Any) -> str:
        self.asked.append(variant)
        assert settings == {"use_safetensors": True, "safety_checker": None}
        if variant not in self.variants:
            raise OSError(f"no files of variant {variant}")
        return str(self.folder)


def ask(hub: Hub, model: str = "somebody/model") -> Path:
    return local_folder(model, hub, ("Small", "Other"), {"safety_checker": None})


@pytest.mark.parametrize(
    ("variants", "asked"), [((None, "fp16"), [None]), (("fp16",), [None, "fp16"])]
)
def test_half_precision_is_downloaded_only_where_there_is_nothing_else(tmp_path, variants, asked):
    hub = Hub(tmp_path, variants=variants)
    assert ask(hub) == tmp_path
    assert hub.asked == asked


def test_models_of_other_classes_are_refused_before_they_are_downloaded(tmp_path):
    hub = Hub(tmp_path, kind="Large")
    with pytest.raises(ValueError, match=r"is a Large, which is not supported.*Other or Small"):
        ask(hub)
    assert hub.asked == []


@pytest.mark.parametrize("hub", [{"kind": ""}, {"variants": ()}])
def test_what_is_not_to_be_had_is_named_with_the_first_reason(tmp_path, hub):
    reason = "cannot be reached" if "kind" in hub else "of variant None"
    with pytest.raises(FileNotFoundError, match=rf"'somebody/model' is neither.*{reason}\."):
        ask(Hub(tmp_path, **hub))


@pytest.mark.parametrize("model", ["./none", "/none", "a/b/c", "~/none"])
def test_paths_that_do_not_exist_are_not_looked_for_on_the_hub(tmp_path, model):
    hub = Hub(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ask(hub, model)
    assert hub.asked == []


@pytest.mark.parametrize("model", ["none.safetensors", "a/none.SAFETENSORS", "none.ckpt"])
def test_a_file_that_does_not_exist_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    hub = Hub(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"does not exist: there is no {tmp_path / model}$"):
        ask(hub, model)
    assert hub.asked == []


def test_names_and_files_that_are_no_models_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="is a file"):
        ask(Hub(tmp_path), str(tmp_path / "file"))
    with pytest.raises(ValueError, match="empty name"):
        ask(Hub(tmp_path), " ")
    assert local_folder("tiny", None, ("StableDiffusionPipeline",), {}) == tiny_folder()
    assert local_folder("words", None, ("StableDiffusionPipeline",), {}).parts[-3] == "words"


def test_an_embedded_model_of_another_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "shipped_folder", lambda name: tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"model 'words'.*ctrl-diffusion\[models\]"):
        ask(hub := Hub(tmp_path), "words")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("unet", "text", "variant"),
    [
        (["diffusion_pytorch_model.safetensors"], ["model.safetensors", "pytorch_model.bin"], None),
        (["diffusion_pytorch_model.fp16.safetensors"], ["model.safetensors"], "fp16"),
        (
            ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
            ["model.safetensors", "model.fp16.safetensors"],
            None,
        ),
        (
            [f"diffusion_pytorch_model.bf16-0000{k}-of-00002.safetensors" for k in (1, 2)],
            ["model.bf16.safetensors", "model.fp16.safetensors"],
            "bf16",
        ),
        (
            [f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)],
            ["model.safetensors"],
            None,
        ),
    ],
)
def test_the_variant_is_the_one_that_all_parts_have(tmp_path, unet, text, variant):
    for part, names in (("unet", unet), ("text_encoder", text)):
        (tmp_path / part).mkdir()
        for name in ("config.json", *names):
            (tmp_path / part / name).touch()
    assert variant_of(tmp_path, ("unet", "text_encoder")) == variant


def test_parts_without_a_variant_in_common_are_refused(tmp_path):
    for part, name in (("unet", "model.fp16.safetensors"), ("vae", "model.bf16.safetensors")):
        (tmp_path / part).mkdir()
        (tmp_path / part / name).touch()
    with pytest.raises(FileNotFoundError, match="different variants in unet, vae"):
        variant_of(tmp_path, ("unet", "vae"))


def test_the_name_of_a_shipped_model_is_no_folders(tmp_path, monkeypatch):
    for name in ("tiny", "words", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    names = [StableDiffusion(name).model for name in ("tiny", "words", "other")]
    assert names == ["tiny", "words", str(tmp_path / "other")]


@pytest.mark.parametrize("lora", [True, False])
def test_the_folder_of_a_lora_is_told_to_be_named_as_one(tmp_path, lora):
    if lora:
        (tmp_path / "pytorch_lora_weights.safetensors").touch()
    said = "lacks model_index.json, unet; it has a LoRA: .* this folder as lora$"
    expected = said if lora else "lacks model_index.json, unet$"
    with pytest.raises(FileNotFoundError, match=expected):
        folders.require_parts(tmp_path, ["unet"])
