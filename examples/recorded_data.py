"""The best policy from somebody else's records, without a model: policy iteration on old data.

Episodes of a behaviour policy, of different length, observed at irregular times. From them alone
(no dynamics, no simulator, no new data) V and q of a policy, then a better one; the best is known.

    python examples/recorded_data.py
"""

import math

import torch

import ctrl

A, B, S, M, N, DISCOUNT, TEMPERATURE = -0.3, 0.8, 0.6, 1.1, 0.5, 0.7, 0.2


def records(generator: torch.Generator) -> list[ctrl.recorded.Episode]:
    """What somebody recorded: states, and actions held between irregular observations."""
    sde = ctrl.ControlledSDE(lambda t, x, a: A * x + B * a, lambda t, x: S)
    old, kept = ctrl.GaussianPolicy(lambda t, x: -0.2 * x, 0.8), []
    for _ in range(10):
        h = 0.004 + 0.012 * torch.rand(60, generator=generator).double()
        grid = ctrl.TimeGrid(torch.cat([h.new_zeros(1), h.cumsum(0)]))
        start = torch.randn(100, 1, generator=generator).double()
        paths = ctrl.simulate(ctrl.ControlProblem(sde, 9.0), old, start, grid, generator=generator)
        ends, over = torch.randint(20, 61, (100,), generator=generator), torch.zeros(100).bool()
        kept += ctrl.recorded.episodes_of(ctrl.paths.stop(paths, ends, terminated=over))
    return kept


def main() -> tuple[float, float, float]:
    """V at x = 1 of the improved policy, its standard error, and the best there is."""
    data = ctrl.recorded.paths_of(records(torch.Generator().manual_seed(0)))
    reward = lambda t, x, a: -(M * x[:, 0] ** 2 + N * a[:, 0] ** 2)  # noqa: E731
    problem = ctrl.ControlProblem(None, math.inf, reward, None, DISCOUNT, TEMPERATURE)
    policy: ctrl.RandomPolicy = ctrl.GaussianPolicy(lambda t, x: 0 * x, 0.8)
    for _ in range(4):
        fit = ctrl.off_policy.evaluate(
            problem, policy, data,
            features=lambda t, x: torch.cat([x**2, torch.ones_like(x)], 1),
            action_features=lambda t, x, a: torch.cat([a**2, x * a], 1), nodes=2,
        )  # fmt: skip
        squared, crossed = fit.q.tolist()  # of a^2 and x a: the Gibbs policy is Gaussian
        gain, std = -crossed / (2 * squared), math.sqrt(-TEMPERATURE / (2 * squared))
        policy = ctrl.GaussianPolicy(lambda t, x, gain=gain: gain * x, std)
        t, x = data.grid.nodes[0, 0], torch.ones(1, 1).double()
        print(f"V(1) = {float(fit.value(t, x)):.3f}, next policy N({gain:.3f} x, {std:.3f}^2)")
    p = (DISCOUNT - 2 * A - math.sqrt((DISCOUNT - 2 * A) ** 2 + 4 * B**2 * M / N)) * N / (2 * B**2)
    best = p + (S**2 * p + TEMPERATURE / 2 * math.log(math.pi * TEMPERATURE / N)) / DISCOUNT
    return float(fit.value(t, x)), float(fit.value_error(t, x)), best


if __name__ == "__main__":
    value, error, best = main()
    print(f"V(1) = {value:.3f} +- {error:.3f} from records; the best there is: {best:.3f}")
