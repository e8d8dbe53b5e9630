"""The paper's figures: intervals, runs that are kept, the page, and both figures in small."""

import csv
import dataclasses
import json
import math
import shutil

import pytest
import torch
from matplotlib.figure import Figure as Picture

from benchmarks import exact_laws, transfer
from benchmarks.exact_laws import TableCorrection
from benchmarks.figures import __main__ as command
from benchmarks.figures import one, two
from benchmarks.figures.figure import Figure, Kept, assemble, interval, paired, write
from diffusion_envs import exact
from diffusion_envs.samplers import DDIM

# -- intervals ------------------------------------------------------------------------------------


def test_an_interval_is_students_of_the_seeds():
    told = interval([1.0, 2.0, 4.0])
    half_width = 4.302653 * math.sqrt(7 / 3) / math.sqrt(3)  # t of 2 degrees of freedom, 97.5 %
    assert told.mean == pytest.approx(7 / 3)
    assert (told.high - told.mean, told.mean - told.low) == pytest.approx((half_width,) * 2)
    assert told.seeds == 3
    assert not told.above_zero
    assert interval([1.0, 1.1, 1.2]).above_zero
    assert interval([-1.0, -1.1, -1.2]).below_zero
    assert interval([3.0]).low == -math.inf


def test_it_covers_as_often_as_it_says(generator):
    samples = torch.randn(2000, 3, dtype=torch.float64, generator=generator).tolist()
    missed = sum(told.above_zero or told.below_zero for told in map(interval, samples))
    # 100 expected with standard deviation 9.7; normal quantiles in place of Student's miss 380
    assert 50 < missed < 150


def test_pairs_are_compared_seed_by_seed():
    first = {0: 5.1, 1: -3.0, 2: 0.7}
    told = paired(first, {seed: value - 0.25 for seed, value in first.items()})
    assert (told.low, told.high) == pytest.approx((0.25, 0.25))
    with pytest.raises(ValueError, match=r"seeds must be the same, got \[0, 1, 2\] and \[0, 1\]"):
        paired(first, {0: 1.0, 1: 1.0})


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 2.0]])
def test_what_tells_no_interval_is_refused(values):
    with pytest.raises(ValueError, match="values must be finite"):
        interval(values)


# -- runs that are kept, and the page -------------------------------------------------------------


def test_a_run_is_made_once_for_each_setting_and_written_whole(tmp_path):
    kept, made = Kept(tmp_path), []

    def run():
        made.append(1)
        return {"value": 0.1 + 0.2}

    key = {"figure": 1, "part": "exact", "method": "DDPO", "seed": 3}
    assert kept.get(key, run) == kept.get(key, run) == {"value": 0.1 + 0.2}
    assert len(made) == 1
    kept.get(key | {"seed": 4}, run)
    kept.get(key | {"calls": 7}, run)
    assert len(made) == 3

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.get(key | {"seed": 5}, interrupted)
    assert not kept.path(key | {"seed": 5}).exists()
    assert len(list((tmp_path / "figures/runs").iterdir())) == 3


def drawn(title):
    return Figure(title, {"calls": 3}, [{"a": 1.5}, {"b": "x"}], Picture(), "What is seen.\n")


