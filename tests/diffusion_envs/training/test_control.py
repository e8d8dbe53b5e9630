"""kl_weight moves towards a target path KL, and finds the multiplier of the constrained problem."""

import dataclasses
import math
from contextlib import nullcontext
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_envs.exact.problems import GaussianProblem, table
from diffusion_envs.objectives import (
    DDPO,
    DiffusionNFT,
    DistributionalOptimisation,
    DRaFT,
    Objective,
    ReinforceAdjointMatching,
    ScoreAsAction,
)
from diffusion_envs.samplers import DDIM
from diffusion_envs.training import kl_controller as control
from diffusion_envs.training.kl_controller import TargetKL
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from verification.problems.training_loop import Process

PROBLEM, SAMPLER = GaussianProblem(), DDIM(1.0).bind(table(), 4)


def trainer(objective: Objective, target: TargetKL | None, eta: float = 1.0, **size: Any):
    environment = PROBLEM.environment(DDIM(eta).bind(table(), 4), 5)
    return Trainer(
        environment,
        objective,
        UpdateSize(**{"samples": 12, "batch": 4096, "value_epochs": 1} | size),
        accelerator=Process(),
        target_kl=target,
    )


@pytest.mark.parametrize(
    ("measured", "factor"),
    [
        (2.5, 1.0),  # at the target nothing moves
        (0.0, math.exp(-0.1)),  # as fast as it may
        (1.25, math.exp(-0.05)),
        (3.75, math.exp(0.05)),
        (5.0, math.exp(0.1)),
        (1e9, math.exp(0.1)),  # no faster, however far
    ],
)
def test_the_weight_moves_as_the_formula_says(measured, factor):
    moved = TargetKL(2.5, rate=0.1).next_weight(0.3, measured)
    assert moved == pytest.approx(0.3 * factor, rel=1e-14)


@given(
    weight=st.floats(1e-5, 1e5),
    low=st.floats(0, 100),
    more=st.floats(0, 100),
    nats=st.floats(1e-3, 50),
    rate=st.floats(1e-4, 1),
)
def test_more_divergence_never_lowers_the_weight_and_steps_are_bounded(
    weight, low, more, nats, rate
):
    target = TargetKL(nats, rate=rate)
    one, other = target.next_weight(weight, low), target.next_weight(weight, low + more)
    assert one <= other
    for moved in (one, other):
        assert abs(math.log(moved / weight)) <= rate * (1 + 1e-9) + 1e-12
    assert (low > nats) <= (one >= weight)


