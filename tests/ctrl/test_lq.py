"""The linear-quadratic problem: its dynamics and rewards by hand, its rates by autodiff."""

import itertools
import math

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ctrl
from ctrl.linear import LinearGaussian, LinearQuadratic, Quadratic, improve_lq
from ctrl.linear.lq import require_symmetric, value_rate
from ctrl.q_learning import q_rate


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_lq(
    seed: int,
    dim: int,
    actions: int = 2,
    *,
    condition: float = 10.0,
    discount: float = 0.3,
    temperature: float = 0.2,
    controlled_noise: float = 0.3,
) -> LinearQuadratic:
    """Every coefficient there is; M - R'N^{-1}R stays positive."""
    g = torch.Generator().manual_seed(seed)
    noise = 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    def positive(size: int) -> Tensor:
        basis = torch.linalg.qr(draw(size, size)).Q
        eigenvalues = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)
        matrix = basis @ torch.diag(eigenvalues) @ basis.T
        return 0.5 * (matrix + matrix.T)

    return LinearQuadratic(
        A=draw(dim, dim) / dim**0.5,
        B=draw(dim, actions),
        sigma=draw(dim, noise),
        M=positive(dim),
        N=positive(actions),
        R=0.1 / condition * draw(actions, dim),
        p=draw(dim),
        l=draw(actions),
        H=positive(dim),
        h=draw(dim),
        f=draw(dim),
        C=controlled_noise * draw(noise, dim, dim) / dim**0.5,
        D=controlled_noise * draw(noise, dim, actions),
        discount=discount,
        temperature=temperature,
    )


def random_quadratic(seed: int, dim: int) -> Quadratic:
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, dtype=torch.float64, generator=g)
    slope = torch.randn(dim, dtype=torch.float64, generator=g)
    return Quadratic(-(root @ root.T), slope, tensor(0.7))


def points(seed: int, *shape: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g)


SEEDS, DIMS, ACTIONS = st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 3)
T = tensor(0.3)


@given(SEEDS, DIMS, ACTIONS)
def test_dynamics_and_rewards_are_those_written_down(seed, dim, actions):
    lq = random_lq(seed, dim, actions)
    problem = lq.problem(1.5)
    x, a = points(seed, 3, dim), points(seed + 1, 3, actions)
    drift, sigma = problem.sde.drift_at(T, x, a), problem.sde.diffusion_at(T, x, a)
    reward, terminal = problem.running_reward(T, x, a), problem.terminal_reward(x)
    for i in range(3):
        torch.testing.assert_close(drift[i], lq.A @ x[i] + lq.B @ a[i] + lq.f)
        for j in range(2):
            column = lq.C[j] @ x[i] + lq.D[j] @ a[i] + lq.sigma[:, j]
            torch.testing.assert_close(sigma[i, :, j], column)
        cost = 0.5 * x[i] @ lq.M @ x[i] + a[i] @ lq.R @ x[i] + 0.5 * a[i] @ lq.N @ a[i]
        torch.testing.assert_close(reward[i], -(cost + lq.p @ x[i] + lq.l @ a[i]))
        torch.testing.assert_close(terminal[i], -(0.5 * x[i] @ lq.H @ x[i] + lq.h @ x[i]))
    assert (problem.discount, problem.temperature) == (0.3, 0.2)


@given(SEEDS, DIMS, ACTIONS)
def test_value_rate_is_the_expected_q_rate_and_the_entropy(seed, dim, actions):
    lq, value = random_lq(seed, dim, actions), random_quadratic(seed, dim)
    root = points(seed + 1, actions, actions).tril(-1) + torch.eye(actions)
    law = LinearGaussian(points(seed + 2, actions, dim), points(seed + 3, actions), root @ root.T)
    x = points(seed + 4, 3, dim)
    # q is quadratic in the action: its mean over mu +- sqrt(k) L e_j is exact
    offsets = actions**0.5 * torch.cat([root.T, -root.T])
    problem = lq.problem(1.0)
    q = [q_rate(problem, lambda t, x: value(x), T, x, law.mean(x) + one) for one in offsets]
    entropy = torch.distributions.MultivariateNormal(law.offset, law.covariance).entropy()
    expected = torch.stack(q).mean(0) + 0.2 * entropy
    scale = float(torch.stack(q).abs().max()) + 1
    value_rates = value_rate(lq, value, law)(x)
    torch.testing.assert_close(value_rates, expected, rtol=0, atol=1e-12 * scale)


