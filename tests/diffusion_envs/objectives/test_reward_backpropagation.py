"""Derivatives through the end of the sampler, against the exact ones of a linear Gaussian model."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from diffusion_envs import rewards
from diffusion_envs.environment import Environment
from diffusion_envs.exact import linear_policy
from diffusion_envs.exact.gaussian import Affine, Quadratic, score_coefficients
from diffusion_envs.exact.problems import table
from diffusion_envs.exact.rewards import QuadraticReward
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.objectives import AlignProp, BackpropObjective, DRaFT, ReFL
from diffusion_envs.objectives.last_steps import LastLosses
from diffusion_envs.samplers import DDIM, BoundDDIM
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.objectives.small_runs import (
    PROBLEM,
    assert_runs_and_resumes,
    numbers,
    trainer,
)
from tests.diffusion_envs.sd15.calling import finetune
from tests.diffusion_envs.test_two_views import (
    DATA,
    GAIN,
    REWARD,
    SHIFT,
    START,
    TABLES,
    VIEW_B,
    exact_gradient,
    flat,
    leaves,
    relative_gap,
    roll_out,
)
from verification.problems.training_loop import Process

SD15 = TABLES["sd15"]


class LinearScore:
    """Score of Gaussian data plus gain x + shift, as the loop knows a network."""

    def __init__(self, sampler: BoundDDIM, gain: Tensor, shift: Tensor) -> None:
        self.sampler, self.gain, self.shift = sampler, gain, shift
        self.calls, self.precision, self.adapted = 0, torch.float32, True
        self.event, self.table, self.prediction_type = (2,), sampler.table, "epsilon"
        self.parameters, self.device = [], torch.device("cpu")

    def condition(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), 1)

    def features(self, condition: Tensor) -> Tensor:
        return condition

    def decode(self, states: Tensor) -> Tensor:
        return states

    def export(self, folder: Path) -> Path:
        raise NotImplementedError("no run writes this model into a folder")

    def __call__(self, states: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        times = (timesteps.double() + 1) / len(self.sampler.table.alphas_cumprod)
        slope, offset = score_coefficients(DATA, self.sampler.table, times)
        score = torch.einsum("nij,nj->ni", slope, states) + offset
        return score + states @ self.gain.T + self.shift if self.adapted else score

    def prediction(self, states: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        raise NotImplementedError("only black-box samplers ask for it")

    @contextmanager
    def pretrained(self) -> Iterator[None]:
        self.adapted = False
        yield
        self.adapted = True


def gradient(objective: BackpropObjective, sampler: BoundDDIM) -> Tensor:
    """Gradient of the loss, averaged over quadrature paths, all of the same weight."""
    rollout, weights = roll_out(VIEW_B, sampler)
    assert (weights - weights[0]).abs().max() < 1e-15
    gain, shift = leaves()
    environment = Environment(
        model=LinearScore(sampler, gain, shift),
        sampler=sampler,
        reward=QuadraticReward(REWARD),
        prompts=["-"],
        seed=0,
    )
    update_losses = LastLosses(environment, objective, rollout, batch=100)
    losses = update_losses.losses(torch.arange(len(weights)), torch.Generator().manual_seed(1))
    return flat(torch.autograd.grad(torch.stack(list(losses)).sum(), (gain, shift)))


def truncated(sampler: BoundDDIM, first: int, last: int, kl_weight: float = 0.0) -> Tensor:
    """Exact gradient of E[r] - kl_weight KL of steps ``first`` to ``last``, the others frozen.

    By the recursion of moments; of the denoised image if the path is left before its end.
    """
    gain, shift = leaves()
    steps = linear_policy.Steps.of(sampler)
    frozen = linear_policy.chain(DATA, sampler.table, steps, GAIN, SHIFT)
    moving = linear_policy.chain(DATA, sampler.table, steps, gain, shift)
    running = linear_policy.kl_cost(kl_weight * steps.cost, gain, shift)
    law, total = START, torch.zeros((), dtype=torch.float64)
    for k in range(first):
        law = frozen[k].after(law)
    for k in range(first, last):
        if k == last - 1 and last < len(steps.std):
            alpha, sigma = sampler.alpha[k], sampler.sigma[k]
            slope, offset = score_coefficients(DATA, sampler.table, sampler.noising_times[k])
            unit = torch.eye(2, dtype=torch.float64)
            matrix = (unit + sigma.square() * (slope + gain)) / alpha
            law = Affine(matrix, sigma.square() * (offset + shift) / alpha, 0 * unit).after(law)
            break
        now = Quadratic(running.curvature[k], running.slope[k], running.constant[k])
        total = total + now.expectation(law)
        law = moving[k].after(law)
    return flat(torch.autograd.grad(REWARD.expectation(law) + total, (gain, shift)))


ROUND_OFF = 1e-11


@pytest.mark.parametrize("schedule", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("kl_weight", [0.0, 0.37])
def test_with_all_steps_it_is_the_exact_gradient(schedule, kl_weight):
    sampler = DDIM(1.0).bind(schedule, 3)
    found = gradient(DRaFT(last=3, kl_weight=kl_weight), sampler)
    expected = exact_gradient(replace(VIEW_B, kl_weight=kl_weight), sampler)
    assert relative_gap(-found, expected) < ROUND_OFF


@pytest.mark.parametrize("last", [1, 2, 3])
@pytest.mark.parametrize("kl_weight", [0.0, 0.37])
def test_a_cut_gives_the_derivative_of_the_last_steps_alone(last, kl_weight):
    sampler = DDIM(0.7).bind(SD15, 3)
    found = gradient(DRaFT(last=last, kl_weight=kl_weight), sampler)
    assert relative_gap(-found, truncated(sampler, 3 - last, 3, kl_weight)) < ROUND_OFF


@pytest.mark.parametrize("first", [0, 1, 2])
def test_refl_differentiates_the_denoised_image_of_one_step(first, monkeypatch):
    sampler = DDIM(1.0).bind(SD15, 3)
    monkeypatch.setattr(ReFL, "cut", lambda *_: (first, first + 1))
    found = gradient(ReFL(enough=1e6, scale=1.0), sampler)
    assert relative_gap(-found, truncated(sampler, first, first + 1)) < ROUND_OFF


def test_alignprop_is_the_scaled_derivative_below_its_target():
    sampler = DDIM(1.0).bind(SD15, 3)
    found = gradient(AlignProp(place=1 / 3, place_std=0.0, target=1e6, kl_weight=0.37), sampler)
    assert relative_gap(-found, 0.01 * truncated(sampler, 1, 3, 0.37)) < ROUND_OFF


# Share of the gradient that is missing, largest component, 20 steps of Stable Diffusion's schedule.
MISSING = {1: 0.967, 5: 0.801, 10: 0.552, 15: 0.271}


@pytest.mark.parametrize(("last", "missing"), MISSING.items(), ids=str)
def test_the_bias_of_a_cut(last, missing):
    sampler = DDIM(1.0).bind(SD15, 20)
    whole, part = truncated(sampler, 0, 20), truncated(sampler, 20 - last, 20)
    assert relative_gap(part, whole) == pytest.approx(missing, abs=0.0006)
    exact = exact_gradient(replace(VIEW_B, kl_weight=0.0), sampler)
    torch.testing.assert_close(whole, exact, rtol=1e-10, atol=1e-12)


def turned(one: Tensor, other: Tensor) -> float:
    """Angle between two gradients, degrees."""
    return math.degrees(math.acos(float(torch.cosine_similarity(one, other, dim=0))))


def test_the_bias_of_refl():
    """Averaged over its ten places of 40; beside that of a cut before the first of them."""
    sampler = DDIM(1.0).bind(SD15, 40)
    whole, late = truncated(sampler, 0, 40), truncated(sampler, 30, 40)
    refl = torch.stack([truncated(sampler, k, k + 1) for k in range(30, 40)]).mean(0)
    assert turned(refl, whole) == pytest.approx(24.81, abs=0.01)
    assert float(refl.norm() / whole.norm()) == pytest.approx(0.167, abs=0.001)
    assert turned(late, whole) == pytest.approx(19.38, abs=0.01)
    assert float(late.norm() / whole.norm()) == pytest.approx(0.280, abs=0.001)


# -- losses and cuts ------------------------------------------------------------------------------


def test_losses_are_the_published_ones(generator):
    r, nats = (torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(2))
    reward, kl = 3 * r, nats.square()
    torch.testing.assert_close(ReFL().loss(reward, kl), 1e-3 * (2 - reward).clamp(min=0))
    torch.testing.assert_close(DRaFT(kl_weight=0.2).loss(reward, kl), 0.2 * kl - reward)
    got = AlignProp(target=1.3, kl_weight=0.2).loss(reward, kl)
    torch.testing.assert_close(got, 0.01 * ((reward - 1.3).abs() + 0.2 * kl))


def cuts(objective: BackpropObjective, steps: int, generator: torch.Generator) -> Tensor:
    found = torch.tensor([objective.cut(steps, generator) for _ in range(2000)])
    assert (found[:, 0] >= 0).all()
    assert (found[:, 0] < found[:, 1]).all()
    assert (found[:, 1] <= steps).all()
    return found


def test_refl_stops_anywhere_in_the_last_quarter(generator):
    found = cuts(ReFL(), 40, generator)
    assert set(found[:, 0].tolist()) == set(range(30, 40))
    assert (found[:, 1] == found[:, 0] + 1).all()
    assert cuts(ReFL(), 1, generator)[0].tolist() == [0, 1]


@pytest.mark.parametrize(("last", "first"), [(1, 6), (3, 4), (7, 0), (100, 0)])
def test_draft_differentiates_the_last_steps(last, first, generator):
    assert DRaFT(last=last).cut(7, generator) == (first, 7)


def test_alignprop_begins_at_a_normally_distributed_place(generator):
    found = cuts(AlignProp(), 50, generator)
    assert (found[:, 1] == 50).all()
    begin = found[:, 0]
    law, shares = NormalDist(42, 5), []
    for place in range(50):  # int(N(42, 5)), given that it is in the range
        share = (law.cdf(place + 1) - law.cdf(place)) / (law.cdf(50) - law.cdf(0))
        seen = float((begin == place).double().mean())
        assert abs(seen - share) <= 5 * (share * (1 - share) / 2000) ** 0.5 + 1e-3
        shares.append(share)
    assert shares[49] == pytest.approx(0.027, abs=5e-4)  # the last step alone
    mean = sum(k * share for k, share in enumerate(shares))
    assert abs(float(begin.double().mean()) - mean) < 5 * 5 / 2000**0.5
    assert set(cuts(AlignProp(place=0.5, place_std=0.0), 50, generator)[:, 0].tolist()) == {25}


@pytest.mark.parametrize("place", [0.84, 0.05], ids=["late", "early"])
def test_alignprop_draws_a_place_again_until_it_is_a_step(place, generator):
    """With the same numbers, by a loop that is written out here."""
    again = torch.Generator().set_state(generator.get_state())
    refused = 0
    for _ in range(500):
        while not 0 <= (x := 50 * (place + 0.1 * torch.randn((), generator=again).item())) < 50:
            refused += 1
        assert AlignProp(place=place).cut(50, generator) == (int(x), 50)
    assert refused > 10


@pytest.mark.parametrize(
    ("place", "steps", "first"), [(0.58, 50, 29), (0.0, 7, 0), (1.0, 7, 6), (0.84, 1, 0)]
)
def test_a_fixed_place_is_that_step(place, steps, first, generator):
    assert AlignProp(place=place, place_std=0.0).cut(steps, generator) == (first, steps)


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        (ReFL, {"earliest": 1.0}, "earliest"),
        (ReFL, {"earliest": -0.1}, "earliest"),
        (ReFL, {"enough": math.nan}, "enough"),
        (ReFL, {"scale": 0.0}, "scale"),
        (DRaFT, {"last": 0}, "last"),
        (DRaFT, {"kl_weight": -1.0}, "kl_weight"),
        (DRaFT, {"learning_rate": 0.0}, "learning_rate"),
        (AlignProp, {"place": 1.1}, "place"),
        (AlignProp, {"place_std": -0.1}, "place_std"),
        (AlignProp, {"target": math.inf}, "target"),
        (AlignProp, {"scale": math.nan}, "scale"),
        (AlignProp, {"kl_weight": math.inf}, "kl_weight"),
    ],
)
def test_bad_settings_are_refused_by_name(kind, settings, name):
    with pytest.raises(ValueError, match=name):
        kind(**settings)


# -- in the loop ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective", [ReFL(), DRaFT(last=2, kl_weight=0.1), AlignProp()], ids=["refl", "draft", "ap"]
)
def test_it_runs_in_the_loop_and_resumes_to_the_same_numbers(objective):
    assert_runs_and_resumes(objective, queries=24)  # each sample once more, with a gradient


@pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely
@pytest.mark.parametrize("reward", [rewards.Colour("red"), rewards.PromptAlignment()], ids=repr)
def test_rewards_of_decoded_images_have_the_gradient_that_finite_differences_see(reward, generator):
    model = TextToImageUNet.load(guidance=1.0, lora_rank=1)
    environment = Environment(
        model=model,
        sampler=DDIM(1.0).bind(model.table, 3),
        reward=reward,
        prompts=["a photo of a cat", "a photo of a ship"],
        seed=0,
    )
    latents = torch.randn(2, *environment.event, generator=generator)
    condition = torch.tensor([0, 1])
    slope = environment.reward_gradient(latents, condition)
    assert environment.reward_queries == 2
    size, away = 1e-2, slope / slope.flatten(1).norm(dim=1).view(2, 1, 1, 1)

    def at(step: float) -> Tensor:
        with torch.no_grad():
            return environment.differentiable_reward(latents + step * away, condition)

    seen = (at(size) - at(-size)) / (2 * size)
    torch.testing.assert_close(seen, slope.flatten(1).norm(dim=1), rtol=0.05, atol=1e-3)


def tiny_gradient(objective: BackpropObjective, recompute: str) -> tuple[Tensor, int]:
    """Gradient of the tiny network's adapter, away from its start; and its network calls."""
    model = TextToImageUNet.load(guidance=2.0, lora_rank=2)
    environment = Environment(
        model=model,
        sampler=DDIM(1.0).bind(model.table, 3),
        reward=rewards.PromptAlignment("reward"),
        prompts=["a photo of a cat"],
        seed=0,
    )
    with torch.no_grad():
        for parameter in model.parameters:
            parameter.fill_(0.05)
    none = torch.zeros(2, dtype=torch.int64)
    rollout = environment.sample(objective.policy, range(2), none, stream="train").rollout
    score = model.score
    if recompute == "ours":
        score.recompute_activations()
    elif recompute == "diffusers":
        model.pipe.unet.enable_gradient_checkpointing()
    score.calls = 0
    update_losses = LastLosses(environment, objective, rollout, batch=2)
    for loss in update_losses.losses(torch.arange(2), torch.Generator()):
        loss.backward()
    gradients = [p.grad for p in model.parameters]
    return torch.cat([g.flatten() for g in gradients if g is not None]), score.calls


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kl_weight", [0.0, 3.0])
def test_recomputed_activations_give_the_same_gradient(kl_weight):
    """Also of a KL, whose pretrained scores are computed again with the adapter off."""
    objective = DRaFT(last=3, kl_weight=kl_weight)
    kept, calls = tiny_gradient(objective, "none")
    again, calls_again = tiny_gradient(objective, "ours")
    assert len(kept) == len(again)
    torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-6 * kept.abs().max().item())
    scored = 3 * 2 * 2  # steps, paths, guidance branches
    assert calls == calls_again == (2 if kl_weight else 1) * scored


