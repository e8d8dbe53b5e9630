"""Single files of weights, in the layout in which people share them."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusion_envs.models.folders import kind_of_single_file
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.sd15 import StableDiffusion
from tests.diffusion_envs.models.small_pipelines import small_pipeline

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

LEVELS, LAYERS = 2, 1  # of the small networks
RESNET = [
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
]  # fmt: skip
ENDS = [
    ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
    ("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
]  # fmt: skip
DECODER = [
    ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
    ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
    ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
    ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"),
]  # fmt: skip


def _replaced(name: str, pairs: list[tuple[str, str]]) -> str:
    for theirs, original in pairs:
        name = re.sub(rf"(^|\.){re.escape(theirs)}\.", rf"\g<1>{original}.", name)
    return name


def original_unet(name: str) -> str:
    """The name of a weight of a UNet in the original layout."""
    blocks: list[tuple[str, str]] = []
    for i in range(LEVELS):
        for j in range(LAYERS):
            place = f"input_blocks.{1 + i * (LAYERS + 1) + j}"
            blocks += [(f"down_blocks.{i}.resnets.{j}", f"{place}.0")]
            blocks += [(f"down_blocks.{i}.attentions.{j}", f"{place}.1")]
        blocks += [
            (f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{(i + 1) * (LAYERS + 1)}.0.op")
        ]
        for j in range(LAYERS + 1):
            place = f"output_blocks.{i * (LAYERS + 1) + j}"
            blocks += [(f"up_blocks.{i}.resnets.{j}", f"{place}.0")]
            blocks += [(f"up_blocks.{i}.attentions.{j}", f"{place}.1")]
        # the first block up has no attention
        blocks += [(f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{LAYERS}.1.conv")]
    inside = [] if "transformer_blocks" in name else RESNET
    return "model.diffusion_model." + _replaced(name, [*blocks, *ENDS, *inside])


def original_vae(name: str) -> str:
    """The name of a weight of a decoder in the original layout."""
    blocks: list[tuple[str, str]] = []
    for i in range(LEVELS):
        up = LEVELS - 1 - i
        blocks += [(f"down_blocks.{i}.downsamplers.0.conv", f"down.{i}.downsample.conv")]
        blocks += [(f"up_blocks.{i}.upsamplers.0.conv", f"up.{up}.upsample.conv")]
        blocks += [(f"down_blocks.{i}.resnets.{j}", f"down.{i}.block.{j}") for j in range(3)]
        blocks += [(f"up_blocks.{i}.resnets.{j}", f"up.{up}.block.{j}") for j in range(3)]
    return "first_stage_model." + _replaced(name, [*blocks, *DECODER])


def original_text(name: str) -> str:
    """The name of a weight of a text encoder in the original layout."""
    return f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"


def save_single(pipe: Any, path: Path, **changed: Tensor) -> Path:
    parts = {"unet": original_unet, "vae": original_vae, "text_encoder": original_text}
    tensors = {
        rename(name): tensor.clone().contiguous()
        for part, rename in parts.items()
        for name, tensor in getattr(pipe, part).state_dict().items()
    }
    save_file(tensors | changed, path)
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """A folder in diffusers' layout without weights."""
    small_pipeline().save_pretrained(tmp_path / "model")
    without = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(tmp_path / "model", tmp_path / "settings", ignore=without))


def test_a_single_file_is_the_folder_that_it_was_made_of(tmp_path, settings):
    file = save_single(small_pipeline(), tmp_path / "model.safetensors")
    named = StableDiffusion(file, config=settings, lora_rank=2)
    single = named.load(device=torch.device("cpu"), batch=8, seed=0)
    whole = TextToImageUNet.load(tmp_path / "model", lora_rank=2)
    assert isinstance(single, TextToImageUNet)
    states = torch.randn(2, *whole.event, generator=torch.Generator().manual_seed(0))
    told, timesteps = whole.condition(["a cat", "red"]), torch.tensor([3, 700])
    assert torch.equal(single.condition(["a cat", "red"]).tokens, told.tokens)
    assert torch.equal(single(states, timesteps, told), whole(states, timesteps, told))
    assert torch.equal(single.decode(states), whole.decode(states))


def test_without_settings_and_without_a_network_the_remedy_is_named(tmp_path, monkeypatch):
    import huggingface_hub

    def fail(name: str, **settings: Any) -> str:
        raise OSError(f"{name} cannot be reached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    file = save_single(small_pipeline(), tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"cannot be reached.*name a folder .*: config"):
        TextToImageUNet.load(file)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is not there"):
        TextToImageUNet.load(file, config=tmp_path)


def test_settings_are_refused_beside_a_folder(settings):
    with pytest.raises(ValueError, match="config is for single files"):
        TextToImageUNet.load("tiny", config=settings)


UNET, XL = "model.diffusion_model", "conditioner.embedders"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{XL}.0.model.transformer.resblocks.9.mlp.c_proj.bias": (4,)}, "the refiner"),
        ({f"{UNET}.input_blocks.0.0.weight": (8, 9, 3, 3)}, "an inpainting model"),
        ({f"{UNET}.double_blocks.0.img_attn.norm.key_norm.scale": (4,)}, "of the kind 'flux"),
        ({f"{UNET}.something.else": (4,)}, "is not known"),
        ({"lora_unet_mid.lora_down.weight": (2, 4)}, "is not known"),
    ],
)
def test_single_files_of_other_models_are_named(tmp_path, tensors, words):
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
    with pytest.raises(ValueError, match=f"{words}.*supported are single files"):
        kind_of_single_file(file)


def test_pickles_and_broken_files_are_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match="is a pickle, which can run code"):
        TextToImageUNet.load(tmp_path / "model.ckpt")
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match="is no file of tensors"):
        TextToImageUNet.load(tmp_path / "model.safetensors")


def test_a_single_file_of_the_base_model_of_xl_is_known(tmp_path):
    names = (
        f"{XL}.1.model.transformer.resblocks.9.mlp.c_proj.bias",
        f"{UNET}.input_blocks.1.0.weight",
    )
    save_file({name: torch.zeros(4) for name in names}, tmp_path / "xl.safetensors")
    assert kind_of_single_file(tmp_path / "xl.safetensors") == "xl_base"
