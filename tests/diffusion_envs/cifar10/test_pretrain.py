"""Pretraining: its loss by another formula, short runs as one, the average exported."""

import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from jaxtyping import TypeCheckError
from safetensors.torch import load_file
from torch import nn

from diffusion_envs.cifar10 import networks
from diffusion_envs.cifar10 import pretrain as module
from diffusion_envs.cifar10.pretrain import RECIPES, prediction_loss, pretrain
from diffusion_envs.models.unconditional_unet import UnconditionalUNet
from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.fit import Recipe
from diffusion_envs.samplers import QuadraticVariances
from tests.diffusion_envs.cifar10.few_pictures import write_pictures

pytestmark = pytest.mark.filterwarnings("default")  # diffusers deprecates freely

RECIPE = Recipe(
    updates=3,
    learning_rate=3e-3,
    batch=2,
    average=0.5,
    precision=torch.float32,
    seconds_between_checkpoints=0.0,
)


def least() -> UNet2DModel:
    """The architecture of the published network in a few thousand weights."""
    settings = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 4}
    return UNet2DModel(**networks.PUBLISHED | settings | {"layers_per_block": 1})


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.setitem(module._BUILDERS, "small", least)
    return write_pictures(tmp_path / "data", 6)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return DDPMPipeline.from_pretrained(folder).unet.state_dict()


class Remembers(nn.Module):
    """Answers a fixed function of its input, and keeps what it was asked."""

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor) -> types.SimpleNamespace:
        self.noisy, self.timesteps = noisy, timesteps
        return types.SimpleNamespace(sample=0.3 * noisy - 0.1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_a_capped_loss_of_the_denoised_picture(prediction_type, generator):
    """min(SNR, 5) |x0_hat - x0|^2, whatever the network predicts: Hang et al., equation 6."""
    clean = torch.rand(64, 3, 4, 4, generator=generator) * 2 - 1
    levels = networks.scheduler().alphas_cumprod
    network = Remembers()
    weighted, plain = prediction_loss(network, clean, levels, prediction_type, generator)
    abar = levels[network.timesteps].double().view(-1, 1, 1, 1)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    noisy, clean = network.noisy.double(), clean.double()
    noise = (noisy - alpha * clean) / sigma
    assert abs(float(noise.mean())) < 5 / noise.numel() ** 0.5
    assert abs(float(noise.var()) - 1) < 5 * (2 / noise.numel()) ** 0.5
    said = (0.3 * network.noisy - 0.1).double()
    if prediction_type == "epsilon":
        denoised, target = (noisy - sigma * said) / alpha, noise
    else:
        denoised, target = alpha * noisy - sigma * said, alpha * noise - sigma * clean
    snr = abar.flatten() / (1 - abar.flatten())
    errors = (denoised - clean).square().flatten(1).mean(1)
    expected = (snr.clamp(max=5) * errors).mean()
    assert float(snr.min()) < 1
    assert float(snr.max()) > 5  # both sides of the cap
    assert float(weighted) == pytest.approx(float(expected), rel=1e-3)  # float32, SNR to 1e4
    assert float(plain) == pytest.approx(float((said - target).square().mean()), rel=1e-3)


def test_short_runs_make_the_weights_of_one(data, tmp_path, monkeypatch):
    whole = pretrain(data, tmp_path / "whole", recipe=RECIPE, seed=2)
    real = module.prediction_loss
    for stop in (2, 2):  # the user presses Ctrl-C in the n-th update of each run
        calls = 0

        def loss(*arguments: object, stop: int = stop) -> object:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(module, "prediction_loss", loss)
        with pytest.raises(KeyboardInterrupt):
            pretrain(data, tmp_path / "cut", recipe=RECIPE, seed=2)
    monkeypatch.setattr(module, "prediction_loss", real)
    cut = pretrain(data, tmp_path / "cut", recipe=RECIPE, seed=2)
    one, other = weights(whole), weights(cut)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_average_is_exported_and_loads(data, tmp_path):
    folder = pretrain(data, tmp_path / "out", recipe=RECIPE, prediction_type="epsilon")
    stored = checkpoint.latest(tmp_path / "out" / "training")
    assert stored is not None
    averaged, last = stored.state["averaged"], stored.state["modules"]
    exported = weights(folder)
    for name, tensor in exported.items():
        assert torch.equal(tensor.half(), averaged[f"module.unet.{name}"].half()), name
    assert any(not torch.equal(t.half(), last[f"unet.{n}"].half()) for n, t in exported.items())
    model = UnconditionalUNet.load(folder)
    assert (model.prediction_type, model.event) == ("epsilon", (3, 32, 32))
    assert QuadraticVariances().bind(model.table, 10).steps == 10
    stored_as = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored_as.values()} == {torch.float16}


def test_another_setting_is_not_gone_on_with(data, tmp_path):
    pretrain(data, tmp_path / "out", recipe=replace(RECIPE, updates=1))
    often = replace(RECIPE, updates=1, seconds_between_checkpoints=9.0)
    pretrain(data, tmp_path / "out", recipe=often)  # changes no number
    with pytest.raises(ValueError, match=r"trained with prediction_type v_prediction, not epsilon"):
        pretrain(data, tmp_path / "out", recipe=often, prediction_type="epsilon")
    with pytest.raises(ValueError, match=r"trained with recipe\.updates 1, not 3"):
        pretrain(data, tmp_path / "out", recipe=RECIPE)
    with pytest.raises(ValueError, match=r"trained with seed 0, not 1"):
        pretrain(data, tmp_path / "out", recipe=often, seed=1)


@pytest.mark.parametrize("values", [[-1.0, 1.01], [float("nan"), 0.0], [0, 255]])
def test_pictures_out_of_range_are_refused(values, generator):
    clean = torch.tensor(values).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    levels = networks.scheduler().alphas_cumprod
    with pytest.raises(ValueError, match=r"clean must be pictures in \[-1, 1\]"):
        prediction_loss(Remembers(), clean, levels, "epsilon", generator)


def test_wrong_names_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="network must be one of small, published, got 'large'"):
        pretrain(data, tmp_path / "out", "large")
    wrong = (ValueError, TypeCheckError)  # shapes and types are checked in tests only
    with pytest.raises(wrong, match="prediction_type"):
        pretrain(data, tmp_path / "out", prediction_type="sample")  # pyright: ignore[reportArgumentType]
    with pytest.raises(FileNotFoundError, match=r"train\.parquet|nowhere"):
        pretrain(tmp_path / "nowhere", tmp_path / "out", recipe=RECIPE)
    assert not (tmp_path / "out" / "training").exists()


def test_the_recipes():
    """800,000 updates of 128, EMA 0.9999, 2e-4 after 5000 updates of warm-up: DDPM's appendix B."""
    recipe = RECIPES["published"]
    assert (recipe.updates, recipe.batch, recipe.average) == (800_000, 128, 0.9999)
    assert recipe.rate(4999) == pytest.approx(2e-4)
    assert recipe.rate(2499) == pytest.approx(1e-4)
    with torch.device("meta"):
        small = networks.small()
    assert 3.9e6 < sum(p.numel() for p in small.parameters()) < 4.1e6
