"""A run beside its frontier: numbers by hand, a planted fault, resuming, and what is not known."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ctrl.noise import stream
from diffusion_envs import objectives, rewards, samplers
from diffusion_envs.environment import Environment
from diffusion_envs.exact import GaussianProblem, table
from diffusion_envs.frontier import Frontier
from diffusion_envs.models.exact import legendre
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.objectives import ScoreAsAction
from diffusion_envs.runs.evaluation import Evaluation, evaluate
from diffusion_envs.runs.finetune import finetune
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.report import write_report
from diffusion_envs.runs.run_frontier import RunFrontier, compare, frontier_of, mean_over_groups
from diffusion_envs.runs.settings import describe, differences
from diffusion_envs.samplers import DDIM, GaussianSteps
from diffusion_envs.sd15 import StableDiffusion
from diffusion_envs.training.update_size import UpdateSize

PROMPTS = ("one", "two", "three")
STEPS = 6


def evaluation(
    values: Tensor, nats: Tensor | None = None, prompts: Sequence[str] = PROMPTS
) -> Evaluation:
    n = len(values)
    paid = torch.zeros(n) if nats is None else nats
    return Evaluation(
        rewards=values,
        judged={},
        path_kl=0.8 * paid,
        chain_kl=paid,
        images=torch.zeros(n, 3, 2, 2),
        prompts=[prompts[i % len(prompts)] for i in range(n)],
    )


def compared(
    before: Evaluation,
    after: Evaluation,
    further: Tensor | None = None,
    weight: float | None = 1.0,
    prompts: Sequence[str] = PROMPTS,
) -> RunFrontier:
    more = torch.zeros(0) if further is None else further
    generator = torch.Generator().manual_seed(3)
    return frontier_of(before, after, more, prompts, weight, generator=generator)


# -- on an exact problem, at the optimum -----------------------------------------------------------


def at_the_chains_optimum(problem: GaussianProblem) -> Environment:
    """The exact model with the correction that is best where the chain's own KL is charged."""
    sampler, charged = (DDIM(1.0).bind(table(), STEPS) for _ in range(2))
    vars(charged)["path_kl_gain"] = (charged.gain / charged.std).square()
    gain, shift = problem.best_correction(charged)
    environment = problem.environment(sampler, seed=5)
    basis = legendre(sampler.alpha[:-1], STEPS).double()
    terms = torch.linalg.solve(basis, torch.cat([gain.flatten(1), shift], dim=1))
    correction: Any = environment.model.parameters
    with torch.no_grad():
        correction[0].copy_(terms[:, :4].view(STEPS, 2, 2))
        correction[1].copy_(terms[:, 4:])
    return environment


def beside(environment: Environment, weight: float) -> RunFrontier:
    before = evaluate(environment, 1000, batch=1000, pretrained=True)
    after = evaluate(environment, 1000, batch=1000)
    return compared(before, after, weight=weight, prompts=["-"])


def test_the_optimum_closes_the_gap_and_half_its_kl_is_a_fault(monkeypatch):
    problem = GaussianProblem()
    environment = at_the_chains_optimum(problem)
    seen = beside(environment, problem.kl_weight)
    assert seen.fault is None
    assert seen.excess is not None
    assert seen.excess.known
    for share in (seen.share_of_gap["chain_kl"], seen.share_of_gain["chain_kl"]):
        assert 0.85 < share.mean < 1.1  # the start says little about the end: nearly all is had
        assert share.low < 1 < share.high
    whole = GaussianSteps.chain_kl
    monkeypatch.setattr(GaussianSteps, "chain_kl", lambda *a: 0.5 * whole(*a))
    seen = beside(environment, problem.kl_weight)
    assert seen.fault is not None
    assert "its KL is counted too low, its rewards are not of the same prompts" in seen.fault
    assert seen.as_dict()["fault"] == seen.fault


# -- numbers by hand -------------------------------------------------------------------------------


