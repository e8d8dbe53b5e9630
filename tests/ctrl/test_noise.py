"""Named streams: what a number depends on, and on what it does not."""

import os
import subprocess
import sys

import pytest
import torch

import ctrl
from ctrl.noise import (
    Noise,
    antithetic,
    brownian_increments,
    gauss_hermite,
    normals_by_sample,
    stream,
)


def numbers(*name: str | int, seed: int = 3) -> torch.Tensor:
    return torch.randn(50, generator=stream(seed, *name))


def test_equal_names_give_equal_numbers_and_different_names_different_ones():
    assert torch.equal(numbers("a", 1), numbers("a", 1))
    others = [
        numbers("a", 2),
        numbers("b", 1),
        numbers("a", 1, 0),
        numbers("a1"),
        numbers("a", "1"),
    ]
    others += [numbers("a", 1, seed=4), numbers("a", 1, seed=3 + 2**32)]
    assert not any(torch.equal(numbers("a", 1), other) for other in others)


def test_many_streams_are_all_different():
    firsts = {torch.randint(2**62, (1,), generator=stream(0, "x", k)).item() for k in range(3000)}
    assert len(firsts) == 3000


def test_streams_do_not_touch_the_global_one():
    before = torch.random.get_rng_state()
    numbers("a")
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_sample_has_its_noise_in_any_layout():
    arguments = {"seed": 5, "name": ("train", "start")}
    whole = normals_by_sample((4, 3), samples=range(10), **arguments)
    parts = [normals_by_sample((4, 3), samples=r, **arguments) for r in (range(7), range(7, 10))]
    assert torch.equal(whole, torch.cat(parts))
    assert normals_by_sample((4, 3), samples=range(0), **arguments).shape == (0, 4, 3)


@pytest.mark.parametrize("bad", [("a", 1.5), ("a", None), ("a", True)])
def test_bad_names_are_refused(bad):
    with pytest.raises(TypeError, match="name"):
        stream(0, *bad)


def test_quadrature_integrates_polynomials_of_the_stated_degree():
    steps = torch.tensor([0.3, 0.8], dtype=torch.float64)
    noise = gauss_hermite(steps, nodes=3, action=(1,))
    w, a = noise.increments[..., 0], noise.actions
    assert a is not None
    assert noise.weights is not None

    def mean(values: torch.Tensor) -> float:
        assert noise.weights is not None
        return float((noise.weights * values).sum())

    assert mean(torch.ones_like(w[:, 0])) == pytest.approx(1, abs=1e-14)
    assert mean(w[:, 1] ** 4) == pytest.approx(3 * 0.8**2, rel=1e-12)
    assert mean(w[:, 0] ** 2 * a[:, 1, 0] ** 2) == pytest.approx(0.3, rel=1e-12)
    assert mean(w[:, 0] * w[:, 1]) == pytest.approx(0, abs=1e-14)
    with pytest.raises(ValueError, match="nodes"):
        gauss_hermite(torch.ones(30).double(), nodes=5)


def test_noise_checks_its_parts():
    with pytest.raises((ValueError, TypeError), match="actions"):
        Noise(torch.zeros(2, 3, 1), torch.zeros(2, 4, 1))
    with pytest.raises(ValueError, match="finite"):
        Noise(torch.full((2, 3, 1), float("nan")))
    with pytest.raises((ValueError, TypeError), match="weights"):
        Noise(torch.zeros(2, 3, 1), weights=torch.zeros(3))


@pytest.mark.parametrize(
    "weights", [[0.5, 0.6], [-0.5, 1.5], [0.0, 0.0], [float("nan"), 1.0]], ids=str
)
def test_weights_that_are_no_law_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        Noise(torch.zeros(2, 3, 1), weights=torch.tensor(weights))


def test_increments_need_paths_and_steps():
    with pytest.raises((ValueError, TypeError), match="increments"):
        Noise(torch.zeros(3))


