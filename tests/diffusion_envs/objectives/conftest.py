"""What tests of objectives share: a model whose gradients are exact, and the smallest real loop."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import ctrl
from ctrl.noise import stream
from diffusion_envs.denoising import path_kl_per_step
from diffusion_envs.environment import Environment
from diffusion_envs.exact import linear_policy
from diffusion_envs.exact.gaussian import Gaussian, Quadratic
from diffusion_envs.exact.linear_policy import Steps
from diffusion_envs.models.adapters import AdapterSwitch
from diffusion_envs.models.text_condition import TextCondition
from diffusion_envs.models.text_to_image_unet import GuidedScore, TextToImageUNet
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.objectives import Objective, PathObjective, Rollout, Rows
from diffusion_envs.objectives.dpok import NoiseLevelRows
from diffusion_envs.objectives.path_steps import Steps as RowSteps
from diffusion_envs.rewards import Reward
from diffusion_envs.samplers import DDIM, BoundDDIM
from diffusion_envs.training.optimisers import AdamW, Optimiser
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from verification.problems.training_loop import Network, Process


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


DATA = Gaussian(tensor([0.8, -0.5]), tensor([[0.9, 0.35], [0.35, 0.4]]))
REWARD = Quadratic(tensor([[0.9, 0.2], [0.2, -0.2]]), tensor([0.6, -0.3]), tensor(0.11))
START = Gaussian(tensor([0.1, -0.2]), tensor([[1.1, 0.1], [0.1, 0.8]]))
GAIN, SHIFT = tensor([[-0.3, 0.15], [0.05, 0.2]]), tensor([0.25, -0.1])
ADAMW = AdamW()
SD15 = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """Gaussian data, a linear policy, a quadratic reward: quadrature paths give exact gradients.

    All moments are of degree three at most in every normal, so that two nodes each are exact.
    """

    sampler: BoundDDIM
    data: Gaussian = DATA
    reward: Quadratic = REWARD
    start: Gaussian = START
    gain: Tensor = GAIN
    shift: Tensor = SHIFT

    def rollout(self, nodes: int = 2) -> tuple[Rollout, Tensor]:
        """Paths of the policy, with the chain's own values (no cost), and their weights."""
        sampler = self.sampler
        # the first step of the quadrature rule is the start's randomness
        widths = torch.cat([tensor([1.0]), sampler.grid.steps])
        product = ctrl.noise.gauss_hermite(widths, nodes=nodes, noise=(2,))
        root = torch.linalg.cholesky(self.start.covariance)
        start = self.start.mean + product.increments[:, 0] @ root.T
        noise = ctrl.Noise(product.increments[:, 1:], None, product.weights)
        score = linear_policy.linear_score(self.data, sampler.table, self.gain, self.shift)
        problem = linear_policy.problem(self.data, sampler.table, self.reward, 0.0, sampler.eta)
        policy = ctrl.DeterministicPolicy(score)
        paths = ctrl.simulate(problem, policy, start, sampler.grid, solver=sampler, noise=noise)
        before = paths.states[:, :-1]
        change = before @ self.gain.T + self.shift
        means = torch.stack(
            [score(t, x) for t, x in zip(sampler.grid.nodes[:-1], before.unbind(1), strict=True)],
            1,
        )
        running = linear_policy.kl_cost(torch.zeros_like(sampler.std), self.gain, self.shift)
        chain = self.chain(self.gain, self.shift)
        values = linear_policy.chain_values(chain, self.reward, running)
        rollout = Rollout(
            states=paths.states,
            means=means,
            actions=means,
            noises=noise.increments / sampler.grid.steps.sqrt().view(1, -1, 1),
            reference_scores=means - change,
            costs=path_kl_per_step(
                means, means - change, sampler.integrated_g2, factor=sampler.kl_factor
            ),
            values=torch.stack(
                [v(x) for v, x in zip(values, paths.states.unbind(1), strict=True)], 1
            ),
            rewards=self.reward(paths.states[:, -1]),
            step_sizes=sampler.integrated_g2,
            condition=torch.zeros(len(start), dtype=torch.int64),
        )
        return rollout, product.weights

    def chain(self, gain: Tensor, shift: Tensor) -> Any:
        """The sampler's steps under score + gain x + shift."""
        steps = Steps.of(self.sampler)
        return linear_policy.chain(self.data, self.sampler.table, steps, gain, shift)

    def rows(
        self, rollout: Rollout, advantages: Tensor, gain: Tensor, shift: Tensor
    ) -> NoiseLevelRows:
        """Every step of every path; the policy played (``gain``, ``shift``) when it sampled."""
        sampler, states = self.sampler, rollout.states[:, :-1]
        change = states @ gain.T + shift

        def wide(per_step: Tensor) -> Tensor:
            return per_step.expand(len(states), -1).flatten()

        return NoiseLevelRows(
            mean=(rollout.reference_scores + change).flatten(0, 1),
            old_mean=rollout.means.flatten(0, 1),
            reference_score=rollout.reference_scores.flatten(0, 1),
            noise=rollout.noises.flatten(0, 1),
            advantage=advantages.flatten(),
            step_size=wide(rollout.step_sizes),
            horizon=rollout.step_sizes.sum(),
            score_gain=wide(sampler.score_gain),
            std=wide(sampler.std),
            kl_factor=sampler.kl_factor,
            sigma=wide(sampler.sigma[:-1]),
        )

    def own_rows(
        self,
        objective: PathObjective,
        rollout: Rollout,
        advantages: Tensor,
        gain: Tensor,
        shift: Tensor,
    ) -> Any:
        """The same rows as the objective makes them; the steps of a path, alone, are joined."""
        every = self.rows(rollout, advantages, gain, shift)
        common = Rows(**{f.name: getattr(every, f.name) for f in dataclasses.fields(Rows)})
        paths, steps = advantages.shape
        path, step = torch.cartesian_prod(torch.arange(paths), torch.arange(steps)).unbind(1)
        joined = steps if objective.joins_steps else 1
        return objective.rows(
            common, RowSteps(rollout, self.sampler, path, step, joined, None, None)
        )

    def estimated(
        self, loss: Callable[[Any], Tensor], advantages: Tensor, objective: Any = None
    ) -> Tensor:
        """Exact expectation of minus the loss's gradient in (gain, shift), summed over steps.

        The rows are those that an objective makes, if there is one.
        """
        rollout, weights = self.rollout()
        leaves = self.gain.clone().requires_grad_(), self.shift.clone().requires_grad_()
        rows = (
            self.rows(rollout, advantages, *leaves)
            if objective is None
            else self.own_rows(objective, rollout, advantages, *leaves)
        )
        losses = loss(rows).view(len(weights), -1).sum(1)
        return -_flat(torch.autograd.grad((losses * weights).sum(), leaves))

    def corrected(self, gain: Tensor, shift: Tensor, weights: Tensor | None = None) -> Tensor:
        """Gradient at another policy of E sum_k w_k rho_k (r - V), paths of this one, unclipped.

        Each step is taken by the other policy, from states and with values of this one. Without
        weights they are 1.
        """
        weights = torch.ones_like(self.sampler.std) if weights is None else weights
        leaves = gain.clone().requires_grad_(), shift.clone().requires_grad_()
        own, other = self.chain(self.gain, self.shift), self.chain(*leaves)
        laws = linear_policy.moments(own, self.start)
        running = linear_policy.kl_cost(torch.zeros_like(self.sampler.std), self.gain, self.shift)
        values = linear_policy.chain_values(own, self.reward, running)
        total = sum(
            weights[k] * values[k + 1].before(other[k]).expectation(laws[k])
            for k in range(len(self.sampler.std))
        )
        return _flat(torch.autograd.grad(total, leaves))

    def exact(self, cost: Tensor | None = None, *, frozen: bool = False) -> Tensor:
        """Gradient of E[r] - sum_k cost_k / 2 E|gain x_k + shift|^2, by the moment recursion.

        Args:
            cost: of every step; none if not given.
            frozen: leave out how the costs depend on the policy through the law of the states.
        """
        leaves = self.gain.clone().requires_grad_(), self.shift.clone().requires_grad_()
        laws = linear_policy.moments(self.chain(*leaves), self.start)
        total = self.reward.expectation(laws[-1])
        if cost is not None:
            means = torch.stack([law.mean for law in laws[:-1]])
            spreads = torch.stack([law.covariance for law in laws[:-1]])
            if frozen:
                means, spreads = means.detach(), spreads.detach()
            running = linear_policy.kl_cost(cost, *leaves)
            total = total + running.expectation(Gaussian(means, spreads)).sum()
        return _flat(torch.autograd.grad(total, leaves))


