"""Flow-DPPO, against formulas written out in numpy, numbers at the edge and a solvable model."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_envs.exact import linear_policy
from diffusion_envs.exact.gaussian import Gaussian
from diffusion_envs.objectives import GRPO, FlowDPPO, Rows
from diffusion_envs.objectives.flow_dppo import PathRows
from tests.diffusion_envs.objectives import one_coordinate as one
from tests.diffusion_envs.objectives.random_rows import close, rows
from tests.diffusion_envs.objectives.small_runs import share_gained, trainer

ROWS = 24


def single(generator: torch.Generator, moved: float, **more: Any) -> PathRows:
    """Single steps, or as many together as asked for."""
    settings = {"joined": 1, "steps": 5} | more
    return rows(generator, moved, kind=PathRows, count=ROWS, **settings)


def arrays(r: Rows) -> tuple[np.ndarray, ...]:
    """(shift in standard deviations, noise, advantage, shift from the pretrained), a row each."""
    scale = (r.score_gain / r.std).numpy()[:, None]
    assert r.reference_score is not None
    actions = (r.mean, r.old_mean, r.reference_score)
    new, old, pre = (a.detach().numpy().reshape(ROWS, -1) for a in actions)
    noise = r.noise.numpy().reshape(ROWS, -1)
    return scale * (new - old), noise, r.advantage.numpy(), scale * (new - pre)


# -- the loss -------------------------------------------------------------------------------------


def test_loss_and_gradient_are_those_of_the_masked_ratio(generator):
    r = single(generator, moved=0.1)
    shift, noise, advantage, away = arrays(r)
    ratio = np.exp((-0.5 * (noise - shift) ** 2 + 0.5 * noise**2).sum(1))
    far = 0.5 * (shift**2).sum(1) >= 0.1
    away_from_old = ((advantage > 0) & (ratio > 1)) | ((advantage < 0) & (ratio < 1))
    kept = ~(far & away_from_old)
    for some in (far & away_from_old, far & ~away_from_old, ~far & away_from_old):
        assert some.any()
    objective = FlowDPPO(kl_weight=0.7, max_kl=0.1)
    expected = 0.7 * 0.5 * (away**2).sum(1) - kept * ratio * advantage
    loss = objective.loss(r)
    close(loss.detach(), torch.from_numpy(expected))
    close(objective.clipped(r), torch.from_numpy(1.0 - kept))
    (found,) = torch.autograd.grad(loss.sum(), r.mean)
    rate = 0.7 * away - (kept * ratio * advantage)[:, None] * (noise - shift)
    rate = rate * (r.score_gain / r.std).numpy()[:, None]
    close(found.flatten(1), torch.from_numpy(rate))


@pytest.mark.parametrize(
    ("max_kl", "noise", "advantage", "masked"),
    [
        (0.5, 2.0, 0.3, True),  # D is at the threshold: not below it
        (0.5 + 1e-12, 2.0, 0.3, False),
        (0.5 - 1e-12, 2.0, 0.3, True),
        (0.4, 2.0, -0.3, False),  # a bad step whose probability rose: back
        (0.4, 0.0, 0.3, False),  # a good one whose probability fell: back
        (0.4, 0.0, -0.3, True),
        (0.4, 0.5 + 1e-12, 0.3, True),  # just more probable
        (0.4, 0.5, 0.3, False),  # as probable as before
        (0.4, 0.5 - 1e-12, 0.3, False),
        (0.4, 2.0, 0.0, False),
    ],
)
def test_what_is_masked(max_kl, noise, advantage, masked):
    """One coordinate, a shift of one standard deviation: D = 1/2, log-ratio noise - 1/2."""
    z, a = (torch.tensor([x], dtype=torch.float64) for x in (noise, advantage))
    r = one.rows(PathRows, z, 1.0, a, joined=1, steps=5)
    objective = FlowDPPO(max_kl=max_kl)
    assert objective.masked(r).item() is masked
    assert (one.slope(objective, r)[0] == 0) == (masked or advantage == 0 or noise == 1.0)


def test_a_masked_ratio_that_overflows_does_no_harm():
    z = torch.tensor([1e3], dtype=torch.float64)
    r = one.rows(PathRows, z, 2.0, torch.ones(1), joined=1, steps=5)
    assert one.slope(FlowDPPO(), r)[0] == 0


def test_the_threshold_per_pixel_is_the_published_one(generator):
    objective = FlowDPPO(max_kl_per_pixel=0.1)
    r = single(generator, moved=0.1)
    shift, _, advantage, _ = arrays(r)
    far = (0.5 * shift**2).mean(1) >= 0.1  # the mean over coordinates
    expected = far & (objective.log_ratio(r).detach().numpy() * advantage > 0)
    wide = single(generator, moved=1.0)
    assert objective.masked(wide).any()
    assert objective.masked(r).tolist() == expected.tolist()
    assert FlowDPPO().max_kl == pytest.approx(1e-5 * 4 * 64 * 64, rel=3e-2)
    published = 1e-5 * 16 * 64 * 64
    assert published == pytest.approx(0.66, abs=5e-3)


# -- whole paths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 6])
def test_the_divergence_of_a_path_is_that_of_its_used_steps(steps, generator):
    """Four groups of two paths, three used steps each; of six they are half."""
    r = single(generator, moved=0.1, joined=3, steps=steps)
    objective = FlowDPPO(group=2, per_path=True, max_kl=0.6)
    kl = 0.5 * (arrays(r)[0] ** 2).sum(1)
    expected = np.zeros(ROWS)
    for group in range(4):
        for member in range(2):
            own = [6 * group + 2 * step + member for step in range(3)]
            expected[own] = steps / 3 * sum(kl[i] for i in own)
    close(objective.divergence(r).detach(), torch.from_numpy(expected))
    outward = objective.log_ratio(r).detach() * r.advantage > 0
    masked = objective.masked(r)
    assert masked.tolist() == (torch.from_numpy(expected >= 0.6) & outward).tolist()
    assert 0 < masked.sum() < outward.sum()


def test_its_mean_is_the_kl_of_the_chains(linear_gaussian):
    """KL(P_old || P_th) by the moment recursion; the start's law is the same."""
    model = linear_gaussian(1.0, 3)
    rollout, weights = model.rollout()
    gain, shift = model.gain + 0.1, model.shift - 0.2
    objective = FlowDPPO(group=2, per_path=True)
    pairs = torch.arange(len(weights)).repeat_interleave(2)  # a path and itself make a group
    made = model.own_rows(objective, rollout, 0 * rollout.costs, gain, shift)
    # [path, step] -> [group, step, member]
    order = (pairs.view(-1, 1, 2) * 3 + torch.arange(3).view(1, -1, 1)).flatten()
    tensors = {
        name: value[order]
        for name, value in vars(made).items()
        if isinstance(value, Tensor) and value.ndim > 0
    }
    made = PathRows(**vars(made) | tensors)
    found = objective.divergence(made).view(-1, 3, 2)
    assert torch.equal(found, found[:, :1, :1].expand_as(found))
    cost = (model.sampler.score_gain / model.sampler.std).square()
    laws = linear_policy.moments(model.chain(model.gain, model.shift), model.start)[:-1]
    law = Gaussian(*(torch.stack([getattr(x, n) for x in laws]) for n in ("mean", "covariance")))
    nats = -linear_policy.kl_cost(cost, gain - model.gain, shift - model.shift).expectation(law)
    expected = nats.sum().item()
    assert (found[:, 0, 0] * weights).sum().item() == pytest.approx(expected, rel=1e-11)


