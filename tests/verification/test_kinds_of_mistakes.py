"""Kinds of mistakes that stood in loops, processes and evaluation, planted where they did not yet.

Each was found once by hand, in one place, where no test saw it. A kind is a way to be wrong: a
factor forgotten in one of three updates, a name left out of a stream, rows in another order, a sum
for a mean, a process that does as if it were alone. Here every kind is planted into other places,
and a check beside it, an answer by another route, must see it. The checks are few: one for each
place where such mistakes meet.
"""

import dataclasses
import math
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import ctrl
from ctrl import martingale, q_learning
from ctrl.agents import online_actor_critic, online_q_learning
from ctrl.noise import PathStreams
from diffusion_envs.exact.problems import GaussianProblem, table
from diffusion_envs.models import adapters
from diffusion_envs.objectives import DxMIFromData, Objective, ScoreAsAction
from diffusion_envs.runs import evaluation, further_samples
from diffusion_envs.runs.early_stopping import EarlyStopping, StopRule
from diffusion_envs.runs.evaluation import HELD_OUT, WATCHED, by_prompt, evaluate
from diffusion_envs.runs.fit import initial_weights
from diffusion_envs.runs.monitoring import Evaluations
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.samplers import DDIM
from diffusion_envs.training import parallel
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from verification import mistakes
from verification.claim import Setting
from verification.planting import planted
from verification.problems.training_loop import PROMPTS, Process, trainer

CHECKS: dict[Callable[..., None], str] = {}
SETTING = Setting()


