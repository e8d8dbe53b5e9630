"""Every estimator of ctrl has on a device the numbers that it has on the CPU."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import ctrl
from ctrl import agents, hjb
from ctrl import martingale as mg
from ctrl import policy_gradient as pg
from ctrl import q_learning as ql
from tests.device.memory import NAME

STEPS, HORIZON, PATHS, DIM = 5, 0.8, 12, 2
FLOAT = torch.float64


@dataclass(frozen=True, eq=False)
class Setting:
    """A problem whose functions hold tensors of a device, and paths of it there."""

    device: str
    grid: ctrl.TimeGrid
    sde: ctrl.ControlledSDE
    problem: ctrl.ControlProblem
    mean: ctrl.DeterministicPolicy
    reference: ctrl.DeterministicPolicy
    drawn: ctrl.GaussianPolicy
    start: torch.Tensor
    noise: ctrl.Noise
    gain: torch.Tensor
    level: torch.Tensor

    def value(self, t, x):
        return (1 + t) * (self.level * x).sin().sum(1)

    def q(self, t, x, a):
        return (self.gain * x * a).sum(1) + t

    def paths(self, policy=None, solver=None, **settings):
        settings = {"noise": self.noise} | settings
        policy = policy or self.drawn
        return ctrl.simulate(self.problem, policy, self.start, self.grid, solver, **settings)

    def normals(self, *shape, seed=3):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=FLOAT).to(self.device)

    def generator(self, seed=1):
        return torch.Generator(self.device).manual_seed(seed)


def setting(device, grid_device="cpu", noise="diagonal"):
    held = lambda *numbers: torch.tensor(numbers, dtype=FLOAT, device=device)
    gain, level, sigma = held(-0.6, 0.4), held(0.9, 1.1), held(0.4, 0.5)
    grid = ctrl.uniform_grid(HORIZON, STEPS, device=grid_device)
    if noise == "general":
        matrix = held([0.4, 0.1], [0.0, 0.5])
        diffusion = lambda t, x: matrix.expand(len(x), 2, 2)
        sde = ctrl.ControlledSDE(lambda t, x, a: a - x, diffusion, "general", 2)
    elif noise == "scalar":
        sde = ctrl.ControlledSDE(lambda t, x, a: 0 * x + a, lambda t, x: 0.7, "scalar")
    else:
        varying = lambda t, x: sigma + 0.1 * x.sin() * (1 + t)
        sde = ctrl.ControlledSDE(lambda t, x, a: a - x, varying)
    # the time as a network takes it: a number without dimensions may come from any device
    mean = lambda t, x: gain * x * (1 + 0.1 * t.expand(len(x)).unsqueeze(1))
    reward = lambda t, x, a: -(gain * a).square().sum(1)
    terminal = lambda x: (level * x).sin().sum(1)
    problem = ctrl.ControlProblem(sde, HORIZON, reward, terminal, 0.3, 0.1)
    generator = torch.Generator().manual_seed(4)
    drawn = lambda *shape: torch.randn(*shape, dtype=FLOAT, generator=generator).to(device)
    width = (DIM,) if noise != "scalar" else ()
    increments = math.sqrt(HORIZON / STEPS) * drawn(PATHS, STEPS, *width)
    return Setting(
        device=device,
        grid=grid,
        sde=sde,
        problem=problem,
        mean=ctrl.DeterministicPolicy(mean),
        reference=ctrl.DeterministicPolicy(lambda t, x: 0.1 * x),
        drawn=ctrl.GaussianPolicy(mean, held(0.5, 0.3)),
        start=torch.linspace(-1, 1, PATHS * DIM, dtype=FLOAT).view(PATHS, DIM).to(device),
        noise=ctrl.Noise(increments, drawn(PATHS, STEPS, DIM)),
        gain=gain,
        level=level,
    )


# -- the same numbers ------------------------------------------------------------------------------


def solved(s, solver):
    """States of a solver, in the sense that it takes."""
    heun = isinstance(solver, ctrl.Heun) or getattr(solver, "method", "") in ("midpoint", "log_ode")
    sde = s.sde.to_stratonovich() if heun else s.sde
    problem = ctrl.ControlProblem(sde, HORIZON)
    return ctrl.simulate(problem, s.mean, s.start, s.grid, solver, noise=s.noise).states


def ended(s, solver):
    return ctrl.simulate_end(s.problem, s.mean, s.start, s.grid, solver, noise=s.noise)


def differentiated(s):
    factor = torch.tensor(0.7, dtype=FLOAT, device=s.device, requires_grad=True)
    policy = ctrl.DeterministicPolicy(lambda t, x: factor * s.gain * x)
    end = s.paths(policy, differentiable=True).states[:, -1].square().sum()
    return torch.autograd.grad(end, factor)[0]


def adjoint(s):
    factor = torch.tensor(0.7, dtype=FLOAT, device=s.device, requires_grad=True)
    sde = ctrl.ControlledSDE(lambda t, x, a: factor * a - x, lambda t, x: 0.4)
    solver = ctrl.TorchSDE("euler", adjoint=True, parameters=(factor,))
    problem = ctrl.ControlProblem(sde, HORIZON)
    paths = ctrl.simulate(
        problem, s.mean, s.start, s.grid, solver, noise=s.noise, differentiable=True
    )
    return torch.autograd.grad(paths.states[:, -1].square().sum(), factor)[0]


def transported(s, solver=None):
    return pg.Transitions(solver or ctrl.EulerMaruyama())


def without_temperature(s):
    p = s.problem
    return ctrl.ControlProblem(p.sde, HORIZON, p.running_reward, p.terminal_reward, p.discount)


def unpaid(s):
    return ctrl.ControlProblem(s.sde, HORIZON)


def gibbs_policy(s):
    quadratic = ctrl.ControlProblem(
        s.sde, HORIZON, lambda t, x, a: -(s.level * a.square()).sum(1), temperature=0.2
    )
    policy = ql.gibbs_policy(quadratic, lambda t, x: x.square().sum(1), DIM, s.start[0])
    return policy.act(policy.mean(s.start.new_tensor(0.2), s.start), s.start.new_tensor(0.2),
                      s.noise.actions[:, 0])  # fmt: skip


def fitted(s):
    paths = s.paths()
    features = lambda t, x: torch.stack([x[:, 0], x[:, 1], x.square().sum(1) * t], dim=1)
    found = mg.clstd(features, s.problem, paths, s.drawn)
    return found(s.start.new_tensor(0.3), s.start)


def streamed(s, solver=None):
    noise = {"noise": None, "generator": ctrl.noise.PathStreams(3, ("a",))}
    return s.paths(s.mean, solver, **noise).states


def signs(s):
    return ctrl.noise.random_signs(PATHS, STEPS, 4, DIM, like=s.start, generator=s.generator())


def black_box(s):
    solver = ctrl.BlackBox(lambda t0, t1, x, a: x + float(t1 - t0) * a)
    return s.paths(s.mean, solver, noise=None).states


def gradient(of):
    """The gradient of an estimator's mean in the policy's parameter."""

    def run(s):
        factor = torch.tensor(0.7, dtype=FLOAT, device=s.device, requires_grad=True)
        policy = ctrl.GaussianPolicy(lambda t, x: factor * s.gain * x, s.gain.abs())
        return torch.autograd.grad(of(s, policy).mean(), factor)[0]

    return run


QUADRATIC = lambda s: lambda t, x, a: -(s.level * (a - s.gain * x).square()).sum(1)
BY_SOLVER = {
    "EulerMaruyama": ctrl.EulerMaruyama(),
    "Milstein": ctrl.Milstein(),
    "Heun": ctrl.Heun(),
    "TorchSDE euler": ctrl.TorchSDE("euler"),
    "TorchSDE milstein": ctrl.TorchSDE("milstein"),
    "TorchSDE srk": ctrl.TorchSDE("srk"),
    "TorchSDE midpoint": ctrl.TorchSDE("midpoint"),
    "TorchSDE log_ode": ctrl.TorchSDE("log_ode"),
    "TorchSDE divided": ctrl.TorchSDE("srk", dt=0.05),
    "TorchSDE adaptive": ctrl.TorchSDE("srk", adaptive=True, rtol=1e-2, atol=1e-3),
}

CASES = {
    **{f"simulate, {name}": (lambda s, x=x: solved(s, x)) for name, x in BY_SOLVER.items()},
    "simulate_end, EulerMaruyama": lambda s: ended(s, ctrl.EulerMaruyama()),
    "simulate_end, Milstein": lambda s: ended(s, ctrl.Milstein()),
    "simulate_end, TorchSDE": lambda s: ended(s, ctrl.TorchSDE("euler")),
    "simulate, black box": black_box,
    "simulate, differentiable": differentiated,
    "simulate, adjoint": adjoint,
    "simulate, streams": streamed,
    "simulate, streams, srk": lambda s: streamed(s, ctrl.TorchSDE("srk")),
    "simulate, drawn actions": lambda s: s.paths().actions,
    # rows of 16 numbers: the CPU's generator draws these alike one by one and together
    "simulate, generator": lambda s: ctrl.simulate(
        s.problem, s.mean, s.start[:1].expand(8, DIM), s.grid, generator=s.generator()).states,
    "girsanov.controls": lambda s: ctrl.girsanov.controls(s.sde, s.mean, s.reference,
                                                          s.paths(s.mean)),
    "girsanov.path_kl": lambda s: ctrl.girsanov.path_kl(s.sde, s.mean, s.reference,
                                                        s.paths(s.mean)),
    "girsanov.log_ratio": lambda s: ctrl.girsanov.log_ratio(s.sde, s.mean, s.reference,
                                                            s.paths(s.mean)),
    "girsanov.terminal_kl_bound": lambda s: ctrl.girsanov.terminal_kl_bound(
        s.sde, s.mean, s.reference, s.paths(s.mean), 0.1),
    "girsanov.importance_weights": lambda s: ctrl.girsanov.importance_weights(
        s.noise.increments[:, 0, 0]),
    "girsanov.effective_sample_size": lambda s: torch.tensor(ctrl.girsanov.effective_sample_size(
        s.noise.increments[:, 0, 0].softmax(0)), dtype=FLOAT),
    "transitions.log_prob": lambda s: ctrl.transitions.log_prob(
        s.sde, ctrl.EulerMaruyama(), s.mean, s.paths(s.mean)),
    "transitions.log_ratio": lambda s: ctrl.transitions.log_ratio(
        s.sde, ctrl.EulerMaruyama(), s.mean, s.reference, s.paths(s.mean)),
    "transitions.transition_kl": lambda s: ctrl.transitions.transition_kl(
        s.sde, ctrl.EulerMaruyama(), s.mean, s.reference, s.paths(s.mean)),
    "running_rewards": lambda s: ctrl.running_rewards(s.problem, s.paths()),
    "regularised_rewards": lambda s: ctrl.regularised_rewards(s.problem, s.paths(), s.drawn),
    "returns_to_go": lambda s: ctrl.returns_to_go(s.problem, s.paths(), s.drawn),
    "ito_sum": lambda s: ctrl.ito_sum(s.noise.increments, s.noise.increments),
    "time_integral": lambda s: ctrl.time_integral(s.noise.increments[..., 0], s.grid),
    "values": lambda s: ctrl.value.values(s.value, s.problem, s.paths()),
    "generator": lambda s: ctrl.value.generator(
        s.sde, s.value, s.start.new_tensor(0.2), s.start, s.start),
    "generator, probes": lambda s: ctrl.value.generator(
        s.sde, s.value, s.start.new_tensor(0.2), s.start, s.start, signs(s)[:, 0]),
    "martingale.increments": lambda s: mg.increments(s.value, s.problem, s.paths(), s.drawn),
    "martingale_loss": lambda s: mg.martingale_loss(s.value, s.problem, s.paths(), s.drawn),
    "martingale.orthogonality": lambda s: mg.orthogonality(
        mg.features_along(lambda t, x: x), s.value, s.problem, s.paths(), s.drawn),
    "ctd0": lambda s: mg.ctd0(s.value, s.problem, s.paths(), s.drawn),
    "ctd_lambda": lambda s: mg.ctd_lambda(s.value, s.problem, s.paths(), 0.4, s.drawn),
    "clstd": fitted,
    "cgtd_loss": lambda s: mg.cgtd_loss(
        mg.features_along(lambda t, x: x), s.value, s.problem, s.paths(), s.drawn,
        weighting="covariance"),
    "q_rates": lambda s: ql.q_rates(s.problem, s.value, s.paths()),
    "q_rates, probes": lambda s: ql.q_rates(s.problem, s.value, s.paths(), signs(s)),
    "q_learning.rates": lambda s: ql.rates(s.q, s.paths()),
    "q_learning.increments": lambda s: ql.increments(s.value, s.q, s.problem, s.paths()),
    "q_learning.martingale_loss": lambda s: ql.martingale_loss(
        s.value, s.q, s.problem, s.paths()),
    "q_learning.orthogonality_loss": lambda s: ql.orthogonality_loss(
        s.value, ql.GibbsQ(s.drawn, 0.1), s.problem, s.paths()),
    "q_learning.orthogonality": lambda s: ql.orthogonality(
        mg.features_along(lambda t, x: x), s.value, s.q, s.problem, s.paths()),
    "ConsistentQ": lambda s: ql.rates(ql.ConsistentQ(QUADRATIC(s), s.drawn, 0.1), s.paths()),
    "gibbs_policy": gibbs_policy,
    "return_gradient": gradient(lambda s, p: pg.return_gradient(
        s.problem, p, s.paths(), s.value)),
    "temporal_difference_gradient": gradient(lambda s, p: pg.temporal_difference_gradient(
        s.problem, p, s.value, s.paths(), rate=0.4)),
    "q_rate_gradient": gradient(lambda s, p: pg.q_rate_gradient(
        s.problem, p, s.value, s.paths())),
    "pathwise_gradient": gradient(lambda s, p: pg.pathwise_gradient(
        s.problem, p, s.value, s.paths())),
    "q_rate_gradient, transitions": gradient(lambda s, p: pg.q_rate_gradient(
        without_temperature(s), p, s.value, s.paths(), transported(s))),
    "performance_difference": lambda s: pg.performance_difference(
        s.problem, s.value, s.drawn, s.paths()),
    "surrogate": lambda s: pg.surrogate(
        s.problem, s.value, s.drawn, ctrl.GaussianPolicy(s.reference.mean, 0.6), s.paths()),
    "clipped_surrogate": lambda s: pg.clipped_surrogate(
        *s.noise.increments[:, :3, 0].unbind(1)),
    "penalised_surrogate": lambda s: pg.penalised_surrogate(
        s.noise.increments[:, 0, 0], s.noise.increments[:, 1, 0],
        s.noise.increments[:, 2, 0].abs(), 0.3),
    "trust_region.bounded": lambda s: ctrl.trust_region.bounded(
        s.noise.increments[..., 0].abs(), s.noise.increments[..., 1].abs(), s.grid),
    "trust_region.transport": lambda s: ctrl.trust_region.transport(
        *[s.noise.increments[..., 0].abs()] * 3, s.grid),
    "policy_kl": lambda s: ctrl.policy_kl(
        s.drawn, ctrl.GaussianPolicy(s.reference.mean, 0.6), s.start.new_tensor(0.1), s.start),
    "std of time": lambda s: s.paths(
        ctrl.GaussianPolicy(s.mean.mean, lambda t: 0.4 * s.level)).actions,
    "std of time, a number": lambda s: s.paths(
        ctrl.GaussianPolicy(s.mean.mean, lambda t: 0.4)).actions,
    "multivariate": lambda s: s.paths(ctrl.MultivariateGaussianPolicy(
        s.mean.mean, torch.tensor([[0.4, 0.0], [0.1, 0.3]], dtype=FLOAT))).actions,
    "exploratory_sde": lambda s: ctrl.exploratory_sde(s.sde, s.drawn).drift_at(
        s.start.new_tensor(0.1), s.start, s.start),
    "Estimate": lambda s: torch.tensor(ctrl.Estimate.of(s.start[:, 0]).mean, dtype=FLOAT),
    "LinearValue": lambda s: ctrl.LinearValue(lambda t, x: x, s.gain)(s.start, s.start),
    "brownian_increments": lambda s: ctrl.noise.brownian_increments(
        s.grid.steps.to(s.device), 8, (2,), generator=s.generator()),
    "gauss_hermite": lambda s: ctrl.noise.gauss_hermite(
        s.grid.steps[:2].to(s.device), nodes=3).increments,
    "antithetic": lambda s: ctrl.noise.antithetic(s.noise).increments,
    "coarsen": lambda s: ctrl.noise.coarsen(
        s.noise.increments, s.grid.nodes, s.grid.nodes[[0, 2, 5]]),
    "refine": lambda s: ctrl.noise.refine(
        s.noise.increments, s.grid.nodes, ctrl.uniform_grid(HORIZON, 2 * STEPS).nodes,
        generator=s.generator()),
}  # fmt: skip


@pytest.mark.parametrize("grid_device", ["cpu", NAME])
@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_the_cpu(name, grid_device):
    """The kernels are the CPU's own, but for the order of a few sums."""
    found, expected = CASES[name](setting(NAME, grid_device)), CASES[name](setting("cpu"))
    if name not in ("girsanov.effective_sample_size", "Estimate"):
        assert found.device.type == NAME
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("noise", "name"),
    [
        ("scalar", "simulate, EulerMaruyama"),
        ("scalar", "simulate, Milstein"),
        ("scalar", "q_rates"),
        ("general", "simulate, EulerMaruyama"),
        ("general", "girsanov.path_kl"),
        ("general", "q_rates"),
    ],
)
def test_other_noises_have_the_numbers_of_the_cpu(name, noise):
    found, expected = (CASES[name](setting(device, noise=noise)) for device in (NAME, "cpu"))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-12)


