"""What trains: alphas, an existing LoRA, all weights; each exported and read by plain diffusers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_envs.models import adapters, exports
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.models.trainable import Attached, Trainable
from tests.diffusion_envs.models.small_pipelines import small_pipeline

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

KINDS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
KINDS += ("conv1", "conv2", "conv_in", "conv", "conv_shortcut", "time_emb_proj", "linear_1")


def network(**settings: Any) -> UNet2DConditionModel:
    """A small UNet of Stable Diffusion, frozen."""
    unet = small_pipeline().unet
    if settings:
        unet = UNet2DConditionModel.from_config({**unet.config, **settings})
    return unet.requires_grad_(False).eval()


def network_of_sdxl() -> UNet2DConditionModel:
    """A small UNet with SDXL's blocks, frozen."""
    with torch.random.fork_rng([]):
        torch.manual_seed(6)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16),
            layers_per_block=2,
            norm_num_groups=4,
            cross_attention_dim=24,
            attention_head_dim=(2, 4, 4),
            use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 20,
        )
    return unet.requires_grad_(False).eval()


def outputs(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    states = torch.randn(2, 4, 8, 8, generator=generator)
    words = torch.randn(2, 32, 24, generator=generator)
    pooled = torch.randn(2, 20, generator=generator)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[8, 8, 0, 0, 8, 8]] * 2)}
    more = {} if unet.config.get("addition_embed_type") is None else {"added_cond_kwargs": added}
    with torch.no_grad():
        timesteps = torch.tensor([3, 700])
        return unet(states, timesteps, encoder_hidden_states=words, **more).sample


def shaken(attached: Attached, size: float = 0.1) -> Attached:
    """Some steps of training later."""
    generator = torch.Generator().manual_seed(8)
    for parameter in attached.parameters:
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return attached


def close(ours: Tensor, theirs: Tensor) -> None:
    # sums of a few hundred terms of size 1, in another order
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_alpha_and_the_rank_stabilised_scale_are_those_of_peft():
    for stabilised in (False, True):
        plain = network()
        plain.add_adapter(
            LoraConfig(r=4, lora_alpha=3, use_rslora=stabilised, target_modules=["to_q"])
        )
        trainable = Trainable(rank=4, alpha=3.0, targets=["to_q"], rank_stabilised=stabilised)
        ours = shaken(trainable.attach(network(), seed=0))
        theirs = [p for p in plain.parameters() if p.requires_grad]
        for parameter, values in zip(theirs, ours.parameters, strict=True):
            parameter.data.copy_(values.data)
        assert torch.equal(outputs(plain), outputs(ours.network))
        places = [part for part in ours.network.modules() if hasattr(part, "scaling")]
        assert {part.scaling["default"] for part in places} == {3 / (2 if stabilised else 4)}


@pytest.mark.slow
@pytest.mark.parametrize(("build", "stabilised"), [(network, False), (network_of_sdxl, True)])
def test_an_adapter_is_read_back_in_both_layouts(build, stabilised, tmp_path):
    """Every kind of layer; diffusers' own loader of SDXL reads the original network's names."""
    trainable = Trainable(rank=3, alpha=2.0, targets=KINDS, rank_stabilised=stabilised)
    trained = shaken(trainable.attach(build(), seed=0))
    assert trained.write(tmp_path, outputs) == tmp_path / "pytorch_lora_weights.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "lora_kohya.safetensors",
        "pytorch_lora_weights.safetensors",
    ]
    loader = StableDiffusionXLLoraLoaderMixin
    for name in (adapters.LORA_FILE, exports.KOHYA_FILE):
        plain = build()
        layers, alphas = loader.lora_state_dict(
            str(tmp_path), weight_name=name, unet_config=plain.config
        )
        loader.load_lora_into_unet(layers, alphas, plain, adapter_name="theirs")
        close(outputs(plain), outputs(trained.network))
        assert (outputs(plain) - outputs(build())).abs().max() > 0.01
    again = Trainable(start=tmp_path / exports.KOHYA_FILE).attach(build(), seed=0)
    close(outputs(again.network), outputs(trained.network))
    keys = load_file(tmp_path / exports.KOHYA_FILE)
    deep = "lora_unet_input_blocks_7_1_transformer_blocks_1_attn2_to_out_0.lora_up.weight"
    assert (deep in keys) == (build is network_of_sdxl)
    assert not any(".lora_A" in key for key in keys)


