"""Figures 3 to 5: who is compared with what, which runs are made, and what is told of them."""

import base64
import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.figures import five, four, three
from benchmarks.figures.__main__ import Options, main
from diffusion_envs.objectives import (
    ContinuousDxMIFromData,
    ContinuousDxMIReleasedFromData,
    DxMIFromData,
)

SMALL = dataclasses.replace(three.BUDGETS["cpu"], seeds=3, processes=1, rates=(1e-5, 1e-3, 1e-4))


def test_who_is_compared_is_as_published():
    rate = 3e-6
    made = {name: make(rate, SMALL) for name, make in three.METHODS.items()}
    whole, plain, released, charged = made.values()
    assert isinstance(whole, DxMIFromData)
    assert (whole.entropy_weight, whole.move_weight, whole.kl_weight) == (0.1, 0.01, 0.0)
    assert isinstance(plain, DxMIFromData)
    assert (plain.entropy_weight, plain.move_weight, plain.kl_weight) == (0.0, 0.0, 0.0)
    assert isinstance(released, ContinuousDxMIReleasedFromData)
    assert (released.move_clip, released.state_clip, released.gain_clip) == (0.1, 1.0, 1.0)
    assert isinstance(charged, ContinuousDxMIFromData)
    assert charged.kl_weight == SMALL.kl_weight > 0
    assert charged.move_clip == charged.state_clip == charged.gain_clip == float("inf")
    energies = {(m.energy_width, m.square_weight, m.time_cost) for m in made.values()}
    assert energies == {(SMALL.energy_width, 1.0, 1.0)}
    assert {m.learning_rate for m in made.values()} == {rate}
    assert {*three.OURS, *three.THEIRS} == set(three.METHODS)


def test_a_sheet_holds_the_pictures_in_rows():
    pictures = (
        (torch.tensor([20, 60, 100, 140, 180, 240]) / 255).view(6, 1, 1, 1).expand(6, 3, 4, 4)
    )
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(three.sheet(pictures, columns=3)))))
    assert sheet.shape == (2 * 6, 3 * 6, 3)
    for k, value in enumerate([20, 60, 100, 140, 180, 240]):
        row, column = divmod(k, 3)
        assert (sheet[6 * row + 1 : 6 * row + 5, 6 * column + 1 : 6 * column + 5] == value).all()
    assert (sheet[0] == 255).all()


# -- runs -----------------------------------------------------------------------------------------

