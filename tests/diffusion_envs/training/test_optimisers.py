"""Steps in the metric of path laws and their cheaper relatives, on the real loop."""

import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctrl.noise import stream
from diffusion_envs import rewards, samplers
from diffusion_envs.environment import Environment
from diffusion_envs.exact.problems import GaussianProblem, table
from diffusion_envs.models.text_to_image_unet import TextToImageUNet
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.objectives import DDPO, GRPO, DiffusionNFT, DxMI
from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.settings import describe, rebuild
from diffusion_envs.samplers import DDIM
from diffusion_envs.training.kl_controller import TargetKL
from diffusion_envs.training.optimisers import (
    AdamW,
    AdamW8bit,
    BoundedAdamW,
    DiagonalMetric,
    NaturalGradient,
    Optimiser,
    ScaledLoRA,
)
from diffusion_envs.training.optimisers.running_mean import RunningMean
from diffusion_envs.training.optimisers.scaled_lora import ScaledSteps, scaled
from diffusion_envs.training.path_metric import PathMetric, flattened, unflattened
from diffusion_envs.training.refusal import NonFiniteError
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from verification.problems.training_loop import Process

OPTIMISERS: list[Optimiser] = [
    AdamW(),
    BoundedAdamW(nats=0.01),
    NaturalGradient(momentum=0.5),
    DiagonalMetric(momentum=0.5, vectors=3),
    ScaledLoRA(),
    ScaledLoRA(adam=False),
]
TRUSTED = [each for each in OPTIMISERS if hasattr(each, "nats")]
ROWS = 12 * 4 * 2  # samples, steps, guidance branches of the small trainer
DDPO_RATE = DDPO(learning_rate=0.02)


def name_of(optimiser: Optimiser) -> str:
    return type(optimiser).__name__


def metric_of(run: Trainer, share: float = 1.0, batch: int = 1000, name: str = "m") -> PathMetric:
    sample = run.environment.sample(
        run.objective.policy, range(6), torch.arange(6) % 3, stream="metric"
    )
    return PathMetric.of(
        run.environment,
        run.parameters,
        sample.rollout,
        share=share,
        generator=stream(3, name),
        batch=batch,
        accelerator=Process(),
    )


def dense(metric: PathMetric) -> Tensor:
    """F from whole Jacobians, a row of outputs at a time."""
    actions = metric.environment.action(metric.states, metric.step, metric.condition)
    root = metric.weight.to(actions).sqrt().view(-1, *[1] * (actions.ndim - 1))
    outputs = (root * actions).flatten()
    rows = [
        flattened(torch.autograd.grad(out, metric.parameters, retain_graph=True)) for out in outputs
    ]
    jacobian = torch.stack(rows).double()
    return jacobian.T @ jacobian


def moved(run: Trainer, scale: float = 0.1) -> Trainer:
    """Away from the pretrained model, where both of LoRA's factors matter."""
    generator = stream(11, "away")
    with torch.no_grad():
        for parameter in run.parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return run


# -- the metric ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1000, 5])
def test_products_are_those_of_the_dense_jacobian(batch, small_trainer, generator):
    run = moved(small_trainer(DDPO()))
    metric = metric_of(run, share=0.7, batch=batch)
    F = dense(metric)
    v = torch.randn(len(F), generator=generator)
    want = F @ v.double()
    scale = float(want.norm())
    assert (metric.product(v).double() - want).norm() <= 1e-5 * scale
    assert metric.path_kl(v) == pytest.approx(float(v.double() @ want) / 2, rel=1e-5)


