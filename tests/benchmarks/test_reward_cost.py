"""The cost of learned rewards is measured on networks of the published sizes, in small here."""

import json
import sys

import pytest

from benchmarks import reward_cost


@pytest.fixture
def small(monkeypatch):
    sizes = {"small": ((64, 128, 1, 1), (64, 128, 1, 1), 32)}
    monkeypatch.setattr(reward_cost, "SIZES", sizes)
    monkeypatch.setattr(reward_cost, "VOCABULARY", 1000)
    monkeypatch.setattr(reward_cost, "TEXT_SIDES", ())


def test_parameters_are_those_of_the_network(small, tmp_path):
    width = 64
    block = 4 * width * (width + 1) + width * 128 + 128 + 128 * width + width + 4 * width
    eyes = width + 3 * 14 * 14 * width + (16 * 16 + 1) * width + 4 * width + block
    words = (1000 + 77) * width + 2 * width + block
    both = 2 * width * 32 + 1  # projections and logit_scale
    assert reward_cost.write_clip(tmp_path, "small") == eyes + words + both


def test_what_is_measured_is_stored(small, tmp_path, monkeypatch):
    words = ["reward_cost", "--rounds", "1", "--to", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    reward_cost.main()
    (row,) = json.loads((tmp_path / "reward_cost.json").read_text())["networks"]
    assert row["network"] == "small"
    assert all(row[k] >= 0 for k in ("picture", "prompt", "with gradient"))
    assert row["with gradient"] > 0
