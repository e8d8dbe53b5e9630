"""What a first user passes by mistake: the argument is named, with its value and the remedy."""

import math
from dataclasses import replace

import jaxtyping
import pytest
import torch

import ctrl
from ctrl import martingale as mg
from ctrl import policy_gradient as pg

GRID = ctrl.uniform_grid(0.9, 6)
START = torch.linspace(-0.9, 1.2, 12, dtype=torch.float64).view(6, 2)
SDE = ctrl.ControlledSDE(lambda t, x, a: a - 0.4 * x, lambda t, x: 0.6)
PROBLEM = ctrl.ControlProblem(SDE, 0.9, terminal_reward=lambda x: x.sin().sum(1))
MEAN = ctrl.DeterministicPolicy(lambda t, x: 0.3 - x)
DRAWN = ctrl.GaussianPolicy(lambda t, x: 0.3 - x, 0.5)
ZERO = torch.zeros((), dtype=torch.float64)


@pytest.fixture(autouse=True)
def production(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def rolled(policy=MEAN, problem=PROBLEM, start=START, grid=GRID, **settings):
    if "noise" not in settings:
        settings["generator"] = torch.Generator().manual_seed(5)
    return ctrl.simulate(problem, policy, start, grid, **settings)


def of_sde(**coefficients):
    return replace(PROBLEM, sde=replace(SDE, **coefficients))


def test_constants_in_place_of_functions_are_named_with_their_value():
    with pytest.raises(TypeError, match=r"^diffusion must be .*\(t, x\), got 0.6; .*lambda t, x:"):
        ctrl.ControlledSDE(lambda t, x, a: a, 0.6)
    with pytest.raises(TypeError, match=r"^drift must be .*\(t, x, a\), got None"):
        ctrl.ControlledSDE(None, lambda t, x: 0.6)
    with pytest.raises(TypeError, match=r"got tensor\(0.9000\); float\(horizon\)"):
        ctrl.ControlProblem(SDE, torch.tensor(0.9))


def test_rewards_of_the_wrong_arguments_are_refused_when_they_are_given():
    with pytest.raises(TypeError, match=r"running_reward must be .*\(t, states, actions\)"):
        replace(PROBLEM, running_reward=lambda x, a: -a.square().sum(1))
    with pytest.raises(TypeError, match=r"terminal_reward must be a function of \(states\)"):
        replace(PROBLEM, terminal_reward=lambda t, x: x.sum(1))


SWAPPED = {
    "drift": lambda: ctrl.ControlledSDE(lambda x, t, a: a - x, lambda t, x: 0.6),
    "diffusion": lambda: ctrl.ControlledSDE(lambda t, x, a: a, lambda x, t: 0.1 * x),
    "running_reward": lambda: replace(PROBLEM, running_reward=lambda x, a, t: -a.square().sum(1)),
    "discount": lambda: replace(PROBLEM, discount=lambda state, time: state[:, 0].square()),
    "mean": lambda: ctrl.DeterministicPolicy(lambda x, t: 0.3 - x),
    "std": lambda: ctrl.GaussianPolicy(lambda t, x: -x, lambda states, t: 1 + states.square()),
    "intensity": lambda: ctrl.Jumps(lambda x, t, a: 1 + x[:, 0] ** 2, lambda t, x, a, z: x),
    "sizes": lambda: ctrl.Jumps(lambda t, x, a: 1 + x[:, 0] ** 2, lambda x, t, a, z: x),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_the_state_before_the_time_is_refused_where_names_say_so(name):
    """lambda x, t, a: a - x has the shape of the actions, and would silently be a drift a - t."""
    with pytest.raises(TypeError, match=rf"^{name} must take \(t.*got \((x|states?), "):
        SWAPPED[name]()


def test_names_that_say_nothing_pass():
    ctrl.DeterministicPolicy(lambda one, other: other)
    ctrl.DeterministicPolicy(torch.nn.Bilinear(1, 2, 2))
    ctrl.ControlledSDE(torch.add, torch.add)


SHAPES = {
    "a matrix for each path": (lambda x: torch.eye(2).to(x).expand(6, 2, 2), "noise_dim=2"),
    "one matrix, wide": (lambda x: torch.ones(2, 3).to(x), "noise_dim=3.* expanded"),
    "one for each path": (lambda x: x[:, 0], "unsqueeze"),
    "one for each path, [paths, 1]": (lambda x: x[:, :1], "expand_as"),
    "one for each coordinate": (lambda x: torch.ones(2).to(x), "expand_as"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_diffusion_of_another_shape_is_told_what_makes_it_one(name):
    diffusion, remedy = SHAPES[name]
    with pytest.raises(ValueError, match=rf"^diffusion must return \[\] or \[6, 2\].*{remedy}"):
        rolled(problem=of_sde(diffusion=lambda t, x: diffusion(x)))


def test_a_matrix_that_is_the_same_for_all_is_told_to_be_expanded():
    """And so written it is the noise that it says: two Brownian motions, mixed."""
    matrix = torch.tensor([[0.5, 0.2], [-0.1, 0.7]], dtype=torch.float64)
    general = {"noise": "general", "noise_dim": 2}
    with pytest.raises(ValueError, match=r"general noise, got \[2, 2\]: .expand\(len\(x\), 2, 2\)"):
        rolled(problem=of_sde(diffusion=lambda t, x: matrix, **general))
    still = of_sde(
        drift=lambda t, x, a: 0 * x, diffusion=lambda t, x: matrix.expand(len(x), 2, 2), **general
    )
    paths = rolled(problem=still)
    expected = paths.increments.sum(1) @ matrix.T
    torch.testing.assert_close(paths.states[:, -1] - START, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("settings", "error"), [
    ({"noise": "general"}, ValueError), ({"noise_dim": 2}, ValueError),
    ({"noise": "general", "noise_dim": 2.0}, TypeError),
    ({"noise": "general", "noise_dim": True}, TypeError),
])  # fmt: skip
def test_how_many_brownian_motions_is_an_integer_of_general_noise(settings, error):
    with pytest.raises(error, match="noise_dim must be"):
        replace(SDE, **settings)


@pytest.mark.parametrize("bad", [0.5, [0.5, 0.5], None])
def test_a_diffusion_is_a_number_or_a_tensor(bad):
    if bad == 0.5:
        assert rolled(problem=of_sde(diffusion=lambda t, x: bad)).states.shape == (6, 7, 2)
        return
    with pytest.raises(TypeError, match=f"diffusion must return .*got {type(bad).__name__}"):
        rolled(problem=of_sde(diffusion=lambda t, x: bad))


# --- what is not finite, and where it came from --------------------------------------------------


def late(t, x, bad=math.nan):
    """``bad`` on path 4 from the time 0.5 on, i.e. at node 4 (t = 0.6)."""
    hit = (torch.arange(len(x)).view(-1, 1) == 4) & (t > 0.5)
    return torch.where(hit, bad, torch.ones_like(x))


CULPRITS = {
    "drift": lambda f: {"problem": of_sde(drift=lambda t, x, a: f(t, x))},
    "diffusion": lambda f: {"problem": of_sde(diffusion=f)},
    "policy.mean": lambda f: {"policy": ctrl.DeterministicPolicy(f)},
}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("keep", [("states", "actions", "increments"), ()])
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("name", CULPRITS)
def test_the_function_that_was_not_finite_is_named_with_path_time_and_state(
    name, differentiable, keep, bad
):
    settings = CULPRITS[name](lambda t, x: late(t, x, bad))
    words = (
        rf"node 5 \(t = 0.75\) on: {name} is \[{bad}, {bad}\] on path 4 at t = 0.6, in the state"
    )
    if name == "policy.mean" and keep:
        words = words.replace(r"node 5 \(t = 0.75\)", r"node .*")  # the action, a node before
    with pytest.raises(ValueError, match=words):
        rolled(differentiable=differentiable, keep=keep, **settings)


def test_a_black_box_is_blamed_for_its_own():
    step = ctrl.BlackBox(lambda t0, t1, x, a: late(t0, x))
    with pytest.raises(ValueError, match=r"node 5 .*: solver.step returned them"):
        rolled(solver=step)


def test_an_explosion_is_told_of_where_it_is_far_out():
    cubic = of_sde(drift=lambda t, x, a: x**3, diffusion=lambda t, x: 1e3)
    with pytest.raises(
        ValueError, match=r"not finite from node .* in the state \[.*refine the gri"
    ):
        rolled(problem=replace(cubic, horizon=60.0), grid=ctrl.uniform_grid(60.0, 60))


def test_sizes_of_jumps_that_are_not_finite_are_not_taken_for_an_intensity():
    jumps = ctrl.Jumps(lambda t, x, a: 40 + x[:, 0].square(), lambda t, x, a, z: math.nan * x)
    with pytest.raises(ValueError, match=r"states are not finite at t = .*sizes of jumps"):
        rolled(problem=of_sde(jumps=jumps))


def test_a_start_that_is_not_finite_is_shown():
    with pytest.raises(ValueError, match=r"start must be finite, but start\[3\] is \[.*, nan\]"):
        rolled(start=torch.where(torch.arange(12).view(6, 2) == 7, math.nan, START))


def test_nan_of_a_policy_is_not_taken_for_a_memory():
    spoilt = ctrl.DeterministicPolicy(lambda t, x: x * math.nan)
    with pytest.raises(
        ValueError, match=r"policy.mean must be finite, .* the first of them path 0"
    ):
        ctrl.girsanov.path_kl(SDE, MEAN, spoilt, rolled())


@pytest.mark.parametrize("std", [
    lambda t, x: 0 * x, lambda t, x: x - 9, lambda t, x: x * math.nan, lambda t: -0.3,
    lambda t: math.nan, lambda t: torch.zeros(2).double(),
])  # fmt: skip
def test_no_action_is_drawn_with_a_standard_deviation_that_is_not_positive(std):
    with pytest.raises(ValueError, match="std must be positive and finite, at t = 0 it is"):
        rolled(ctrl.GaussianPolicy(lambda t, x: -x, std))


def test_a_tensor_that_an_optimiser_made_negative_is_seen_when_it_draws():
    std = torch.tensor([0.4, 0.3], dtype=torch.float64)
    policy = ctrl.GaussianPolicy(lambda t, x: -x, std)
    rolled(policy)
    std[1] = -0.1
    with pytest.raises(ValueError, match=r"std must be positive .* \[-0.1\]"):
        rolled(policy)


# --- things in each other's place ----------------------------------------------------------------


@pytest.mark.parametrize(("use", "words"), [
    (lambda: rolled(problem=SDE), r"problem must be .* got ControlledSDE; .*ControlProblem\(sde"),
    (lambda: rolled(grid=GRID.nodes), r"grid must be a TimeGrid, got Tensor; .*TimeGrid\(nodes\)"),
    (lambda: rolled(solver=ctrl.Heun), r"solver must be .*EulerMaruyama\(\).* got <class"),
    (lambda: rolled(solver="euler"), r"solver must be .* got 'euler'"),
    (lambda: ctrl.returns_to_go(rolled(), PROBLEM), "problem must be a ControlProblem, got Paths"),
    (lambda: ctrl.returns_to_go(PROBLEM, START), r"paths must be Paths, got Tensor; ctrl.simulate"),
    (lambda: mg.martingale_loss(lambda t, x: x[:, 0], rolled(), PROBLEM), "problem must be a Cont"),
    (lambda: pg.q_rate_gradient(PROBLEM, DRAWN, lambda t, x: x[:, 0], START), "paths must be"),
    (lambda: ctrl.girsanov.path_kl(PROBLEM, MEAN, MEAN, rolled()), "sde must be .*problem.sde"),
    (lambda: ctrl.girsanov.path_kl(SDE, MEAN, MEAN.mean, rolled()), "reference must be a Policy"),
    (lambda: ctrl.girsanov.log_ratio(SDE, MEAN, MEAN, START), "paths must be Paths"),
    (lambda: ctrl.policy_kl(DRAWN, MEAN, ZERO, START), "reference must draw its actions"),
    (lambda: ctrl.Estimate.of([1.0, 2.0]), "values must be a tensor .* got list; .*as_tensor"),
    (lambda: ctrl.noise.gauss_hermite(GRID, nodes=2), "step_sizes must be .*TimeGrid; grid.steps"),
    (lambda: ctrl.linear.solve_lq(None, GRID), "times must be a tensor, got TimeGrid.*grid.nodes"),
])  # fmt: skip
def test_an_argument_in_anothers_place_is_named(use, words):
    with pytest.raises(TypeError, match=words):
        use()


def test_policies_whose_actions_differ_in_shape_are_not_compared():
    narrow = ctrl.DeterministicPolicy(lambda t, x: x[:, :1])
    with pytest.raises(ValueError, match=r"reference must have actions .*\[2\], got \[1\]"):
        ctrl.girsanov.path_kl(SDE, MEAN, narrow, rolled())
    with pytest.raises(ValueError, match=r"reference must have actions .*\[6, 2\], got \[6, 1\]"):
        ctrl.policy_kl(DRAWN, ctrl.GaussianPolicy(narrow.mean, 0.5), ZERO, START)


def test_noise_that_was_made_for_other_steps_is_refused():
    noise = ctrl.noise.gauss_hermite(ctrl.uniform_grid(0.6, 3).steps, nodes=2, noise=(2,))
    start = START[:1].expand(64, 2)
    grid = ctrl.uniform_grid(0.9, 3)
    for one in (noise, ctrl.noise.antithetic(noise)):
        first = start.repeat(len(one.increments) // 64, 1)
        with pytest.raises(ValueError, match=r"noise must be made for .* 0.3, got .* 0.2;"):
            rolled(start=first, grid=grid, noise=one)
        rolled(start=first, grid=ctrl.uniform_grid(0.6, 3, dtype=torch.float32), noise=one)
    with pytest.raises(ValueError, match=r"step_sizes must be \[3\]"):
        replace(noise, step_sizes=GRID.steps)


def test_step_sizes_agree_up_to_the_rounding_of_a_grids_nodes():
    steps = 20_000
    grid = ctrl.TimeGrid(torch.linspace(0, 0.9, steps + 1))  # float32
    sizes = torch.full((steps,), 0.9 / steps, dtype=torch.float64)
    noise = ctrl.Noise(torch.zeros(1, steps, 2, dtype=torch.float64), step_sizes=sizes)
    assert float((grid.steps - sizes).abs().max()) > 1e-4 * 0.9 / steps
    rolled(start=START[:1], grid=grid, noise=noise)
    with pytest.raises(ValueError, match="noise must be made for"):
        rolled(start=START[:1], grid=grid, noise=replace(noise, step_sizes=1.01 * sizes))


def test_times_before_0_are_refused():
    with pytest.raises(ValueError, match=r"grid must begin at 0 or later, got -0\.3"):
        rolled(grid=ctrl.TimeGrid(torch.tensor([-0.3, 0.2, 0.9])))
    assert len(rolled(grid=ctrl.TimeGrid(torch.tensor([0.3, 0.9]))).grid.nodes) == 2


def test_torchs_own_errors_say_in_which_function_and_for_which_tensors():
    network = torch.nn.Linear(2, 2)  # float32
    with pytest.raises(RuntimeError) as fault:
        rolled(ctrl.DeterministicPolicy(lambda t, x: network(x)))
    note = "in policy.mean, which was called with [] torch.float64, [6, 2] torch.float64"
    assert fault.value.__notes__ == [note]
    drift = lambda t, x, a: a + x
    with pytest.raises(RuntimeError) as fault:
        rolled(ctrl.DeterministicPolicy(lambda t, x: x[:, 0]), of_sde(drift=drift))
    assert "in drift" in fault.value.__notes__[0]
    assert fault.value.__notes__[0].endswith("[6, 2] torch.float64, [6] torch.float64")
    assert len(fault.value.__notes__) == 1


# --- exact answers -------------------------------------------------------------------------------

NUMBERS = {
    "pull": 0.8, "shift": 0.3, "reference_pull": 0.5, "reference_shift": -0.1, "noise": 0.6,
    "mean": 0.4, "variance": 0.2, "time": 0.9,
}  # fmt: skip
BOTH = (ctrl.linear.ornstein_uhlenbeck_path_kl, ctrl.linear.ornstein_uhlenbeck_terminal_kl)


@pytest.mark.parametrize("function", BOTH)
def test_exact_answers_take_numbers(function):
    tensors = {name: torch.tensor(x, dtype=torch.float64) for name, x in NUMBERS.items()}
    assert torch.equal(function(**NUMBERS), function(**tensors))
    mixed = function(**NUMBERS | {"shift": torch.tensor([0.3, 0.7], dtype=torch.float64)})
    assert mixed.shape == (2,)
    torch.testing.assert_close(mixed[0], function(**tensors))


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize(("name", "bad", "error", "words"), [
    ("pull", torch.tensor(0.8), TypeError, "^pull must be a float64 tensor, got torch.float32; "),
    ("noise", "0.6", TypeError, "^noise must be a float64 tensor, got str"),
    ("shift", math.nan, ValueError, "^shift must be finite, got nan"),
    ("variance", -0.2, ValueError, "covariance must have no negative variance .* got -0.2"),
    ("time", -0.9, ValueError, "time must not be negative, got -0.9"),
])  # fmt: skip
def test_exact_answers_name_the_argument_that_users_know(function, name, bad, error, words):
    with pytest.raises(error, match=words):
        function(**NUMBERS | {name: bad})


def test_an_exact_value_is_asked_at_a_time_that_is_a_number():
    one = torch.ones(1, 1, dtype=torch.float64)
    lq = ctrl.linear.LinearQuadratic(A=0.2 * one, B=one, sigma=0.5 * one, M=one, N=0.7 * one, H=one)
    exact = ctrl.linear.solve_lq(lq, GRID.nodes)
    assert torch.equal(exact.value(0.3, one), exact.value(ZERO + 0.3, one))


# --- what is printed -----------------------------------------------------------------------------


def test_paths_grids_and_noise_print_their_shapes_in_a_line():
    grid = ctrl.TimeGrid(torch.tensor([0.0, 0.1, 0.9]))
    assert repr(GRID) == "TimeGrid(6 steps from 0 to 0.9, 0.15 each)"
    assert repr(grid) == "TimeGrid(2 steps from 0 to 0.9, 0.1 to 0.8 long)"
    assert repr(rolled()) == (
        "Paths(states [6, 7, 2], actions [6, 6, 2], increments [6, 6, 2], "
        "TimeGrid(6 steps from 0 to 0.9, 0.15 each), torch.float64 on cpu)"
    )
    stopped = ctrl.paths.stop(rolled(), torch.full((6,), 3))
    assert "ends [6]" in repr(stopped)
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=2)
    assert repr(noise) == (
        "Noise(increments [4, 2, 1], weights [4], step_sizes [2], torch.float32 on cpu)"
    )
