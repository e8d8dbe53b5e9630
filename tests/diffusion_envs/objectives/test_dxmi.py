"""Steps that climb a value, against the exact gradients of a linear Gaussian model."""

import math
from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from diffusion_envs.exact import linear_policy
from diffusion_envs.exact.gaussian import Gaussian, Quadratic
from diffusion_envs.objectives import ContinuousDxMI, ContinuousDxMIReleased, DxMI, Rows
from diffusion_envs.objectives.dxmi import ValueRows, usual_move
from diffusion_envs.samplers import DDIM, BoundDDIM
from tests.diffusion_envs.objectives.small_runs import assert_runs_and_resumes, numbers, trainer
from tests.diffusion_envs.test_two_views import (
    BETA,
    DATA,
    GAIN,
    REWARD,
    SHIFT,
    START,
    TABLES,
    VIEW_B,
    exact_gradient,
    flat,
    leaves,
    relative_gap,
    roll_out,
    rows_of,
)

SD15 = TABLES["sd15"]
ROWS, EVENT = 5, (3, 2, 2)
ROUND_OFF = 1e-11


def rows(generator: torch.Generator) -> ValueRows:
    """Rows with a value that is a cubic polynomial of the state."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mean = normal(ROWS, *EVENT).requires_grad_()
    state, gain = normal(ROWS, *EVENT), 0.2 + normal(ROWS).square()
    weight = normal(2, *EVENT)
    return ValueRows(
        mean=mean,
        old_mean=normal(ROWS, *EVENT),
        reference_score=normal(ROWS, *EVENT),
        noise=normal(ROWS, *EVENT),
        advantage=normal(ROWS),
        step_size=0.1 + normal(ROWS).square(),
        horizon=torch.tensor(4.3, dtype=torch.float64),
        score_gain=gain,
        std=0.3 + normal(ROWS).square(),
        kl_factor=1.37,
        state=state,
        next_mean=1.1 * state + gain.view(-1, 1, 1, 1) * mean,
        value=lambda x: (weight[0] * x.pow(3)).flatten(1).sum(1),
        next_value=lambda x: (weight[1] * x.pow(3)).flatten(1).sum(1),
    )


def after(r: ValueRows) -> Tensor:
    """The next state, written out."""
    gain, std = (v.view(-1, 1, 1, 1) for v in (r.score_gain, r.std))
    return 1.1 * r.state + gain * r.mean + std * r.noise


def path_kl(r: ValueRows) -> Tensor:
    gap = (r.mean - r.reference_score).square().flatten(1).sum(1)
    return 0.5 * 1.37 * r.step_size * gap


def test_the_loss_of_dxmi(generator):
    r = rows(generator)
    assert r.next_value is not None
    moves = (after(r) - r.state).square().flatten(1).mean(1)
    moves = moves / (2 * 2 * (1 - torch.exp(-r.step_size / 2)))
    expected = 0.3 * moves - 0.2 * r.std.log() + 0.4 * path_kl(r) - r.next_value(after(r))
    got = DxMI(entropy_weight=0.2, move_weight=0.3, kl_weight=0.4).loss(r)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip", [math.inf, 0.3])
def test_the_loss_of_the_continuous_variant(clip, generator):
    r = rows(generator)
    assert r.value is not None
    x = r.state.clone().requires_grad_()
    (slope,) = torch.autograd.grad(r.value(x).sum(), x)
    moves = (after(r).clamp(-4 * clip, 4 * clip) - r.state).clamp(-clip, clip)
    gain = (slope * moves).flatten(1).sum(1).clamp(-5 * clip, 5 * clip)
    objective = ContinuousDxMI(
        kl_weight=0.4, move_clip=clip, state_clip=4 * clip, gain_clip=5 * clip
    )
    expected = 0.4 * path_kl(r) - gain
    torch.testing.assert_close(objective.loss(r), expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(objective.loss(r).sum(), r.mean)[0]
    want = torch.autograd.grad(expected.sum(), r.mean)[0]
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_the_released_variant_takes_the_next_nodes_value_where_the_step_begins(generator):
    """grad V(t_{k+1}, x_k), written out for the cubic value; clips of pixels."""
    r = rows(generator)
    assert r.next_value is not None
    assert r.state is not None
    place = torch.ones_like(r.state, requires_grad=True)
    (slope_at_one,) = torch.autograd.grad(r.next_value(place).sum(), place)
    with torch.no_grad():
        slope = slope_at_one * r.state.square()  # 3 w x^2
        steps = (after(r).clamp(-1, 1) - r.state).clamp(-0.1, 0.1)
        expected = -(slope * steps).flatten(1).sum(1).clamp(-1, 1)
    loss = ContinuousDxMIReleased().loss(r).detach()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_the_share_that_is_logged_is_the_share_without_a_gradient(generator):
    r = rows(generator)
    objective = ContinuousDxMIReleased(gain_clip=math.inf)
    (slope,) = torch.autograd.grad(objective.loss(r).sum(), r.mean)
    still = (slope == 0).flatten(1).double().mean(1)
    torch.testing.assert_close(objective.clipped(r), still)
    assert 0 < float(still.mean()) < 1
    assert ContinuousDxMI().clipped(r).abs().max() == 0


def test_entropy_is_a_constant_as_long_as_the_sampler_fixes_its_noise(generator):
    r = rows(generator)
    with_it, without = (
        torch.autograd.grad(DxMI(entropy_weight=w).loss(r).sum(), r.mean, retain_graph=True)[0]
        for w in (0.7, 0.0)
    )
    assert torch.equal(with_it, without)


def test_the_usual_move_is_that_of_the_noising_process():
    """Data N(0, 1), whose exact sampler walks the noising process backwards."""
    sampler = DDIM(1.0).bind(SD15, 20)
    kept = (-0.5 * sampler.integrated_g2).exp()  # correlation of neighbouring states
    expected = 1 + 1 - 2 * kept
    torch.testing.assert_close(usual_move(sampler.integrated_g2), expected, rtol=1e-10, atol=0)


# -- exact expectations ---------------------------------------------------------------------------


def values_of(sampler: BoundDDIM, kl_weight: float) -> list[Quadratic]:
    """The value of the policy's own chain at every node."""
    steps = linear_policy.Steps.of(sampler)
    chain = linear_policy.chain(DATA, sampler.table, steps, GAIN, SHIFT)
    running = linear_policy.kl_cost(kl_weight * steps.cost, GAIN, SHIFT)
    return linear_policy.chain_values(chain, REWARD, running)