def test_names_of_the_original_network_are_those_of_published_files():
    """A few of Stability's own sd_xl_offset_example-lora, and of sgm's network."""
    assert {name: exports.original_name(name, 2) for name in _ORIGINAL} == _ORIGINAL


_ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.1.conv2": "input_blocks.2.0.out_layers.3",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
    "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2": (
        "input_blocks.8.1.transformer_blocks.9.ff.net.2"
    ),
    "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
    "mid_block.attentions.0.proj_out": "middle_block.1.proj_out",
    "up_blocks.0.attentions.2.proj_in": "output_blocks.2.1.proj_in",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}


# -- an existing LoRA ----------------------------------------------------------------------------


def in_layout(layout: str, folder: Path) -> tuple[Path, Tensor]:
    """A LoRA that others trained, with a scale of its own, and the adapted network's outputs."""
    trained = shaken(
        Trainable(rank=4, alpha=3.0, targets=["to_q", "conv1"]).attach(network(), seed=1)
    )
    trained.write(folder, outputs)
    if layout == "diffusers":
        (folder / exports.KOHYA_FILE).unlink()
        return folder, outputs(trained.network)
    if layout == "kohya":
        return folder / exports.KOHYA_FILE, outputs(trained.network)
    from peft.utils import get_peft_model_state_dict

    own = {k: v.detach() for k, v in get_peft_model_state_dict(trained.network).items()}
    place = folder / layout
    place.mkdir()
    if layout == "metadata":  # as diffusers writes since 0.34
        config = {"unet.r": 4, "unet.lora_alpha": 3, "unet.use_rslora": False}
        save_file(
            {f"unet.{k}": v.contiguous() for k, v in own.items()},
            place / "pytorch_lora_weights.safetensors",
            metadata={"lora_adapter_metadata": json.dumps(config)},
        )
        return place, outputs(trained.network)
    assert layout == "peft"
    save_file(
        {f"base_model.model.{k}": v.contiguous() for k, v in own.items()},
        place / "adapter_model.safetensors",
    )
    kept = {"peft_type": "LORA", "r": 4, "lora_alpha": 1.5, "use_rslora": True}
    (place / "adapter_config.json").write_text(json.dumps(kept))  # 1.5 / sqrt(4) = 3 / 4
    return place, outputs(trained.network)


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft", "metadata"])
def test_training_starts_from_a_lora_which_is_its_own_reference(layout, tmp_path):
    place, adapted = in_layout(layout, tmp_path)
    started = Trainable(start=place).attach(network(), seed=0)
    unet = started.network
    close(outputs(unet), adapted)
    at_first = outputs(unet)
    with started.switch.off():
        assert torch.equal(outputs(unet), at_first)  # KL 0 and ratio 1, bit for bit
    shaken(started)
    assert (outputs(unet) - at_first).abs().max() > 0.01
    with started.switch.off():
        assert torch.equal(outputs(unet), at_first)
        assert not [p for p in unet.parameters() if p.requires_grad]
    assert {id(p) for p in unet.parameters() if p.requires_grad} == set(map(id, started.parameters))

    written = tmp_path / "written"
    written.mkdir()
    started.write(written, outputs)
    plain = network()
    plain.load_lora_adapter(str(written / adapters.LORA_FILE), prefix="unet")
    close(outputs(plain), outputs(unet))
    ranks = {len(t) for name, t in load_file(written / adapters.LORA_FILE).items() if "_A" in name}
    assert ranks == {4}