@pytest.mark.parametrize("noise", [(), (3,), (4, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_brownian_increments_have_their_shape_and_variance(noise, dtype, generator):
    steps = torch.tensor([0.02, 0.7, 0.28], dtype=dtype)
    drawn = brownian_increments(steps, 4000, noise, generator=generator)
    assert drawn.shape == (4000, 3, *noise)
    assert drawn.dtype == dtype
    variance = drawn.double().square().transpose(0, 1).flatten(1).mean(1)
    # 4000 normals or more: 4.9 standard errors of sqrt(2/4000) are 11 %; h for sqrt(h) is 30 % off
    torch.testing.assert_close(variance / steps.double(), torch.ones(3).double(), rtol=0, atol=0.12)


@pytest.mark.parametrize("steps", [[], [0.1, 0.0], [0.1, -0.1], [float("nan")], [float("inf")]])
def test_bad_step_sizes_are_refused(steps):
    tensor = torch.tensor(steps)
    with pytest.raises(ValueError, match="step_sizes"):
        brownian_increments(tensor, 2, generator=torch.Generator())
    with pytest.raises(ValueError, match="step_sizes"):
        gauss_hermite(tensor, nodes=2)
    with pytest.raises(ValueError, match="paths"):
        brownian_increments(torch.ones(1), 0, generator=torch.Generator())


def test_antithetic_pairs_share_the_weight_of_their_path():
    noise = gauss_hermite(torch.tensor([0.4], dtype=torch.float64), nodes=3, action=(2,))
    pairs = antithetic(noise)
    assert noise.weights is not None
    assert noise.actions is not None
    assert pairs.weights is not None
    assert pairs.actions is not None
    assert torch.equal(pairs.increments[0::2], noise.increments)
    assert torch.equal(pairs.increments[1::2], -noise.increments)
    assert torch.equal(pairs.actions[1::2], -noise.actions)
    torch.testing.assert_close(pairs.weights[0::2] + pairs.weights[1::2], noise.weights)


def test_quadrature_noise_takes_any_shape():
    steps = torch.tensor([0.3], dtype=torch.float64)
    noise = gauss_hermite(steps, nodes=2, noise=(1, 2), action=(2, 1, 1))
    assert noise.increments.shape == (16, 1, 1, 2)
    assert noise.actions is not None
    assert noise.actions.shape == (16, 1, 2, 1, 1)
    assert gauss_hermite(steps, nodes=2, noise=()).increments.shape == (2, 1)


# --- noise that belongs to paths


def rolled(paths, first, steps=21, width=3, dtype=torch.float32, random=True):
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.5)
    policy = (
        ctrl.GaussianPolicy(lambda t, x: 0.1 * x, 0.3)
        if random
        else ctrl.DeterministicPolicy(lambda t, x: 0.1 * x)
    )
    return ctrl.simulate(
        ctrl.ControlProblem(sde, 10.0), policy, torch.zeros(paths, width, dtype=dtype),
        ctrl.uniform_grid(0.1 * steps, steps),
        generator=ctrl.noise.PathStreams(7, ("test", 3), first),
    )  # fmt: skip


@pytest.mark.parametrize("split", [1, 7, 8, 15, 16, 32, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_paths_do_not_depend_on_how_they_are_batched(split, dtype):
    total = 600 if split > 8 else 40
    whole = rolled(total, 0, dtype=dtype)
    parts = [
        rolled(min(split, total - begin), begin, dtype=dtype) for begin in range(0, total, split)
    ]
    assert torch.equal(torch.cat([part.increments for part in parts]), whole.increments)
    # What is computed from them may be rounded another way by another batch: 21 steps of at most
    # 8 roundings each, on numbers of size 1. The noise of another path would change it by 0.1.
    bound = 21 * 8 * torch.finfo(dtype).eps
    for name in ("states", "actions"):
        together = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(together, getattr(whole, name), rtol=bound, atol=bound)


INSIDE = [
    {"method": "srk"},
    {"method": "srk", "dt": 0.05},
    {"method": "milstein", "dt": 0.05},
    {"method": "midpoint", "dt": 0.05},
]


def inside(paths, first, settings, noise="diagonal", graph=False):
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.5 + 0.1 * x, noise)
    if settings["method"] == "midpoint":
        sde = sde.to_stratonovich()
    policy = ctrl.GaussianPolicy(lambda t, x: 0.1 * x, 0.3)
    arguments = (
        ctrl.ControlProblem(sde, 10.0), policy, torch.zeros(paths, 3, dtype=torch.float64),
        ctrl.uniform_grid(0.9, 9), ctrl.TorchSDE(**settings),
    )  # fmt: skip
    streams = ctrl.noise.PathStreams(7, ("test", 3), first)
    simulated = ctrl.simulate(*arguments, generator=streams, differentiable=graph)
    assert torch.equal(simulated.states[:, -1], ctrl.simulate_end(*arguments, generator=streams))
    return simulated


@pytest.mark.parametrize("settings", INSIDE, ids=str)
@pytest.mark.parametrize("noise", ["diagonal", "scalar"])
def test_what_a_step_needs_beside_its_increment_belongs_to_the_path_too(settings, noise):
    whole = inside(300, 0, settings, noise, graph=True)
    for begin, end in ((0, 1), (1, 100), (250, 300)):
        part = inside(end - begin, begin, settings, noise)
        # the same numbers; a batch of another size may be summed in another order
        torch.testing.assert_close(part.states, whole.states[begin:end], rtol=1e-12, atol=1e-13)
        assert torch.equal(part.increments, whole.increments[begin:end])


def test_the_interior_of_a_step_is_independent_of_its_increment_and_of_other_steps():
    seen = []

    class Recorded:
        def step(self, sde, t0, t1, states, action, increment):
            return ctrl.EulerMaruyama().step(sde, t0, t1, states, action, increment)

        def step_inside(self, sde, t0, t1, states, action, increment, normals):
            h = float(t1 - t0)
            seen.append((increment / h**0.5, next(normals).clone(), next(normals).clone()))
            return self.step(sde, t0, t1, states, action, increment)

    problem = ctrl.ControlProblem(ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.5), 1.0)
    streams = ctrl.noise.PathStreams(7, ("inside",))
    policy, start = ctrl.GaussianPolicy(lambda t, x: x, 1.0), torch.zeros(2000, 2).double()
    grid = ctrl.uniform_grid(1.0, 9)
    paths = ctrl.simulate(problem, policy, start, grid, Recorded(), generator=streams)
    increments, first, second = (torch.stack(each, 1) for each in zip(*seen, strict=True))
    actions = paths.actions - paths.states[:, :-1]
    n = first.numel()
    for one in (increments, second, actions, first.roll(1, 1), first.roll(1, 2)):
        assert abs(float((first * one).mean())) < 6 / n**0.5
    assert abs(float(first.var()) - 1) < 6 * (2 / n) ** 0.5


@pytest.mark.parametrize(
    "settings", [{"method": "log_ode"}, {"method": "srk", "adaptive": True}], ids=str
)
def test_solvers_that_treat_a_batch_as_one_refuse_streams_of_paths(settings):
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.5 + 0.1 * x)
    sde = sde.to_stratonovich() if settings["method"] == "log_ode" else sde
    policy = ctrl.DeterministicPolicy(lambda t, x: x)
    with pytest.raises(ValueError, match="depend on its batch"):
        ctrl.simulate(
            ctrl.ControlProblem(sde, 1.0), policy, torch.zeros(3, 1), ctrl.uniform_grid(1.0, 3),
            ctrl.TorchSDE(**settings), generator=ctrl.noise.PathStreams(0, ("a",)),
        )  # fmt: skip


def test_the_two_precisions_have_streams_of_their_own():
    """And not the same numbers rounded: a check of float32 by float64 would share its noise."""
    streams = ctrl.noise.PathStreams(7, ("test", 3))
    single, double = (
        next(streams.rows("increments", 500, torch.empty(1, 3, dtype=dtype))).double().clone()
        for dtype in (torch.float32, torch.float64)
    )
    assert abs(float((single * double).mean())) < 6 / 1500**0.5


def test_paths_do_not_depend_on_the_process_or_on_torchs_kernels():
    code = (
        "import torch, ctrl; s = ctrl.noise.PathStreams(7, ('test', 3), 250);"
        "rows = s.rows('increments', 9, torch.empty(1, 3));"
        "print(*[next(rows).clone()[k % 9, 1].item().hex() for k in range(40)])"
    )
    kernels = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=kernels
    )
    rows = ctrl.noise.PathStreams(7, ("test", 3), 250).rows("increments", 9, torch.empty(1, 3))
    here = [next(rows).clone()[k % 9, 1].item().hex() for k in range(40)]
    assert done.stdout.split() == here


