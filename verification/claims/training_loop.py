"""What must hold in a training loop, whatever is trained: on the loop that users run.

The network is the smallest one: a linear prediction of the noise with a low-rank adapter, so that
the loop's gradients can be written out by hand. Its weights, like all networks of the loop, are
float32, and so are tolerances: what is compared is off by 1e-7 when right, more where terms add up.
"""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ctrl.noise import stream
from ctrl.trust_region import clipped_surrogate
from diffusion_envs.environment import Environment, Sample
from diffusion_envs.models.adapters import AdapterSwitch
from diffusion_envs.models.text_condition import TextCondition
from diffusion_envs.models.text_to_image_unet import GuidedScore, TextToImageUNet
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.objectives import ScoreAsAction
from diffusion_envs.objectives.path_steps import PathLosses, Rows, path_kl_rate
from diffusion_envs.samplers import DDIM
from diffusion_envs.samplers.ddim import BoundDDIM
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from verification.claim import Check, Setting, claim, pathwise, rounding, stated, wrong
from verification.closed_form import linear_adapter
from verification.closed_form.linear_adapter import Sampler

EVENT, STEPS, SAMPLES = (4, 2, 2), 4, 6
PROMPTS = ["one", "two", "three"]
TABLE = torch.linspace(0.97, 0.08, 20, dtype=torch.float64)
ETA, KL_WEIGHT = 0.45, 2.3
FLOAT32 = "the loop's networks, states and rewards are float32 whatever the setting"


class Network(nn.Module):
    """Noise prediction W x + U context + V timestep, plus B A x where the adapter is on."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        dim = 16

        def drawn(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(shape, generator=generator))

        self.base, self.context = drawn(dim, dim, scale=0.2), drawn(dim, 3, scale=0.4)
        self.time = drawn(dim, scale=0.03)
        self.a, self.b = drawn(2, dim, scale=0.3), drawn(dim, 2, scale=0.3)
        self.adapted = True

    def disable_adapters(self) -> None:
        """Switch the adapter off: the pretrained network."""
        self.adapted = False

    def enable_adapters(self) -> None:
        """Switch the adapter on again."""
        self.adapted = True

    def forward(self, x: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Any:
        """Predict the noise, in the form of a diffusers UNet."""
        flat = x.flatten(1)
        predicted = flat @ self.base.T + encoder_hidden_states.mean(1) @ self.context.T
        predicted = predicted + timesteps[:, None] * self.time
        if self.adapted:
            predicted = predicted + flat @ self.a.T @ self.b.T
        return SimpleNamespace(sample=predicted.view_as(x))


class Process(Accelerator):
    """One of several processes that do not communicate."""

    def __init__(self, index: int = 0, processes: int = 1) -> None:
        self._index, self._processes = index, processes

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleMethodOverride]  # as below
        """Where it computes."""
        return torch.device("cpu")

    @property
    def num_processes(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]  # accelerate types it as NoReturn
        """Number of processes that this one is told of."""
        return self._processes

    @property
    def process_index(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]  # as above
        """Which one this is."""
        return self._index

    def gather(self, tensor: Any) -> Any:
        """Nothing comes from elsewhere."""
        return tensor

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Nothing comes from elsewhere."""
        return tensor


def trainer(
    setting: Setting, batch: int = 64, process: Process | None = None, **schedule: Any
) -> Trainer:
    """The loop in the midst of a run: three updates are done, the adapter is no longer fresh."""
    generator = stream(setting.seed, "network")
    network = Network(generator)
    context = torch.randn(len(PROMPTS), 2, 3, generator=generator)
    score = GuidedScore(
        network,
        DDPMTable(TABLE),
        "epsilon",
        1.7,
        TextCondition(torch.randn(1, 2, 3, generator=generator)),
        adapter=AdapterSwitch(network.enable_adapters, network.disable_adapters),
    )
    model = TextToImageUNet(
        score=score,
        event=EVENT,
        table=DDPMTable(TABLE),
        encode=lambda asked: TextCondition(context[[PROMPTS.index(prompt) for prompt in asked]]),
        decode=lambda latents: latents[:, [0, 1, 0]].sigmoid(),
        parameters=[network.a, network.b],
    )
    environment = Environment(
        model=model,
        sampler=DDIM(eta=ETA).bind(DDPMTable(TABLE), STEPS),
        reward=lambda images, prompts: 3 * images.mean((1, 2, 3)) + images[:, 1, 0, 1],
        prompts=PROMPTS,
        seed=41,
    )
    made = Trainer(
        environment,
        ScoreAsAction(kl_weight=KL_WEIGHT, learning_rate=1e-3),
        UpdateSize(samples=SAMPLES, batch=batch, max_gradient_norm=1e9, value_epochs=1, **schedule),
        accelerator=process or Process(),
    )
    made.update = 3
    return made


