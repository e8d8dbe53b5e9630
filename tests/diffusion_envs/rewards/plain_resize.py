"""Bicubic resizing in numpy, float64, written from the formula; what preprocessing must equal."""

import numpy as np
from numpy.typing import NDArray


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel with a = -1/2, written out."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def weights(before: int, after: int) -> NDArray[np.float64]:
    """[after, before]: rows sum to 1; when shrinking, the kernel is as much wider."""
    scale = before / after
    centres = (np.arange(after) + 0.5) * scale
    taps = np.arange(before) + 0.5
    kernel = _cubic((taps[None] - centres[:, None]) / max(scale, 1.0))
    # pillow takes whole taps, those whose centre is within the support of the kernel's
    support = 2 * max(scale, 1.0)
    low = np.maximum(np.floor(centres - support + 0.5), 0)[:, None]
    high = np.minimum(np.floor(centres + support + 0.5), before)[:, None]
    index = np.arange(before)[None]
    kernel = np.where((index >= low) & (index < high), kernel, 0.0)
    return kernel / kernel.sum(1, keepdims=True)


def resize(pictures: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """[..., h, w] -> [..., height, width], not cut to any range."""
    rows = weights(pictures.shape[-2], height)
    columns = weights(pictures.shape[-1], width)
    return rows @ pictures @ columns.T
