"""Pictures of fine-tuning: the tilt, what a start spoils, the frontier, samplers."""

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

import ctrl
from benchmarks.theory_plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, panels
from diffusion_envs.denoising import generation_sde, kl_factor
from diffusion_envs.exact import GaussianProblem, gaussian, linear_policy, table
from diffusion_envs.exact.problems import MixtureProblem
from diffusion_envs.frontier import Frontier
from diffusion_envs.noise_schedules import NoiseSchedule, VPLinear
from diffusion_envs.samplers import DDIM
from diffusion_envs.training.optimisers.natural_gradient import natural_direction

ZERO, ONE = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
DATA = gaussian.Gaussian(0.8 * ONE[None], 0.5 * ONE[None, None])
NO_GAIN, NO_SHIFT = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)


def generation() -> Figure:
    """Paths from noise to data from the same starts: the time reversal, and the flow."""
    figure, axes = panels(2)
    problem, schedule, grid = MixtureProblem(), VPLinear(0.1, 20.0), ctrl.uniform_grid(1.0, 200)

    def score(t: Tensor, x: Tensor) -> Tensor:
        s = (schedule.horizon - t).expand(len(x))
        return problem.exact_score(x, schedule.alpha(s), schedule.sigma(s))

    start = torch.randn(12, 1, dtype=torch.float64, generator=ctrl.noise.stream(0, "start"))
    for panel, eta, title in ((axes[0], 1.0, "eta = 1: SDE"), (axes[1], 0.0, "eta = 0: ODE")):
        paths = ctrl.simulate(
            ctrl.ControlProblem(generation_sde(schedule, eta), horizon=1.0),
            ctrl.DeterministicPolicy(score),
            start,
            grid,
            generator=ctrl.noise.stream(0, "generation"),
        )
        for path in paths.states[:, ::5, 0]:
            colour = (BLUE, ORANGE)[int(path[-1] > -0.15)]
            panel.plot(grid.nodes[::5], path, color=colour, linewidth=0.9)
        x = torch.linspace(-2.6, 2.6, 53, dtype=torch.float64)
        for at, side, alpha, sigma in ((0.0, -1, 0.0, 1.0), (1.0, 1, 1.0, 0.0)):
            density = torch.zeros_like(x)
            for w, m, std in zip(problem.weights, problem.means, problem.stds, strict=True):
                law = torch.distributions.Normal(alpha * m, (alpha**2 * std**2 + sigma**2) ** 0.5)
                density += w * law.log_prob(x).exp()
            panel.fill_betweenx(
                x, at, at + 0.25 * side * density, color=GREY, alpha=0.4, linewidth=0
            )
        panel.set(xlabel="t", ylabel="X", title=title, xlim=(-0.2, 1.2), ylim=(-2.7, 2.7))
        panel.set_xticks([0, 1], ["0: noise", "1: data"])
    return figure


def eta_family() -> Figure:
    """Weight of the path KL, and the response of the samples to a change of the score."""
    figure, (left, right) = panels(2)
    etas = torch.linspace(0.15, 2.5, 120).tolist()
    left.semilogy(etas, [0.5 * kl_factor(eta) for eta in etas], color=BLUE)
    left.plot([1], [0.5], "o", color=ORANGE)
    left.annotate("time reversal: 1/2", (1, 0.5), (1.0, 1.2), ha="center")
    left.set(xlabel="η", ylabel="path KL / ∫ g² |Δs|² dt", title="what a change costs")
    schedule, times = VPLinear(0.1, 20.0), torch.linspace(1, 0, 601, dtype=torch.float64)
    etas = torch.linspace(0.02, 1.5, 23).tolist()  # no KL, hence no steps, at 0
    response = []
    for eta in etas:
        steps = linear_policy.Steps.of_euler(schedule, times, eta)
        start = gaussian.marginal(DATA, schedule, times[0])
        ends = [
            linear_policy.moments(
                linear_policy.chain(DATA, schedule, steps, NO_GAIN, shift), start
            )[-1].mean.item()
            for shift in (NO_SHIFT, NO_SHIFT + 1)
        ]
        response.append(ends[1] - ends[0])
    right.plot(etas, response, color=BLUE)
    right.plot([0, 1], [3.665, 1.240], "o", color=ORANGE)
    right.annotate("ODE: 3.665", (0, 3.665), (0.1, 3.6))
    right.annotate("SDE: 1.240", (1, 1.24), (1.0, 1.5))
    right.set(xlabel="η", ylabel="move of the mean / c", title="what a change does", ylim=(0, 4))
    return figure


