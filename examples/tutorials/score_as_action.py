# run with: PATHS, UPDATES = 2_000, 100 -> PATHS, UPDATES = 100, 4
# run with: steps=500 -> steps=50

# %% [markdown]
# # Score as action: from the theorem to the loss
#
# ["Score as Action"](https://arxiv.org/abs/2502.01819) reads a diffusion model as a controlled SDE
# whose action is the score. This page walks from there to the loss that fine-tunes Stable
# Diffusion, in the paper's notation, on a model where every number is known: Gaussian data in two
# dimensions, a quadratic reward. Each formula is one function of the library, and each is checked
# against an answer that was found another way.
#
# ## The environment
#
# Time $t$ runs from noise ($t=0$) to data ($t=T$). With the noising process's $f$ and $g$, at
# noising time $T-t$, generation is
#
# $$dX_t = \big(-f(T-t, X_t) + g(T-t)^2\,a_t\big)\,dt + g(T-t)\,dW_t,
# \qquad a_t = \text{the score}.$$
#
# With $a = s_{\mathrm{pre}}$, the score of the noised data, this samples from the data. A policy
# is another score; $\theta$ is here a shift that is added to the pretrained one.

# %%
import inspect

import torch
from accelerate import Accelerator

import ctrl
from diffusion_envs import denoising, objectives
from diffusion_envs.exact import GaussianProblem, gaussian, linear_policy, table
from diffusion_envs.noise_schedules import VPLinear
from diffusion_envs.samplers import DDIM
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

PATHS, UPDATES = 2_000, 100

example = GaussianProblem()
data, reward, schedule = example.data, example.quadratic, VPLinear()
sde = denoising.generation_sde(schedule)
problem = ctrl.ControlProblem(sde, horizon=schedule.horizon, terminal_reward=reward)
grid = ctrl.uniform_grid(schedule.horizon, steps=500)
zero = torch.zeros(2, dtype=torch.float64)


