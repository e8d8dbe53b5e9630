"""Diffusion-DPO: the published loss, its unit, where it leads, and pairs that share their noise."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch import Tensor

from ctrl.noise import stream
from diffusion_envs import exact
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.objectives import DiffusionDPO, NoisedRows
from diffusion_envs.objectives.noised_data import NoisedLosses
from diffusion_envs.preferences import FromReward, Recorded
from tests.diffusion_envs.objectives.random_rows import EVENT, close
from tests.diffusion_envs.objectives.small_runs import assert_runs_and_resumes, numbers, trainer

PIXELS = math.prod(EVENT)
SD15 = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs(generator: torch.Generator, moved: float = 0.1) -> NoisedRows:
    """A pair whose first is preferred, one whose second is, and a tie."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    alpha = tensor([0.9, 0.5, 0.2]).repeat_interleave(2)
    noise, reference = normal(3, *EVENT).repeat_interleave(2, 0), normal(6, *EVENT)
    return NoisedRows(
        mean=(reference + moved * normal(6, *EVENT)).requires_grad_(),
        old_mean=None,
        reference_score=reference,
        state=normal(6, *EVENT),
        data=normal(6, *EVENT),
        noise=noise,
        alpha=alpha,
        sigma=(1 - alpha.square()).sqrt(),
        reward=normal(6),
        advantage=tensor([1.0, -1.0, -1.0, 1.0, 0.0, 0.0]),
        path_kl_gain=tensor([0.3, 1.7, 4.1]).repeat_interleave(2),
    )


def test_the_loss_is_the_published_one(generator):
    """-logsigmoid(-beta / 2 (model difference - reference difference)) of mean squared errors."""
    rows = pairs(generator, 1e-3)
    assert rows.reference_score is not None
    sigma = rows.sigma.view(-1, 1, 1, 1)
    errors = [
        (-sigma * score - rows.noise).square().mean((1, 2, 3))
        for score in (rows.mean, rows.reference_score)
    ]
    model, reference = ((e[[0, 3]] - e[[1, 2]]) for e in errors)  # preferred less the other
    published = -torch.nn.functional.logsigmoid(-0.5 * 5000 * (model - reference))
    tie = torch.zeros(1, dtype=torch.float64)
    expected = torch.cat([published, tie]).repeat_interleave(2)
    found = DiffusionDPO().loss(rows)
    close(found, expected)
    assert (expected[:4] - math.log(2)).abs().min() > 0.01
    found.sum().backward()
    assert rows.mean.grad is not None
    assert (rows.mean.grad.flatten(1).abs().amax(1) > 0).tolist() == [True] * 4 + [False] * 2


def test_beta_is_logits_per_nat_of_the_path_kls_bound(generator):
    rows, objective = pairs(generator), DiffusionDPO(beta=0.7)
    assert rows.path_kl_gain is not None
    assert rows.reference_score is not None
    bounds = []  # int g^2 / 2 |error of the score|^2, less the pretrained model's
    for i in range(6):
        slope = -rows.noise[i] / rows.sigma[i]
        own, pretrained = (
            0.5 * rows.path_kl_gain[i] * ((score[i] - slope) ** 2).sum()
            for score in (rows.mean, rows.reference_score)
        )
        bounds.append(pretrained - own)
    logits = 0.7 * torch.stack([bounds[0] - bounds[1], bounds[3] - bounds[2]])
    close(objective.loss(rows)[[0, 2]], (1 + (-logits).exp()).log())


def test_the_gain_of_a_row_is_the_path_kl_of_its_timestep():
    """The mean over timesteps is the integral of g^2, and each is the log-alpha's own increment."""
    run = trainer(DiffusionDPO())
    made = losses_of(run, DiffusionDPO(draws=5))
    levels = run.environment.model.table
    assert isinstance(levels, DDPMTable)
    log_abar = levels.alphas_cumprod.double().log().tolist()
    assert made.path_kl_gain.mean().item() == pytest.approx(-log_abar[-1], rel=1e-12)
    which = torch.cartesian_prod(torch.arange(12), torch.arange(5))
    found = made.rows(which).path_kl_gain
    assert found is not None
    for (path, draw), gain in zip(which.tolist(), found.tolist(), strict=True):
        k = int(made.timestep[path, draw])
        before = log_abar[k - 1] if k else 0.0
        assert gain == pytest.approx(len(log_abar) * (before - log_abar[k]), rel=1e-5)


def test_the_published_beta_in_logits_per_nat_on_stable_diffusions_table():
    log_abar = (1 - SD15).log().cumsum(0)
    gain = -1000 * torch.cat([log_abar[:1], log_abar.diff()])
    sigma = (1 - log_abar.exp()).sqrt()
    at = [0, 249, 499, 749, 999]
    fields = dict.fromkeys(("old_mean", "reference_score", "reward", "advantage"), sigma[at])
    zeros = torch.zeros(5, 4, 64, 64, dtype=torch.float64)
    common: Any = fields | dict.fromkeys(("mean", "state", "data", "noise"), zeros)
    rows = NoisedRows(
        **common | {"old_mean": None, "reference_score": zeros},
        alpha=log_abar[at].mul(0.5).exp(),
        sigma=sigma[at],
        path_kl_gain=gain[at],
    )
    per_nat = DiffusionDPO().weight(rows) / DiffusionDPO(beta=1.0).weight(rows)
    assert per_nat.tolist() == pytest.approx([0.0003, 0.041, 0.046, 0.036, 0.025], rel=0.02)


