"""Classifier-free guidance: what score it plays, and what law that does not generate.

The guided score is score(x) + w (score(x | c) - score(x)), whichever of epsilon, x0 or v
the network predicts; w = 1 is no guidance. Generation with it does not end in the law
proportional to p(x)^(1 - w) p(x | c)^w, but in another, more concentrated one here: powers
do not commute with noising.

    score_w = score(x) + w (score(x | c) - score(x))
At every noise level this is the score of p_s(x)^(1 - w) p_s(x | c)^w. It is not the score of noised
p(x)^(1 - w) p(x | c)^w, so guided generation does not end in that law.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

import ctrl
from diffusion_envs.exact import linear_policy
from diffusion_envs.exact.gaussian import Gaussian
from diffusion_envs.models.text_condition import TextCondition
from diffusion_envs.models.text_to_image_unet import GuidedScore
from diffusion_envs.noise_schedules import DDPMTable, VPLinear
from verification.claim import Check, Setting, limit, pathwise, stated
from verification.closed_form.extrapolation import extrapolated
from verification.closed_form.gaussian_law import Normal
from verification.closed_form.samplers import guided_law, power_law
from verification.closed_form.vp_gaussian import VPGaussian
from verification.cubature import affine_end
from verification.problems import gaussian_data, generation, vp_linear

SOURCE = "Ho & Salimans 2022, arXiv 2207.12598; Bradley & Nakkiran 2024, arXiv 2408.09000"

# Numbers of few binary digits: the network's float32 holds them and its predictions exactly, so
# that the checks are as precise as the setting.
ALPHA_BARS = np.array([0.9375, 0.71875, 0.28125])
TIMESTEPS = np.array([2, 0, 1, 2, 1])
STATES = np.array([[0.5, -1.25], [-0.75, 0.25], [1.5, 2.25], [0.375, -0.5], [-1.125, 0.875]])
CONTEXT = np.array([[0.25, 1.5], [-0.5, 0.75], [1.25, -1.0], [2.0, 0.5], [-1.5, 0.125]])
EMPTY = np.array([0.75, -0.25])
SCALE = 2.5
KINDS = ("epsilon", "sample", "v_prediction")
DATA, GIVEN = Normal(np.array([0.2]), np.array([[1.1]])), Normal(np.array([0.9]), np.array([[0.5]]))
MODEL = VPGaussian(*DATA, 0.4, 2.6)
POWERS = power_law(DATA, GIVEN, SCALE)


class Network(nn.Module):
    """Half of the state plus its context, less an eighth of the timestep: no trained weights."""

    def forward(
        self, states: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor
    ) -> SimpleNamespace:
        """A prediction, as diffusers would return it."""
        time = timesteps.to(states)[:, None] / 8
        return SimpleNamespace(sample=0.5 * states + encoder_hidden_states[:, 0] - time)


def predicted(context: np.ndarray) -> np.ndarray:
    """Predictions of ``Network``."""
    return 0.5 * STATES + context - TIMESTEPS[:, None] / 8


def score_of(kind: str, prediction: np.ndarray) -> np.ndarray:
    """The score by each kind's definition; variance is preserved."""
    alpha, sigma = (
        np.sqrt(ALPHA_BARS[TIMESTEPS])[:, None],
        np.sqrt(1 - ALPHA_BARS[TIMESTEPS])[:, None],
    )
    if kind == "epsilon":
        return -prediction / sigma
    x0 = prediction if kind == "sample" else alpha * STATES - sigma * prediction
    return -(STATES - alpha * x0) / sigma**2


def guided_policy(
    data: Gaussian, conditioned: Gaussian, schedule: VPLinear, scale: float
) -> ctrl.DeterministicPolicy:
    """Guidance with two exact scores."""
    zero = 0 * data.covariance, 0 * data.mean
    plain = linear_policy.linear_score(data, schedule, *zero)
    conditional = linear_policy.linear_score(conditioned, schedule, *zero)

    def mean(t: Tensor, x: Tensor) -> Tensor:
        return plain(t, x) + scale * (conditional(t, x) - plain(t, x))

    return ctrl.DeterministicPolicy(mean)


