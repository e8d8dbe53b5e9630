"""Do online actor-critic and q-learning find the optimum of Jia & Zhou's ergodic LQ problem?

    dX = -X dt + a dW,   r = -(x^2 + x a + a^2 + x + 2 a),   temperature 0.1

(J. Mach. Learn. Res. 23, 2022, section 5; the optimal policy is N(-0.354249 x - 0.708497, 0.035425)
and its average reward 0.658497.) Five seeds of each, from the policy N(0, e^{-2}) and the value 0.
Curves are of the *exact* average reward of the policy that each step has, not of the noisy rewards.
Prints one JSON line a run; writes docs/ergodic_lq.json and docs/ergodic_lq.png.

    python -m benchmarks.ergodic_lq
"""

import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import ctrl
from ctrl import agents
from diffusion_envs.runs.run_folder import versions

GAIN, OFFSET, VARIANCE, AVERAGE = -0.354249, -0.708497, 0.035425, 0.658497
TEMPERATURE, STEP_SIZE, STEPS, PATHS, SEEDS = 0.1, 0.01, 40_000, 256, 5
DOCS = Path(__file__).parent.parent / "docs"


def problem() -> ctrl.ControlProblem:
    """The benchmark, with the action in the diffusion."""
    sde = ctrl.ControlledSDE(lambda t, x, a: -x, lambda t, x, a: a, controls_diffusion=True)

    def reward(t: torch.Tensor, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return -(x.square() + x * a + a.square() + x + 2 * a).squeeze(1)

    return ctrl.ControlProblem(sde, math.inf, reward, temperature=TEMPERATURE)


def average_reward(gain: float, offset: float, variance: float) -> float:
    """Exact, of a = gain x + offset + N(0, variance): E x = 0 and 2 E x^2 = E a^2 at rest."""
    state = (offset**2 + variance) / (2 - gain**2)
    action = 2 * state
    return -(state + gain * state + action + 2 * offset)


class Learner:
    """Value theta_1 x + theta_2 x^2, policy N(psi_1 x + psi_2, e^{2 psi_3})."""

    def __init__(self, method: str, seed: int) -> None:
        self.theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        self.psi = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        self.log_std = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
        self.policy = ctrl.GaussianPolicy(
            lambda t, x: self.psi[0] * x + self.psi[1], lambda t: self.log_std.exp()
        )
        start = torch.zeros(PATHS, 1, dtype=torch.float64)
        generator = ctrl.noise.stream(seed, "ergodic", method)
        critic = {"params": [self.theta], "lr": 1.0}
        # q's slope in the policy's parameters is the temperature times log pi's
        scale = 1.0 if method == "actor-critic" else 1 / TEMPERATURE
        actor = [
            {"params": [self.psi], "lr": 0.1 * scale},
            {"params": [self.log_std], "lr": 0.5 * scale},
        ]

        def schedule(now: float) -> float:
            return 1 / (1 + now / 20)

        if method == "actor-critic":
            self.steps: Iterator[agents.OnlineStep] = agents.online_actor_critic(
                problem(), self.policy, self.value, start, STEP_SIZE, STEPS,
                torch.optim.SGD(actor), torch.optim.SGD([critic]), generator, schedule=schedule,
            )  # fmt: skip
        else:
            q = ctrl.q_learning.GibbsQ(self.policy, TEMPERATURE)
            self.steps = agents.online_q_learning(
                problem(), self.policy, self.value, q, start, STEP_SIZE, STEPS,
                torch.optim.SGD([critic, *actor]), generator, schedule=schedule,
            )  # fmt: skip

    def value(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """V(x), without its constant."""
        return self.theta[0] * x[:, 0] + self.theta[1] * x[:, 0].square()

    def parameters(self) -> tuple[float, float, float]:
        """Gain, offset and variance of the policy."""
        gain, offset = self.psi.detach().tolist()
        return gain, offset, math.exp(2 * float(self.log_std.detach()))


def run(method: str, seed: int) -> dict[str, object]:
    """One run; its curve has 100 points."""
    learner, curve, started = Learner(method, seed), [], time.perf_counter()
    estimate = 0.0
    for k, step in enumerate(learner.steps):
        if (k + 1) % (STEPS // 100) == 0:
            estimate = step.average_reward
            curve.append([round(step.time, 2), average_reward(*learner.parameters())])
    gain, offset, variance = learner.parameters()
    entropy = 0.5 * math.log(2 * math.pi * math.e * variance)
    return {
        "method": method,
        "seed": seed,
        "gain": gain,
        "offset": offset,
        "variance": variance,
        "average_reward": curve[-1][1],
        "learned_average_reward": estimate - TEMPERATURE * entropy,
        "seconds": round(time.perf_counter() - started, 1),
        "curve": curve,
    }


def draw(runs: list[dict[str, Any]]) -> Figure:
    """Gap to the optimal average reward, every seed a line."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for method, colour in (("actor-critic", "tab:blue"), ("q-learning", "tab:orange")):
        for one in (one for one in runs if one["method"] == method):
            times, rewards = zip(*one["curve"], strict=True)
            label = method if one["seed"] == 0 else None
            axes.plot(times, rewards, color=colour, linewidth=1, alpha=0.8, label=label)
    axes.axhline(AVERAGE, color="black", linewidth=1, linestyle="--", label="optimum 0.658497")
    axes.axhspan(0.95 * AVERAGE, 1.05 * AVERAGE, color="grey", alpha=0.15, label="within 5 %")
    axes.set(xlabel="time", ylabel="average reward of the policy", ylim=(0, 0.75))
    axes.legend(loc="lower right", frameon=False)
    return figure


def main() -> None:
    """Run, print and write."""
    torch.set_num_threads(1)
    runs = [run(method, seed) for method in ("actor-critic", "q-learning") for seed in range(SEEDS)]
    summary: dict[str, object] = {"versions": versions(), "parallel_paths": PATHS, "steps": STEPS}
    for one in runs:
        print(json.dumps({key: value for key, value in one.items() if key != "curve"}))
    for method in ("actor-critic", "q-learning"):
        of = [one for one in runs if one["method"] == method]
        for key in ("gain", "offset", "variance", "average_reward", "learned_average_reward"):
            numbers = [float(one[key]) for one in of]  # type: ignore[arg-type]  # JSON has them as objects
            mean, std = statistics.mean(numbers), statistics.stdev(numbers)
            summary[f"{method} {key}"] = {"mean": mean, "standard_deviation": std}
    print(json.dumps(summary))
    (DOCS / "ergodic_lq.json").write_text(json.dumps({"summary": summary, "runs": runs}) + "\n")
    draw(runs).savefig(DOCS / "ergodic_lq.png", dpi=110)


if __name__ == "__main__":
    main()