@given(SEEDS, DIMS, ACTIONS)
def test_improved_policy_is_the_gibbs_policy(seed, dim, actions):
    # q - temperature log pi does not depend on the action, nor on which V it came from
    lq, value = random_lq(seed, dim, actions), random_quadratic(seed, dim)
    law = improve_lq(lq, value)
    policy, x = law.policy(), points(seed, 3, dim)
    problem = lq.problem(1.0)
    a = [law.mean(x) + points(seed + k, 3, actions) for k in range(3)]
    left = torch.stack(
        [
            q_rate(problem, lambda t, x: value(x), T, x, each) - 0.2 * policy.log_prob(T, x, each)
            for each in a
        ]
    )
    scale = float(left.abs().max()) + 10
    torch.testing.assert_close(left[1:], left[:1].expand(2, -1), rtol=0, atol=1e-11 * scale)


def test_without_temperature_the_improved_policy_is_deterministic():
    lq = random_lq(0, 2, temperature=0.0)
    law = improve_lq(lq, random_quadratic(0, 2))
    assert not bool(law.covariance.any())
    assert isinstance(law.policy(), ctrl.DeterministicPolicy)
    warm = improve_lq(random_lq(0, 2), random_quadratic(0, 2))
    torch.testing.assert_close(law.gain, warm.gain, rtol=1e-13, atol=1e-13)


def test_improvement_without_a_best_action_is_refused():
    lq = random_lq(0, 2)
    value = Quadratic(100 * torch.eye(2, dtype=torch.float64), tensor([0.0, 0.0]), tensor(0.0))
    with pytest.raises(ValueError, match="positive definite"):
        improve_lq(lq, value)


def test_a_quadratic_and_its_gradient():
    value = random_quadratic(3, 3)
    x = points(4, 5, 3)
    expected = [0.5 * one @ value.hessian @ one + value.slope @ one + 0.7 for one in x]
    torch.testing.assert_close(value(x), torch.stack(expected))
    slope = torch.func.vmap(torch.func.grad(value))(x)
    torch.testing.assert_close(value.gradient(x), slope)