# -- where it leads ------------------------------------------------------------------------------


def shifted(
    shift: Tensor, x0: Tensor, noise: Tensor, alpha: float, gain: float, sign: float
) -> Any:
    """Rows of pairs of N(0, 1) data, [pairs, 2], whose score is the exact one plus a shift."""
    sigma = math.sqrt(1 - alpha**2)
    state = (alpha * x0 + sigma * noise[:, None]).flatten()[:, None]
    ones = torch.ones(len(state), dtype=torch.float64)
    signs = torch.tensor([sign, -sign], dtype=torch.float64).repeat(len(x0))
    return NoisedRows(
        mean=-state + shift,
        old_mean=None,
        reference_score=-state,
        state=state,
        data=x0.flatten()[:, None],
        noise=noise.repeat_interleave(2)[:, None],
        alpha=alpha * ones,
        sigma=sigma * ones,
        reward=ones,
        advantage=signs,
        path_kl_gain=gain * ones,
    )


def test_with_choices_at_odds_each_level_explains_them_alone(generator):
    """Data N(0, 1), reward a x_0: at a / (beta alpha G) the loss of every pair is critical."""
    a, beta, alpha, gain = 0.8, 0.6, 0.7, 2.3
    x0 = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(9, generator=generator, dtype=torch.float64)
    chance = torch.tensor(expit(a * (x0[:, 0] - x0[:, 1]).numpy()))
    slopes = []
    for shift in (a / (beta * alpha * gain), 0.0):
        each = torch.full((18, 1), shift, dtype=torch.float64, requires_grad=True)
        first, second = (
            DiffusionDPO(beta=beta).loss(shifted(each, x0, noise, alpha, gain, sign))[::2]
            for sign in (1.0, -1.0)
        )
        expected = (chance * first + (1 - chance) * second).sum()
        slopes.append(torch.autograd.grad(expected, each)[0].abs())
    assert slopes[0].max() < 1e-12
    assert slopes[1].min() > 1e-4


@pytest.mark.parametrize(
    ("abar", "ratios", "cost"),
    [
        ((1 - SD15).cumprod(0), [1.18, 0.61, 0.75, 2.2, 18], 2.41),
        (exact.table().alphas_cumprod, None, 66.4),
    ],
)
def test_what_that_costs_on_a_table(abar, ratios, cost):
    """Shifts of each level alone against the tilt's, alpha a: one mean, another path KL."""
    log_abar = abar.double().log()
    gain = -len(abar) * torch.cat([log_abar[:1], log_abar.diff()])
    alpha = abar.double().sqrt()
    own, tilt = 1 / (alpha * gain), alpha
    if ratios is not None:
        assert (own / tilt)[[0, 249, 499, 749, 999]].tolist() == pytest.approx(ratios, rel=0.02)
    # the data's mean, int alpha g^2 shift, and the path KL
    assert (gain * alpha * own).mean().item() == pytest.approx(1, abs=1e-12)
    assert (gain * alpha * tilt).mean().item() == pytest.approx(1, abs=0.01)
    costs = [(0.5 * gain * shift.square()).mean().item() for shift in (own, tilt)]
    assert costs[0] / costs[1] == pytest.approx(cost, rel=0.01)


