"""Unconditional UNets: the same loop, resumed bit for bit; exports that plain diffusers runs."""

import json
import math
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ctrl
from diffusion_envs.cifar10 import networks
from diffusion_envs.environment import Environment
from diffusion_envs.models.exports import ExportError
from diffusion_envs.models.protocol import Model
from diffusion_envs.models.unconditional_unet import UnconditionalUNet
from diffusion_envs.objectives import ScoreAsAction
from diffusion_envs.rewards import Colour
from diffusion_envs.runs.finetune import finetune
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.samplers import DDIM, QuadraticVariances
from diffusion_envs.training import parallel
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

pytestmark = pytest.mark.filterwarnings("default")  # diffusers deprecates freely

KINDS = {"full weights": None, "LoRA": 2}
EVENT = (3, 8, 8)


def trainer(model: UnconditionalUNet) -> Trainer:
    environment = Environment(
        model, DDIM(1.0).bind(model.table, 3), Colour("red"), ["", "picture"], seed=3
    )
    size = UpdateSize(samples=4, batch=8, value_epochs=1)
    objective = ScoreAsAction(learning_rate=1e-3)
    return Trainer(environment, objective, size, accelerator=parallel.start("cpu"))


def outputs(network: nn.Module) -> Tensor:
    states = torch.randn(2, *EVENT, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return network(states, torch.tensor([3, 700])).sample


@pytest.mark.parametrize("rank", KINDS.values(), ids=KINDS)
def test_two_updates_a_resume_and_an_export(save_pixels, tmp_path, rank):
    folder = save_pixels()
    models = [UnconditionalUNet.load(folder, lora_rank=rank) for _ in range(3)]
    assert isinstance(models[0], Model)
    start = [p.detach().clone() for p in models[0].parameters]
    whole, first, second = (trainer(model) for model in models)
    lines = list(whole.updates(2))
    list(first.updates(1))
    second.load_state(first.state())
    list(second.updates(2))
    assert [line["update"] for line in lines] == [1, 2]
    assert lines[0]["path_kl"].mean == pytest.approx(0, abs=1e-6)  # a fresh model
    assert lines[1]["path_kl"].mean > 0
    for a, b in zip(models[0].parameters, models[2].parameters, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(models[0].parameters, start, strict=True))

    path = models[0].export(tmp_path)
    plain = DDPMPipeline.from_pretrained(path)
    pretrained = outputs(DDPMPipeline.from_pretrained(folder).unet)
    trained = outputs(models[0].network)
    # merged weights: sums of a few hundred terms of size 1, in another order
    torch.testing.assert_close(
        outputs(plain.unet), trained, rtol=0, atol=0 if rank is None else 1e-5
    )
    assert (trained - pretrained).abs().max() > 1e-3
    assert plain.scheduler.config == models[0].scheduler.config
    again = UnconditionalUNet.load(path)
    torch.testing.assert_close(outputs(again.network), outputs(plain.unet), rtol=0, atol=0)
    assert not list(tmp_path.glob(".unproved*"))


@pytest.mark.parametrize("rank", KINDS.values(), ids=KINDS)
def test_the_pretrained_model_is_what_was_loaded(save_pixels, rank):
    folder = save_pixels()
    model = UnconditionalUNet.load(folder, lora_rank=rank)
    pretrained = DDPMPipeline.from_pretrained(folder).unet
    for parameter in model.parameters:
        parameter.data += 0.05
    states = torch.randn(2, *EVENT, generator=torch.Generator().manual_seed(9))
    timesteps, nothing = torch.tensor([3, 700]), model.condition(["", ""])
    with torch.no_grad():
        with model.pretrained():
            off = model.prediction(states, timesteps, nothing)
        on = model.prediction(states, timesteps, nothing)
    assert torch.equal(off, outputs(pretrained))
    assert torch.equal(on, outputs(model.network))
    assert not torch.equal(on, off)
    assert model.calls == 4


@pytest.mark.parametrize("rank", KINDS.values(), ids=KINDS)
def test_gradients_pass_through_both_models_with_activations_computed_again(save_pixels, rank):
    """The pretrained score's gradient is the pretrained model's, whenever it is asked for."""
    folder = save_pixels()
    found = []
    for again in (False, True):
        model = UnconditionalUNet.load(
            folder, lora_rank=rank, lora_targets=["to_q", "conv1"], gradient_checkpointing=again
        )
        for parameter in model.parameters:
            parameter.data += 0.05
        states = torch.randn(2, *EVENT, generator=torch.Generator().manual_seed(9))
        states.requires_grad_()
        timesteps = torch.tensor([3, 700])
        with model.pretrained():
            off = model(states, timesteps, None)
        (off.square().sum() + model(states, timesteps, None).sum()).backward()
        assert states.grad is not None
        found.append(states.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_samples_are_those_of_plain_diffusers_without_clipping(save_pixels, prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    folder = save_pixels(scheduler=scheduler)
    model = UnconditionalUNet.load(folder)
    pipe = DDPMPipeline.from_pretrained(folder)
    theirs = DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    theirs.set_timesteps(4)
    start = torch.randn(2, *EVENT, generator=torch.Generator().manual_seed(1))
    states = expected = start
    sampler = DDIM(0.0).bind(model.table, 4)
    assert sampler.timesteps.tolist() == theirs.timesteps.tolist()
    with torch.no_grad():
        for k, t in enumerate(theirs.timesteps):
            expected = theirs.step(pipe.unet(expected, t).sample, t, expected).prev_sample
            step = torch.full((2,), k)
            states = sampler.mean(step, states, model(states, t.expand(2), None))
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


def test_pictures_are_in_the_unit_interval_and_differentiable(save_pixels):
    model = UnconditionalUNet.load(save_pixels())
    states = torch.tensor([-3.0, -1.0, 0.5, 1.0, 7.0]).view(5, 1, 1, 1).requires_grad_()
    pictures = model.decode(states)
    assert pictures.flatten().tolist() == [0, 0, 0.75, 1, 1]
    pictures.sum().backward()
    assert states.grad is not None
    assert states.grad.flatten()[2] == 0.5


def test_rows_in_chunks_are_the_same_rows(save_pixels):
    folder = save_pixels()
    whole, parts = (UnconditionalUNet.load(folder, batch=batch) for batch in (8, 2))
    states = torch.randn(5, *EVENT, generator=torch.Generator().manual_seed(9))
    timesteps = torch.tensor([1, 900, 30, 4, 500])
    with torch.no_grad():
        one, other = (m(states, timesteps, None) for m in (whole, parts))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_scores_between_timesteps_are_those_of_the_samplers_levels(save_pixels, prediction_type):
    """Against the definitions, at the node's own alpha-bar; at integers as at the entries."""
    folder = save_pixels(scheduler=DDPMScheduler(prediction_type=prediction_type))
    model = UnconditionalUNet.load(folder)
    network = DDPMPipeline.from_pretrained(folder).unet
    sampler = QuadraticVariances().bind(model.table, 10, prediction_type)
    x = torch.randn(10, *EVENT, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        scores = model(x, sampler.timesteps, None)
        said = network(x, sampler.timesteps.float()).sample
        whole = model(x[:2], torch.tensor([3, 700]), None)
        same = model(x[:2], torch.tensor([3.0, 700.0]), None)
    abar = sampler.alpha_bar[:-1].view(-1, 1, 1, 1)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    epsilon = {
        "epsilon": said,
        "v_prediction": alpha * said + sigma * x,
        "sample": (x - alpha * said) / sigma,
    }[prediction_type]
    # 0.0001 of noise is left at timestep 0 of a float32 table: its root is off by 1e-4
    torch.testing.assert_close(scores.double(), -epsilon.double() / sigma, rtol=5e-4, atol=1e-4)
    torch.testing.assert_close(same, whole, rtol=1e-5, atol=1e-6)


def test_samples_of_few_steps_are_those_of_the_published_loop(save_pixels):
    """x0 and noise from epsilon at fractional timesteps, then DDPM's step to the next level."""
    folder = save_pixels()
    model = UnconditionalUNet.load(folder)
    network = DDPMPipeline.from_pretrained(folder).unet
    sampler = QuadraticVariances().bind(model.table, 10)
    environment = Environment(model, sampler, Colour("red"), [""], seed=5)
    one = environment.sample(
        lambda mean, _: ctrl.DeterministicPolicy(mean),
        range(2),
        torch.zeros(2, dtype=torch.int64),
        stream="test",
    )
    x = one.rollout.states[:, 0]
    times = [616.734, 493.982, 394.076, 308.868, 234.858, 170.300, 114.363, 66.865, 28.2925, 0.0]
    eta = [1e-4 * (1 + 9.5 * i) ** 2 for i in range(9, -1, -1)]
    for k in range(10):
        level = math.prod(1 - e for e in eta[k:])
        with torch.no_grad():
            epsilon = network(x, torch.tensor(times[k])).sample
        std = 0.001
        if k < 9:
            std = (eta[k] * (1 - level / (1 - eta[k])) / (1 - level)) ** 0.5
        mean = (x - eta[k] / (1 - level) ** 0.5 * epsilon) / (1 - eta[k]) ** 0.5
        x = mean + std * one.rollout.noises[:, k]
        torch.testing.assert_close(one.rollout.states[:, k + 1], x, rtol=1e-3, atol=1e-3)
    assert not one.rollout.states.requires_grad


def test_the_published_configuration_has_the_published_parameters():
    with torch.device("meta"):
        network = networks.published()
    names = dict(network.named_parameters())
    assert sum(p.numel() for p in names.values()) == 35_746_307
    attention = {name.rpartition("attentions.")[0] for name in names if "attentions." in name}
    assert attention == {"down_blocks.1.", "up_blocks.2.", "mid_block."}
    assert tuple(names["time_embedding.linear_1.weight"].shape) == (512, 128)
    assert tuple(names["conv_out.weight"].shape) == (3, 128, 3, 3)
    assert network.config.flip_sin_to_cos is False
    assert network.config.freq_shift == 1


@pytest.mark.parametrize("attention", ["new", "old"])
def test_a_folder_like_the_published_one_is_loaded(tmp_path, attention):
    """google/ddpm-cifar10-32: parts in the folder itself, attention layers by their old names."""
    settings = networks.PUBLISHED | {"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4}
    with torch.random.fork_rng([]):
        torch.manual_seed(8)
        network = UNet2DModel(**settings)
    network.save_pretrained(tmp_path)
    networks.scheduler().save_pretrained(tmp_path)
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    if attention == "old":
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        for new, name in old.items():
            tensors = {key.replace(f".{new}.", f".{name}."): t for key, t in tensors.items()}
        assert sum(".query." in key for key in tensors) == 12  # 6 layers, weight and bias
        save_file(tensors, file)
    model = UnconditionalUNet.load(tmp_path)
    assert model.event == (3, 32, 32)
    for name, tensor in network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], tensor), name
    assert QuadraticVariances().bind(model.table, 10).steps == 10
    assert model.prediction_type == "epsilon"


def test_models_whose_parts_lie_in_the_folder_itself_are_loaded(save_pixels, tmp_path):
    """The layout of google/ddpm-cifar10-32."""
    folder, flat = save_pixels(), tmp_path / "flat"
    flat.mkdir()
    for file in (*folder.glob("*.json"), *folder.glob("*/*")):
        shutil.copy(file, flat / file.name)
    one, other = UnconditionalUNet.load(folder), UnconditionalUNet.load(flat)
    assert torch.equal(outputs(one.network), outputs(other.network))
    assert torch.equal(one.table.alphas_cumprod, other.table.alphas_cumprod)


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ({"num_class_embeds": 10}, "num_class_embeds 10"),
        ({"out_channels": 6}, "learned variance"),
        ({"time_embedding_type": "fourier"}, "fourier"),
    ],
)
def test_networks_of_other_kinds_are_named(save_pixels, unet, message):
    with pytest.raises(ValueError, match=rf"{message}.*supported are"):
        UnconditionalUNet.load(save_pixels(unet))


def test_other_classes_and_folders_are_named(save_pixels, tmp_path):
    folder = save_pixels()
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "LDMPipeline"}))
    with pytest.raises(ValueError, match=r"LDMPipeline, which is not supported.*DDPMPipeline"):
        UnconditionalUNet.load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="lacks"):
        UnconditionalUNet.load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        UnconditionalUNet.load(tmp_path / "nowhere")