def test_paths_keep_their_precision():
    lq = random_lq(0, 2)
    problem, policy = lq.problem(1.0), improve_lq(lq, random_quadratic(0, 2)).policy()
    start = torch.zeros(4, 2, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    paths = ctrl.simulate(problem, policy, start, ctrl.uniform_grid(1.0, 5), generator=generator)
    assert paths.states.dtype == paths.actions.dtype == torch.float32
    assert ctrl.returns_to_go(problem, paths, policy).dtype == torch.float32


def test_noise_is_controlled_only_where_the_action_moves_it():
    assert random_lq(0, 2).sde.controls_diffusion
    still = random_lq(0, 2, controlled_noise=0.0).sde
    assert not still.controls_diffusion
    assert still.diffusion_at(T, points(0, 3, 2)).shape == (3, 2, 2)


def test_coefficients_of_a_batch_belong_to_the_rows():
    one = random_lq(0, 2)
    A = torch.stack([one.A, 2 * one.A, -one.A])
    many = LinearQuadratic(A, one.B, one.sigma, one.M, one.N)
    x, a = points(0, 3, 2), points(1, 3, 2)
    drift = many.sde.drift_at(T, x, a)
    for i in range(3):
        torch.testing.assert_close(drift[i], A[i] @ x[i] + one.B @ a[i])
    assert many.M.shape == (3, 2, 2)
    assert many.h.shape == (3, 2)


GOOD = {
    "A": torch.eye(2, dtype=torch.float64),
    "B": torch.ones(2, 1, dtype=torch.float64),
    "sigma": torch.ones(2, 3, dtype=torch.float64),
    "M": torch.eye(2, dtype=torch.float64),
    "N": torch.eye(1, dtype=torch.float64),
}
BAD = [
    ("A", torch.ones(2, 3)),
    ("A", torch.ones(2)),
    ("A", math.nan * torch.ones(2, 2)),
    ("B", torch.ones(3, 1)),
    ("sigma", torch.ones(3, 3)),
    ("sigma", math.inf * torch.ones(2, 3)),
    ("M", torch.tensor([[1.0, 0.3], [0.0, 1.0]])),
    ("M", torch.eye(3)),
    ("N", torch.eye(2)),
    ("N", torch.ones(1)),
    ("R", torch.ones(2, 1)),
    ("p", torch.ones(1)),
    ("l", torch.ones(2)),
    ("H", torch.tensor([[1.0, 0.3], [0.0, 1.0]])),
    ("h", torch.ones(2, 2, 2, 3)),
    ("f", torch.tensor(1.0)),
    ("C", torch.ones(2, 2, 2)),
    ("D", torch.ones(3, 1, 2)),
    ("discount", torch.tensor(-0.1)),
    ("temperature", torch.tensor(math.nan)),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda each: str(each)[:30])
def test_bad_coefficients_are_refused(name, value):
    LinearQuadratic(**GOOD)
    with pytest.raises((ValueError, TypeError), match=name):
        LinearQuadratic(**GOOD | {name: value.double()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("name", GOOD)
def test_other_precisions_are_refused(name, dtype):
    with pytest.raises((ValueError, TypeError), match=name):
        LinearQuadratic(**GOOD | {name: GOOD[name].to(dtype)})


def test_batches_that_do_not_fit_are_refused():
    A, M = GOOD["A"].expand(3, 2, 2), GOOD["M"].expand(2, 2, 2)
    with pytest.raises(ValueError, match="batch"):
        LinearQuadratic(**GOOD | {"A": A, "M": M})


def test_bad_states_are_refused():
    value = random_quadratic(0, 2)
    for shape in ((), (3,), (2, 1)):
        with pytest.raises((ValueError, TypeError), match="x"):
            value(torch.zeros(shape, dtype=torch.float64))
    many = Quadratic(value.hessian.expand(3, 2, 2), value.slope.expand(3, 2), tensor([0.0] * 3))
    with pytest.raises(ValueError, match="one row for each"):
        many(torch.zeros(4, 2, dtype=torch.float64))


def test_a_batch_of_problems_has_no_single_discount_or_policy():
    both = LinearQuadratic(**GOOD, discount=tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="discount"):
        both.problem()
    warm = LinearQuadratic(**GOOD, discount=tensor([0.1, 0.1]), temperature=0.1)
    zero = Quadratic(0 * warm.M, 0 * warm.p, 0 * warm.p[:, 0])
    with pytest.raises(ValueError, match="one problem"):
        improve_lq(warm, zero).policy()


def test_an_endless_problem_pays_nothing_at_its_end():
    assert LinearQuadratic(**GOOD).problem().terminal_reward is None
    with pytest.raises(ValueError, match="horizon"):
        LinearQuadratic(**GOOD, H=GOOD["M"]).problem()


def test_every_default_is_zero():
    lq = LinearQuadratic(**GOOD)
    names = itertools.chain("RplHhfCD", ("discount", "temperature"))
    assert not any(bool(getattr(lq, name).any()) for name in names)


# --- batches, sizes, and one bad member among good ones


def stacked(members: list, kind: type):
    """A batch of problems, values or laws from single ones."""
    names = vars(members[0])
    return kind(**{name: torch.stack([getattr(one, name) for one in members]) for name in names})


def test_a_batch_of_value_rates_and_improvements_is_its_members():
    singles = [random_lq(k, 2, discount=0.1 + 0.3 * k, temperature=0.2 * k) for k in range(3)]
    values = [random_quadratic(k, 2) for k in range(3)]
    lq, value = stacked(singles, LinearQuadratic), stacked(values, Quadratic)
    laws = improve_lq(lq, value)
    rate = value_rate(lq, value, laws)
    x, a = points(7, 3, 2), points(8, 3, 2)
    for k, (one, v) in enumerate(zip(singles, values, strict=True)):
        law = improve_lq(one, v)
        for name in ("gain", "offset", "covariance"):
            torch.testing.assert_close(getattr(laws, name)[k], getattr(law, name))
        alone = value_rate(one, v, law)
        for name in ("hessian", "slope", "constant"):
            torch.testing.assert_close(getattr(rate, name)[k], getattr(alone, name))
        torch.testing.assert_close(value(x)[k], v(x[k]))
        torch.testing.assert_close(value.gradient(x)[k], v.gradient(x[k]))
        torch.testing.assert_close(laws.mean(x)[k], law.mean(x[k]))
        row, act = x[k : k + 1], a[k : k + 1]
        paid = one.running_reward(T, row, act)[0]
        torch.testing.assert_close(lq.running_reward(T, x, a)[k], paid)
        torch.testing.assert_close(lq.terminal_reward(x)[k], one.terminal_reward(row)[0])
        columns = lq.sde.diffusion_at(T, x, a)[k]
        torch.testing.assert_close(columns, one.sde.diffusion_at(T, row, act)[0])
    torch.testing.assert_close(laws.mean(x.float()).double(), laws.mean(x), rtol=1e-5, atol=1e-5)
    assert value(x.float()).dtype == value.gradient(x.float()).dtype == torch.float32
    assert laws.mean(x.float()).dtype == torch.float32


def test_one_value_without_a_best_action_spoils_a_batch():
    lq = random_lq(0, 2)
    good, bad = -torch.eye(2).double(), 100 * torch.eye(2).double()
    for members in ([good, bad], [bad, good]):
        hessian = torch.stack(members)
        value = Quadratic(hessian, torch.zeros(2, 2).double(), torch.zeros(2).double())
        with pytest.raises(ValueError, match="positive definite"):
            improve_lq(lq, value)
    still = LinearQuadratic(**GOOD | {"N": 0 * GOOD["N"]})  # actions cost nothing
    with pytest.raises(ValueError, match="positive definite"):
        improve_lq(still, Quadratic(-GOOD["M"], still.p, still.p[0]))


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_symmetry_is_judged_relative_to_each_member_of_a_batch(size):
    lean = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).double()
    good = torch.eye(2).double()
    require_symmetric("M", size * (good + 1e-12 * lean))  # round-off
    require_symmetric("M", 0 * good)
    bad = size * (good + 1e-8 * lean)
    for members in ([bad], [good, bad], [bad, good], [1e6 * size * good, bad]):
        for one in (torch.stack(members), torch.stack(members).mT):
            with pytest.raises(ValueError, match="M must be symmetric"):
                require_symmetric("M", one)


def test_rates_may_be_integers_and_one_negative_one_spoils_a_batch(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    lq = LinearQuadratic(**GOOD, discount=1, temperature=2)
    assert [float(rate) for rate in lq.rates] == [1.0, 2.0]
    for name in ("discount", "temperature"):
        with pytest.raises(ValueError, match=f"{name} must not be negative"):
            LinearQuadratic(**GOOD, **{name: tensor([0.1, -0.1])})
        with pytest.raises((ValueError, TypeError), match=name):
            LinearQuadratic(**GOOD, **{name: "0.1"})
        both = LinearQuadratic(**GOOD, **{name: tensor([0.3, 0.3])}).problem()
        assert getattr(both, name) == 0.3
        with pytest.raises(ValueError, match=f"{name} must be one number"):
            LinearQuadratic(**GOOD, **{name: tensor([0.3, 0.3, 0.2])}).problem()


def test_a_horizon_is_where_either_terminal_cost_is_paid():
    for cost in ({"H": GOOD["M"]}, {"h": tensor([0.0, 0.3])}):
        lq = LinearQuadratic(**GOOD, **cost)
        assert lq.problem(2.0).terminal_reward is not None
        assert lq.problem(2.0).horizon == 2
    assert LinearQuadratic(**GOOD).problem(2.0).terminal_reward is None


def test_laws_of_a_batch_that_draw_nothing_are_one_policy():
    lq = LinearQuadratic(**GOOD, discount=tensor([0.1, 0.2]))
    policy = improve_lq(lq, Quadratic(0 * lq.M, lq.p, lq.p[:, 0])).policy()
    assert isinstance(policy, ctrl.DeterministicPolicy)
    assert policy.mean(T, points(0, 2, 2)).shape == (2, 1)


def test_a_zero_without_dimensions_stands_for_zeros_and_no_other_number_does(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    zero, one = tensor(0.0), tensor(1.0)
    assert not LinearQuadratic(**GOOD, R=zero, p=zero, C=zero).C.any()
    for name in "RplHhfCD":
        with pytest.raises((ValueError, TypeError), match=name):
            LinearQuadratic(**GOOD, **{name: one})


def test_the_terminal_value_has_one_constant_for_each_problem():
    A = torch.stack([GOOD["A"], 2 * GOOD["A"], -GOOD["A"]])
    assert LinearQuadratic(**GOOD | {"A": A}).terminal.constant.tolist() == [0.0] * 3


def test_a_law_that_draws_some_of_its_coordinates_is_random():
    covariance = torch.diag(tensor([0.3, 0.2]))
    law = LinearGaussian(torch.ones(2, 2).double(), torch.zeros(2).double(), covariance)
    policy = law.policy()
    assert isinstance(policy, ctrl.MultivariateGaussianPolicy)
    torch.testing.assert_close(policy.scale_tril, covariance.sqrt())


def test_a_law_that_draws_some_of_its_coordinates_only_has_no_policy():
    for covariance in (torch.diag(tensor([0.3, 0.0])), tensor([[0.1, 0.3], [0.3, 0.9]])):
        law = LinearGaussian(torch.ones(2, 2).double(), torch.zeros(2).double(), covariance)
        with pytest.raises(ValueError, match="covariance must be positive definite"):
            law.policy()


def test_an_action_that_round_off_pays_for_is_not_the_best():
    # N - D'S D = .7 (1 - d^2 S / .7), at and next to its edge, in several directions
    one = random_lq(0, 2)
    for scale in (1e-9, 0.3, 7e5):
        for ulps in (-2, -1, 0, 1):
            D = torch.stack([torch.eye(2), torch.zeros(2, 2)]).double()
            lq = LinearQuadratic(one.A, one.B, one.sigma, one.M, scale * one.N, D=D)
            edge = scale * one.N * (1 + ulps * torch.finfo(torch.float64).eps)
            value = Quadratic(edge, one.p, one.p[0])
            with pytest.raises(ValueError, match="positive definite beyond round-off"):
                improve_lq(lq, value)
            improve_lq(lq, Quadratic((1 - 1e-9) * edge, one.p, one.p[0]))


def test_noise_that_is_left_out_and_noise_of_zeros_are_the_same():
    left_out = random_lq(2, 3)
    still = LinearQuadratic(**{n: each for n, each in vars(left_out).items() if n not in "CD"})
    zeros = LinearQuadratic(**vars(still) | {"C": 0 * left_out.C, "D": 0 * left_out.D})
    assert [part.shape[-3] for part in still.scaled_noise] == [0, 0]
    assert [part.shape[-3] for part in zeros.scaled_noise] == [2, 2]
    half = LinearQuadratic(**vars(still) | {"D": left_out.D})  # one is enough for both
    assert [part.shape[-3] for part in half.scaled_noise] == [2, 2]
    value, law = random_quadratic(2, 3), improve_lq(zeros, random_quadratic(3, 3))
    for computed, expected in (
        (value_rate(still, value, law), value_rate(zeros, value, law)),
        (improve_lq(still, value), improve_lq(zeros, value)),
    ):
        for name, part in vars(expected).items():
            torch.testing.assert_close(getattr(computed, name), part)
    learned = torch.zeros(2, 3, 3, dtype=torch.float64, requires_grad=True)
    value_rate(LinearQuadratic(**vars(still) | {"C": learned}), value, law).slope.sum().backward()
    assert bool(learned.grad.any())  # at zero the value has a slope in C: that of C'S sigma


def test_one_moved_entry_is_enough_to_control_the_noise():
    D = torch.zeros(3, 2, 1, dtype=torch.float64)
    D[1, 0, 0] = 0.3
    sde = LinearQuadratic(**GOOD, D=D).sde
    assert sde.controls_diffusion
    x, a = points(0, 1, 2), points(1, 1, 1)
    sigma = GOOD["sigma"].clone()
    sigma[0, 1] += 0.3 * a[0, 0]
    torch.testing.assert_close(sde.diffusion_at(T, x, a)[0], sigma)


def test_two_batch_dimensions_are_as_good_as_one():
    singles, values = (
        [random_lq(k, 3, 1) for k in range(4)],
        [random_quadratic(k, 3) for k in range(4)],
    )
    flat, value = stacked(singles, LinearQuadratic), stacked(values, Quadratic)

    def nested(whole):
        parts = {name: part.unflatten(0, (1, 4)) for name, part in vars(whole).items()}
        return type(whole)(**parts)

    lq, v = nested(flat), nested(value)
    assert lq.sde.noise_dim == 2
    law, expected = improve_lq(lq, v), improve_lq(flat, value)
    for with_two, other in (
        (law, expected),
        (value_rate(lq, v, law), value_rate(flat, value, expected)),
    ):
        for name, part in vars(other).items():
            torch.testing.assert_close(getattr(with_two, name)[0], part)
