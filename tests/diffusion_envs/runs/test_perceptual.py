"""ST-LPIPS against the formulas pair by pair, and against numbers of the package itself."""

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

from ctrl import Estimate
from diffusion_envs import rewards, sd15
from diffusion_envs.runs import perceptual
from diffusion_envs.runs.evaluation import Evaluation
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.over_optimisation import metrics, verdict
from diffusion_envs.runs.perceptual import squared_distances, vectors

CONVOLUTIONS = {  # published place: channels, kernel
    "slice1.0": (3, 64, 11),
    "slice2.5": (64, 192, 5),
    "slice3.9": (192, 384, 3),
    "slice4.11": (384, 256, 3),
    "slice5.13": (256, 256, 3),
}
BLURS = {"slice1.1": 64, "slice2.4": 64, "slice3.8": 192}


@pytest.fixture(scope="module")
def tensors():
    """Random tensors in the layout of alex_shift_tolerant.pth; the filters are no binomials."""
    generator = torch.Generator().manual_seed(22)
    state = {
        "scaling_layer.shift": torch.tensor([-0.03, -0.088, -0.188])[None, :, None, None],
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.45])[None, :, None, None],
    }
    for k, (place, (before, after, side)) in enumerate(CONVOLUTIONS.items()):
        shape = (after, before, side, side)
        std = (2 / (before * side**2)) ** 0.5
        state[f"net.{place}.weight"] = std * torch.randn(shape, generator=generator)
        state[f"net.{place}.bias"] = 0.1 * torch.randn(after, generator=generator)
        state[f"lin{k}.model.1.weight"] = torch.rand(1, after, 1, 1, generator=generator)
    for place, width in BLURS.items():
        blur = torch.rand(3, 3, generator=generator)
        state[f"net.{place}.filt"] = (blur / blur.sum()).expand(width, 1, 3, 3).clone()
    return state


@pytest.fixture
def package(tensors, tmp_path, monkeypatch):
    """An installed package that cannot be imported, with those weights."""
    folder = tmp_path / "site" / "stlpips_pytorch"
    (folder / "weights" / "vST0.0").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('torchvision')")
    torch.save(tensors, folder / "weights" / "vST0.0" / "alex_shift_tolerant.pth")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    return folder


def plain_features(tensors, image):
    """The five layers of one picture, float64."""
    own = {name: value.double() for name, value in tensors.items()}

    def convolved(x, place, padding):
        weight, bias = own[f"net.{place}.weight"], own[f"net.{place}.bias"]
        return functional.conv2d(x, weight, bias, padding=padding)

    def blurred(x, place):
        wide = torch.from_numpy(np.pad(x[0].numpy(), [(0, 0), (2, 2), (2, 2)], mode="reflect"))
        kernel = own[f"net.{place}.filt"][:, 0]
        height, width = (side - 2 for side in wide.shape[1:])
        total = sum(
            wide[:, i : i + height, j : j + width] * kernel[:, i, j, None, None]
            for i, j in itertools.product(range(3), range(3))
        )
        return total[None, :, ::2, ::2]

    def pooled(x):
        return x.unfold(2, 3, 1).unfold(3, 3, 1).amax((-1, -2))

    x = (2 * image.double()[None] - 1 - own["scaling_layer.shift"]) / own["scaling_layer.scale"]
    layers = [blurred(convolved(x, "slice1.0", 2), "slice1.1").clamp(min=0)]
    x = blurred(pooled(layers[-1]), "slice2.4")
    layers.append(convolved(x, "slice2.5", 2).clamp(min=0))
    x = blurred(pooled(layers[-1]), "slice3.8")
    layers.append(convolved(x, "slice3.9", 1).clamp(min=0))
    layers.append(convolved(layers[-1], "slice4.11", 1).clamp(min=0))
    layers.append(convolved(layers[-1], "slice5.13", 1).clamp(min=0))
    return [x[0] for x in layers]


