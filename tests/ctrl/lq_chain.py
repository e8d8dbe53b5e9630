"""A scalar exploratory LQ problem on a grid, solved exactly by hand: no line shared with ctrl.

X' = X + (A X + B a) h + S dW,  a ~ N(K X + k, s^2) held over the step
reward rate -(M x^2 + N a^2) / 2 - temperature log pi, terminal -H x^2 / 2, discount
"""

import math

import torch

import ctrl

A, B, S, M, N, H = -0.7, 0.9, 0.6, 0.8, 0.5, 1.3
DISCOUNT, TEMPERATURE, START = 0.3, 0.2, 0.7
NODES = torch.tensor([0.0, 0.3, 0.5, 0.9], dtype=torch.float64)  # uneven
GRID = ctrl.TimeGrid(NODES)


def problem(temperature=TEMPERATURE, discount=DISCOUNT, horizon=0.9):
    sde = ctrl.ControlledSDE(lambda t, x, a: A * x + B * a, lambda t, x: S)
    return ctrl.ControlProblem(
        sde,
        horizon,
        lambda t, x, a: -0.5 * (M * x.square() + N * a.square()).squeeze(1),
        lambda x: -0.5 * H * x.square().squeeze(1),
        discount,
        temperature,
    )


def policy(gain, offset, log_std):
    return ctrl.GaussianPolicy(lambda t, x: gain * x + offset, lambda t: log_std.exp())


def parameters(gain=-0.6, offset=0.25, log_std=-0.4):
    return [
        torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (gain, offset, log_std)
    ]


def values(gain, offset, log_std, nodes=NODES, temperature=TEMPERATURE, discount=DISCOUNT):
    """Coefficients (p, e, c) of V_k = p x^2 / 2 + e x + c at every node, by backward recursion."""
    s2 = (2 * log_std).exp()
    zero = torch.zeros((), dtype=torch.float64)
    p, e, c = zero - H, zero, zero
    backward = [(p, e, c)]
    for h in nodes.diff().flip(0):
        keep = torch.exp(-discount * h)
        f, b = 1 + h * (A + B * gain), h * B * offset  # mean of X'
        variance = S**2 * h + (h * B) ** 2 * s2
        entropy = 0.5 * math.log(2 * math.pi * math.e) + log_std
        new_p = keep * p * f**2 - h * (M + N * gain**2)
        new_e = keep * (p * f * b + e * f) - h * N * gain * offset
        new_c = keep * (p * (b**2 + variance) / 2 + e * b + c)
        new_c = new_c + h * (temperature * entropy - N * (offset**2 + s2) / 2)
        p, e, c = new_p, new_e, new_c
        backward.append((p, e, c))
    return backward[::-1]


def performance(coefficients, start=START):
    p, e, c = coefficients[0]
    return p * start**2 / 2 + e * start + c


def value_function(coefficients, nodes=NODES):
    """V(t, x) at the nodes, its parameters detached."""
    rows = [tuple(v.detach() for v in row) for row in coefficients]

    def value(t, x):
        p, e, c = rows[int((nodes - t).abs().argmin())]
        return p * x[:, 0].square() / 2 + e * x[:, 0] + c

    return value


def paths(problem, policy, grid=GRID, nodes=5):
    noise = ctrl.noise.gauss_hermite(grid.steps, nodes=nodes, noise=(1,), action=(1,))
    start = torch.full((len(noise.increments), 1), START, dtype=torch.float64)
    return ctrl.simulate(problem, policy, start, grid, noise=noise)
