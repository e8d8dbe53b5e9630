"""The four bounds on problems whose gap is known: inequality, second order, and tightness."""

import inspect
import math

import jaxtyping
import numpy as np
import pytest
import torch

import ctrl
from ctrl import trust_region as tr

# dX = (a - K X) dt + S dW, X_0 ~ N(M0, P0); old action C0, new C0 + shift. Reward r(X_T).
K, S, M0, P0, T = 0.8, 0.6, 0.4, 0.5, 1.3
GRID = ctrl.uniform_grid(T, 20_000)  # left-point integrals err by O(h): below 1e-4 of each
TIMES = GRID.nodes[:-1]
LEFT = T - TIMES


def moments(action):
    mean = M0 * torch.exp(-K * TIMES) + action / K * (1 - torch.exp(-K * TIMES))
    variance = S**2 / (2 * K) + (P0 - S**2 / (2 * K)) * torch.exp(-2 * K * TIMES)
    return mean, variance


def path_kl(shift):
    return shift**2 * TIMES / (2 * S**2)


def integral(rates):
    return float((rates * GRID.steps).sum())


def quadratic_gap(shift, action=0.3, q=1.1):
    """r = -q x^2 / 2: h_t = V'(x) shift, V' = -q f (f x + action (1 - f) / K), f = e^{-K left}."""
    f = torch.exp(-K * LEFT)
    slope = -q * f**2 * shift  # of h_t in x
    old, variance = moments(action)
    new, _ = moments(action + shift)
    return integral(slope * (new - old)), slope.abs(), variance, new - old


@pytest.mark.parametrize("shift", [0.05, 0.4, -0.9])
def test_bounds_for_unbounded_rewards_hold_and_are_of_second_order(shift):
    gap, lipschitz, variance, mean_shift = quadratic_gap(shift)
    bounds = {
        "transport": tr.transport(lipschitz, variance, path_kl(shift), GRID),
        "wasserstein": tr.wasserstein(lipschitz, mean_shift.abs(), GRID),
        "chi square": tr.chi_square(
            lipschitz.square() * variance, torch.expm1(mean_shift.square() / variance), GRID
        ),
    }
    for name, bound in bounds.items():
        assert float(bound) >= abs(gap) * (1 - 1e-12), name
    # a shift of a Gaussian: W1 is the distance of the means, and h is linear: equality
    assert float(bounds["wasserstein"]) == pytest.approx(abs(gap), rel=1e-12)
    small, half = quadratic_gap(0.02)[0], quadratic_gap(0.01)[0]
    assert small / half == pytest.approx(4, rel=1e-9)


def test_the_constants_cannot_be_halved_everywhere():
    """Transport and chi square come within a factor of 2 somewhere; half of either fails there."""
    gap, lipschitz, variance, mean_shift = quadratic_gap(0.1)
    chi = tr.chi_square(
        lipschitz.square() * variance, torch.expm1(mean_shift.square() / variance), GRID
    )
    assert float(chi) / 2 < abs(gap)
    # deterministic start, no restoring force: the mean moves as far as the KL allows
    times = GRID.nodes[1:-1]
    grid = ctrl.TimeGrid(GRID.nodes[1:])
    kl, reward_variance = 0.1**2 * times / (2 * S**2), S**2 * times
    bound = tr.transport(torch.ones_like(times), reward_variance, kl, grid)
    exact = float((0.1 * times * grid.steps).sum())
    assert float(bound) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("shift", [0.05, 0.3, 1.0])
def test_pinskers_bound_for_a_bounded_reward(shift):
    """r = cos(w x): V = cos(w (f x + ...)) e^{-w^2 C / 2}, so h is bounded and all is closed."""
    action, w = 0.3, 1.7
    f = torch.exp(-K * LEFT)
    offset = action * (1 - f) / K
    damping = torch.exp(-0.5 * w**2 * S**2 * (1 - f**2) / (2 * K))
    size = (w * f * damping * shift).abs()  # h = -size sign sin(w (f x + offset))

    def mean_h(law):
        mean, variance = law
        phase = w * (f * mean + offset)
        return (
            -w * f * damping * shift * torch.sin(phase) * torch.exp(-0.5 * w**2 * f**2 * variance)
        )

    gap = integral(mean_h(moments(action + shift)) - mean_h(moments(action)))
    bound = tr.bounded(2 * size, path_kl(shift), GRID)
    assert float(bound) >= abs(gap) > 0
    assert gap / shift**2 != 0
    finer = tr.bounded(size, path_kl(shift / 2), GRID)  # half the shift: a quarter of the bound
    assert float(bound) == pytest.approx(4 * float(finer), rel=1e-9)