def test_the_weight_stays_between_its_bounds():
    target = TargetKL(1.0, rate=1.0, least=0.2, most=0.5)
    assert target.next_weight(0.2, 0.0) == 0.2
    assert target.next_weight(0.5, 9.0) == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nats": 0.0}, "nats must be a positive finite number, got 0.0"),
        ({"nats": math.inf}, "nats"),
        ({"rate": -0.1}, "rate"),
        ({"least": 0.0}, "least"),
        ({"least": 2.0, "most": 1.0}, "least must be below most"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        TargetKL(**{"nats": 1.0} | change)


@pytest.mark.parametrize("measured", [-1.0, math.nan, math.inf])
def test_what_is_no_divergence_is_refused(measured):
    with pytest.raises(ValueError, match="measured must be finite and at least 0 nats"):
        TargetKL(1.0).next_weight(1.0, measured)


def test_objectives_and_samplers_that_cannot_be_steered_are_refused():
    with pytest.raises(ValueError, match="and DDPO has none: leave out target_kl"):
        trainer(DDPO(), TargetKL(1.0))
    with pytest.raises(
        ValueError, match="ScoreAsAction, which must be above 0 to begin with, got 0"
    ):
        trainer(ScoreAsAction(kl_weight=0.0), TargetKL(1.0))
    with pytest.raises(ValueError, match="DistributionalOptimisation are not of the policy that"):
        trainer(DistributionalOptimisation(), TargetKL(1.0))
    for eta in (0.0, 1.0):
        refused = pytest.raises(ValueError, match="target_kl needs a path KL to steer Reinf")
        with refused if eta == 0 else nullcontext():
            trainer(ReinforceAdjointMatching(), TargetKL(1.0), eta=eta)


def test_objectives_say_so_if_what_samples_never_follows_what_is_trained():
    """Sampling policies that keep all of themselves, for ever, are those of no own samples."""
    for objective in (DiffusionNFT(), ReinforceAdjointMatching(), DistributionalOptimisation()):
        kept = [objective.old_decay(update) for update in (0, 10, 10**6)]
        assert objective.on_policy == (min(kept) < 1)


def test_the_path_kl_that_is_steered_by_is_paid_for():
    """Its network calls count, also with objectives that would only log it."""
    for target, counted in ((TargetKL(1.0), 2), (None, 1)):
        run = trainer(DRaFT(last=1, kl_weight=0.1), target)
        (line,) = run.updates(1)
        assert line["network_calls"] == counted * 12 * 4 + 2 * 12
        assert ("path_kl" in line) == (target is not None)
        assert run.environment.monitoring_calls == 0


def test_the_trainer_uses_the_weight_of_the_update_before(monkeypatch):
    """Each update trains with the logged weight; the next is the formula's, of its own path KL."""
    run = trainer(ScoreAsAction(kl_weight=0.3, learning_rate=0.05), TargetKL(0.2, rate=0.1))
    seen = []
    improve = run._improve_adapter

    def spied(*arguments: Any) -> Any:
        seen.append(control.kl_weight(run.objective))
        return improve(*arguments)

    monkeypatch.setattr(run, "_improve_adapter", spied)
    log = list(run.updates(6))
    weights = [line["kl_weight"] for line in log]
    assert seen == weights
    assert weights[0] == 0.3
    for line, following in zip(log, [*weights[1:], control.kl_weight(run.objective)], strict=True):
        miss = min(line["path_kl"].mean / 0.2 - 1, 1.0)
        assert following == pytest.approx(line["kl_weight"] * math.exp(0.1 * miss), rel=1e-12)
    assert run.objective == dataclasses.replace(
        ScoreAsAction(learning_rate=0.05), kl_weight=control.kl_weight(run.objective)
    )


def test_without_a_target_the_weight_stays():
    run = trainer(ScoreAsAction(kl_weight=0.3), None)
    assert all("kl_weight" not in line for line in run.updates(2))
    assert control.kl_weight(run.objective) == 0.3


def test_a_steered_run_resumes_bit_for_bit():
    def fresh() -> Trainer:
        return trainer(ScoreAsAction(kl_weight=0.3, learning_rate=0.05), TargetKL(0.2, rate=0.1))

    def numbers(run: Trainer, updates: int) -> list[dict[str, Any]]:
        clock = ("seconds", "memory")
        return [{k: v for k, v in n.items() if k not in clock} for n in run.updates(updates)]

    whole, first, second = fresh(), fresh(), fresh()
    log = numbers(whole, 4)
    numbers(first, 2)
    second.load_state(first.state())
    assert numbers(second, 4) == log[2:]
    assert second.objective == whole.objective
    for one, other in zip(second.parameters, whole.parameters, strict=True):
        assert (one == other).all()


@pytest.mark.slow
@pytest.mark.parametrize("start", [0.15, 1.5])
def test_on_an_exact_problem_it_ends_at_the_target_with_the_multiplier_as_weight(
    start, as_users_run_it
):
    """The target is the path KL of the optimum at kl_weight 0.5; begun at 0.15 or at 1.5.

    Unsteered, these weights would end near the path KL of their own optima: 1.8 and 0.19 against
    0.70. What training noise leaves, averaged over the last 60 updates, is a few per cent.
    """
    target = PROBLEM.optimum(SAMPLER).path_kl
    own = GaussianProblem(kl_weight=start).optimum(SAMPLER).path_kl
    assert abs(math.log(own / target)) > math.log(2)  # there is something to correct
    objective = ScoreAsAction(
        kl_weight=start, clip=1.0, gae_rate=0.0, denoised=False, learning_rate=0.01
    )
    run = trainer(objective, TargetKL(target, rate=0.03), samples=128)
    reached, weights = [], []
    for line in run.updates(250):
        if line["update"] > 190:
            reached.append(PROBLEM.evaluate(run.environment.model, SAMPLER).path_kl)
            weights.append(line["kl_weight"])
    assert sum(reached) / 60 == pytest.approx(target, rel=0.08)
    assert sum(weights) / 60 == pytest.approx(PROBLEM.kl_weight, rel=0.15)