def pretrained(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return gaussian.score(data, schedule, schedule.horizon - t, x)


def policy(theta: torch.Tensor) -> ctrl.DeterministicPolicy:
    return ctrl.DeterministicPolicy(lambda t, x: pretrained(t, x) + theta)


def sample(theta: torch.Tensor) -> ctrl.Paths:
    generator = ctrl.noise.stream(0, "tutorial")
    start = torch.randn(PATHS, 2, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        return ctrl.simulate(problem, policy(theta), start, grid, generator=generator)


# %% [markdown]
# ## Theorem 3.1: what leaving the pretrained model costs
#
# $$\mathrm{KL}(P_\theta\,\|\,P_{\mathrm{pre}}) = \tfrac12\int_0^T g(T-t)^2
# \mathbb{E}_\theta\,|\mu_\theta(t, X_t) - s_{\mathrm{pre}}(t, X_t)|^2\,dt.$$
#
# This is `ctrl.girsanov.path_kl` of the SDE above: the diffusion is $g$, the drift moves by
# $g^2(\mu_\theta - s_{\mathrm{pre}})$, so $u = g\,(\mu_\theta - s_{\mathrm{pre}})$. For a constant
# shift it is $\tfrac12|\theta|^2\int g^2dt$, on every path. Of the images themselves, the laws at
# $T$, the KL is smaller: an image is a function of its path, and forgets most of it.

# %%
theta = torch.tensor([0.15, -0.1], dtype=torch.float64)
paths = sample(theta)
kl = ctrl.girsanov.path_kl(sde, policy(theta), policy(zero), paths)
of_g2 = schedule.integrated_g2(torch.zeros(()).double(), torch.ones(()).double())
print(f"path KL     {kl.mean():.4f}, exactly {0.5 * theta.square().sum() * of_g2:.4f}")

last = gaussian.shift_response(data, schedule, torch.ones(()).double(), torch.zeros(()).double())
image = ctrl.linear.Gaussian(data.mean + last @ theta, data.covariance)
terminal = ctrl.linear.gaussian_kl(image, ctrl.linear.Gaussian(data.mean, data.covariance))
print(f"terminal KL {terminal:.4f}, not more")

# %% [markdown]
# ## Theorem 4.1: the policy gradient
#
# For a terminal reward, with $V$ the value of the policy (here: the reward that is expected from a
# state),
#
# $$\nabla_\theta V^\theta = \mathbb{E}\Big[\int_0^T
# \nabla_\theta\log\pi_\theta(a_t|t, X_t)\,dV(t, X_t)\Big]
# = \mathbb{E}\Big[\int_0^T g^2\,(\partial_\theta\mu_\theta)^\top\nabla V\,dt\Big].$$
#
# Both sides, and the usual one with the whole return in place of $dV$, are estimators of one
# gradient. They differ in their noise. To have a gradient, and an error bar, for each path we give
# every path a copy of $\theta$:


# %%
def value(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """V of the pretrained model, in closed form: the reward's expectation under p(X_T | X_t)."""
    s = schedule.horizon - torch.as_tensor(t).to(x)
    return reward.before(gaussian.transition(data, schedule, s, torch.zeros_like(s)))(x)


paths = sample(zero)
thetas = torch.zeros(PATHS, 2, dtype=torch.float64, requires_grad=True)
now = policy(thetas)
next_states = ctrl.policy_gradient.Transitions(ctrl.EulerMaruyama())
estimators = {
    "the return": ctrl.policy_gradient.return_gradient(problem, now, paths, decisions=next_states),
    "dV, Theorem 4.1": ctrl.policy_gradient.temporal_difference_gradient(
        problem, now, value, paths, next_states
    ),
    "pathwise": ctrl.policy_gradient.pathwise_gradient(problem, now, value, paths),
}
for name, each in estimators.items():
    (gradient,) = torch.autograd.grad(each.sum(), thetas)
    print(f"{name:16}", *(ctrl.Estimate.of(coordinate) for coordinate in gradient.T))

# %% [markdown]
# The exact gradient comes from another route: moment equations of the whole model, integrated by
# Runge-Kutta and differentiated by autograd.

# %%
shift = zero.clone().requires_grad_()
start = gaussian.marginal(data, schedule, torch.ones(()).double())
no_gain = torch.zeros(2, 2, dtype=torch.float64)
expected = linear_policy.continuous_value(data, schedule, start, 1.0, 0.0, no_gain, shift, reward)
(exact,) = torch.autograd.grad(expected, shift)
print("exactly          {:.4f} {:.4f}".format(*exact.tolist()))

# %% [markdown]
# The three agree up to their error bars and the grid's bias, which is of the order of the step and
# largest in $dV$, where a value of continuous time meets steps: 2 % here.
#
# `Transitions` says that the decision is the next state, as in DDPO: the noise of the SDE itself
# explores. With `DrawnActions()` the score would be drawn around its mean, and held for a step.
# Both are views of the same theorem; in the first the return's noise does not grow with the number
# of steps.
#
# ## From the gradient to a loss
#
# A run takes several steps on one roll-out, so the loss is a surrogate at the policy that sampled.
# Per step of a path
#
# $$\ell = \lambda\,\tfrac12\,g^2\,|\mu_\theta - s_{\mathrm{pre}}|^2\,h
# - \min\big(\rho\,A,\ \mathrm{clip}(\rho)\,A\big),
# \qquad \rho = \frac{p_\theta(x_{k+1}|x_k)}{p_{\mathrm{old}}(x_{k+1}|x_k)}.$$
#
# - The first term is Theorem 3.1's, exactly, with weight $\lambda$ = `kl_weight`, reward per nat.
# - $A$ is a continuous advantage: temporal differences of $V$, less what the KL costs, forgotten
#   at a *rate* per unit of time, so that a finer grid means the same.
# - $\log\rho$ of a step has a standard deviation proportional to $\sqrt h$, so the clip's width
#   is, too: a trust region that does not depend on the grid.
#
# In the code that is all there is. What is short is in the methods `_kl_cost`, `_gain` and
# `advantages` of the same file:

# %%
print(inspect.getsource(objectives.ScoreAsAction.loss))

# %% [markdown]
# ## Does it reach the optimum?
#
# The optimum of $\mathbb{E}[r] - \lambda\,\mathrm{KL}$ over all policies of the sampler's chain is
# known here, by dynamic programming. The trainer is the one that fine-tunes Stable Diffusion; all
# it sees is an environment.

# %%
sampler = DDIM(eta=1.0).bind(table(), 20)
environment = example.environment(sampler, seed=0)
objective = objectives.ScoreAsAction(
    kl_weight=example.kl_weight, learning_rate=0.01, denoised=False
)
trainer = Trainer(
    environment,
    objective,
    UpdateSize(samples=64, batch=10_000, weight_decay=0.0),
    accelerator=Accelerator(cpu=True),
)
before, best = example.evaluate(environment.model, sampler), example.optimum(sampler)
for numbers in trainer.updates(UPDATES):
    if numbers["update"] % (UPDATES // 4) == 0:
        after = example.evaluate(environment.model, sampler)
        share = (after.objective - before.objective) / (best.objective - before.objective)
        print(f"update {numbers['update']}: {share:.1%} of the gap, path KL {after.path_kl:.3f}")
print(f"the optimum's path KL: {best.path_kl:.3f} nats")

# %% [markdown]
# ## What to try
#
# - `denoised=True`, the paper's value network: it starts from the reward of the denoised state. On
#   images it is what makes the method work ([measured](../methods.md)); with an unbounded reward
#   such as this one it is slower.
# - `objectives.DDPO()` in its place: it has no KL term, passes the optimum, and goes on.
# - `ScoreAsActionSampled`: the other view of an action, on the same problem.
#
# Next: [fine-tune images](fine_tune.md), or [write a method of your own](own_method.md). The
# theory: [score as action](../theory/score-as-action.md), [path KL](../theory/path-kl.md),
# [policy gradient](../theory/policy-gradient.md),
# [two meanings of an action](../theory/two-actions.md),
# [continuous advantages](../theory/continuous-advantages.md),
# [trust region](../theory/trust-region.md), [value network](../theory/value-network.md).