def test_every_layer_has_the_rank_and_alpha_that_the_file_says(tmp_path):
    """Kohya's files may differ by layer, where diffusers' own loader mixes up the alphas."""
    generator = torch.Generator().manual_seed(2)
    unet = network()
    names = [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.resnets.0.conv1",
    ]
    tensors, update = {}, {}
    for name, rank, alpha in zip(names, (2, 5), (3.0, 1.0), strict=True):
        weight = unet.get_submodule(name).weight
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator)
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
        update[name] = alpha / rank * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    save_file(tensors, tmp_path / "some.safetensors")
    started = Trainable(start=tmp_path).attach(unet, seed=0)
    plain = network()
    for name, change in update.items():
        plain.get_submodule(name).weight.data += change
    close(outputs(started.network), outputs(plain))
    started.write(tmp_path, outputs)  # of several ranks
    again = Trainable(start=tmp_path / exports.KOHYA_FILE).attach(network(), seed=0)
    assert torch.equal(outputs(again.network), outputs(started.network))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 8}, "lora_rank must be left out, or be that of the LoRA.*: 4, got 8"),
        ({"alpha": 2.0}, "lora_alpha must be left out, or be that .*: 3, got 2"),
        ({"targets": ["to_q"]}, r"lora_targets must be left out.*conv1"),
    ],
)
def test_options_that_contradict_the_lora_are_refused(settings, words, tmp_path):
    place, _ = in_layout("kohya", tmp_path)
    with pytest.raises(ValueError, match=words):
        Trainable(start=place, **settings).attach(network(), seed=0)
    same = Trainable(start=place, rank=4, alpha=3.0, targets=["conv1", "to_q"])
    assert same.attach(network(), seed=0).parameters


def test_a_lora_of_another_model_is_refused_with_the_layers_that_do_not_fit(tmp_path):
    place, _ = in_layout("kohya", tmp_path)
    with pytest.raises(ValueError, match=r"another model: \d+ of its \d+ layers.*conv1.*\[8, 8, 3"):
        Trainable(start=place).attach(network(block_out_channels=(12, 16)), seed=0)
    sdxl = shaken(Trainable(rank=2).attach(network_of_sdxl(), seed=0))
    sdxl.write(tmp_path, outputs)
    for name in (exports.KOHYA_FILE, adapters.LORA_FILE):
        with pytest.raises(ValueError, match=r"another model.*no such layer"):
            Trainable(start=tmp_path / name).attach(network(), seed=0)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"lora_te_text_model_q.lora_down.weight": 2},
            "1 tensors for the text encoder.*lora_te_te",
        ),
        ({"text_encoder.q.lora_A.weight": 2}, "text encoder"),
        ({"lora_unet_mid.dora_scale": 2}, "more than plain LoRA layers.*dora"),
        ({"lora_unet_mid.lokr_w1": 2}, "LoKr.*lokr_w1"),
        ({"decoder.weight": 2}, "is no LoRA.*decoder.weight"),
        ({"unet.mid_block.resnets.0.conv1.lora_A.weight": 2}, "half of it is missing"),
    ],
)
def test_files_that_are_no_lora_of_a_unet_are_refused(tensors, words, tmp_path):
    save_file(
        {name: torch.ones(size, size) for name, size in tensors.items()}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ValueError, match=words):
        Trainable(start=tmp_path).attach(network(), seed=0)