def _flat(gradients: Any) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


@pytest.fixture
def linear_gaussian() -> Callable[..., LinearGaussian]:
    """(eta, steps) -> the exactly solvable model on Stable Diffusion's schedule."""
    table = DDPMTable((1 - SD15).cumprod(0), spacing="trailing")
    return lambda eta=1.0, steps=3: LinearGaussian(DDIM(eta).bind(table, steps))


@dataclass(frozen=True)
class Brightness:
    """Rises with every channel, most with one pixel."""

    differentiable: ClassVar[bool] = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """One number an image."""
        return 3 * images.mean((1, 2, 3)) + images[:, 1, 0, 1]


BRIGHTNESS = Brightness()
PROMPTS = ["one", "two", "three"]


@pytest.fixture
def small_trainer() -> Callable[..., Trainer]:
    """(objective, optimiser, **size) -> the real loop, of a linear noise prediction and an adapter.

    Three prompts, four steps, a reward that rises with the brightness of a picture.
    """

    def made(
        objective: Objective,
        optimiser: Optimiser = ADAMW,
        reward: Reward = BRIGHTNESS,
        **size: Any,
    ) -> Trainer:
        table = torch.linspace(0.97, 0.08, 20, dtype=torch.float64)
        generator = stream(7, "network")
        network = Network(generator)
        torch.nn.init.zeros_(network.b)  # a fresh adapter: the pretrained model
        context = torch.randn(3, 2, 3, generator=generator)
        null = TextCondition(torch.randn(1, 2, 3, generator=generator))
        model = TextToImageUNet(
            score=GuidedScore(
                network,
                DDPMTable(table),
                "epsilon",
                1.7,
                null,
                adapter=AdapterSwitch(network.enable_adapters, network.disable_adapters),
            ),
            event=(4, 2, 2),
            table=DDPMTable(table),
            encode=lambda asked: TextCondition(context[[PROMPTS.index(p) for p in asked]]),
            decode=lambda latents: latents[:, [0, 1, 0]].sigmoid(),
            parameters=[network.a, network.b],
        )
        environment = Environment(
            model=model,
            sampler=DDIM(0.9).bind(DDPMTable(table), 4),
            reward=reward,
            prompts=PROMPTS,
            seed=41,
        )
        settings = {"samples": 12, "batch": 64, "value_epochs": 1} | size
        return Trainer(
            environment,
            objective,
            UpdateSize(**settings),
            accelerator=Process(),
            optimiser=optimiser,
        )

    return made


@pytest.fixture
def trains(small_trainer: Callable[..., Trainer]) -> Callable[..., Trainer]:
    """(objective, **size) -> the loop after two updates, the second resumed, all finite."""

    def check(objective: Objective, **size: Any) -> Trainer:
        whole, first, second = (small_trainer(objective, **size) for _ in range(3))
        start = [p.detach().clone() for p in whole.parameters]
        lines = list(whole.updates(2))
        list(first.updates(1))
        second.load_state(first.state())
        list(second.updates(2))
        for a, b, before in zip(whole.parameters, second.parameters, start, strict=True):
            assert torch.isfinite(a).all()
            assert torch.equal(a, b)
            assert not torch.equal(a, before)
        if whole.critic is not None:
            assert second.critic is not None
            critics = whole.critic.network, second.critic.network
            kept = zip(*(network.parameters() for network in critics), strict=True)
            assert all(torch.equal(a, b) for a, b in kept)
        assert second.environment.reward_queries == whole.environment.reward_queries
        assert [line["update"] for line in lines] == [1, 2]
        return whole

    return check
