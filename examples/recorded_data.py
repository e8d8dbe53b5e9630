"""The best policy from somebody's records of states and actions at irregular times; no model."""

import math

import torch

import ctrl

A, B, S, M, N, DISCOUNT, TEMPERATURE = -0.3, 0.8, 0.6, 1.1, 0.5, 0.7, 0.2
PHI = lambda t, x: torch.cat([x**2, torch.ones_like(x)], 1)  # noqa: E731  # V is quadratic
PSI = lambda t, x, a: torch.cat([a**2, x * a], 1)  # noqa: E731  # and so is q


def main() -> tuple[float, float, float]:
    """V at x = 1 after four policy iterations, its standard error, and the best there is."""
    sde = ctrl.ControlledSDE(lambda t, x, a: A * x + B * a, lambda t, x: S)  # for the records alone
    old = ctrl.GaussianPolicy(lambda t, x: -0.2 * x, 0.8)
    episodes, noise = list[ctrl.recorded.Episode](), ctrl.noise.stream(0, "records")
    for _ in range(10):  # hundred episodes each, of 20 to 60 steps, which break off
        times = (0.004 + 0.012 * torch.rand(61, generator=noise).double()).cumsum(0)
        start, grid = torch.randn(100, 1, generator=noise).double(), ctrl.TimeGrid(times)
        paths = ctrl.simulate(ctrl.ControlProblem(sde, 9.0), old, start, grid, generator=noise)
        ends, over = torch.randint(20, 61, (100,), generator=noise), torch.zeros(100).bool()
        episodes += ctrl.recorded.episodes_of(ctrl.paths.stop(paths, ends, over))
    reward = lambda t, x, a: -(M * x[:, 0] ** 2 + N * a[:, 0] ** 2)  # noqa: E731
    problem = ctrl.ControlProblem(None, math.inf, reward, None, DISCOUNT, TEMPERATURE)
    data, gain, std = ctrl.recorded.paths_of(episodes), 0.0, 0.8
    for _ in range(4):
        policy = ctrl.GaussianPolicy(lambda t, x, gain=gain: gain * x, std)
        fit = ctrl.off_policy.evaluate(problem, policy, data, PHI, PSI, nodes=2)
        squared, crossed = fit.q.tolist()  # of a^2 and of x a: the next policy is exp(q / temp.)
        gain, std = -crossed / (2 * squared), math.sqrt(-TEMPERATURE / (2 * squared))
    at, rate = (torch.zeros(()).double(), torch.ones(1, 1).double()), DISCOUNT - 2 * A
    p = (rate - math.sqrt(rate**2 + 4 * B**2 * M / N)) * N / (2 * B**2)  # Riccati
    best = p + (S**2 * p + TEMPERATURE / 2 * math.log(math.pi * TEMPERATURE / N)) / DISCOUNT
    return float(fit.value(*at)), float(fit.value_error(*at)), best


if __name__ == "__main__":
    print("V(1) = {:.3f} +- {:.3f} from records, the best there is {:.3f}".format(*main()))