def kl_tilt() -> Figure:
    """Pretrained density, reward, and the tilt at three weights."""
    figure, (axes,) = panels(height=3.2)
    problem = MixtureProblem()
    x, rewards = problem.grid, problem.rewards
    density = torch.zeros_like(x)
    for weight, mean, std in zip(problem.weights, problem.means, problem.stds, strict=True):
        density += weight * torch.distributions.Normal(mean, std).log_prob(x).exp()
    inside = x.abs() <= 2.6
    axes.fill_between(
        x[inside], density[inside], color=GREY, alpha=0.3, linewidth=0, label="pretrained"
    )
    axes.plot(x[inside], 0.3 * rewards[inside] + 1.75, ":", color=GREY, label="reward, moved up")
    for kl_weight, colour in ((2.0, BLUE), (0.7, GREEN), (0.25, ORANGE)):
        tilted = density * (rewards / kl_weight).exp()
        tilted /= torch.trapezoid(tilted, x)
        axes.plot(x[inside], tilted[inside], color=colour, label=f"tilt, β = {kl_weight:g}")
    axes.set(xlabel="x", ylabel="density", ylim=(0, 3.3))
    return figure


def value_function_bias() -> Figure:
    """KL of what the optimum generates from the tilt, over the signal left at the start."""
    figure, (axes,) = panels()
    tilted = gaussian.tilt(
        DATA, gaussian.Quadratic(0.6 * ONE[None, None], 1.5 * ONE[None], ZERO), 0.7
    )
    tilt = ctrl.linear.Gaussian(tilted.mean, tilted.covariance)
    alphas, from_marginal, from_normal = [], [], []
    for noise in torch.logspace(-0.6, 1.0, 25).tolist():
        schedule = VPLinear(noise, noise)
        step = gaussian.transition(tilted, schedule, ONE, ZERO)
        alphas.append(schedule.alpha(ONE).item())
        normal = gaussian.Gaussian(NO_SHIFT, torch.ones(1, 1, dtype=torch.float64))
        for start, values in (
            (gaussian.marginal(DATA, schedule, ONE), from_marginal),
            (normal, from_normal),
        ):
            law = step.after(start)
            values.append(
                ctrl.linear.gaussian_kl(ctrl.linear.Gaussian(law.mean, law.covariance), tilt).item()
            )
    axes.loglog(alphas, from_normal, color=ORANGE, label="from N(0, I)")
    axes.loglog(alphas, from_marginal, color=BLUE, label="from the noised data")
    m, best, s = DATA.mean.item(), tilted.mean.item(), tilted.covariance.item()
    for gap in (best**2, (m - best) ** 2):
        axes.loglog(alphas, [a**4 * gap * s / 2 for a in alphas], ":", color=GREY, linewidth=1)
    axes.set(xlabel="signal left at the start", ylabel="KL(generated ‖ tilt), nats")
    return figure


def _moved(steps: int, every: int) -> float:
    problem, sampler = GaussianProblem(), DDIM(eta=1.0).bind(table(), steps)
    gain = torch.zeros(steps, 2, 2, dtype=torch.float64)
    shift = torch.zeros(steps, 2, dtype=torch.float64)
    rest = problem.law_of(gain, shift, sampler).mean
    shift[::every] = 1.0
    return float((problem.law_of(gain, shift, sampler).mean - rest).sum())