def network_of(made: Trainer) -> Network:
    """Its network."""
    model = made.environment.model
    assert isinstance(model, TextToImageUNet)
    network = model.score.unet
    assert isinstance(network, Network)
    return network


def sampler_of(made: Trainer) -> BoundDDIM:
    """Its sampler."""
    sampler = made.environment.sampler
    assert isinstance(sampler, BoundDDIM)
    return sampler


def flat(values: Tensor, keep: int = 2) -> np.ndarray:
    """Convert to numpy, in double precision, events flattened."""
    return values.detach().double().flatten(keep).numpy()


def by_hand(made: Trainer) -> tuple[Sampler, np.ndarray, np.ndarray]:
    """The sampler's tables and the adapter."""
    network = network_of(made)
    alpha_bar = sampler_of(made).alpha_bar.numpy()
    a, b = (p.detach().double().numpy() for p in (network.a, network.b))
    return Sampler(ETA, alpha_bar), a, b


def units_of_ratio(rows: Rows) -> float:
    """Units by which a log-ratio that is 0 may be off, the network being asked in other batches.

    As in ``objectives.path_steps.log_ratio_rounding``, but for this network: a predicted noise is a
    sum of 16 + 3 + 1 + 2 terms, and guidance multiplies the roundings of its branches by 1.7 and
    0.7. A score may so be off by sqrt(22) * 1.84 = 8.6 units of |score|, and <shift, z> by 6 times
    that in units of the transition's standard deviation. An advantage is multiplied by the ratio,
    so a loss is off by as much. Of a gradient, a mean over rows whose ratios are off by independent
    normal variables, one standard deviation is left.
    """
    size = (rows.old_mean.flatten(1).norm(dim=1) * (rows.score_gain / rows.std).abs()).max()
    return rounding(16 + 3 + 1 + 2, 6 * math.hypot(1.7, 0.7) * size.item())


ROWS = "diffusion_envs.objectives.path_steps.PathLosses.rows"
LOSSES = "diffusion_envs.objectives.path_steps.PathLosses.losses"
IMPROVE = "diffusion_envs.training.gradients.Gradients.differentiate"
LOSS = "diffusion_envs.objectives.score_as_action.ScoreAsAction.loss"
SAMPLE = "diffusion_envs.environment.Environment.sample"
SIMULATED = "diffusion_envs.environment.Environment._simulated"
PRETRAINED = "diffusion_envs.models.adapters.AdapterSwitch._switch"
KL_RATE = "diffusion_envs.objectives.path_steps.path_kl_rate"


