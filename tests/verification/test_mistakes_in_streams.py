"""Kinds of mistakes in streams of random numbers, seeds and thresholds."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import ctrl
from ctrl import martingale, q_learning
from ctrl.noise import PathStreams
from diffusion_envs.exact.problems import GaussianProblem, table
from diffusion_envs.models import adapters
from diffusion_envs.objectives import DxMIFromData, Objective, ScoreAsAction
from diffusion_envs.runs import evaluation
from diffusion_envs.runs.evaluation import HELD_OUT, evaluate
from diffusion_envs.runs.fit import initial_weights
from diffusion_envs.samplers import DDIM
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from tests.verification.kinds_of_mistakes import Kinds
from verification.claim import Setting
from verification.problems.training_loop import Process, trainer

KINDS = Kinds()
SETTING = Setting()


@KINDS.sees(r"""
ctrl.noise.PathStreams._key
    precision left out of a stream's name | kind, str(dtype) => kind
    what is drawn left out of a stream's name | kind, str(dtype) => str(dtype)
    the roll-out's name left out of a stream's | self.seed, *self.name, kind => self.seed, kind
ctrl.noise.normals_by_sample
    name left out of a sample's stream | stream(seed, *name, index) => stream(seed, index)
diffusion_envs.environment.Environment._normals
    starts, transitions and actions of one name | (stream, what) => (stream,)
    training and evaluation of one name | (stream, what) => (what,)
diffusion_envs.training.trainer.Trainer._generator
    every update draws the same | *name, self.update, process) => *name, process)
