import pytest
import torch

from diffusion_envs.rewards import Colour

CHANNELS = ("red", "green", "blue")


@pytest.mark.parametrize("channel", CHANNELS)
def test_it_is_the_channel_less_the_mean_of_the_others(generator, channel):
    images = torch.rand(5, 3, 6, 7, dtype=torch.float64, generator=generator)
    k = CHANNELS.index(channel)
    others = [images[:, j].mean((1, 2)) for j in range(3) if j != k]
    expected = images[:, k].mean((1, 2)) - sum(others) / 2
    # two orders of summing 42 numbers below 1: 42 roundings of 2^-53
    torch.testing.assert_close(Colour(channel)(images, [""] * 5), expected, rtol=0, atol=5e-15)


def test_pure_colours_earn_one_and_grey_nothing():
    pure = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 4, 4)
    assert Colour("green")(pure, [""] * 3).tolist() == [-0.5, 1.0, -0.5]
    assert Colour("blue")(torch.full((1, 3, 4, 4), 0.25), [""]).item() == 0


def test_its_gradient_is_that_of_the_formula(generator):
    images = torch.rand(2, 3, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    assert Colour.differentiable
    assert torch.autograd.gradcheck(lambda x: Colour("red")(x, ["", ""]), images)


@pytest.mark.parametrize("channel", ["Red", "yellow", ""])
def test_another_channel_is_refused(channel):
    with pytest.raises(ValueError, match=f"channel must be one of .* got '{channel}'"):
        Colour(channel)
