# %% [markdown]
# # A path KL in ten lines, and its error bar
#
# You have a controlled SDE, a policy, and another policy to compare it with. How far apart are the
# laws of their paths? Girsanov's theorem (Theorem 3.1 of
# ["Score as Action"](https://arxiv.org/abs/2502.01819)) answers: for
#
# $$dX_t = b(t, X_t, a_t)\,dt + \sigma\,dW_t,$$
#
# with the action $a$ of one policy or $a^0$ of the other,
#
# $$\mathrm{KL}(P\,\|\,P^0) = \mathbb{E}\Big[\tfrac12\int_0^T |u_t|^2\,dt\Big],
# \qquad u = \sigma^{-1}\big(b(t, X, a) - b(t, X, a^0)\big).$$
#
# The control $u$ is what the policy does to the drift, in units of the noise; the expectation is
# under the policy's own law $P$.

# %%
import torch

import ctrl
from ctrl import plots

sde = ctrl.ControlledSDE(drift=lambda t, x, a: -x + a, diffusion=lambda t, x: 0.5)
problem = ctrl.ControlProblem(sde, horizon=1.0)
policy = ctrl.DeterministicPolicy(lambda t, x: 0.7 - 0.3 * x)
uncontrolled = ctrl.DeterministicPolicy(lambda t, x: torch.zeros_like(x))
grid = ctrl.uniform_grid(1.0, steps=100)
start = torch.zeros(4096, 1, dtype=torch.float64)
paths = ctrl.simulate(problem, policy, start, grid, generator=ctrl.noise.stream(0, "tutorial"))
kl = ctrl.girsanov.path_kl(sde, policy, uncontrolled, paths)
print("path KL", ctrl.Estimate.of(kl), "nats")

# %% [markdown]
# Three nouns (problem, policy, paths) and one function. A few things to know about them:
#
# - States are `[paths, coordinates]`; your functions get all paths at once, and the time as a
#   number.
# - `path_kl` returns **one value per path**. The average is yours to take, which is why an error
#   bar is possible: `Estimate` prints the mean with its standard error in the last digits, as
#   physicists do.
# - Noise is an argument. `ctrl.noise.stream(0, "tutorial")` is a generator with a name; nothing
#   reads the global seed.
#
# ## Is it right?
#
# This SDE is linear, so the answer is known. `ctrl.linear` has it in closed form, in double
# precision:

# %%
one = torch.ones((), dtype=torch.float64)
exact = ctrl.linear.ornstein_uhlenbeck_path_kl(
    pull=1.3 * one,  # dX = (-X + 0.7 - 0.3 X) dt + 0.5 dW
    shift=0.7 * one,
    reference_pull=1.0 * one,
    reference_shift=0.0 * one,
    noise=0.5 * one,
    mean=0.0 * one,  # of the start
    variance=0.0 * one,
    time=1.0,
)
estimate = ctrl.Estimate.of(kl)
print(f"estimate {estimate}, exactly {exact:.4f}")
print(f"{(estimate.mean - float(exact)) / estimate.standard_error:+.1f} standard errors apart")

# %% [markdown]
# Two errors are in such a number. The **standard error** falls like $1/\sqrt{\text{paths}}$. The
# **grid's bias** is of the order of the step: what is estimated without bias is the KL of the
# Euler scheme. It can be seen alone, without any sampling error, where quadrature takes the place
# of random numbers: with Gauss-Hermite nodes for the increments the same code computes
# expectations exactly.

# %%
for steps in (2, 4, 8):
    coarse = ctrl.uniform_grid(1.0, steps)
    # two nodes an increment: exact for what is quadratic in the noise, as this KL is
    noise = ctrl.noise.gauss_hermite(coarse.steps.double(), nodes=2)
    origin = torch.zeros(len(noise.weights), 1, dtype=torch.float64)
    exact_paths = ctrl.simulate(problem, policy, origin, coarse, noise=noise)
    values = ctrl.girsanov.path_kl(sde, policy, uncontrolled, exact_paths)
    of_the_scheme = ctrl.Estimate.of(values, quadrature_weights=noise.weights)
    print(f"{steps} steps: {of_the_scheme}, bias {of_the_scheme.mean - float(exact):+.4f}")

# %% [markdown]
# Half the step, half the bias. This is how the library's own claims reach round-off:
# `python -m verification --claim path-kl`.
#
# ## Another estimator of the same number
#
# The log-likelihood ratio $\log dP/dP^0 = \int u\,dW + \tfrac12\int|u|^2dt$ has the same mean. Its
# first term has mean zero and adds nothing but noise:

# %%
ratio = ctrl.girsanov.log_ratio(sde, policy, uncontrolled, paths)
print("running KL         ", ctrl.Estimate.of(kl))
print("log-likelihood ratio", ctrl.Estimate.of(ratio))

# %% [markdown]
# `ctrl.plots` draws paths, values and policies; it needs the extra `plots`.

# %%
axes = plots.plot_paths(paths)
axes.set_title("dX = (-X + a) dt + 0.5 dW under a = 0.7 - 0.3 X")
axes.figure.set_label("Thirty paths of the controlled SDE, their mean, and the band of 90 %")
axes.figure

# %% [markdown]
# ## What to try
#
# - Make `diffusion=lambda t, x: 0.25`: half the noise, about four times the KL: the same push
#   stands out more.
# - Give `policy` a network for its mean. `path_kl` carries gradients, so it can be a term of a
#   loss, of paths with a graph: `simulate(..., differentiable=True)`. Without one it has the
#   gradient of the integrand alone ([which is which](../howto/through_paths.md)).
# - Let the diffusion depend on the policy (`controls_diffusion=True`): the two laws are then
#   singular, the KL is infinite, and the library says so instead of printing a number.
#
# The theory: [path KL](../theory/path-kl.md), [KL of terminal laws](../theory/terminal-kl.md),
# [noise](../theory/noise.md). The functions: `ctrl.girsanov.path_kl`, `ctrl.simulate`,
# `ctrl.noise.gauss_hermite`, `ctrl.Estimate`.
