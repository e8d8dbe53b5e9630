"""Agents learn what is known exactly, and refuse what would spoil them."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch

import ctrl
from ctrl import agents
from ctrl import martingale as mg
from ctrl import q_learning as ql
from tests.ctrl import lq_chain as lq

POINTS = torch.tensor([[-1.0], [0.3], [1.2]], dtype=torch.float64)


class TableValue(torch.nn.Module):
    """p_k x^2 / 2 + l_k x + c_k at every node: contains the exact value."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))

    def forward(self, t, x):
        k = int((lq.NODES - t).abs().argmin())
        x = x[:, 0]
        return self.table[k] @ torch.stack([x.square() / 2, x, torch.ones_like(x)])


def exact_table(theta):
    return torch.tensor([[float(v.detach()) for v in row] for row in lq.values(*theta)])


@pytest.fixture(scope="module")
def setting():
    theta = lq.parameters()
    problem, policy = lq.problem(), lq.policy(*theta)
    return theta, problem, policy, lq.paths(problem, policy)


def spread_start(problem, policy):
    """The same chain from three starts, so that the value is seen as a function."""
    noise = ctrl.noise.gauss_hermite(lq.GRID.steps, nodes=3, noise=(1,), action=(1,))
    many = len(noise.increments)
    wide = ctrl.Noise(
        noise.increments.repeat(3, 1, 1), noise.actions.repeat(3, 1, 1), noise.weights.repeat(3) / 3
    )
    start = POINTS.repeat_interleave(many, dim=0)
    return ctrl.simulate(problem, policy, start, lq.GRID, noise=wide)


def test_policy_evaluation_finds_the_exact_value(setting):
    """On quadrature paths nothing is random, so L-BFGS ends at the chain's value to round-off."""
    theta, problem, policy, _ = setting
    paths, value = spread_start(problem, policy), TableValue()
    detached = lq.policy(*[v.detach() for v in theta])

    def loss(paths):
        return mg.martingale_loss(value, problem, paths, detached)

    optimiser = torch.optim.Adam(value.parameters(), lr=0.3)
    losses = []
    for seen in agents.evaluate(loss, lambda: paths, optimiser, updates=250):
        losses.append(float(agents.descent.expectation(loss(seen), seen).detach()))
        for group in optimiser.param_groups:
            group["lr"] *= 0.97
    gap = value.table.detach()[:3] - exact_table(theta)[:3]
    assert float(gap.abs().max()) < 0.02
    assert losses[-1] < losses[0]


def test_actor_critic_and_q_learning_improve_the_exact_performance(setting):
    start = float(lq.performance(lq.values(*setting[0])).detach())

    def trained(agent):
        theta, problem = lq.parameters(), lq.problem()
        policy, value = lq.policy(*theta), TableValue()
        with torch.no_grad():
            value.table.copy_(exact_table(theta))
        sample = lambda: spread_start(problem, lq.policy(*[v.detach() for v in theta]))
        for _ in agent(problem, policy, value, sample, theta):
            pass
        return float(lq.performance(lq.values(*theta)).detach())

    def actor_critic(problem, policy, value, sample, theta):
        return agents.actor_critic(
            problem, policy, value, sample,
            torch.optim.SGD(theta, lr=0.3), torch.optim.SGD(value.parameters(), lr=0.3), 60,
            critic_loss=lambda paths: mg.martingale_loss(value, problem, paths, policy),
        )  # fmt: skip

    def q_learning(problem, policy, value, sample, theta):
        q = ql.GibbsQ(policy, problem.temperature)
        optimiser = torch.optim.SGD([*theta, *value.parameters()], lr=0.5)
        return agents.q_learning(problem, value, q, sample, optimiser, 60)

    for agent in (actor_critic, q_learning):
        assert trained(agent) > start + 0.02, agent.__name__