@pytest.mark.filterwarnings("default")
def test_diffusers_own_recomputation_would_not_do():
    """It finds the adapter switched on where it was off: other activations than were kept."""
    with pytest.raises(CheckpointError, match=r"Recomputed values|number of tensors"):
        tiny_gradient(DRaFT(last=3, kl_weight=3.0), "diffusers")


CALLS = {
    "refl": (ReFL(), 1),
    "draft": (DRaFT(last=2), 2),
    "draft with a KL": (DRaFT(last=2, kl_weight=0.1), 4),
    "align": (AlignProp(place=0.5, place_std=0.0), 2),
    "align with a KL": (AlignProp(place=0.5, place_std=0.0, kl_weight=0.1), 4),
}


@pytest.mark.parametrize(("objective", "passes"), CALLS.values(), ids=CALLS)
def test_pretrained_scores_are_computed_where_a_kl_is_charged(objective, passes):
    """Network calls of an update of 12 paths of 4 steps; the log's path KL is counted apart."""
    for asked, monitoring in ((False, 0), (True, 2 * 12 * 4)):
        run = trainer(objective, log_path_kl=asked)
        log = numbers(run, 2)
        assert [line["network_calls"] for line in log] == [12 * (4 + passes), 24 * (4 + passes)]
        assert ["path_kl" in line for line in log] == [asked, asked]
        assert run.environment.monitoring_calls == monitoring


