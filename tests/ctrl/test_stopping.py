"""First exit: where paths end, what they are paid there, and how far that is from the truth."""

import math
from dataclasses import replace

import jaxtyping
import pytest
import torch

import ctrl
from ctrl.stopping import AtNodes, Ball, Box, BridgeCorrected, HalfSpace, Inside, Interval

SIGMA, PUSH, START = 0.9, 0.3, 0.2
SDE = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: SIGMA)
PUSHED = ctrl.DeterministicPolicy(lambda t, x: PUSH + 0 * x)
DOMAIN = Interval(-1.0, 1.0)
PROBLEM = ctrl.ControlProblem(
    SDE, math.inf, terminal_reward=lambda x: (x[:, 0] > 0).double(), domain=DOMAIN
)


def started(paths, *state):
    return torch.tensor(state, dtype=torch.float64).expand(paths, -1).clone()


def sampled(problem=PROBLEM, paths=500, steps=40, start=(START,), seed=0, **settings):
    return ctrl.simulate(
        problem,
        PUSHED,
        started(paths, *start),
        ctrl.uniform_grid(8.0, steps),
        generator=ctrl.noise.stream(seed, "exit"),
        **settings,
    )


@pytest.mark.parametrize("stopping", [AtNodes(), BridgeCorrected()])
def test_a_path_ends_where_it_leaves_and_rests_there(stopping):
    paths = sampled(stopping=stopping)
    assert paths.ends is not None
    inside = (
        DOMAIN.signed_distance(paths.grid.nodes[0], paths.states.flatten(0, 1)).view(500, -1) > 0
    )
    node = torch.arange(41)
    assert torch.equal(inside, (node < paths.ends[:, None]) | ~paths.terminated[:, None])
    if stopping == BridgeCorrected():  # absorbed at a wall, up to round-off
        end = paths.states[paths.terminated, -1]
        torch.testing.assert_close(end.abs(), torch.ones_like(end), rtol=0, atol=1e-15)


def test_between_two_nodes_a_wall_is_crossed_as_often_as_by_a_fine_path():
    """The bridge's probability, against the same path looked at 4000 times as often."""
    h, before, after = 0.5, 0.45, 0.3
    generator = ctrl.noise.stream(1, "bridge")
    dw = torch.randn(1000, 4000, generator=generator, dtype=torch.float64) * (h / 4000) ** 0.5
    w = torch.cat([torch.zeros(1000, 1), dw.cumsum(1)], dim=1)
    share = torch.linspace(0, 1, 4001, dtype=torch.float64)
    bridge = before + (after - before) * share + SIGMA * (w - share * w[:, -1:])
    # the least of a bridge seen at n nodes lies 0.5826 sigma sqrt(h / n) above its infimum
    touched = (bridge.amin(1) <= 0.5826 * SIGMA * (h / 4000) ** 0.5).double()
    exact = math.exp(-2 * before * after / (SIGMA**2 * h))
    estimate = ctrl.Estimate.of(touched)
    assert abs(estimate.mean - exact) < 5 * estimate.standard_error
    uniform = torch.rand(1000, generator=generator, dtype=torch.float64)
    step = ctrl.stopping.Step(
        SDE, torch.tensor(0.0), torch.tensor(h), started(1000, before), started(1000, after),
        started(1000, 0.0), uniform,
    )  # fmt: skip
    leaves, where = BridgeCorrected().exits(Interval(0.0, math.inf), step)
    assert torch.equal(leaves, uniform < exact)
    assert not where[leaves].any()


def test_the_exit_is_missed_to_order_one_half_at_nodes_and_to_order_one_by_bridges():
    """Mean exit time, exactly (E X_tau - x) / push, on steps h and h / 4."""
    up = (1 - math.exp(-2 * PUSH * (START + 1) / SIGMA**2)) / (1 - math.exp(-4 * PUSH / SIGMA**2))
    exact = (2 * up - 1 - START) / PUSH

    def missed(stopping, h):
        grid = ctrl.uniform_grid(16.0, round(16 / h))  # 1e-7 stay longer
        paths = ctrl.simulate(
            PROBLEM, PUSHED, started(16_000, START), grid, keep=(), stopping=stopping,
            generator=ctrl.noise.stream(2, "order"),
        )  # fmt: skip
        time = ctrl.Estimate.of(grid.nodes[paths.ends])
        return time.mean - exact, time.standard_error

    for stopping, ratio, slack in ((AtNodes(), 2.0, 0.25), (BridgeCorrected(), 4.0, 0.3)):
        (coarse, first), (fine, second) = missed(stopping, 0.4), missed(stopping, 0.1)
        error = coarse / fine * math.hypot(first / coarse, second / fine)
        assert abs(coarse / fine - ratio) < slack + 2 * error, (stopping, coarse, fine)


