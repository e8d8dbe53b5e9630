import io

import pytest
import torch
from PIL import Image

from diffusion_envs.rewards import JpegCompressibility, JpegIncompressibility
from diffusion_envs.rewards.jpeg import kilobytes


def noise(generator, n=4, side=32):
    return torch.rand(n, 3, side, side, generator=generator)


def file_size(image, quality):
    """Size of the whole file, by pillow."""
    buffer = io.BytesIO()
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return buffer.tell()


@pytest.mark.parametrize("quality", [1, 20, 50, 95])
def test_the_size_is_that_of_the_file_less_the_same_header_for_every_picture(generator, quality):
    pictures = [*noise(generator), torch.zeros(3, 32, 32), noise(generator, 1, 48)[0]]
    headers = {
        file_size(p, quality) - round(1000 * kilobytes(p[None], quality).item()) for p in pictures
    }
    assert headers == {623}  # bytes: every table and segment that a baseline file must have


def test_smooth_pictures_earn_more(generator):
    grey, rough = torch.full((1, 3, 32, 32), 0.5), noise(generator, 1)
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    sizes = kilobytes(torch.cat([grey, ramp, rough]), 95)
    assert sizes.diff().gt(0).all()
    assert 0 < sizes[0] < 0.1


def test_compressibility_is_minus_incompressibility_in_kilobytes(generator):
    images = noise(generator)
    less, more = (
        r(quality=80)(images, [""] * 4) for r in (JpegCompressibility, JpegIncompressibility)
    )
    assert torch.equal(less, -more)
    assert torch.equal(more, kilobytes(images, 80))
    assert more.dtype is torch.float32


def test_equal_pictures_have_equal_sizes_in_any_batch(generator):
    images = noise(generator)
    reward = JpegCompressibility()
    alone = torch.cat([reward(image[None], [""]) for image in images])
    assert torch.equal(reward(images, [""] * 4), alone)
    assert torch.equal(reward(images.flip(0), [""] * 4), alone.flip(0))


def test_pictures_are_rounded_to_eight_bits(generator):
    images = (noise(generator) * 255).round() / 255
    nudged = (images + 0.4 / 255 * torch.rand(images.shape, generator=generator)).clamp(0, 1)
    assert torch.equal(kilobytes(images, 95), kilobytes(nudged, 95))


@pytest.mark.parametrize("quality", [0, 96, -1, True])
@pytest.mark.parametrize("reward", [JpegCompressibility, JpegIncompressibility])
def test_a_quality_out_of_range_is_refused(reward, quality):
    with pytest.raises(ValueError, match=f"quality must be an integer from 1 to 95, got {quality}"):
        reward(quality=quality)