@pytest.mark.filterwarnings("default")
def test_products_of_an_image_model_are_those_of_its_differences(generator):
    """Attention, convolutions, norms: J v by central differences, then J' by one gradient.

    In float32 the difference is off by 4e-4 of its size.
    """
    model = TextToImageUNet.load(guidance=3.0, lora_rank=1, lora_targets=["to_q", "to_out.0"])
    parameters = model.parameters
    v = torch.cat([torch.randn(p.numel(), generator=generator) for p in parameters])

    def shift(by: float) -> None:
        with torch.no_grad():
            for parameter, part in zip(parameters, unflattened(v, parameters), strict=True):
                parameter.add_(by * part)

    shift(0.1)  # away from the pretrained model, where both factors matter
    sampler = DDIM(1.0).bind(model.table, 5)
    prompts = ["a photo of a cat"]
    environment = Environment(model, sampler, rewards.Colour("red"), prompts, seed=3)
    states = torch.randn(2, *model.event, generator=generator)
    step, condition = torch.tensor([2, 4]), torch.tensor([0, 0])
    weight = torch.tensor([0.7, 0.4], dtype=torch.float64)
    metric = PathMetric(
        environment, parameters, states, step, condition, weight, generator, 8, Process()
    )
    h = 1e-3
    shift(h)
    after = metric.actions()
    shift(-2 * h)
    before = metric.actions()
    shift(h)
    pushed = (after - before) / (2 * h)
    weighted = weight.float().view(2, 1, 1, 1) * pushed
    actions = environment.action(states, step, condition)
    want = flattened(torch.autograd.grad(actions, parameters, weighted))
    calls = model.calls
    product = metric.product(v)
    assert (product - want).norm() <= 5e-3 * want.norm()
    assert metric.path_kl(v) == pytest.approx(float((pushed * weighted).sum()) / 2, rel=5e-3)
    assert model.calls - calls == 3 * 2 * 2  # J v, J'u, and J v again, of two rows, guided
    model.score.recompute_activations()
    again = dataclasses.replace(metric)  # linearises the network anew
    assert (again.product(v) - product).norm() <= 1e-5 * product.norm()


def test_the_estimate_of_the_diagonal_is_unbiased(small_trainer):
    run = moved(small_trainer(DDPO()))
    metric = metric_of(run, share=0.5)
    calls = run.environment.model.calls
    draws = torch.stack([metric.diagonal(6) for _ in range(200)]).double()
    assert run.environment.model.calls - calls == 200 * len(metric.step) * 2
    exact = dense(metric).diagonal()
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() <= 5.5 * error).all()
    assert (error <= 0.1 * exact).all()  # or a factor of 2 would go unseen


def test_rows_of_several_metrics_are_a_partition_of_their_weight(small_trainer):
    """Each row stands for as many as were not drawn: the weights of a share add up to the whole."""
    run = small_trainer(DDPO())
    whole, part = metric_of(run), metric_of(run, share=0.25)
    assert len(whole.step) == 24
    assert len(part.step) == 6
    total = run.environment.steps.path_kl_gain.sum()
    torch.testing.assert_close(whole.weight.sum(), total)
    counted = part.weight / run.environment.steps.path_kl_gain[part.step]
    torch.testing.assert_close(counted.sum(), torch.tensor(4.0, dtype=torch.float64))


# -- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", TRUSTED, ids=name_of)
def test_a_step_costs_the_nats_that_were_asked_for(optimiser, small_trainer):
    optimiser = dataclasses.replace(optimiser, nats=1e-4, share=1.0)
    run = small_trainer(DDPO_RATE, optimiser, max_gradient_norm=1.0)
    for line in run.updates(3):
        assert line["step_path_kl"] == pytest.approx(1e-4, rel=1e-4)
        assert line["measured_step_path_kl"] == pytest.approx(1e-4, rel=0.1)


def test_the_step_of_a_rate_is_the_direction_times_it(small_trainer):
    run = small_trainer(DDPO_RATE, NaturalGradient(nats=1e6, rate=0.25))
    (line,) = run.updates(1)
    assert line["step_length"] == 0.25


@pytest.mark.parametrize("optimiser", [NaturalGradient(), DiagonalMetric()], ids=name_of)
def test_schedules_of_the_learning_rate_scale_the_step(optimiser, small_trainer):
    run = small_trainer(DDPO_RATE, optimiser)
    for group in run.optimiser.param_groups:
        assert group["lr"] == 0.02
        group["lr"] *= 0.5
    (line,) = run.updates(1)
    assert line["step_path_kl"] == pytest.approx(0.25 * optimiser.nats, rel=1e-5)


def test_a_rate_of_0_moves_nothing(small_trainer):
    for optimiser in OPTIMISERS:
        run = small_trainer(DDPO_RATE, optimiser)
        before = [p.detach().clone() for p in run.parameters]
        for group in run.optimiser.param_groups:
            group["lr"] = 0.0
        list(run.updates(1))
        assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))