@claim(
    statement="""
        Before the first gradient step on a roll-out the ratio of new to old policy is 1 in every
        row; the gradient is that of -sum_k A_k grad log p(x_{k+1} | x_k) + kl_weight path KL,
        averaged over paths, in however many pieces it is accumulated; the KL that is reported is
        the KL that is trained; the pretrained weights do not move.
        """,
    source='"Score as Action", arXiv 2502.01819, Theorems 3.1 and 4.1; Schulman et al. 2017',
    why_double=FLOAT32,
    precision=torch.float32,
    wrongs=[
        wrong(
            "old log-density not detached from the new",
            ROWS,
            'old_mean=stored("means")',
            "old_mean=mean",
        ),
        wrong(
            "the pretrained policy for the old one",
            ROWS,
            'old_mean=stored("means")',
            'old_mean=stored("reference_scores")',
        ),
        wrong(
            "advantages not shuffled with their rows",
            ROWS,
            "advantage=self.advantages[path, step]",
            "advantage=self.advantages[path.sort()[0], step]",
        ),
        wrong(
            "noise of another step",
            ROWS,
            'noise=stored("noises")',
            "noise=rollout.noises[path, step - 1]",
        ),
        wrong(
            "timestep of another step",
            "diffusion_envs.environment.Environment.action",
            "[sent(step, self.device)]",
            "[sent(step, self.device) - 1]",
        ),
        wrong(
            "prompts not shuffled with their rows",
            ROWS,
            "rollout.condition[which[:, 0]]",
            "rollout.condition[which[:, 0].flip(0)]",
        ),
        wrong(
            "adapter ignored while sampling",
            SIMULATED,
            "            means.append(self._act(states, timestep.expand(len(states)), conditions))",
            "            with self.model.pretrained():\n"
            "                means.append(self._act(states, timestep.expand(len(states)), "
            "conditions))",
        ),
        wrong(
            "the reference is the policy itself",
            PRETRAINED,
            "self.disable()",
            "pass",
        ),
        wrong(
            "the adapter stays off after the reference",
            PRETRAINED,
            "self.enable()",
            "pass",
        ),
        wrong("sign of the KL in the loss", LOSS, "return self._kl_cost", "return -self._kl_cost"),
        wrong(
            "sign of the gain in the loss",
            LOSS,
            "self._kl_cost(rows) - self._gain(rows)",
            "self._kl_cost(rows) + self._gain(rows)",
        ),
        wrong("KL reported is not the KL trained: half", KL_RATE, "0.5 * rows", "1.0 * rows"),
        wrong("KL reported is not the KL trained: factor", KL_RATE, "rows.kl_factor * ", ""),
        wrong(
            "KL of the ancestral sampler reported",
            "diffusion_envs.samplers.BoundDDIM.path_kl",
            "factor=self.kl_factor",
            "factor=1.0",
        ),
        wrong(
            "accumulation divides twice",
            LOSSES,
            ".sum() * steps / len(which)",
            ".mean() * steps / len(which)",
        ),
        wrong(
            "accumulation never divides",
            LOSSES,
            ".sum() * steps / len(which)",
            ".mean() * steps",
        ),
        wrong(
            "sum over rows for the mean over paths",
            LOSSES,
            ".sum() * steps / len(which)",
            ".sum()",
        ),
        wrong(
            "last partial batch left out",
            LOSSES,
            "in mine.split(",
            "in mine[: len(mine) // self.batch * self.batch].split(",
        ),
        wrong(
            "gradient of the last piece alone",
            IMPROVE,
            "loss.backward()",
            "self.optimiser.zero_grad(); loss.backward()",
        ),
        wrong(
            "gradient kept from the update before",
            IMPROVE,
            "self.optimiser.zero_grad(set_to_none=True)",
            "pass",
        ),
        wrong(
            "pretrained weights trained",
            "diffusion_envs.training.trainer.Trainer.__init__",
            '[{"params": environment.model.parameters}]',
            '[{"params": environment.model.score.unet.parameters()}]',
        ),
        wrong(
            "transition's noise of another variance in the ratio",
            "diffusion_envs.objectives.path_steps.transition_log_ratio",
            "(rows.score_gain / rows.std)",
            "(rows.score_gain / rows.std.square())",
        ),
    ],
)
def training_loop(setting: Setting) -> Iterator[Check]:
    """One update in the midst of a run, against gradients by hand."""
    made = trainer(setting)
    rollout = made.sample().rollout
    s, a, b = by_hand(made)
    x = flat(rollout.states[:, :-1])
    costs = linear_adapter.path_kl(s, a, b, x)
    yield pathwise("path KL of every step, by hand", rollout.costs, costs)
    order = torch.randperm(SAMPLES * STEPS, generator=stream(setting.seed, "rows"))
    which = torch.cartesian_prod(torch.arange(SAMPLES), torch.arange(STEPS))[order]
    objective = made.objective
    assert isinstance(objective, ScoreAsAction)
    with torch.no_grad():
        update = made.losses(rollout)
        assert isinstance(update, PathLosses)
        advantages = update.advantages
        rows = update.rows(which)
        pieces = [update.rows(piece) for size in (1, 5, 24) for piece in which.split(size)]
        ratio = torch.cat([objective.log_ratio(piece) for piece in pieces]).exp()
        trained, losses = path_kl_rate(rows), objective.loss(rows)
    check = pathwise("ratio before the first step is 1", ratio, torch.ones_like(ratio))
    yield stated(check, units=units_of_ratio(rows))
    path, step = which.unbind(1)
    yield pathwise("path KL of a row that is trained", trained, costs[path, step])
    a_k = advantages[path, step].double().numpy()
    check = pathwise("loss of a row", losses, KL_WEIGHT * costs[path, step] - a_k)
    share = float(np.abs(a_k).max()) / losses.abs().max().item()
    yield stated(check, units=share * units_of_ratio(rows))
    after = rollout.states[path, step + 1]
    mean = sampler_of(made).mean(step, rollout.states[path, step], rows.old_mean)
    std = torch.as_tensor(s.std).to(after)[step].view(-1, 1, 1, 1)
    yield pathwise("a row's noise leads to its next state", mean + std * rows.noise, after)
    want = linear_adapter.gradient(
        s, a, b, x, flat(rollout.noises), advantages.double().numpy(), KL_WEIGHT
    )
    for batch in (24, 13, 3):
        one = trainer(setting, batch=batch)
        network = network_of(one)
        network.b.grad = 1e4 * torch.ones_like(network.b)  # of the update before
        frozen = [network.base.clone(), network.context.clone(), network.time.clone()]
        numbers = one.step()
        for name, parameter, grad in zip("AB", (network.a, network.b), want, strict=True):
            slope = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            check = pathwise(f"gradient in {name}, {batch} rows at once", slope, grad)
            yield stated(check, units=units_of_ratio(rows) / 6)
    kept = torch.cat([w.flatten() for w in (network.base, network.context, network.time)])
    yield pathwise("pretrained weights", kept, torch.cat([w.flatten() for w in frozen]))
    yield pathwise("path KL that is reported", numbers["path_kl"].mean, costs.sum(1).mean())


