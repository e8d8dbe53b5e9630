"""Half precision: float16 gradients neither vanish nor overflow, and what is compared is float32.

The network is linear and runs in real float16 arithmetic, which a CPU has, if slowly.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_envs.objectives import DDPO
from diffusion_envs.training.loss_scale import LossScale
from diffusion_envs.training.refusal import NonFiniteError
from diffusion_envs.training.trainer import Trainer

HALF = torch.finfo(torch.float16)


class Times:
    """Losses, multiplied: gradients of any size."""

    def __init__(self, losses: Any, factor: float) -> None:
        self.of, self.factor = losses, factor
        self.check_fresh, self.numbers = losses.check_fresh, losses.numbers

    def losses(self, groups: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        return (self.factor * loss for loss in self.of.losses(groups, generator))


@pytest.fixture
def run_of(small_trainer) -> Callable[..., Trainer]:
    """(precision, factor of the losses) -> a run that is not clipped."""

    def made(precision: torch.dtype, factor: float, objective: Any = None, **size: Any) -> Trainer:
        run = small_trainer(objective or DDPO(), **{"max_gradient_norm": 1e30, "batch": 5} | size)
        run.environment.model.score.precision = precision
        run.gradients.loss_scale = LossScale.of(precision)
        own = run.losses
        run.losses = lambda rollout: Times(own(rollout), factor)
        return run

    return made


def gradient(run: Trainer) -> Tensor:
    """What the last optimiser step read."""
    return torch.cat([p.grad.double().flatten() for p in run.parameters if p.grad is not None])


@pytest.mark.parametrize("factor", [1e-9, 1.0, 1e3])
def test_a_float16_gradient_is_that_of_float32(run_of, factor):
    """Whatever the loss's size: each product rounds to 2^-11, in 20 terms and two branches.

    Roll-outs differ as well, by the rounding of four steps: 1 % in all, where a part of the rows
    that is lost, or a factor that is left in, makes 10 % or more.
    """
    half, whole = run_of(torch.float16, factor), run_of(torch.float32, factor)
    numbers = half.step()
    whole.step()
    gap = (gradient(half) - gradient(whole)).norm() / gradient(whole).norm()
    assert 0 < gap < 0.01
    assert numbers["loss_scale"] == 2.0**16 / 2 ** numbers["repeated_gradients"]
    assert (numbers["repeated_gradients"] > 0) == (factor >= 1)


def test_without_the_factor_small_gradients_are_lost(run_of):
    """So that the test above shows something."""
    run = run_of(torch.float16, 1e-9)
    run.gradients.loss_scale = LossScale()
    run.step()
    assert gradient(run).norm() == 0


def test_a_repeated_gradient_is_of_the_same_rows(run_of):
    """Steps of paths are drawn while the losses are made: the draw is the same again."""
    steps = {"train_steps": 1, "batch": 64}
    plain = run_of(torch.float16, 1.0, **steps)
    plain.gradients.loss_scale.scale = 256.0
    plain.step()
    repeated = run_of(torch.float16, 1.0, **steps)
    repeated.gradients.loss_scale.scale = 2.0**40
    assert repeated.step()["repeated_gradients"] > 20
    # powers of two round nothing, but where a product is subnormal, below 6e-5 of the scale
    torch.testing.assert_close(gradient(repeated), gradient(plain), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("precision", [torch.float16, torch.float32])
def test_losses_that_are_no_numbers_end_the_run_and_change_nothing(run_of, precision):
    run = run_of(precision, math.nan)
    before = [p.detach().clone() for p in run.parameters]
    with pytest.raises(NonFiniteError, match="no weight was changed by it") as caught:
        run.step()
    assert ("not by the scale" in str(caught.value)) == (precision == torch.float16)
    assert run.gradients.loss_scale.repeated == 0
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))


def test_gradients_that_overflow_at_any_factor_end_the_run(run_of):
    run = run_of(torch.float16, 1e12)
    with pytest.raises(NonFiniteError, match="not by the scale"):
        run.step()
    assert run.gradients.loss_scale.scale == 1
    assert run.update == 0


def test_a_run_goes_on_with_its_factor(run_of):
    whole, first, second = (run_of(torch.float16, 1e3) for _ in range(3))
    log = [whole.step() for _ in range(2)]
    first.step()
    second.load_state(first.state())
    again = second.step()
    assert again["loss_scale"] == log[1]["loss_scale"]
    assert again["repeated_gradients"] == log[1]["repeated_gradients"] > 0
    assert torch.equal(gradient(second), gradient(whole))
    older = {k: v for k, v in first.state().items() if k != "loss_scale"}
    second.load_state(older)  # checkpoints of before have none


def test_the_factor_grows_after_many_finite_gradients():
    scale = LossScale.of(torch.float16)
    for _ in range(2 * scale.patience - 1):
        scale.keep()
    assert scale.scale == 2.0**17
    scale.keep()
    assert scale.scale == 2.0**18
    assert LossScale.of(torch.bfloat16).numbers() == {}  # its range is float32's


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_log_ratios_of_half_precision_networks_are_float32(run_of, precision):
    """And 0 bit for bit where rows go through the network as they did in the roll-out."""
    run = run_of(precision, 1.0)
    made = run.losses(run.sample().rollout).of
    paths = torch.arange(12)
    with torch.no_grad():
        for step in range(4):
            rows = made.rows(torch.stack([paths, torch.full((12,), step)], dim=1))
            ratio = run.objective.log_ratio(rows)
            assert rows.mean.dtype == ratio.dtype == torch.float32
            assert (ratio == 0).all()