def test_cppo_improves_and_holds_its_kl_at_the_target():
    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = torch.nn.Parameter(torch.tensor([-0.6, 0.25], dtype=torch.float64))

    problem, module, value = lq.problem(), Mean(), TableValue()
    log_std = torch.tensor(-0.4, dtype=torch.float64)
    policy_of = lambda m: lq.policy(m.theta[0], m.theta[1], log_std)
    with torch.no_grad():
        value.table.copy_(exact_table([*module.theta, log_std]))

    def performance():
        return float(lq.performance(lq.values(*module.theta.detach(), log_std)))

    before, penalties, spreads = performance(), [], []
    sample = lambda: spread_start(problem, policy_of(module.requires_grad_(True)))
    loop = agents.cppo(
        problem, module, policy_of, value, sample,
        torch.optim.SGD(module.parameters(), lr=0.05),
        torch.optim.SGD(value.parameters(), lr=0.05), 30, target=0.02, penalty=0.1,
    )  # fmt: skip
    last = module.theta.detach().clone()
    for paths, penalty in loop:
        old, new = (lq.policy(m[0], m[1], log_std) for m in (last, module.theta.detach()))
        kl = ctrl.paths.over_steps(lambda t, x: ctrl.policy_kl(new, old, t, x), paths)  # noqa: B023  # called at once
        spreads.append(float(agents.descent.expectation(kl.sqrt().mean(1), paths)))
        penalties.append(penalty)
        last = module.theta.detach().clone()
    assert performance() > before + 0.005
    # a factor 1.5 a time holds the spread within a few factors of the target, once adapted
    assert max(spreads[10:]) < 4 * 0.02
    assert len(set(penalties)) > 1


def test_policy_iteration_is_newtons_method_on_the_ergodic_problem():
    """Exact evaluation by CLSTD at rest, exact improvement by the Gibbs policy ([TZ24]).

    The optimal gain solves B^2 k^2 / N = M - 2 A k ..., here by scipy's Riccati solver.
    """
    a, b, s, m, n, temperature, h = -0.4, 0.9, 0.6, 1.7, 0.5, 0.2, 1e-4
    sde = ctrl.ControlledSDE(lambda t, x, u: a * x + b * u, lambda t, x: s)
    cost = lambda t, x, u: -0.5 * (m * x.square() + n * u.square()).squeeze(1)
    problem = ctrl.ControlProblem(sde, math.inf, cost, temperature=temperature)
    grid = ctrl.TimeGrid(torch.tensor([0.0, h], dtype=torch.float64))
    one = torch.ones(1, dtype=torch.float64)

    def evaluate(policy):
        gain = float(policy.mean(one[0], one[:, None]))
        std = math.sqrt(temperature / n)
        keep = 1 + h * (a + b * gain)
        at_rest = (s**2 * h + (h * b * std) ** 2) / (1 - keep**2)
        noise = ctrl.noise.gauss_hermite(
            torch.tensor([at_rest, h], dtype=torch.float64), nodes=4, action=(1,)
        )
        later_noise = ctrl.Noise(
            noise.increments[:, 1:].contiguous(), noise.actions[:, 1:].contiguous(), noise.weights
        )
        start = noise.increments[:, 0].contiguous()
        paths = ctrl.simulate(problem, policy, start, grid, noise=later_noise)
        return mg.clstd(lambda t, x: x.square(), problem, paths, policy, ergodic=True)

    def improve(value):
        improved = ql.gibbs_policy(problem, value, 1, one)
        gain = float(improved.mean(one[0], one[:, None]))
        return ctrl.GaussianPolicy(lambda t, x: gain * x, math.sqrt(temperature / n))

    first = ctrl.GaussianPolicy(lambda t, x: -0.1 * x, math.sqrt(temperature / n))
    gains = [
        float(policy.mean(one[0], one[:, None]))
        for _, policy in agents.policy_iteration(first, evaluate, improve, 6)
    ]
    riccati = scipy.linalg.solve_continuous_are(*(np.array([[v]]) for v in (a, b, m, n)))
    assert gains[-1] == pytest.approx(-b * riccati[0, 0] / n, rel=20 * h)  # the chain's O(h)
    errors = [abs(gain - gains[-1]) for gain in gains[:-1]]
    for error, following in itertools.pairwise(errors[:3]):
        # Newton on a quadratic, but for O(h) of linear convergence
        assert following < 0.6 * error**2 + 20 * h * error