def test_a_longer_run_begins_with_the_shorter_one_and_events_may_be_wide():
    short, long = rolled(5, 0, steps=20), rolled(5, 0, steps=50)
    h = (0.1 * 20 / 20) ** 0.5
    torch.testing.assert_close(short.increments / h, long.increments[:, :20] / h)
    for width in (2047, 2048, 2050):
        whole = rolled(3, 0, steps=2, width=width)
        assert torch.equal(rolled(1, 2, steps=2, width=width).increments, whole.increments[2:])


def test_every_path_step_and_kind_has_its_own_normals():
    paths = rolled(700, 0, steps=40, width=2, dtype=torch.float64)
    brownian = paths.increments / 0.1**0.5
    drawn = (paths.actions - 0.1 * paths.states[:, :-1]) / 0.3
    flat = brownian.flatten()
    assert len(flat.unique()) == flat.numel()
    n = flat.numel()
    # means, variances and correlations of n = 56 000 normals within 6 standard errors
    for values in (brownian, drawn):
        assert abs(float(values.mean())) < 6 / n**0.5
        assert abs(float(values.var()) - 1) < 6 * (2 / n) ** 0.5
    assert abs(float((brownian * drawn).mean())) < 6 / n**0.5
    assert abs(float((brownian[:-256] * brownian[256:]).mean())) < 6 / n**0.5
    assert abs(float((brownian[:, :-16] * brownian[:, 16:]).mean())) < 6 / n**0.5
    other = ctrl.noise.PathStreams(7, ("test", 4)).rows("increments", 700, paths.states[:, 0])
    assert abs(float((brownian[:, 0] * next(other)).mean())) < 6 / 1400**0.5


