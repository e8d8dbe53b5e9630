import dataclasses

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_envs.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from tests.diffusion_envs.rewards import plain_resize

NONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # no mean, no std: the resized picture itself
ROUNDINGS = ["torchvision", "transformers", "open_clip"]
# height, width, size: shrunk and enlarged, by much and by little, wide and tall, odd and even
SIZES = [(37, 53, 24), (53, 37, 24), (10, 14, 24), (64, 64, 24), (25, 24, 24), (7, 90, 13)]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_pictures_are_prepared_as_the_formula_says(generator, height, width, size, fit, rounding):
    images = torch.rand(2, 3, height, width, generator=generator)
    prepare = Preprocessing(size, fit, CLIP_MEAN, CLIP_STD, rounding)
    expected = plain_resize.prepare(images, size, fit, rounding, CLIP_MEAN, CLIP_STD)
    # float32 sums of at most 2 * 28 products below 1.3, divided by a std of 0.26
    torch.testing.assert_close(prepare(images).double(), expected, rtol=0, atol=4e-5)


def test_the_three_rules_differ_where_sizes_are_odd():
    # 24 of 25 x 36: the other side is 34.56, so 34 or 35; half of 34 - 24 is 5, of 35 - 24 is 5.5
    make = lambda size, fit, rounding: Preprocessing(size, fit, *NONE, rounding)
    assert make(24, "crop", "torchvision").resized(25, 36) == (24, 34)
    assert make(24, "crop", "transformers").resized(25, 36) == (24, 34)
    assert make(24, "crop", "open_clip").resized(25, 36) == (24, 35)
    assert make(24, "pad", "open_clip").resized(36, 25) == (24, 17)  # 16.67
    assert make(24, "pad", "torchvision").resized(36, 25) == (24, 16)
    # a column of numbers 27 wide, cropped to 24: 1.5 is 2 in torchvision, 1 in transformers
    columns = torch.arange(27.0) / 26 * torch.ones(1, 3, 24, 1)
    starts = {r: make(24, "crop", r)(columns)[0, 0, 0, 0].item() * 26 for r in ROUNDINGS}
    assert {r: round(start) for r, start in starts.items()} == {
        "torchvision": 2,
        "transformers": 1,
        "open_clip": 2,
    }
    padded = make(24, "pad", "open_clip")(torch.ones(1, 3, 24, 9))  # 15 columns of padding
    assert padded[0, 0, 0].tolist() == [0.0] * 7 + [1.0] * 9 + [0.0] * 8


def test_a_very_long_picture_keeps_a_pixel():
    prepare = Preprocessing(8, "pad", *NONE, "open_clip")
    assert prepare(torch.ones(1, 3, 2, 100)).sum() == pytest.approx(3 * 8, rel=1e-5)


def pillow(picture, height, width):
    """In two calls: pillow 13 has the passes in another order where heights shrink more."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    narrow = image.resize((width, picture.shape[-2]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(narrow.resize((width, height), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_float_resizing_is_pillows_up_to_its_two_roundings(generator, height, width, size):
    # grey enough that nothing saturates: the kernel's overshoot is below 1.3 each way
    levels = torch.randint(96, 160, (3, height, width), generator=generator, dtype=torch.uint8)
    ours = Preprocessing(size, "stretch", *NONE, "torchvision")(levels[None].float() / 255)[0]
    gap = (255 * ours.permute(1, 2, 0) - pillow(levels, size, size).float()).abs().max()
    # half a level of the first pass, carried on by the second one's kernel, and half of the second
    carried = np.abs(plain_resize.weights(height, size)).sum(1).max()
    assert gap <= 0.5 * carried + 0.5 + 0.01  # pillow's kernel has 22 bits, and ours float32


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
@pytest.mark.parametrize("contrast", [False, True])
def test_quantised_resizing_is_pillows(generator, height, width, size, contrast):
    levels = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    if contrast:  # black and white: both passes saturate
        levels = 255 * (levels > 127).byte()
    prepare = Preprocessing(size, "stretch", *NONE, "torchvision", quantise=True)
    gap = 255 * prepare(levels[None].float() / 255)[0].permute(1, 2, 0)
    gap = (gap - pillow(levels, size, size).float()).abs()
    # pillow's kernel is in fixed point: now and then a tie falls to the other side, by one level
    assert gap.max() < 1.001
    assert (gap > 0.001).double().mean() < 0.02


def test_quantising_rounds_pictures_that_need_no_resizing():
    prepare = Preprocessing(2, "crop", *NONE, "torchvision", quantise=True)
    ramp = torch.tensor([0.1, 0.49, 0.51, 254.7]).view(1, 1, 2, 2).expand(1, 3, 2, 2) / 255
    assert (255 * prepare(ramp)[0, 0]).round(decimals=4).tolist() == [[0.0, 0.0], [1.0, 255.0]]
    plain = dataclasses.replace(prepare, quantise=False)
    assert torch.equal(plain(ramp), ramp)


def test_a_picture_of_the_right_size_is_only_normalised(generator):
    images = torch.rand(2, 3, 16, 16, generator=generator)
    for fit in ("crop", "pad", "stretch"):
        prepared = Preprocessing(16, fit, CLIP_MEAN, CLIP_STD, "torchvision")(images)
        mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
        expected = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        assert torch.equal(prepared, expected)


def test_what_overshoots_is_cut_unless_told_not_to(generator):
    images = (torch.rand(1, 3, 9, 9, generator=generator) > 0.5).float()
    prepare = Preprocessing(20, "stretch", *NONE, "torchvision")
    assert prepare(images).aminmax() == (0, 1)
    kept = dataclasses.replace(prepare, saturate=False)(images)
    assert kept.min() < -0.01
    assert kept.max() > 1.01
    assert torch.equal(kept.clamp(0, 1), prepare(images))
    wide = 3 * torch.rand(1, 3, 20, 20, generator=generator) - 1  # a decoder that overshoots
    assert torch.equal(prepare(wide), prepare(wide.clamp(0, 1)))


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("quantise", [False, True])
def test_the_gradient_is_that_of_the_resizing_without_rounding(generator, fit, quantise):
    images = 0.4 + 0.2 * torch.rand(2, 3, 11, 17, generator=generator, dtype=torch.float64)
    prepare = Preprocessing(8, fit, CLIP_MEAN, CLIP_STD, "open_clip", quantise=quantise)
    smooth = dataclasses.replace(prepare, quantise=False)
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    readout = torch.randn(smooth(images).shape, generator=generator, dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad((readout * prepare(leaf)).sum(), leaf)
    # nothing saturates, so it is linear and one difference is exact up to round-off
    exact = (readout * (smooth(images + 1e-3 * direction) - smooth(images))).sum() / 1e-3
    torch.testing.assert_close((slope * direction).sum(), exact, rtol=1e-9, atol=1e-9)


def test_pictures_in_half_precision_are_prepared_in_float32(generator):
    images = torch.rand(1, 3, 8, 8, generator=generator).bfloat16()
    assert Preprocessing(4, "crop", *NONE, "torchvision")(images).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size must be a positive number of pixels, got 0"),
        ({"size": True}, "size must be a positive number of pixels, got True"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
        ({"fit": "squeeze"}, "fit must be one of"),
        ({"rounding": "pillow"}, "rounding must be one of"),
    ],
)
def test_what_is_no_preparation_is_refused(monkeypatch, change, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    prepare = Preprocessing(8, "crop", CLIP_MEAN, CLIP_STD, "torchvision")
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(prepare, **change)