diffusion_envs.environment.Environment._starts
    groups counted from 0 on every process | range(samples.start // shared, samples.stop // shared)
        => range(len(samples) // shared)
ctrl.noise.PathStreams._numbers
    paths counted from 0 in every batch | range(self.first_path * width, (self.first_path + paths) * width)
        => range(paths * width)
""")
def what_has_another_name_draws_other_numbers(folder) -> None:
    """And the same name the same, in whatever batch."""
    shape = (3, 2)

    def drawn(dtype: torch.dtype, name: str = "one", first: int = 0) -> Tensor:
        streams = PathStreams(5, (name,), first)
        sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 1.0)
        problem = ctrl.ControlProblem(sde, 1.0)
        grid = ctrl.uniform_grid(1.0, shape[1])
        policy = ctrl.GaussianPolicy(lambda t, x: 0 * x, 1.0)
        start = torch.zeros(shape[0], 1, dtype=dtype)
        paths = ctrl.simulate(problem, policy, start, grid, generator=streams)
        scaled = paths.increments / math.sqrt(0.5)
        return torch.cat([scaled, paths.actions], 2).double()

    numbers = drawn(torch.float64)
    for other in (drawn(torch.float32), drawn(torch.float64, "other")):
        assert not torch.isclose(numbers, other, rtol=1e-4).any()
    keys = [
        PathStreams(5, ("one",))._key("increments", kind) for kind in (torch.float32, torch.float64)
    ]
    assert not np.array_equal(*keys)
    assert not torch.isclose(numbers[..., 0], numbers[..., 1], rtol=1e-4).any()
    torch.testing.assert_close(drawn(torch.float64, first=1)[:2], numbers[1:], rtol=0, atol=0)

    environment = trainer(SETTING).environment
    event = environment.event
    kinds = [("train", "start"), ("train", "action"), (HELD_OUT, "start")]
    start, *others = (environment._normals(event, *kind, range(4)) for kind in kinds)
    for each in others:
        assert not torch.isclose(start, each, rtol=1e-4).any()
    again = environment._normals(event, "train", "start", range(2, 4))
    torch.testing.assert_close(again, start[2:], rtol=0, atol=0)
    shared = environment._starts("train", range(4), 2)
    torch.testing.assert_close(environment._starts("train", range(2, 4), 2), shared[2:])
    made = trainer(SETTING)
    before = torch.randn(4, generator=made._generator("rows"))
    made.update += 1
    assert not torch.isclose(before, torch.randn(4, generator=made._generator("rows"))).any()


@KINDS.sees(r"""
ctrl.gym.sample
    every episode with one seed | seed=seed + episode => seed=seed
    the seed ignored | seed=seed + episode => seed=episode
    action's noise of the first coordinate alone | torch.empty_like(mean).normal_(generator=generator)
        => torch.empty_like(mean[:, :1]).normal_(generator=generator).expand_as(mean)
ctrl.gym.ControlEnv._increment
    every step with the same noise | self.np_random.standard_normal(shape)
        => np.random.default_rng(0).standard_normal(shape)
ctrl.gym.ControlEnv.reset
    the seed not handed on | super().reset(seed=seed) => super().reset(seed=0)
""")
def episodes_differ(folder) -> None:
    """From random starts: in their starts, their noise, their actions; and with the seed."""
    from ctrl.gym import ControlEnv, sample

    sde = ctrl.ControlledSDE(lambda t, x, a: 0 * x, lambda t, x: 1.0)
    grid = ctrl.uniform_grid(1.0, 3)
    env = ControlEnv(
        ctrl.ControlProblem(sde, 1.0), grid, lambda random: random.normal(size=2), action_dim=2
    )
    policy = ctrl.GaussianPolicy(lambda t, x: 0 * x[:, :2], 1.0)  # the last observed is time

    def episodes(seed: int) -> ctrl.Paths:
        noise = torch.Generator().manual_seed(3)
        return sample(env, policy, grid, 3, seed=seed, generator=noise)

    paths, other = episodes(1), episodes(50)
    starts, moves = paths.states[:, 0, :2], paths.states[..., :2].diff(dim=1)
    for rows in (starts, moves.flatten(0, 1), paths.actions.flatten(0, 1)):
        assert torch.pdist(rows.double()).min() > 1e-6
        assert (rows[:, 0] - rows[:, 1]).abs().min() > 1e-6
    assert torch.cdist(starts, other.states[:, 0, :2]).min() > 1e-6


@KINDS.sees(r"""
ctrl.paths.ends_at_horizon
    a grid that breaks off counts as whole | gap <= 1e-6 * => gap <= 1e-1 *
ctrl.martingale.require_adapted
    what looks ahead a little is adapted | 1e3 * torch.finfo => 1e14 * torch.finfo
ctrl.q_learning._digits
    what is nearly quadratic is quadratic | .eps ** 0.5 => .eps ** 0.05
diffusion_envs.runs.evaluation.require_same_rewards
    a reward that is off by half a standard deviation is the same | _SAME * then.abs() + width\n        if not
        => _SAME * then.abs() + 500 * width\n        if not
""")
def what_is_a_little_off_is_refused(folder) -> None:
    """By ten times less than what would be refused in any case."""
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.4)
    problem = ctrl.ControlProblem(sde, 1.0, terminal_reward=lambda x: x[:, 0])
    policy, start = ctrl.DeterministicPolicy(lambda t, x: 0 * x), torch.zeros(2, 1)
    noise = torch.Generator().manual_seed(4)
    grid = ctrl.TimeGrid(torch.tensor([0.0, 0.5, 0.95]))
    short = ctrl.simulate(problem, policy, start, grid, generator=noise)
    with pytest.raises(ValueError, match="grid must end at the horizon"):
        ctrl.returns_to_go(problem, short)
    with pytest.raises(ValueError, match="adapted"):
        martingale.require_adapted(
            lambda p: p.states[:, :-1] + 0.01 * p.states[:, 1:], short, sees_action=False
        )
    warm = dataclasses.replace(
        problem,
        temperature=0.1,
        running_reward=lambda t, x, a: -(a[:, 0] ** 2) + 0.05 * a[:, 0] ** 3,
    )
    improved = q_learning.gibbs_policy(warm, lambda t, x: x[:, 0], 1)
    with pytest.raises(ValueError, match="not quadratic"):
        improved.mean(torch.tensor(0.0), torch.ones(2, 1))

    environment = trainer(SETTING).environment
    stored = evaluate(environment, 6)
    right = environment.reward
    environment.reward = lambda images, prompts: right(images, prompts) + 0.3 * stored.rewards.std()
    with pytest.raises(ValueError, match="is not the one that this run was started with"):
        evaluation.require_same_rewards(stored, environment, {}, 6, folder / "before")


@KINDS.sees(r"""
diffusion_envs.models.adapters.inject
    an adapter's seed ignored | torch.manual_seed(seed) => torch.manual_seed(0)
diffusion_envs.runs.fit.initial_weights
    pretraining's seed ignored | torch.manual_seed(seed) => torch.manual_seed(0)
diffusion_envs.training.critic.Critic.__init__
    the value network's seed ignored | stream(environment.seed, "value network") => stream(0, "value network")
diffusion_envs.training.energy.EnergyCritic.__init__
    the energy network's seed ignored | stream(environment.seed, "energy network") => stream(0, "energy network")
""")
def every_seed_counts(folder) -> None:
    """Weights that are drawn differ between seeds, and are the same of one."""
    from peft import LoraConfig

    def adapter(seed: int) -> Tensor:
        network = torch.nn.Sequential(torch.nn.Linear(3, 3))
        adapters.inject(network, LoraConfig(r=2, target_modules=["0"]), "trained", seed=seed)
        return torch.cat([p.flatten() for n, p in network.named_parameters() if "lora_A" in n])

    def pretrained(seed: int) -> Tensor:
        with initial_weights(seed):
            return torch.nn.Linear(3, 3).weight.detach()

    def critic(seed: int, objective: Objective) -> Tensor:
        environment = GaussianProblem().environment(DDIM(0.8).bind(table(), 3), seed)
        size, data = UpdateSize(samples=4), Data() if objective.needs_data else None
        made = Trainer(environment, objective, size, accelerator=Process(), data=data)
        assert made.critic is not None
        return torch.cat([p.detach().flatten() for p in made.critic.network.parameters()])

    for drawn in (
        adapter,
        pretrained,
        lambda seed: critic(seed, ScoreAsAction()),
        lambda seed: critic(seed, DxMIFromData(energy_width=4)),
    ):
        one, again, other = drawn(3), drawn(3), drawn(8)
        assert torch.equal(one, again)
        assert not torch.allclose(one, other)


class Data:
    """What samples should look like."""

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, 2, generator=generator)


test_the_right_code_is_right, test_the_planted_mistake_is_seen = KINDS.tests()
