# run with: steps=50 -> steps=5
# run with: iterations=5 -> iterations=1
# run with: PATHS = 20_000 -> PATHS = 1_000

# %% [markdown]
# # Learn an exploratory control problem, and see how far from the optimum you are
#
# The exploratory linear-quadratic problem of Wang, Zariphopoulou & Zhou (JMLR 21, 2020) is where
# continuous-time reinforcement learning can be checked against an exact answer. The state is
# unstable, the policy draws its actions and is paid for their entropy:
#
# $$dX_t = (0.3 X_t + a_t)\,dt + 0.6\,dW_t,$$
#
# $$\max_\pi\ \mathbb{E}\Big[\int_0^1 \big(-X_t^2 - \tfrac12 a_t^2
# + \lambda\,\mathcal{H}(\pi_t)\big)dt - (X_1 - 1)^2\Big].$$
#
# We learn it from sampled paths alone, by policy iteration
# ([Tang & Zhou, 2024](https://arxiv.org/abs/2411.01302)), and compare with the Riccati equation.

# %%
import torch

import ctrl
from ctrl import plots

PATHS = 20_000
TEMPERATURE = 0.1

one = torch.ones(1, 1, dtype=torch.float64)
lq = ctrl.linear.LinearQuadratic(
    A=0.3 * one,
    B=one,
    sigma=0.6 * one,
    M=2 * one,  # the running reward is -(M x^2 + N a^2) / 2
    N=one,
    H=2 * one,  # the terminal reward -(H x^2 / 2 + h x); that of the text plus 1
    h=-2 * one[0],
    temperature=TEMPERATURE,
)
problem = lq.problem(horizon=1.0)  # a ControlProblem like any other
grid = ctrl.uniform_grid(1.0, steps=50)
noise = ctrl.noise.stream(0, "tutorial")


def sample(policy: ctrl.Policy) -> ctrl.Paths:
    start = torch.randn(PATHS, 1, dtype=torch.float64, generator=noise)
    return ctrl.simulate(problem, policy, start, grid, generator=noise)


# %% [markdown]
# ## Evaluate: what is a policy worth?
#
# A function $J$ is the value of a policy if and only if
# $M_t = J(t, X_t) + \int_0^t (r + \lambda\,p)\,ds$, with $p=-\log\pi$, is a martingale along the
# policy's paths (Jia & Zhou, JMLR 23, 2022). With features $\varphi$ the conditions
# $\mathbb{E}\int\varphi\,dM = 0$ are linear equations, which `clstd` solves. The value is
# quadratic in the state; polynomials in the time to go will do for the rest.


