"""Direct distributional optimisation: the best law of data first, then a model that generates it.

Maximised    U(q) - kl_weight KL(q || p_pre) over laws q of data, U a functional with a first
             variation: the mean reward, or any concave utility of the law of rewards.
Dual         q_{k+1} = p_pre exp(potential_k / kl_weight) / Z, the potential an average of the first
averaging    variations at q_1 ... q_k in which that of q_j counts j times ([K]; [N]). Where U
             is linear, U(q) = E_q[r], the first is all: the potential is r, and q the tilt.
Weights      On n samples of a prompt, drawn from the *pretrained* model, q has the self-normalised
             weights exp(potential / kl_weight) / sum; the whole of dual averaging is done on them
             at every update, so that nothing has to be remembered.
Loss         n weight |epsilon_th - epsilon|^2, summed over coordinates: denoising score matching on
             q. Its minimiser is the score of the noised q, which is Doob's transform of the
             pretrained one: score_ref + grad log E_pre[exp(potential / kl_weight) | x].
Exact        With weights of infinitely many samples. The KL is of the laws of data; where the model
             forgets its start, it is that of paths too.
Biased       By self-normalisation, at first order in 1/n: means under q are off by
             -E_q[(w / E_pre w) (f - E_q f)] / n, towards the pretrained model. On the three-point
             law of the tests (42 percent of the samples effective) the mean reward lacks all of its
             gain at n = 1, and 62, 31, 14, 6 percent of it at n = 2, 4, 8, 16. What matters is the
             effective sample size n / E[(w / E w)^2], of which the share in n is logged: where it
             is not several samples a prompt, the model is pulled to single pictures, so that
             kl_weight must not be small beside the standard deviation of the rewards.
Sampling     Always the pretrained model (``old_decay`` is 1). The rewards in the log are therefore
             its own and do not rise; what was learned shows on held-out seeds. Data of the current
             model would need the density of one model over the other as a further weight, which
             black-box samplers do not have.
Solver       Its error counts twice: samples that are too narrow are learned as the model's own law,
             and the chain that then takes this score narrows it again. On ``diffusion_envs.exact.
             GaussianProblem``, measured on a DDIM chain of 20 steps, infinitely many samples of
             that chain come to 86.6 percent of the gain that E[r] - kl_weight (path KL) allows
             there (94.2 with samples of 50 steps, 96.4 of 100); samples of DPM-Solver++ with 20 and
             50 steps to 97.4 and 98.2, and those of the data's law to 98.2: the rest is what the
             optimum of continuous time lacks on 20 steps (0.3 on 50). So sample with a solver that
             is accurate, as any will do: ``Scheduler("DPMSolverMultistepScheduler")``.
Published    A network learns the potential and another the correction of the score, over rounds of
             fresh samples; here weights stand for both.

Sources      [K] Kawata et al. 2025, direct distributional optimisation, arXiv 2502.02954. The
             weights of the average are those of particle dual averaging: [N] Nitanda, Wu & Suzuki
             2020, arXiv 2012.15477.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import sent
from diffusion_envs.objectives.noised_data import NoisedObjective, NoisedRows
from diffusion_envs.ranges import require_count, require_numbers, require_positive
from diffusion_envs.rollout import Rollout

FirstVariation: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(rewards [n], weights [n] of sum 1) -> the first variation of U at each sample, reward."""


def mean_reward(rewards: Float[Tensor, " n"], weights: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """First variation of U = E_q[r]: the reward itself."""
    return rewards


@dataclass(frozen=True)
class NearTarget:
    """First variation of U = -1/2 (E_q[r] - target)^2: a reward of ``target``, and no more."""

    target: float

    def __call__(
        self, rewards: Float[Tensor, " n"], weights: Float[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """(target - E_q[r]) r."""
        return (self.target - weights @ rewards) * rewards


def dual_averaging(
    rewards: Float[Tensor, " n"], first_variation: FirstVariation, kl_weight: float, rounds: int
) -> Float[Tensor, " n"]:
    """Weights of sum 1 that maximise U(q) - kl_weight KL(q || equal weights).

    Args:
        rewards: of samples with equal weights.
        first_variation: of U.
        kl_weight: reward per nat.
        rounds: of averaging.
    """
    weights = torch.full_like(rewards, 1 / len(rewards))
    potential = torch.zeros_like(rewards)
    for k in range(1, rounds + 1):
        potential = potential.lerp(first_variation(rewards, weights), 2 / (k + 1))
        weights = (potential / kl_weight).softmax(0)
    return weights


@dataclass(frozen=True)
class DistributionalOptimisation(NoisedObjective):
    """Denoising score matching on samples of the pretrained model, weighted by dual averaging."""

    kl_weight: float = 1.0  # reward per nat of KL between the laws of data
    first_variation: FirstVariation = mean_reward  # of the utility
    rounds: int = 100  # of dual averaging; where U is linear, one does

    needs_old: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(kl_weight=self.kl_weight, learning_rate=self.learning_rate)
        require_count(draws=self.draws, rounds=self.rounds)
        if not callable(self.first_variation):
            raise TypeError(
                f"first_variation must be (rewards, weights) -> values, got "
                f"{self.first_variation!r}"
            )

    @property
    def reward_per_nat(self) -> float | None:
        """``kl_weight``, where the utility is the mean reward."""
        return self.kl_weight if self.first_variation is mean_reward else None

    @property
    def on_policy(self) -> bool:
        """No: data are the pretrained model's."""
        return False

    @property
    def needs_reference(self) -> bool:
        """No: what keeps the model near are the pretrained model's samples."""
        return False

    def old_decay(self, update: int) -> float:
        """One: data are always the pretrained model's."""
        return 1.0

    def advantages(self, rollout: Rollout) -> Float[Tensor, " paths"]:
        """Weights of dual averaging within each prompt, times its number of samples."""
        host, condition = rollout.rewards.cpu(), rollout.condition.cpu()  # read once
        factors = torch.zeros_like(host)
        for prompt in condition.unique():
            one = condition == prompt
            rewards = host[one]
            weights = dual_averaging(rewards, self.first_variation, self.kl_weight, self.rounds)
            factors[one] = len(rewards) * weights
        return sent(factors, rollout.rewards.device)

    def numbers(self, advantages: Float[Tensor, " paths"]) -> dict[str, float]:
        """The effective sample size, over the number of samples."""
        return {"effective_samples": (1 / advantages.square().mean()).item()}

    def loss(self, rows: NoisedRows) -> Float[Tensor, " rows"]:
        """Weight |epsilon_th - epsilon|^2, summed over coordinates."""
        sigma = rows.sigma.view(-1, *[1] * (rows.state.ndim - 1))
        error = -sigma * rows.mean - rows.noise
        return rows.advantage * error.square().flatten(1).sum(1)