def test_a_spoilt_gradient_takes_no_step():
    theta = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimiser = torch.optim.Adam([theta], lr=0.1)
    for loss in (theta.sum() * math.nan, (theta - theta.detach()).abs().sqrt().sum()):
        with pytest.raises(FloatingPointError, match="no step"):
            agents.descend(loss, optimiser)
        torch.testing.assert_close(theta.detach(), torch.tensor([1.0, 2.0]))
    agents.descend(theta.square().sum(), optimiser)
    assert float(theta.detach()[0]) < 1


def test_only_what_the_optimiser_holds_gets_a_gradient():
    theta, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    agents.descend((theta * other).sum(), torch.optim.SGD([theta], lr=0.1))
    assert other.grad is None


def test_online_agents_are_for_ergodic_problems():
    theta = lq.parameters()
    policy = lq.policy(*theta)
    optimiser = torch.optim.SGD(theta, lr=0.1)
    start = torch.zeros(2, 1, dtype=torch.float64)
    value = TableValue()
    q = ql.GibbsQ(policy, 0.1)
    loops = (
        agents.online_actor_critic(
            lq.problem(), policy, value, start, 0.1, 3, optimiser, optimiser, torch.Generator()
        ),
        agents.online_q_learning(
            lq.problem(), policy, value, q, start, 0.1, 3, optimiser, torch.Generator()
        ),
    )
    for loop in loops:
        with pytest.raises(ValueError, match="ergodic"):
            next(iter(loop))
    with pytest.raises(ValueError, match="iterations"):
        next(agents.policy_iteration(policy, lambda p: value, lambda v: policy, 0))


def online(method, problem, policy, **settings):
    """Three steps of an online agent: its steps, and what it learns."""
    slope = torch.nn.Parameter(torch.tensor(-0.4, dtype=torch.float64))
    value = lambda t, x: slope * x[:, 0].square()
    start = torch.tensor([[0.5], [-0.8]], dtype=torch.float64)
    common = {"generator": torch.Generator().manual_seed(5), **settings}
    sizes = {"start": start, "step_size": 0.2, "steps": 3}
    critic = torch.optim.SGD([slope], lr=0.1)
    if method == "actor-critic":
        actor = torch.optim.SGD(policy[1], lr=0.1)
        return agents.online_actor_critic(
            problem, policy[0], value, actor=actor, critic=critic, **sizes, **common
        )
    q = ql.GibbsQ(policy[0], 0.1)
    both = torch.optim.SGD([slope, *policy[1]], lr=0.1)
    return agents.online_q_learning(problem, policy[0], value, q, optimiser=both, **sizes, **common)


def endless(wave=lambda t: 0.0):
    sde = ctrl.ControlledSDE(lambda t, x, a: (1 + wave(t)) * (a - x), lambda t, x: 0.5)
    return ctrl.ControlProblem(
        sde, math.inf, lambda t, x, a: 0.7 - x.square().sum(1), temperature=0.1
    )


def learner(wave=lambda t: 0.0):
    gain = torch.nn.Parameter(torch.tensor(-0.6, dtype=torch.float64))
    return ctrl.GaussianPolicy(lambda t, x: (1 + wave(t)) * gain * x, 0.5), [gain]


