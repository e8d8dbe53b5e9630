"""The Inception network of the Frechet inception distance, with weights from a file.

The graph is TensorFlow's ``inception-2015-12-05``, which differs from later Inceptions: average
pools leave the padding out, the last block's pool is a maximum, and there are 1008 outputs. Tensors
have the names and shapes of ``pt_inception-2015-12-05-6726825d.pth`` (pytorch-fid) and
``weights-inception-2015-12-05-6726825d.pth`` (torch-fidelity). Inputs follow torch-fidelity's
convention: bytes, resized to 299 x 299 as TensorFlow 1 does, (x - 128) / 128. pytorch-fid resizes
otherwise, so that its numbers differ slightly from these.

Sources     Szegedy et al. 2016, "Rethinking the Inception Architecture", arXiv 1512.00567. Heusel
            et al. 2017, arXiv 1706.08500, for the distance. Obukhov et al. 2020, torch-fidelity.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from diffusion_envs.rewards.weights import unpickled

SIDE, WIDTH = 299, 2048


class _Conv(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(
        self,
        width_in: int,
        width: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


class _Layer(NamedTuple):
    """One convolution of a block; with stride 1 the size stays, with stride 2 nothing is padded."""

    name: str
    width: int
    kernel: tuple[int, int]
    stride: int = 1


# A branch is a chain of layers; a chain may end in several layers side by side.
_Branch = Sequence[_Layer | tuple[_Layer, ...]]


class _Block(nn.Module):
    """Branches of convolutions and one pool, side by side."""

    def __init__(self, width_in: int, branches: Sequence[_Branch], pool: nn.Module, after: int):
        """Build the block.

        Args:
            width_in: channels of the input.
            branches: of convolutions.
            pool: the last branch; it has no parameters.
            after: channels of a 1 x 1 convolution after the pool, 0 for none.
        """
        super().__init__()
        self._branches, self._pool, self._after = branches, pool, after
        for branch in branches:
            width = width_in
            for step in branch:
                for layer in [step] if isinstance(step, _Layer) else step:
                    tall, wide = layer.kernel
                    padding = (tall // 2, wide // 2) if layer.stride == 1 else 0
                    conv = _Conv(width, layer.width, layer.kernel, layer.stride, padding)
                    self.add_module(layer.name, conv)
                width = step.width if isinstance(step, _Layer) else sum(s.width for s in step)
        if after:
            self.branch_pool = _Conv(width_in, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self._branches:
            y = x
            for step in branch:
                layers = [step] if isinstance(step, _Layer) else step
                y = torch.cat([self.get_submodule(layer.name)(y) for layer in layers], 1)
            outputs.append(y)
        pooled = self._pool(x)
        outputs.append(self.branch_pool(pooled) if self._after else pooled)
        return torch.cat(outputs, 1)


def _average() -> nn.Module:
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def _halving() -> nn.Module:
    return nn.MaxPool2d(3, stride=2)


def _block_a(width_in: int, after: int) -> _Block:
    one = [_Layer("branch1x1", 64, (1, 1))]
    five = [_Layer("branch5x5_1", 48, (1, 1)), _Layer("branch5x5_2", 64, (5, 5))]
    three = [
        _Layer("branch3x3dbl_1", 64, (1, 1)),
        _Layer("branch3x3dbl_2", 96, (3, 3)),
        _Layer("branch3x3dbl_3", 96, (3, 3)),
    ]
    return _Block(width_in, [one, five, three], _average(), after)


def _block_b(width_in: int) -> _Block:
    three = [_Layer("branch3x3", 384, (3, 3), 2)]
    double = [
        _Layer("branch3x3dbl_1", 64, (1, 1)),
        _Layer("branch3x3dbl_2", 96, (3, 3)),
        _Layer("branch3x3dbl_3", 96, (3, 3), 2),
    ]
    return _Block(width_in, [three, double], _halving(), 0)


def _block_c(width_in: int, inner: int) -> _Block:
    one = [_Layer("branch1x1", 192, (1, 1))]
    seven = [
        _Layer("branch7x7_1", inner, (1, 1)),
        _Layer("branch7x7_2", inner, (1, 7)),
        _Layer("branch7x7_3", 192, (7, 1)),
    ]
    double = [
        _Layer("branch7x7dbl_1", inner, (1, 1)),
        _Layer("branch7x7dbl_2", inner, (7, 1)),
        _Layer("branch7x7dbl_3", inner, (1, 7)),
        _Layer("branch7x7dbl_4", inner, (7, 1)),
        _Layer("branch7x7dbl_5", 192, (1, 7)),
    ]
    return _Block(width_in, [one, seven, double], _average(), 192)


def _block_d(width_in: int) -> _Block:
    three = [_Layer("branch3x3_1", 192, (1, 1)), _Layer("branch3x3_2", 320, (3, 3), 2)]
    seven = [
        _Layer("branch7x7x3_1", 192, (1, 1)),
        _Layer("branch7x7x3_2", 192, (1, 7)),
        _Layer("branch7x7x3_3", 192, (7, 1)),
        _Layer("branch7x7x3_4", 192, (3, 3), 2),
    ]
    return _Block(width_in, [three, seven], _halving(), 0)


def _block_e(width_in: int, pool: nn.Module) -> _Block:
    def both(name: str) -> tuple[_Layer, ...]:
        return _Layer(f"{name}a", 384, (1, 3)), _Layer(f"{name}b", 384, (3, 1))

    one = [_Layer("branch1x1", 320, (1, 1))]
    three = [_Layer("branch3x3_1", 384, (1, 1)), both("branch3x3_2")]
    double = [
        _Layer("branch3x3dbl_1", 448, (1, 1)),
        _Layer("branch3x3dbl_2", 384, (3, 3)),
        both("branch3x3dbl_3"),
    ]
    return _Block(width_in, [one, three, double], pool, 192)


class Inception(nn.Module):
    """Pictures as bytes -> the 2048 values of the last average pool; 23.85 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, 128)
        self.Mixed_6c = _block_c(768, 160)
        self.Mixed_6d = _block_c(768, 160)
        self.Mixed_6e = _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, _average())
        self.Mixed_7c = _block_e(2048, nn.MaxPool2d(3, stride=1, padding=1))
        self.fc = nn.Linear(WIDTH, 1008)  # in the file, and unused by the distance

    def forward(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n 2048"]:
        """Features of pictures of any size."""
        x = tensorflow_resize(images.to(self.fc.weight.dtype), SIDE)
        x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3((x - 128) / 128))
        x = functional.max_pool2d(self.Conv2d_2b_3x3(x), 3, stride=2)
        x = functional.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))


