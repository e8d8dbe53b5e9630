"""Frechet distance between Gaussians, and its bias in the number of samples."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from diffusion_envs.runs.frechet import Moments, corrected_distance, frechet_distance

WIDTH = 6


def spd(generator: torch.Generator) -> torch.Tensor:
    root = torch.randn(WIDTH, 2 * WIDTH, dtype=torch.float64, generator=generator)
    return root @ root.T / (2 * WIDTH) + 0.05 * torch.eye(WIDTH, dtype=torch.float64)


def exact(mean: torch.Tensor, covariance: torch.Tensor) -> Moments:
    """A law's own moments."""
    return Moments(11, mean, covariance * 10)


def normal(n: int, mean, covariance, generator) -> torch.Tensor:
    noise = torch.randn(n, WIDTH, dtype=torch.float64, generator=generator)
    return mean + noise @ torch.linalg.cholesky(covariance).T


def test_the_distance_is_the_formula_with_a_matrix_square_root(generator):
    m, r = torch.randn(2, WIDTH, dtype=torch.float64, generator=generator)
    s, q = spd(generator), spd(generator)
    cross = np.trace(np.real(np.asarray(sqrtm((s @ q).numpy()))))
    expected = ((m - r) ** 2).sum().item() + s.trace().item() + q.trace().item() - 2 * cross
    distance = frechet_distance(exact(m, s), exact(r, q))
    assert distance == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(exact(r, q), exact(m, s)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("least", [0.09, 0.0])
def test_the_distance_of_commuting_covariances_is_that_of_the_deviations(least):
    """Of a singular one an eigenvalue is round-off, 4 eps at most, and its root 3e-8 at most."""
    one, other, *means = torch.tensor(
        [[4.0, 0.25], [1.0, least], [0.3, -1.0], [0.1, 0.5]], dtype=torch.float64
    )
    between = frechet_distance(
        Moments(3, means[0], 2 * one.diag()), Moments(3, means[1], 2 * other.diag())
    )
    expected = 0.04 + 2.25 + (2 - 1) ** 2 + (0.5 - least**0.5) ** 2
    assert between == pytest.approx(expected, abs=1e-12 if least else 2e-7)


def test_a_law_is_at_distance_zero_from_itself(generator):
    law = exact(torch.ones(WIDTH, dtype=torch.float64), spd(generator))
    assert abs(frechet_distance(law, law)) < 1e-12


def test_moments_of_batches_are_those_of_the_whole(generator):
    sample = 1e3 + torch.randn(37, WIDTH, dtype=torch.float64, generator=generator)
    whole = Moments.of_batches(sample.split((1, 5, 31)))
    assert whole.n == 37
    torch.testing.assert_close(whole.mean, sample.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(whole.covariance, torch.cov(sample.T), rtol=1e-9, atol=1e-9)
    rest = whole.without(Moments.of(sample[1:6]))
    kept = torch.cat([sample[:1], sample[6:]])
    torch.testing.assert_close(rest.mean, kept.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(rest.covariance, torch.cov(kept.T), rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def draws() -> dict[str, torch.Tensor]:
    """Plain and corrected estimates from many sets of 60 samples, less the known distance."""
    generator = torch.Generator().manual_seed(20)
    mean, s = 0.2 * torch.ones(WIDTH, dtype=torch.float64), spd(generator)
    reference = exact(torch.zeros(WIDTH, dtype=torch.float64), spd(generator))
    known = frechet_distance(exact(mean, s), reference)
    rows: dict[str, list[float]] = {"plain": [], "corrected": [], "error": []}
    for _ in range(300):
        sample = normal(60, mean, s, generator)
        corrected = corrected_distance(sample, reference, groups=10)
        rows["plain"].append(frechet_distance(Moments.of(sample), reference) - known)
        rows["corrected"].append(corrected.mean - known)
        rows["error"].append(corrected.standard_error)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}


def test_the_plain_estimate_is_biased_upwards(draws):
    plain = draws["plain"]
    assert plain.mean() > 5 * plain.std() / math.sqrt(len(plain))


def test_the_corrected_estimate_is_not_biased(draws):
    """Mildest known mistake: to take half of the bias off."""
    corrected = draws["corrected"]
    tolerance = 4 * corrected.std() / math.sqrt(len(corrected))  # false alarm 6e-5
    assert tolerance < draws["plain"].mean() / 4, "blind"
    assert corrected.mean().abs() < tolerance


def test_the_standard_error_is_the_deviation_over_draws(draws):
    """The ratio is known to 4 % from 300 draws; a jackknife is 5 % too large at most here."""
    ratio = (draws["error"].square().mean().sqrt() / draws["corrected"].std()).item()
    assert 0.84 < ratio < 1.22


def test_the_correction_is_the_line_in_one_over_n(generator):
    sample = normal(60, torch.zeros(WIDTH, dtype=torch.float64), spd(generator), generator)
    reference = exact(torch.ones(WIDTH, dtype=torch.float64), spd(generator))
    plain = frechet_distance(Moments.of(sample), reference)
    rows = torch.arange(60)
    without = np.mean(
        [
            frechet_distance(Moments.of(sample[(rows < 15 * k) | (rows >= 15 * k + 15)]), reference)
            for k in range(4)
        ]
    )
    slope = (without - plain) / (1 / 45 - 1 / 60)
    corrected = corrected_distance(sample, reference, groups=4)
    assert corrected.mean == pytest.approx(plain - slope / 60, rel=1e-10)


def test_bad_features_are_refused(generator):
    good = torch.randn(60, WIDTH, generator=generator)
    reference = Moments.of(good)
    with pytest.raises(ValueError, match=r"at least 40 samples .* got 39; draw more"):
        corrected_distance(good[:39], reference)
    wide = torch.randn(60, 31, generator=generator)
    with pytest.raises(ValueError, match=r"at least 62 samples .* width 31"):
        corrected_distance(wide, Moments.of(wide))
    with pytest.raises(ValueError, match="same features, got 31 and 6"):
        frechet_distance(Moments.of(wide), reference)
    with pytest.raises(ValueError, match="groups must be at least 2"):
        corrected_distance(good, reference, groups=1)
    good[3, 2] = math.nan
    with pytest.raises(ValueError, match="finite"):
        Moments.of(good)
    with pytest.raises(ValueError, match="at least two samples"):
        _ = Moments.of(wide[:1]).covariance
    with pytest.raises(ValueError, match="at least one batch"):
        Moments.of_batches([])
    with pytest.raises(ValueError, match="smaller than the whole"):
        reference.without(reference)