def plain_distance(tensors, one, other):
    total = 0.0
    for k, (x, y) in enumerate(
        zip(plain_features(tensors, one), plain_features(tensors, other), strict=True)
    ):
        unit, to = (f / (f.square().sum(0).sqrt() + 1e-10) for f in (x, y))
        weight = tensors[f"lin{k}.model.1.weight"][0].double()
        total += (weight * (unit - to).square()).sum(0).mean().item()
    return total


def rounding(squared, terms):
    """Of a squared distance of float32 vectors whose squared length is at most ``terms``.

    A component is off by some 30 roundings of its size: convolutions add thousands of terms, whose
    errors go with the square root.
    """
    return 2 * squared**0.5 * 30 * 2**-24 * terms**0.5 + 1e-10


def test_distances_are_those_of_the_formula_pair_by_pair(tensors, package, generator):
    network = perceptual.load(perceptual.weights_file())
    images = torch.rand(3, 3, 29, 38, generator=generator)
    images[2] = images[0].roll(1, -1)
    seen = vectors(network, images)
    distances = squared_distances(seen, seen[1:])
    for i, j in itertools.product(range(3), range(2)):
        expected = plain_distance(tensors, images[i], images[j + 1])
        # five layers of unit vectors with weights below 1: squared length at most 5
        assert abs(distances[i, j].item() - expected) <= rounding(expected, 5), (i, j)
    assert distances[1, 0] == 0
    assert distances[0, 0] > 0.1
    assert "stlpips_pytorch" not in sys.modules


def picture_pairs(side):
    """Two pictures of formulas, the first shifted by a pixel, and its negative."""
    x, y = torch.arange(side)[None] / side, torch.arange(side)[:, None] / side
    x, y = x.expand(side, side), y.expand(side, side)
    one = torch.stack([x, y, 0.5 + 0.5 * torch.sin(9 * x + 5 * y)])
    other = torch.stack([y, 0.5 + 0.5 * torch.cos(7 * x * y), x])
    return torch.stack([one, other, one.roll(1, -1), 1 - one])


@pytest.mark.parametrize(
    ("side", "expected"),
    [  # float64, by the package's own code: LPIPS(net="alex", variant="shift_tolerant")
        (32, (0.5806488294, 0.0070511215, 0.4632421842)),
        (64, (0.6278737919, 0.0120210798, 0.8158631615)),
        (101, (0.7092248521, 0.0080106697, 0.9621038366)),
        (256, (0.7590442909, 0.0034690880, 1.0131448159)),
    ],
)
def test_distances_are_those_of_the_package(side, expected):
    try:
        path = perceptual.weights_file()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    seen = vectors(perceptual.load(path), picture_pairs(side))
    distances = squared_distances(seen[:1], seen[1:])[0]
    for distance, value in zip(distances.tolist(), expected, strict=True):
        assert abs(distance - value) <= rounding(value, seen.square().sum(1).max().item())


def test_a_package_that_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    remedy = r"not installed; install it with: pip install --no-deps stlpips_pytorch \(its dep"
    with pytest.raises(FileNotFoundError, match=remedy):
        perceptual.weights_file()