# %%
def features(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    to_go = (1 - t) ** torch.arange(1, 5).to(x)  # all vanish at the horizon
    in_state = torch.cat([x.square(), x, torch.ones_like(x)], dim=1)
    return (in_state.unsqueeze(2) * to_go).flatten(1)


def evaluate(policy: ctrl.Policy) -> ctrl.LinearValue:
    # at the horizon the value is the terminal reward, which is known
    return ctrl.martingale.clstd(
        features, problem, sample(policy), policy, base=lambda t, x: lq.terminal_reward(x)
    )


# %% [markdown]
# ## Improve: the Gibbs policy of the q-rate
#
# The advantage of an action is a rate, $q(t,x,a) = \mathcal{L}^a J + r$, with $\mathcal{L}^a$ the
# generator under the action $a$, and the best answer to a value is
# $\pi(a) \propto e^{q(t,x,a)/\lambda}$. Here $q = a\,\partial_x J - \tfrac12 a^2 + \dots$, the
# dots without $a$, so the answer is $N(\partial_x J, \lambda)$:


# %%
def improve(value: ctrl.Value) -> ctrl.GaussianPolicy:
    def slope(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda y: value(t, y).sum())(x)

    return ctrl.GaussianPolicy(slope, std=TEMPERATURE**0.5)


# %% [markdown]
# `ctrl.q_learning.gibbs_policy(problem, value, action_dim=1)` finds the same without being told
# the formula, for every problem whose q-rate is quadratic in the action. It is slower, as it
# differentiates the generator.
#
# ## Learn, and compare
#
# The optimum is known: `solve_lq` has value and policy at all times. To see small differences,
# both policies get the same noise, and the error bar is that of the paired differences.

# %%
exact = ctrl.linear.solve_lq(lq, grid.nodes)
best = exact.policy()
zero = torch.zeros((), dtype=torch.float64)


def returns(policy: ctrl.Policy) -> torch.Tensor:
    """What each path earns from X_0 = 0 on, entropy included; the same noise for every policy."""
    start = torch.zeros(PATHS, 1, dtype=torch.float64)
    again = ctrl.noise.stream(0, "evaluation")
    paths = ctrl.simulate(problem, policy, start, grid, generator=again)
    return ctrl.returns_to_go(problem, paths, policy)[:, 0]


policy: ctrl.Policy = ctrl.GaussianPolicy(lambda t, x: torch.zeros_like(x), std=0.5)
reached = returns(best)
print(f"optimum {float(exact.value(zero, 0 * one)):.4f}")
print("simulated on this grid:", ctrl.Estimate.of(reached))
print("before any learning:", ctrl.Estimate.of(returns(policy) - reached), "beside the best")
iterations = ctrl.agents.policy_iteration(policy, evaluate, improve, iterations=5)
for k, (value, policy) in enumerate(iterations, start=1):
    gap, at_start = ctrl.Estimate.of(returns(policy) - reached), float(value(zero, 0 * one))
    print(f"iteration {k}: from a policy of value {at_start:.4f} to one {gap} beside the best")

# %% [markdown]
# Policy iteration is Newton's method here: each iteration squares the distance, until only the
# noise of the samples and the grid are left. The policy itself is near, too; what is left there is
# the grid's, and halves with the step:

# %%
law = exact.law_at(zero)
general = ctrl.q_learning.gibbs_policy(problem, value, action_dim=1).distribution(zero, one)
print("action at t = 0, x = 1")
print(f"learned: mean {policy.mean(zero, one)[0, 0]:.3f}")
print(f"by gibbs_policy: mean {general.mean[0, 0]:.3f}, variance {general.variance[0, 0]:.4f}")
print(f"exactly: mean {law.mean(one)[0, 0]:.3f}, variance {law.covariance[0, 0]:.4f}")
price = float(ctrl.linear.cost_of_exploration(lq, horizon=1.0))
print(f"cost of exploration: {price:.3f} = temperature * horizon / 2")

# %%
states = torch.linspace(-2, 2, 81, dtype=torch.float64)
axes = plots.plot_value(value, states, times=(0.0, 0.5))
for time in (0.0, 0.5):
    heights = exact.value(zero + time, states.unsqueeze(1))
    axes.plot(states, heights, "k:", label=None if time else "exactly")
axes.legend(frameon=False)
axes.figure.set_label("The learned value at two times, and the exact one on top of it, dotted")
axes.figure

# %% [markdown]
# ## What to try
#
# - `TEMPERATURE = 0.5`: the policy explores more, its mean stays the same. That the two decouple
#   is a theorem about this problem.
# - Make it nonlinear: `ctrl.ControlledSDE(lambda t, x, a: x - x**3 + a, ...)`. The features are
#   then wrong, the Gibbs policy stays Gaussian, and `ctrl.hjb.solve_finite_horizon` has the answer
#   on a grid.
# - Learn with networks and gradients instead: [own_problem.py](../../examples/own_problem.py) goes
#   the same way by actor-critic, and `ctrl.agents.q_learning` learns value and q-rate together.
#
# The theory: [the martingale characterisation](../theory/martingale.md),
# [policy evaluation](../theory/policy-evaluation.md),
# [Gibbs policies](../theory/gibbs-policies.md), [policy iteration](../theory/policy-iteration.md),
# [exploratory LQ](../theory/exploratory-lq.md),
# [the cost of exploration](../theory/cost-of-exploration.md). The functions:
# `ctrl.martingale.clstd`, `ctrl.agents.policy_iteration`, `ctrl.linear.solve_lq`.
