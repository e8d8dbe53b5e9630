"""The benchmark of updates runs, and what it compares with is what it says."""

import json

import pytest
import torch

from benchmarks.update_speed import PROMPTS, Setting, network_rows, table, update_rows, write

SMALL = Setting(samples=2, steps=2, batch=2)
pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely


def test_the_rival_predicts_with_the_same_guidance():
    """Two branches in one call here and there: to round-off."""
    model = SMALL.load()
    plain = SMALL.plain(model)
    x = torch.randn(2, *model.event, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model.prediction(x, torch.tensor([500, 500]), model.condition(PROMPTS * 2))
        theirs = plain.predicted_noise(x, 500)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_an_update_is_timed_beside_floor_and_rival_and_written(tmp_path):
    (row,) = update_rows(SMALL, 1, ["DDPO"])
    # two branches: 2 samples, 2 steps, rolled out and trained on
    assert row["network_rows"] == 2 * (2 * 2 + 2 * 2)
    assert row["calls"] == {"unet": 2, "vae": 1, "reward": 1, "unet with gradient": 2}
    assert set(row["seconds"]) == {"ours", "calls", "floor", "rival"}
    assert all(0 < least <= most for _, least, most in row["ours_over"].values())
    page = tmp_path / "speed.md"
    page.write_text("before\n<!-- update tiny -->\nold\n<!-- end of update tiny -->\nafter\n")
    write(tmp_path, "update tiny", {"rows": [row]})
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| plain DDPO |" in text
    assert json.loads((tmp_path / "speed.json").read_text())["update tiny"]["rows"] == [row]


def test_ways_to_run_the_network_are_timed():
    rows = list(network_rows(SMALL, 1, ["channels_last"]))
    assert [row["way"] for row in rows][:3] == [
        "float32",
        "float32, with gradient",
        "channels_last",
    ]
    assert "Rows a second in float32: 1 at once" in table({"rows": rows})
