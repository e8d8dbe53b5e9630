"""However the networks are run, they say the same; where they do not, by how much."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_envs.models import execution
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.sd15.stable_diffusion import StableDiffusion

UNIT = torch.finfo(torch.float32).eps


def loaded(folder: Any, **settings: Any) -> TextToImageUNet:
    """The model with an adapter that is not fresh."""
    model = TextToImageUNet.load(folder, **({"guidance": 2.0, "lora_rank": 2} | settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def answers(model: TextToImageUNet) -> dict[str, Tensor]:
    """Scores with the adapter and without, and a gradient."""
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(3, *model.event, generator=generator)
    asked = states, torch.tensor([3, 500, 900]), model.condition(["a cat", "a ship", ""])
    scores = model(*asked)
    scores.square().mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters if p.grad is not None])
    with torch.no_grad(), model.pretrained():
        pretrained = model(*asked)
    return {"scores": scores.detach(), "pretrained": pretrained, "gradient": gradient}


def assert_same(ours: dict[str, Tensor], plain: dict[str, Tensor], rounding: float) -> None:
    for name, expected in plain.items():
        gap = (ours[name] - expected).norm() / expected.norm()
        assert gap <= rounding, f"{name}: {gap:.1e}"
    assert (ours["scores"] - ours["pretrained"]).norm() > 0.001 * ours["scores"].norm()


def test_channels_last_changes_rounding_only(save_small):
    """256 units, as ``score_rounding`` allows for other kernels; the adapter's layers included."""
    folder = save_small()
    plain = answers(loaded(folder, lora_targets=["to_q", "conv1"]))
    model = loaded(folder, lora_targets=["to_q", "conv1"], channels_last=True)
    weight = model.pipe.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert_same(answers(model), plain, 256 * UNIT)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's compiler deprecates freely
def test_a_compiled_network_is_the_same_with_its_adapter_on_and_off(save_small, monkeypatch):
    """Activations computed again; traced as for any backend, then run as it stands: bit for bit."""
    monkeypatch.setattr(execution, "BACKEND", "eager")
    few = {"mid_block_type": None, "up_block_types": ("UpBlock2D",) * 2}
    folder, settings = save_small(few), {"gradient_checkpointing": True, "guidance": 1.0}
    plain = loaded(folder, **settings)
    model = loaded(folder, compile=True, **settings)
    assert_same(answers(model), answers(plain), 0.0)
    assert list(model.pipe.unet.state_dict()) == list(plain.pipe.unet.state_dict())


@pytest.mark.parametrize("load", [StableDiffusion, TextToImageUNet.load])
def test_an_offloaded_reference_is_not_compiled(load):
    with pytest.raises(ValueError, match=r"compile must be left out with reference='offloaded'"):
        load("tiny", trains="all", reference="offloaded", compile=True)


def test_pictures_of_slices_are_the_same_and_those_of_tiles_are_not(save_small):
    """Each tile is normalised by itself, so that pictures are off by more than rounding."""
    folder = save_small()
    plain = TextToImageUNet.load(folder, resolution=64)
    latents = torch.randn(3, *plain.event, generator=torch.Generator().manual_seed(1))
    pictures = plain.decode(latents)
    slices = TextToImageUNet.load(folder, resolution=64, decode_slices=True).decode(latents)
    assert (slices - pictures).abs().max() <= 256 * UNIT
    tiles = TextToImageUNet.load(folder, resolution=64, decode_tiles=True)
    assert tiles.pipe.vae.tile_sample_min_size < 64
    gap = (tiles.decode(latents) - pictures).abs()
    assert 1e-3 < gap.mean() < 0.1
    own = TextToImageUNet.load(folder, decode_tiles=True)  # one tile: no larger than its own size
    assert torch.equal(own.decode(latents[..., :8, :8]), plain.decode(latents[..., :8, :8]))
