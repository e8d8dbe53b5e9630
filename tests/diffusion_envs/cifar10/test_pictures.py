"""What is drawn from CIFAR-10 for objectives that learn from data."""

from pathlib import Path

import pytest
import torch

from ctrl.noise import stream
from diffusion_envs import cifar10
from diffusion_envs.cifar10.pictures import Pictures
from diffusion_envs.runs.settings import describe, rebuild
from diffusion_envs.training.energy import TrainingData


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The binary batches: three pictures, each of one grey but for a bright left column."""
    for name in [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]:
        rows = bytearray()
        for k, grey in enumerate((0, 100, 200)):
            picture = torch.full((3, 32, 32), grey, dtype=torch.uint8)
            picture[:, :, 0] = 255
            rows += bytes([k]) + picture.numpy().tobytes()
        (tmp_path / name).write_bytes(bytes(rows))
    return tmp_path


def test_pictures_are_in_minus_one_to_one_and_every_other_is_mirrored(folder):
    drawn = Pictures(folder).draw(3000, stream(1))
    assert drawn.shape == (3000, 3, 32, 32)
    assert drawn.dtype == torch.float32
    middle = drawn[:, 0, 5, 10]
    values, counts = middle.unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0, 100, 200]) / 127.5 - 1)
    assert (counts - 1000).abs().max() < 6 * (3000 * 2 / 9) ** 0.5  # six standard deviations
    left, right = drawn[:, 0, 5, 0] == 1, drawn[:, 0, 5, 31] == 1
    assert (left ^ right).all()
    assert abs(int(left.sum()) - 1500) < 6 * (3000 / 4) ** 0.5
    still = Pictures(folder, mirrored=False).draw(50, stream(1))
    assert (still[:, 0, 5, 0] == 1).all()


def test_a_draw_is_its_generator_s(folder):
    pictures = Pictures(folder)
    assert torch.equal(pictures.draw(9, stream(4)), pictures.draw(9, stream(4)))
    assert not torch.equal(pictures.draw(9, stream(4)), pictures.draw(9, stream(5)))


def test_it_is_data_of_a_run_and_can_be_resumed_from_elsewhere(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    relative = cifar10.Pictures(Path(folder.name), split="test")
    assert isinstance(relative, TrainingData)
    assert relative.folder == folder
    assert rebuild(describe(relative)) == relative


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Pictures(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        Pictures(tmp_path).draw(1, stream(0))


def test_where_all_weights_train_the_rate_is_not_that_of_adapters():
    from diffusion_envs import objectives
    from diffusion_envs.cifar10.__main__ import FAMILY

    assert FAMILY.settings(objectives.ScoreAsAction) == objectives.ScoreAsAction(learning_rate=1e-5)
    assert FAMILY.settings(objectives.DDPO).learning_rate == 1e-5
    assert FAMILY.settings(objectives.DxMIFromData) == objectives.DxMIFromData()  # published
