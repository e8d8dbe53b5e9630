"""The two views of an action give one gradient: the exact one.

On Gaussian data with a linear policy and a quadratic reward every quantity is a polynomial in the
noise, so quadrature paths through production simulate, sampler and losses must reproduce the exact
gradient of the sampler's own objective to round-off; and that tends to the closed form of
continuous time as steps shrink.

  view B, ``ScoreAsAction``         the decision is the next state: sum grad log p(x' | x) advantage
  view A, ``ScoreAsActionSampled``  the decision is a drawn score: sum grad log pi(a | x) advantage
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

import ctrl
from diffusion_envs.denoising import path_kl_per_step
from diffusion_envs.exact import linear_policy
from diffusion_envs.exact.gaussian import Gaussian, Quadratic, shift_response, transition
from diffusion_envs.exact.linear_policy import Steps
from diffusion_envs.noise_schedules import DDPMTable, VPLinear
from diffusion_envs.objectives import Rollout, ScoreAsAction, ScoreAsActionSampled
from diffusion_envs.objectives.path_steps import transition_log_ratio
from diffusion_envs.objectives.score_as_action import DrawnRows
from diffusion_envs.samplers import DDIM
from verification.problems.losses import rows_of_steps


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


DATA = Gaussian(tensor([0.8, -0.5]), tensor([[0.9, 0.35], [0.35, 0.4]]))
REWARD = Quadratic(tensor([[0.9, 0.2], [0.2, -0.2]]), tensor([0.6, -0.3]), tensor(0.11))
START = Gaussian(tensor([0.1, -0.2]), tensor([[1.1, 0.1], [0.1, 0.8]]))
GAIN, SHIFT = tensor([[-0.3, 0.15], [0.05, 0.2]]), tensor([0.25, -0.1])
BETA = 0.37  # KL weight
UNIT_CLOCK = VPLinear(1.0, 1.0, horizon=20.0)  # its time is int g^2, on which all depends


def table(schedule, entries=1000):
    s = torch.arange(1, entries + 1, dtype=torch.float64) / entries
    return DDPMTable((-schedule.integrated_beta(s)).exp(), spacing="trailing")


SD15 = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
TABLES = {
    "sd15": DDPMTable((1 - SD15).cumprod(0), spacing="trailing"),
    "constant": table(VPLinear(2.0, 2.0)),
    "linear": table(VPLinear(0.1, 20.0)),
}
each_table = pytest.mark.parametrize("schedule", TABLES.values(), ids=TABLES)

VIEW_B = ScoreAsAction(kl_weight=BETA)
VIEW_A = ScoreAsActionSampled(kl_weight=BETA, exploration=0.6)
each_view = pytest.mark.parametrize("objective", [VIEW_B, VIEW_A], ids=["B", "A"])


def leaves():
    return GAIN.clone().requires_grad_(), SHIFT.clone().requires_grad_()


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def setting(objective, sampler, gain, shift):
    """The chain, its running cost: what the sampler really does under this objective's policy."""
    steps = Steps.of(sampler)
    spread = objective.action_std(sampler.sigma[:-1])
    chain = linear_policy.chain(DATA, sampler.table, steps, gain, shift, action_std=spread)
    return chain, linear_policy.kl_cost(objective.kl_weight * steps.cost, gain, shift)


def exact_gradient(objective, sampler, gain=GAIN, shift=SHIFT):
    """Gradient of the discrete objective, through the forward moment recursion."""
    gain, shift = gain.clone().requires_grad_(), shift.clone().requires_grad_()
    chain, running = setting(objective, sampler, gain, shift)
    laws = linear_policy.moments(chain, START)
    means = torch.stack([law.mean for law in laws[:-1]])
    spreads = torch.stack([law.covariance for law in laws[:-1]])
    paid = running.expectation(Gaussian(means, spreads)).sum()
    return flat(torch.autograd.grad(REWARD.expectation(laws[-1]) + paid, (gain, shift)))