def test_network_calls_of_a_step_are_counted(small_trainer):
    plain, natural = (
        small_trainer(DDPO_RATE, each)
        for each in (AdamW(), NaturalGradient(iterations=3, share=0.5))
    )
    (one,), (other,) = plain.updates(1), natural.updates(1)
    rows = ROWS // 2
    assert other["network_calls"] - one["network_calls"] == (2 * 3 + 1) * rows
    watched = natural.environment.monitoring_calls - plain.environment.monitoring_calls
    assert watched == 2 * rows  # path KL measured before and after, only to log


def test_the_natural_gradient_is_not_clipped(small_trainer):
    """Its length says nothing here; with a rate a clip would change the step."""
    steps = []
    for norm in (1e-3, 1e9):
        run = small_trainer(
            DDPO_RATE, NaturalGradient(nats=1e6, rate=0.1, share=1.0), max_gradient_norm=norm
        )
        list(run.updates(1))
        steps.append(flattened(run.parameters))
    assert torch.equal(*steps)


def test_adamw_is_torchs_bit_for_bit(small_trainer):
    """Two updates, against losses, clip and torch's AdamW written out."""
    run, other = small_trainer(DDPO_RATE), small_trainer(DDPO_RATE, weight_decay=1e-4)
    (*_,) = run.updates(2)
    adam = torch.optim.AdamW(other.parameters, lr=0.02, weight_decay=1e-4)
    for update in range(2):
        rollout = other.sample().rollout
        shuffle = stream(41, "train", "rows", update, 0, 0)
        order = torch.randperm(12, generator=shuffle)
        adam.zero_grad()
        for loss in other.losses(rollout).losses(order, shuffle):
            loss.backward()
        nn.utils.clip_grad_norm_(other.parameters, 1.0)
        adam.step()
        other.update += 1
    assert all(torch.equal(a, b) for a, b in zip(run.parameters, other.parameters, strict=True))


def test_a_wide_trust_region_lets_adamw_go(small_trainer):
    free, bounded, held = (
        small_trainer(DDPO_RATE, each)
        for each in (AdamW(), BoundedAdamW(nats=1e6), BoundedAdamW(nats=1e-6))
    )
    for run in (free, bounded, held):
        list(run.updates(1))
    for a, b in zip(free.parameters, bounded.parameters, strict=True):
        torch.testing.assert_close(a, b)  # old - (old - new) rounds
    lengths = [float(r.parameters[1].detach().abs().max()) for r in (free, held)]
    assert lengths[1] < 0.1 * lengths[0]


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=repr)
def test_runs_resume_bit_for_bit(optimiser, small_trainer, tmp_path):
    def fresh() -> Trainer:
        return small_trainer(DiffusionNFT(learning_rate=0.01), optimiser, average=0.8)

    whole, first, second = fresh(), fresh(), fresh()
    list(whole.updates(3))
    list(first.updates(2))
    path = checkpoint.save(tmp_path, 2, first.state())
    second.load_state(checkpoint.load(path).state)
    list(second.updates(3))
    assert not torch.equal(whole.parameters[1], first.parameters[1])
    pairs = zip([*whole.parameters, *whole.mean], [*second.parameters, *second.mean], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert whole.environment.model.calls == second.environment.model.calls


def test_what_is_not_finite_changes_no_weight(small_trainer, monkeypatch):
    for optimiser in OPTIMISERS:
        run = small_trainer(DDPO_RATE, optimiser)
        before = [p.detach().clone() for p in run.parameters]
        state = run.optimiser.state_dict()
        broken = run.losses
        monkeypatch.setattr(run, "losses", lambda rollout, broken=broken: NaN(broken(rollout)))
        with pytest.raises(NonFiniteError, match="no weight was changed"):
            run.step()
        assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))
        assert str(run.optimiser.state_dict()) == str(state)


class NaN:
    """Losses that are no numbers."""

    def __init__(self, losses: Any) -> None:
        self.of, self.check_fresh, self.numbers = losses, losses.check_fresh, losses.numbers

    def losses(self, groups: Tensor, generator: torch.Generator) -> Any:
        return (math.nan * loss for loss in self.of.losses(groups, generator))


