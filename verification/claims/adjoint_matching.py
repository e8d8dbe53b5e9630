"""Adjoint matching: regressing the control on the reward's gradient, carried back along paths.

On a chain of Euler steps everything holds exactly, so nothing has to be small: the adjoint's
conditional mean is the gradient of the chain's value, and the loss is critical at the chain's
optimum. In the limit of fine steps the adjoint is -F' grad r(X_T).
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import linear
from diffusion_envs.denoising import generation_sde
from diffusion_envs.exact import gaussian, linear_policy
from diffusion_envs.exact.linear_policy import Steps
from diffusion_envs.objectives.adjoint_matching import lean_adjoint, matching_loss
from verification.claim import Check, Setting, claim, expectation, limit, pathwise, wrong
from verification.closed_form import tilt as exact
from verification.closed_form.tilt import KL_WEIGHT, REWARD
from verification.closed_form.vp_gaussian import LONG, SHORT, kl
from verification.cubature import mean, point_start
from verification.gaussian_diffusion import (
    DATA,
    ONLY_DOUBLE,
    STATES,
    ctrl_normal,
    normal,
    quadratic,
    schedule,
)

NOISING_TIMES = [1.0, 0.72, 0.37, 0.12]  # uneven; the reward is paid at the last
Controls = list[tuple[np.ndarray, np.ndarray]]


def euler(setting: Setting, eta: float, times: list[float] = NOISING_TIMES) -> Steps:
    """The production chain of the short schedule."""
    return Steps.of_euler(schedule(SHORT), setting.tensor(times), eta)


def carrier(setting: Setting, steps: Steps, controls: Controls) -> Callable[[int, Tensor], Tensor]:
    """Means of the next states under the model that carries the adjoint: the pretrained one."""
    none = setting.tensor(0 * REWARD.Q), setting.tensor(0 * REWARD.l)
    chain = linear_policy.chain(normal(setting, DATA), schedule(SHORT), steps, *none)

    def mean_of_next(k: int, x: Tensor) -> Tensor:
        return x @ chain.matrix[k].mT + chain.shift[k]

    return mean_of_next


def sampled(
    setting: Setting, eta: float, steps: Steps, controls: Controls, start: list[float]
) -> ctrl.Paths:
    """Quadrature paths of the current policy: score + control / score_gain, step by step."""
    grid = ctrl.TimeGrid(steps.noising_times[0] - steps.noising_times)
    data, rate = normal(setting, DATA), schedule(SHORT)
    gains = [tuple(setting.tensor(each) for each in control) for control in controls]

    def action(t: Tensor, x: Tensor) -> Tensor:
        k = int((grid.nodes - t).abs().argmin())
        pretrained = gaussian.score(data, rate, steps.noising_times[k], x)
        return pretrained + (x @ gains[k][0].mT + gains[k][1]) / steps.score_gain[k]

    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=2, noise=(2,))
    problem = ctrl.ControlProblem(generation_sde(rate, eta), horizon=float(grid.nodes[-1]))
    policy = ctrl.DeterministicPolicy(action)
    return ctrl.simulate(problem, policy, point_start(noise, start), grid, noise=noise)


def loss_gradient(
    setting: Setting, eta: float, at: Controls, sampling: Controls, start: list[float]
) -> Tensor:
    """d E[loss] / d (gain, shift) of every step's score, at one policy on another's paths."""
    steps = euler(setting, eta)
    paths = sampled(setting, eta, steps, sampling, start)
    end = quadratic(setting, REWARD).gradient(paths.states[:, -1])
    adjoint = lean_adjoint(carrier(setting, steps, sampling), paths.states, end)
    each = list(zip(at, steps.score_gain.tolist(), strict=True))
    gain = setting.tensor(np.array([K / slope for (K, _), slope in each]))
    shift = setting.tensor(np.array([k / slope for (_, k), slope in each]))
    gain.requires_grad_()
    shift.requires_grad_()
    x = paths.states[:, :-1]
    slope, offset = gaussian.score_coefficients(
        normal(setting, DATA), schedule(SHORT), steps.noising_times[:-1]
    )
    pretrained = torch.einsum("kij,pkj->pki", slope, x) + offset
    scores = pretrained + torch.einsum("kij,pkj->pki", gain, x) + shift
    loss = matching_loss(scores, pretrained, adjoint, steps.score_gain, steps.std, KL_WEIGHT)
    slopes = torch.autograd.grad(mean(loss, paths), (gain, shift))
    return torch.cat([each.flatten() for each in slopes])


def bent(k: int, x: Tensor) -> Tensor:
    """A pretrained mean that turns and is not linear."""
    return x @ x.new_tensor(TURNS[k]).mT + 0.6 * x.sin()


TURNS = np.array([[[0.7, 0.4], [-0.3, 0.9]], [[1.1, -0.5], [0.2, 0.6]], [[0.8, 0.15], [0.55, 1.2]]])


@claim(
    statement="""
        Maximise E[r(X_T)] - b KL. The lean adjoint a_T = -grad r(X_T), carried back along paths by
        the pretrained drift alone, has E*[a_t | X_t = x] = -grad V*(t, x) on paths of the optimum;
        so the loss 1/2 int |u + sigma' a / b|^2, paths held fixed, is critical at the optimal
        control u* = sigma' grad V* / b. For a linear base a_t = -F' grad r(X_T). All of it holds
        exactly on a chain of Euler steps, if the step's control is matched with the adjoint at its
        end; with the adjoint at its beginning it holds up to the step size.
        """,
    source="Domingo-Enrich et al. 2024, arXiv 2409.08861: lean adjoint, adjoint matching loss",
    wrongs=[
        wrong(
            "sign of the adjoint",
            "diffusion_envs.objectives.adjoint_matching.lean_adjoint",
            "[-reward_gradient]",
            "[reward_gradient]",
        ),
        wrong(
            "reward gradient not carried back",
            "diffusion_envs.objectives.adjoint_matching.lean_adjoint",
            "adjoint.append(carried)",
            "adjoint.append(adjoint[-1])",
        ),
        wrong(
            "Jacobian in place of its transpose",
            "diffusion_envs.objectives.adjoint_matching.lean_adjoint",
            "adjoint.append(carried)",
            "f = lambda x, k=k: pretrained_mean(k, x)  # noqa: E731\n        "
            "adjoint.append(torch.func.jvp(f, (states[:, k],), (adjoint[-1],))[1])",
        ),
        wrong(
            "Jacobian at the next state",
            "diffusion_envs.objectives.adjoint_matching.lean_adjoint",
            "states[:, k].detach()",
            "states[:, k + 1].detach()",
        ),
        wrong(
            "adjoint carried by the fine-tuned model",
            "verification.claims.adjoint_matching.carrier",
            "return mean_of_next",
            "return lambda k, x: mean_of_next(k, x) + x @ setting.tensor(controls[k][0]).mT",
        ),
        wrong(
            "paths of the pretrained model in place of the current policy's",
            "verification.claims.adjoint_matching.sampled",
            "return pretrained + (",
            "return pretrained + 0 * (",
        ),
        wrong(
            "adjoint at the beginning of the step",
            "diffusion_envs.objectives.adjoint_matching.matching_loss",
            "* adjoint[:, 1:]",
            "* adjoint[:, :-1]",
        ),
        wrong(
            "b for 1/b",
            "diffusion_envs.objectives.adjoint_matching.matching_loss",
            "/ kl_weight\n    return",
            "* kl_weight\n    return",
        ),
        wrong(
            "variance in place of standard deviation",
            "diffusion_envs.objectives.adjoint_matching.matching_loss",
            "std.view(shape) * adjoint",
            "std.view(shape).square() * adjoint",
        ),
        wrong(
            "control not in units of the noise",
            "diffusion_envs.objectives.adjoint_matching.matching_loss",
            "(score_gain / std)",
            "score_gain",
        ),
        wrong(
            "1/2 of the loss missing",
            "diffusion_envs.objectives.adjoint_matching.matching_loss",
            "return 0.5 * ",
            "return ",
        ),
        wrong(
            "score's gain of the deterministic sampler",
            "diffusion_envs.exact.linear_policy.Steps.of_euler",
            "0.5 * (1 + eta**2)",
            "0.5 * (1 + 0 * eta**2)",
        ),
    ],
)
def adjoint_matching(setting: Setting) -> Iterator[Check]:
    """On three Euler steps, with full noise and with less; and in the limit."""
    for eta in (1.0, 0.6):
        chain = exact.euler_chain(SHORT, NOISING_TIMES, eta)
        values, optimum = exact.chain_optimum(chain, REWARD, KL_WEIGHT)
        steps, adjoints = euler(setting, eta), []
        for start in STATES:
            paths = sampled(setting, eta, steps, optimum, start)
            end = quadratic(setting, REWARD).gradient(paths.states[:, -1])
            adjoint = lean_adjoint(carrier(setting, steps, optimum), paths.states, end)
            adjoints.append(mean(adjoint[:, 0], paths))
        yield expectation(
            f"eta {eta}: E*[a | x] is -grad V* of the chain",
            torch.stack(adjoints),
            np.array(STATES) @ values[0].Q - values[0].l,
        )
        none = [(0 * K, 0 * k) for K, k in optimum]
        size = float(loss_gradient(setting, eta, none, optimum, STATES[0]).abs().max())
        gradient = loss_gradient(setting, eta, optimum, optimum, STATES[0])
        yield expectation(
            f"eta {eta}: gradient of the loss is 0 at the optimum",
            gradient,
            np.zeros(len(gradient)),
            scale=size,
        )
        yield expectation(
            f"eta {eta}: gradient of the loss at the pretrained model is minus that of E r / b",
            loss_gradient(setting, eta, none, none, STATES[1])[-6:],
            -exact.reward_gradient(chain, REWARD, np.array(STATES[1])).ravel() / KL_WEIGHT,
        )
    states = setting.tensor(np.stack([STATES, STATES[::-1], np.roll(STATES, 1), STATES], axis=1))
    slopes = quadratic(setting, REWARD).gradient(states[:, -1])
    yield pathwise(
        "adjoint of a base that turns and is not linear, against products of Jacobians",
        lean_adjoint(bent, states, slopes)[:, 0],
        _products(states.double().cpu().numpy(), slopes.double().cpu().numpy()),
    )
    refined, none = [], [(0 * REWARD.Q, 0 * REWARD.l)]
    for count in (20, 40):
        times = list(np.linspace(1.0, 0.0, count + 1))
        steps, x = euler(setting, 1.0, times), setting.tensor(STATES)
        along = x.unsqueeze(1).expand(-1, count + 1, -1)
        end = quadratic(setting, REWARD).gradient(x)
        refined.append(lean_adjoint(carrier(setting, steps, none * count), along, end)[:, 0])
    F = SHORT.posterior(1.0).F
    yield limit(
        "fine steps: the adjoint is -F' grad r(X_T)",
        2 * refined[1] - refined[0],
        -(REWARD.l - np.array(STATES) @ REWARD.Q) @ F,
    )


def _products(states: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    adjoint = -slopes
    for k in (2, 1, 0):
        jacobians = TURNS[k] + 0.6 * np.cos(states[:, k, :, None]) * np.eye(2)
        adjoint = np.einsum("pij,pi->pj", jacobians, adjoint)
    return adjoint


def generated(setting: Setting, eta: float) -> gaussian.Gaussian:
    """Law of X_T under the optimal control of the eta family, from p_T."""
    data, rate = normal(setting, DATA), schedule(LONG)
    begin, end = setting.tensor(1.0), setting.tensor(0.0)
    base = gaussian.transition(data, rate, begin, end, eta)
    Q, slope, c = (setting.tensor(each) for each in REWARD)

    def tilted(x: Tensor) -> linear.Gaussian:
        law = linear.Gaussian(base.matrix @ x + base.shift, base.covariance)
        return linear.tilt(law, Q, slope, KL_WEIGHT, c).law

    origin = tilted(setting.tensor([0.0, 0.0]))
    columns = [tilted(x).mean - origin.mean for x in setting.tensor([[1.0, 0.0], [0.0, 1.0]])]
    start = gaussian.marginal(data, rate, begin)
    return gaussian.Affine(torch.stack(columns, 1), origin.mean, origin.covariance).after(start)


@claim(
    statement="""
        The law that adjoint matching generates depends on the noise it is trained with. With full
        noise (eta = 1) and little signal left (alpha_T = .0066) it is the tilt up to 1e-9 nats;
        with eta = .5 on the same schedule, the same reward and the same b, the optimum of
        E[r] - b KL is another law, 2e-3 nats away, because X_T remembers X_0. A score that was
        trained with full noise generates the tilt with any eta, up to what the start does.
        """,
    source="Domingo-Enrich et al. 2024, arXiv 2409.08861, memoryless noise schedule",
    why_double=ONLY_DOUBLE,
    wrongs=[
        wrong(
            "transition of the full-noise SDE for every eta",
            "diffusion_envs.exact.gaussian.transition",
            "values = signal ** (eta**2) * (last / first) ** ((1 + eta**2) / 2)",
            "values = signal * (last / first)",
        ),
        wrong(
            "the start forgotten",
            "diffusion_envs.exact.gaussian.Affine.after",
            "self.matrix @ law.covariance @ self.matrix.mT + self.covariance",
            "self.covariance",
        ),
        wrong(
            "the joint law tilted, with the start's law tilted too",
            "verification.claims.adjoint_matching.generated",
            "start = gaussian.marginal(data, rate, begin)",
            "start = gaussian.marginal(gaussian.tilt(data, quadratic(setting, REWARD), KL_WEIGHT),"
            " rate, begin)",
        ),
        wrong(
            "b for 1/b",
            "ctrl.linear.tilt",
            "S @ Qs / b[..., None, None]",
            "S @ Qs * b[..., None, None]",
        ),
        wrong(
            "direction of the KL",
            "ctrl.linear.gaussian_kl",
            "m1, S1, m0, S0 = broadcast",
            "m0, S0, m1, S1 = broadcast",
        ),
        wrong(
            "noise of the eta family without the square",
            "diffusion_envs.exact.gaussian.transition",
            "((1 + eta**2) / 2)",
            "((1 + eta) / 2)",
        ),
    ],
)
def memoryless_noise(setting: Setting) -> Iterator[Check]:
    """eta = 1 and eta = .5 on the long schedule."""
    tilted, _ = exact.tilt(DATA, REWARD, KL_WEIGHT)
    reference = ctrl_normal(normal(setting, tilted))
    for eta in (1.0, 0.5):
        base = exact.eta_transition(LONG, eta)
        want = exact.tilted_transition(base, REWARD, KL_WEIGHT).of(LONG.noised(1.0))
        got = generated(setting, eta)
        yield expectation(
            f"eta {eta}: law of X_T at the optimum",
            torch.cat([got.mean, got.covariance.flatten()]),
            np.concatenate([want.mean, want.covariance.ravel()]),
        )
        yield expectation(
            f"eta {eta}: KL(generated || tilt)",
            linear.gaussian_kl(ctrl_normal(got), reference),
            kl(want, tilted),
            scale=1.0 if eta == 1 else None,  # of 1e-10 nats few digits are left
        )
    model, start = normal(setting, tilted), normal(setting, LONG.noised(1.0))
    begin, end = setting.tensor(1.0), setting.tensor(0.0)
    for eta in (0.5, 0.0):
        got = gaussian.transition(model, schedule(LONG), begin, end, eta).after(start)
        want = exact.eta_transition(LONG.with_data(tilted), eta).of(LONG.noised(1.0))
        yield expectation(
            f"trained with full noise, sampled with eta {eta}: law of X_T",
            torch.cat([got.mean, got.covariance.flatten()]),
            np.concatenate([want.mean, want.covariance.ravel()]),
        )
        yield expectation(
            f"trained with full noise, sampled with eta {eta}: KL(generated || tilt)",
            linear.gaussian_kl(ctrl_normal(got), reference),
            kl(want, tilted),
        )
