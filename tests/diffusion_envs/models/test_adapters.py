"""Adapters: fresh ones are the identity, names are checked, plain diffusers reads exports whole."""

import os
import stat
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_envs.models import adapters, exports
from diffusion_envs.models.text_to_image_unet import TextToImageUNet

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

KINDS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
KINDS += ("conv1", "conv2", "conv_in", "conv", "conv_shortcut", "time_emb_proj", "linear_1")


def trained(folder: Path, targets=KINDS, **settings) -> TextToImageUNet:
    """A model whose adapter is not fresh."""
    model = TextToImageUNet.load(folder, lora_rank=3, lora_targets=targets, **settings)
    generator = torch.Generator().manual_seed(8)
    for parameter in model.parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def outputs(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    states = torch.randn(2, 4, 8, 8, generator=generator)
    words = torch.randn(2, 32, 24, generator=generator)
    with torch.no_grad():
        return unet(states, torch.tensor([3, 700]), encoder_hidden_states=words).sample


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_plain_diffusers_reads_every_number_of_every_kind_of_layer(save_small, tmp_path, precision):
    folder = save_small()
    model = trained(folder, precision=precision)
    path = model.export(tmp_path)
    assert path == tmp_path / "pytorch_lora_weights.safetensors"
    assert not list(tmp_path.glob(".unproved*"))
    keys = load_file(path).keys()
    assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in keys)

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pretrained = outputs(pipe.unet)
    pipe.load_lora_weights(tmp_path)
    theirs = get_peft_model_state_dict(pipe.unet, adapter_name=next(iter(pipe.unet.peft_config)))
    assert sum(t.numel() for t in theirs.values()) == sum(p.numel() for p in model.parameters)
    if precision == "float32":
        assert torch.equal(outputs(pipe.unet), outputs(model.score.unet))
        assert (outputs(pipe.unet) - pretrained).abs().max() > 0.01


def test_a_file_of_which_diffusers_reads_a_part_is_refused_and_the_loss_counted(
    save_small, tmp_path, monkeypatch
):
    """Attention's keys in diffusers' format, the others in peft's, as once exported."""
    model = trained(save_small(), ("to_q", "to_k", "proj_in", "proj_out"))
    unet = model.score.unet
    mixed = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    path = tmp_path / "mixed.safetensors"
    save_file({f"unet.{k}": v.detach().contiguous() for k, v in mixed.items()}, path)
    numbers = sum(p.numel() for p in model.parameters)
    lost = sum(
        p.numel() for name, p in unet.named_parameters() if "lora" in name and ".to_" in name
    )
    with pytest.raises(exports.ExportError, match=rf"{lost} of its {numbers} numbers.*to_k"):
        exports.prove_lora(unet, path, outputs)


def test_an_export_that_is_not_what_was_trained_leaves_nothing_behind(
    save_small, tmp_path, monkeypatch
):
    model = trained(save_small())
    older = model.export(tmp_path).read_bytes()
    from safetensors import torch as format_

    save = format_.save

    def spoiled(tensors: dict[str, Tensor], **settings) -> bytes:
        name = max(tensors)
        return save(tensors | {name: tensors[name] * 1.001}, **settings)

    monkeypatch.setattr(format_, "save", spoiled)
    with pytest.raises(exports.ExportError, match="checkpoint is intact"):
        model.export(tmp_path)
    assert not list(tmp_path.glob(".unproved*"))
    assert (tmp_path / adapters.LORA_FILE).read_bytes() == older


def test_outputs_that_differ_are_refused(save_small):
    unet = trained(save_small()).score.unet
    calls = iter([1.0, 1.002])
    with pytest.raises(exports.ExportError, match="outputs"):
        exports.compare_outputs(unet, unet, lambda network: torch.full((4,), next(calls)))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_exported_file_has_the_mode_of_the_umask(save_small, tmp_path, umask, mode):
    model = trained(save_small(), ("to_q",))
    before = os.umask(umask)
    try:
        path = model.export(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_fresh_adapter_is_float32_seeded_and_the_pretrained_model(save_small):
    folder = save_small()
    plain = outputs(StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).unet)
    state = torch.random.get_rng_state()
    one, same, other = (
        TextToImageUNet.load(folder, lora_rank=3, lora_targets=KINDS, seed=seed)
        for seed in (4, 4, 5)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(outputs(one.score.unet), plain)
    assert all(p.dtype == torch.float32 for p in one.parameters)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, same.parameters, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters, other.parameters, strict=True))
    trains = {id(p) for p in one.score.unet.parameters() if p.requires_grad}
    assert trains == {id(p) for p in one.parameters}


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["to_q", "to_qq", "nothere"], ["'to_qq' is no layer", "mean to_q", "'nothere'"]),
        (["attn1"], ["'attn1' is neither", "to_out.0, to_q"]),
        (["norm1", "to_x"], ["'norm1' is neither", "'to_x' is no layer"]),
        ("to_q", ["list of names", "'to_q'"]),
        ([], ["list of names"]),
    ],
)
def test_each_target_that_is_no_layer_is_named(save_small, targets, words):
    with pytest.raises(ValueError, match="lora_targets") as caught:
        TextToImageUNet.load(save_small(), lora_targets=targets)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "'to_q' is" not in str(caught.value)


@pytest.mark.parametrize("rank", [0, -1, True])
def test_ranks_that_are_no_positive_integers_are_refused(save_small, rank):
    with pytest.raises(ValueError, match="lora_rank"):
        TextToImageUNet.load(save_small(), lora_rank=rank)


def test_the_adapter_is_off_within_the_context_only_and_contexts_nest(save_small):
    folder = save_small()
    model = trained(folder)
    plain = outputs(StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).unet)
    on = outputs(model.score.unet)
    with model.pretrained():
        assert torch.equal(outputs(model.score.unet), plain)
        with model.pretrained():
            pass
        assert torch.equal(outputs(model.score.unet), plain)
        with model.score.adapter.switched(off=False):
            assert torch.equal(outputs(model.score.unet), on)
    assert torch.equal(outputs(model.score.unet), on)
    assert not torch.equal(plain, on)


def test_merged_weights_are_the_adapted_network(save_small):
    unet = trained(save_small()).score.unet
    twin = exports.merged_twin(unet)
    assert not any("lora" in name for name in twin.state_dict())
    # sums of a few hundred terms of size 1, in another order
    torch.testing.assert_close(outputs(twin), outputs(unet), rtol=0, atol=1e-4)
