# run with: (200, 800) -> (20, 40)
# run with: 16.0, 1600 -> 16.0, 160
# run with: PATHS = 5_000 -> PATHS = 500

# %% [markdown]
# # Leave an interval: exits, and the cheapest way out
#
# Many problems end when something happens: a barrier is hit, a tank is full, a particle escapes.
# The horizon is then a random time, and two things go wrong easily: exits between two nodes of the
# grid are missed, and estimators go on integrating after the end. Here is how a domain is
# declared, what the two errors are worth, and how the best policy is computed and checked.
#
# A particle $dX = a\,dt + dW$ starts at 0.2 in $(-1, 1)$. Until it leaves, at the time $\tau$, it
# pays for time and for pushing:
#
# $$\min_a\ \mathbb{E}\int_0^{\tau} \big(\tfrac12 a_t^2 + \tfrac12 w^2\big)\,dt,
# \qquad w = \tfrac32.$$

# %%
import math

import torch

import ctrl
from ctrl import hjb, plots

PATHS = 5_000
W, START = 1.5, 0.2

sde = ctrl.ControlledSDE(drift=lambda t, x, a: a, diffusion=lambda t, x: 1.0)
problem = ctrl.ControlProblem(
    sde,
    horizon=math.inf,
    running_reward=lambda t, x, a: -0.5 * (a.square().sum(1) + W**2),
    domain=ctrl.stopping.Interval(-1.0, 1.0),
)
start = torch.full((PATHS, 1), START, dtype=torch.float64)
idle = ctrl.DeterministicPolicy(lambda t, x: torch.zeros_like(x))

# %% [markdown]
# ## The mean exit time, without control
#
# It is $1 - x^2$: 0.96 from 0.2. `simulate` stops every path where it leaves; `paths.ends` is the
# node, and the states stay where they are from there on.

# %%
exact = 1 - START**2
for steps in (200, 800):
    grid = ctrl.uniform_grid(16.0, steps)
    for stopping in (ctrl.stopping.AtNodes(), ctrl.stopping.BridgeCorrected()):
        generator = ctrl.noise.stream(0, "exit")
        paths = ctrl.simulate(problem, idle, start, grid, generator=generator, stopping=stopping)
        time = ctrl.Estimate.of(grid.nodes[paths.ends])
        name = type(stopping).__name__
        print(f"step {16 / steps:g}, {name:15} {time}, off by {time.mean - exact:+.3f}")

# %% [markdown]
# A path seen at the nodes alone leaves too late, by an error of order $\sqrt{h}$: four times the
# steps only halve it. `BridgeCorrected`, the default where walls are known, asks for every step
# how likely the Brownian bridge between its ends has touched a wall: the error becomes one of
# order $h$. What is left here is half a step, as an exit is recorded at the end of its step.
#
# ## The cheapest way out
#
# The value $V$ solves a Hamilton-Jacobi-Bellman equation with $V = 0$ on both walls. `ctrl.hjb`
# solves it on a grid whose last nodes are the walls; here the answer is known, too (Fleming 1978):
# $a^* = w\tanh(wx)$, and the least cost is $-\log(\cosh(wx)/\cosh w)$.

# %%
solution = hjb.solve_discounted(problem, (hjb.Axis(-1.0, 1.0, 201),), hjb.trapezoid(-2.0, 2.0, 401))
best = solution.policy()
zero, here = torch.zeros((), dtype=torch.float64), start[:1]
least = -math.log(math.cosh(W * START) / math.cosh(W))
print(f"least cost: on the grid {-float(solution.value(zero, here)):.5f}, exactly {least:.5f}")
print(f"best push:  on the grid {float(best.mean(zero, here)):.4f}, ", end="")
print(f"exactly {W * math.tanh(W * START):.4f}")

# %% [markdown]
# The push is off by less than the distance of two action nodes, 0.01, of which the solver takes
# the best; of the value that costs only the square. Now simulate both. `returns_to_go` integrates
# the running reward up to the exit and no further, and refuses paths that have not left when the
# grid ends.

# %%
grid = ctrl.uniform_grid(16.0, 1600)
for name, policy in (("idle", idle), ("best", best)):
    paths = ctrl.simulate(problem, policy, start, grid, generator=ctrl.noise.stream(0, "cost"))
    cost = ctrl.Estimate.of(-ctrl.returns_to_go(problem, paths)[:, 0])
    print(f"{name}: cost {cost}")
print(f"exactly: {0.5 * W**2 * exact:.4f} and {least:.4f}")

# %% [markdown]
# Beside the error bars there is a bias of about one step, 0.01: an exit is noted half a step late,
# and the action is held over a step while the best one changes.
#
# ## How far is that from doing nothing?
#
# The path KL of stopped paths stops with them; its cost is half of the squared push, so that the
# problem above is the one of leaving early at little KL. That is the logarithmic transform behind
# Fleming's formula, and the same one that makes the KL-regularised optimum of a diffusion model a
# tilt of its data.

# %%
kl = ctrl.girsanov.path_kl(sde, best, idle, paths)
time = grid.nodes[paths.ends]
print("path KL", ctrl.Estimate.of(kl), "nats; mean time", ctrl.Estimate.of(time))
print("KL + w^2 / 2 * time", ctrl.Estimate.of(kl + 0.5 * W**2 * time))

# %%
axes = plots.plot_policy(best, torch.linspace(-1, 1, 101, dtype=torch.float64))
x = torch.linspace(-1, 1, 21, dtype=torch.float64)
axes.plot(x, W * torch.tanh(W * x), "k.", label="w tanh(w x)")
axes.legend(frameon=False)
axes.figure.set_label("The best push over the state: on the grid, and the formula as dots")
axes.figure

# %% [markdown]
# ## What to try
#
# - Pay for one side only: `exit_reward=lambda t, x: (x[:, 0] > 0).double()` in the problem, and
#   `running_reward` for pushing alone.
# - Two dimensions: `ctrl.stopping.Ball(...)` or `Box(...)`, and two axes for `hjb`.
# - A deadline as well: `horizon=2.0`. The value then depends on time, and
#   `hjb.solve_finite_horizon` has it.
# - A really rare exit: [rare_event.py](../../examples/rare_event.py) samples a chance of 3 in
#   100,000 to a per cent with 4,000 paths.
#
# The theory: [exits](../theory/exits.md), [HJB equations on a grid](../theory/hjb.md),
# [the KL-regularised optimum](../theory/kl-tilt.md). The functions: `ctrl.ControlProblem`,
# `ctrl.stopping.BridgeCorrected`, `ctrl.hjb.solve_discounted`.
