"""Where the ratio is not 1 before the first step, the message names the cause that was planted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_envs.objectives import DDPO, ScoreAsAction
from diffusion_envs.objectives.preflight import Experiments
from diffusion_envs.training.trainer import PreflightError, Trainer

RATIO, KL = "log-ratio .*", "path KL .*"


def network_of(run: Trainer) -> Any:
    model: Any = run.environment.model
    return model.score.unet


def through(run: Trainer, change: Callable[[Tensor], Tensor]) -> None:
    """The network's answers, changed."""
    network = network_of(run)
    forward = network.forward

    def changed(x: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Any:
        answer = forward(x, timesteps, encoder_hidden_states).sample
        return SimpleNamespace(sample=change(answer))

    network.forward = changed


def dropped(run: Trainer) -> None:
    through(run, torch.nn.Dropout(0.01))  # in training mode, as any new module


def normalised(run: Trainer) -> None:
    norm = torch.nn.BatchNorm2d(4)
    through(run, lambda x: x + 0.1 * norm(x))


def in_half(run: Trainer) -> None:
    """Weights of bfloat16, which no one has declared."""
    network = network_of(run).to(torch.bfloat16)
    forward = network.forward
    network.forward = lambda x, timesteps, encoder_hidden_states: forward(
        x.bfloat16(), timesteps.bfloat16(), encoder_hidden_states.bfloat16()
    )


@contextmanager
def computing_in(run: Trainer, dtype: torch.dtype) -> Iterator[None]:
    model: Any = run.environment.model
    before, model.score.precision = model.score.precision, dtype
    yield
    model.score.precision = before


def adapt(run: Trainer) -> None:
    with torch.no_grad():
        network_of(run).b.add_(0.05)


def half_policy(run: Trainer) -> None:
    """The adapter on: bfloat16 as well."""
    network = network_of(run)
    whole = network.forward

    def forward(x: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Any:
        if not network.adapted:
            return whole(x, timesteps, encoder_hidden_states)
        with torch.autocast("cpu", torch.bfloat16):
            return whole(x, timesteps, encoder_hidden_states)

    network.forward = forward


def nothing(run: Trainer) -> None:
    pass


def other_weights(run: Trainer) -> None:
    with torch.no_grad():
        network_of(run).base.mul_(1.01)


Change = Callable[[Trainer], None]
FLOAT = torch.float32
# before the roll-out, its precision, between roll-out and update, and what the message says
CAUSES: dict[str, tuple[Change, torch.dtype, Change, str]] = {
    "dropout": (dropped, FLOAT, nothing, f"{RATIO}cause is dropout: two calls"),
    "rows are mixed": (normalised, FLOAT, nothing, f"{RATIO}cause is batch: rows .* alone"),
    "roll-out in half precision": (
        nothing,
        torch.bfloat16,
        nothing,
        f"{RATIO}cause is dtype: the roll-out was computed in bfloat16",
    ),
    "update in half precision": (
        nothing,
        FLOAT,
        in_half,
        f"{RATIO}cause is dtype: the update's network computes in a half type",
    ),
    "adapter changed since": (nothing, FLOAT, adapt, f"{RATIO}cause is adapter: the roll"),
    "adapter off since": (
        adapt,
        FLOAT,
        lambda run: network_of(run).disable_adapters(),
        f"{RATIO}cause is adapter: scores differ",
    ),
    "weights": (nothing, FLOAT, other_weights, f"{RATIO}cause is weights: the same rows"),
    "adapter not fresh": (adapt, FLOAT, nothing, f"{KL}cause is adapter: switched on"),
    "policy in half precision": (half_policy, FLOAT, nothing, f"{KL}cause is dtype: one of"),
}


@pytest.mark.parametrize("cause", CAUSES.values(), ids=CAUSES)
def test_the_message_names_the_cause(cause, small_trainer):
    before, precision, after, message = cause
    run = small_trainer(ScoreAsAction(), batch=5)
    before(run)
    with computing_in(run, precision):
        rollout = run.sample().rollout
    after(run)
    with pytest.raises(PreflightError, match=message):
        run.losses(rollout).check_fresh()


def test_a_network_of_half_precision_whose_batches_round_otherwise_is_a_matter_of_dtype(
    small_trainer,
):
    """Its answers depend on the rows beside, as kernels do that add in another order."""
    run = small_trainer(DDPO(), batch=5)
    in_half(run)
    through(run, lambda x: x * (1 + 0.004 * (len(x) % 3)))
    with pytest.raises(PreflightError, match="cause is dtype: the network computes in a half"):
        run.losses(run.sample().rollout).check_fresh()


def test_without_pretrained_scores_the_adapter_is_not_blamed_for_other_weights(small_trainer):
    run = small_trainer(DDPO(), batch=5)
    rollout = run.sample().rollout
    other_weights(run)
    with pytest.raises(PreflightError, match="cause is adapter, or other weights: scores differ"):
        run.losses(rollout).check_fresh()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_last_bit_tells_half_precision(dtype, small_trainer):
    run = small_trainer(DDPO())
    tried = Experiments(run.environment, run.sample().rollout, 4, 1e-4)
    with computing_in(run, dtype):
        assert tried.half_precision() == (dtype != torch.float32)