def sees(table: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a check with the mistakes that it must see, a table as of a claim."""

    def register(check: Callable[..., None]) -> Callable[..., None]:
        CHECKS[check] = table
        return check

    return register


# -- loops ---------------------------------------------------------------------------------------


def ergodic() -> ctrl.ControlProblem:
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.4)
    return ctrl.ControlProblem(
        sde, math.inf, lambda t, x, a: -(x[:, 0] ** 2) - 0.3 * a[:, 0] ** 2, temperature=0.2
    )


@sees(r"""
ctrl.agents.q_learning.online_q_learning
    average reward without the schedule's factor | average_reward += factor * average_rate => average_reward += average_rate
    q-learning without the schedule's factor | group["lr"] = rate * factor => group["lr"] = rate
    the schedule of the next step | schedule(k * step_size) => schedule((k + 1) * step_size)
ctrl.agents.actor_critic.online_actor_critic
    average reward without the schedule's factor, of the actor | average_reward += factor * average_rate => average_reward += average_rate
    actor and critic without the schedule's factor | group["lr"] = rate * factor => group["lr"] = rate
    factors pile up | group["lr"] = rate * factor => group["lr"] = group["lr"] * factor
""")
def online_learners_follow_their_schedule(folder) -> None:
    """All rates, step by step, by hand: V = w x, an actor of slope k, SGD."""

    def schedule(time: float) -> float:
        return 1 / (1 + 3 * time)

    rates = {"w": 0.5, "k": 0.25, "average": 0.8}
    for online in (online_q_learning, online_actor_critic):
        w, k = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, -0.4))
        policy = ctrl.GaussianPolicy(lambda t, x, k=k: k * x, 0.6)
        q = q_learning.GibbsQ(policy, 0.2)
        groups = [{"params": [w], "lr": rates["w"]}, {"params": [k], "lr": rates["k"]}]
        start = torch.tensor([[0.5], [-0.8], [1.1]], dtype=torch.float64)

        def value(t: Tensor, x: Tensor, w: Tensor = w) -> Tensor:
            return w * x[:, 0]

        common = (ergodic(), policy, value)
        noise, more = torch.Generator().manual_seed(4), {"average_rate": rates["average"]}
        if online is online_q_learning:
            learner = torch.optim.SGD(groups)
            steps = online_q_learning(
                *common, q, start, 0.1, 4, learner, noise, schedule=schedule, **more
            )
        else:
            actor, critic = (torch.optim.SGD([group]) for group in groups[::-1])
            steps = online_actor_critic(
                *common, start, 0.1, 4, actor, critic, noise, schedule=schedule, **more
            )
        kept, average = [w.item(), k.item()], 0.0
        for n, step in enumerate(steps):
            (x, after), a = step.paths.states[..., 0].T, step.paths.actions[:, 0, 0]
            log_prob = -0.5 * ((a - kept[1] * x) / 0.6) ** 2 - math.log(
                0.6 * math.sqrt(2 * math.pi)
            )
            paid = -(x**2) - 0.3 * a**2 - 0.2 * log_prob - average
            dm = kept[0] * (after - x) + 0.1 * paid
            score = (a - kept[1] * x) * x / 0.36
            share = 0.2 if online is online_q_learning else 1.0
            factor = schedule(0.1 * n)
            kept[0] += factor * rates["w"] * float((x * dm).mean())
            kept[1] += factor * rates["k"] * share * float((score * dm).mean())
            average += factor * rates["average"] * float(dm.mean())
            assert w.item() == pytest.approx(kept[0], rel=1e-12)
            assert k.item() == pytest.approx(kept[1], rel=1e-12)
            assert step.average_reward == pytest.approx(average, rel=1e-12)


@sees(r"""
diffusion_envs.training.trainer.Trainer._scheduled
    the loop without the schedule's factor | group["lr"] *= factor => group["lr"] *= 1.0
    the schedule of the next update | rate_factor(self.update) => rate_factor(self.update + 1)
    the rate is not put back | group["lr"] = rate => group["lr"] = group["lr"]
""")
def the_loop_follows_its_schedule(folder) -> None:
    """The learning rates within an update, and what is left of them after it."""
    made = trainer(SETTING, warm_up=8)
    rates = [group["lr"] for group in made.optimiser.param_groups]
    with made._scheduled():
        within = [group["lr"] for group in made.optimiser.param_groups]
    assert within == pytest.approx([rate * 4 / 9 for rate in rates])  # three updates are done
    assert [group["lr"] for group in made.optimiser.param_groups] == rates


@sees(r"""
ctrl.paths.returns_to_go
    return without the step's own reward | ahead = rewards[:, k] + => ahead = 0 * rewards[:, k] +
ctrl.q_learning.martingale_loss
    return of V and q without the step's own dM | .flip(1).cumsum(1).flip(1)
        => .flip(1).cumsum(1).flip(1) - discounts * dm
ctrl.advantages.continuous_gae
    advantage without the step's own difference | deltas[:, k] + keep => 0 * deltas[:, k] + keep
diffusion_envs.training.critic.Critic._fit
    return without the step's own cost | to_go = rollout.costs.flip(1).cumsum(1).flip(1)
        => to_go = rollout.costs.flip(1).cumsum(1).flip(1) - rollout.costs
    costs so far for costs to go | rollout.costs.flip(1).cumsum(1).flip(1) => rollout.costs.cumsum(1)
""")
def sums_to_the_end_begin_with_their_own_step(folder) -> None:
    """Returns, losses and advantages, as sums that are written out; the critic's targets too."""
    nodes = torch.tensor([0.0, 0.1, 0.35, 0.5], dtype=torch.float64)
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.4)
    problem = ctrl.ControlProblem(
        sde, 0.5, lambda t, x, a: x[:, 0] - a[:, 0] ** 2, lambda x: x[:, 0] ** 2, discount=0.7
    )
    policy = ctrl.DeterministicPolicy(lambda t, x: -0.6 * x)
    start = torch.tensor([[0.5], [-0.8]], dtype=torch.float64)
    noise = torch.Generator().manual_seed(4)
    paths = ctrl.simulate(problem, policy, start, ctrl.TimeGrid(nodes), generator=noise)
    x, a, h = paths.states[..., 0], paths.actions[..., 0], nodes.diff()
    rewards, d = (x[:, :-1] - a**2) * h, torch.exp(-0.7 * nodes)
    whole = [
        sum(rewards[:, j] * d[j] / d[k] for j in range(k, 3)) + d[3] / d[k] * x[:, 3] ** 2
        for k in range(3)
    ]
    got = ctrl.returns_to_go(problem, paths)[:, :-1]
    torch.testing.assert_close(got, torch.stack(whole, 1), rtol=1e-12, atol=0)

    def value(t: Tensor, x: Tensor) -> Tensor:
        return 0.3 * x[:, 0]

    along = torch.cat([0.3 * x[:, :-1], x[:, 3:] ** 2], 1)
    gap = torch.stack(whole, 1) - along[:, :-1]
    loss = martingale.martingale_loss(value, problem, paths)
    torch.testing.assert_close(loss, (h * (d[:-1] * gap) ** 2).sum(1), rtol=1e-12, atol=0)
    loss = q_learning.martingale_loss(value, lambda t, x, a: 0 * a[:, 0], problem, paths)
    torch.testing.assert_close(loss, (h * (d[:-1] * gap) ** 2).sum(1), rtol=1e-12, atol=0)
    gae = ctrl.policy_gradient.continuous_gae(along, rewards, h, 0.0, 0.7)
    torch.testing.assert_close(gae, gap, rtol=1e-12, atol=0)

    made = trainer(SETTING)
    rollout, seen = made.sample().rollout, list[Tensor]()
    made.critic._differentiated = lambda _, __, returns, part, of: (
        seen.append(returns) or returns.new_zeros(len(part))
    )
    made.critic._fit(rollout, None, 0)
    costs = rollout.costs.numpy()
    for k in range(costs.shape[1] + 1):
        expected = rollout.rewards.numpy() - 2.3 * costs[:, k:].sum(1)
        np.testing.assert_allclose(seen[0][:, k].numpy(), expected, rtol=1e-5)