SURROGATE = "ctrl.trust_region.clipped_surrogate"


@claim(
    statement="""
        The clipped surrogate is min(r A, clip(r) A): for A > 0 its gradient ends where r is above
        the range, for A < 0 where it is below, and nowhere else. False: that clipping alone bounds
        the ratio; outside the range on the other side the gradient is that of r A.
        """,
    source="Schulman et al. 2017, equation 7",
    wrongs=[
        wrong(
            "max for min",
            SURROGATE,
            "return torch.minimum(ratio * advantage",
            "return torch.maximum(ratio * advantage",
        ),
        wrong(
            "sides swapped for negative advantage",
            SURROGATE,
            "return torch.minimum(ratio * advantage, trusted * advantage)",
            "return torch.minimum(ratio, trusted) * advantage",
        ),
        wrong(
            "clipped always",
            SURROGATE,
            "return torch.minimum(ratio * advantage, trusted * advantage)",
            "return trusted * advantage",
        ),
        wrong(
            "never clipped",
            SURROGATE,
            "return torch.minimum(ratio * advantage, trusted * advantage)",
            "return ratio * advantage",
        ),
        wrong(
            "lower end of the range missing",
            SURROGATE,
            "torch.maximum(log_ratio, -half_width)",
            "log_ratio",
        ),
        wrong("range of half the width", SURROGATE, "half_width).exp()", "half_width / 2).exp()"),
        wrong(
            "ratio detached",
            SURROGATE,
            "ratio = log_ratio.exp()",
            "ratio = log_ratio.exp().detach()",
        ),
        wrong(
            "ratio to first order", SURROGATE, "ratio = log_ratio.exp()", "ratio = 1 + log_ratio"
        ),
    ],
)
def clipped_ratio(setting: Setting) -> Iterator[Check]:
    """Values and slopes on both sides of both ends, for good and bad decisions."""
    half_width = 0.35
    one = torch.linspace(-0.83, 0.97, 13)
    log_ratio = setting.tensor(torch.cat([one, one]).double()).requires_grad_()
    advantage = setting.tensor([1.7] * 13 + [-0.6] * 13)
    gain = clipped_surrogate(log_ratio, advantage, torch.full_like(advantage, half_width))
    (slope,) = torch.autograd.grad(gain.sum(), log_ratio)
    x, a = (v.detach().double().cpu().numpy() for v in (log_ratio, advantage))
    want, slopes = linear_adapter.surrogate(x, a, half_width)
    yield pathwise("surrogate", gain, want)
    yield pathwise("its slope in the log-ratio", slope, slopes)