def test_a_black_box_draws_its_actions_from_the_paths_streams_too():
    policy = ctrl.GaussianPolicy(lambda t, x: x, 0.3)
    problem = ctrl.ControlProblem(ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.1), 1.0)
    box = ctrl.BlackBox(lambda t0, t1, x, a: x + (t1 - t0).to(x) * a)

    def run(paths, first):
        return ctrl.simulate(
            problem, policy, torch.zeros(paths, 2), ctrl.uniform_grid(1.0, 3), box,
            generator=ctrl.noise.PathStreams(1, ("box",), first),
        )  # fmt: skip

    # 3 steps, rounded in other batches; another path's noise would change the actions by 0.1
    torch.testing.assert_close(run(10, 0).actions[4:], run(6, 4).actions, rtol=1e-5, atol=1e-5)


def test_a_graph_longer_than_a_chunk_has_the_gradient_of_the_given_noise():
    steps, grid = 40, ctrl.uniform_grid(1.0, 40)
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.5)
    problem, start = ctrl.ControlProblem(sde, 1.0), torch.zeros(5, 2, dtype=torch.float64)
    streams = ctrl.noise.PathStreams(7, ("graph",))

    def normals(kind):
        rows = streams.rows(kind, 5, start)
        return torch.stack([next(rows).clone() for _ in range(steps)], 1)

    scale = grid.steps.sqrt()[:, None]
    given = Noise(normals("increments") * scale, normals("actions"))

    def gradient(**source):
        std = torch.tensor([0.3, 0.4], dtype=torch.float64, requires_grad=True)
        policy = ctrl.GaussianPolicy(lambda t, x: 0.1 * x, std)
        paths = ctrl.simulate(problem, policy, start, grid, differentiable=True, **source)
        return torch.autograd.grad(paths.states.square().sum(), std)[0]

    torch.testing.assert_close(
        gradient(generator=streams), gradient(noise=given), rtol=1e-12, atol=1e-12
    )


def test_a_kept_row_of_action_noise_is_not_written_over():
    class NoiseItself:
        is_random = True

        def mean(self, t, x):
            return x

        def act(self, mean, t, noise, states=None):
            return noise

    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 0.5)
    start, grid = torch.zeros(5, 2), ctrl.uniform_grid(1.0, 40)
    for solver in (ctrl.EulerMaruyama(), ctrl.BlackBox(lambda t0, t1, x, a: x + a)):
        actions = ctrl.simulate(
            ctrl.ControlProblem(sde, 1.0), NoiseItself(), start, grid, solver,
            generator=ctrl.noise.PathStreams(7, ("kept",)), differentiable=True,
        ).actions  # fmt: skip
        assert len(actions.unique()) == actions.numel()


