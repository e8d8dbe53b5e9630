"""The real loop on the smallest problem: Gaussian data in the plane, its exact score, a reward."""

from typing import Any

from diffusion_envs.exact.problems import GaussianProblem, table
from diffusion_envs.objectives import Objective
from diffusion_envs.preferences import Preference
from diffusion_envs.samplers import DDIM
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from verification.problems.training_loop import Process

STEPS = 4
PROBLEM = GaussianProblem()


def trainer(
    objective: Objective,
    preference: Preference | None = None,
    seed: int = 5,
    log_path_kl: bool = False,
    **size: Any,
) -> Trainer:
    """A fresh run of 12 samples an update, in pieces of 10 rows."""
    environment = PROBLEM.environment(DDIM(1.0).bind(table(), STEPS), seed)
    return Trainer(
        environment,
        objective,
        UpdateSize(**{"samples": 12, "batch": 10, "value_epochs": 1} | size),
        accelerator=Process(),
        preference=preference,
        log_path_kl=log_path_kl,
    )


def numbers(run: Trainer, updates: int) -> list[dict[str, Any]]:
    """What the updates say, without the clock."""
    return [
        {k: v for k, v in found.items() if k not in ("seconds", "memory")}
        for found in run.updates(updates)
    ]


def assert_runs_and_resumes(objective: Objective, queries: int, **size: Any) -> None:
    """Two updates: finite, so many reward queries each, the same when cut in two."""
    whole = trainer(objective, **size)
    log = numbers(whole, 2)
    assert [line["reward_queries"] for line in log] == [queries, 2 * queries]
    parameters = [p.detach() for p in whole.parameters]
    assert all(p.isfinite().all() for p in parameters)
    assert max(p.abs().max() for p in parameters) > 0
    first, second = trainer(objective, **size), trainer(objective, **size)
    numbers(first, 1)
    second.load_state(first.state())
    assert numbers(second, 2) == log[1:]
    for one, other in zip(second.parameters, parameters, strict=True):
        assert (one == other).all()


def share_gained(objective: Objective, updates: int, **size: Any) -> float:
    """The share of what J can gain, on the sampler's chain, that a run gains; exact."""
    sampler = DDIM(1.0).bind(table(), STEPS)
    run = trainer(objective, **{"samples": 64, "batch": 4096} | size)
    start = PROBLEM.evaluate(run.environment.model, sampler).objective
    for _ in run.updates(updates):
        pass
    reached = PROBLEM.evaluate(run.environment.model, sampler).objective
    return (reached - start) / (PROBLEM.optimum(sampler).objective - start)