def test_shares_are_those_of_their_definitions(generator):
    noise = torch.randn(90, generator=generator)
    before = evaluation(noise + torch.tensor([0.0, 1.0, 2.0]).repeat(30))
    nats = 0.3 + 0.1 * torch.rand(90, generator=generator)
    after = evaluation(before.rewards + 0.4 + 0.1 * torch.randn(90, generator=generator), nats)
    further = torch.randn(300, generator=generator) + torch.tensor([0.0, 1.0, 2.0]).repeat(100)
    seen = compared(before, after, further, weight=1.5)

    values = torch.cat([before.rewards, further])
    again = torch.Generator().manual_seed(3)
    frontier = Frontier(values, [i % 3 for i in range(390)], generator=again)
    best, start = frontier.at_weight(1.5), frontier.pretrained
    assert seen.optimum == best
    assert (seen.samples, seen.prompts, seen.pretrained) == (390, 3, start)
    for name, paid in (("chain_kl", nats), ("path_kl", 0.8 * nats)):
        gained = (after.rewards - before.rewards - 1.5 * paid).double().numpy().reshape(30, 3)
        gap = best.objective.mean - start.mean
        share = gained.mean() / gap
        of_run = math.sqrt((gained.var(0, ddof=1) / 30).sum()) / 3
        of_gap = math.hypot(best.objective.standard_error, start.standard_error)
        error = math.hypot(of_run, share * of_gap) / gap
        assert seen.share_of_gap[name].mean == pytest.approx(share, rel=1e-6)
        assert seen.share_of_gap[name].low == pytest.approx(share - 1.96 * error, abs=1e-4)
        assert seen.share_of_gap[name].high == pytest.approx(share + 1.96 * error, abs=1e-4)
        there = frontier.at_kl(float(paid.double().mean()))
        most = there.reward.mean - start.mean
        gain = float((after.rewards - before.rewards).double().mean())
        assert seen.share_of_gain[name].mean == pytest.approx(gain / most, rel=1e-5)
        assert seen.at_kl[name].reward.mean == pytest.approx(there.reward.mean, rel=1e-5)
    words = " ".join(seen.sentences)
    assert "if charged the KL of the sampled chain (0.3" in words
    assert "at the SDE's path KL" in words
    assert json.loads(json.dumps(seen.as_dict(), allow_nan=False))["samples"] == 390
    json.dumps(seen.drawn(), allow_nan=False)


def test_prompts_weigh_equally_whatever_their_samples():
    values = torch.tensor([1.0, 3.0, 10.0, 2.0])
    seen = mean_over_groups(values, [0, 0, 1, 0])
    assert seen.mean == pytest.approx(6.0)
    single = np.var([1, 3, 10, 2], ddof=1)  # the variance of one sample is that of all
    assert seen.standard_error == pytest.approx(math.sqrt(1 / 3 + single) / 2)
    assert seen.n == 4


# -- samples that are kept -------------------------------------------------------------------------


@pytest.fixture
def environment(small_trainer: Callable[..., Any]) -> Environment:
    return small_trainer(ScoreAsAction()).environment


def against(environment: Environment, path: Path, samples: int) -> RunFrontier:
    before = evaluate(environment, 9, pretrained=True)
    return compare(environment, before, before, path, samples=samples, kl_weight=0.5, batch=4)


def test_what_is_kept_is_not_sampled_again_and_fresh_and_resumed_agree(environment, tmp_path):
    spent = environment.model.calls, environment.reward_queries
    fresh, cut = tmp_path / "fresh.safetensors", tmp_path / "cut.safetensors"
    seen = against(environment, fresh, 90)
    against(environment, cut, 30)
    first = load_file(cut)["rewards"]
    asked, sample = [], environment.sample

    def counted(policy: Any, samples: range, *others: Any, **named: Any) -> Any:
        asked.extend(samples if named["stream"] == "frontier" else ())
        return sample(policy, samples, *others, **named)

    environment.sample = counted
    again = against(environment, cut, 90)
    assert asked == list(range(30, 90))
    assert torch.equal(load_file(cut)["rewards"][:30], first)
    torch.testing.assert_close(load_file(cut)["rewards"], load_file(fresh)["rewards"])
    assert again.optimum is not None
    assert seen.optimum is not None
    assert again.optimum.objective.mean == pytest.approx(seen.optimum.objective.mean, rel=1e-5)
    assert again.samples == seen.samples == 99
    assert sorted(each.name for each in tmp_path.iterdir()) == [cut.name, fresh.name]
    assert (environment.model.calls, environment.reward_queries) == spent
    fewer = against(environment, cut, 30)  # and a run that asks for less has the first of them
    assert fewer.samples == 39


