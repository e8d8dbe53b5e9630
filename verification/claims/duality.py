"""Entropy-regularised duality: the optimum is the maximum, and by how much others fall short.

J(a) = E[r(X_T)] - b KL(P_a || P_pre) = J* - b KL(P_a || P*) for every policy a: nothing beats J*,
the loss is of second order, and its constant is known. On a chain the same holds exactly.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import ctrl
from ctrl import linear
from diffusion_envs.exact import gaussian, linear_policy
from verification.claim import Check, Setting, bound, claim, expectation, pathwise, wrong
from verification.closed_form import linear_policy as policies
from verification.closed_form import tilt as exact
from verification.closed_form.tilt import KL_WEIGHT, REWARD
from verification.closed_form.vp_gaussian import SHORT, Normal, VPGaussian
from verification.cubature import mean, point_start
from verification.gaussian_diffusion import (
    DATA,
    ONLY_DOUBLE,
    START,
    STATES,
    normal,
    quadratic,
    schedule,
)

GAIN = np.array([[-0.3, 0.15], [0.05, 0.2]])
SHIFT = np.array([0.25, -0.1])
NOISING_TIMES = [1.0, 0.72, 0.37, 0.0]


def performance(
    setting: Setting, gain: Tensor, shift: Tensor, weight: float = KL_WEIGHT, eta: float = 1.0
) -> Tensor:
    """J of score + gain x + shift, in continuous time: extrapolated, the method has order 4."""
    by_steps = [
        linear_policy.continuous_value(
            normal(setting, DATA),
            schedule(SHORT),
            normal(setting, START),
            1.0,
            0.0,
            gain,
            shift,
            quadratic(setting, REWARD),
            weight,
            eta,
            substeps,
        )
        for substeps in (30, 60)
    ]
    return (16 * by_steps[1] - by_steps[0]) / 15


def best(setting: Setting) -> Tensor:
    """J* from the start."""
    value = gaussian.optimal_value(
        normal(setting, DATA),
        schedule(SHORT),
        quadratic(setting, REWARD),
        KL_WEIGHT,
        setting.tensor(1.0),
        setting.tensor(0.0),
    )
    return value.expectation(normal(setting, START))


def chain_performance(setting: Setting, eta: float, controls: list) -> Tensor:
    """J of a policy on the Euler chain, by production paths on quadrature noise."""
    data, rate = normal(setting, DATA), schedule(SHORT)
    times = setting.tensor(NOISING_TIMES)
    steps = linear_policy.Steps.of_euler(rate, times, eta)
    grid = ctrl.TimeGrid(1.0 - times)
    each = [tuple(setting.tensor(one) for one in control) for control in controls]

    def action(t: Tensor, x: Tensor) -> Tensor:
        k = int((grid.nodes - t).abs().argmin())
        pretrained = gaussian.score(data, rate, times[k], x)
        return pretrained + (x @ each[k][0].mT + each[k][1]) / steps.score_gain[k]

    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=2, noise=(2,))
    problem = linear_policy.problem(data, rate, quadratic(setting, REWARD), KL_WEIGHT, eta)
    start = point_start(noise, STATES[0])
    paths = ctrl.simulate(problem, ctrl.DeterministicPolicy(action), start, grid, noise=noise)
    return mean(ctrl.returns_to_go(problem, paths)[:, 0], paths)


@claim(
    statement="""
        J(a) = E[r(X_T)] - b KL(P_a || P_pre) = J* - b KL(P_a || P*), so that no policy exceeds J*,
        and a policy that is off by d loses (b/2) E_a int g^2 |d|^2: second order, b times the path
        KL. On an Euler chain J* - J = 1/2 sum E d'(Q_{k+1} + b/std^2) d, d the control's error,
        Q_{k+1} the curvature of -V*, exactly and for errors of any size.
        """,
    source="Donsker-Varadhan duality; Girsanov; linear-quadratic control for the chain",
    wrongs=[
        wrong(
            "1/2 of the KL missing",
            "diffusion_envs.denoising.kl_running_reward",
            "-0.5 * weight",
            "-weight",
        ),
        wrong(
            "KL rewarded instead of paid",
            "diffusion_envs.denoising.kl_running_reward",
            "-0.5 * weight",
            "0.5 * weight",
        ),
        wrong(
            "g for g^2 in the path KL",
            "diffusion_envs.denoising.kl_running_reward",
            "schedule.g2(_noising_time(schedule, t, x))",
            "schedule.g2(_noising_time(schedule, t, x)).sqrt()",
        ),
        wrong(
            "eta family's factor of the KL not squared",
            "diffusion_envs.denoising.kl_factor",
            "(2 * eta)) ** 2",
            "(2 * eta))",
        ),
        wrong(
            "KL of the mean state only",
            "diffusion_envs.exact.linear_policy.continuous_value",
            " + torch.trace(gain @ p @ gain.mT)",
            "",
        ),
        wrong(
            "KL not counted at all",
            "diffusion_envs.exact.linear_policy.continuous_value",
            "+ paid",
            "",
        ),
        wrong(
            "drift without the policy's gain",
            "diffusion_envs.exact.linear_policy.continuous_value",
            "(slope + gain)",
            "slope",
        ),
        wrong(
            "b inverted in the value",
            "diffusion_envs.exact.gaussian.optimal_value",
            "reward.curvature / kl_weight, reward.slope / kl_weight",
            "reward.curvature * kl_weight, reward.slope * kl_weight",
        ),
        wrong(
            "log-partition term missing: V* too large",
            "diffusion_envs.exact.gaussian.optimal_value",
            "- torch.linalg.slogdet(inner)[1]",
            "",
        ),
        wrong(
            "regret by the KL to the pretrained model",
            "verification.closed_form.linear_policy.regret",
            "gain + best.Q / b, shift - best.l / b",
            "gain, shift",
        ),
    ],
)
def kl_duality(setting: Setting) -> Iterator[Check]:
    """Three policies in continuous time; the optimum and others on chains of two noises."""
    top = best(setting)
    for name, size in (("half", 0.5), ("the", 1.0), ("minus the", -1.0)):
        gain, shift = size * GAIN, size * SHIFT
        lost = policies.regret(
            SHORT, START, gain, shift, KL_WEIGHT,
            lambda s: exact.optimal_value(SHORT, REWARD, KL_WEIGHT, s),
        )  # fmt: skip
        performed = performance(setting, setting.tensor(gain), setting.tensor(shift))
        yield expectation(f"J* - J of {name} change is b KL(P || P*)", top - performed, lost)
    for eta in (1.0, 0.6):
        chain = exact.euler_chain(SHORT, NOISING_TIMES, eta)
        values, optimum = exact.chain_optimum(chain, REWARD, KL_WEIGHT)
        highest = float(values[0](np.array(STATES[0])))
        got = chain_performance(setting, eta, optimum)
        yield expectation(f"eta {eta}: J of the chain's optimum is V*", got, highest)
        for size in (1.0, -0.4):
            perturbed = [(K + size * GAIN, k + size * SHIFT) for K, k in optimum]
            lost = exact.chain_regret(chain, values, optimum, perturbed, KL_WEIGHT, STATES[0])
            less = chain_performance(setting, eta, perturbed)
            yield expectation(f"eta {eta}: loss of a policy off by {size}", highest - less, lost)
            yield bound(f"eta {eta}: a policy off by {size} is no better", less, highest)


@claim(
    statement="""
        Policies score + D x + c of a Gaussian model: E[r] has the gradients
        dJ/dc = int g^2 E[grad V], dJ/dD = int g^2 E[grad V X'], V the policy's own value. With
        D = 0 the mean moves by G c, the covariance stays, the path KL is |c|^2 int g^2 / 2, and G
        has the eigenvalues (2w/q)(atan q - atan q alpha_T), q = sqrt(w - 1), for the data's w > 1,
        atanh
        with q = sqrt(1 - w) for w < 1, and 2 (1 - alpha_T) for w = 1.
        """,
    source="linear equations of the moments and of the value (Fleming & Rishel, chapter VI)",
    wrongs=[
        wrong(
            "atan for atanh",
            "diffusion_envs.exact.gaussian.shift_response",
            "(root * a).atanh()",
            "(root * a).atan()",
        ),
        wrong(
            "factor 2 of the substitution missing",
            "diffusion_envs.exact.gaussian.shift_response",
            "return 2 * torch.where",
            "return torch.where",
        ),
        wrong(
            "eigenvalue 1 not told from the others",
            "diffusion_envs.exact.gaussian.shift_response",
            "torch.where(root == 0, a * torch.ones_like(root), inside)",
            "inside",
        ),
        wrong(
            "response not scaled by the variance at the end",
            "diffusion_envs.exact.gaussian.shift_response",
            "_noised_spectrum(data, schedule, s_to) / high",
            "1 / high",
        ),
        wrong(
            "score's gain of the eta family without its 1/2",
            "diffusion_envs.exact.linear_policy.continuous_value",
            "0.5 * (1 + eta**2)",
            "(1 + eta**2)",
        ),
        wrong(
            "full noise whatever eta is",
            "diffusion_envs.exact.linear_policy.continuous_value",
            "eta**2 * g2 * unit",
            "g2 * unit",
        ),
        wrong(
            "1/2 of the KL missing",
            "diffusion_envs.exact.linear_policy.continuous_value",
            "-0.5 * weight * g2",
            "-weight * g2",
        ),
        wrong(
            "shift in the drift not multiplied by g^2",
            "diffusion_envs.exact.linear_policy.continuous_value",
            "g2 * (offset + shift)",
            "(g2 * offset + shift)",
        ),
        wrong(
            "variance of the state ignored in the reward",
            "diffusion_envs.exact.gaussian.Quadratic.expectation",
            "- 0.5 * variance",
            "",
        ),
        wrong(
            "weights of Euler's method in the Runge-Kutta step",
            "diffusion_envs.exact.linear_policy.continuous_value",
            "(a + 2 * b + 2 * c + d) / 6",
            "a",
        ),
        wrong(
            "chain: policy's gain left out",
            "diffusion_envs.exact.linear_policy.chain",
            "(slope + gain)",
            "slope",
        ),
        wrong(
            "chain: sign of the KL's slope",
            "diffusion_envs.exact.linear_policy.kl_cost",
            "-cost[:, None] * (gain.mT @ shift)",
            "cost[:, None] * (gain.mT @ shift)",
        ),
        wrong(
            "chain: KL left out",
            "diffusion_envs.exact.linear_policy.chain_values",
            ".before(steps[k]) + now",
            ".before(steps[k])",
        ),
    ],
)
def linear_policies(setting: Setting) -> Iterator[Check]:
    """Performance and its gradients, the response to a shift, and the same on a chain."""
    gain, shift = setting.tensor(GAIN), setting.tensor(SHIFT)
    for eta in (1.0, 0.7):
        yield expectation(
            f"eta {eta}: J, against moments",
            performance(setting, gain, shift, KL_WEIGHT, eta),
            policies.performance(SHORT, START, GAIN, SHIFT, REWARD, KL_WEIGHT, eta),
        )
    leaves = gain.clone().requires_grad_(), shift.clone().requires_grad_()
    gradients = torch.autograd.grad(performance(setting, *leaves, weight=0.0), leaves)
    slopes = policies.gradient(SHORT, START, GAIN, SHIFT, REWARD)
    yield expectation("gradient in the gain: int g^2 E[grad V X']", gradients[0], slopes[0])
    yield expectation("gradient in the shift: int g^2 E[grad V]", gradients[1], slopes[1])

    at_one = VPGaussian(DATA.mean, np.diag([1.0, 0.38]), 2.0, 2.0)
    for name, p in (("w 1.52 and .38", SHORT), ("w 1 and .38", at_one)):
        data = normal(setting, Normal(p.mean, p.covariance))
        G = gaussian.shift_response(data, schedule(p), setting.tensor(1.0), setting.tensor(0.0))
        yield expectation(f"{name}: response to a shift, int F g^2", G, policies.response(p))
    none, G = torch.zeros_like(gain), policies.response(SHORT)
    law = SHORT.posterior(1.0).of(START)
    shifted_law = Normal(law.mean + G @ SHIFT, law.covariance)
    cost = 0.5 * SHIFT @ SHIFT * SHORT.integrated_beta(1.0)
    yield expectation(
        "J of a shift: mean moved by G c, cost |c|^2 int g^2 / 2",
        performance(setting, none, shift),
        REWARD.expectation(shifted_law) - KL_WEIGHT * cost,
    )

    steps = linear_policy.Steps.of_euler(schedule(SHORT), setting.tensor(NOISING_TIMES), 0.7)
    chain = linear_policy.chain(normal(setting, DATA), schedule(SHORT), steps, gain, shift)
    running = linear_policy.kl_cost(KL_WEIGHT * steps.cost, gain, shift)
    values = linear_policy.chain_values(chain, quadratic(setting, REWARD), running)
    exact_chain = exact.euler_chain(SHORT, NOISING_TIMES, 0.7)
    controls = [(step.score_gain * GAIN, step.score_gain * SHIFT) for step in exact_chain]
    yield expectation(
        "chain: J, against its moments",
        values[0].expectation(normal(setting, START)),
        exact.chain_performance(exact_chain, REWARD, KL_WEIGHT, controls, START),
    )


# dX = (A X + a + B u) dt + G dW with G = g 1: u is the score's change, B = g^2
A, FREE, NOISE = np.array([[-0.7, 0.45], [-0.2, 0.15]]), np.array([0.25, -0.4]), 0.8
TEMPERATURE, HORIZON = 0.35, 0.85


@claim(
    statement="""
        Maximise E r(X_T) - E int g^2 |a - s_pre|^2 + th x entropy, with a drawn from a policy: the
        optimal policy is N(s_pre + grad J / 2, th / (2 g^2)). The penalty is twice the path KL, so
        the mean is that of the KL-regularised optimum with b = 2: for a diffusion the score of the
        data tilted by exp(r / 2). The temperature th spreads the actions and does not move them.
        """,
    source="Gao, Zha & Zhou 2024, arXiv 2409.04832; Wang, Zariphopoulou & Zhou 2020",
    why_double=ONLY_DOUBLE,
    wrongs=[
        wrong(
            "penalty taken for the path KL: b = 1",
            "verification.claims.duality.weight",
            "2.0",
            "1.0",
        ),
        wrong(
            "drift change in place of the score's change",
            "verification.claims.duality.score_change",
            "/ NOISE**2",
            "",
        ),
        wrong(
            "b forgotten in the drift",
            "ctrl.linear.kl_optimal_drift",
            "G @ G.mT / b[..., None, None]",
            "G @ G.mT",
        ),
        wrong(
            "temperature moves the mean",
            "ctrl.linear.lq.greedy",
            "gains[..., -1], 0.5",
            "gains[..., -1] + temperature[..., None], 0.5",
        ),
        wrong(
            "spread of the policy without the temperature",
            "ctrl.linear.lq.greedy",
            "temperature[..., None, None] * torch.cholesky_solve",
            "torch.cholesky_solve",
        ),
        wrong(
            "spread of the policy in proportion to the cost, not to its inverse",
            "ctrl.linear.lq.greedy",
            "torch.cholesky_solve(eye, root)",
            "root @ root.mT",
        ),
        wrong(
            "expected reward for its exponential average (noise to come ignored)",
            "ctrl.linear.kl_control._cole_hopf",
            "+ C @ weighted",
            "+ 0 * C @ weighted",
        ),
    ],
)
def temperature_and_mean(setting: Setting) -> Iterator[Check]:
    """The exploratory Riccati solution and the tilted one, at two temperatures."""
    x, unit = setting.tensor(STATES), torch.eye(2).to(setting.tensor(STATES))
    base = linear.transition(setting.tensor(A), setting.tensor(FREE), NOISE * unit, HORIZON)
    Q, slope, c = (setting.tensor(each) for each in REWARD)
    value = linear.kl_optimal_value(base, Q, slope, weight(), c)
    want = exact.linear_riccati(A, FREE, NOISE * np.eye(2), REWARD, weight(), HORIZON)
    means = (want.l - np.array(STATES) @ want.Q) / weight()
    yield pathwise("score's change, tilt with b = 2", score_change(value, x), means)
    for temperature in (0.0, TEMPERATURE):
        problem = linear.LinearQuadratic(
            A=setting.tensor(A),
            B=NOISE**2 * unit,
            sigma=NOISE * unit,
            M=0 * unit,
            N=2 * NOISE**2 * unit,
            H=Q,
            h=-slope,
            f=setting.tensor(FREE),
            temperature=temperature,
        )
        solved = linear.solve_lq(problem, setting.tensor([0.0, HORIZON]))
        law = solved.law_at(setting.tensor(0.0))
        yield pathwise(
            f"temperature {temperature}: mean",
            law.mean(x),
            -0.5 * (np.array(STATES) @ want.Q - want.l),
        )
        yield expectation(
            f"temperature {temperature}: spread is th / (2 g^2)",
            law.covariance,
            temperature / (2 * NOISE**2) * np.eye(2),
            scale=TEMPERATURE,
        )


def weight() -> float:
    """b: reward per nat of path KL."""
    return 2.0


def score_change(value: linear.Quadratic, x: Tensor) -> Tensor:
    """grad V* / b, from the change of the drift."""
    unit = torch.eye(2).to(x)
    return linear.kl_optimal_drift(value, NOISE * unit, weight())(x) / NOISE**2