SHEET = three.sheet(torch.zeros(40, 3, 32, 32))
BEGIN = {three.DISTANCE: 60.0, three.CONFIDENCE: 0.5}
BEST = {method: SMALL.rates[k % 3] for k, method in enumerate(three.METHODS)}
GAINS = dict(zip(three.METHODS, (10.0, 11.0, 20.0, 25.0), strict=True))  # of the distance


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Runs that were made, by a stand-in whose numbers are known."""
    made: list[tuple[Any, ...]] = []

    def trained(method: str, rate: float, seed: int, updates: int, budget: Any) -> dict[str, Any]:
        made.append((method, rate, seed, updates))
        gain = GAINS[method] if rate == BEST[method] else 1.0
        lines = [
            {
                "update": done,
                "network_calls": 264 * done * (2 if method == "continuous, path KL" else 1),
                three.DISTANCE: 60.0 - gain * share + 0.01 * seed,
                three.CONFIDENCE: 0.5 + 0.1 * share,
            }
            for done, share in ((updates // 2, 0.5), (updates, 1.0))
        ]
        return {"lines": lines, "std": [0.1] * 10, "sheet": SHEET}

    def pretrained(budget: Any) -> dict[str, Any]:
        made.append(("pretrained",))
        return {"lines": [BEGIN], "sheet": SHEET}

    monkeypatch.setattr(three, "trained", trained)
    monkeypatch.setattr(three, "pretrained", pretrained)
    return made


def test_rates_are_swept_alike_and_the_nearest_to_the_data_is_taken(calls, tmp_path):
    three.run(SMALL, tmp_path, 3)
    sweep = [c for c in calls if len(c) > 1 and c[2] == three.SWEEP_SEED]
    assert sweep == [
        (m, rate, three.SWEEP_SEED, SMALL.sweep_updates)
        for m in three.METHODS
        for rate in SMALL.rates
    ]
    runs = [c for c in calls if len(c) > 1 and c[2] != three.SWEEP_SEED]
    assert sorted(runs) == sorted(
        (m, BEST[m], seed, SMALL.updates) for m in three.METHODS for seed in range(3)
    )


def test_what_is_there_is_not_run_again(calls, tmp_path):
    three.run(SMALL, tmp_path, 3)
    before = len(calls)
    three.run(SMALL, tmp_path, 3)
    four.run(SMALL, tmp_path, 3)  # its pictures are of the same runs
    assert len(calls) == before
    three.run(SMALL, tmp_path, 4)
    assert len(calls) == before + len(three.METHODS)
    three.run(dataclasses.replace(SMALL, samples=8), tmp_path, 3)  # other settings, other runs
    assert len(calls) > before + 2 * len(three.METHODS)


def test_the_figure_tells_means_over_seeds_and_differences_seed_by_seed(calls, tmp_path):
    figure = three.run(SMALL, tmp_path, 3)
    ends = {
        r["method"]: r
        for r in figure.data
        if r["quantity"] == three.DISTANCE and r["update"] == SMALL.updates
    }
    for method, gain in GAINS.items():
        assert ends[method]["mean"] == pytest.approx(60 - gain + 0.01)
        assert ends[method]["rate"] == BEST[method]
    assert ends["DxMI"]["network_calls"] == 264 * SMALL.updates
    assert ends["continuous, path KL"]["network_calls"] == 528 * SMALL.updates
    for budgeted, expected in (("updates", -15.0), ("network calls", -2.5)):  # half of 25 less 10
        (difference,) = (
            r
            for r in figure.data
            if r["quantity"] == f"{three.DISTANCE}, difference at equal {budgeted}"
            and (r["method"], r.get("against")) == ("continuous, path KL", "DxMI")
        )
        assert difference["mean"] == pytest.approx(expected)
        assert difference["high"] == pytest.approx(expected)  # seeds cancel
    assert "is confirmed here" in figure.paragraph
    assert "nearer to the data" in figure.paragraph


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((20.0, 21.0, 10.0, 11.0), "is refuted here"),
        ((10.0, 20.0, 15.0, 45.0), "it depends on the pair"),
        ((10.0, 11.0, 20.0, 15.0), "it depends on the pair"),  # by calls the KL's is worse
    ],
)
def test_the_verdict_follows_from_the_intervals(gains, verdict, calls, tmp_path, monkeypatch):
    for method, gain in zip(three.METHODS, gains, strict=True):
        monkeypatch.setitem(GAINS, method, gain)
    assert verdict in three.run(SMALL, tmp_path, 3).paragraph


def test_the_sheets_are_those_of_all_methods(calls, tmp_path):
    figure = four.run(SMALL, tmp_path, 3)
    titles = [axes.get_title() for axes in figure.picture.axes]
    assert [t for t in titles if t] == ["pretrained", *three.METHODS]
    figure.picture.savefig(tmp_path / "four.png")


def test_figure_five_pairs_the_seeds(tmp_path, monkeypatch):
    numbers = {"DDPO": 1.0, "Score as Action": 1.25}

    def trained(method: str | None, seed: int, budget: Any) -> dict[str, Any]:
        gain = 0.0 if method is None else numbers[method] + 0.3 * seed
        measures = dict.fromkeys((five.REWARD, five.JUDGE, five.RIGHT), -2.0 + gain)
        return {**measures, "network_calls": 100, "sheet": SHEET}

    monkeypatch.setattr(five, "trained", trained)
    figure = five.run(five.BUDGETS["cpu"], tmp_path, 3)
    (difference,) = (
        r for r in figure.data if r["quantity"] == f"{five.REWARD}, Score as Action less DDPO"
    )
    assert difference["mean"] == pytest.approx(0.25)
    assert difference["low"] == pytest.approx(0.25)
    gains = {
        r["method"]: r["mean"] for r in figure.data if r["quantity"] == f"gain in {five.REWARD}"
    }
    assert gains == {"DDPO": pytest.approx(1.3), "Score as Action": pytest.approx(1.55)}


@pytest.mark.parametrize("module", [three, four, five])
def test_both_budgets_are_there(module):
    assert set(module.BUDGETS) == {"cpu", "gpu"}
    assert all(budget.seeds >= 3 for budget in module.BUDGETS.values())


@pytest.mark.slow
def test_figure_five_trains_both_methods_for_as_many_calls(tmp_path: Path):
    budget = dataclasses.replace(
        five.BUDGETS["cpu"], network_calls=60, samples=10, steps=2, judged=4
    )
    ours, ddpo = (five.trained(m, 0, budget) for m in ("Score as Action", "DDPO"))
    assert ours["network_calls"] >= 60
    assert ddpo["network_calls"] >= 60
    assert ours[five.REWARD] != ddpo[five.REWARD]
    assert 0 <= ours[five.RIGHT] <= 1
    assert five.trained(None, 0, budget)["network_calls"] == 0


def test_data_is_for_the_figures_that_read_it(tmp_path):
    with pytest.raises(ValueError, match="figure 5 reads no data"):
        main(Options(5, output=tmp_path, data=tmp_path))


def test_a_folder_without_cifar10_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        three.trained(
            "DxMI", 1e-4, 0, 1, dataclasses.replace(SMALL, data=tmp_path / "nothing_here")
        )


def test_a_rate_at_the_edge_of_the_sweep_is_said(calls, tmp_path):
    told = three.run(SMALL, tmp_path, 3).paragraph
    assert "the smallest was taken for DxMI" in told  # 1e-5; 1e-3 is the largest
    assert "the largest was taken for DxMI without entropy and moves" in told


def test_between_judgements_a_measure_is_linear_in_the_calls():
    lines = [{"network_calls": 100, "m": 4.0}, {"network_calls": 200, "m": 2.0}]
    each = [{"lines": lines}, {"lines": [{**line, "m": -line["m"]} for line in lines]}]
    assert three._ends(each, "m", 125) == {0: 3.5, 1: -3.5}
    assert three._ends(each, "m", 200) == three._ends(each, "m") == {0: 2.0, 1: -2.0}