def estimated(
    objective: DxMI | ContinuousDxMI, sampler: BoundDDIM, charged: float | None = None
) -> Tensor:
    """Minus the gradient of the loss, averaged over quadrature paths, with the exact value.

    The value is charged with the objective's KL, or with ``charged`` per nat if that is given.
    """
    steps = len(sampler.std)
    rollout, weights = roll_out(VIEW_B, sampler)
    values = values_of(sampler, objective.kl_weight if charged is None else charged)

    def at(first: int):
        def value(x: Tensor) -> Tensor:
            columns = x.view(-1, steps, 2).unbind(1)
            pairs = zip(values[first : first + steps], columns, strict=True)
            return torch.stack([v(column) for v, column in pairs], dim=1).flatten()

        return value

    gain, shift = leaves()
    r = rows_of(VIEW_B, sampler, rollout, gain, shift)
    state = rollout.states[:, :-1].flatten(0, 1)
    paths = len(weights)
    state_gain, score_gain = (
        v.expand(paths, -1).flatten()[:, None] for v in (sampler.state_gain, sampler.score_gain)
    )
    r = ValueRows(
        **{f.name: getattr(r, f.name) for f in fields(Rows)},
        state=state,
        next_mean=state_gain * state + score_gain * r.mean,
        value=at(0),
        next_value=at(1),
    )
    losses = objective.loss(r).view(paths, steps)
    return -flat(torch.autograd.grad((losses.sum(1) * weights).sum(), (gain, shift)))