def test_the_page_has_every_figure_that_is_there_in_order(tmp_path):
    write(drawn("Second"), 2, tmp_path)
    write(drawn("First"), 1, tmp_path)
    page = assemble(tmp_path).read_text()
    assert page.index("## Figure 1. First") < page.index("## Figure 2. Second")
    for number in (1, 2):
        for suffix in ("png", "csv", "json"):
            assert f"(figures/{number}.{suffix})" in page
            assert (tmp_path / f"figures/{number}.{suffix}").exists()
    with (tmp_path / "figures/1.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"a": "1.5", "b": ""}, {"a": "", "b": "x"}]
    assert json.loads((tmp_path / "figures/1.json").read_text())["settings"] == {"calls": 3}


def test_the_page_of_figures_is_what_is_assembled_and_names_every_command(tmp_path):
    shutil.copytree(command.DOCS / "figures", tmp_path / "figures")
    page = assemble(tmp_path).read_text()
    assert (command.DOCS / "figures.md").read_text() == page
    for name in ("before_after", "report_screenshots", "theory_plots", "tutorials"):
        assert f"`python -m benchmarks.{name}" in page


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"number": 9}, r"figure must be one of 1, 2.*, got 9"),
        ({"number": 0}, r"figure must be one of 1, 2.*, got 0"),
        ({"budget": "tpu"}, r"budget must be one of cpu, gpu, got 'tpu'"),
        ({"seeds": 1}, r"seeds must be at least 2 .*, got 1"),
    ],
)
def test_what_does_not_exist_is_refused(changed, message, tmp_path):
    options = command.Options(**{"number": 1, "output": tmp_path} | changed)
    with pytest.raises(ValueError, match=message):
        command.main(options)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_figure_of_its_number(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(one, "run", lambda *what: asked.append(what) or drawn("First"))
    command.main(command.Options(1, output=tmp_path))
    assert asked == [(one.BUDGETS["cpu"], tmp_path, one.BUDGETS["cpu"].seeds)]
    assert "## Figure 1. First" in (tmp_path / "figures.md").read_text()


# -- figure 1 -------------------------------------------------------------------------------------


def test_a_table_is_read_in_three_ways_where_it_has_no_entry():
    sampler = DDIM(1.0).bind(exact.table(), 6)
    correction, known = TableCorrection(sampler, 1), sampler.alpha[:-1]
    with torch.no_grad():
        correction.shift.copy_(torch.arange(1.0, 7.0)[:, None])
    between = 0.3 * known[2] + 0.7 * known[3]
    alpha = torch.stack([known[4], between, known[-1] + 1e-3])
    states = torch.ones(3, 1)
    for reading, expected in (
        ("nearest", [5.0, 4.0, 6.0]),
        ("linear", [5.0, 0.3 * 3 + 0.7 * 4, 6.0]),
        ("zero", [5.0, 0.0, 0.0]),
    ):
        correction.elsewhere = reading
        torch.testing.assert_close(correction(states, alpha)[:, 0], torch.tensor(expected))
        rounded = correction(states[:1], alpha[:1].float())  # as a model says it in training
        assert rounded.item() == pytest.approx(5.0)


SMALL = dataclasses.replace(
    one.BUDGETS["gpu"],
    parts=("exact",),
    trained_at=12,
    used_at=(6, 12, 24),
    calls=20_000,
    samples=64,
    device="cpu",
)


@pytest.mark.usefixtures("as_users_run_it")
def test_figure_one_is_made_in_small_and_goes_on_from_what_is_there(tmp_path, monkeypatch):
    made = one.run(SMALL, tmp_path, 2)
    write(made, 1, tmp_path)

    def told(quantity, **where):
        (row,) = (
            row for row in made.data if row["quantity"] == quantity and where.items() <= row.items()
        )
        return row["mean"]

    for method in ("DDPO", "Score as Action"):
        smooth, zero = (
            told("share kept", policy=f"exact, {method}, {policy}", steps="24")
            for policy in ("smooth", "table read as zero")
        )
        assert smooth > 0.8
        assert zero < 0.7  # half of its times have no entry
        at_home = [
            told("gain", policy=f"exact, {method}, table read as {reading}", steps="12")
            for reading in one.READINGS
        ]
        assert at_home[0] == pytest.approx(at_home[1], abs=1e-6)
        assert at_home[0] == pytest.approx(at_home[2], abs=1e-6)
    problem = exact.GaussianProblem()
    chain = DDIM(1.0).bind(exact.table(), 12)
    gain = problem.optimum(chain).reward
    gain -= exact_laws.evaluate(
        problem, exact_laws.pretrained_score(problem, exact.table()), chain
    ).reward
    optimum = told("gain", policy="exact, optimum, table read as linear", steps="12")
    assert optimum == pytest.approx(gain)
    assert "table read as linear" in made.paragraph
    assert (tmp_path / "figures/1.png").stat().st_size > 10_000
    monkeypatch.setattr(transfer, "train", None)  # everything is there
    assert one.run(SMALL, tmp_path, 2).data == made.data


def gains_of(ddpo, ours):
    """Made up: gains on images at 50 and 100 steps, by seed."""
    budget = dataclasses.replace(one.BUDGETS["cpu"], used_at=(50, 100))
    gains = {}
    for name, pairs in (("images, DDPO", ddpo), ("images, Score as Action", ours)):
        gains[name] = {k: {"50": home, "100": away} for k, (home, away) in enumerate(pairs)}
    return one.figure(budget, gains, len(ddpo))


@pytest.mark.parametrize(
    ("ddpo", "verdict"),
    [
        ([(0.5, 0.1), (0.6, 0.2), (0.4, 0.0)], "is confirmed"),
        ([(0.5, 0.9), (0.6, 1.0), (0.4, 0.8)], "is refuted"),
        ([(0.5, 0.1), (0.6, 0.9), (0.4, 0.4)], "is neither confirmed nor refuted"),
    ],
)
def test_what_the_text_says_of_the_claim_follows_from_the_interval(ddpo, verdict):
    ours = [(0.7, 0.69), (0.8, 0.79), (0.75, 0.74)]
    made = gains_of(ddpo, ours)
    assert verdict in " ".join(made.paragraph.split())
    (row,) = (r for r in made.data if r["quantity"].startswith("gain lost, DDPO"))
    expected = interval([home - away - 0.01 for home, away in ddpo])
    assert (row["mean"], row["low"]) == pytest.approx((expected.mean, expected.low))


# -- figure 2 -------------------------------------------------------------------------------------

FEW = dataclasses.replace(
    two.BUDGETS["gpu"],
    parts=("gaussian", "mixture"),
    passes=(0, 1, 3),
    steps=8,
    paths=24,
    held_out=400,
    device="cpu",
)


@pytest.mark.parametrize("problem", ["gaussian", "mixture"])
def test_the_known_value_is_that_of_the_paths(problem):
    """E[r - V | X] = 0: at every node, and where V is above its mean."""
    fixed = two.PROBLEMS[problem](FEW, 3)
    error = fixed.held_out.rewards.double()[:, None] - fixed.truth
    high = fixed.truth > fixed.truth.mean(0)
    for part in (error, torch.where(high, error, torch.zeros_like(error))):
        limit = 5.5 * part.std(0) / 400**0.5
        assert (part.mean(0).abs() < limit).all()
    values = torch.cat([fixed.truth, fixed.held_out.rewards.double()[:, None]], dim=1)
    assert fixed.excess(values).abs().max() == 0
    assert fixed.excess(values + 0.3).tolist() == pytest.approx([0.09] * 8)
    assert float(fixed.weights.sum()) == pytest.approx(1.0)


def test_the_excess_is_unbiased_where_the_value_is_estimated(generator):
    fixed = two.gaussian(FEW, 3)
    truth = fixed.truth[:, :1]
    draws = truth[..., None] + 2.0 * torch.randn(
        400, 500, 3, dtype=torch.float64, generator=generator
    )
    estimated = dataclasses.replace(
        fixed, nodes=[0] * 500, truth=draws.mean(2), noise=draws.var(2) / 3
    )
    values = torch.cat([fixed.truth, fixed.truth[:, :1]], dim=1) + 0.5
    excess = estimated.excess(values)  # 500 independent estimates of 0.25
    error = float(excess.std()) / 500**0.5
    assert error < 0.01  # noise that is not taken off adds 1.33
    assert abs(float(excess.mean()) - 0.25) < 5 * error


@pytest.mark.usefixtures("as_users_run_it")
def test_figure_two_is_made_in_small_and_goes_on_from_what_is_there(tmp_path, monkeypatch):
    made = two.run(FEW, tmp_path, 2)
    write(made, 2, tmp_path)
    for problem in FEW.parts:
        curves = {
            design: [
                row["mean"]
                for row in made.data
                if row["quantity"] == "excess / variance"
                and (row["problem"], row["design"]) == (problem, design)
            ]
            for design in two.DESIGNS
        }
        assert [len(curve) for curve in curves.values()] == [3] * 6 + [1]
        assert curves["network alone"][-1] < curves["network alone"][0]
        assert curves["cos, sin"][0] < curves["network alone"][0]
    assert "cos, sin" in made.paragraph
    assert (tmp_path / "figures/2.png").stat().st_size > 10_000
    monkeypatch.setattr(two, "fitted", None)  # everything is there
    assert two.run(FEW, tmp_path, 2).data == made.data


def test_without_a_network_the_excess_is_that_of_the_denoised_reward():
    """With a quadratic reward r(x0_hat) - V is tr(Q Cov(x0 | x)) / 2 in continuous time.

    The chain's value differs from that by first order in the step.
    """

    def gap(steps: int) -> float:
        fixed = two.gaussian(dataclasses.replace(FEW, steps=steps, held_out=20), 1)
        (excess,) = two.fitted(FEW, fixed, two.DESIGNS["r(x0_hat) alone"])["excess"]
        problem, sampler = exact.GaussianProblem(), fixed.environment.steps
        times = sampler.noising_times[:-1]
        law = exact.gaussian.transition(
            problem.data, sampler.schedule, times, torch.zeros_like(times)
        )
        trace = torch.einsum("ij,kji->k", problem.quadratic.curvature, law.covariance)
        return excess / float(fixed.weights @ (0.5 * trace).square()) - 1

    coarse, fine = gap(100), gap(400)
    assert -0.25 < coarse < -0.1
    assert coarse / fine == pytest.approx(4, rel=0.15)
