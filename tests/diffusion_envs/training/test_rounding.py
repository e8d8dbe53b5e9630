"""The ratio before the first step is 1: bit for bit, or up to the bound that is promised."""

import pytest
import torch

from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.objectives.path_steps import (
    log_ratio_rounding,
    score_rounding,
    transition_log_ratio,
)
from diffusion_envs.objectives.score_as_action import DrawnRows, drawn_log_ratio
from diffusion_envs.samplers import DDIM
from diffusion_envs.training.trainer import PreflightError, Trainer
from verification.claim import Setting
from verification.problems.training_loop import SAMPLES, STEPS, network_of, trainer

UNIT = torch.finfo(torch.float32).eps
WHICH = torch.cartesian_prod(torch.arange(SAMPLES), torch.arange(STEPS))


def fresh(guidance: float = 7.5, batch: int = 64) -> Trainer:
    """A run before its first update: the adapter is on, and adds 0."""
    made = trainer(Setting(), batch=batch)
    made.update = 0
    made.environment.model.score.guidance = guidance
    with torch.no_grad():
        network_of(made).b.zero_()
    return made


def rows_of(paths: int, dim: int, generator, exploration: float = 0.0) -> DrawnRows:
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    old, std = 3.7 * normal(paths, dim), 0.05 + torch.rand(paths, generator=generator).double()
    spread = exploration * std
    return DrawnRows(
        mean=old,
        old_mean=old,
        reference_score=old,
        action=old + spread[:, None] * normal(paths, dim),
        noise=normal(paths, dim),
        advantage=std,
        step_size=std,
        horizon=std.sum(),
        score_gain=0.3 * std.square(),
        std=std,
        action_std=spread,
        kl_factor=1.0,
    )


@pytest.mark.parametrize(
    ("exploration", "log_ratio"), [(0.0, transition_log_ratio), (0.4, drawn_log_ratio)]
)
def test_scores_that_differ_by_the_rounding_allowed_for_keep_within_the_bound(
    exploration, log_ratio, generator
):
    """And reach most of it: of 40,000 normals the largest is 4.2 or so, where 6 are allowed."""
    rows = rows_of(40_000, 16, generator, exploration)
    off = torch.randn(40_000, 16, dtype=torch.float64, generator=generator)
    off *= score_rounding(torch.float32) * (rows.old_mean.norm(dim=1) / off.norm(dim=1))[:, None]
    changed = DrawnRows(**{**vars(rows), "mean": rows.old_mean + off})
    share = log_ratio(changed).abs() / log_ratio_rounding(rows, torch.float32, rows.action_std)
    assert 0.6 < share.max() < 1


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7, 13, 24])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_in_any_batches_the_ratio_is_1_up_to_the_bound(guidance, batch):
    made = fresh(guidance)
    update_losses = made.losses(made.sample().rollout)
    with torch.no_grad():
        for piece in WHICH.split(batch):
            rows = update_losses.rows(piece)
            found = made.objective.log_ratio(rows).abs()
            assert (found <= log_ratio_rounding(rows, torch.float32)).all()


def test_in_one_batch_the_ratio_is_1_bit_for_bit():
    """All paths of one step at once, as the roll-out asks for them."""
    made = fresh()
    update_losses = made.losses(made.sample().rollout)
    with torch.no_grad():
        for step in range(STEPS):
            rows = update_losses.rows(WHICH[WHICH[:, 1] == step])
            assert (made.objective.log_ratio(rows) == 0).all()


@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("guidance", [1.0, 7.5, 20.0])
def test_the_preflight_lets_round_off_pass(guidance, batch):
    made = fresh(guidance, batch)
    made.losses(made.sample().rollout).check_fresh()


def test_the_preflight_sees_weights_that_moved_by_a_thousandth():
    """The mildest of its mistakes: half precision in one of the two places makes 2e-3 or more."""
    made = fresh()
    update_losses = made.losses(made.sample().rollout)
    with torch.no_grad():
        network_of(made).base.mul_(1.001)
    with pytest.raises(PreflightError, match="log-ratio"):
        update_losses.check_fresh()


def test_the_preflight_sees_a_pretrained_model_that_is_a_little_off():
    made = fresh()
    with torch.no_grad():
        network_of(made).b.add_(1e-3)
    with pytest.raises(PreflightError, match="path KL"):
        made.losses(made.sample().rollout).check_fresh()


@pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely
def test_the_rounding_allowed_for_is_several_times_the_embedded_networks():
    """Half of what is allowed for would not be four times what guidance 7.5 shows, 38 units."""
    model = TextToImageUNet.load(guidance=7.5, lora_rank=2)
    score = model.score
    context = model.condition(["a photo of a cat", "a photo of a ship"])[torch.arange(12) % 2]
    states = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    worst = 0.0
    with torch.no_grad():
        for timestep in DDIM(1.0).bind(model.table, 4).timesteps:
            asked = states, timestep.expand(12), context
            score.batch = 64
            whole = score(*asked)
            for score.batch in (1, 3, 5):
                off = (score(*asked) - whole).flatten(1).norm(dim=1)
                worst = max(worst, float((off / whole.flatten(1).norm(dim=1)).max()))
    assert 8 * UNIT < worst < score_rounding(torch.float32) / 4