@pytest.mark.parametrize("schedule", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("kl_weight", [0.0, BETA])
def test_with_the_exact_value_dxmi_has_the_exact_gradient(schedule, kl_weight):
    sampler = DDIM(1.0).bind(schedule, 3)
    found = estimated(DxMI(kl_weight=kl_weight, move_weight=0.0), sampler)
    exact = exact_gradient(replace(VIEW_B, kl_weight=kl_weight), sampler)
    assert relative_gap(found, exact) < ROUND_OFF


def test_a_value_that_is_not_charged_with_the_kl_is_seen():
    sampler = DDIM(1.0).bind(SD15, 3)
    free = estimated(DxMI(kl_weight=BETA, move_weight=0.0), sampler, charged=0.0)
    assert relative_gap(free, exact_gradient(VIEW_B, sampler)) > 1e-2


def exact_with_moves(sampler: BoundDDIM, weight: float) -> Tensor:
    """Gradient of E[r] - weight * sum of |x' - x|^2 / (2 q d), by the recursion of moments."""
    gain, shift = leaves()
    steps = linear_policy.Steps.of(sampler)
    chain = linear_policy.chain(DATA, sampler.table, steps, gain, shift)
    unit, total, law = torch.eye(2, dtype=torch.float64), torch.zeros(()).double(), START
    q = 2 * (1 - torch.exp(-sampler.integrated_g2 / 2))
    for k in range(len(steps.std)):
        move = chain.matrix[k] - unit
        mean = move @ law.mean + chain.shift[k]
        square = mean.square().sum() + torch.trace(move @ law.covariance @ move.T)
        square = square + torch.trace(chain.covariance[k])
        total = total - weight * square / (2 * q[k] * 2)
        law = chain[k].after(law)
    return flat(torch.autograd.grad(REWARD.expectation(law) + total, (gain, shift)))


def test_moves_are_charged_to_their_own_step_alone():
    """What the value does not know: that a step changes the later moves."""
    sampler = DDIM(1.0).bind(SD15, 3)
    for weight, missing in ((0.01, 0.0241), (0.1, 0.2589)):
        found = estimated(DxMI(move_weight=weight), sampler)
        exact = exact_with_moves(sampler, weight)
        assert relative_gap(found, exact) == pytest.approx(missing, abs=2e-4)


@cache
def continuous_gradient(steps: int, offset: int = 0) -> Tensor:
    """Exact expectation of the variant's gradient: sum_k score_gain_k E[grad V_k(x) (x, 1)].

    V_{k + offset}: the value of the step's end at its beginning if that is 1.
    """
    sampler = DDIM(1.0).bind(SD15, steps)
    values = values_of(sampler, 0.0)
    laws = linear_policy.moments(
        linear_policy.chain(DATA, sampler.table, linear_policy.Steps.of(sampler), GAIN, SHIFT),
        START,
    )
    gain, shift = torch.zeros(2, 2).double(), torch.zeros(2).double()
    for k in range(steps):
        law: Gaussian = laws[k]
        value = values[k + offset]
        slope = value.gradient(law.mean)
        product = slope[:, None] * law.mean - value.curvature @ law.covariance
        gain, shift = gain + sampler.score_gain[k] * product, shift + sampler.score_gain[k] * slope
    return flat((gain, shift))


def test_the_continuous_variants_gradient_is_its_exact_expectation():
    found = estimated(ContinuousDxMI(), DDIM(1.0).bind(SD15, 3))
    assert relative_gap(found, continuous_gradient(3)) < ROUND_OFF


def time_independent_gradient(steps: int, nodes: int = 40) -> Tensor:
    """The same for one V of all nodes: the least-squares fit to V_k, in equal shares of all nodes.

    V(x) = sum_k p_k(x) V_k(x) / sum_k p_k(x), p_k the density of x_k; by quadrature over x_k.
    """
    sampler = DDIM(1.0).bind(SD15, steps)
    values = values_of(sampler, 0.0)
    chain = linear_policy.chain(DATA, sampler.table, linear_policy.Steps.of(sampler), GAIN, SHIFT)
    laws = linear_policy.moments(chain, START)
    roots = [torch.linalg.cholesky(laws[k].covariance) for k in range(steps + 1)]
    densities = [MultivariateNormal(laws[k].mean, scale_tril=root) for k, root in enumerate(roots)]
    point, weight = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(nodes))
    grid = torch.cartesian_prod(point, point)
    weights = torch.cartesian_prod(weight, weight).prod(1) / weight.sum() ** 2
    gain, shift = torch.zeros(2, 2).double(), torch.zeros(2).double()
    for k in range(steps):
        x = (laws[k].mean + grid @ roots[k].T).requires_grad_()
        shares = torch.stack([p.log_prob(x) for p in densities]).softmax(0)
        value = (shares * torch.stack([v(x) for v in values])).sum()
        slope = sampler.score_gain[k] * weights[:, None] * torch.autograd.grad(value, x)[0]
        gain, shift = gain + slope.T @ x.detach(), shift + slope.sum(0)
    return flat((gain, shift))


# Size over the exact gradient's, and angle to it in degrees, at 10, 20, 50 steps.
SIZES = {
    "V(t_k, .)": (0.820, 5.60, 0.899, 2.59, 0.957, 1.00),
    "V(t_{k+1}, .)": (1.062, 3.87, 1.032, 2.12, 1.014, 0.88),
    "V": (1.315, 13.41, 1.459, 14.05, 1.551, 14.20),
}