def test_a_lora_that_is_not_there_is_refused_before_the_model_is_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lora must be a folder.*does not exist"):
        TextToImageUNet.load(tmp_path / "no model", lora=tmp_path / "none")
    (tmp_path / "a.bin").touch()
    with pytest.raises(ValueError, match=r"safetensors file.*pickled"):
        TextToImageUNet.load(tmp_path / "no model", lora=tmp_path / "a.bin")
    with pytest.raises(FileNotFoundError, match="has none"):
        TextToImageUNet.load(tmp_path / "no model", lora=tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match=r"several: a\.safetensors, b.*name the file"):
        TextToImageUNet.load(tmp_path / "no model", lora=tmp_path)
    (tmp_path / "c.safetensors").write_bytes(b"no such file")
    with pytest.raises(ValueError, match="damaged"):
        TextToImageUNet.load(tmp_path / "no model", lora=tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 0.0}, "lora_alpha must be a positive"),
        ({"alpha": math.inf}, "lora_alpha must be a positive"),
        ({"reference": "offloaded"}, "reference must be left out where a LoRA trains"),
        ({"weights": "all", "rank": 4}, "lora_rank must be left out where all weights train"),
        ({"weights": "all", "alpha": 4.0, "start": "x"}, "lora_alpha, lora must be left out"),
        ({"rank": 0, "alpha": 1.0}, "lora_alpha must be left out where lora_rank is 0"),
        ({"start": "x", "rank_stabilised": True}, "lora_rank_stabilised must be left out"),
    ],
)
def test_contradictory_options_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Trainable(**settings)


# -- all weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["copy", "offloaded"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_all_weights_train_in_float32_beside_a_frozen_reference(
    save_small, tmp_path, reference, precision
):
    folder = save_small()
    model = TextToImageUNet.load(
        folder, guidance=1.0, trains="all", reference=reference, precision=precision
    )
    unet = model.score.unet
    assert len(model.parameters) == len(list(unet.parameters()))
    assert {p.dtype for p in model.parameters} == {torch.float32}
    at_first = scores(model)
    with model.pretrained():
        assert torch.equal(scores(model), at_first)
    shaken(Attached(Trainable(weights="all"), unet, model.parameters), 0.02)
    after = scores(model)
    assert (after - at_first).abs().max() > 0.01
    with model.pretrained():
        assert torch.equal(scores(model), at_first)
    assert torch.equal(scores(model), after)

    place = model.export(tmp_path)
    assert place == tmp_path / "pipeline"
    plain = StableDiffusionPipeline.from_pretrained(place, safety_checker=None)
    assert torch.equal(outputs(plain.unet), outputs(unet))


def scores(model: TextToImageUNet) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    states = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return model(states, torch.tensor([3, 700]), model.condition(["a", "b"]))


def test_an_offloaded_reference_is_brought_in_and_forgotten_and_keeps_gradients_right():
    """Its weights are copies while it is asked; a graph through it outlives them."""
    trained = Trainable(weights="all", reference="offloaded").attach(network(), seed=0)
    copied = Trainable(weights="all").attach(network(), seed=0)
    frozen = trained.switch.pretrained
    home = [p.data_ptr() for p in frozen.parameters()]
    assert trained.switch.asked(trained.network) is trained.network
    gradients = []
    for attached in (trained, copied):
        state = torch.ones(1, 4, 8, 8, requires_grad=True)
        with attached.switch.off():
            asked = attached.switch.asked(attached.network)
            assert asked is attached.switch.pretrained
            away = [p.data_ptr() for p in asked.parameters()]
            words = torch.ones(1, 32, 24)
            out = asked(state, torch.tensor([3]), encoder_hidden_states=words).sample
        out.square().sum().backward()
        assert state.grad is not None
        gradients.append(state.grad)
        if attached is trained:
            assert not set(away) & set(home)
            assert [p.data_ptr() for p in frozen.parameters()] == home
    assert torch.equal(*gradients)


# -- merged --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["lora", "all"])
def test_a_merged_pipeline_is_the_trained_model(weights, tmp_path):
    pipe = small_pipeline()
    pipe.unet.requires_grad_(False).eval()
    trained = shaken(Trainable(weights=weights).attach(pipe.unet, seed=0), 0.05)
    place = trained.merge(tmp_path / "whole", outputs, pipe)
    assert pipe.unet is trained.network
    plain = StableDiffusionPipeline.from_pretrained(place, safety_checker=None)
    close(outputs(plain.unet), outputs(trained.network))
    assert (outputs(plain.unet) - outputs(network())).abs().max() > 0.01
    assert not list(tmp_path.glob(".unproved*"))
