"""Pictures of control: evaluation, exploration, policy iteration, exits, and orders of solvers."""

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

import ctrl
from benchmarks.theory_plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, panels
from ctrl import linear
from ctrl.problems import exploratory_lq_benchmark


def policy_evaluation() -> Figure:
    """The value at time 0 where each method ends, under features that cannot represent it."""
    figure, (axes,) = panels(height=3.2)
    pull, noise, horizon = 1.2, 0.7, 1.0
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: noise)
    problem = ctrl.ControlProblem(sde, horizon, running_reward=lambda t, x, a: x.square().sum(1))
    policy = ctrl.DeterministicPolicy(lambda t, x: -pull * x)
    stream, grid = ctrl.noise.stream(0, "policy evaluation"), ctrl.uniform_grid(horizon, steps=40)
    start = 0.6 + 0.4**0.5 * torch.randn(20_000, 1, dtype=torch.float64, generator=stream)
    paths = ctrl.simulate(problem, policy, start, grid, generator=stream)

    def features(t: Tensor, x: Tensor) -> Tensor:
        return (horizon - t) * torch.cat([x**0, x, x**2], 1)

    along = torch.stack(
        [features(t, x) for t, x in zip(grid.nodes, paths.states.unbind(1), strict=True)], 1
    )
    paid = ctrl.running_rewards(problem, paths)
    goal = ctrl.returns_to_go(problem, paths)[:, : len(grid.steps)].flatten()
    projection = torch.linalg.lstsq(along[:, :-1].flatten(0, 1), goal[:, None]).solution[:, 0]
    flat = torch.linalg.lstsq(along.diff(dim=1).flatten(0, 1), -paid.flatten()[:, None]).solution[
        :, 0
    ]
    x = torch.linspace(-1.5, 2.5, 81, dtype=torch.float64)[:, None]
    decay = (1 - math.exp(-2 * pull * horizon)) / (2 * pull)
    exact = x.square() * decay + noise**2 / (2 * pull) * (horizon - decay)
    axes.plot(x, exact, color=GREY, linewidth=3, alpha=0.6, label="the value")
    lines = (
        ("martingale loss", projection, "-", BLUE),
        ("CTD(0)", ctrl.martingale.clstd(features, problem, paths).coefficients, "--", ORANGE),
        ("sum of dM²: wrong", flat, ":", PURPLE),
    )
    for name, coefficients, line, colour in lines:
        axes.plot(x, features(torch.zeros(()), x) @ coefficients, line, color=colour, label=name)
    axes.set(xlabel="x", ylabel="J(0, x)")
    return figure


def exploratory_sde() -> Figure:
    """Variance of the state where actions are drawn and held, and of the exploratory SDE."""
    figure, (axes,) = panels()
    sde = ctrl.ControlledSDE(
        lambda t, x, a: a - x, lambda t, x, a: 0.4 + 0.5 * a, controls_diffusion=True
    )
    policy = ctrl.GaussianPolicy(lambda t, x: 0 * x + 0.2, std=0.9)
    averaged = ctrl.exploratory_sde(sde, policy)
    mean = ctrl.DeterministicPolicy(policy.mean)
    start, steps = torch.zeros(40_000, 1, dtype=torch.float64), [2, 4, 8, 16, 32, 64]
    curves: dict[str, list[float]] = {}
    for n in steps:
        for name, equation, acting in (
            ("drawn and held", sde, policy),
            ("exploratory SDE", averaged, mean),
            ("sigma of the mean action", sde, mean),
        ):
            end = ctrl.simulate_end(
                ctrl.ControlProblem(equation, 1.0), acting, start, ctrl.uniform_grid(1.0, n),
                generator=ctrl.noise.stream(0, name, n),
            )  # fmt: skip
            curves.setdefault(name, []).append(end.var().item())
    for (name, values), line, colour in zip(
        curves.items(), ("o-", "s--", "^:"), (BLUE, ORANGE, PURPLE), strict=True
    ):
        axes.semilogx(steps, values, line, color=colour, markersize=4, label=name)
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.minorticks_off()
    axes.set(xlabel="steps", ylabel="variance of X_T", ylim=(0, None))
    return figure


def exploratory_lq() -> Figure:
    """The optimal policy of the ergodic benchmark at three temperatures."""
    figure, (axes,) = panels()
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    t = torch.zeros((), dtype=torch.float64)
    for temperature, colour in ((0.5, GREEN), (0.1, BLUE), (0.02, ORANGE)):
        law = exploratory_lq_benchmark(temperature).optimal_policy
        assert isinstance(law, ctrl.MultivariateGaussianPolicy | ctrl.GaussianPolicy)
        mean = law.mean(t, x)[:, 0]
        std = law.distribution(t, x).stddev.flatten()
        axes.fill_between(
            x[:, 0], mean - std, mean + std, color=colour, alpha=0.3, linewidth=0,
            label=f"± std, temperature {temperature:g}",
        )  # fmt: skip
        axes.plot(x[:, 0], mean, color=GREY, linewidth=1.2)
    axes.set(xlabel="x", ylabel="action", title="one mean for every temperature")
    return figure