def generated(setting: Setting, scale: float, steps: int) -> Normal:
    """Law at the data of production's guided Euler chain, from the noised law of powers."""
    data, conditioned, schedule = (
        gaussian_data(setting, DATA),
        gaussian_data(setting, GIVEN),
        vp_linear(MODEL),
    )
    problem = generation(data, schedule)[0]
    policy = guided_policy(data, conditioned, schedule, scale)
    step = affine_end(problem, policy, ctrl.uniform_grid(1.0, steps), data.mean)
    return step.of(MODEL.with_data(POWERS).noised(1.0))


def checks(setting: Setting) -> Iterator[Check]:
    """Production's guided score of a fixed network, and the law of Gaussian data under guidance."""
    bars = DDPMTable(torch.as_tensor(ALPHA_BARS))
    empty = TextCondition(setting.tensor(EMPTY)[None, None])
    x, context = setting.tensor(STATES), TextCondition(setting.tensor(CONTEXT)[:, None])
    steps = torch.as_tensor(TIMESTEPS, device=x.device)
    for kind in KINDS:
        guided = GuidedScore(Network(), bars, kind, SCALE, empty)(x, steps, context)
        plain, conditional = (score_of(kind, predicted(c)) for c in (EMPTY, CONTEXT))
        check = pathwise(f"guided score, {kind}", guided, plain + SCALE * (conditional - plain))
        yield stated(check, precision=setting.dtype)
    with torch.no_grad():
        chunked = GuidedScore(Network(), bars, KINDS[0], SCALE, empty, batch=2)(x, steps, context)
    plain, conditional = (score_of(KINDS[0], predicted(c)) for c in (EMPTY, CONTEXT))
    check = pathwise("the same in chunks", chunked, plain + SCALE * (conditional - plain))
    yield stated(check, precision=setting.dtype)
    unguided = GuidedScore(Network(), bars, KINDS[2], 1.0, empty)(x, steps, context)
    yield pathwise(
        "scale 1: the conditional score", unguided, score_of(KINDS[2], predicted(CONTEXT))
    )

    laws = [generated(setting, SCALE, n) for n in (10, 20, 40, 80)]
    mean, covariance = (
        extrapolated([law.mean for law in laws]),
        extrapolated([law.covariance for law in laws]),
    )
    exact = guided_law(MODEL, GIVEN, SCALE, MODEL.with_data(POWERS).noised(1.0))
    yield limit("law that guidance generates: mean", mean, exact.mean)
    yield limit("law that guidance generates: variance", covariance, exact.covariance)
    apart = (exact.mean - POWERS.mean)[0], (exact.covariance - POWERS.covariance)[0, 0]
    gaps = (mean - POWERS.mean)[0], (covariance - POWERS.covariance)[0, 0]
    yield limit("how far that is from the law of powers", gaps, apart)


MISTAKES = """
diffusion_envs.models.text_to_image_unet.GuidedScore._prediction
    scale counted from 0 | without + scale => with_prompt + scale
    branches exchanged | without, with_prompt = => with_prompt, without =
    scale less 1 | scale * ( => (scale - 1) * (
    sign of the difference | (with_prompt - without) => (without - with_prompt)
    no guidance at scale 1 only | self.guidance == 1 => self.guidance != 0
    the prompt in both branches | joined([empty, context]) => joined([context, context])
diffusion_envs.models.text_to_image_unet.GuidedScore._score
    alpha-bar for alpha | alpha_bar.sqrt(), (1 => alpha_bar, (1
    sigma^2 for sigma | (1 - alpha_bar).sqrt() => (1 - alpha_bar)
    every prediction taken for epsilon | _TO_SCORE[self.prediction_type] => _TO_SCORE["epsilon"]
diffusion_envs.models.text_to_image_unet.GuidedScore._alpha_bar
    noise level of another row | )[timesteps] => )[timesteps.roll(1)]
diffusion_envs.models.text_to_image_unet.GuidedScore._in_chunks
    chunks of rows mixed up | timesteps[c], context[c] => timesteps.flip(0)[c], context[c]
verification.claims.denoising.guidance.guided_policy
    difference of scores scaled once more | plain(t, x) + scale => plain(t, x) + scale * scale
    guided by the conditional score alone | scale * (conditional(t, x) - plain(t, x))
        => (conditional(t, x) - plain(t, x))
shared
    drift of the noising process not reversed
"""
