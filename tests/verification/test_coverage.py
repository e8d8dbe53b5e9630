"""The table of what claims' problems have is seen from the problems, and is up to date."""

from dataclasses import replace

import pytest
import torch

import ctrl
from verification import coverage
from verification.claim import PROPERTIES, Check
from verification.claims import CLAIMS

PAGE = coverage.ROOT / "docs" / "verification_coverage.md"
ROWS = coverage.read(PAGE.read_text(encoding="utf-8"))
COMMAND = "python -m verification.coverage docs/verification_coverage.md"


def test_the_page_names_the_claims_and_theorems_there_are():
    assert coverage.page(ROWS) == PAGE.read_text(encoding="utf-8"), f"write it anew: {COMMAND}"


def test_no_result_lacks_a_property_that_applies_to_it():
    rows = {name: (*ROWS[name], *CLAIMS[name].covers) for name in CLAIMS}
    assert not coverage.holes(rows)
    rows["performance-difference-in-several-dimensions"] = ()
    assert "Lemma 4.2, performance difference: correlated noise" in coverage.holes(rows)


@pytest.mark.parametrize(
    "name",
    [
        "matrix-diffusion",
        "policy-gradient-of-transitions",
        "continuous-advantages",
        "martingales-in-several-dimensions",
        "terminal-kl-in-several-dimensions",
    ],
)
def test_the_page_has_what_is_seen_while_a_claim_runs(name, as_users_run_it):
    assert ROWS[name] == coverage.measured(CLAIMS[name]), f"{COMMAND} {name}"


def sde(mixes=False, moves=False):
    return ctrl.ControlledSDE(
        lambda t, x, a: a - x * (t if moves else 1),
        lambda t, x: (torch.eye(2) + mixes * 0.3).expand(len(x), 2, 2).to(x),
        "general",
        2,
    )


BARE = ctrl.ControlProblem(sde(), 1.0, lambda t, x, a: x[:, 0])
CASES = {
    "reward on the action": replace(BARE, running_reward=lambda t, x, a: a[:, 0]),
    "discount": replace(BARE, discount=lambda t, x: 0 * x[:, 0] + 0.1),
    "temperature": replace(BARE, temperature=0.1),
    "correlated noise": replace(BARE, sde=sde(mixes=True)),
    "time-dependent": replace(BARE, sde=sde(moves=True)),
    "time-dependent, the reward": replace(BARE, running_reward=lambda t, x, a: t * x[:, 0]),
    "nothing": BARE,
}


@pytest.mark.parametrize("name", CASES)
def test_each_property_is_seen_where_it_is_and_nowhere_else(name, generator, as_users_run_it):
    def body(setting):
        policy = ctrl.MultivariateGaussianPolicy(
            lambda t, x: x, lambda t: torch.eye(2, dtype=torch.float64)
        )
        start = torch.ones(3, 2, dtype=torch.float64)
        grid = ctrl.uniform_grid(1.0, 2)
        paths = ctrl.simulate(CASES[name], policy, start, grid, generator=generator)
        ctrl.returns_to_go(CASES[name], paths, policy)
        yield Check("it runs", "pathwise", 0.0)

    seen = set(coverage.measured(replace(CLAIMS["path-kl"], body=body))) - {"several dimensions"}
    assert seen == {name.split(",")[0]} - {"nothing"}


def test_an_uneven_grid_is_seen():
    def body(setting):
        nodes = torch.tensor([0.0, 0.1, 0.5])
        ctrl.time_integral(torch.ones(1, 2), ctrl.TimeGrid(nodes))
        yield Check("it runs", "pathwise", 0.0)

    assert coverage.measured(replace(CLAIMS["path-kl"], body=body)) == ("uneven grid",)


def test_a_property_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"covers \['generality'\], but the properties are"):
        replace(CLAIMS["path-kl"], covers=("generality", PROPERTIES[0]))
