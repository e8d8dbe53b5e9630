"""Tilted regression: maximum likelihood on the pretrained model's paths, weighted by exp(reward).

Maximised    E[r(X_N)] - kl_weight KL(P_th || P_pre), the KL that of the sampler's own chain.
Setting      Step k of a path of the *pretrained* model, of which z is the noise, and the control
             u_k(x) = (score_gain / std)(score_th - score_pre) there: the shift of the next state's
             mean, in standard deviations.
Weights      w = exp(r / kl_weight), over its mean within the prompt: P_pre w is the optimal law of
             paths where the start is drawn with it, and given the start always.
Loss         1/2 w |u|^2 - (w - c) u . z, summed over steps. At c = 0 it is minus the weighted
             log-likelihood ratio. c is a control variate: E[z | x] = 0 on these paths, so that it
             adds nothing to the mean. With c = 1 the gradient's variance at the pretrained model
             is E[(w - 1)^2] for E[w^2] in each direction that the weight hardly depends on: less by
             the share of effective samples, 1 / E[w^2] (by 37 percent where the reward is normal
             with a standard deviation of one kl_weight, by 78 at a half of that).
Exact        (1) Given x the loss is a parabola in u, least at u* = E[w z | x] / E[w | x].
             (2) Given x_{k+1} the mean of w is h = exp(V* / kl_weight), V* the optimal value, so
                 that u* is the mean of z under the optimal transition p_pre(x' | x) h(x') / h(x),
             (3) and, by parts, std grad_m log E h(m + std z): Doob's transform of the chain.
             The optimal transition is that Gaussian shift only as steps become fine. Where V* is
             quadratic, u* is also the shift that maximises the above among all shifts; otherwise
             the two differ by the order of a step.
Which KL     The chain's, which the weights imply: they exist because what a control costs and the
             noise that it replaces are inversely proportional with the same factor kl_weight at
             every step ([K], the condition of path-integral control). With the SDE's path KL, which
             ``AdjointMatching`` can charge, the factor would be another one at every step of a DDIM
             chain; then exp(V / kl_weight) obeys no linear recursion and no weight of paths has the
             optimum for its mean. On ``diffusion_envs.exact.GaussianProblem`` the chain's optimum
             has 84, 95, 98 percent of the gain in E[r] - kl_weight (path KL) at 20, 50, 100 steps.
Biased       By self-normalisation, at first order in 1/n: means under the tilt are off by
             -E[w^2 (f - E[w f])] / n. For a reward that is linear in the noise, u* is learned short
             by 1 / (effective samples), n / E[w^2] of them in a prompt: by 19 percent with 4 of 10
             effective, by 6 with 15 of 40. A prompt with one sample teaches to stay; if every
             prompt has one, that is refused. The share of effective samples is logged. It falls as
             exp(-(std(r) / kl_weight)^2) for normal rewards: kl_weight must not be small beside
             their standard deviation.
Sampling     Always the pretrained model (``old_decay`` is 1): a roll-out's scores are the
             pretrained ones, no further network call is spent on them, and its rewards do not rise.
             A roll-out may be used in several passes and minibatches, as nothing in the loss
             is on the policy that moves; too many fit the noise of its few paths.
Published    [K] samples from the policy as it is, with likelihood ratios in the weights, which
             keeps more of them effective as the policy nears the optimum. [P] has no pretrained
             model: weights are of the last policy's samples, and repetition is greedy. Published
             reward-weighted losses of diffusion models re-noise data (``distributional``).

Sources      [K] Kappen & Ruiz 2016, adaptive importance sampling for control and inference,
             arXiv 1505.01874. [P] Peters & Schaal 2007, reward-weighted regression, ICML.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ctrl.devices import sent
from diffusion_envs.objectives.path_steps import PathObjective, Rows
from diffusion_envs.ranges import require_not_negative, require_numbers, require_positive
from diffusion_envs.rollout import Rollout


def tilt_weights(
    rewards: Float[Tensor, " paths"], condition: Int64[Tensor, " paths"], kl_weight: float
) -> Float[Tensor, " paths"]:
    """exp(reward / kl_weight) over its mean within each prompt."""
    host, condition = rewards.cpu(), condition.cpu()  # read once, not for every prompt
    weights = torch.zeros_like(host)
    for prompt in condition.unique():
        one = condition == prompt
        weights[one] = int(one.sum()) * (host[one] / kl_weight).softmax(0)
    return sent(weights, rewards.device)


@dataclass(frozen=True)
class TiltedRegression(PathObjective):
    """Regression of each step's control on the noise of weighted paths of the pretrained model."""

    kl_weight: float = 1.0  # reward per nat of the chain's KL
    control_variate: float = 1.0  # c; the mean gradient is the same at any

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(kl_weight=self.kl_weight, learning_rate=self.learning_rate)
        require_not_negative(control_variate=self.control_variate)

    @property
    def reward_per_nat(self) -> float | None:
        """``kl_weight``, the tilt's temperature."""
        return self.kl_weight

    @property
    def on_policy(self) -> bool:
        """No: paths are the pretrained model's."""
        return False

    @property
    def needs_reference(self) -> bool:
        """No: the policy that sampled is the pretrained model."""
        return False

    def old_decay(self, update: int) -> float:
        """One: paths are always the pretrained model's."""
        return 1.0

    def advantages(self, rollout: Rollout) -> Float[Tensor, "paths steps"]:
        """Weights within each prompt, the same at every step.

        Raises:
            ValueError: there is nothing to weigh against each other in any prompt.
        """
        paths, prompts = len(rollout.rewards), len(rollout.condition.unique())
        if paths == prompts:
            raise ValueError(
                "samples must be more than the prompts, as TiltedRegression weighs the samples "
                f"of a prompt against each other, got {paths} of {prompts} prompts: use more "
                "samples an update, or fewer prompts"
            )
        weights = tilt_weights(rollout.rewards, rollout.condition, self.kl_weight)
        return weights[:, None].expand(rollout.costs.shape)

    def numbers(self, advantages: Float[Tensor, "paths steps"]) -> dict[str, float]:
        """The effective sample size, over the number of samples."""
        return {"effective_samples": (1 / advantages.square().mean()).item()}

    def loss(self, rows: Rows) -> Float[Tensor, " rows"]:
        """1/2 w |u|^2 - (w - c) u . z."""
        control = (rows.score_gain / rows.std)[:, None] * (rows.mean - rows.old_mean).flatten(1)
        linear = (control * rows.noise.flatten(1)).sum(1)
        weight = rows.advantage
        return 0.5 * weight * control.square().sum(1) - (weight - self.control_variate) * linear
