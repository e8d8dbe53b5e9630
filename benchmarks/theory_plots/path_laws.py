"""Pictures of path laws: their KL, their ends, the two meanings of an action, the trust region."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

import ctrl
from benchmarks.theory_plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, panels
from ctrl import linear, trust_region
from ctrl.policy_gradient import (
    Decisions,
    DrawnActions,
    Transitions,
    return_gradient,
    temporal_difference_gradient,
)

_PULL, _SHIFT, _REFERENCE_PULL, _NOISE, _START = 1.2, 0.3, 0.5, 0.7, 0.6


def _doubles(*numbers: float) -> list[Tensor]:
    return [torch.tensor(number, dtype=torch.float64) for number in numbers]


def _two_laws() -> tuple[ctrl.ControlProblem, ctrl.DeterministicPolicy, ctrl.DeterministicPolicy]:
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: _NOISE)
    policy = ctrl.DeterministicPolicy(lambda t, x: _SHIFT - _PULL * x)
    reference = ctrl.DeterministicPolicy(lambda t, x: -_REFERENCE_PULL * x)
    return ctrl.ControlProblem(sde, horizon=1.0), policy, reference


def path_kl() -> Figure:
    """The running form and the log-ratio on the same paths; and what the grid's KL misses."""
    figure, (left, right) = panels(2)
    problem, policy, reference = _two_laws()
    sde, grid = problem.dynamics, ctrl.uniform_grid(1.0, steps=60)
    start = torch.full((10_000, 1), _START, dtype=torch.float64)
    paths = ctrl.simulate(
        problem, policy, start, grid, generator=ctrl.noise.stream(0, "path KL, drawn")
    )
    bins = torch.linspace(-1.0, 0.8, 61).tolist()
    for each, name, colour in (
        (ctrl.girsanov.log_ratio, "log-ratio", BLUE),
        (ctrl.girsanov.path_kl, "1/2 ∫|u|² dt", ORANGE),
    ):
        values = each(sde, policy, reference, paths)
        left.hist(values.tolist(), bins, histtype="step", color=colour, density=True, label=name)
        left.axvline(values.mean().item(), color=colour, linewidth=1, linestyle=":")
    left.set(xlabel="nats on one path", ylabel="density", title="one mean, two estimators")
    left.set_ylim(0, 6)
    numbers = _doubles(_PULL, _SHIFT, _REFERENCE_PULL, 0.0, _NOISE, _START, 0.0, 1.0)
    exact = linear.ornstein_uhlenbeck_path_kl(*numbers).item()
    steps, errors = [2, 3, 4, 6, 8, 12], []
    for n in steps:  # quadrature: exact expectations of squares
        nodes = ctrl.uniform_grid(1.0, n)
        noise = ctrl.noise.gauss_hermite(nodes.steps, nodes=2)
        begin = torch.full((len(noise.increments), 1), _START, dtype=torch.float64)
        chain = ctrl.simulate(problem, policy, begin, nodes, noise=noise)
        assert noise.weights is not None
        kl = noise.weights @ ctrl.girsanov.path_kl(sde, policy, reference, chain)
        errors.append(abs(kl.item() - exact))
    right.loglog([1 / n for n in steps], errors, "o-", color=BLUE, label="Euler chain's KL")
    right.loglog([1 / n for n in steps], [errors[-1] * 12 / n for n in steps], ":", color=GREY)
    right.text(0.26, errors[-1] * 12 * 0.3, "slope 1", ha="right", va="bottom")
    right.set_xticks([1 / 12, 1 / 6, 1 / 3], ["1/12", "1/6", "1/3"])
    right.minorticks_off()
    right.set_yticks([0.001, 0.002, 0.005], ["0.001", "0.002", "0.005"])
    right.set(xlabel="step h", ylabel="|error|, nats", title="a grid's number is the grid's")
    return figure


def terminal_kl() -> Figure:
    """KL of paths and of ends over the horizon."""
    figure, (axes,) = panels()
    times = torch.linspace(0, 4, 81, dtype=torch.float64)[1:]
    one = torch.ones(1, dtype=torch.float64)
    law = linear.Affine(-_PULL * one[None], _SHIFT * one)
    reference = linear.Affine(-_REFERENCE_PULL * one[None], 0 * one)
    noise, start = _NOISE * one[None], linear.Gaussian(_START * one, 0.4 * one[None])
    ends = [
        linear.gaussian_moments(m.matrix, m.vector, noise, start, times) for m in (law, reference)
    ]
    paths = linear.linear_path_kl(law, reference, noise, start, times)
    samples = linear.gaussian_kl(*ends)
    axes.plot(times, paths, color=BLUE, label="paths: 1/2 E ∫|u|² dt")
    axes.plot(times, samples, color=ORANGE, label="what is generated")
    axes.fill_between(times, samples, paths, color=GREY, alpha=0.15, linewidth=0)
    axes.text(2.9, 0.205, "gap: KL of the paths\ngiven where they end", ha="center")
    axes.set(xlabel="horizon T", ylabel="KL, nats")
    return figure