@pytest.mark.parametrize("optimiser", TRUSTED, ids=name_of)
def test_a_metric_that_is_not_finite_changes_no_weight(optimiser, small_trainer, monkeypatch):
    run = small_trainer(DDPO_RATE, optimiser)
    of = run._metric

    def broken(*names: Any) -> Callable[[str, float], PathMetric]:
        def metric(what: str, share: float) -> PathMetric:
            made = of(*names)(what, share)
            made.weight.fill_(math.inf)
            return made

        return metric

    monkeypatch.setattr(run, "_metric", broken)
    before = [p.detach().clone() for p in run.parameters]
    with pytest.raises(NonFiniteError, match="no weight was changed"):
        run.step()
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))


# -- learning rates ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warm_up": 3}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        ({"schedule": "linear", "schedule_updates": 4}, [1, 3 / 4, 2 / 4, 1 / 4, 0, 0]),
        (
            {"schedule": "cosine", "schedule_updates": 5, "warm_up": 1},
            [1 / 2, 1, (2 + 2**0.5) / 4, 1 / 2, (2 - 2**0.5) / 4, 0],
        ),
    ],
)
def test_a_learning_rate_warms_up_and_falls(settings, expected):
    size = UpdateSize(**settings)
    assert [size.rate_factor(k) for k in range(6)] == pytest.approx(expected, abs=1e-15)
    if size.schedule_updates is not None:
        size.require_updates(size.schedule_updates)
        with pytest.raises(ValueError, match="updates must be at most schedule_updates"):
            size.require_updates(size.schedule_updates + 1)


def test_a_run_that_is_stopped_in_its_warm_up_is_the_one_that_was_not(small_trainer, tmp_path):
    """With an objective whose rate falls, a KL controller and a running mean, all at once."""

    def fresh() -> Trainer:
        made = small_trainer(
            Falling(learning_rate=0.01, kl_weight=0.1, group=4),
            average=0.8,
            warm_up=3,
            schedule="cosine",
            schedule_updates=6,
        )
        made.target_kl = TargetKL(0.3)
        return made

    whole, first, second = fresh(), fresh(), fresh()
    log = list(whole.updates(5))
    list(first.updates(2))
    path = checkpoint.save(tmp_path, 2, first.state())
    second.load_state(checkpoint.load(path).state)
    again = list(second.updates(5))
    rates = [line["learning_rate"] for line in log]
    factors = [1 / 4, 2 / 4, 3 / 4, 1, 3 / 4]
    expected = [0.01 * 0.5**k * factor for k, factor in enumerate(factors)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert [line["learning_rate"] for line in again] == rates[2:]
    assert [line["kl_weight"] for line in again] == [line["kl_weight"] for line in log[2:]]
    pairs = zip([*whole.parameters, *whole.mean], [*second.parameters, *second.mean], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@dataclass(frozen=True)
class Falling(GRPO):
    """Its learning rate halves."""

    @property
    def decay(self) -> float:
        return 0.5


def test_a_warm_up_makes_the_first_step_smaller(small_trainer):
    """AdamW's first step is its learning rate in every coordinate."""
    steps = []
    for warm_up in (0, 1):
        run = small_trainer(DDPO_RATE, warm_up=warm_up)
        before = flattened(run.parameters).detach()
        list(run.updates(1))
        steps.append((flattened(run.parameters).detach() - before).abs().max())
    assert steps[1] / steps[0] == pytest.approx(0.5, rel=1e-3)


def test_the_mean_of_rate_zero_is_the_newest(small_trainer):
    run = small_trainer(DDPO_RATE, average=0.0)
    list(run.updates(2))
    now = flattened(run.parameters).detach().clone()
    with run.averaged():
        assert torch.equal(flattened(run.parameters), now)


# -- optimisers of other libraries ---------------------------------------------------------------


def test_the_fused_kernel_is_asked_for_and_makes_the_same_steps(small_trainer):
    plain, fused = (small_trainer(DDPO_RATE, AdamW(each)) for each in (False, True))
    assert fused.optimiser.param_groups[0]["fused"] is True
    for run in (plain, fused):
        list(run.updates(2))
    # Adam's steps are gradients over their size, whose relative round-off is some 1e-6
    pairs = zip(plain.parameters, fused.parameters, strict=True)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)


class EightBit(torch.optim.AdamW):
    """Takes what bitsandbytes' class takes."""

    def __init__(self, params: Any, lr: float, weight_decay: float, min_8bit_size: int) -> None:
        assert min_8bit_size == 4096
        super().__init__(params, lr=lr, weight_decay=weight_decay)


def test_8_bit_adamw_is_bitsandbytes_own_and_its_state_is_in_checkpoints(
    small_trainer, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"pip install bitsandbytes, or use AdamW\(fused=True\)"):
        small_trainer(DDPO_RATE, AdamW8bit())
    library = ModuleType("bitsandbytes")
    kinds = {"AdamW8bit": EightBit, "PagedAdamW8bit": type("Paged", (EightBit,), {})}
    library.optim = SimpleNamespace(**kinds)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    for paged, kind in ((False, "AdamW8bit"), (True, "PagedAdamW8bit")):
        run = small_trainer(DDPO_RATE, AdamW8bit(paged))
        assert type(run.optimiser.optimiser) is kinds[kind]
        list(run.updates(1))
        stored = checkpoint.load(checkpoint.save(tmp_path, 1, run.state())).state
        again = small_trainer(DDPO_RATE, AdamW8bit(paged))
        again.load_state(stored)
        moments = run.optimiser.state_dict()["state"][0]["exp_avg"]
        assert torch.equal(again.optimiser.state_dict()["state"][0]["exp_avg"], moments)


# -- LoRA's factors ------------------------------------------------------------------------------


def test_a_scaled_step_does_not_depend_on_how_the_update_is_split(generator):
    """dW = B dA + dB A is the same for (A, B) and (M A, B M^-1)."""
    a, b, of_w, mix = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 7), (5, 3), (5, 7), (3, 3))
    )
    changes = []
    for one, other in ((a, b), (mix @ a, b @ torch.linalg.inv(mix))):
        step_a, step_b = scaled(one, other, other.T @ of_w, of_w @ one.T, 1e-30)
        changes.append(other @ step_a + step_b @ one)
    torch.testing.assert_close(*changes, rtol=1e-10, atol=1e-10)
    row, column = (torch.linalg.pinv(x) @ x for x in (a, b.T))
    torch.testing.assert_close(changes[0], column @ of_w + of_w @ row, rtol=1e-10, atol=1e-10)


