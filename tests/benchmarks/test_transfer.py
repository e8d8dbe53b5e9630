"""The benchmark of transfer, in small."""

import csv
import json

import pytest

from benchmarks import transfer
from benchmarks.compared_methods import Budget
from benchmarks.transfer import Options
from diffusion_envs.exact import GaussianProblem, table
from diffusion_envs.samplers import DDIM

EVERYTHING = transfer.solvers()
FEW = [("DDIM eta 1", 12), ("DDIM eta 1", 24), ("DDIM eta 0", 10), ("UniPC", 10)]


@pytest.fixture(autouse=True)
def _few_solvers(monkeypatch):
    """Shorter chains than the benchmark's, as every law is judged step by step."""
    short = {("DDIM eta 1", k): DDIM(1.0).bind(table(), k) for k in (12, 24)}
    found = {where: (EVERYTHING | short)[where] for where in FEW}
    monkeypatch.setattr(transfer, "solvers", lambda: found)


def test_the_benchmark_judges_on_what_it_says():
    both = {(f"DDIM eta {eta}", steps) for eta in (0, 1) for steps in (10, 25, 50, 100)}
    others = {(name, steps) for name in ("DPM-Solver++", "UniPC", "Heun") for steps in (10, 25)}
    assert set(EVERYTHING) == both | others


def small(tmp_path, **settings):
    given = {"problems": ("gaussian",), "methods": ("ddpo",), "few_step_methods": ()}
    given |= {"queries": 64, "samples": 32, "seeds": 2, "train_steps": 12}
    return Options(**given | settings, runs=tmp_path / "runs", output=tmp_path / "docs")


def test_the_pretrained_model_has_share_zero_and_the_optimum_one_on_every_solver():
    problem = GaussianProblem()
    references = transfer.known(problem, 12)
    for name, expected in (("pretrained", 0.0), ("optimum", 1.0)):
        for row in transfer.numbers(problem, references[name], references).values():
            assert row["share"] == pytest.approx(expected)
    on_its_chain = transfer.numbers(
        problem, references["optimum of the chain, a table, zero elsewhere"], references
    )
    assert on_its_chain["DDIM eta 1", 12]["share_of_j"] == pytest.approx(1.0)
    assert on_its_chain["DDIM eta 1", 24]["share_of_j"] < 0.8  # half of its times are unseen


def test_a_run_is_written_judged_on_all_solvers_and_not_repeated(tmp_path, monkeypatch):
    options = small(tmp_path)
    transfer.main(options)
    rows = json.loads((tmp_path / "docs/transfer.json").read_text())["rows"]
    own = [row for row in rows if row["trained"]]
    assert {(row["solver"], row["steps"]) for row in own} == set(transfer.solvers())
    assert all(row["seeds"] == 2 for row in own)
    (home,) = (r for r in own if (r["solver"], r["steps"]) == ("DDIM eta 1", 12))
    assert home["lost"] == [0.0, 0.0]
    assert home["gain_kept"] == [1.0, 0.0]
    with (tmp_path / "docs/transfer.csv").open() as file:
        assert len(list(csv.reader(file))) == len(rows) + 1
    assert (tmp_path / "docs/transfer.png").stat().st_size > 10_000
    monkeypatch.setattr(transfer, "train", None)  # everything is there
    transfer.main(options)
    again = json.loads((tmp_path / "docs/transfer.json").read_text())["rows"]
    assert again == rows


def test_stored_weights_give_the_trained_score():
    problem, budget = GaussianProblem(), Budget(queries=64, samples=32)
    entry = transfer.methods()["ddpo"]
    score, cost = transfer.train(problem, entry, budget, 12, 0.03, 0)
    assert cost["queries"] == 64
    weights = [p.detach().flatten().tolist() for p in score.correction.parameters()]
    again = transfer.trained(problem, weights)
    chain = next(iter(transfer.solvers().values()))
    assert problem.evaluate(again, chain) == problem.evaluate(score, chain)


def test_names_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="unknown methods"):
        transfer.main(small(tmp_path, methods=("nothing",)))
    with pytest.raises(SystemExit, match="unknown problems"):
        transfer.main(small(tmp_path, problems=("nothing",)))
