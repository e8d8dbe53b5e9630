"""The comparison's own logic: sweeps, budgets, resumption, and what a row says."""

import json
import math

import pytest

from benchmarks.compared_methods import RATES, Budget, Entry, methods, run, swept, swept_score
from benchmarks.leaderboard import Options, main, summary
from diffusion_envs import objectives as o
from diffusion_envs.exact import GaussianProblem
from diffusion_envs.samplers import DDIM, Scheduler


@pytest.mark.parametrize("peak", [1e-5, 3e-4, 1e-2, 0.3])
def test_a_sweep_widens_until_its_best_lies_inside(peak: float) -> None:
    asked: list[float] = []

    def score(rate: float) -> float:
        asked.append(rate)
        return -abs(math.log(rate / peak))

    assert swept(score, (3e-3, 1e-2, 3e-2)) == pytest.approx(peak)
    assert len(asked) == len(set(asked))  # nothing is run twice
    assert min(asked) < peak < max(asked)


def test_a_sweep_ends_at_the_last_rate() -> None:
    assert swept(lambda rate: rate, (1e-2,)) == RATES[-1]
    assert swept(lambda rate: -rate, (1e-2,)) == RATES[0]


BUDGET = Budget(queries=96, samples=16, steps=5, every=2)


def test_a_run_keeps_to_its_budget_and_starts_from_the_pretrained_model() -> None:
    problem = GaussianProblem()
    found = run("draft", methods()["draft (all steps, KL)"], problem, BUDGET, 0.03, 0)
    assert found["updates"] == 3  # judged when sampled, and again with the derivative
    assert [point["queries"] for point in found["curve"]] == [64, 96]
    assert found["curve"][-1]["calls"] >= 3 * 16 * 5 * 3  # sampled; differentiated, both models
    assert found["start"]["path_kl"] == 0
    assert 0 < found["curve"][-1]["share"] < 1


def test_the_judge_does_not_depend_on_the_training_sampler() -> None:
    problem = GaussianProblem()
    objective = methods()["nft"].objective
    plain = run("nft", Entry(objective), problem, BUDGET, 1e-3, 0)
    other = Entry(objective, sampler=Scheduler("DPMSolverMultistepScheduler"), steps=4)
    black_box = run("nft", other, problem, BUDGET, 1e-3, 0)
    assert plain["start"] == black_box["start"]
    assert plain["optimum"] == black_box["optimum"]
    assert black_box["curve"][-1]["calls"] < plain["curve"][-1]["calls"]


def test_a_divergent_run_keeps_its_last_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry(lambda b: o.DRaFT(last=1000, kl_weight=b), sampler=DDIM(1.0))
    found = run("draft", entry, GaussianProblem(), BUDGET, 1e6, 0)
    assert found["updates"] < 6 or not math.isfinite(found["curve"][-1]["share"])


def test_a_row_is_mean_and_standard_error() -> None:
    def one(share: float) -> dict[str, object]:
        point = {"share": share, "kl_to_optimum": 1.0, "path_kl": 2.0}
        point |= {"queries": 3, "calls": 4, "seconds": 5}
        return {"curve": [point], "diverged": False}

    entry = Entry(lambda b: o.DDPO(), aims=False)
    row = summary("ddpo", entry, [one(0.88), one(0.92), one(0.96)], 0.01)
    assert row["share"] == pytest.approx((0.92, 0.04 / math.sqrt(3)))
    assert row["calls_to_90"] == 4
    assert row["seeds"] == 3
    assert summary("ddpo", entry, [one(0.8), one(0.92), one(0.7)], 0.01)["calls_to_90"] is None


def test_runs_are_not_repeated(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(
        methods=("draft-1",),
        queries=32,
        samples=16,
        steps=4,
        seeds=2,
        sweep_seeds=1,
        runs=tmp_path / "runs",
        output=tmp_path,
    )
    main(options)
    stored = tmp_path / "runs" / "gaussian.jsonl"
    before = stored.read_text()
    first = json.loads((tmp_path / "leaderboard_gaussian.json").read_text())["rows"]
    monkeypatch.setattr("benchmarks.compared_methods.run", None)
    main(options)
    assert stored.read_text() == before
    assert json.loads((tmp_path / "leaderboard_gaussian.json").read_text())["rows"] == first
    assert (tmp_path / "leaderboard_gaussian.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="unknown methods"):
        main(Options(methods=("nope",), output=tmp_path))


@pytest.mark.parametrize(
    ("shares", "score"),
    [
        ((0.2, 0.9), 0.9),
        ((-0.9, 0.9), 0.9),
        ((-4.0, 0.9), -4.0),
        ((0.1, math.nan), -10.0),
        ((0.2, -99.0), -10.0),
        ((), -10.0),
    ],
)
def test_a_sweep_does_not_trust_a_run_that_fell_far(
    shares: tuple[float, ...], score: float
) -> None:
    curve = [{"share": share} for share in shares]
    assert swept_score({"curve": curve, "diverged": False}) == score
    assert swept_score({"curve": curve, "diverged": True}) in (-10, -4)
