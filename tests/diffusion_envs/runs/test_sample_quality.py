"""The numbers about a set of generated pictures."""

import math

import pytest
import torch

from diffusion_envs.rewards.classifier import load_classifier
from diffusion_envs.runs.frechet import Moments, corrected_distance, frechet_distance
from diffusion_envs.runs.precision_recall import precision_recall
from diffusion_envs.runs.sample_quality import (
    Features,
    RealStatistics,
    as_bytes,
    classifier_features,
    inception_features,
    measure,
    sample_quality,
)

MEANS = Features("channel means", 3, lambda images: images.float().mean((2, 3)) / 255)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Bytes over 255, of different brightness."""
    generator = torch.Generator().manual_seed(8)
    bright = torch.rand(600, 3, 1, 1, generator=generator)
    values = bright * torch.rand(600, 3, 32, 32, generator=generator)
    return (values * 255).round() / 255


def as_uint8(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures * 255).round().to(torch.uint8)


def test_every_number_is_that_of_its_own_function(pictures):
    generated, real = pictures[:300] ** 2, pictures[300:]
    features = classifier_features()
    judge = load_classifier("judge")
    shown = as_uint8(generated).float() / 255
    with torch.no_grad():
        rows, reference = judge.embedding(shown), judge.embedding(real)
        probabilities = judge(shown).softmax(1).double()
    statistics = RealStatistics.of(as_uint8(real), MEANS)
    assert statistics.features == "channel means"
    with pytest.raises(ValueError, match="got 300"):  # 160 numbers a picture
        RealStatistics.of(as_uint8(real), features)
    moments = Moments.of(reference)
    statistics = RealStatistics(features.name, moments, reference)
    with pytest.raises(ValueError, match=r"at least 320 samples .* got 300"):
        sample_quality(generated, statistics, features)
    more = torch.cat([generated, pictures[:100] ** 3])
    shown = as_uint8(more).float() / 255
    with torch.no_grad():
        rows, probabilities = judge.embedding(shown), judge(shown).softmax(1).double()
    numbers = sample_quality(more, statistics, features)
    extrapolated = corrected_distance(rows, moments)
    shares = precision_recall(rows[:300], reference)
    mean = probabilities.mean(0)
    confidence = probabilities.max(1).values
    assert numbers == pytest.approx(
        {
            "frechet_classifier": frechet_distance(Moments.of(rows), moments),
            "frechet_classifier_extrapolated": extrapolated.mean,
            "frechet_classifier_extrapolated_standard_error": extrapolated.standard_error,
            "precision": shares.precision,
            "recall": shares.recall,
            "neighbourhood": 300,
            "judge_confidence": confidence.mean().item(),
            "judge_confidence_standard_error": confidence.std().item() / 20,
            "judge_class_entropy": -(mean * mean.log()).sum().item(),
            "samples": 400,
        },
        rel=1e-4,
    )


def test_statistics_are_the_same_from_a_file(pictures, tmp_path):
    statistics = RealStatistics.of(as_uint8(pictures), MEANS, kept=70)
    assert torch.equal(statistics.kept, MEANS.of(as_uint8(pictures[:70])))
    path = tmp_path / "real.safetensors"
    statistics.save(path)
    read = RealStatistics.load(path, MEANS)
    assert read.moments.n == 600
    assert torch.equal(read.moments.scatter, statistics.moments.scatter)
    assert measure(pictures[:100], read, MEANS) == measure(pictures[:100], statistics, MEANS)
    other = Features("other means", 3, MEANS.of)
    with pytest.raises(ValueError, match="'channel means', not of 'other means'"):
        RealStatistics.load(path, other)
    with pytest.raises(ValueError, match="'other means', got 'channel means'"):
        measure(pictures[:100], read, other)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"real\.safetensors does not hold statistics"):
        RealStatistics.load(path, MEANS)
    with pytest.raises(FileNotFoundError, match="must be a file"):
        RealStatistics.load(tmp_path / "none.safetensors", MEANS)


def test_only_inceptions_distance_is_called_fid_and_by_the_number_used(pictures):
    assert classifier_features().distance_name(10_000) == "frechet_classifier"
    inception = Features("Inception", 3, MEANS.of, is_inception=True)
    names = {n: inception.distance_name(n) for n in (9_999, 10_000, 50_000, 2_000)}
    assert names == {9_999: "fid_9999", 10_000: "fid_10k", 50_000: "fid_50k", 2_000: "fid_2000"}
    statistics = RealStatistics.of(as_uint8(pictures), inception)
    numbers = sample_quality(pictures[:77], statistics, inception)
    assert {"fid_77", "fid_extrapolated", "fid_extrapolated_standard_error"} <= numbers.keys()


def test_inception_features_come_from_the_file(tmp_path):
    from tests.diffusion_envs.runs.test_inception import random_weights

    path = tmp_path / "weights.pth"
    weights = random_weights(torch.Generator().manual_seed(4))
    torch.save(weights, path)
    features = inception_features(path)
    images = torch.arange(2 * 3 * 16, dtype=torch.uint8).view(2, 3, 4, 4)
    assert features.of(images).shape == (2, features.width)
    torch.save(weights | {"fc.bias": weights["fc.bias"] + 1}, path)
    assert inception_features(path).name != features.name


def test_bytes_are_rounded():
    values = torch.tensor([0.0, 0.4, 0.6, 254.6, 255.0]) / 255
    images = values.repeat_interleave(3 * 1024).view(5, 3, 32, 32)
    assert as_bytes(images)[:, 0, 0, 0].tolist() == [0, 0, 1, 255, 255]


def test_bad_pictures_are_refused(pictures):
    statistics = RealStatistics.of(as_uint8(pictures), MEANS)
    for bad, message in [
        (pictures[:, :, :31], r"\[n, 3, 32, 32\], got \[600, 3, 31, 32\]"),
        (pictures[:, :1], r"got \[600, 1, 32, 32\]"),
        (pictures[0], "got"),
        (pictures[:0], "got"),
        (pictures * 2 - 1, r"in \[0, 1\], got values from -1 .*x / 2"),
        (pictures * 255, r"to 25\d"),
        (torch.where(torch.arange(600).view(-1, 1, 1, 1) < 2, math.nan, pictures), "2 of 600"),
        (pictures / torch.zeros(()), "finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            measure(bad, statistics, MEANS)
    with pytest.raises(ValueError, match="at least 40 samples"):
        measure(pictures[:39], statistics, MEANS)
    with pytest.raises(ValueError, match="bytes"):
        RealStatistics.of(as_uint8(pictures).to(torch.int64), MEANS)
    narrow = Features("channel means", 2, MEANS.of)
    with pytest.raises(Exception, match=r"600, 2|250, 2"):
        RealStatistics.of(as_uint8(pictures), narrow)