def test_where_the_larger_reward_always_wins_the_loss_falls_for_ever(generator):
    x0 = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    x0 = x0.sort(1, descending=True).values
    noise = torch.randn(50, generator=generator, dtype=torch.float64)
    losses = [
        DiffusionDPO(beta=1.0).loss(shifted(tensor(s), x0, noise, 0.7, 2.3, 1.0)).sum().item()
        for s in (0.0, 1.0, 10.0, 100.0, 1000.0)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.01 * losses[0]


def test_the_first_gradient_is_that_of_the_chance_to_be_preferred():
    """omega / 2 sigma grad E[2 P - 1 | x], exactly: data N(0, 1), who is larger is preferred."""
    alpha, x, gain, beta = 0.6, 0.7, 2.3, 0.9
    sigma = math.sqrt(1 - alpha**2)
    point, mass = np.polynomial.hermite_e.hermegauss(120)
    mass = mass / mass.sum()

    def preferred(at: float) -> float:
        """E[2 P - 1 | x]: x_0 given x is N(alpha x, sigma^2); the other one is N(0, 1)."""
        return float(math.erf(alpha * at / math.sqrt(2) / math.sqrt(1 + sigma**2)))

    expected = (preferred(x + 1e-5) - preferred(x - 1e-5)) / 2e-5
    total = 0.0
    x0 = tensor(alpha * x + sigma * point)
    noise = (x - alpha * x0) / sigma
    chance = torch.special.ndtr(x0)
    for sign, share in ((1.0, chance), (-1.0, 1 - chance)):
        leaf = torch.zeros(len(x0), 2, 1, dtype=torch.float64, requires_grad=True)
        two = torch.stack([x0, x0.flip(0)], dim=1)  # the other's own does not matter
        rows = shifted(leaf.flatten(0, 1), two, noise, alpha, gain, sign)
        loss = DiffusionDPO(beta=beta).loss(rows)[::2]
        slope = torch.autograd.grad(loss @ (share * tensor(mass)), leaf)[0][:, 0]
        total += slope.sum().item()
    # d loss / d score; epsilon's is over -sigma
    omega = beta * gain / sigma**2
    assert total / -sigma == pytest.approx(omega / 2 * sigma * expected, rel=1e-6)


# -- pairs in the loop ---------------------------------------------------------------------------


def losses_of(run: Any, objective: DiffusionDPO) -> NoisedLosses:
    rollout = run.sample().rollout
    advantages = objective.advantages(rollout)
    generator = stream(3, "noise")
    return NoisedLosses(run.environment, objective, rollout, advantages, generator, None, batch=7)


def test_the_members_of_a_pair_share_prompt_level_and_noise_and_stand_side_by_side():
    objective, seen = DiffusionDPO(draws=3), list[NoisedRows]()
    run = trainer(objective)
    made = losses_of(run, objective)

    class Seeing:
        draws, needs_reference = 3, True

        def loss(self, rows: NoisedRows) -> Tensor:
            seen.append(rows)
            return objective.loss(rows)

    made.objective = Seeing()  # pyright: ignore[reportAttributeAccessIssue]  # a spy
    groups = torch.tensor([4, 0, 5])
    total = torch.stack(list(made.losses(groups, stream(0, "unused")))).sum()
    assert [len(rows.sigma) for rows in seen] == [6, 6, 6]  # at most 7, and whole pairs
    data = torch.cat([rows.data for rows in seen]).view(9, 2, 2)
    ends = made.rollout.states[:, -1].view(6, 2, 2)
    assert torch.equal(data, ends[groups].repeat_interleave(3, 0))
    for name in ("sigma", "noise", "path_kl_gain"):
        value = torch.cat([getattr(rows, name) for rows in seen])
        one, other = value.view(9, 2, -1).unbind(1)
        assert torch.equal(one, other)
        assert len(one.unique(dim=0)) > 3
    with torch.no_grad():
        each = torch.cat([objective.loss(rows) for rows in seen])
    assert total.item() == pytest.approx(each.mean().item(), rel=1e-6)


def test_what_is_preferred_is_plus_one_whoever_says_so(tmp_path):
    objective = DiffusionDPO()
    rollout = trainer(objective).sample().rollout
    rewards = rollout.rewards.view(-1, 2)
    expected = torch.where(rewards[:, :1] > rewards[:, 1:], tensor([1, -1]), tensor([-1, 1]))
    assert torch.equal(objective.advantages(rollout).double(), expected.flatten())
    path = tmp_path / "choices.jsonl"
    path.write_text("\n".join(f'{{"order": [{k + 1}, {k}]}}' for k in range(0, 12, 2)))
    chosen = trainer(objective, Recorded(path)).sample().rollout
    assert objective.advantages(chosen).tolist() == [-1.0, 1.0] * 6


def test_ties_teach_nothing_and_are_logged():
    objective = DiffusionDPO()
    tied = trainer(objective, lambda images, prompts, rewards, samples, group: 0 * rewards)
    line = tied.step()
    assert line["tied_fraction"] == 1
    assert line["gradient_norm"] == 0
    assert trainer(objective, FromReward()).step()["tied_fraction"] == 0


@pytest.mark.parametrize("online", [False, True])
def test_pairs_are_the_pretrained_models_unless_online(online):
    objective = DiffusionDPO(beta=1.0, online=online, learning_rate=0.05)
    assert objective.on_policy == online
    run, fresh = trainer(objective), trainer(objective)
    list(run.updates(2))
    fresh.update = 2
    with run._sampling_policy():
        sampled = run.sample().rollout
    assert torch.equal(sampled.states, fresh.sample().rollout.states) != online


def test_it_costs_two_network_calls_a_noised_state():
    """The current model's score and the pretrained one's; another pass asks the current one."""
    cases: list[tuple[dict[str, Any], int]] = [({}, 2), ({"epochs": 2, "minibatches": 2}, 3)]
    for size, passes in cases:
        log = numbers(trainer(DiffusionDPO(draws=3), **size), 2)
        each = 12 * 4 + passes * 12 * 3
        assert [line["network_calls"] for line in log] == [each, 2 * each]


def test_it_runs_in_the_loop_and_resumes_to_the_same_numbers():
    assert_runs_and_resumes(DiffusionDPO(), queries=12)
    assert_runs_and_resumes(DiffusionDPO(beta=0.5, online=True), queries=12, minibatches=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta_per_pixel": 0.0}, "beta_per_pixel"),
        ({"beta": -1.0}, "beta must"),
        ({"beta": math.nan}, "beta must"),
        ({"draws": 0}, "draws"),
        ({"learning_rate": math.inf}, "learning_rate"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionDPO(**settings)