# -- agents ----------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """factor * x, or its sum."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.3, dtype=FLOAT))

    def forward(self, t, x):
        return self.factor * x

    def value(self, t, x):
        return self.factor * x.square().sum(1)


def trained(device, learn):
    """The parameters of policy and value after a little learning."""
    s = setting(device)
    policy, value = Scaled().to(device), Scaled().to(device)
    acting = ctrl.GaussianPolicy(policy, 0.4)
    actor, critic = (torch.optim.SGD(m.parameters(), 0.1) for m in (policy, value))
    for _ in learn(s, policy, acting, value.value, actor, critic):
        pass
    return torch.stack([policy.factor.detach(), value.factor.detach()]).cpu()


def endless(s):
    return ctrl.ControlProblem(
        ctrl.ControlledSDE(lambda t, x, a: a - x, lambda t, x: 0.4),
        math.inf, lambda t, x, a: -(s.level * x).square().sum(1), temperature=0.1,
    )  # fmt: skip


AGENTS = {
    "evaluate": lambda s, m, p, v, a, c: agents.evaluate(
        lambda paths: mg.ctd0(v, s.problem, paths, s.drawn), s.paths, c, 2),
    "actor_critic": lambda s, m, p, v, a, c: agents.actor_critic(
        s.problem, p, v, lambda: s.paths(p), a, c, 2),
    "online_actor_critic": lambda s, m, p, v, a, c: agents.online_actor_critic(
        endless(s), p, v, s.start, 0.1, 2, a, c, s.generator()),
    "cppo": lambda s, m, p, v, a, c: agents.cppo(
        s.problem, m, lambda n: ctrl.GaussianPolicy(n, 0.4), v, lambda: s.paths(p), a, c, 2),
    "q_learning": lambda s, m, p, v, a, c: agents.q_learning(
        s.problem, v, ql.GibbsQ(p, 0.1), lambda: s.paths(p), c, 2),
    "online_q_learning": lambda s, m, p, v, a, c: agents.online_q_learning(
        endless(s), p, v, ql.GibbsQ(p, 0.1), s.start, 0.1, 2, c, s.generator()),
}  # fmt: skip