def test_the_wall_that_is_left_through_is_the_exact_one():
    """Of constant coefficients, the chance to leave upwards has no error in the step."""
    up = (1 - math.exp(-2 * PUSH * (START + 1) / SIGMA**2)) / (1 - math.exp(-4 * PUSH / SIGMA**2))
    paths = sampled(paths=20_000, seed=3, steps=32, keep=())
    assert (~paths.terminated).sum() < 20  # they count as not up: less than a tenth of the error
    got = ctrl.Estimate.of(ctrl.returns_to_go(replace(PROBLEM, horizon=8.0), paths)[:, 0])
    assert abs(got.mean - up) < 5 * got.standard_error


@pytest.mark.parametrize("domain", [
    Ball(torch.zeros(2).double(), 1.0),
    Box(torch.tensor([-1.0, -math.inf]).double(), torch.tensor([1.0, 0.8]).double()),
    HalfSpace(torch.tensor([1.0, 2.0]).double(), -1.5),
])  # fmt: skip
def test_exits_of_several_coordinates_lie_on_the_boundary(domain):
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.5 + 0 * x)
    general = ctrl.ControlledSDE(
        sde.drift, lambda t, x: 0.5 * torch.eye(2).double().expand(len(x), 2, 2), "general", 2
    )
    scalar = replace(sde, noise="scalar")
    problem = ctrl.ControlProblem(sde, 8.0, domain=domain)
    paths = sampled(problem, start=(0.1, -0.2))
    end = paths.states[paths.terminated, -1]
    assert len(end) > 50
    assert domain.signed_distance(paths.grid.nodes[0], end).abs().max() < 1e-14
    same = sampled(replace(problem, sde=general), start=(0.1, -0.2))
    torch.testing.assert_close(same.states, paths.states)  # the same noise, written as a matrix
    assert sampled(replace(problem, sde=scalar), start=(0.1, -0.2)).terminated.any()


def test_the_mean_exit_time_of_a_ball_has_order_one_too():
    """(1 - |x|^2) / dim for Brownian motion, curved walls by their tangent planes."""
    sde = ctrl.ControlledSDE(lambda t, x, a: 0 * x, lambda t, x: 1.0)
    problem = ctrl.ControlProblem(sde, 6.0, domain=Ball(torch.zeros(2).double(), 1.0))
    missed = []
    for h in (0.2, 0.05):
        grid = ctrl.uniform_grid(6.0, round(6 / h))
        paths = ctrl.simulate(
            problem, PUSHED, started(10_000, 0.3, 0.0), grid, keep=(),
            generator=ctrl.noise.stream(4, "ball"),
        )  # fmt: skip
        time = ctrl.Estimate.of(grid.nodes[paths.ends])
        missed.append((time.mean - 0.455, time.standard_error))
    (coarse, _), (fine, error) = missed
    assert abs(coarse) < 0.2
    assert abs(fine) < 0.05 / 0.2 * abs(coarse) + 0.01 + 4 * error


def test_what_is_paid_at_the_exit_may_depend_on_its_time():
    problem = replace(
        PROBLEM,
        horizon=8.0,
        exit_reward=lambda t, x: 10 + t,
        running_reward=lambda t, x, a: 0 * t + x[:, 0] ** 0,
    )
    paths = sampled(problem)
    got = ctrl.returns_to_go(problem, paths)[:, 0]
    time = paths.grid.nodes[paths.ends]
    late = problem.terminal_reward(paths.states[:, -1])
    torch.testing.assert_close(got, time + torch.where(paths.terminated, 10 + time, late))
    along = ctrl.value.values(lambda t, x: 0 * x[:, 0], problem, paths)
    torch.testing.assert_close(along[:, -1], torch.where(paths.terminated, 10 + time, late))