def test_factors_of_convolutions_are_flattened(generator):
    shapes = (2, 3, 3, 3), (4, 2, 1, 1)
    a, b, grad_a, grad_b = (torch.randn(s, generator=generator) for s in shapes * 2)
    flat = scaled(a.flatten(1), b.flatten(1), grad_a.flatten(1), grad_b.flatten(1), 0.1)
    whole = scaled(a, b, grad_a, grad_b, 0.1)
    assert [list(x.shape) for x in whole] == [list(s) for s in shapes]
    for one, other in zip(whole, flat, strict=True):
        torch.testing.assert_close(one.flatten(1), other)


# -- means ---------------------------------------------------------------------------------------


def test_a_running_mean_has_no_bias_at_its_beginning():
    mean = RunningMean(0.75)
    values = [torch.tensor([v]) for v in (2.0, -3.0, 7.0)]
    weights = torch.tensor([0.75**2, 0.75, 1.0])
    for n in (1, 2, 3):
        got = mean.after(values[n - 1])
        expected = (weights[-n:] * torch.cat(values[:n])).sum() / weights[-n:].sum()
        torch.testing.assert_close(got, expected[None])


def test_the_mean_of_weights_is_the_plain_one_at_first_and_then_a_running_one(small_trainer):
    run = small_trainer(DDPO_RATE, average=0.6)
    trained, expected = list[Tensor](), torch.zeros(0)
    for k, _ in enumerate(run.updates(4)):
        trained.append(flattened(run.parameters).detach())
        now = trained[-1]
        expected = torch.stack(trained).mean(0) if k < 2 else 0.6 * expected + 0.4 * now
        with run.averaged():
            torch.testing.assert_close(flattened(run.parameters), expected)
        assert torch.equal(flattened(run.parameters), now)
    plain = small_trainer(DDPO_RATE)
    list(plain.updates(4))
    assert torch.equal(flattened(plain.parameters), trained[-1])  # it never trains or samples
    with plain.averaged():
        assert torch.equal(flattened(plain.parameters), trained[-1])


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (NaturalGradient, {"nats": 0.0}, "nats must be a positive finite number, got 0.0"),
        (NaturalGradient, {"rate": -1.0}, "rate"),
        (NaturalGradient, {"iterations": 0}, "iterations must be an integer of at least 1, got 0"),
        (NaturalGradient, {"damping": -0.1}, "damping must be at least 0"),
        (NaturalGradient, {"share": 1.5}, "share must be above 0 and at most 1, got 1.5"),
        (NaturalGradient, {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        (DiagonalMetric, {"vectors": 0}, "vectors"),
        (DiagonalMetric, {"decay": -0.1}, "decay"),
        (DiagonalMetric, {"share": 0.0}, "share"),
        (BoundedAdamW, {"nats": math.nan}, "nats"),
        (BoundedAdamW, {"share": -1.0}, "share"),
        (ScaledLoRA, {"delta": 0.0}, "delta"),
        (ScaledLoRA, {"momentum": 2.0}, "momentum"),
        (UpdateSize, {"average": 1.0}, r"average must be in \[0, 1\), or None, got 1.0"),
        (UpdateSize, {"average": -0.1}, r"average must be in \[0, 1\), or None, got -0.1"),
        (UpdateSize, {"warm_up": -1}, "warm_up must be an integer of at least 0, got -1"),
        (UpdateSize, {"schedule": "linear"}, "linear schedule reaches 0.*got None"),
        (
            UpdateSize,
            {"schedule": "cosine", "schedule_updates": 3, "warm_up": 3},
            r"more than warm_up \(3\), got 3",
        ),
        (UpdateSize, {"schedule_updates": 3}, "left out where the schedule is constant, got 3"),
    ],
)
def test_bad_settings_are_named(kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind(**change)


@pytest.mark.parametrize("optimiser", TRUSTED, ids=name_of)
@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (samplers.Scheduler("DPMSolverMultistepScheduler"), "a black box shows no steps: use DDIM"),
        (DDIM(0.0), r"an ODE's is infinite: use DDIM\(eta > 0\)"),
        (samplers.QuadraticVariances(learned_std=True), "standard deviations learn too"),
    ],
)
def test_samplers_without_a_path_kl_are_refused(optimiser, sampler, message):
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # levels of published models
    bound = sampler.bind(DDPMTable((1 - betas).cumprod(0)), 10)
    environment = GaussianProblem().environment(bound, 5)
    objective = DxMI() if bound.parameters else DiffusionNFT()
    with pytest.raises(ValueError, match=message) as refusal:
        Trainer(environment, objective, UpdateSize(), accelerator=Process(), optimiser=optimiser)
    assert name_of(optimiser) in str(refusal.value)


