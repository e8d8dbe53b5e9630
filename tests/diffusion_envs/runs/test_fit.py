"""The loop that trains from scratch: it resumes, averages, and refuses what is no recipe."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from diffusion_envs.runs.fit import Recipe, fit, initial_weights


def _fit(folder: Path, stop: int | None) -> nn.ModuleDict:
    """A small regression; at step ``stop`` the user presses Ctrl-C."""
    with initial_weights(0):
        modules = nn.ModuleDict({"line": nn.Linear(3, 1)})
    done = 0

    def loss(m: nn.ModuleDict, g: torch.Generator) -> dict[str, torch.Tensor]:
        nonlocal done
        done += 1
        if done == stop:
            raise KeyboardInterrupt
        x = torch.randn(16, 3, generator=g)
        return {"loss": (m["line"](x).float() - x.sum(1, keepdim=True)).square().mean()}

    recipe = Recipe(updates=8, learning_rate=0.1, batch=16, seconds_between_checkpoints=0.0)
    return fit(modules, loss, recipe, folder=folder, seed=3, name="line")


def test_an_interrupted_training_resumes_to_the_same_weights(tmp_path):
    whole = _fit(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "cut", 5)
    cut = _fit(tmp_path / "cut", None)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_comes_back_is_the_moving_average(tmp_path):
    """Against the recursion: decay min(0.6, (1 + n) / (10 + n)) after update n, from the first."""
    with initial_weights(0):
        modules = nn.ModuleDict({"line": nn.Linear(3, 1)})
    passed: list[torch.Tensor] = []

    def loss(m: nn.ModuleDict, g: torch.Generator) -> dict[str, torch.Tensor]:
        passed.append(m["line"].weight.detach().clone())
        x = torch.randn(16, 3, generator=g)
        return {"loss": (m["line"](x).float() - x.sum(1, keepdim=True)).square().mean()}

    recipe = Recipe(updates=20, learning_rate=0.1, batch=16, average=0.6, precision=torch.float32)
    averaged = fit(modules, loss, recipe, folder=tmp_path, seed=3, name="line")
    weights = [*passed[1:], modules["line"].weight.detach()]
    expected = weights[0]
    for n, after in list(enumerate(weights))[1:]:
        decay = min(0.6, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * after
    torch.testing.assert_close(averaged["line"].weight.detach(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(averaged["line"].weight, modules["line"].weight)


def test_the_rate_warms_up_and_falls_to_zero():
    recipe = Recipe(updates=100, learning_rate=0.2, batch=1, warmup=0.1)
    rates = [recipe.rate(k) for k in range(100)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[10] == pytest.approx(0.2)
    assert rates[55] == pytest.approx(0.2 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rates[99] < 1e-4
    assert max(rates) == pytest.approx(0.2)


def test_a_gradient_that_is_not_finite_stops_it(tmp_path):
    with initial_weights(0):
        modules = nn.ModuleDict({"line": nn.Linear(1, 1)})
    recipe = Recipe(updates=3, learning_rate=0.1, batch=1, precision=torch.float32)
    with pytest.raises(FloatingPointError, match="broken: gradient norm is nan at step 0"):
        fit(
            modules,
            lambda m, g: {"loss": m["line"].weight.sum() * math.nan},
            recipe,
            folder=tmp_path,
            seed=0,
            name="broken",
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates": 0}, "updates must be an integer of at least 1, got 0"),
        ({"batch": -1}, "batch must be an integer of at least 1, got -1"),
        ({"learning_rate": math.nan}, "learning_rate must be positive and finite, got nan"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"average": 1.0}, "average must be in"),
    ],
)
def test_what_is_no_recipe_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"updates": 1, "learning_rate": 0.1, "batch": 1} | settings)


def test_integers_are_not_averaged(tmp_path):
    """Averages of equal integers would be rounded down, and places of tokens would drift."""
    with initial_weights(0):
        modules = nn.ModuleDict({"line": nn.Linear(3, 1)})
    modules["line"].register_buffer("places", torch.arange(16))

    def loss(m: nn.ModuleDict, g: torch.Generator) -> dict[str, torch.Tensor]:
        return {"loss": m["line"](torch.randn(4, 3, generator=g)).float().square().mean()}

    recipe = Recipe(updates=20, learning_rate=0.1, batch=4, precision=torch.float32)
    averaged = fit(modules, loss, recipe, folder=tmp_path, seed=3, name="line")
    assert torch.equal(averaged["line"].get_buffer("places"), torch.arange(16))
