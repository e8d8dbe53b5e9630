"""Memory that runs out: fewer rows at once, for good, and the same result."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.faults.memory import TOLERANCE, Limit, deviation, gradient, trainer
from diffusion_envs.exact.problems import GaussianProblem, table
from diffusion_envs.objectives import (
    D3PO,
    DDPO,
    DPOK,
    DRaFT,
    ScoreAsAction,
    TiltedRegression,
    ZerothOrderAdjointMatching,
)
from diffusion_envs.runs.evaluation import evaluate
from diffusion_envs.samplers import DDIM
from diffusion_envs.training import memory
from diffusion_envs.training.memory import AtMost, AtOnce, MemoryLimitError, ran_out
from diffusion_envs.training.path_metric import PathMetric
from tests.diffusion_envs.objectives import small_runs
from verification.planting import Edit, planted

TOO_MUCH = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand more words")
GRADIENTS = "diffusion_envs.training.gradients.Gradients"


def fitting(most: int, asked: list[slice]) -> Any:
    """Asks of a piece; more than so many rows do not fit."""

    def ask(piece: slice) -> list[int]:
        asked.append(piece)
        if piece.stop - piece.start > most:
            raise TOO_MUCH
        return list(range(piece.start, piece.stop))

    return ask


# -- the errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        TOO_MUCH,
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 80 bytes"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
)
def test_an_allocation_that_failed_is_known_in_every_form_and_as_a_cause(error):
    assert ran_out(error)
    outer = ValueError("a reward failed")
    outer.__cause__ = error
    assert ran_out(outer)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes differ"), ValueError("out of memory"), MemoryLimitError("x"), None],
)
def test_other_errors_are_none_of_memory(error):
    assert not ran_out(error)


# -- pieces ------------------------------------------------------------------------------------


def test_a_piece_that_does_not_fit_is_halved_and_only_it_is_asked_again(caplog):
    asked, pieces = list[slice](), AtOnce(6)
    told = memory.in_pieces(fitting(3, asked), pieces, "the decoder", rows=11)
    assert [k for part in told for k in part] == list(range(11))
    assert [(c.start, c.stop) for c in asked] == [(0, 6), (0, 3), (3, 6), (6, 9), (9, 11)]
    assert pieces.batch == 3
    (record,) = caplog.records
    assert record.getMessage() == (
        "memory ran out in the decoder with 6 rows at once (CUDA out of memory. Tried to allocate "
        "20 GiB): 3 from now on, with the same result"
    )


def test_halving_begins_at_the_rows_that_there_are_and_ends_with_words_of_what_helps():
    asked, pieces = list[slice](), AtOnce()
    with pytest.raises(MemoryLimitError, match="with 1 row at once") as caught:
        memory.in_pieces(fitting(0, asked), pieces, "the network", rows=5)
    assert [c.stop for c in asked] == [5, 2, 1]
    for remedy in ("gradient_checkpointing", "resolution", "float16"):
        assert remedy in str(caught.value)


def test_rows_that_belong_together_stay_together():
    pieces, seen = AtOnce(20), list[int]()

    def attempt() -> None:
        seen.append(pieces.batch)
        raise TOO_MUCH

    with pytest.raises(MemoryLimitError, match="with 3 rows at once"):
        memory.retried(attempt, pieces, "the update", rows=20, least=3)
    assert seen == [20, 9, 3]


def test_of_attempts_within_attempts_the_outer_one_takes_fewer_rows():
    """It holds what the inner ones need beside theirs; alone, they are halved."""
    outer, inner, held = AtOnce(8), AtOnce(8), list[int]()

    def ask() -> None:
        if held[-1] + inner.batch > 5:
            raise TOO_MUCH

    def attempt() -> None:
        held.append(outer.batch)
        memory.retried(ask, inner, "the network", rows=8)

    inner.batch = 2
    memory.retried(attempt, outer, "the update", rows=8)
    assert (outer.batch, inner.batch) == (2, 2)
    held[:], outer.batch = [], 1
    inner.batch = 8
    memory.retried(attempt, outer, "the update", rows=8)
    assert (outer.batch, inner.batch) == (1, 4)


def test_what_is_no_failed_allocation_passes_and_lowers_nothing():
    def attempt() -> None:
        raise ValueError("another error")

    pieces = AtMost(AtOnce(8), 4)
    with pytest.raises(ValueError, match="another"):
        memory.retried(attempt, pieces, "the update", rows=8)
    assert pieces.batch == 4


# -- updates -----------------------------------------------------------------------------------

CASES: dict[str, tuple[Any, int, bool]] = {  # objective, rows that fit, refused going backwards
    "single steps": (DPOK(kl_weight=0.2), 5, False),
    "backwards": (TiltedRegression(kl_weight=0.3), 6, True),
    "pairs": (D3PO(), 3, False),
    "targets by queries": (ZerothOrderAdjointMatching(kl_weight=0.2, pairs=2), 3, False),
    "the last steps": (DRaFT(last=2), 2, True),
}


@pytest.mark.parametrize("name", CASES)
def test_fewer_rows_at_once_have_the_same_gradient_at_the_same_costs(name):
    objective, rows, backward = CASES[name]
    gap, (whole, numbers) = deviation(objective, rows, backward=backward, seed=8, samples=6)
    assert gap <= TOLERANCE
    assert numbers["batch"] <= rows
    assert "batch" not in whole
    # all but the clock, what was measured of the network, and the rows at once
    left = whole.keys() - {"seconds", "memory"}
    for cost in ("reward_queries", "network_calls"):
        assert numbers[cost] == whole[cost]
    assert left == numbers.keys() - {"seconds", "memory", "batch"}


class Third(Limit):
    """Refuses the third piece, once."""

    def __init__(self, refuses: bool) -> None:
        super().__init__()
        self.left = 3 if refuses else -1

    def check(self, rows: int) -> None:
        self.left -= self.rows is not None
        if self.left == 0:
            raise TOO_MUCH


@pytest.mark.parametrize(
    ("wrong", "objective", "size"),
    [
        # gradients of the attempt that failed are kept
        (
            Edit(f"{GRADIENTS}.differentiate", "self.optimiser.zero_grad(set_to_none=True)", "..."),
            DDPO(),
            {"train_steps": 3},
        ),
        # and the steps that are used are drawn anew
        (
            Edit(f"{GRADIENTS}.differentiate", "shuffle.set_state(drawn)", "..."),
            DDPO(),
            {"train_steps": 3},
        ),
        # noise of other pieces
        (
            Edit(
                "diffusion_envs.objectives.path_steps.PathLosses._targets",
                "generator.set_state(drawn)",
                "...",
            ),
            ZerothOrderAdjointMatching(kl_weight=0.2, pairs=2),
            {},
        ),
    ],
)
def test_an_attempt_that_does_not_start_afresh_is_noticed(wrong, objective, size):
    """Rows of two pieces fit, so that one is differentiated before the next is refused."""

    def gap() -> float:
        told = []
        for limited in (False, True):
            limit = Third(limited)
            run = trainer(objective, limit, 4, batch=4, **size)
            limit.rows = 1
            run.step()
            told.append(gradient(run))
        return float((told[1] - told[0]).norm() / told[0].norm())

    assert gap() <= TOLERANCE
    with planted(wrong):
        assert gap() > 1e-3


def test_the_value_network_learns_the_same_from_fewer_paths_at_once():
    told = []
    for limited in (False, True):
        run = trainer(ScoreAsAction(), Limit(), 9, samples=6, value_batch=20)
        critic = run.critic
        assert critic is not None

        def refuse(module: Any, arguments: Any, limited: bool = limited) -> None:
            if limited and len(arguments[0]) > 10:  # two paths of five nodes
                raise TOO_MUCH

        critic.network.register_forward_pre_hook(refuse)
        numbers = run.step()
        weights = torch.cat([p.detach().flatten() for p in critic.network.parameters()])
        told.append((numbers, weights, gradient(run)))
    (whole, one, slope), (numbers, other, pieces) = told
    torch.testing.assert_close(other, one, rtol=0, atol=1e-9)  # Adam: gradients near 0 are scaled
    torch.testing.assert_close(pieces, slope, rtol=1e-10, atol=1e-10)
    assert numbers["value_loss"] == pytest.approx(whole["value_loss"], rel=1e-12)
    assert numbers["batch.values"] == 1
    assert "batch.values" not in whole


def test_the_smaller_number_stays_and_goes_on_with_a_checkpoint():
    limit = Limit()
    run = trainer(DDPO(), limit, 2)
    limit.rows = 6
    assert run.step()["batch"] == 4
    limit.rows = None
    assert run.step()["batch"] == 4
    other = trainer(DDPO(), Limit(), 2)
    other.load_state(run.state())
    assert other.gradients.batch == 4
    assert other.step()["batch"] == 4
    older = {name: value for name, value in run.state().items() if name != "at_once"}
    trainer(DDPO(), Limit(), 2).load_state(older)  # checkpoints of before have none


# -- draws that do not depend on pieces --------------------------------------------------------


def test_targets_by_queries_are_the_same_in_any_pieces():
    told = []
    for batch in (64, 5, 1):
        objective = ZerothOrderAdjointMatching(kl_weight=0.2, pairs=3, width=0.3)
        made = small_runs.trainer(objective, batch=batch)
        losses: Any = made.losses(made.sample().rollout)
        told.append(losses.targets)
    for other in told[1:]:
        torch.testing.assert_close(other, told[0], rtol=1e-5, atol=1e-6)


def test_the_diagonal_of_the_metric_is_the_same_in_any_pieces():
    run = small_runs.trainer(DDPO())
    rollout, told = run.sample().rollout, []
    for batch in (64, 7, 1):
        metric = PathMetric.of(
            run.environment,
            run.parameters,
            rollout,
            share=0.6,
            generator=torch.Generator().manual_seed(1),
            batch=batch,
            accelerator=run.accelerator,
        )
        told.append(metric.diagonal(3))
    for other in told[1:]:
        torch.testing.assert_close(other, told[0], rtol=1e-4, atol=1e-6)


# -- held-out samples --------------------------------------------------------------------------


def test_held_out_samples_are_the_same_in_fewer_at_once():
    environment = GaussianProblem().environment(DDIM(0.7).bind(table(), 3), 6)
    whole = evaluate(environment, 11, batch=8)
    own = environment.model.exact  # pyright: ignore[reportAttributeAccessIssue]  # of exact models

    def limited(states: Tensor, *levels: Tensor) -> Tensor:
        if len(states) > 9:  # three steps of each path, where the pretrained model is asked
            raise TOO_MUCH
        return own(states, *levels)

    environment.model.exact = limited  # pyright: ignore[reportAttributeAccessIssue]  # as above
    pieces = evaluate(environment, 11, batch=8)
    for f in dataclasses.fields(whole):
        one, other = getattr(whole, f.name), getattr(pieces, f.name)
        if isinstance(one, Tensor):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    assert environment.batch == 2