def test_the_steps_of_a_path_stand_together():
    """In the loop's own rows every column of a group is one path, at every used step once."""
    seen: list[PathRows] = []

    class Watched(FlowDPPO):
        def masked(self, rows: PathRows) -> Any:
            seen.append(rows)
            return super().masked(rows)

    run = trainer(Watched(group=4, per_path=True), train_steps=3)
    next(iter(run.updates(1)))
    for r in seen:
        assert (r.joined, r.steps) == (3, 4)
        advantage = r.advantage.view(-1, 3, 4)
        assert torch.equal(advantage, advantage[:, :1].expand_as(advantage))
        sizes = r.step_size.view(-1, 3, 4)
        assert all(len(group.unique()) == 3 for group in sizes)
    assert len({x for r in seen for x in r.advantage.tolist()}) > 6


# -- the gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_at_the_sampling_policy_the_gradient_is_exact(eta, linear_gaussian):
    model = linear_gaussian(eta)
    rollout, _ = model.rollout()
    returns = rollout.rewards[:, None].expand_as(rollout.costs)
    objective, expected = FlowDPPO(max_kl=1e-9), model.exact()
    found = model.estimated(objective.loss, returns, objective)
    assert (found - expected).abs().max() < 1e-11 * expected.abs().max()


@pytest.mark.parametrize("per_path", [False, True])
def test_at_the_sampling_policy_it_is_grpos_with_the_kl(per_path, generator):
    r = single(generator, moved=0.0, joined=3)
    found, other = (
        torch.autograd.grad(o.loss(r).sum(), r.mean)[0]
        for o in (FlowDPPO(group=2, kl_weight=0.3, per_path=per_path), GRPO(kl_weight=0.3))
    )
    close(found, other)