def test_paths_that_do_not_leave_an_endless_problem_break_off():
    paths = ctrl.simulate(
        PROBLEM, PUSHED, started(500, START), ctrl.uniform_grid(0.5, 5),
        generator=ctrl.noise.stream(7, "exit"),
    )  # fmt: skip
    assert not paths.terminated.all()
    with pytest.raises(ValueError, match="break off before"):
        ctrl.returns_to_go(PROBLEM, paths)
    value = lambda t, x: x[:, 0]
    assert ctrl.martingale.ctd0(value, PROBLEM, paths).shape == (500,)


def test_coefficients_are_never_asked_outside():
    """Nor at a wall: 1 / (1 - x^2) would be infinite there."""

    def drift(t, x, a):
        assert bool((x.abs() < 1).all())
        return a / (1 - x.square())

    problem = replace(PROBLEM, sde=replace(SDE, drift=drift))
    assert sampled(problem).terminated.any()


def test_streams_give_a_path_the_same_exit_in_any_batch():
    arguments = (PROBLEM, PUSHED)
    grid = ctrl.uniform_grid(8.0, 40)
    streams = ctrl.noise.PathStreams(5, ("exit",))
    whole = ctrl.simulate(*arguments, started(30, START), grid, generator=streams)
    part = ctrl.simulate(
        *arguments, started(9, START), grid, generator=replace(streams, first_path=11)
    )
    assert torch.equal(part.ends, whole.ends[11:20])
    assert torch.equal(part.states, whole.states[11:20])
    end = ctrl.simulate_end(*arguments, started(30, START), grid, generator=streams)
    assert torch.equal(end, whole.states[:, -1])


