"""Adjoint matching: adjoint, loss, objective, and the chain's optimum where it leads."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from diffusion_envs import rewards
from diffusion_envs.environment import Environment
from diffusion_envs.exact import GaussianProblem, gaussian, table
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.objectives import AdjointMatching, Rollout, ZerothOrderAdjointMatching
from diffusion_envs.objectives.adjoint_matching import AdjointRows, lean_adjoint
from diffusion_envs.objectives.path_steps import PathLosses
from diffusion_envs.samplers import DDIM

PATHS, STEPS, EVENT = 3, 4, (2, 3)
GAIN = torch.tensor([0.4, 0.9, 0.3, 1.7], dtype=torch.float64)
STD = torch.tensor([0.6, 0.2, 1.1, 0.35], dtype=torch.float64)


def normals(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def pretrained(k, x):
    """A step that mixes the coordinates of an event, and is not linear."""
    return x + GAIN[k] * (x.flip(-1) * x).tanh()


def test_the_lean_adjoint_is_the_gradient_through_the_noise_free_steps(generator):
    """Between frozen deviations x_{k+1} - mean_k(x_k) it is back-propagation of -r."""
    states = normals(generator, PATHS, STEPS + 1, *EVENT)
    slope = normals(generator, PATHS, *EVENT)
    got = lean_adjoint(pretrained, states, slope)
    for k in range(STEPS + 1):
        x = states[:, k].clone().requires_grad_()
        after = x
        for j in range(k, STEPS):
            after = pretrained(j, after) + (states[:, j + 1] - pretrained(j, states[:, j]))
        expected = torch.autograd.grad((-slope * after).sum(), x)[0]
        torch.testing.assert_close(got[:, k], expected, rtol=1e-12, atol=1e-12)


def test_bad_input_is_refused_by_name(generator, monkeypatch):
    states = normals(generator, 2, 4, 1)
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as in production
    with pytest.raises(ValueError, match=r"reward_gradient must be \[2, 1\]"):
        lean_adjoint(pretrained, states, states[:, :2, 0])


# -- the objective -------------------------------------------------------------------------------


def test_a_rows_loss_is_its_summand_of_the_paths(generator):
    reference, scores = normals(generator, 2, PATHS, STEPS, *EVENT)
    adjoint = normals(generator, PATHS, STEPS + 1, *EVENT)
    objective = AdjointMatching(kl_weight=0.7)

    def wide(values: Tensor) -> Tensor:
        return values.expand(PATHS, -1).flatten()

    filler, zeros = normals(generator, PATHS * STEPS, *EVENT), torch.zeros(PATHS * STEPS).double()
    rows = AdjointRows(
        mean=scores.flatten(0, 1),
        old_mean=filler,
        reference_score=reference.flatten(0, 1),
        noise=filler,
        advantage=zeros,
        step_size=zeros,
        horizon=torch.tensor(1.0).double(),
        score_gain=wide(GAIN),
        std=wide(STD),
        kl_factor=1.37,
        adjoint=adjoint[:, 1:].flatten(0, 1),
    )
    found = objective.loss(rows).view(PATHS, STEPS)
    by_hand = np.zeros((PATHS, STEPS))
    for i in range(PATHS):
        for k in range(STEPS):
            control = GAIN[k] / STD[k] * (scores[i, k] - reference[i, k])
            by_hand[i, k] = 0.5 * ((control + STD[k] * adjoint[i, k + 1] / 0.7) ** 2).sum()
    np.testing.assert_allclose(found.numpy(), by_hand, rtol=1e-12)
    best = reference - (STD.square() / GAIN).view(1, -1, 1, 1) * adjoint[:, 1:] / 0.7
    least = objective.loss(replace(rows, mean=best.flatten(0, 1)))
    torch.testing.assert_close(least, torch.zeros_like(least), rtol=0, atol=1e-26)


@dataclass
class Chain:
    """Affine pretrained steps F x + f + std z, and a quadratic reward: what an objective asks."""

    matrix: Tensor
    shift: Tensor
    reward: gaussian.Quadratic

    def pretrained(self) -> Any:
        return nullcontext()

    def pretrained_mean(self, step: int, states: Tensor, condition: Tensor) -> Tensor:
        return states @ self.matrix[step].T + self.shift[step]

    def reward_gradient(self, states: Tensor, condition: Tensor) -> Tensor:
        return self.reward.gradient(states)

    def reward_gradient_by_queries(
        self, states: Tensor, condition: Tensor, *, pairs: int, width: float, generator: Generator
    ) -> Tensor:
        raise NotImplementedError("the slope of this reward is known")


def chain_optimum(chain: Chain, price: Tensor) -> list[tuple[Any, Any]]:
    """Best shift of the mean, u = K x + k, of every step; it costs price |u|^2 / 2, reward."""
    Q, slope = (v.numpy() for v in (chain.reward.curvature, chain.reward.slope))
    found = []
    for k in reversed(range(len(price))):
        F, f = chain.matrix[k].numpy(), chain.shift[k].numpy()
        # u = (price + Q)^{-1} (slope - Q m) at the free mean m = F x + f
        solved = np.linalg.inv(price[k].item() * np.eye(2) + Q)
        found.append((-solved @ Q @ F, solved @ (slope - Q @ f)))
        Q_m, slope_m = Q - Q @ solved @ Q, slope - Q @ solved @ slope
        slope = F.T @ (slope_m - Q_m @ f)
        Q = F.T @ Q_m @ F
    return found[::-1]


def gradient(objective: AdjointMatching, at: list[Any], sampling: list[Any]) -> Any:
    """d E[loss] / d (gain, shift) of every step at one policy, on quadrature paths of another."""
    sampler, data = SAMPLER, GaussianProblem().data
    slope, offset = gaussian.score_coefficients(data, sampler.table, sampler.noising_times[:-1])
    unit = torch.eye(2, dtype=torch.float64)
    b, std = sampler.score_gain, sampler.std
    chain = Chain(
        sampler.state_gain[:, None, None] * unit + b[:, None, None] * slope,
        b[:, None] * offset,
        GaussianProblem().quadratic,
    )
    points = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    z = torch.cartesian_prod(*[points] * 8).view(-1, 4, 2)
    states = [z[:, 0]]
    controls = [tuple(torch.as_tensor(v) for v in control) for control in sampling]
    for k, (K, c) in enumerate(controls):
        mean = chain.pretrained_mean(k, states[-1], z[:, 0]) + states[-1] @ K.T + c
        states.append(mean + std[k] * z[:, k + 1])
    states = torch.stack(states, 1)
    before = states[:, :-1]
    reference = torch.einsum("kij,pkj->pki", slope, before) + offset
    steps = b.expand(len(states), -1)
    rollout = Rollout(
        states=states,
        means=reference,
        actions=reference,
        noises=z[:, 1:],
        reference_scores=reference,
        costs=torch.zeros_like(steps),
        values=None,
        rewards=chain.reward(states[:, -1]),
        step_sizes=sampler.integrated_g2,
        condition=torch.zeros(len(states), dtype=torch.int64),
    )
    target = objective.targets(rollout, chain, Generator())
    gain = torch.stack([torch.as_tensor(K) / b[k] for k, (K, _) in enumerate(at)])
    shift = torch.stack([torch.as_tensor(c) / b[k] for k, (_, c) in enumerate(at)])
    gain, shift = gain.requires_grad_(), shift.requires_grad_()
    mean = reference + torch.einsum("kij,pkj->pki", gain, before) + shift
    rows = AdjointRows(
        mean=mean.flatten(0, 1),
        old_mean=reference.flatten(0, 1),
        reference_score=reference.flatten(0, 1),
        noise=z[:, 1:].flatten(0, 1),
        advantage=objective.advantages(rollout).flatten(),
        step_size=sampler.integrated_g2.expand(len(states), -1).flatten(),
        horizon=sampler.integrated_g2.sum(),
        score_gain=steps.flatten(),
        std=std.expand(len(states), -1).flatten(),
        kl_factor=sampler.kl_factor,
        adjoint=target.flatten(0, 1),
    )
    total = objective.loss(rows).sum() / len(states)
    found = torch.autograd.grad(total, (gain, shift))
    return torch.cat([each.flatten() for each in found]), chain


SAMPLER = DDIM(0.8).bind(table(), 3)


@pytest.mark.parametrize("path_kl", [False, True])
def test_the_only_critical_point_is_the_optimum_of_the_chain(path_kl):
    """DDIM's own chain, charged for either KL; all moments are quadratic: exact."""
    kl_weight, gain = GaussianProblem().kl_weight, SAMPLER.score_gain
    objective = AdjointMatching(kl_weight=kl_weight, path_kl=path_kl)
    zeros = [(np.zeros((2, 2)), np.zeros(2))] * 3
    away, chain = gradient(objective, zeros, zeros)
    # per half square of the mean's shift; ((1 + eta^2) / (2 eta))^2 = 1.05 at eta = 0.8
    of_path = (1.64 / 1.6) ** 2 * SAMPLER.integrated_g2 / gain.square()
    price = kl_weight * (of_path if path_kl else 1 / SAMPLER.std.square())
    best = chain_optimum(chain, price)
    at_best, _ = gradient(objective, best, best)
    assert at_best.abs().max() < 1e-11 * away.abs().max()
    # another weight, and another KL, have another optimum
    for other in (replace(objective, kl_weight=0.9), replace(objective, path_kl=not path_kl)):
        elsewhere, _ = gradient(other, best, best)
        assert elsewhere.abs().max() > 1e-2 * away.abs().max()