def roll_out(objective, sampler):
    """Quadrature paths through production code, with the exact value function of their chain.

    Two nodes a variable integrate degree 3 exactly, and none has more: one from the score function,
    two from reward, cost or value.
    """
    random = isinstance(objective, ScoreAsActionSampled)
    # the first step of the quadrature rule is the start's randomness
    widths = torch.cat([torch.ones(1, dtype=torch.float64), sampler.grid.steps])
    product = ctrl.noise.gauss_hermite(widths, nodes=2, noise=(2,), action=(2,) if random else None)
    root = torch.linalg.cholesky(START.covariance)
    start = START.mean + product.increments[:, 0] @ root.T
    drawn = product.actions[:, 1:] if random else None
    noise = ctrl.Noise(product.increments[:, 1:], drawn, product.weights)

    score = linear_policy.linear_score(DATA, sampler.table, GAIN, SHIFT)
    policy = objective.policy(score, lambda t: sampler.table.sigma(1 - t))
    problem = linear_policy.problem(DATA, sampler.table, REWARD, BETA, sampler.eta)
    paths = ctrl.simulate(problem, policy, start, sampler.grid, solver=sampler, noise=noise)

    before, times = paths.states[:, :-1], sampler.grid.nodes[:-1]
    pretrained = linear_policy.linear_score(DATA, sampler.table, 0 * GAIN, 0 * SHIFT)
    means = torch.stack([score(t, x) for t, x in zip(times, before.unbind(1), strict=True)], 1)
    references = torch.stack(
        [pretrained(t, x) for t, x in zip(times, before.unbind(1), strict=True)], 1
    )
    chain, running = setting(objective, sampler, GAIN, SHIFT)
    values = linear_policy.chain_values(chain, REWARD, running)
    rollout = Rollout(
        states=paths.states,
        means=means,
        actions=paths.actions,
        noises=noise.increments / sampler.grid.steps.sqrt().view(1, -1, 1),
        reference_scores=references,
        costs=path_kl_per_step(means, references, sampler.integrated_g2, factor=sampler.kl_factor),
        values=torch.stack([v(x) for v, x in zip(values, paths.states.unbind(1), strict=True)], 1),
        rewards=REWARD(paths.states[:, -1]),
        step_sizes=sampler.integrated_g2,
        condition=torch.zeros(len(start), dtype=torch.int64),
    )
    return rollout, product.weights


def rows_of(objective, sampler, rollout, gain, shift, *, node=0, **changed):
    """Every step of every path; ``node=1`` looks, wrongly, at the state after the step."""
    states = rollout.states[:, node : node + len(sampler.std)]
    change = states @ gain.T + shift

    def wide(per_step):
        return per_step.expand(len(states), -1).flatten()

    rows = DrawnRows(
        mean=(rollout.reference_scores + change).flatten(0, 1),
        old_mean=(rollout.reference_scores + change.detach()).flatten(0, 1),
        reference_score=rollout.reference_scores.flatten(0, 1),
        action=rollout.actions.flatten(0, 1),
        noise=rollout.noises.flatten(0, 1),
        advantage=objective.advantages(rollout).flatten(),
        step_size=wide(rollout.step_sizes),
        horizon=rollout.step_sizes.sum(),
        score_gain=wide(sampler.score_gain),
        std=wide(sampler.std),
        action_std=wide(objective.action_std(sampler.sigma[:-1])),
        kl_factor=sampler.kl_factor,
    )
    return replace(rows, **{name: change(rows) for name, change in changed.items()})


def estimated_gradient(objective, sampler, *, charged=None, **changed):
    """Minus the gradient of the loss (of ``charged``, if given), averaged over the paths."""
    rollout, weights = roll_out(objective, sampler)
    gain, shift = leaves()
    rows = rows_of(objective, sampler, rollout, gain, shift, **changed)
    losses = (charged or objective).loss(rows).view(len(weights), -1)
    return -flat(torch.autograd.grad((losses.sum(1) * weights).sum(), (gain, shift)))