def step_transfer() -> Figure:
    """How much of a shift trained at 50 steps is left at other numbers of steps."""
    figure, (axes,) = panels()
    steps, trained = [25, 50, 100, 250, 500], 50
    full = _moved(trained, 1)
    smooth = [_moved(n, 1) / full for n in steps]
    stored = [_moved(n, max(1, n // trained)) / full for n in steps]
    axes.semilogx(steps, smooth, "o-", color=BLUE, label="smooth in time")
    axes.semilogx(steps, stored, "s-", color=ORANGE, label="an entry for each of 50 steps")
    axes.axvline(trained, color=GREY, linewidth=1, linestyle=":")
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.minorticks_off()
    axes.set(
        xlabel="steps of sampling (trained at 50)", ylabel="share of the shift", ylim=(0, 1.15)
    )
    return figure


def natural_gradient() -> Figure:
    """Two steps of equal path KL: along the gradient, and along the natural one."""
    figure, (axes,) = panels(height=3.2)
    metric = torch.tensor([[1.0, 0.8], [0.8, 2.2]], dtype=torch.float64)
    gradient = torch.tensor([1.0, 0.1], dtype=torch.float64)
    nats = 0.02
    natural, _ = natural_direction(lambda v: metric @ v, gradient, iterations=2, damping=0.0)
    angle = torch.linspace(0, 2 * math.pi, 121, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])
    edge = circle * (2 * nats / (circle * (metric @ circle)).sum(0)).sqrt()
    axes.plot(*edge.tolist(), color=GREY, label=f"{nats:g} nats from here")
    for direction, name, colour in (
        (gradient, "gradient", ORANGE),
        (natural, "natural gradient", BLUE),
    ):
        step = direction * (2 * nats / (direction @ metric @ direction)).sqrt()
        gain = (gradient @ step).item()
        axes.plot(
            [0, step[0].item()],
            [0, step[1].item()],
            "o-",
            color=colour,
            label=f"{name}: gains {gain:.3f}",
        )
        x = torch.linspace(-0.3, 0.45, 2, dtype=torch.float64)
        line = (gain - gradient[0] * x) / gradient[1]
        axes.plot(x, line, ":", color=colour, linewidth=1)
    axes.set(xlabel="first parameter", ylabel="second parameter")
    axes.set(xlim=(-0.28, 0.42), ylim=(-0.22, 0.34), aspect="equal")
    return figure


def frontier() -> Figure:
    """The frontier from 2,000 samples, with its interval, and exactly."""
    figure, (axes,) = panels()
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(2000, dtype=torch.float64, generator=generator)
    points = [
        p
        for p in Frontier(rewards, ["one prompt"] * 2000, generator=generator).curve(30)
        if p.known and math.isfinite(p.reward.high)
    ]
    nats = [p.kl.mean for p in points]
    axes.fill_between(
        nats, [p.reward.low for p in points], [p.reward.high for p in points],
        color=BLUE, alpha=0.25, linewidth=0, label="95 % interval",
    )  # fmt: skip
    axes.plot(nats, [p.reward.mean for p in points], color=BLUE, label="2,000 samples")
    exact = torch.linspace(0, max(nats), 100)
    axes.plot(exact, (2 * exact).sqrt(), "--", color=ORANGE, label="exactly, √(2 KL)")
    kl_weight = 1.0  # the tangent of slope b touches at b^-2 / 2
    axes.plot(
        exact, 0.5 / kl_weight + kl_weight * exact, ":", color=GREY, label="J*(β) + β KL, β = 1"
    )
    axes.set(xlabel="KL from the pretrained model, nats", ylabel="expected reward")
    return figure


def _chain(steps: linear_policy.Steps, schedule: NoiseSchedule) -> gaussian.Affine:
    return linear_policy.chain(DATA, schedule, steps, NO_GAIN, NO_SHIFT)


def _chain_kl(steps: int) -> float:
    """KL of the exact reverse process from DDPM's chain on its grid, nats."""
    noise = table(
        steps + 1, 2.0, 2.0
    )  # all of its entries; the last step, which has no noise, left out
    sampler = DDIM(eta=1.0).bind(noise, steps)
    s = sampler.noising_times
    chain = _chain(linear_policy.Steps.of(sampler), noise)
    exact = gaussian.transition(DATA, noise, s[:-1], s[1:])
    before = gaussian.marginal(DATA, noise, s[:-1])
    ratio = (exact.covariance / chain.covariance).flatten()
    slope = (exact.matrix - chain.matrix).flatten()
    offset = (exact.shift - chain.shift).flatten()
    mean, variance = before.mean.flatten(), before.covariance.flatten()
    squared = slope**2 * variance + (slope * mean + offset) ** 2
    return float(0.5 * (squared / chain.covariance.flatten() + ratio - 1 - ratio.log()).sum())


def ddim() -> Figure:
    """Error of the generated variance, and a chain's KL that stays."""
    figure, (left, right) = panels(2)
    steps = [10, 20, 50, 100, 250, 500]
    schedule = VPLinear(0.1, 20.0)
    errors: dict[str, list[float]] = {"Euler-Maruyama": [], "DDIM, η = 1": [], "DDIM, η = 0.2": []}

    def variance(chain: gaussian.Affine, level: Tensor) -> float:
        return linear_policy.moments(chain, gaussian.marginal(DATA, schedule, level))[
            -1
        ].covariance.item()

    for n in steps:
        times = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        euler = _chain(linear_policy.Steps.of_euler(schedule, times), schedule)
        errors["Euler-Maruyama"].append(abs(variance(euler, times[0]) - 0.5))
        for eta, name in ((1.0, "DDIM, η = 1"), (0.2, "DDIM, η = 0.2")):
            sampler = DDIM(eta).bind(table(), n)
            chain = _chain(linear_policy.Steps.of(sampler), table())
            aim = gaussian.marginal(DATA, table(), sampler.noising_times[-1]).covariance.item()
            errors[name].append(abs(variance(chain, sampler.noising_times[0]) - aim))
    for (name, values), colour in zip(errors.items(), (BLUE, ORANGE, PURPLE), strict=True):
        left.loglog(steps, values, "o-", color=colour, markersize=4, label=name)
    left.set(xlabel="steps", ylabel="|variance - its limit|", title="generating N(0.8, 0.5)")
    steps = [10, 30, 100, 300, 1000, 3000]
    right.semilogx(steps, [_chain_kl(n) for n in steps], "o-", color=BLUE, label="KL(exact ‖ DDPM)")
    right.axhline(0.28861, color=ORANGE, linestyle="--", label="half of Euler's constant")
    right.set(
        xlabel="steps", ylabel="KL of the chain, nats", ylim=(0, 0.34), title="it does not vanish"
    )
    return figure