def test_the_bridge_has_the_conditional_mean_and_covariance_of_brownian_motion(monkeypatch):
    # refine is linear in the coarse increments and its normals: read both matrices off unit vectors
    def refined(coarse, normals):
        left = iter(normals.tolist())
        monkeypatch.setattr(torch.Tensor, "normal_", lambda x, generator: x.fill_(next(left)))
        fine = ctrl.noise.refine(coarse[None], COARSE, FINE, generator=torch.Generator())
        monkeypatch.undo()
        return fine[0]

    eye = torch.eye(4, dtype=torch.float64)
    mean = torch.stack([refined(row, 0 * eye[0]) for row in eye[:2, :2]], 1)
    root = torch.stack([refined(0 * eye[0, :2], row) for row in eye], 1)
    # conditioning the Gaussian N(0, diag h) on its sums over the coarse steps
    h, sums = FINE.diff().diag(), torch.zeros(2, 6, dtype=torch.float64)
    sums[0, :3], sums[1, 3:] = 1, 1
    gain = h @ sums.T @ torch.linalg.inv(sums @ h @ sums.T)
    torch.testing.assert_close(mean, gain, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(root @ root.T, h - gain @ sums @ h, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "bad", [("a", (), 0), (1, "name", 0), (1, (1.5,), 0), (1, (), -1), (1, (), 0.5), (True, (), 0)]
)
def test_bad_names_of_streams_are_refused(bad):
    with pytest.raises((TypeError, ValueError)):
        ctrl.noise.PathStreams(*bad)


# --- the same path on another grid

COARSE = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
FINE = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.55, 0.9, 1.0], dtype=torch.float64)


def test_coarsening_undoes_refining():
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(5, 2, 3, dtype=torch.float64, generator=g)
    fine = ctrl.noise.refine(coarse, COARSE, FINE, generator=g)
    assert fine.shape == (5, 6, 3)
    torch.testing.assert_close(
        ctrl.noise.coarsen(fine, FINE, COARSE), coarse, rtol=1e-13, atol=1e-14
    )


def test_a_refined_path_is_brownian():
    many, g = 200_000, torch.Generator().manual_seed(1)
    start = COARSE.diff().sqrt() * torch.randn(many, 2, dtype=torch.float64, generator=g)
    scaled = ctrl.noise.refine(start, COARSE, FINE, generator=g) / FINE.diff().sqrt()
    covariance = scaled.T @ scaled / many
    # 6 standard errors of a covariance of 200 000 samples (variance at most 2)
    assert float((covariance - torch.eye(6).double()).abs().max()) < 6 * (2 / many) ** 0.5


def test_nodes_that_do_not_fit_are_refused():
    g, fine = torch.Generator(), torch.zeros(2, 6, dtype=torch.float64)
    stray = torch.tensor([0.0, 0.31, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"coarse_nodes\[1\] = 0.31"):
        ctrl.noise.coarsen(fine, FINE, stray)
    with pytest.raises(ValueError, match="end together"):
        ctrl.noise.coarsen(fine, FINE, FINE[:4])
    with pytest.raises(ValueError, match="increments"):
        ctrl.noise.coarsen(fine[:, :3], FINE, COARSE)
    with pytest.raises(ValueError, match="increasing"):
        ctrl.noise.refine(torch.zeros(2, 2).double(), COARSE, FINE.flip(0), generator=g)


def test_refining_takes_one_source_of_normals():
    coarse, fine = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.4, 1.0])
    increments = torch.ones(3, 1, 2)
    both = {"generator": torch.Generator(), "normals": iter([torch.ones(3, 2)])}
    for given in (both, {}):
        with pytest.raises(ValueError, match="exactly one of generator and normals"):
            ctrl.noise.refine(increments, coarse, fine, **given)
    refined = ctrl.noise.refine(increments, coarse, fine, normals=both["normals"])
    torch.testing.assert_close(refined[:, 0], torch.full((3, 2), 0.4 + (0.4 * 0.6) ** 0.5))


def test_antithetic_quadrature_keeps_its_expectation():
    noise = ctrl.noise.gauss_hermite(torch.tensor([0.4, 0.2]).double(), nodes=3, action=(1,))
    both = ctrl.noise.antithetic(noise)
    for moment in (1, 2, 3):
        for one, other in ((noise, both),):
            torch.testing.assert_close(
                torch.einsum("p,pkd->kd", one.weights, one.increments**moment),
                torch.einsum("p,pkd->kd", other.weights, other.increments**moment),
                rtol=1e-13, atol=1e-14,
            )  # fmt: skip