@pytest.mark.parametrize("name", AGENTS)
def test_agents_learn_what_they_learn_on_the_cpu(name):
    found, expected = trained(NAME, AGENTS[name]), trained("cpu", AGENTS[name])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert bool((expected != 0.3).any())


# -- what is for the CPU, and says so --------------------------------------------------------------


def hjb_problem(device):
    held = torch.tensor(-1.0, dtype=FLOAT, device=device)
    sde = ctrl.ControlledSDE(lambda t, x, a: held * x + a, lambda t, x: 0.4)
    return ctrl.ControlProblem(sde, 1.0, lambda t, x, a: -(x + a).square().sum(1), temperature=0.1)


AXES = (hjb.Axis(-1.0, 1.0, 9),)


def test_the_hjb_equation_is_solved_on_the_cpu_and_asked_on_the_device():
    bounds = torch.tensor([1.5], dtype=FLOAT, device=NAME)
    actions = hjb.gauss_legendre(-bounds, bounds, 24)
    assert len(hjb.trapezoid(-bounds, bounds, 5).nodes) == 5
    solution = hjb.solve_finite_horizon(hjb_problem("cpu"), AXES, actions, steps=4)
    x, t = torch.linspace(-0.8, 0.8, 7, dtype=FLOAT)[:, None], torch.tensor(0.3, dtype=FLOAT)
    for function in (solution.value, solution.mean_action):
        for there in (function, function.to(NAME)):
            for time in (t, t.to(NAME)):
                found = there(time, x.to(NAME))
                assert found.device.type == NAME
                torch.testing.assert_close(found.cpu(), function(t, x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="on the grid"):
        solution.value(t, 3 + x.to(NAME))
    with pytest.raises(ValueError, match="t must be one time"):
        solution.value.to(NAME)(t.to(NAME) + 2, x.to(NAME))


def test_hjb_says_that_it_is_for_the_cpu():
    actions = hjb.gauss_legendre(-1.5, 1.5, 12)
    with pytest.raises(ValueError, match="functions must take tensors of the CPU"):
        hjb.solve_finite_horizon(hjb_problem(NAME), AXES, actions, steps=4)
    policy = ctrl.DeterministicPolicy(setting(NAME).mean.mean)
    with pytest.raises(ValueError, match="functions must take tensors of the CPU"):
        hjb.evaluate_finite_horizon(hjb_problem("cpu"), policy, AXES, steps=4)
    with pytest.raises(ValueError, match="nodes must be on the CPU"):
        hjb.ActionGrid(actions.nodes.to(NAME), actions.weights)


# -- bad input -------------------------------------------------------------------------------------


def test_generators_of_another_device_are_refused_by_name():
    s, wrong = setting(NAME), torch.Generator()
    steps = s.grid.steps.to(NAME)
    fine = ctrl.uniform_grid(HORIZON, 2 * STEPS).nodes
    for call in (
        lambda: s.paths(noise=None, generator=wrong),
        lambda: s.paths(solver=ctrl.BlackBox(lambda *a: a[2]), noise=None, generator=wrong),
        lambda: ctrl.noise.brownian_increments(steps, 4, generator=wrong),
        lambda: ctrl.noise.random_signs(4, 2, like=s.start, generator=wrong),
        lambda: ctrl.noise.refine(s.noise.increments, s.grid.nodes, fine, generator=wrong),
    ):
        with pytest.raises(ValueError, match=r"generator must be on sim:0, as .* is, got cpu"):
            call()
    with pytest.raises(ValueError, match="generator must be on cpu"):
        setting("cpu").paths(noise=None, generator=s.generator())


def test_noise_of_another_device_is_refused_by_name():
    s = setting(NAME)
    with pytest.raises(ValueError, match=r"increments must be .* on sim:0, as start is"):
        s.paths(noise=setting("cpu").noise)


def test_what_is_not_finite_on_the_device_is_refused_as_on_the_cpu():
    s = setting(NAME)
    singular = ctrl.ControlledSDE(s.sde.drift, lambda t, x: torch.zeros_like(x))
    far = ctrl.DeterministicPolicy(lambda t, x: 1e308 * x * 10)
    for call, words in (
        (lambda: s.paths(far), "are not finite from node"),
        (lambda: ctrl.girsanov.path_kl(singular, s.mean, s.reference, s.paths(s.mean)), "singular"),
        (
            lambda: ctrl.simulate(s.problem, s.mean, s.start / 0, s.grid, noise=s.noise),
            "start must be finite",
        ),
        (
            lambda: ctrl.simulate_end(s.problem, far, s.start, s.grid, noise=s.noise),
            "not finite at the last node",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_the_first_fault_is_told_not_what_came_of_it():
    """Milstein's condition fails at step 0; the states become infinite only because of it."""
    s = setting(NAME)
    mixing = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: 1e160 * x.flip(1))
    with pytest.raises(ValueError, match="coordinate i from x_i alone"):
        ctrl.simulate(
            ctrl.ControlProblem(mixing, HORIZON), s.mean, s.start, s.grid, ctrl.Milstein(),
            noise=s.noise,
        )  # fmt: skip
