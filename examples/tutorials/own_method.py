# run with: QUERIES = 12_800 -> QUERIES = 128

# %% [markdown]
# # Write a method in thirty lines, and put it on the leaderboard
#
# All methods run in one loop, on one sampler, one adapter and one count of reward queries. A
# method is a frozen dataclass of its hyperparameters with two functions: what every decision was
# worth, and the loss of a row. This page writes one, runs it on a problem whose optimum is known,
# and places it among the others. It needs a clone of the repository, for `benchmarks`; where the
# script runs alone, with `PYTHONPATH=.` before it.
#
# The method is the oldest there is, REINFORCE, on the transitions of the sampler, with the path KL
# as a running cost:
#
# $$\nabla J = \mathbb{E}\sum_k
# \nabla\log p_\theta(x_{k+1}|x_k)\,\Big(r(x_T) - \lambda\sum_{l>k} c_l - \text{baseline}\Big)
# - \lambda\,\nabla c_k,$$
#
# with $c_k$ the path KL of step $k$ from the pretrained model.

# %%
import dataclasses
import json

from matplotlib.figure import Figure

from benchmarks import leaderboard
from benchmarks.compared_methods import Budget, Entry, run
from diffusion_envs.exact import GaussianProblem
from diffusion_envs.objectives import PathObjective
from diffusion_envs.objectives.path_steps import path_kl_rate, transition_log_ratio

QUERIES = 12_800


@dataclasses.dataclass(frozen=True)
class Reinforce(PathObjective):
    """The score-function gradient of E[r] - kl_weight KL(P || P_pre), with a mean baseline."""

    learning_rate: float = 1e-3
    kl_weight: float = 0.01  # reward per nat of path KL from the pretrained model

    def advantages(self, rollout):
        """What every decision was worth, [paths, steps]: seen once, before the weights change."""
        to_go = rollout.costs.flip(1).cumsum(1).flip(1) - rollout.costs
        gains = rollout.rewards[:, None] - self.kl_weight * to_go
        return gains - gains.mean(0)

    def loss(self, rows):
        """One number a row (a step of a path); only ``rows.mean`` carries a gradient."""
        kl = self.kl_weight * path_kl_rate(rows)
        return kl - transition_log_ratio(rows) * rows.advantage


# %% [markdown]
# What the loop has to bring is declared, not discovered: `needs_value = True` and there is a value
# network (`rollout.values`), `needs_preferences`, `needs_reward_gradient`. A sampler or a reward
# that cannot serve is refused before the first update, with the reason.
#
# Steps of one path are rows of one batch, in any order: a loss is a function of rows, and never
# sees how many processes there are. The library's own methods are files of this kind in
# `diffusion_envs/objectives`.
#
# ## A problem with an answer
#
# Gaussian data in two dimensions, a quadratic reward, an affine correction of the score as the
# adapter: the optimum of $J = \mathbb{E}[r] - \lambda\,\mathrm{KL}$ is computed by dynamic
# programming, and so is what a policy reaches. Nothing on the vertical axis is sampled.

# %%
problem, budget = GaussianProblem(), Budget(queries=QUERIES)
curves = {}
for rate in (1e-3, 3e-3, 1e-2):
    mine = Entry(lambda kl_weight: Reinforce(kl_weight=kl_weight))
    curves[rate] = run("reinforce", mine, problem, budget, rate=rate, seed=0)["curve"]
    end = curves[rate][-1]
    print(f"learning rate {rate:g}: {end['share']:.1%} of the gap after {end['queries']} queries")

# %% [markdown]
# ## Among the others
#
# The published rows are in a file that the leaderboard writes. They have the same budget, a rate
# from a sweep on seeds of their own, and five seeds where the curves above have one.

# %%
published = json.loads((leaderboard.DOCS / "leaderboard_gaussian.json").read_text())
for row in published["rows"]:
    if row["method"] in ("score-as-action", "dpok (path KL)", "grpo", "ddpo"):
        mean, error = row["share"]
        print(f"{row['method']:16} {mean:.1%} ({error:.1%}) after {row['queries']:.0f} queries")

# %%
figure = Figure(figsize=(6.0, 3.6), layout="constrained")
axes = figure.subplots()
for rate, curve in curves.items():
    queries, shares = ([point[key] for point in curve] for key in ("queries", "share"))
    axes.plot(queries, shares, label=f"rate {rate:g}")
axes.axhline(1, color="black", linewidth=0.8)
axes.set(xlabel="reward queries", ylabel="share of the gap that is closed", ylim=(-0.2, 1.05))
axes.legend(frameon=False)
figure.set_label("Share of the gap that REINFORCE closes, against reward queries, by learning rate")
figure

# %% [markdown]
# ## On the leaderboard
#
# One line in the table `methods()` of `benchmarks/compared_methods.py`,
#
# ```text
# "reinforce": Entry(lambda b: o.Reinforce(kl_weight=b)),
# ```
#
# and `python -m benchmarks.leaderboard --problem gaussian --methods reinforce` sweeps its rate on
# seeds of their own, runs it on five more, and writes the tables again with its row. Rows of
# methods that are not named stay only where their runs are on this machine, so write to another
# folder first: `--output runs/leaderboard_mine`.
#
# One line in `OBJECTIVES` of `diffusion_envs/runs/method_names.py` gives it a name on the command
# line; its fields become options there, with the comments behind them as their help. And it trains
# Stable Diffusion at once: `sd15.finetune(objective=Reinforce(), ...)`.
#
# ## What to try
#
# - A baseline of the state: `needs_value = True`, and `rollout.values` in `advantages`. That is
#   the step from here to Score as Action.
# - Several passes over a roll-out, `UpdateSize(epochs=2)`: the ratio is then not 1, and wants a
#   clip (`ctrl.trust_region.clipped_surrogate`).
#
# The theory: [the policy gradient](../theory/policy-gradient.md),
# [the training loop](../theory/training-loop.md). More:
# [the methods and what they reach](../methods.md), [how to contribute one](../../CONTRIBUTING.md).
