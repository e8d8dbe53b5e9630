"""Resizing and preparing pictures in numpy, float64, from the formulas: what ours must equal."""

import numpy as np
import torch
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


def _sizes(height, width, size, fit, rounding):
    """Height and width after resizing, the long way round."""
    if fit == "stretch":
        return size, size
    side = {"crop": min, "pad": max}[fit](height, width)
    if rounding == "open_clip":
        scale = size / float(side)
        return tuple(round(dim * scale) for dim in (height, width))
    return tuple(size if dim == side else int(size * dim / side) for dim in (height, width))


def prepare(images, size, fit, rounding, mean, std, saturate=True):
    """The whole preparation, float64, in numpy; one picture after the other."""
    prepared = []
    for picture in images.double().numpy():
        h, w = _sizes(*picture.shape[-2:], size, fit, rounding)
        small = resize(picture, h, w)
        small = np.clip(small, 0, 1) if saturate else small
        canvas = np.zeros((3, size, size))
        if fit == "pad":
            top, left = (size - h) // 2, (size - w) // 2
            canvas[:, top : top + h, left : left + w] = small
        else:
            if rounding == "transformers":
                top, left = (h - size) // 2, (w - size) // 2
            else:
                top, left = round((h - size) / 2.0), round((w - size) / 2.0)
            canvas[:] = small[:, top : top + size, left : left + size]
        prepared.append((canvas - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1)))
    return torch.from_numpy(np.stack(prepared))