def test_what_the_kl_of_the_chain_costs_where_the_path_kl_is_judged():
    """Share of the best possible gain in E[r] - kl_weight path KL that its optimum reaches."""
    problem, shares = GaussianProblem(), []
    for steps in (20, 50, 100):
        sampler = DDIM(1.0).bind(table(), steps)
        slope, offset = gaussian.score_coefficients(
            problem.data, sampler.table, sampler.noising_times[:-1]
        )
        unit, b = torch.eye(2, dtype=torch.float64), sampler.score_gain
        matrix = sampler.state_gain[:, None, None] * unit + b[:, None, None] * slope
        chain = Chain(matrix, b[:, None] * offset, problem.quadratic)
        best = chain_optimum(chain, problem.kl_weight / sampler.std.square())
        gain = torch.stack([torch.as_tensor(K) / b[k] for k, (K, _) in enumerate(best)])
        shift = torch.stack([torch.as_tensor(c) / b[k] for k, (_, c) in enumerate(best)])
        reached, free = (problem.outcome_of(s * gain, s * shift, sampler).objective for s in (1, 0))
        shares.append((reached - free) / (problem.optimum(sampler).objective - free))
    assert shares == pytest.approx([0.844, 0.951, 0.982], abs=1e-3)


def test_targets_of_the_real_environment_are_products_of_jacobians():
    problem, sampler = GaussianProblem(), DDIM(1.0).bind(table(), 4)
    environment = problem.environment(sampler, seed=0)
    sample = environment.sample(
        AdjointMatching().policy, range(5), torch.zeros(5, dtype=torch.int64), stream="train"
    )
    asked = environment.reward_queries
    with torch.no_grad():
        found = AdjointMatching().targets(sample.rollout, environment, Generator())
    assert environment.reward_queries == asked + 5
    slope, _ = gaussian.score_coefficients(problem.data, sampler.table, sampler.noising_times[:-1])
    expected = -problem.quadratic.gradient(sample.rollout.states[:, -1].double())
    for k in reversed(range(4)):
        # networks and states of the loop are float32
        torch.testing.assert_close(found[:, k].double(), expected, rtol=1e-4, atol=1e-5)
        jacobian = sampler.state_gain[k] * torch.eye(2).double() + sampler.score_gain[k] * slope[k]
        expected = expected @ jacobian