def test_given_noise_decides_the_exits(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    grid = ctrl.uniform_grid(1.0, 2)
    still = torch.zeros(3, 2, 1).double()
    uniform = torch.tensor([[0.0, 0.5], [0.9, 0.0], [0.9, 0.9]]).double()
    noise = ctrl.Noise(still, exits=uniform)
    paths = ctrl.simulate(PROBLEM, PUSHED, started(3, START), grid, noise=noise)
    assert paths.ends.tolist() == [1, 2, 2]
    assert paths.terminated.tolist() == [True, True, False]
    with pytest.raises(ValueError, match="noise must hold exits"):
        ctrl.simulate(PROBLEM, PUSHED, started(3, START), grid, noise=ctrl.Noise(still))
    at_nodes = ctrl.simulate(
        PROBLEM, PUSHED, started(3, START), grid, noise=ctrl.Noise(still), stopping=AtNodes()
    )
    assert not at_nodes.terminated.any()
    for bad in (uniform - 0.1, uniform + 0.2, uniform[:2], uniform * math.nan):
        with pytest.raises(ValueError, match="exits must be"):
            ctrl.Noise(still, exits=bad)


def test_a_black_box_leaves_at_its_nodes():
    box = ctrl.BlackBox(lambda t0, t1, x, a: x + 0.3)
    paths = ctrl.simulate(PROBLEM, PUSHED, started(2, START), ctrl.uniform_grid(1.0, 5), box)
    assert paths.ends.tolist() == [3, 3]
    with pytest.raises(ValueError, match="AtNodes"):
        ctrl.simulate(
            PROBLEM, PUSHED, started(2, START), ctrl.uniform_grid(1.0, 5), box,
            stopping=BridgeCorrected(),
        )  # fmt: skip


def test_log_ratios_of_stopped_paths_average_to_one():
    """E[dP_ref / dP] = 1 at the exit; the density of the proposal counts, not that of the wall."""
    reference = ctrl.DeterministicPolicy(lambda t, x: -0.4 * x)
    paths = sampled(paths=20_000, steps=16, seed=6)
    log_ratio = ctrl.girsanov.log_ratio(SDE, PUSHED, reference, paths)
    one = ctrl.Estimate.of((-log_ratio).exp())
    assert abs(one.mean - 1) < 5 * one.standard_error
    assert one.standard_error < 0.02
    steps = ctrl.transitions.log_ratio(SDE, ctrl.EulerMaruyama(), PUSHED, reference, paths)
    torch.testing.assert_close(steps.sum(1), log_ratio)


def test_log_ratios_of_jumps_average_to_one_at_the_exit():
    """Those of a step in which a path leaves by diffusion are drawn, though it does not jump."""
    jumps = ctrl.jumps.Jumps(lambda t, x, a: 1 + a[:, 0], lambda t, x, a, m: 0.05 + 0 * x)
    sde = ctrl.ControlledSDE(lambda t, x, a: 0 * x, lambda t, x: SIGMA, jumps=jumps)
    paths = sampled(replace(PROBLEM, sde=sde), paths=10_000, steps=16, seed=9)
    still = ctrl.DeterministicPolicy(lambda t, x: 0 * x)
    log_ratio = ctrl.girsanov.log_ratio(sde, PUSHED, still, paths)
    one = ctrl.Estimate.of((-log_ratio).exp())
    assert abs(one.mean - 1) < 4 * one.standard_error
    assert one.standard_error < 0.01  # without those jumps the mean is 1.16


def stays(**change):
    settings = {"stopping": None, "start": (START,)} | change
    return lambda: sampled(settings.pop("problem", PROBLEM), paths=3, **settings)


def within(function):
    return replace(PROBLEM, domain=Inside(function))


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (stays(start=(1.0,)), "domain must contain a start, but it contains none of 3"),
        (stays(start=(-7.0,)), "domain must contain a start"),
        (stays(start=(0.1, 0.2)), "Interval is a domain of states with 1 coordinates"),
        (stays(stopping=AtNodes), "stopping must be AtNodes"),
        (stays(problem=within(lambda t, x: x)), r"domain must return \[3\]"),
        (stays(problem=within(lambda t, x: x[:, 0]), stopping=BridgeCorrected()), "its walls"),
        (stays(problem=ctrl.ControlProblem(SDE, 8.0), stopping=AtNodes()), "without a domain"),
        (lambda: sampled(differentiable=True), "differentiable must be False"),
        (lambda: Interval(1.0, 1.0), "low must be below high"),
        (lambda: Interval(math.nan, 1.0), "low must be a number"),
        (lambda: Interval(-math.inf, math.inf), "finite"),
        (lambda: Ball(torch.zeros(2), 0.0), "radius"),
        (lambda: Box(torch.ones(2), torch.zeros(2)), "low must be below high"),
        (lambda: HalfSpace(torch.zeros(2), 0.0), "normal must not be 0"),
        (lambda: replace(PROBLEM, domain=lambda t, x: x), "signed_distance"),
        (lambda: ctrl.ControlProblem(SDE, 1.0, exit_reward=lambda t, x: t), "exit_reward"),
    ],
)  # fmt: skip
def test_what_is_no_domain_or_no_start_is_refused(refused, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    with pytest.raises((ValueError, TypeError), match=message):
        refused()


def test_some_starts_outside_are_named():
    start = torch.tensor([[0.0], [0.5], [1.5]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"1 of 3 are not: start\[2\] = \[1.5\]"):
        ctrl.simulate(
            PROBLEM, PUSHED, start, ctrl.uniform_grid(1.0, 2), generator=torch.Generator()
        )


def test_the_mean_exit_time_is_learned_from_paths_that_leave_or_break_off():
    """(1 - x^2) / sigma^2 by least squares: endless, undiscounted, and half of the paths cut."""
    clock = replace(PROBLEM, running_reward=lambda t, x, a: 1 + 0 * x[:, 0], terminal_reward=None)
    still = ctrl.DeterministicPolicy(lambda t, x: 0 * x)
    start = torch.linspace(-0.9, 0.9, 4000, dtype=torch.float64).unsqueeze(1)
    paths = ctrl.simulate(
        clock, still, start, ctrl.uniform_grid(0.4, 40), generator=ctrl.noise.stream(8, "exit")
    )
    assert 1000 < int(paths.terminated.sum()) < 3000

    def features(t, x):
        bump = 1 - x.square()
        return torch.cat([bump, bump.square(), x * bump], dim=1)

    learned = ctrl.martingale.clstd(features, clock, paths)
    at = torch.linspace(-0.8, 0.8, 9, dtype=torch.float64).unsqueeze(1)
    exact = (1 - at.square())[:, 0] / SIGMA**2
    # half a step late, as exits are recorded; the rest is the sample's
    torch.testing.assert_close(learned(torch.tensor(0.0), at), exact, rtol=0.05, atol=0.01)