def test_batches_and_single_steps():
    grid = ctrl.uniform_grid(1.0, 1)
    one = torch.full((3, 2, 1), 0.5, dtype=torch.float64)
    assert tr.wasserstein(one, one, grid).shape == (3, 2)
    np.testing.assert_allclose(tr.wasserstein(one, one, grid), 0.25)


def test_bad_input_is_refused():
    grid = ctrl.uniform_grid(1.0, 2)
    good = torch.ones(2, dtype=torch.float64)
    for bad in (-good, good * math.nan):
        with pytest.raises(ValueError, match="path_kl"):
            tr.bounded(good, bad, grid)
    with pytest.raises((ValueError, TypeError)):
        tr.bounded(good, good[:1], grid)
    with pytest.raises(ValueError, match="steps"):
        tr.wasserstein(torch.ones(3), torch.ones(3), grid)
    rows = torch.zeros(4)
    with pytest.raises(ValueError, match="kl"):
        tr.penalised_surrogate(rows, rows, rows - 0.1, 1.0)
    with pytest.raises(ValueError, match="penalty"):
        tr.penalised_surrogate(rows, rows, rows, math.nan)


def test_penalised_surrogate_is_the_formula_and_has_a_finite_slope_at_equal_policies():
    log_ratio = torch.tensor([0.2, -0.1], dtype=torch.float64)
    advantage, kl = torch.tensor([1.5, -0.4]).double(), torch.tensor([0.04, 0.09]).double()
    penalised = tr.penalised_surrogate(log_ratio, advantage, kl, 0.7)
    torch.testing.assert_close(penalised, log_ratio.exp() * advantage - 0.7 * kl.sqrt())
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    tr.penalised_surrogate(theta, advantage, theta.square(), 0.7).sum().backward()
    assert bool(torch.isfinite(theta.grad).all())


def test_every_bound_is_its_formula():
    """On one step of length 0.7, with constants without symmetry."""
    grid = ctrl.TimeGrid(torch.tensor([0.2, 0.9], dtype=torch.float64))
    a, b, c = (torch.tensor([v], dtype=torch.float64) for v in (1.3, 0.45, 0.08))
    assert float(tr.bounded(a, c, grid)) == pytest.approx(0.7 * 1.3 * math.sqrt(0.04))
    assert float(tr.transport(a, b, c, grid)) == pytest.approx(0.7 * 1.3 * math.sqrt(0.072))
    assert float(tr.wasserstein(a, b, grid)) == pytest.approx(0.7 * 1.3 * 0.45)
    assert float(tr.chi_square(b, c, grid)) == pytest.approx(0.7 * math.sqrt(0.036))


@pytest.mark.parametrize("bound", [tr.bounded, tr.transport, tr.wasserstein, tr.chi_square])
def test_every_term_of_a_bound_is_checked_at_every_step(bound, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in production
    grid = ctrl.uniform_grid(1.0, 3)
    names = [name for name in inspect.signature(bound).parameters if name != "grid"]
    terms = {name: torch.full((2, 3), 0.5, dtype=torch.float64) for name in names}
    terms[names[0]][0, 0] = 0  # which is allowed
    assert bound(**terms, grid=grid).shape == (2,)
    for name in names:
        bad = terms[name].clone()
        bad[1, 1] = -0.1
        with pytest.raises(ValueError, match=f"{name} must be at least 0"):
            bound(**terms | {name: bad}, grid=grid)
        with pytest.raises(ValueError, match="one shape"):
            bound(**terms | {name: bad[0]}, grid=grid)
    single = bound(**{name: term.float() for name, term in terms.items()}, grid=grid)
    assert single.dtype == torch.float32


def test_a_penalty_may_be_nothing_but_not_infinite_and_no_divergence_is_negative():
    rows, kl = torch.zeros(2), torch.tensor([0.3, -0.1])
    assert not tr.penalised_surrogate(rows, rows, kl.abs(), 0.0).any()
    with pytest.raises(ValueError, match="penalty"):
        tr.penalised_surrogate(rows, rows, kl.abs(), math.inf)
    with pytest.raises(ValueError, match=r"the least is -0\.1"):
        tr.penalised_surrogate(rows, rows, kl, 1.0)