def test_two_updates_of_the_real_loop(trains):
    whole = trains(AdjointMatching(kl_weight=0.3))
    assert whole.environment.reward_queries == 2 * (12 + 12)  # rewards, and their gradients


@pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely
def test_checkpointed_activations_change_nothing():
    """They are computed again while going backwards: with the adapter still off."""
    model = TextToImageUNet.load(guidance=2.0, lora_rank=2)
    environment = Environment(
        model=model,
        sampler=DDIM(1.0).bind(model.table, 2),
        reward=rewards.PromptAlignment("reward"),
        prompts=["a photo of a cat"],
        seed=0,
    )
    with torch.no_grad():
        for parameter in model.parameters:
            parameter.fill_(0.05)
    objective, none = AdjointMatching(), torch.zeros(2, dtype=torch.int64)
    rollout = environment.sample(objective.policy, range(2), none, stream="train").rollout
    plain = objective.targets(rollout, environment, Generator())
    model.pipe.unet.enable_gradient_checkpointing()
    torch.testing.assert_close(
        objective.targets(rollout, environment, Generator()), plain, rtol=1e-4, atol=1e-6
    )
    assert plain.abs().max() > 1e-4


def test_targets_do_not_depend_on_how_many_paths_are_carried_at_once(small_trainer):
    found = []
    for batch in (64, 5):
        made = small_trainer(AdjointMatching(), batch=batch)
        update_losses = made.losses(made.sample().rollout)
        assert isinstance(update_losses, PathLosses)
        found.append(update_losses.targets)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"kl_weight": 0.0}, "kl_weight"), ({"learning_rate": math.nan}, "learning_rate")],
)
def test_bad_settings_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        AdjointMatching(**settings)