@pytest.mark.parametrize(("value", "expected"), SIZES.items(), ids=SIZES)
def test_which_value_the_continuous_variant_climbs_has_a_known_size(value, expected):
    """``ContinuousDxMI``, its released form, and the code's value, which does not see the time."""
    seen = []
    for steps in (10, 20, 50):
        exact = exact_gradient(replace(VIEW_B, kl_weight=0.0), DDIM(1.0).bind(SD15, steps))
        gradient = (
            time_independent_gradient(steps)
            if value == "V"
            else continuous_gradient(steps, int("+1" in value))
        )
        cosine = float(torch.cosine_similarity(gradient, exact, dim=0))
        seen += [float(gradient.norm() / exact.norm()), math.degrees(math.acos(cosine))]
    assert seen == pytest.approx(expected, abs=6e-3)


def test_the_released_gradient_without_clips_is_its_exact_expectation():
    unclipped = ContinuousDxMIReleased(move_clip=math.inf, state_clip=math.inf, gain_clip=math.inf)
    found = estimated(unclipped, DDIM(1.0).bind(SD15, 3))
    assert relative_gap(found, continuous_gradient(3, 1)) < ROUND_OFF


# Relative gap, largest component, by number of steps.
MISSING = {10: 0.175, 20: 0.104, 40: 0.056}


def test_the_continuous_variant_is_right_to_first_order_in_the_step():
    free = replace(VIEW_B, kl_weight=0.0)
    gaps = {
        n: relative_gap(continuous_gradient(n), exact_gradient(free, DDIM(1.0).bind(SD15, n)))
        for n in (10, 20, 40, 160, 320)
    }
    for n, expected in MISSING.items():
        assert gaps[n] == pytest.approx(expected, abs=6e-4)
    assert gaps[160] / gaps[320] == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize(
    ("steps", "mean", "first"), [(20, 0.755, 0.880), (50, 0.686, 0.828)], ids=["20", "50"]
)
def test_the_published_clip_of_moves_leaves_few_coordinates(steps, mean, first, generator):
    """Noise alone, Stable Diffusion's schedule: P(|std z| > 0.1), and what the loss then sees."""
    sampler = DDIM(1.0).bind(SD15, steps)
    outside = 1 - torch.special.erf(0.1 / (sampler.std * 2**0.5))
    assert float(outside.mean()) == pytest.approx(mean, abs=5e-4)
    assert float(outside[0]) == pytest.approx(first, abs=5e-4)
    assert int((outside < 0.5).sum()) == (1 if steps == 20 else 5)
    dim = 4000
    noise = torch.randn(steps, dim, generator=generator, dtype=torch.float64)
    zero, zeros = 0 * noise, sampler.std * 0
    r = ValueRows(
        mean=zero,
        old_mean=zero,
        reference_score=zero,
        noise=noise,
        advantage=zeros,
        step_size=sampler.integrated_g2,
        horizon=sampler.integrated_g2.sum(),
        score_gain=sampler.score_gain,
        std=sampler.std,
        kl_factor=1.0,
        state=zero,
        next_mean=zero,
        value=lambda x: x,
        next_value=lambda x: x,
    )
    still = ContinuousDxMIReleased(state_clip=math.inf).clipped(r)
    assert (still - outside).abs().max() < 5 * 0.5 / dim**0.5


# -- the rest -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        (DxMI, {"kl_weight": -1.0}, "kl_weight"),
        (DxMI, {"entropy_weight": -1.0}, "entropy_weight"),
        (DxMI, {"move_weight": math.nan}, "move_weight"),
        (DxMI, {"learning_rate": 0.0}, "learning_rate"),
        (ContinuousDxMI, {"move_clip": 0.0}, "move_clip"),
        (ContinuousDxMI, {"state_clip": -1.0}, "state_clip"),
        (ContinuousDxMIReleased, {"gain_clip": math.nan}, "gain_clip"),
    ],
)
def test_bad_settings_are_refused_by_name(kind, settings, name):
    with pytest.raises(ValueError, match=name):
        kind(**settings)


@pytest.mark.parametrize("kind", [DxMI, ContinuousDxMI, ContinuousDxMIReleased])
def test_it_runs_in_the_loop_and_resumes_to_the_same_numbers(kind):
    """One reward query a sample: the value learns from terminal rewards alone."""
    assert_runs_and_resumes(kind(), queries=12)


def test_the_value_learns_the_reward_at_the_last_node_too():
    run = trainer(DxMI(), samples=96, value_epochs=30)
    rollout = run.sample().rollout
    ends, paths = rollout.states[:, -1], torch.arange(96)
    node = torch.full((96,), 4)

    def unexplained() -> float:
        with torch.no_grad():
            gap = run.critic.at(rollout)(node, ends, paths) - rollout.rewards
        return float(gap.var() / rollout.rewards.var())

    assert unexplained() == pytest.approx(1, abs=1e-6)  # a constant
    numbers(run, 3)
    assert unexplained() < 0.5