def tensorflow_resize(
    images: Float[Tensor, "n c h w"], side: int
) -> Float[Tensor, "n c side side"]:
    """Bilinear resizing as in TensorFlow 1: output i is read at i * (h / side).

    Neither corners nor the centres of pixels are aligned, unlike in every later library; beyond the
    last pixel its value is kept.
    """
    for axis in (3, 2):
        length = images.shape[axis]
        place = torch.arange(side, device=images.device, dtype=torch.float32) * (length / side)
        low = place.long()
        high = (low + 1).clamp(max=length - 1)
        weight = (place - low).to(images.dtype).view(-1, *[1] * (3 - axis))
        start, end = images.index_select(axis, low), images.index_select(axis, high)
        images = start + (end - start) * weight
    return images


def load_inception(path: Path) -> Inception:
    """The network with weights from a file in the published format; frozen, in float32.

    Only tensors are read (``weights_only``): nothing in the file is executed. Whether weights of
    the right names and shapes are the published ones cannot be told here.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of tensors, its tensors are not those of this network by name,
            shape or type, or one is not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"inception weights must be a file, but {path} is none")
    remedy = (
        "take pt_inception-2015-12-05-6726825d.pth (pytorch-fid) or torch-fidelity's copy of it"
    )
    try:
        state = unpickled(path)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(state)}; {remedy}")
    with torch.device("meta"):
        network = Inception()
    expected = network.state_dict()
    counted = {name for name in expected if name.endswith("num_batches_tracked")}
    complaints = {
        "lacks": sorted(expected.keys() - counted - state.keys()),
        "has in addition": sorted(map(str, state.keys() - expected.keys())),
        "has in another shape": [
            name
            for name, value in expected.items()
            if name in state
            and (not isinstance(state[name], Tensor) or state[name].shape != value.shape)
        ],
    }
    for complaint, names in complaints.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"{path} is not Inception's of 2015-12-05: it {complaint} "
                f"{', '.join(names[:3])}{more}; {remedy}"
            )
    weights = {name: value for name, value in state.items() if name not in counted}
    for name, value in weights.items():
        usable = value.is_floating_point() and bool(value.isfinite().all())
        if not usable or (name.endswith("running_var") and bool((value < 0).any())):
            raise ValueError(
                f"{path} must hold finite numbers and variances of at least 0, but {name} does "
                f"not; {remedy}"
            )
    network = network.to_empty(device="cpu")
    network.load_state_dict(
        {name: value.float() for name, value in weights.items()}
        | {name: torch.zeros((), dtype=torch.int64) for name in counted}
    )
    return network.eval().requires_grad_(False)