@pytest.mark.parametrize("method", ["actor-critic", "q-learning"])
def test_the_average_reward_learns_at_its_rate_times_the_schedule(method):
    """The first update is what follows from the first step alone; so is every later one's sign."""
    schedule = lambda time: 1 / (2 + 10 * time)
    moves = {}
    for rate in (0.0, 0.3):
        steps = online(
            method, endless(), learner(), average_rate=rate, schedule=schedule, average_reward=0.2
        )
        moves[rate] = [step.average_reward for step in steps]
    assert moves[0.0] == [0.2] * 3
    # without a schedule the first move is twice as large, and the second would be no third of it
    plain = [
        step.average_reward - 0.2
        for step in online(method, endless(), learner(), average_rate=0.3, average_reward=0.2)
    ]
    assert moves[0.3][0] - 0.2 == pytest.approx(plain[0] * schedule(0.0), rel=1e-12)
    policy = learner()
    run = online(method, endless(), policy, average_rate=0.3, schedule=schedule, average_reward=0.2)
    before, slope = 0.2, -0.4
    for k, step in enumerate(run):
        paths = step.paths
        x, after = paths.states[:, 0, 0], paths.states[:, 1, 0]
        reward = 0.7 - x.square()
        if k == 0:  # with the parameters that are known: those before any update
            log_prob = ctrl.GaussianPolicy(lambda t, x: -0.6 * x, 0.5).log_prob(
                torch.tensor(0.0), paths.states[:, 0], paths.actions[:, 0]
            )
            dm = slope * (after.square() - x.square()) + 0.2 * (reward - 0.1 * log_prob - before)
            expected = before + 0.3 * schedule(0.0) * float(dm.mean())
            assert step.average_reward == pytest.approx(expected, rel=1e-12)
    assert step.average_reward != before


@pytest.mark.parametrize("method", ["actor-critic", "q-learning"])
@pytest.mark.parametrize("place", ["drift", "policy"])
@pytest.mark.parametrize("period", [1.0, 0.2])
def test_online_agents_refuse_what_changes_in_time(method, place, period):
    """0.2 is the agent's step: at the ends of its steps nothing would be seen."""
    wave = lambda t: 0.3 * torch.sin(2 * math.pi * t / period)
    problem = endless(wave) if place == "drift" else endless()
    policy = learner(wave) if place == "policy" else learner()
    with pytest.raises(ValueError, match=f"{place} must be the same at all times"):
        next(iter(online(method, problem, policy)))


@pytest.mark.parametrize("method", ["actor-critic", "q-learning"])
def test_online_agents_approach_the_ergodic_optimum(method, as_users_run_it):
    """A short run of benchmarks/ergodic_lq.py, whose long ones docs/ergodic_lq.md reports."""
    from benchmarks import ergodic_lq

    learner = ergodic_lq.Learner(method, seed=0)
    first = ergodic_lq.average_reward(*learner.parameters())
    for step in learner.steps:
        if step.time >= 4:
            break
    reached = ergodic_lq.average_reward(*learner.parameters())
    # after a hundredth of the benchmark's time half of the gap is closed
    assert ergodic_lq.AVERAGE - reached < 0.5 * (ergodic_lq.AVERAGE - first)


@pytest.mark.parametrize(("target", "factors"), [(1e-6, 2.0), (1e6, 0.5)])
def test_cppo_raises_its_penalty_above_the_target_and_lowers_it_below(target, factors):
    module = torch.nn.Linear(1, 1, bias=False).double()
    log_std = torch.tensor(-0.4, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    policy_of = lambda m: lq.policy(m.weight[0, 0], zero, log_std)
    value = TableValue()
    loop = agents.cppo(
        lq.problem(), module, policy_of, value,
        lambda: spread_start(lq.problem(), policy_of(module)),
        torch.optim.SGD(module.parameters(), lr=0.05),
        torch.optim.SGD(value.parameters(), lr=0.05), 2, target=target, penalty=1.0, factor=2.0,
    )  # fmt: skip
    assert [penalty for _, penalty in loop] == [factors, factors**2]