def test_models_without_lora_are_refused():
    environment = GaussianProblem().environment(DDIM(1.0).bind(table(), 4), 5)
    with pytest.raises(ValueError, match=r"\[6, 2, 2\], \[6, 2\], .* use another optimiser"):
        Trainer(environment, DDPO(), UpdateSize(), accelerator=Process(), optimiser=ScaledLoRA())


# -- command line --------------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=repr)
def test_settings_are_stored_and_read_again(optimiser):
    assert rebuild(describe(optimiser)) == optimiser


def test_the_unstructured_vector_is_that_of_the_parameters(generator):
    parts = [torch.randn(shape, generator=generator) for shape in ((2, 3), (4,), (1, 2, 2))]
    for one, other in zip(parts, unflattened(flattened(parts), parts), strict=True):
        assert torch.equal(one, other)


def test_a_step_is_of_the_scaled_gradients(generator):
    """Plain gradient descent with rate 0.5: what is subtracted is half of what ``scaled`` says."""
    a, b = (nn.Parameter(torch.randn(*size, generator=generator)) for size in ((2, 5), (3, 2)))
    a.grad, b.grad = (torch.randn(p.shape, generator=generator) for p in (a, b))
    step_a, step_b = scaled(a.detach(), b.detach(), a.grad, b.grad, 0.1)
    expected = a.detach() - 0.5 * step_a, b.detach() - 0.5 * step_b
    ScaledSteps(torch.optim.SGD([a, b], lr=0.5), [(a, b)], 0.1).step(lambda *_: None)
    torch.testing.assert_close((a.detach(), b.detach()), expected)
