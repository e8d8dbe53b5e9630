"""Inception's graph, peculiarity by peculiarity, and files that are not its weights."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffusion_envs.runs.inception import Inception, load_inception, tensorflow_resize


def random_weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """As the published file: no counters of batches."""
    with torch.device("meta"):
        expected = Inception().state_dict()
    state = {}
    for name, value in expected.items():
        if name.endswith("conv.weight"):
            drawn = torch.randn(value.shape, generator=generator)
            state[name] = drawn * math.sqrt(2 / value[0].numel())
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = 0.5 + torch.rand(value.shape, generator=generator)
        elif not name.endswith("num_batches_tracked"):
            state[name] = 0.2 * torch.randn(value.shape, generator=generator)
    return state


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights(torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def network(weights, tmp_path_factory) -> Inception:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return load_inception(path)


def test_the_size_is_that_of_the_published_network(weights):
    """21,785,568 of Inception-v3 without its head or auxiliary head, and 2048 x 1008 + 1008."""
    parameters = sum(p.numel() for p in Inception().parameters())
    assert parameters == 21_785_568 + 2048 * 1008 + 1008
    assert len(weights) == 94 * 5 + 2  # 94 convolutions with four tensors of normalisation each
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6e.branch7x7dbl_2.conv.weight": (192, 192, 7, 1),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
        "fc.weight": (1008, 2048),
    }.items():
        assert tuple(weights[name].shape) == shape


def test_features_are_read_from_the_file_and_told_apart(network):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    features = network(images)
    assert features.shape == (2, 2048)
    assert features.isfinite().all()
    assert features.std(0).mean() > 0
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training


def test_sizes_inside_the_network(network):
    """149 after the stem's first layer, then 35, 17 and 8."""
    seen = {}
    hooks = [
        getattr(network, name).register_forward_hook(
            lambda _module, _args, output, name=name: seen.update({name: tuple(output.shape[1:])})
        )
        for name in ("Conv2d_1a_3x3", "Mixed_5b", "Mixed_5d", "Mixed_6a", "Mixed_6e", "Mixed_7c")
    ]
    network(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    assert seen == {
        "Conv2d_1a_3x3": (32, 149, 149),
        "Mixed_5b": (256, 35, 35),
        "Mixed_5d": (288, 35, 35),
        "Mixed_6a": (768, 17, 17),
        "Mixed_6e": (768, 17, 17),
        "Mixed_7c": (2048, 8, 8),
    }


def pool_of(block: nn.Module, width_in: int, width: int) -> Callable[[np.ndarray], np.ndarray]:
    """What the pool's branch makes of channel 0, with a convolution that picks that channel."""
    conv = block.get_submodule("branch_pool")
    state = {
        "conv.weight": torch.zeros(width, width_in, 1, 1),
        "bn.weight": torch.full((width,), math.sqrt(1.001)),  # epsilon is 0.001
        "bn.bias": torch.zeros(width),
        "bn.running_mean": torch.zeros(width),
        "bn.running_var": torch.ones(width),
        "bn.num_batches_tracked": torch.tensor(0),
    }
    state["conv.weight"][:, 0] = 1
    conv.load_state_dict(state)
    block.eval()

    def apply(plane: np.ndarray) -> np.ndarray:
        x = torch.zeros(1, width_in, *plane.shape)
        x[0, 0] = torch.from_numpy(plane)
        with torch.no_grad():
            return block(x)[0, -1].numpy()

    return apply


def neighbours(plane: np.ndarray, row: int, column: int) -> np.ndarray:
    return plane[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]


@pytest.mark.parametrize(
    ("name", "width_in", "width", "reduce"),
    [
        ("Mixed_5b", 192, 32, np.mean),
        ("Mixed_6c", 768, 192, np.mean),
        ("Mixed_7b", 1280, 192, np.mean),
        ("Mixed_7c", 2048, 192, np.max),  # the published graph's peculiarity
    ],
)
def test_pools_leave_the_padding_out_and_the_last_is_a_maximum(name, width_in, width, reduce):
    plane = np.random.default_rng(5).uniform(0.1, 1, (4, 5)).astype(np.float32)
    pooled = pool_of(getattr(Inception(), name), width_in, width)(plane)
    expected = [[reduce(neighbours(plane, r, c)) for c in range(5)] for r in range(4)]
    np.testing.assert_allclose(pooled, expected, rtol=1e-5)


def test_resizing_is_tensorflow_1s():
    """On a ramp, pixel i is i * 32 / 299 until the last pixel, and stays there."""
    ramp = torch.arange(32.0).double().expand(1, 2, 32, 32)
    expected = (torch.arange(299.0) * 32 / 299).clamp(max=31).double()
    resized = tensorflow_resize(ramp, 299)
    torch.testing.assert_close(resized, expected.expand(1, 2, 299, 299), rtol=0, atol=1e-5)
    down = tensorflow_resize(ramp.mT, 299)
    torch.testing.assert_close(down, expected[:, None].expand(1, 2, 299, 299), rtol=0, atol=1e-5)
    other = nn.functional.interpolate(ramp, (299, 299), mode="bilinear")
    assert (other - resized).abs().max() > 0.4  # torch's aligns the centres of pixels
    assert torch.equal(tensorflow_resize(ramp, 32), ramp)


def test_bytes_are_centred_at_128(network):
    seen = []
    hook = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    network(images)
    hook.remove()
    torch.testing.assert_close(seen[0][:, 0, 0, 0], torch.tensor([-1, 0, 127 / 128]))


# -- files that are not its weights ----------------------------------------------------------------


def refusal(state: object, path: Path) -> str:
    torch.save(state, path)
    with pytest.raises(
        ValueError, match=r"(?s)weights\.pth.*take pt_inception-2015-12-05"
    ) as error:
        load_inception(path)
    return str(error.value)


def test_weights_of_another_network_are_refused(weights, tmp_path):
    path = tmp_path / "weights.pth"
    first = "Conv2d_1a_3x3.conv.weight"
    lacking = {name: value for name, value in weights.items() if name != "fc.bias"}
    assert "lacks fc.bias" in refusal(lacking, path)
    assert "in addition AuxLogits.fc.bias" in refusal(
        weights | {"AuxLogits.fc.bias": torch.zeros(1000)}, path
    )
    assert "another shape fc.bias" in refusal(weights | {"fc.bias": torch.zeros(1000)}, path)
    assert "another shape fc.bias" in refusal(weights | {"fc.bias": 3.0}, path)
    broken = weights[first].clone()
    broken[0, 0, 0, 0] = math.nan
    assert f"{first} does not" in refusal(weights | {first: broken}, path)
    variance = "Mixed_7c.branch_pool.bn.running_var"
    assert f"{variance} does not" in refusal(weights | {variance: -torch.ones(192)}, path)
    assert "and 469 more" in refusal({}, path)
    assert "dictionary" in refusal([1, 2], path)


class Call:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_nothing_in_a_weights_file_is_executed(tmp_path):
    mark = tmp_path / "executed"
    assert "to be called" in refusal({"fc.bias": Call(mark)}, tmp_path / "weights.pth")
    assert not mark.exists()


def test_foreign_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    for content in (b"", b"<html>", b"PK\x03\x04" + bytes(50)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no file of tensors"):
            load_inception(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth is none"):
        load_inception(tmp_path / "nowhere.pth")
