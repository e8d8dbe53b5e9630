"""The leaderboard on images: what a run is worth, which rate is taken, and what is not repeated."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import image_leaderboard as board
from diffusion_envs.frontier import Frontier


def frontier() -> Frontier:
    """Two prompts with normal rewards of standard deviation 2, at their quantiles."""
    places = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    scores = 2 * torch.special.ndtri(places)
    return Frontier(
        torch.cat([scores, scores - 1]),
        ["cat"] * 400 + ["ship"] * 400,
        generator=torch.Generator().manual_seed(0),
    )


def outcome(**numbers: float) -> dict[str, float]:
    usual = {"reward": -0.5, "path_kl": 0.0, "chain_kl": 0.0, "held_out": 0.2, "diversity": 0.5}
    return usual | numbers


def test_a_run_is_judged_by_the_gap_to_the_frontiers_optimum():
    """Normal rewards: J*(b) - J(0) = std^2 / (2 b), and the gain at K nats is std sqrt(2 K)."""
    one = {
        "start": outcome(),
        "end": outcome(reward=0.7, path_kl=0.4, chain_kl=0.9, held_out=0.5, diversity=0.4),
    }
    worth = board.judgement(one, 2.0, frontier())
    gap = 4 / (2 * 2.0)
    assert worth["share"] == pytest.approx((1.2 - 2 * 0.4) / gap, rel=0.02)
    assert worth["chain_share"] == pytest.approx((1.2 - 2 * 0.9) / gap, rel=0.02)
    assert worth["at_equal_kl"] == pytest.approx(1.2 / (2 * math.sqrt(1.8)), rel=0.03)
    assert worth["held_out"] == pytest.approx(0.3)
    assert worth["diversity"] == pytest.approx(0.8)


class Counted(board.Setting):
    """Runs that are not made: the best rate is the larger, and the largest diverges."""

    made: list[tuple[float, int, int]]

    def run(
        self, contestant: board.Contestant, kl_weight: float, rate: float, seed: int, calls: int
    ) -> dict[str, Any]:
        self.made.append((rate, seed, calls))
        end = outcome(reward=-0.5 + 100 * rate + 0.01 * seed, path_kl=0.1, chain_kl=0.2)
        numbers = {"updates": 3, "calls": calls, "queries": 5, "seconds": 1.0}
        return numbers | {"diverged": rate > 0.02, "start": outcome(), "end": end}


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    everyone = board.contestants()
    few = {"ddpo": everyone["ddpo"], "grpo": everyone["grpo"]}
    few["ddpo"] = board.Contestant(few["ddpo"].entry, (1e-3, 1e-2, 3e-2))
    monkeypatch.setattr(board, "contestants", lambda: few)
    options = board.Options(runs=tmp_path, output=tmp_path, kl_weights=(0.5, 2.0), best=1)
    made = Counted(options)
    made.made = []
    made.frontier = frontier()
    return made


def test_the_best_rate_that_does_not_diverge_is_reported_on_seeds_of_its_own(setting: Counted):
    rows = board.table(setting.options, board.Runs(setting))
    assert [(row["method"], row["kl_weight"], row["rate"]) for row in rows] == [
        ("ddpo", 2.0, 1e-2),
        ("ddpo", 0.5, 1e-2),
        ("grpo", 0.5, 3e-3),
    ]
    swept = [(rate, board.SEED, setting.options.sweep_calls) for rate in (1e-3, 1e-2, 3e-2)]
    reported = [(1e-2, seed, setting.options.calls) for seed in range(3)]
    assert setting.made[:6] == [*swept, *reported]
    gains = [1.0, 1.01, 1.02]
    assert rows[1]["gain"] == pytest.approx((sum(gains) / 3, 0.01 / math.sqrt(3)))
    text = board.markdown(rows, setting.options, setting.frontier)
    assert "| ddpo |" in text


def test_nothing_is_run_twice_and_others_rows_are_left_out(setting: Counted):
    board.table(setting.options, board.Runs(setting))
    asked = len(setting.made)
    board.table(setting.options, board.Runs(setting))
    assert len(setting.made) == asked
    lines = (setting.options.runs / "runs.jsonl").read_text().splitlines()
    assert len(lines) == asked
    assert {json.loads(line)["method"] for line in lines} == {"ddpo", "grpo"}
    setting.options.runs.joinpath("runs.jsonl").unlink()
    only = board.Options(
        methods=("grpo",), runs=setting.options.runs, output=setting.options.output
    )
    fresh = Counted(only)
    fresh.made, fresh.frontier = [], frontier()
    rows = board.table(only, board.Runs(fresh))
    assert {row["method"] for row in rows} == {"grpo"}


def test_every_contestant_is_an_objective_with_its_rates():
    for name, one in board.contestants().items():
        objective = one.entry.objective(0.3)
        assert objective.learning_rate > 0, name
        assert one.rates
