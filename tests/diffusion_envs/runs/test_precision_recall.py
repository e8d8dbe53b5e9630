"""Improved precision and recall."""

import math

import pytest
import torch

from diffusion_envs.runs import precision_recall as module
from diffusion_envs.runs.precision_recall import precision_recall

REAL = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # to the nearest other: 1, 1, 2, 4


def test_on_a_line_by_hand():
    generated = torch.tensor([[-1.0], [2.2], [11.5]])  # to the nearest other: 3.2, 3.2, 9.3
    shares = precision_recall(generated, REAL, neighbours=1)
    assert shares.precision == pytest.approx(2 / 3)  # -1 on the edge of 0's ball; 11.5 in none
    assert shares.recall == 1.0
    narrow = torch.tensor([[-1.0], [-0.5]])  # balls of 0.5 hold no real sample but 0
    assert precision_recall(narrow, REAL, neighbours=1).recall == pytest.approx(1 / 4)


def test_the_second_neighbour_is_further():
    """To the second other: 3, 2, 3, 6."""
    far = torch.tensor([[12.9], [12.95], [13.1]])
    assert precision_recall(far, REAL, neighbours=2).precision == pytest.approx(2 / 3)
    assert precision_recall(far, REAL, neighbours=1).precision == 0


def test_a_set_covers_itself_and_nothing_that_is_far(generator):
    real = torch.randn(50, 5, generator=generator)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real + 100, real) == (0.0, 0.0)


def test_collapsed_samples_are_precise_and_recall_little(generator):
    real = torch.randn(200, 2, generator=generator)
    collapsed = 0.01 * torch.randn(200, 2, generator=generator)
    shares = precision_recall(collapsed, real)
    assert shares.precision == 1.0
    assert shares.recall < 0.05


def test_chunks_do_not_matter(generator, monkeypatch):
    one = 1e3 + torch.randn(23, 3, generator=generator)
    other = 1e3 + torch.randn(31, 3, generator=generator)
    whole = precision_recall(one, other)
    table = torch.cdist(one.double(), other.double())
    radii = torch.cdist(other.double(), other.double()).sort(1).values[:, 3]
    assert whole.precision == pytest.approx((table <= radii).any(1).double().mean().item())
    monkeypatch.setattr(module, "CHUNK", 7)
    assert precision_recall(one, other) == whole


def test_bad_features_are_refused(generator):
    good = torch.randn(5, 2, generator=generator)
    with pytest.raises(ValueError, match=r"generated must be .* above 3 neighbours, got \[3, 2\]"):
        precision_recall(good[:3], good)
    with pytest.raises(ValueError, match="real must be"):
        precision_recall(good, good[:3])
    with pytest.raises(ValueError, match="widths 1 and 2"):
        precision_recall(good[:, :1], good)
    with pytest.raises(ValueError, match="neighbours must be"):
        precision_recall(good, good, neighbours=0)
    bad = good.clone()
    bad[0, 0] = math.nan
    with pytest.raises(ValueError, match="generated must be finite"):
        precision_recall(bad, good)
