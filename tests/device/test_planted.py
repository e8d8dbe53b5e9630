"""Device mistakes, planted one at a time into the code that users run, and each is noticed.

A tensor that is left on the CPU, a value that is read in a loop, a generator of the wrong device:
CUDA would refuse them, or wait. Each must be noticed by what the other tests check.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from benchmarks.device import OBJECTIVES, OURS, READING, ROLL_OUTS, per_step, without_rewards
from diffusion_envs.exact.problems import GaussianProblem
from tests.device.counting import counting
from tests.device.memory import NAME
from tests.device.test_ctrl import CASES, setting
from tests.device.test_finetune import SYNCHRONISATIONS, exact_trainer
from verification.planting import Edit, planted

LOSSES = "diffusion_envs.objectives"


def same_numbers(name):
    """A case of ``test_ctrl``, with its tensors and its grid on the device."""
    found, expected = CASES[name](setting(NAME, NAME)), CASES[name](setting("cpu"))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=1e-12)


def no_waiting(name):
    """A case of ``test_synchronisations``."""
    waits, _, counts = per_step(ROLL_OUTS[name])
    assert waits == 0, counts.lines()


def update(name):
    """A case of ``test_finetune``: the second update."""
    run = exact_trainer(GaussianProblem(), OBJECTIVES[name], NAME)
    run.step()
    with counting(*OURS, passing_over=[READING]) as counts:
        run.step()
    assert without_rewards(counts) <= SYNCHRONISATIONS[name]


def checkpoint(_):
    """The copies of a checkpoint."""
    from diffusion_envs.runs.checkpoint import _copied

    with counting() as counts:
        _copied({str(k): torch.ones(3, device=NAME) for k in range(9)})
    assert counts.synchronised == 1


@dataclass(frozen=True)
class Mistake:
    """An edit, and the check that must notice it."""

    target: str
    old: str
    new: str
    check: Callable[[str], None]
    case: str = ""


MISTAKES = [
    # a tensor that is left where it was
    Mistake("ctrl.devices.as_like", "sent(value, like.device, like.dtype)", "value.to(like.dtype)",
            same_numbers, "multivariate"),
    Mistake("ctrl.simulate._left_ends", "as_like(grid.nodes[:-1], start)", "grid.nodes[:-1].cpu()",
            same_numbers, "multivariate"),
    Mistake("ctrl.paths.time_integral", "as_like(grid.steps, rates)", "grid.steps.cpu()",
            same_numbers, "time_integral"),
    Mistake("ctrl.paths.over_steps", "as_like(paths.grid.nodes[..., :-1], paths.states)",
            "paths.grid.nodes[..., :-1].cpu()", same_numbers, "ConsistentQ"),
    Mistake("ctrl.value.discount_factors", "return as_like(", "return (lambda x, like: x.cpu())(",
            same_numbers, "ctd0"),
    Mistake("ctrl.noise.gauss_hermite", "as_like(torch.as_tensor(points), step_sizes)",
            "torch.as_tensor(points)",
            same_numbers, "gauss_hermite"),
    Mistake("ctrl.noise.PathStreams.rows", ", like.device, like.dtype)", ', "cpu", like.dtype)',
            same_numbers, "simulate, streams, srk"),
    Mistake("ctrl.policy.MultivariateGaussianPolicy.scale_at", "as_like(scale, like)", "scale",
            same_numbers, "multivariate"),
    Mistake("ctrl.policy_gradient._reparametrised", ".detach()", ".detach().cpu()",
            same_numbers, "pathwise_gradient"),
    Mistake("ctrl.sde.ControlledSDE._own_derivative", "device=states.device", 'device="cpu"',
            same_numbers, "simulate, Milstein"),
    Mistake("ctrl.martingale.require_adapted", "torch.arange(steps, device=rows.device)",
            "torch.arange(steps)", same_numbers, "martingale.orthogonality"),
    Mistake("ctrl.q_learning._slope_and_hessian", "device=states.device", 'device="cpu"',
            same_numbers, "gibbs_policy"),
    Mistake("ctrl.torchsde_solver._drawn", "sent(drawn.normal_(generator=generator), like.device)",
            "drawn.normal_(generator=generator)", same_numbers, "simulate, TorchSDE srk"),
    Mistake(f"{LOSSES}.path_steps.PathLosses.rows", "sent(which, environment.device)", "which",
            update, "ScoreAsAction"),
    Mistake(f"{LOSSES}.noised_data.NoisedLosses._states",
            "sent(which, self.environment.device)", "which", update, "DiffusionNFT"),
    Mistake("diffusion_envs.environment.Environment._score",
            "sent(self._columns(images, prompts, samples), self.device)",
            "self._columns(images, prompts, samples).cpu()", update, "DDPO"),
    # a generator of the CPU
    Mistake("ctrl.noise.fill_increments", "generator=generator",
            "generator=torch.Generator()", same_numbers, "simulate, generator"),
    Mistake("ctrl.noise.random_signs", "generator=generator", "generator=torch.Generator()",
            same_numbers, "q_rates, probes"),
    Mistake("ctrl.noise.refine", "generator=generator", "generator=torch.Generator()",
            same_numbers, "refine"),
    # a value that is read in a loop
    Mistake("ctrl.solvers.EulerMaruyama.step_into", "t = as_like(t0, states)",
            "t = t0.to(states)", no_waiting, "simulate, EulerMaruyama"),
    Mistake("ctrl.solvers.Heun.step", "as_like(t1, states)", "t1.to(states)",
            no_waiting, "simulate, Heun"),
    Mistake("ctrl.simulate._roll_out_in_place", "x, after = states[k], states[k + 1]",
            "x, after = states[k], states[k + 1]; states[k].cpu()",
            no_waiting, "simulate, EulerMaruyama"),
    Mistake("ctrl.sde.ControlledSDE.whiten", "reached = ~", "sigma.sum().item(); reached = ~",
            no_waiting, "path_kl"),
    Mistake("ctrl.devices.require", "is not None", "is ...",
            no_waiting, "simulate, Milstein"),
    Mistake("ctrl.girsanov.controls", "each.append(", "shift.isfinite().all().item(); each.append(",
            no_waiting, "path_kl"),
    Mistake("ctrl.transitions._laws", "yield mean,", "std.max().item(); yield mean,",
            no_waiting, "transitions.log_prob"),
    Mistake("ctrl.torchsde_solver.TorchSDE._pieces", "area, length =",
            "_name_of(begin, end, increment); area, length =",
            no_waiting, "simulate, TorchSDE euler"),
    Mistake(f"{LOSSES}.path_steps.PathLosses.losses", " log_ratios.append(",
            " which.to(self.advantages.device); log_ratios.append(", update, "ScoreAsAction"),
    Mistake("diffusion_envs.objectives.nft.DiffusionNFT.advantages", "rollout.rewards.cpu(),",
            "rollout.rewards,", update, "DiffusionNFT"),
    Mistake("diffusion_envs.training.critic.Critic._fit", "total += losses.sum()",
            "total += losses.sum().item()", update, "ScoreAsAction"),
    Mistake("diffusion_envs.runs.checkpoint._copied", "size < _TOGETHER", "size < 0",
            checkpoint),
]  # fmt: skip


def cases_of(mistakes):
    return sorted(
        {(m.check, m.case) for m in mistakes}, key=lambda pair: (pair[0].__name__, pair[1])
    )


@pytest.mark.parametrize(("check", "case"), cases_of(MISTAKES))
def test_the_right_code_passes(check, case):
    check(case)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.target}: {m.new[:40]}")
def test_a_planted_mistake_is_noticed(mistake):
    edit = Edit(mistake.target, mistake.old, mistake.new)
    with planted(edit), pytest.raises((AssertionError, RuntimeError, ValueError)):
        mistake.check(mistake.case)


def test_at_least_twenty_are_planted():
    assert len(MISTAKES) >= 20