def test_outside_next_to_nothing_of_the_gradient_is_left():
    shift = 0.57
    r = one.rows(PathRows, one.Z, shift, one.Z, joined=1, steps=1)
    kl = 0.5 * shift**2
    assert kl == pytest.approx(0.16, abs=3e-3)
    z = one.Z
    ratio = (shift * z - kl).exp()
    back = (z >= 0) & (z <= shift / 2)
    found = one.expected(one.slope(FlowDPPO(max_kl=0.16), r))
    assert found == pytest.approx(one.expected(z * (z - shift) * ratio * back), abs=1e-5)
    assert found == pytest.approx(-0.006, abs=5e-4)
    inside = one.expected(one.slope(FlowDPPO(max_kl=0.17), r))
    assert inside == pytest.approx(1.0, abs=1e-6)
    ppo = one.expected(one.slope(GRPO(kl_weight=0.0), r))
    assert ppo == pytest.approx(0.94, abs=5e-3)


def test_sizes_of_ratios_and_paths():
    """Variance of the ratio just inside; and the path KL of 50 steps all of which are."""
    shift = math.sqrt(2 * 0.16)
    ratio = (shift * one.Z - 0.16).exp()
    assert one.expected(ratio.square()) - 1 == pytest.approx(0.38, abs=5e-3)
    assert 50 * FlowDPPO().max_kl == pytest.approx(8.0)


# -- settings and the loop ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"group": 1}, "group"),
        ({"max_kl": 0.0}, "max_kl"),
        ({"max_kl": math.inf}, "max_kl"),
        ({"max_kl_per_pixel": -1e-4}, "max_kl_per_pixel"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"advantage_clip": 0.0}, "advantage_clip"),
        ({"learning_rate": math.inf}, "learning_rate"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        FlowDPPO(**settings)


@pytest.mark.parametrize("per_path", [False, True])
def test_it_trains_and_resumes(per_path, trains):
    objective = FlowDPPO(group=4, kl_weight=0.1, per_path=per_path)
    assert objective.joins_steps is per_path
    done = trains(objective, minibatches=3)
    assert done.environment.reward_queries == 2 * 12


def test_a_path_moves_less_in_a_smaller_ball():
    def largest_ratio(max_kl: float) -> float:
        objective = FlowDPPO(group=4, per_path=True, max_kl=max_kl, learning_rate=0.03)
        (line,) = trainer(objective, epochs=8).updates(1)
        assert (line["clipped_fraction"] > 0) == (max_kl < 1)
        return line["ratio_max"]

    assert largest_ratio(1e-4) < largest_ratio(1e4)


def test_a_short_run_gains():
    objective = FlowDPPO(kl_weight=0.5, learning_rate=0.03, per_path=True)
    assert share_gained(objective, updates=15, minibatches=2) > 0.2