def _gradient_variance(view: Decisions, weighed: str, steps: int, paths: int = 4000) -> float:
    # one parameter a path: the gradient of the sum is every path's own
    level = torch.full((paths, 1), 0.4, dtype=torch.float64, requires_grad=True)
    policy = ctrl.GaussianPolicy(lambda t, x: level, std=0.5)
    sde = ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.8)
    problem = ctrl.ControlProblem(sde, 1.0, terminal_reward=lambda x: x.sum(1))

    def value(t: Tensor, x: Tensor) -> Tensor:
        left = (t - 1.0).exp()
        return (x * left + 0.4 * (1 - left)).sum(1)

    noise = ctrl.noise.stream(0, "variance", weighed, type(view).__name__, steps)
    start = torch.zeros(paths, 1, dtype=torch.float64)
    drawn = ctrl.simulate(problem, policy, start, ctrl.uniform_grid(1.0, steps), generator=noise)
    if weighed == "return":
        each = return_gradient(problem, policy, drawn, decisions=view)
    else:
        each = temporal_difference_gradient(problem, policy, value, drawn, decisions=view)
    return torch.autograd.grad(each.sum(), level)[0].var().item()


def two_actions() -> Figure:
    """Variance of the policy gradient over the number of steps."""
    figure, (axes,) = panels()
    steps = [5, 10, 20, 40, 80, 160]
    views: list[tuple[Decisions, str]] = [
        (DrawnActions(), "drawn score (A)"),
        (Transitions(ctrl.EulerMaruyama()), "next state (B)"),
    ]
    for (view, name), colour in zip(views, (BLUE, ORANGE), strict=True):
        for weighed, line in (("return", "o-"), ("dV", "s--")):
            variances = [_gradient_variance(view, weighed, n) for n in steps]
            axes.loglog(
                steps, variances, line, color=colour, markersize=4, label=f"{name}, {weighed}"
            )
    axes.set(xlabel="steps", ylabel="variance of the gradient, one path")
    axes.set_ylim(top=1e5)
    return figure


def trust_region_gap() -> Figure:
    """The surrogate's gap and its bounds, over the size of the change."""
    figure, (axes,) = panels(height=3.2)
    grid = ctrl.uniform_grid(1.0, steps=400)
    t = grid.nodes[:-1]
    c = torch.logspace(-1.3, 0.15, 30, dtype=torch.float64)[:, None]
    slope = (t - 1).exp()  # dX_T / dX_t, of dX = (c - X) dt + dW from 0; reward cos(X_T)
    smoothed = (-(1 - slope**2) / 4).exp()
    variance, shift = (1 - (-2 * t).exp()) / 2, c * (1 - (-t).exp())
    kl = c**2 * t / 2
    lipschitz = c * slope**2 * smoothed
    of_h = (c * slope * smoothed) ** 2 * (1 - (-2 * slope**2 * variance).exp()) / 2
    chi2 = torch.where(variance > 0, (shift**2 / variance.clamp_min(1e-30)).expm1(), 0.0)
    gap = (1 - (c[:, 0] * (1 - torch.e**-1)).cos()) * smoothed[0]
    bounds = {
        "bounded h (Pinsker)": (trust_region.bounded(2 * c * slope * smoothed, kl, grid), GREEN),
        "transport (Talagrand)": (
            trust_region.transport(lipschitz, variance.expand_as(lipschitz), kl, grid),
            ORANGE,
        ),
        "Wasserstein": (trust_region.wasserstein(lipschitz, shift, grid), PURPLE),
        "chi-square": (trust_region.chi_square(of_h, chi2, grid), BLUE),
    }
    for name, (values, colour) in bounds.items():
        line = "--" if name == "Wasserstein" else "-"
        axes.loglog(c[:, 0], values, line, color=colour, linewidth=1.4, label=name)
    axes.loglog(c[:, 0], gap, color=GREY, linewidth=2.6, label="gap: V' - L")
    axes.set(xlabel="change c of the drift", ylabel="reward", title="all of second order")
    return figure