# -- streams of random numbers, thresholds ----------------------------------------------------------


@sees(r"""
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


@sees(r"""
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


@sees(r"""
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


# -- order of rows ---------------------------------------------------------------------------------

WORTH = {"one": 1.0, "two": -2.0, "three": 5.0}


def by_words(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward that depends on the prompt, whatever else."""
    return images.mean((1, 2, 3)) * torch.tensor([WORTH[each] for each in prompts])


@sees(r"""
diffusion_envs.environment.Environment.sample
    denoised pictures with prompts in another order | self._rewards(guesses, _each(prompts, steps)
        => self._rewards(guesses, prompts * steps
diffusion_envs.environment.Environment._answers
    denoised pictures in threads with prompts in another order | words, which = _each(prompts, steps)
        => words, which = prompts * steps
diffusion_envs.environment.Environment._pretrained_scores
    pretrained model with prompts in another order | condition.repeat_interleave(steps) => condition.repeat(steps)
diffusion_envs.training.critic.Critic.shown
    value network with prompts in another order | .repeat_interleave(nodes, 0) => .repeat(nodes, 1)
diffusion_envs.environment.Environment._scored
    every piece with the first prompts | prompts[c], samples[c]) => prompts[: len(images[c])], samples[c])
""")
def every_row_has_its_own_prompt(folder) -> None:
    """Rewards, denoised rewards, the pretrained model and the critic: row by row."""
    for overlap in (0, 1):
        made = trainer(SETTING)
        environment = made.environment
        environment.reward, environment.overlap, environment.batch = by_words, overlap, 4
        condition = torch.tensor([2, 0, 1, 1, 0])

        def policy(mean, _):
            return ctrl.DeterministicPolicy(mean)

        sample = environment.sample(policy, range(5), condition, stream="train", denoised=True)
        rollout, steps = sample.rollout, environment.steps
        for p, k in enumerate(condition.tolist()):
            word, states = PROMPTS[k], rollout.states[p, :-1]
            single = torch.full((len(states),), k)
            with torch.no_grad():
                guess = steps.denoised(states[None], rollout.means[p : p + 1])[0]
                picture = environment.model.decode(torch.cat([guess, rollout.states[p, -1:]]))
                with environment.pretrained():
                    scores = environment.action(states, torch.arange(len(states)), single)
                features = environment.features_of(single[:1])[0]
            expected = picture.mean((1, 2, 3)) * WORTH[word]
            torch.testing.assert_close(sample.denoised_rewards[p], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(rollout.reference_scores[p], scores, rtol=1e-4, atol=1e-5)
            nodes = rollout.states.shape[1]
            shown = made.critic.shown(rollout)[2].view(5, nodes, -1)
            torch.testing.assert_close(shown[p], features.expand(nodes, -1))


@sees(r"""
diffusion_envs.runs.evaluation.sample_in_turn
    prompts in turn from the first in every batch | for i in samples]) => for i in range(len(samples))])
diffusion_envs.training.trainer.Trainer.sample
    training's samples the same in every update | first = self.update * samples => first = 0
diffusion_envs.runs.further_samples.further_rewards
    further samples the same in every batch | some = indices[own.start : own.stop] => some = own
diffusion_envs.runs.evaluation._judged
    judges see the pictures in another order | ask(judge, images[c] => ask(judge, images.flip(0)[c]
    judges are told prompts in another order | prompts[c]), => prompts[::-1][c]),
diffusion_envs.runs.evaluation.by_prompt
    differences of other samples | "difference": after.rewards - before.rewards
        => "difference": after.rewards - before.rewards.flip(0)
    one prompt's rewards for another's | .append(row) => .append(len(after.prompts) - 1 - row)
diffusion_envs.runs.evaluation.require_same_rewards
    stored pictures scored with prompts in another order | stored.prompts[c.start : c.stop]
        => stored.prompts[::-1][c.start : c.stop]
""")
def every_sample_has_the_prompt_of_its_index(folder) -> None:
    """Whatever the batch, the process and the update; and judges see what the reward saw."""
    made = trainer(SETTING)
    environment = made.environment
    environment.reward = by_words
    judge = evaluate(environment, 5, judges={"same": by_words}, batch=2)
    assert judge.prompts == ["one", "two", "three", "one", "two"]
    direct = by_words(judge.images, judge.prompts)
    torch.testing.assert_close(judge.rewards, direct, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(judge.judged["same"], direct, rtol=1e-4, atol=1e-5)
    evaluation.require_same_rewards(judge, environment, {}, 2, folder / "before")
    before = evaluate(environment, 5, batch=3, pretrained=True)
    rows = {p: [k for k, each in enumerate(judge.prompts) if each == p] for p in judge.prompts}
    for prompt, told in by_prompt(before, judge).items():
        for part, values in (
            ("after", judge.rewards),
            ("difference", judge.rewards - before.rewards),
        ):
            assert told[part].mean == pytest.approx(values[rows[prompt]].mean().item(), rel=1e-4)
    few = further_samples.further_rewards(environment, 5, folder / "few", batch=2)
    many = further_samples.further_rewards(environment, 5, folder / "many", batch=5)
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-5)
    made.update = 1
    states, other = made.sample().rollout.states, trainer(SETTING).sample().rollout
    assert not torch.isclose(states[:, 0], other.states[:, 0]).any()


@sees(r"""
diffusion_envs.runs.evaluation.evaluate
    held-out samples of training's stream | own[c], stream) => own[c], "train")
    the pretrained model with the adapter on | environment.pretrained() if pretrained else nullcontext()
        => nullcontext()
diffusion_envs.runs.further_samples.further_rewards
    the frontier from held-out samples | sample_in_turn(environment, some, STREAM
        => sample_in_turn(environment, some, "held-out"
diffusion_envs.runs.further_samples.further_rewards
    the frontier with the adapter on | environment.pretrained(), => ``
diffusion_envs.environment.Environment._pretrained_scores
    path KL from the adapted model | with self.model.pretrained(): => if True:
diffusion_envs.environment.Environment.pretrained_mean
    the pretrained mean with the adapter on | with self.model.pretrained(): => if True:
diffusion_envs.runs.evaluation.evaluate_pretrained
    the stored "before" of the adapted model | pretrained=True => pretrained=False
""")
def evaluations_are_of_their_own_samples_and_model(folder) -> None:
    """No start is shared by two purposes, and what is called pretrained is."""
    made = trainer(SETTING)
    environment = made.environment
    environment.reward = lambda images, prompts: images.flatten(1)[:, 0]
    training = environment.sample(
        lambda mean, _: ctrl.DeterministicPolicy(mean),
        range(4),
        torch.arange(4) % 3,
        stream="train",
    ).rollout
    seen = [training.rewards]
    seen += [evaluate(environment, 4, stream=each).rewards for each in (HELD_OUT, WATCHED)]
    adapted = seen[1]
    for one in range(3):
        for two in range(one):
            assert not torch.isclose(seen[one], seen[two], rtol=1e-5).any()
    assert torch.isfinite(training.costs).all()
    assert (training.costs > 0).all()
    with torch.no_grad():
        state, at = training.states[:, 0], torch.zeros(4, dtype=torch.int64)
        step = torch.zeros(4, dtype=torch.int64)
        means = [environment.pretrained_mean(0, state, at)]
        for parameter in environment.model.parameters:
            parameter.zero_()  # the adapter does nothing: the same as off
        means.append(environment.steps.mean(step, state, environment.action(state, 0, at)))
    torch.testing.assert_close(*means, rtol=1e-5, atol=1e-6)
    bare = evaluate(environment, 4).rewards
    fresh = trainer(SETTING).environment
    fresh.reward = environment.reward
    assert not torch.isclose(adapted, bare, rtol=1e-5).all()
    torch.testing.assert_close(evaluate(fresh, 4, pretrained=True).rewards, bare)
    path = folder / "before.safetensors"
    stored = evaluation.evaluate_pretrained(fresh, 4, path, judges={}, batch=4)
    torch.testing.assert_close(stored.rewards, bare)
    further = further_samples.further_rewards(fresh, 4, folder / "further", batch=4)
    assert not torch.isclose(further, bare, rtol=1e-5).any()
    again = further_samples.further_rewards(environment, 4, folder / "bare", batch=4)
    torch.testing.assert_close(further, again)


@sees(r"""
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


@sees(r"""
diffusion_envs.runs.early_stopping.EarlyStopping.of
    the pretrained model's scores of the adapted one | pretrained=pretrained => pretrained=False
    watched samples are the held-out ones | stream=WATCHED => stream="held-out"
    the current weights where their mean is exported | with trainer.averaged(): => if True:
diffusion_envs.runs.monitoring.Evaluations._evaluate
    evaluated the current weights, exported their mean | with self._trainer.averaged(): => if True:
diffusion_envs.runs.evaluation.Evaluation.first
    the last samples for the first | rewards=self.rewards[:n] => rewards=self.rewards[-n:]
""")
def what_is_compared_is_alike(folder) -> None:
    """Before and after: the same samples and weights as are exported, and not what stops a run."""
    made = trainer(SETTING, average=0.5)
    for mean, now in zip(made.mean, made.parameters, strict=True):
        mean.copy_(0.3 * now.detach())
    environment = made.environment

    def measured(pretrained: bool = False, stream: str = HELD_OUT) -> Tensor:
        with made.averaged():
            return evaluate(environment, 4, pretrained=pretrained, stream=stream).rewards

    stopping = EarlyStopping.of(StopRule(samples=4), made, environment, folder, {}, 4)
    for pretrained in (False, True):
        got = stopping._measure(3, pretrained).rewards
        torch.testing.assert_close(got, measured(pretrained, WATCHED))
    options = RunOptions(evaluation_samples=4)
    evaluations = Evaluations(made, environment, None, folder, options, 4, 5)
    whole = evaluations._evaluate(4)
    torch.testing.assert_close(whole.rewards, measured())
    torch.testing.assert_close(whole.first(2).rewards, whole.rewards[:2])


# -- several processes -------------------------------------------------------------------------------


class World:
    """Threads that stand for processes: what one gathers, all have handed over."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.handed: list[Tensor] = [torch.empty(0)] * size

    def exchange(self, index: int, value: Tensor) -> list[Tensor]:
        self.handed[index] = value.detach().clone()
        self.barrier.wait()
        everyone = list(self.handed)
        self.barrier.wait()
        return everyone


class Member(Process):
    """One process of a world."""

    def __init__(self, index: int, world: World) -> None:
        super().__init__(index, world.size)
        self.world = world

    def gather(self, tensor):
        return torch.cat(self.world.exchange(self.process_index, tensor))

    def reduce(self, tensor, reduction="sum", scale=1.0):
        return torch.stack(self.world.exchange(self.process_index, tensor)).sum(0)


def of_world(size: int, ask: Callable[[Process], object]) -> list:
    """What each process of a world says."""
    world = World(size)
    answers: list = [None] * size

    def run(index: int) -> None:
        try:
            answers[index] = ask(Member(index, world) if size > 1 else Process())
        except BaseException as error:
            answers[index] = error
            world.barrier.abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(size)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


def updated(accelerator: Process, *, clip: float = 1e9) -> dict[str, Tensor]:
    """What an update sees and leaves; four processes have two or three of its paths."""
    made = trainer(SETTING)
    made = Trainer(
        made.environment,
        ScoreAsAction(kl_weight=2.3, learning_rate=1e-3),
        UpdateSize(
            samples=10,
            batch=4,
            minibatches=2,
            max_gradient_norm=clip,
            value_epochs=2,
            value_batch=20,
        ),
        accelerator=accelerator,
    )
    made.update = 3
    made.environment.reward = by_words
    told = made.step()
    state = {f"adapter {k}": p.detach().clone() for k, p in enumerate(made.parameters)}
    state |= {f"gradient {k}": p.grad.clone() for k, p in enumerate(made.parameters)}
    state |= {f"critic {k}": v.clone() for k, v in made.critic.network.state_dict().items()}
    numbers = {k: torch.tensor(float(getattr(v, "mean", v))) for k, v in told.items()}
    return state | {k: v for k, v in numbers.items() if k not in ("seconds", "memory")}


@sees(r"""
diffusion_envs.training.critic.Critic._fit
    value's batches named by the process | update, epoch, 0) => update, epoch, self.accelerator.process_index)
    value's gradients clipped before they are added | parallel.add_gradients(parameters, self.accelerator)
        => nn.utils.clip_grad_norm_(parameters, 1e-3)\n                parallel.add_gradients(parameters, self.accelerator)
    value's batches of this process's rows | everyones = torch.randperm(place.of * place.size
        => everyones = place.paths.start + torch.randperm(len(place.paths)
    value's loss divided by this process's rows | of=len(batch) => of=max(1, len(part))
diffusion_envs.training.trainer.Trainer._improve_adapter
    minibatches named by the process | self.update, epoch, 0) => self.update, epoch, self.accelerator.process_index)
diffusion_envs.training.gradients.Gradients.of
    gradients clipped before they are added | parallel.add_gradients(self.parameters, self.accelerator)
        => sharded.clip_gradients(self.parameters, most)\n            parallel.add_gradients(self.parameters, self.accelerator)
diffusion_envs.training.trainer.Trainer._over_all
    advantages by this process's values | values=whole(rollout.values) => values=rollout.values
diffusion_envs.training.trainer.Trainer.sample
    every process makes the first samples | range(first + share.paths.start, first + share.paths.stop)
        => range(first, first + len(share.paths))
    training's prompts from the first in every process | for i in indices]) => for i in range(len(indices))])
diffusion_envs.objectives.path_steps.PathLosses.__init__
    advantages of the first process | self.rollout.place.own(everyones) => everyones[: len(self.rollout.rewards)]
diffusion_envs.training.update_numbers.Earned.of
    what this process's paths earned | earned = parallel.gather(earned, accelerator).cpu() => earned = earned.cpu()
diffusion_envs.training.update_numbers.means
    means of means | every[:, :1] / every[:, 0].sum() => 1 / len(every)
diffusion_envs.training.parallel.gather
    processes in another order | .split(max(lengths) or 1) => .split(max(lengths) or 1)[::-1]
    filled up rows kept | rows[:length] for rows => rows for rows
diffusion_envs.training.parallel.add_gradients
    means over processes for sums | view_as(parameter).clone() if => view_as(parameter) / accelerator.num_processes if
diffusion_envs.rollout.Share.even
    what is left over goes to nobody | groups * k // processes => groups // processes * k
""")
def several_processes_do_as_one(folder) -> None:
    """Four of them, whose shares differ, in updates whose gradient is clipped and not."""
    for clip in (1e9, 0.05):
        (alone,) = of_world(1, lambda world, clip=clip: updated(world, clip=clip))
        for told in of_world(4, lambda world, clip=clip: updated(world, clip=clip)):
            for name, value in alone.items():
                # float32, in sums of another order
                assert (told[name] - value).norm() <= 1e-4 * value.norm(), name


@sees(r"""
diffusion_envs.training.parallel.broadcast_from_main
    the last process decides | accelerator)[0]) => accelerator)[-1])
diffusion_envs.training.parallel.from_main
    every process hands over | accelerator.process_index == 0 else None => True else None
diffusion_envs.training.parallel.total
    sum times the processes | accelerator.reduce(value, "sum")
        => accelerator.reduce(value * accelerator.num_processes, "sum")
diffusion_envs.training.parallel.share
    shares that overlap | n * (k + 1) // processes => n * (k + 1) // processes + (k == 0)
diffusion_envs.training.parallel.add
    counts of one process | total.update(theirs) => total.update(dict(counts))
diffusion_envs.training.parallel.of_all
    every process asks for the first | own = share(n, accelerator) => own = range(len(share(n, accelerator)))
""")
def processes_agree(folder) -> None:
    """What is broadcast, added and gathered, against what each process holds."""

    def ask(world: Process) -> dict[str, object]:
        k = world.process_index
        named = parallel.from_main({"a": torch.tensor([1.0 + k])}, world)
        every = parallel.of_all(lambda own: {"i": torch.tensor(list(own))}, 5, world)
        return {
            "main": parallel.broadcast_from_main(10 + k, world),
            "from": named["a"].tolist(),
            "total": parallel.total(torch.tensor([1.0 + k]), world).tolist(),
            "counts": parallel.add({"x": 1 + k, f"own {k}": 1}, world),
            "all": every["i"].tolist(),
        }

    for told in of_world(2, ask):
        assert told == {
            "main": 10,
            "from": [1.0],
            "total": [3.0],
            "counts": {"x": 3, "own 0": 1, "own 1": 1},
            "all": [0, 1, 2, 3, 4],
        }


PLANTED = [(check, mistake) for check in CHECKS for mistake in mistakes.read(CHECKS[check])]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_right_code_is_right(check, tmp_path, as_users_run_it):
    check(tmp_path)


@pytest.mark.parametrize(
    ("check", "mistake"), PLANTED, ids=[f"{c.__name__}: {m.name}" for c, m in PLANTED]
)
def test_the_planted_mistake_is_seen(check, mistake, tmp_path, as_users_run_it):
    wrong = (AssertionError, ValueError, pytest.fail.Exception)  # or what the code itself refuses
    with planted(*mistake.edits), pytest.raises(wrong):
        check(tmp_path)