NORMALS = "diffusion_envs.environment.Environment._normals"
DRAW = "diffusion_envs.training.trainer.Trainer.sample"


def noises(setting: Setting, processes: int) -> Tensor:
    """Start and transition noise of two updates, [updates * samples, 1 + steps, dim]."""
    by_update = []
    for update in (3, 4):
        for index in range(processes):
            made = trainer(setting, process=Process(index, processes))
            made.update = update
            with torch.no_grad():
                sample = made.sample()
            by_update.append(_of(sample))
    return torch.cat(by_update)


def _of(sample: Sample) -> Tensor:
    rollout = sample.rollout
    return torch.cat([rollout.states[:, :1], rollout.noises], dim=1).flatten(2)


@claim(
    statement="""
        Every sample of every update has noise of its own, on every process: as many distinct
        noise vectors as were asked for, the same for 1, 2 and 3 processes, whatever the prompts;
        evaluation sees none of it.
        """,
    source="verl-omni issue 561, VeOmni issue 956 (seeds local to a worker; seed + rank)",
    why_double=FLOAT32,
    precision=torch.float32,
    wrongs=[
        wrong(
            "seeds local to a process",
            DRAW,
            "range(first + share.paths.start, first + share.paths.stop)",
            "range(first, first + len(share.paths))",
        ),
        wrong("the same noise at every update", DRAW, "first = self.update * samples", "first = 0"),
        wrong("updates overlap", DRAW, "self.update * samples", "self.update * (samples - 1)"),
        wrong("index within the batch", NORMALS, "samples=samples", "samples=range(len(samples))"),
        wrong(
            "noise of the prompt",
            SAMPLE,
            'self._normals((steps, *self.event), stream, "transition", samples)',
            'self._normals((steps, *self.event), stream, "transition", '
            "range(len(self.prompts)))[condition]",
        ),
        wrong("start and transitions alike", NORMALS, "(stream, what)", "(stream,)"),
        wrong("evaluation sees training's noise", NORMALS, "(stream, what)", "(what,)"),
        wrong(
            "seed + rank",
            NORMALS,
            "seed=self.seed, name=(stream, what), samples=samples",
            "seed=self.seed + samples[0], name=(stream, what), samples=range(len(samples))",
        ),
    ],
)
def noise_of_samples(setting: Setting) -> Iterator[Check]:
    """Counts of distinct vectors, and equality over numbers of processes."""
    parts = [noises(setting, processes) for processes in (1, 2, 3)]
    asked = float(2 * SAMPLES * (1 + STEPS))
    counts = [_distinct(one) for one in parts]
    yield pathwise("distinct noise vectors of 1, 2, 3 processes", counts, [asked] * 3)
    gaps = torch.stack([one - parts[0] for one in parts])
    yield pathwise("noise of 1, 2, 3 processes is one", gaps, 0 * gaps, scale=1.0)
    made = trainer(setting)
    indices = range(3 * SAMPLES, 5 * SAMPLES)
    conditions = torch.arange(2 * SAMPLES) % len(PROMPTS)
    held_out = made.environment.sample(
        made.objective.policy, indices, conditions, stream="evaluation"
    )
    both = torch.cat([parts[0], _of(held_out)])
    yield pathwise("distinct with evaluation's", _distinct(both), 2 * asked)


def _distinct(vectors: Tensor) -> float:
    return float(len({tuple(row) for row in vectors.flatten(0, 1).tolist()}))