def test_an_ode_can_be_differentiated_where_no_kl_is_charged():
    def run(objective: BackpropObjective) -> Trainer:
        environment = PROBLEM.environment(DDIM(0.0).bind(table(), 4), seed=5)
        size = UpdateSize(samples=12)
        return Trainer(environment, objective, size, accelerator=Process())

    (line,) = run(DRaFT(last=3)).updates(1)
    assert line["gradient_norm"] > 0
    assert "path_kl" not in line
    with pytest.raises(ValueError, match="DRaFT charges a path KL, and an ODE's is infinite"):
        run(DRaFT(last=3, kl_weight=0.1))


TINY = {
    "prompts": ["a photo of a cat"],
    "steps": 3,
    "updates": 2,
    "size": UpdateSize(samples=2, batch=2),
    "lora_rank": 1,
    "evaluation_samples": 2,
    "progress": False,
    "device": "cpu",
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("objective", [ReFL(), DRaFT(last=3)], ids=["refl", "draft"])
def test_images_are_fine_tuned_by_a_classifiers_gradient(objective, tmp_path):
    reward = rewards.PromptAlignment()
    run = finetune(reward=reward, objective=objective, output=tmp_path / "run", **TINY)
    assert run.path_kl.mean > 0


def test_a_reward_without_a_gradient_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="JpegCompressibility does not declare differentiable"):
        finetune(reward=rewards.JpegCompressibility(), objective=DRaFT(), output=tmp_path, **TINY)
