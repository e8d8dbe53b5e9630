"""The README's first picture: what stood in the first grid is above what stands in the last."""

import numpy as np
import pytest
import torch

from benchmarks.before_after import drawn
from diffusion_envs.runs import contact_sheet

RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)


def sheet(folder, update, colour):
    images = torch.tensor(colour).view(1, 3, 1, 1).expand(3, 3, 8, 8)
    made = contact_sheet.grid(images, ["a photo of a cat"] * 3)
    contact_sheet.save(made, folder / f"step-{update:06d}.png")


def test_before_is_above_after(tmp_path):
    (tmp_path / "samples").mkdir()
    for update, colour in ((0, RED), (5, (0.0, 1.0, 0.0)), (12, BLUE)):
        sheet(tmp_path / "samples", update, colour)
    picture = np.asarray(drawn(tmp_path, columns=2).convert("RGB")).astype(int)
    red, blue = (
        np.argwhere((picture == 255 * np.array(colour).astype(int)).all(2))
        for colour in (RED, BLUE)
    )
    assert len(red) == pytest.approx(len(blue), rel=0.1)
    assert len(red) > 0.2 * picture.shape[0] * picture.shape[1]
    assert red[:, 0].max() < blue[:, 0].min()


def test_a_run_without_pictures_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has 0 grids of pictures"):
        drawn(tmp_path)