@pytest.mark.parametrize("kept", [0, 100, -4])
def test_a_damaged_file_is_made_anew(kept, environment, tmp_path):
    path = tmp_path / "frontier.safetensors"
    seen = against(environment, path, 12)
    path.write_bytes(path.read_bytes()[:kept])
    assert against(environment, path, 12) == seen


def test_rewards_of_another_reward_are_made_anew(environment, tmp_path):
    path = tmp_path / "frontier.safetensors"
    against(environment, path, 12)
    old, reward = load_file(path)["rewards"], environment.reward
    environment.reward = lambda images, prompts: 1 + reward(images, prompts)
    against(environment, path, 12)
    torch.testing.assert_close(load_file(path)["rewards"], 1 + old)


def test_no_failure_loses_a_run(environment, tmp_path):
    before = evaluate(environment, 9, pretrained=True)

    def broken(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise RuntimeError("the server is gone")

    environment.reward = broken
    path = tmp_path / "frontier.safetensors"
    seen = compare(environment, before, before, path, samples=4, kl_weight=1.0, batch=4)
    assert "cannot be computed" in seen.sentences[0]
    assert "the server is gone" in seen.sentences[0]
    assert seen.fault is None


# -- what is not known -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "after", "words"),
    [
        (4, {}, "prompt 'two' has one sample of the pretrained model only; at least 20 samples"),
        (30, {}, "of the pretrained model's 10 samples of a prompt"),
        (90, {"nats": math.inf}, "sampled chain is infinite (a step has no noise)"),
        (90, {"nats": math.nan}, "sampled chain is not known (a black box shows no steps)"),
        (90, {"nats": 60.0}, "more of them than can be drawn"),
        (90, {"nats": 60.0}, "at the run's 60 nats (the KL of its sampled chain) is not known"),
        (90, {"nats": 5.0}, "frontier_samples of"),
        (90, {"weight": None}, "no kl_weight in reward per nat"),
        (90, {"scale": 0.0}, "rewards are all equal in every group"),
    ],
)
def test_it_is_said_why_something_is_not_known(n, after, words, generator):
    nats = torch.full((n,), after.get("nats", 0.1))
    values = after.get("scale", 1.0) * torch.randn(n, generator=generator)
    before = evaluation(values)
    seen = compared(before, evaluation(values + 0.05, nats), weight=after.get("weight", 1.0))
    assert words in " ".join(seen.sentences)
    assert seen.fault is None
    json.dumps([seen.as_dict(), seen.drawn()], allow_nan=False)


def test_a_run_without_updates_has_gained_nothing(generator):
    same = evaluation(torch.randn(900, generator=generator))
    seen = compared(same, same)
    assert seen.fault is None
    assert seen.share_of_gain == {}
    assert seen.share_of_gap["chain_kl"].mean == 0


# -- whole runs ------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "reward": rewards.Colour("red"),
    "prompts": ["a photo of a cat"],
    "steps": 2,
    "size": UpdateSize(samples=4, batch=32, value_epochs=1),
    "objective": ScoreAsAction(kl_weight=0.3),
}
MODEL = StableDiffusion("tiny", device="cpu", guidance=1.0, lora_rank=1)


def options(samples: int) -> RunOptions:
    return RunOptions(
        evaluation_samples=6, frontier_samples=samples, picture_every=1, progress=False
    )


@pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely
def test_a_run_reports_it_and_a_finished_one_is_resumed_with_more_samples(tmp_path):
    folder = tmp_path / "run"
    first = finetune(MODEL, output=folder, updates=2, options=options(0), **SMALL)
    assert first.frontier is not None
    assert first.frontier.samples == 6
    assert "are effective, where 20 are needed" in " ".join(first.frontier.sentences)
    run = finetune(MODEL, output=folder, updates=2, options=options(40), resume=True, **SMALL)
    kept = load_file(folder / "evaluation" / "frontier.safetensors")["rewards"]
    held = load_file(folder / "evaluation" / "before.safetensors")["rewards"]
    generator = stream(0, "frontier", "resamples")
    frontier = Frontier(torch.cat([held, kept]), [0] * 46, generator=generator)
    told = json.loads((folder / "summary.json").read_text())["frontier"]
    assert told["samples"] == 46
    assert told["kl_weight"] == 0.3
    assert told["optimum"]["objective"] == frontier.at_weight(0.3).objective.as_dict()
    assert told["pretrained"] == frontier.pretrained.as_dict()
    measured = json.loads((folder / "summary.json").read_text())["over_optimisation_metrics"]
    assert told["kl"]["chain_kl"]["mean"] == pytest.approx(measured["chain_kl"]["mean"])
    lines = (folder / "over_optimisation.jsonl").read_text().splitlines()
    assert all("chain_kl" in json.loads(line) for line in lines)
    drawn = json.loads((folder / "frontier.json").read_text())
    assert drawn["curve"][0]["kl"]["mean"] == 0
    assert run.frontier is not None
    assert list(run.frontier.sentences) == told["sentences"]
    page = run.report.read_text()
    assert "Reward against KL" in page
    assert "From 46 samples of the pretrained model, of 1 prompt;" in page
    told["fault"] = "Fault: the run's reward is <above> the best"
    summary = json.loads((folder / "summary.json").read_text()) | {"frontier": told}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert write_report(folder).read_text().count("reward is &lt;above&gt; the best") == 2
    del summary["frontier"]  # as runs of before have it
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "Reward against KL" not in write_report(folder).read_text()


