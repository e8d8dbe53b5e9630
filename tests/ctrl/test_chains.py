import math

import pytest
import torch

import ctrl
from ctrl import chains

RATES = [[0.0, 0.9, 0.4], [0.5, 0.0, 1.3], [0.8, 0.2, 0.0]]
OTHER = [[0.0, 0.3, 0.7], [1.1, 0.0, 0.6], [0.4, 0.9, 0.0]]


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


GRID = ctrl.TimeGrid(tensor([0.0, 0.4, 1.1]))
START = tensor([0.2, 0.5, 0.3])


def chain(first=RATES, second=OTHER):
    return chains.JumpRates(GRID, chains.with_diagonal(tensor([first, second])))


def test_samples_have_the_marginals_and_the_path_kl(generator):
    paths, n = chain(), 40_000
    start = torch.multinomial(START, n, replacement=True, generator=generator)
    sampled = chains.simulate(paths, start, generator)
    for t, law in zip((0.4, 1.1), paths.marginals(START)[1:], strict=True):
        counts = torch.nn.functional.one_hot(sampled.at(t), 3).double().mean(0)
        error = (law * (1 - law) / n).sqrt()
        assert bool(((counts - law).abs() < 5.5 * error).all())  # false alarm 1e-7
    ratio = chains.log_ratio(paths, chain(OTHER, RATES), sampled)
    kl = chains.path_kl(paths, chain(OTHER, RATES), START)
    assert abs(ratio.mean() - kl) < 5.5 * ratio.std() / n**0.5
    assert 5.5 * ratio.std() / n**0.5 < 0.1 * kl
    weights = (-ratio).exp()  # E dP0/dP = 1
    assert abs(weights.mean() - 1) < 5.5 * weights.std() / n**0.5


def test_occupations_add_up_to_the_time():
    spent = chain().occupations(START)
    torch.testing.assert_close(spent.sum(1), GRID.steps, rtol=1e-13, atol=0)


def test_what_one_law_cannot_do_is_infinitely_unlikely():
    closed = [[0.0, 0.0, 0.4], [0.5, 0.0, 1.3], [0.8, 0.2, 0.0]]
    paths = chains.JumpPaths(tensor([[0.3], [0.3]]), torch.tensor([[0, 1], [0, 2]]), GRID)
    ratio = chains.log_ratio(chain(), chain(closed), paths)
    assert ratio[0] == math.inf
    assert bool(torch.isfinite(ratio[1]))
    assert chains.path_kl(chain(), chain(closed), START) == math.inf
    assert bool(torch.isfinite(chains.path_kl(chain(closed), chain(), START)))
    # where nobody comes, nothing counts
    alone = [[0.0, 0.0, 0.0], [0.5, 0.0, 1.3], [0.8, 0.2, 0.0]]
    barred = [[0.0, 0.0, 0.4], [0.5, 0.0, 0.0], [0.8, 0.2, 0.0]]
    never = chains.path_kl(chain(alone, alone), chain(alone, barred), tensor([1.0, 0.0, 0.0]))
    assert float(never) == pytest.approx(0.4 * 0.7, rel=1e-13)


def test_a_log_ratio_is_differentiable_in_the_rates():
    theta = tensor(RATES).requires_grad_()
    moving = chains.held(chains.with_diagonal(theta), GRID)
    paths = chains.JumpPaths(tensor([[0.3, 0.6]]), torch.tensor([[0, 1, 2]]), GRID)
    slope = torch.autograd.grad(chains.log_ratio(moving, chain(), paths).sum(), theta)[0]
    assert float(slope[0, 1]) == pytest.approx(1 / 0.9 - 0.3, rel=1e-12)
    assert float(slope[0, 2]) == pytest.approx(-0.3, rel=1e-12)
    assert float(slope[1, 2]) == pytest.approx(1 / 1.3 - 0.3, rel=1e-12)


def test_large_rewards_over_small_weights_do_not_overflow():
    best = chains.tilt(chain(), 1e-3, tensor([3.0, -4.0, 2.5]), tensor([5.0, 0.0, -9.0]))
    assert bool(torch.isfinite(best.values).all())
    torch.testing.assert_close(best.transitions().sum(2), torch.ones(2, 3).double())
    # rewards certain, up to b times nats: as fast as possible to 0, where both rewards are best
    assert float(best.values[0, 0]) == pytest.approx(3.0 + 5.0 * 1.1, abs=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda Q: Q - 2 * torch.eye(3).roll(1, 1), r"matrices\[0, 0, 1\] = -1\.1"),
        (lambda Q: Q + 0.1 * torch.eye(3), "rows of rates must sum to 0"),
        (lambda Q: Q * math.nan, "finite"),
        (lambda Q: Q[:1], r"matrices must be \[2, states, states\]"),
    ],
)
def test_rates_that_are_none_are_refused(change, message):
    Q = chains.with_diagonal(tensor([RATES, OTHER]))
    with pytest.raises(ValueError, match=message):
        chains.JumpRates(GRID, change(Q))


def test_bad_input_is_refused(generator):
    with pytest.raises(ValueError, match="times must increase"):
        chains.JumpPaths(tensor([[0.5, 0.3]]), torch.tensor([[0, 1, 2]]), GRID)
    with pytest.raises(ValueError, match="states must be"):
        chains.JumpPaths(tensor([[0.3, 0.5]]), torch.tensor([[0, 1]]), GRID)
    with pytest.raises(ValueError, match="start must be states from 0 to 2"):
        chains.simulate(chain(), torch.tensor([3]), generator)
    with pytest.raises(ValueError, match="start must be non-negative and sum to 1"):
        chain().marginals(tensor([0.5, 0.1, 0.1]))
    with pytest.raises(ValueError, match="kl_weight must be positive"):
        chains.tilt(chain(), 0.0, tensor([1.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="terminal_reward must be"):
        chains.tilt(chain(), 1.0, tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"t must be from 0 to 1\.1"):
        chains.tilt(chain(), 1.0, tensor([1.0, 0.0, 0.0])).rates_at(1.2)
    other = chains.held(chains.with_diagonal(tensor(RATES)), ctrl.uniform_grid(1.1, 2))
    with pytest.raises(ValueError, match="same states and on the same grid"):
        chains.kl_rate(chain(), other)