def policy_iteration() -> Figure:
    """Error of the value's curvature over the iterations, from three starts."""
    figure, (axes,) = panels()
    one = torch.ones(1, 1, dtype=torch.float64)
    lq = linear.LinearQuadratic(
        A=0.3 * one, B=one, sigma=0.5 * one, M=one, N=0.8 * one, discount=0.9, temperature=0.1
    )
    best = linear.solve_lq_discounted(lq).quadratic
    for first, colour in ((-20.0, BLUE), (-4.0, ORANGE), (-1.0, GREEN)):
        guess = linear.Quadratic(first * one, best.slope, best.constant)
        errors = []
        for _ in range(8):
            guess = linear.evaluate_lq_discounted(lq, linear.improve_lq(lq, guess)).quadratic
            errors.append(max((best.hessian - guess.hessian).abs().item(), 1e-17))
        shown = [e for e in errors if e > 1e-15]
        axes.semilogy(
            range(1, len(shown) + 1), shown, "o-", color=colour, label=f"from S = {first:g}"
        )
    axes.set(xlabel="iteration", ylabel="|S - S*|", title="digits double")
    return figure


def exits() -> Figure:
    """Error of the mean exit time of Brownian motion from (-1, 1)."""
    figure, (axes,) = panels()
    problem = ctrl.ControlProblem(
        ctrl.ControlledSDE(lambda t, x, a: 0 * x, lambda t, x: 1.0),
        horizon=math.inf,
        domain=ctrl.stopping.Interval(-1.0, 1.0),
    )
    nobody = ctrl.DeterministicPolicy(lambda t, x: x[:, :0])
    start, exact = torch.full((20_000, 1), 0.2, dtype=torch.float64), 1 - 0.2**2
    sizes = [0.16, 0.08, 0.04, 0.02]
    for rule, name, colour in (
        (ctrl.stopping.AtNodes(), "seen at the nodes", ORANGE),
        (ctrl.stopping.BridgeCorrected(), "with bridges", BLUE),
    ):
        errors = []
        for h in sizes:
            grid = ctrl.uniform_grid(8.0, round(8.0 / h))
            paths = ctrl.simulate(
                problem, nobody, start, grid, stopping=rule, keep=("actions",),
                generator=ctrl.noise.stream(0, name, round(1000 * h)),
            )  # fmt: skip
            errors.append(float(grid.nodes[paths.ends].mean()) - exact)
        axes.loglog(sizes, errors, "o-", color=colour, label=name)
    axes.loglog(sizes, [0.5 * h for h in sizes], ":", color=GREY, label="h / 2")
    axes.set_xticks(sizes, [f"{h:g}" for h in sizes])
    axes.minorticks_off()
    axes.set(xlabel="step h", ylabel="error of the mean exit time")
    return figure


def solver_orders() -> Figure:
    """Strong error on geometric Brownian motion."""
    figure, (axes,) = panels()
    sde = ctrl.ControlledSDE(lambda t, x, a: 0.5 * x, lambda t, x: 0.8 * x)
    nobody = ctrl.DeterministicPolicy(lambda t, x: x[:, :0])
    fine, paths = ctrl.uniform_grid(1.0, 512), 2000
    path = ctrl.noise.brownian_increments(
        fine.steps, paths, generator=ctrl.noise.stream(0, "strong orders")
    )
    exact = (0.5 - 0.32 + 0.8 * path.sum(1)).exp()
    start, steps = torch.ones(paths, 1, dtype=torch.float64), [8, 16, 32, 64, 128, 256]
    for solver, equation, line, colour in (
        (ctrl.EulerMaruyama(), sde, "o-", ORANGE),
        (ctrl.Milstein(), sde, "s-", BLUE),
        (ctrl.Heun(), sde.to_stratonovich(), "^--", GREEN),
    ):
        errors = []
        for n in steps:
            grid = ctrl.uniform_grid(1.0, n)
            noise = ctrl.Noise(ctrl.noise.coarsen(path, fine.nodes, grid.nodes))
            end = ctrl.simulate_end(
                ctrl.ControlProblem(equation, 1.0), nobody, start, grid, solver, noise=noise
            )
            errors.append((end - exact).square().mean().sqrt().item())
        axes.loglog(
            [1 / n for n in steps], errors, line, color=colour, markersize=4,
            label=type(solver).__name__,
        )  # fmt: skip
    axes.set(xlabel="step h", ylabel="(E |error|²)^½ at T = 1")
    return figure