def test_frontier_samples_may_be_other_ones_on_resuming():
    one, other = (describe({"options": options(n)}) for n in (0, 500))
    assert differences(one, other) == []
    del one["options"]["frontier_samples"]  # as runs of before have it
    assert differences(one, other) == []
    with pytest.raises(ValueError, match="frontier_samples must be an integer of at least 0"):
        options(-1)


def test_samples_of_the_pretrained_model_need_its_sampler(environment, tmp_path):
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    learned = samplers.QuadraticVariances(learned_std=True)
    environment.sampler = learned.bind(DDPMTable((1 - betas).cumprod(0)), 10)
    seen = compare(
        environment,
        evaluation(torch.zeros(9)),
        evaluation(torch.zeros(9)),
        tmp_path / "frontier.safetensors",
        samples=4,
        kl_weight=None,
        batch=4,
    )
    assert "leave out frontier_samples" in seen.sentences[0]


# -- what goes into it -----------------------------------------------------------------------------


def test_the_chains_kl_is_that_of_its_transitions(environment):
    with torch.no_grad():
        for parameter in environment.model.parameters:
            parameter.add_(0.02)
    seen = evaluate(environment, 5)
    condition = torch.arange(5) % 3
    rollout = environment.sample(
        objectives.ScoreAsAction().policy, range(5), condition, stream="held-out"
    ).rollout
    sampler, reference = environment.steps, rollout.reference_scores
    assert reference is not None
    total = torch.zeros(5)
    for k in range(sampler.steps):
        step = torch.full((5,), k)
        means = [
            sampler.mean(step, rollout.states[:, k], score[:, k])
            for score in (rollout.means, reference)
        ]
        gap = (means[0] - means[1]).flatten(1).square().sum(1)
        total += 0.5 * gap / sampler.std[k].float() ** 2
    torch.testing.assert_close(seen.chain_kl, total, rtol=1e-3, atol=1e-6)
    assert bool((seen.chain_kl > 0).all())
    environment.sampler = DDIM(0.0).bind(sampler.schedule, 4)
    assert bool(evaluate(environment, 5).chain_kl.isinf().all())


@pytest.mark.parametrize(
    ("objective", "weight"),
    [
        (objectives.ScoreAsAction(kl_weight=0.3), 0.3),
        (objectives.ScoreAsAction(kl_weight=0.0), None),
        (objectives.AdjointMatching(kl_weight=0.2), 0.2),
        (objectives.ReinforceAdjointMatching(kl_weight=0.2), 0.2),
        (objectives.DistributionalOptimisation(kl_weight=2.0), 2.0),
        (objectives.TiltedRegression(kl_weight=0.2), 0.2),
        (objectives.DPOK(), None),
        (objectives.DPOK(kl_weight=3.0, exact_kl=True), 0.3),
        (objectives.DPOK(kl_weight=3.0, path_kl=True), 0.3),
        (objectives.GRPO(), None),
        (objectives.DDPO(), None),
        (objectives.DRaFT(kl_weight=0.1), 0.1),
        (objectives.AlignProp(), None),
        (objectives.ContinuousDxMI(kl_weight=0.1), 0.1),
        (objectives.ContinuousDxMIFromData(), None),
    ],
)
def test_a_weight_that_is_not_in_reward_per_nat_is_none(objective, weight):
    assert objective.reward_per_nat == (None if weight is None else pytest.approx(weight))