def test_a_package_without_its_weights_is_refused(package):
    (package / "weights" / "vST0.0" / "alex_shift_tolerant.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"without .*install --no-deps stlpips_pytorch==0"):
        perceptual.weights_file()


def test_other_tensors_are_refused(tensors, tmp_path):
    torch.save(tensors | {"lin2.model.1.weight": -torch.ones(1, 384, 1, 1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="at least 0, not \\['lin2'\\]"):
        perceptual.load(tmp_path / "a.pth")
    torch.save({k: v for k, v in tensors.items() if "slice3.8" not in k}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"lacks net\.slice3\.8\.filt"):
        perceptual.load(tmp_path / "b.pth")


def test_large_pictures_are_reduced_and_small_ones_refused(package, generator):
    network = perceptual.load(perceptual.weights_file())
    large = torch.rand(1, 3, 300, 450, generator=generator)
    reduced = functional.interpolate(large, (256, 384), mode="bicubic", antialias=True)
    assert torch.equal(vectors(network, large), vectors(network, reduced.clamp(0, 1)))
    smallest = torch.rand(2, 3, 21, 40, generator=generator)
    assert len(vectors(network, smallest)) == 2
    with pytest.raises(ValueError, match=r"at least 21 pixels a side, got \[3, 20, 40\]"):
        vectors(network, smallest[:, :, :20])
    with pytest.raises(ValueError, match=r"pictures in colour .*got \[2\]"):
        perceptual.require_pictures(torch.zeros(5, 2))


def test_metrics_hold_diversity_and_distance(tensors, package, generator):
    prompts = ["cat", "dog", "cat", "dog", "cat"]
    before, after = (
        Evaluation(
            rewards=torch.rand(5, generator=generator),
            judged={},
            path_kl=torch.ones(5),
            chain_kl=torch.ones(5),
            images=torch.rand(5, 3, 24, 24, generator=generator),
            prompts=prompts,
        )
        for _ in range(2)
    )
    after = dataclasses.replace(after, images=0.5 * after.images)
    numbers = metrics(before, after, stlpips=perceptual.load(perceptual.weights_file()))

    def mean(one, other, pairs):
        return np.mean([plain_distance(tensors, one[i], other[j]) for i, j in pairs])

    cats, every = [(0, 2), (0, 4), (2, 4)], list(itertools.combinations(range(5), 2))
    for name, images in (("diversity", after.images), ("pretrained_diversity", before.images)):
        expected = (mean(images, images, cats) + mean(images, images, [(1, 3)])) / 2
        # as above, for distances of about 1
        assert abs(numbers[f"{name}.stlpips"].mean - expected) < rounding(expected, 5)
    expected = mean(after.images, before.images, [(i, i) for i in range(5)])
    assert abs(numbers["distance.stlpips"].mean - expected) < rounding(expected, 5)
    expected = mean(before.images, before.images, every)
    assert abs(numbers["separation.stlpips"].mean - expected) < rounding(expected, 5)
    assert not any("stlpips" in name for name in metrics(before, after))


def test_a_verdict_names_it():
    line = {
        "update": 3,
        "reward_gain": Estimate(1.0, 0.1, 30),
        "diversity_gain.stlpips": Estimate(-0.4, 0.01, 30),
        "pretrained_diversity.stlpips": Estimate(0.5, 0.01, 30),
    }
    plain = {k: dataclasses.asdict(v) if isinstance(v, Estimate) else v for k, v in line.items()}
    judgement = verdict([plain])
    assert judgement is not None
    assert judgement.fallen == ("diversity of ST-LPIPS",)


def test_options_refuse_other_distances_and_a_judge_of_that_name():
    with pytest.raises((ValueError, TypeError), match="distance"):
        RunOptions(distance="lpips")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="a judge must not have the name of the distance"):
        RunOptions(distance="stlpips", judges={"stlpips": rewards.Colour("red")})


def test_a_run_without_the_package_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps stlpips_pytorch"):
        sd15.finetune(
            "tiny",
            reward=rewards.Colour("red"),
            prompts=["a photo of a cat"],
            output=tmp_path / "run",
            options=RunOptions(distance="stlpips"),
        )
    assert not (tmp_path / "run").exists()


def test_the_command_line_measures_it(package, tmp_path):
    from diffusion_envs.runs.command_line import main
    from diffusion_envs.sd15.__main__ import FAMILY

    words = "--model tiny --reward red --prompts cat --steps 2 --updates 1 --samples 2 --batch 2"
    words += " --evaluation-samples 3 --picture-every 1 --distance stlpips --no-progress"
    assert main(FAMILY, [*words.split(), "--output", str(tmp_path / "run")]) == 0
    lines = (tmp_path / "run" / "over_optimisation.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["diversity.stlpips"]["mean"] > 0
    assert last["distance.stlpips"]["n"] == 3
    assert "ST-LPIPS" in (tmp_path / "run" / "report.html").read_text()