def test_pipelines_of_ddim_are_loaded_too(save_pixels, tmp_path):
    pipe = DDPMPipeline.from_pretrained(save_pixels())
    DDIMPipeline(pipe.unet, DDIMScheduler()).save_pretrained(tmp_path / "ddim")
    model = UnconditionalUNet.load(tmp_path / "ddim")
    assert bool((DDIM(1.0).bind(model.table, 5).std > 0).all())


def test_exports_replace_older_ones_and_have_the_mode_of_the_umask(save_pixels, tmp_path):
    model = UnconditionalUNet.load(save_pixels())
    model.export(tmp_path)
    model.parameters[0].data += 1
    before = os.umask(0o027)
    try:
        path = model.export(tmp_path)
    finally:
        os.umask(before)
    files = [file for file in path.rglob("*") if file.is_file()]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}
    plain = DDPMPipeline.from_pretrained(path).unet
    assert torch.equal(outputs(plain), outputs(model.network))


def test_an_export_that_is_not_what_was_trained_is_refused(save_pixels, tmp_path, monkeypatch):
    model = UnconditionalUNet.load(save_pixels())
    save = DDPMPipeline.save_pretrained

    def spoiled(self: DDPMPipeline, folder: Path) -> None:
        with torch.no_grad():
            self.unet.conv_in.weight = nn.Parameter(self.unet.conv_in.weight * 1.5)
        self.unet.conv_in.weight.requires_grad_(False)
        save(self, folder)
        self.unet.conv_in.weight = nn.Parameter(self.unet.conv_in.weight / 1.5)

    monkeypatch.setattr(DDPMPipeline, "save_pretrained", spoiled)
    with pytest.raises(ExportError, match=r"conv_in\.weight"):
        model.export(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["pixels"]


def test_a_whole_run_knows_no_family(save_pixels, tmp_path):
    """Prompts mean nothing to it; the run leaves what every run does, and a pipeline."""
    model = UnconditionalUNet.load(save_pixels(), lora_rank=2)
    run = finetune(
        model,
        reward=Colour("red"),
        prompts=["picture"],
        output=tmp_path / "run",
        steps=3,
        updates=2,
        size=UpdateSize(samples=4, batch=8, value_epochs=1),
        options=RunOptions(evaluation_samples=4, progress=False),
    )
    assert run.report.is_file()
    assert run.path_kl is not None
    assert run.path_kl.mean > 0
    pipe = DDPMPipeline.from_pretrained(run.folder / "pipeline")
    trained = outputs(model.network)
    torch.testing.assert_close(outputs(pipe.unet), trained, rtol=1e-4, atol=1e-5)
    with model.pretrained():
        assert (outputs(model.network) - trained).abs().max() > 1e-6
