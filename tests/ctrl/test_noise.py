"""Named streams: what a number depends on, and on what it does not."""

import pytest
import torch

from ctrl.noise import (
    Noise,
    antithetic,
    brownian_increments,
    gauss_hermite,
    normals_by_sample,
    stream,
)


def numbers(*name: str | int, seed: int = 3) -> torch.Tensor:
    return torch.randn(50, generator=stream(seed, *name))


def test_equal_names_give_equal_numbers_and_different_names_different_ones():
    assert torch.equal(numbers("a", 1), numbers("a", 1))
    others = [
        numbers("a", 2),
        numbers("b", 1),
        numbers("a", 1, 0),
        numbers("a1"),
        numbers("a", "1"),
    ]
    others += [numbers("a", 1, seed=4), numbers("a", 1, seed=3 + 2**32)]
    assert not any(torch.equal(numbers("a", 1), other) for other in others)


def test_many_streams_are_all_different():
    firsts = {torch.randint(2**62, (1,), generator=stream(0, "x", k)).item() for k in range(3000)}
    assert len(firsts) == 3000


def test_streams_do_not_touch_the_global_one():
    before = torch.random.get_rng_state()
    numbers("a")
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_sample_has_its_noise_in_any_layout():
    arguments = {"seed": 5, "name": ("train", "start")}
    whole = normals_by_sample((4, 3), samples=range(10), **arguments)
    parts = [normals_by_sample((4, 3), samples=r, **arguments) for r in (range(7), range(7, 10))]
    assert torch.equal(whole, torch.cat(parts))
    assert normals_by_sample((4, 3), samples=range(0), **arguments).shape == (0, 4, 3)


@pytest.mark.parametrize("bad", [("a", 1.5), ("a", None), ("a", True)])
def test_bad_names_are_refused(bad):
    with pytest.raises(TypeError, match="name"):
        stream(0, *bad)


def test_quadrature_integrates_polynomials_of_the_stated_degree():
    steps = torch.tensor([0.3, 0.8], dtype=torch.float64)
    noise = gauss_hermite(steps, nodes=3, action=(1,))
    w, a = noise.increments[..., 0], noise.actions
    assert a is not None
    assert noise.weights is not None

    def mean(values: torch.Tensor) -> float:
        assert noise.weights is not None
        return float((noise.weights * values).sum())

    assert mean(torch.ones_like(w[:, 0])) == pytest.approx(1, abs=1e-14)
    assert mean(w[:, 1] ** 4) == pytest.approx(3 * 0.8**2, rel=1e-12)
    assert mean(w[:, 0] ** 2 * a[:, 1, 0] ** 2) == pytest.approx(0.3, rel=1e-12)
    assert mean(w[:, 0] * w[:, 1]) == pytest.approx(0, abs=1e-14)
    with pytest.raises(ValueError, match="nodes"):
        gauss_hermite(torch.ones(30).double(), nodes=5)


def test_noise_checks_its_parts():
    with pytest.raises((ValueError, TypeError), match="actions"):
        Noise(torch.zeros(2, 3, 1), torch.zeros(2, 4, 1))
    with pytest.raises(ValueError, match="finite"):
        Noise(torch.full((2, 3, 1), float("nan")))
    with pytest.raises((ValueError, TypeError), match="weights"):
        Noise(torch.zeros(2, 3, 1), weights=torch.zeros(3))


@pytest.mark.parametrize(
    "weights", [[0.5, 0.6], [-0.5, 1.5], [0.0, 0.0], [float("nan"), 1.0]], ids=str
)
def test_weights_that_are_no_law_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        Noise(torch.zeros(2, 3, 1), weights=torch.tensor(weights))


def test_increments_need_paths_and_steps():
    with pytest.raises((ValueError, TypeError), match="increments"):
        Noise(torch.zeros(3))


@pytest.mark.parametrize("noise", [(), (3,), (4, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_brownian_increments_have_their_shape_and_variance(noise, dtype, generator):
    steps = torch.tensor([0.02, 0.7, 0.28], dtype=dtype)
    drawn = brownian_increments(steps, 4000, noise, generator=generator)
    assert drawn.shape == (4000, 3, *noise)
    assert drawn.dtype == dtype
    variance = drawn.double().square().transpose(0, 1).flatten(1).mean(1)
    # 4000 normals or more: 4.9 standard errors of sqrt(2/4000) are 11 %; h for sqrt(h) is 30 % off
    torch.testing.assert_close(variance / steps.double(), torch.ones(3).double(), rtol=0, atol=0.12)


@pytest.mark.parametrize("steps", [[], [0.1, 0.0], [0.1, -0.1], [float("nan")], [float("inf")]])
def test_bad_step_sizes_are_refused(steps):
    tensor = torch.tensor(steps)
    with pytest.raises(ValueError, match="step_sizes"):
        brownian_increments(tensor, 2, generator=torch.Generator())
    with pytest.raises(ValueError, match="step_sizes"):
        gauss_hermite(tensor, nodes=2)
    with pytest.raises(ValueError, match="paths"):
        brownian_increments(torch.ones(1), 0, generator=torch.Generator())


def test_antithetic_pairs_share_the_weight_of_their_path():
    noise = gauss_hermite(torch.tensor([0.4], dtype=torch.float64), nodes=3, action=(2,))
    pairs = antithetic(noise)
    assert noise.weights is not None
    assert noise.actions is not None
    assert pairs.weights is not None
    assert pairs.actions is not None
    assert torch.equal(pairs.increments[0::2], noise.increments)
    assert torch.equal(pairs.increments[1::2], -noise.increments)
    assert torch.equal(pairs.actions[1::2], -noise.actions)
    torch.testing.assert_close(pairs.weights[0::2] + pairs.weights[1::2], noise.weights)


def test_quadrature_noise_takes_any_shape():
    steps = torch.tensor([0.3], dtype=torch.float64)
    noise = gauss_hermite(steps, nodes=2, noise=(1, 2), action=(2, 1, 1))
    assert noise.increments.shape == (16, 1, 1, 2)
    assert noise.actions is not None
    assert noise.actions.shape == (16, 1, 2, 1, 1)
    assert gauss_hermite(steps, nodes=2, noise=()).increments.shape == (2, 1)