def relative_gap(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


ROUND_OFF = 1e-11  # of 65536 paths with states, weights and whitened noise of order 1 to 1e2


# -- to round-off, on the discrete chain ----------------------------------------------------------


@each_view
@each_table
@pytest.mark.parametrize("rate", [0.0, 0.5, 1e9], ids=["return", "gae", "td"])
def test_the_losses_gradient_is_the_exact_one(objective, schedule, rate):
    """Reward and KL cost together, whether the advantage is a return or a temporal difference."""
    sampler = DDIM(1.0).bind(schedule, 3)
    found = estimated_gradient(replace(objective, gae_rate=rate), sampler)
    assert relative_gap(found, exact_gradient(objective, sampler)) < ROUND_OFF


@each_view
@pytest.mark.parametrize("eta", [0.4, 0.8])
def test_they_are_exact_at_every_eta(objective, eta):
    sampler = DDIM(eta).bind(TABLES["sd15"], 3)
    found = estimated_gradient(objective, sampler)
    assert relative_gap(found, exact_gradient(objective, sampler)) < ROUND_OFF


def test_the_samplers_own_log_ratio_gives_view_bs_gradient():
    """sum grad log p(x_{k+1} | x_k) (V_{k+1} - V_k - cost_k) - kl_weight grad cost, spelled out."""
    sampler = DDIM(1.0).bind(TABLES["sd15"], 3)
    rollout, weights = roll_out(VIEW_B, sampler)
    gain, shift = leaves()
    total = 0.0
    for k in range(3):
        score = rollout.reference_scores[:, k] + rollout.states[:, k] @ gain.T + shift
        step = torch.full((len(weights),), k)
        rows = rows_of_steps(sampler, step, rollout.noises[:, k], score, score.detach())
        log_ratio = transition_log_ratio(rows)
        gained = rollout.values[:, k + 1] - rollout.values[:, k] - BETA * rollout.costs[:, k]
        cost = path_kl_per_step(
            score[:, None], rollout.reference_scores[:, k : k + 1], sampler.integrated_g2[k : k + 1]
        )[:, 0]
        total = total + (weights * (log_ratio * gained - BETA * cost)).sum()
    found = flat(torch.autograd.grad(total, (gain, shift)))
    assert relative_gap(found, exact_gradient(VIEW_B, sampler)) < ROUND_OFF


@each_view
def test_temporal_differences_have_mean_zero_given_the_state(objective):
    """The value function is the chain's own: what makes the two kinds of advantage agree."""
    sampler = DDIM(1.0).bind(TABLES["linear"], 3)
    rollout, weights = roll_out(objective, sampler)
    gained = rollout.values.diff(dim=1) - BETA * rollout.costs
    x = rollout.states[:, :-1]
    for test_function in (torch.ones_like(x[..., 0]), x[..., 0], x[..., 0] * x[..., 1]):
        terms = weights[:, None] * gained * test_function
        assert (terms.sum(0).abs() < ROUND_OFF * terms.abs().sum(0)).all()


# -- wrong variants are seen ----------------------------------------------------------------------

SAMPLER = DDIM(1.0).bind(TABLES["sd15"], 3)
WRONG = {
    "score function at the next state": {"node": 1},
    "half the score gain": {
        "score_gain": lambda rows: rows.score_gain / 2,
        "action_std": lambda rows: rows.action_std * 2,
    },
    "variance for standard deviation": {
        "std": lambda rows: rows.std.square(),
        "action_std": lambda rows: rows.action_std.square(),
    },
    "noise of the other sign": {
        "noise": lambda rows: -rows.noise,
        "action": lambda rows: 2 * rows.old_mean - rows.action,
    },
    "mean over coordinates": {"advantage": lambda rows: rows.advantage / 2},
    "KL of another eta": {"kl_factor": lambda rows: 1.25**2},
    "steps of one in the KL": {"step_size": lambda rows: torch.ones_like(rows.step_size)},
}


@each_view
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_loss_is_seen(objective, wrong):
    found = estimated_gradient(objective, SAMPLER, **wrong)
    assert relative_gap(found, exact_gradient(objective, SAMPLER)) > 1e-2


@each_view
def test_a_loss_without_its_kl_cost_is_seen(objective):
    free = replace(objective, kl_weight=0.0)
    found = estimated_gradient(objective, SAMPLER, charged=free)
    assert relative_gap(found, exact_gradient(objective, SAMPLER)) > 1e-2


@each_view
def test_a_return_that_forgets_the_kl_to_come_is_seen(objective):
    rollout = roll_out(objective, SAMPLER)[0]
    returns = rollout.rewards[:, None].expand_as(rollout.costs).flatten()
    found = estimated_gradient(objective, SAMPLER, advantage=lambda rows: returns)
    assert relative_gap(found, exact_gradient(objective, SAMPLER)) > 1e-2


# -- from one view to the other, and to continuous time -------------------------------------------


def test_view_a_tends_to_view_b_as_exploration_shrinks():
    """Drawn actions add their variance to the states': second order in the exploration."""
    sampler = DDIM(1.0).bind(TABLES["sd15"], 10)
    expected = exact_gradient(VIEW_B, sampler)
    gaps = [
        relative_gap(exact_gradient(replace(VIEW_A, exploration=size), sampler), expected)
        for size in (0.2, 0.1)
    ]
    assert gaps[0] > 1e-3
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=1e-6)  # a quadratic J is exactly so


def refined(objective, schedule, gain, shift):
    """Gradients at 125, 250 and 500 steps, and int g^2 from the data to either end."""
    samplers = [DDIM(1.0).bind(schedule, steps) for steps in (125, 250, 500)]
    ends = -samplers[0].alpha_bar.log()[[0, -1]]
    return [exact_gradient(objective, s, gain, shift) for s in samplers], ends


@cache
def continuous_gradient(noisy, clean):
    gain, shift = leaves()
    value = linear_policy.continuous_value(
        DATA, UNIT_CLOCK, START, noisy, clean, gain, shift, REWARD, BETA
    )
    return flat(torch.autograd.grad(value, (gain, shift)))


@each_view
@each_table
def test_by_refinement_both_tend_to_the_gradient_of_continuous_time(objective, schedule):
    found, ends = refined(objective, schedule, GAIN, SHIFT)
    assert_first_order(found, continuous_gradient(*ends.tolist()))


@each_view
@each_table
def test_by_refinement_a_pure_shifts_gradient_tends_to_its_closed_form(objective, schedule):
    """dJ/dc = G'(l - Q (m + G c)) - kl_weight c int g^2, m and G in closed form."""
    found, (noisy, clean) = refined(objective, schedule, 0 * GAIN, SHIFT)
    response = shift_response(DATA, UNIT_CLOCK, noisy, clean)
    arrived = transition(DATA, UNIT_CLOCK, noisy, clean).after(START).mean + response @ SHIFT
    expected = response.T @ REWARD.gradient(arrived) - BETA * (noisy - clean) * SHIFT
    assert_first_order([gradient[-2:] for gradient in found], expected)


def assert_first_order(found, expected):
    """Halving the steps halves the error (20 %: the second order), down to a percent."""
    gaps = [relative_gap(gradient, expected) for gradient in found]
    assert gaps[-1] < 0.02
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.2)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.2)