# -- a reward without a gradient -------------------------------------------------------------------


def test_the_slope_by_queries_is_that_of_the_reward_without_bias_and_as_noisy_as_it_says():
    """A quadratic reward: smoothing leaves its slope alone, and the error is Gaussian algebra."""
    problem, sampler = GaussianProblem(), DDIM(1.0).bind(table(), 4)
    environment = problem.environment(sampler, seed=0)
    state = torch.tensor([[0.7, -1.2]])
    states, condition = state.repeat(4000, 1), torch.zeros(4000, dtype=torch.int64)
    asked = environment.reward_queries
    found = environment.reward_gradient_by_queries(
        states, condition, pairs=3, width=0.5, generator=Generator().manual_seed(3)
    ).double()
    assert environment.reward_queries == asked + 4000 * 6
    slope = problem.quadratic.gradient(state.double())[0]
    # z (z . slope) has covariance |slope|^2 I + slope slope'; the mean of 3 pairs, a third of it
    unit = torch.eye(2, dtype=torch.float64)
    covariance = (slope.square().sum() * unit + slope.outer(slope)) / 3
    error = (covariance.diagonal() / 4000).sqrt()
    assert ((found.mean(0) - slope).abs() < 4 * error).all()
    torch.testing.assert_close(found.T.cov(), covariance, rtol=0.15, atol=0.02)


def test_a_reward_without_a_gradient_trains_and_its_queries_are_counted(trains):
    whole = trains(ZerothOrderAdjointMatching(kl_weight=0.3, pairs=2, width=0.1))
    assert whole.environment.reward_queries == 2 * 12 * (1 + 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pairs": 0}, "pairs must be an integer of at least 1"),
        ({"width": 0.0}, "width must be a positive finite number"),
    ],
)
def test_bad_settings_of_the_queries_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        ZerothOrderAdjointMatching(**settings)
