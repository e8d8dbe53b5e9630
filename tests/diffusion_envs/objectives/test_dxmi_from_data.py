"""DxMI with a learned energy: each step of a batch against its formula, on Gaussian data too."""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ctrl.noise import stream
from diffusion_envs.exact.problems import GaussianProblem, table
from diffusion_envs.noise_schedules import DDPMTable
from diffusion_envs.objectives import (
    ContinuousDxMIFromData,
    ContinuousDxMIReleasedFromData,
    DxMI,
    DxMIFromData,
    Objective,
    Rollout,
)
from diffusion_envs.objectives.dxmi import ValueRows
from diffusion_envs.objectives.dxmi_from_data import energy_loss, next_cost
from diffusion_envs.samplers import DDIM, GaussianSteps, QuadraticVariances
from diffusion_envs.training.energy import (
    EnergyCritic,
    EnergyOfPictures,
    EnergyOfVectors,
    energy_network,
)
from diffusion_envs.training.requirements import require_inputs
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from verification.problems.training_loop import Process

STEPS = 4
KINDS = (DxMIFromData, ContinuousDxMIFromData, ContinuousDxMIReleasedFromData)


@dataclass(frozen=True)
class Normal:
    """Data of independent coordinates."""

    mean: tuple[float, ...] = (0.6, -0.4)
    std: float = 0.5

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        mean = torch.tensor(self.mean)
        return mean + self.std * torch.randn(n, len(self.mean), generator=generator)


def trainer(
    objective: Objective,
    data: Any = None,
    seed: int = 5,
    sampler: GaussianSteps | None = None,
    **size: Any,
) -> Trainer:
    environment = GaussianProblem().environment(DDIM(1.0).bind(table(), STEPS), seed)
    if sampler is not None:
        environment = replace(environment, sampler=sampler)
    settings = {"samples": 12, "batch": 10, "value_epochs": 1, "weight_decay": 0.0} | size
    return Trainer(
        environment,
        objective,
        UpdateSize(**settings),
        accelerator=Process(),
        data=Normal() if data is None else data,
    )


# -- the energy -----------------------------------------------------------------------------------


def test_the_energy_s_loss_written_out():
    data, samples = torch.tensor([1.0, -2.0, 4.0]), torch.tensor([3.0, 5.0])
    expected = 1.0 - 4.0 + 0.3 * (21 / 3 + 34 / 2)
    assert energy_loss(data, samples, 0.3).item() == pytest.approx(expected, rel=1e-6)


def test_the_best_energy_of_two_gaussians_is_the_one_that_is_known():
    """(p_y - p_x) / (2 gamma (p_y + p_x)): no direction leads down from it.

    Sums over midpoint quantiles of n points are within O(log n / n) of expectations.
    """
    n, gamma = 40_000, 0.7
    quantile = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    data, samples = 0.5 + 0.8 * quantile, -0.3 + 1.1 * quantile

    def log_density(x: Tensor, mean: float, std: float) -> Tensor:
        return -0.5 * ((x - mean) / std).square() - math.log(std)

    def energy(x: Tensor) -> Tensor:
        log_ratio = log_density(x, -0.3, 1.1) - log_density(x, 0.5, 0.8)
        return torch.tanh(log_ratio / 2) / (2 * gamma)

    for direction in (torch.ones_like, torch.sin, torch.square):
        size = torch.zeros((), dtype=torch.float64, requires_grad=True)
        loss = energy_loss(
            energy(data) + size * direction(data),
            energy(samples) + size * direction(samples),
            gamma,
        )
        (slope,) = torch.autograd.grad(loss, size)
        assert abs(slope) < 2e-3
        twice = energy_loss(
            energy(data) + 0.3 * direction(data), energy(samples) + 0.3 * direction(samples), gamma
        )
        assert twice > loss


def test_what_a_step_costs_is_that_of_the_published_code():
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    costs = [next_cost(k, 10, 1.0) for k in range(10)]
    assert costs == pytest.approx([sigmoid(5 - k) - sigmoid(4 - k) for k in range(10)], abs=1e-6)
    assert sum(costs) == pytest.approx(sigmoid(5) - sigmoid(-5), abs=1e-6)
    assert next_cost(1, 4, 0.5) == pytest.approx(0.5 * (sigmoid(1) - sigmoid(0)), abs=1e-6)


# -- a batch --------------------------------------------------------------------------------------


def test_a_batch_is_a_step_of_the_energy_and_then_one_of_the_value_at_each_node_backwards():
    """Written out with an optimiser of its own; the draw of the data is the run's."""
    objective = DxMIFromData(square_weight=0.4, time_cost=0.8, energy_width=6)
    made = trainer(objective, value_learning_rate=3e-2)
    rollout = made.sample().rollout
    critic = made.critic
    assert isinstance(critic, EnergyCritic)
    twin = copy.deepcopy(critic.network)
    optimiser = torch.optim.Adam(twin.parameters(), lr=3e-2)
    told = critic.improve(rollout, None, 3)

    data = Normal().draw(12, stream(5, "train", "data", 3, 0))
    of_data, of_samples = twin(data), twin(rollout.states[:, -1])
    loss = of_data.mean() - of_samples.mean()
    loss = loss + 0.4 * ((of_data**2).mean() + (of_samples**2).mean())
    assert told["energy_of_data"] == pytest.approx(of_data.mean().item(), rel=1e-4)
    assert told["energy_of_samples"] == pytest.approx(of_samples.mean().item(), rel=1e-4)
    assert told["energy_loss"] == pytest.approx(loss.item(), rel=1e-4)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses = []
    for k in (3, 2, 1, 0):
        cost = 0.8 * (1 / (1 + math.exp(k - 2)) - 1 / (1 + math.exp(k - 1)))
        target = twin(rollout.states[:, k + 1]).detach() + cost
        value_loss = ((twin(rollout.states[:, k]) - target) ** 2).mean()
        optimiser.zero_grad()
        value_loss.backward()
        optimiser.step()
        losses.append(value_loss.item())
    assert told["value_loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    for one, other in zip(critic.network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_on_a_martingale_a_linear_energy_is_its_own_value():
    """States walk without drift: then E[b x_{k+1} | x_k] = b x_k, and the step's gradient is 0.

    With a cost c the gradient in the energy's constant is -2 c, in its slope 0 about mean 0.
    """
    made = trainer(DxMIFromData(time_cost=0.0), value_epochs=1)
    critic = made.critic
    assert isinstance(critic, EnergyCritic)
    start = torch.tensor([-1.0, 1.0]).repeat_interleave(2)
    noise = torch.tensor([-0.7, 0.7]).repeat(2)  # two nodes: exact to degree three
    states = torch.stack([start, start + noise], dim=1)[:, :, None]
    none = torch.zeros(4, 1, 1)
    rollout = Rollout(
        states=states,
        means=none,
        actions=none,
        noises=none,
        reference_scores=None,
        costs=none[:, :, 0],
        values=None,
        rewards=none[:, 0, 0],
        step_sizes=torch.ones(1),
        condition=torch.zeros(4, dtype=torch.int64),
    )
    squeezed = _Squeezed(nn.Linear(1, 1))
    nn.init.constant_(squeezed.network.weight, 0.9)
    critic.network = squeezed
    for cost in (0.0, 0.5):
        critic.objective = replace(made.objective, time_cost=cost)
        seen: list[Tensor] = []

        def descend(loss: Any, rows: int, weight: float, seen: list[Tensor] = seen) -> Tensor:
            whole = loss(slice(rows))
            seen += torch.autograd.grad(whole, list(squeezed.parameters()))
            return whole

        critic._descend = descend
        critic._value_step(rollout, 0)
        slope, constant = (float(g) for g in seen)
        assert slope == pytest.approx(0, abs=1e-6)
        assert constant == pytest.approx(-2 * next_cost(0, 1, cost), abs=1e-6)


class _Squeezed(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[:, 0]


def test_usual_moves_begin_at_the_noising_chain_s_and_follow_the_samples():
    made = trainer(DxMIFromData(move_decay=0.9))
    critic = made.critic
    alpha_bar = made.environment.steps.alpha_bar
    before = 1 - alpha_bar[:-1] / alpha_bar[1:]
    torch.testing.assert_close(critic.usual_moves.double(), before, rtol=1e-6, atol=0)
    rollout = made.sample().rollout
    critic.improve(rollout, None, 0)
    moves = torch.stack(
        [(rollout.states[:, k + 1] - rollout.states[:, k]).square().mean() for k in range(4)]
    )
    expected = 0.9 * before + 0.1 * moves.double()
    torch.testing.assert_close(critic.usual_moves.double(), expected, rtol=1e-5, atol=0)


def test_the_policy_s_step_reads_the_energy_after_its_step_and_the_moves(monkeypatch):
    """In one update: sample, then critic, then policy, by minus the new energy."""
    made = trainer(DxMIFromData(energy_width=5), value_learning_rate=1e-2)
    order, seen = list[str](), list[ValueRows]()
    improve, loss = EnergyCritic.improve, DxMIFromData.loss

    def improving(self: EnergyCritic, *arguments: Any) -> dict[str, float]:
        order.append("critic")
        return improve(self, *arguments)

    def losing(self: DxMIFromData, rows: ValueRows) -> Tensor:
        order.append("policy")
        seen.append(rows)
        return loss(self, rows)

    monkeypatch.setattr(EnergyCritic, "improve", improving)
    monkeypatch.setattr(DxMIFromData, "loss", losing)
    made.step()
    assert order[0] == "critic"
    assert set(order[1:]) == {"policy"}
    rows = seen[0]
    states = torch.randn(len(rows.state), 2, generator=stream(1))
    torch.testing.assert_close(rows.next_value(states), -made.critic.network(states))
    torch.testing.assert_close(rows.value(states), -made.critic.network(states))
    assert rows.usual is not None
    assert all(u in made.critic.usual_moves for u in rows.usual)


# -- the policy -----------------------------------------------------------------------------------


def value_rows(std: Tensor, noise: Tensor, value: Any, **changed: Any) -> ValueRows:
    n, zeros = len(noise), torch.zeros_like(noise)
    made = ValueRows(
        mean=zeros,
        old_mean=zeros,
        reference_score=None,
        noise=noise,
        advantage=zeros[:, 0],
        step_size=torch.full((n,), 0.3, dtype=torch.float64),
        horizon=torch.tensor(1.0, dtype=torch.float64),
        score_gain=torch.ones(n, dtype=torch.float64),
        std=std.expand(n),
        kl_factor=1.0,
        state=zeros,
        next_mean=zeros,
        value=value,
        next_value=value,
    )
    return replace(made, **changed)


def test_a_learned_standard_deviation_comes_to_rest_where_it_is_known():
    """E = a |x|^2 / 2 in d coordinates: a d std^2 = entropy_weight, and below it grows."""
    a, weight, corners = 1.7, 0.3, torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).double()
    objective = DxMIFromData(entropy_weight=weight, move_weight=0.0)
    rest = math.sqrt(weight / (a * 3))
    for std, sign in ((rest, 0), (0.8 * rest, -1), (1.2 * rest, 1)):
        leaf = torch.tensor(std, dtype=torch.float64, requires_grad=True)
        rows = value_rows(leaf, corners, lambda x: -0.5 * a * x.square().sum(1))
        (slope,) = torch.autograd.grad(objective.loss(rows).mean(), leaf)
        assert (abs(slope) < 1e-12) if sign == 0 else (slope * sign > 0.1)


def test_moves_are_compared_with_those_that_are_usual():
    noise = torch.tensor([[1.0, -1.0], [2.0, 0.5]], dtype=torch.float64)
    std, usual = torch.tensor(0.4, dtype=torch.float64), torch.tensor([0.2, 0.05]).double()
    objective = DxMIFromData(entropy_weight=0.0, move_weight=0.3)
    rows = value_rows(std, noise, lambda x: torch.zeros(2).double(), usual=usual)
    expected = [
        0.3 * 0.16 * (1 + 1) / 2 / (2 * 0.2),
        0.3 * 0.16 * (4 + 0.25) / 2 / (2 * 0.05),
    ]
    assert objective.loss(rows).tolist() == pytest.approx(expected)


def test_the_released_rate_falls_and_the_others_do_not():
    released = ContinuousDxMIReleasedFromData(learning_rate=3e-7, rate_decay=0.9)
    assert (released.rates, released.decay) == ((3e-7, 0.0), 0.9)
    whole = DxMIFromData(learning_rate=2e-3, std_rate=5e-4)
    assert (whole.rates, whole.decay) == ((2e-3, 5e-4), 1.0)
    made = trainer(ContinuousDxMIReleasedFromData(learning_rate=1e-2, rate_decay=0.5))
    list(made.updates(3))
    assert made.optimiser.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.125)
    again = trainer(ContinuousDxMIReleasedFromData(learning_rate=1e-2, rate_decay=0.5))
    again.load_state(copy.deepcopy(made.state()))
    assert again.optimiser.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.125)


def test_whoever_holds_the_loop_may_set_the_rate():
    """Benchmarks do, to schedule it or to look at a gradient without following it."""
    made = trainer(DxMIFromData(energy_width=4))
    before = [p.detach().clone() for p in made.parameters]
    for group in made.optimiser.param_groups:
        group["lr"] = 0.0
    list(made.updates(2))
    assert all(torch.equal(p, q) for p, q in zip(made.parameters, before, strict=True))


# -- in the loop ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_resumes_to_the_same_numbers(kind):
    def lines(run: Trainer, total: int) -> list[dict[str, Any]]:
        untimed = ("seconds", "memory")
        return [{k: v for k, v in n.items() if k not in untimed} for n in run.updates(total)]

    objective = kind(learning_rate=1e-2, energy_width=4)
    whole, first, second = (trainer(objective, train_steps=1) for _ in range(3))
    log = lines(whole, 3)
    lines(first, 1)
    second.load_state(copy.deepcopy(first.state()))
    assert lines(second, 3) == log[1:]
    for one, other in zip(whole.parameters, second.parameters, strict=True):
        assert torch.equal(one, other)
    mine, theirs = whole.critic.state(), second.critic.state()
    assert torch.equal(mine["usual_moves"], theirs["usual_moves"])
    assert all(torch.equal(mine["network"][k], theirs["network"][k]) for k in mine["network"])


@pytest.mark.parametrize(
    ("kind", "updates", "left"),
    [
        (DxMIFromData, 120, 0.2),
        (ContinuousDxMIFromData, 24, 0.6),
        (ContinuousDxMIReleasedFromData, 24, 0.6),
    ],
)
def test_samples_come_to_look_like_the_data(kind, updates, left, as_users_run_it):
    """Gaussian data whose mean is 1 away from where the pretrained model draws.

    Nothing holds the policies back. At as few as four steps only DxMI comes to rest: the variants
    are first order in the step, and pass by (``dxmi_from_data``, Steps).
    """
    weight = {"kl_weight": 0.0} if kind is ContinuousDxMIFromData else {}
    objective = kind(learning_rate=5e-3, energy_width=32, **weight)
    sizes = {"samples": 64, "batch": 256, "value_learning_rate": 1e-2, "max_gradient_norm": 10.0}
    run = trainer(objective, **sizes)
    before = run.sample().rollout.states[:, -1].mean(0)
    target = before + torch.tensor([0.8, -0.6])
    run.critic.data = Normal(mean=tuple(target.tolist()), std=0.5)
    list(run.updates(updates))
    after = run.sample().rollout.states[:, -1].mean(0)
    assert (after - target).norm() < left


@pytest.mark.parametrize(("train_steps", "used"), [(None, 4), (1, 1)])
def test_the_pretrained_network_is_asked_at_used_steps_alone_and_where_the_kl_has_a_weight(
    train_steps, used
):
    for weight, networks in ((0.0, 1), (0.1, 2)):
        run = trainer(DxMIFromData(kl_weight=weight), train_steps=train_steps)
        list(run.updates(1))
        assert run.environment.model.calls == 12 * (4 + networks * used)


def test_the_path_kl_is_the_same_whether_the_roll_out_knows_it():
    """Two updates, the second away from the pretrained model; where the KL is logged, it knows."""
    adapters = []
    for logged in (False, True):
        objective = ContinuousDxMIFromData(kl_weight=0.3, learning_rate=0.05, energy_width=4)
        run = trainer(objective)
        run.log_path_kl = logged
        lines = list(run.updates(3))
        assert ("path_kl" in lines[-1]) == logged
        adapters.append([p.detach().clone() for p in run.parameters])
    for one, other in zip(*adapters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert max(float(p.abs().max()) for p in adapters[0]) > 0.01


# -- learned standard deviations ------------------------------------------------------------------


def learning(objective: Objective, **size: Any) -> Trainer:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    published = DDPMTable((1 - betas).cumprod(0))
    sampler = QuadraticVariances(learned_std=True).bind(published, 10)
    return trainer(objective, sampler=sampler, **{"batch": 50, "weight_decay": 0.1} | size)


def test_log_standard_deviations_learn_at_their_own_rate_and_resume():
    """Adam's first step has the size of the rate, whatever the gradient; the last std is fixed."""
    objective = DxMIFromData(learning_rate=1e-3, std_rate=3e-2, energy_width=4)
    whole, first, second = (learning(objective) for _ in range(3))
    before = whole.environment.steps.std.detach().clone()
    list(whole.updates(1))
    after = whole.environment.steps.std.detach()
    changes = (after / before).log().abs()
    torch.testing.assert_close(changes[:-1], torch.full((9,), 3e-2).double(), rtol=1e-3, atol=0)
    assert after[-1] == before[-1] == 1e-3
    list(whole.updates(2))
    list(first.updates(1))
    second.load_state(copy.deepcopy(first.state()))
    assert torch.equal(second.environment.steps.std, first.environment.steps.std)
    list(second.updates(2))
    assert torch.equal(second.environment.steps.std, whole.environment.steps.std)
    sampled = whole.sample().rollout
    assert not sampled.states.requires_grad
    assert not sampled.costs.requires_grad


def test_several_steps_of_the_optimiser_read_the_newest_standard_deviations():
    """No table and no graph is kept from one step to the next."""
    run = learning(DxMIFromData(std_rate=1e-2, energy_width=4), epochs=2, minibatches=2)
    list(run.updates(2))
    assert torch.isfinite(run.environment.steps.std).all()


def test_learned_standard_deviations_need_a_loss_that_has_them():
    for objective, message in (
        (ContinuousDxMIFromData(), "no gradient in them"),
        (ContinuousDxMIReleasedFromData(), "no gradient in them"),
        (DxMIFromData(kl_weight=0.1), "kl_weight=0"),
    ):
        with pytest.raises(ValueError, match=message):
            learning(objective)


# -- networks -------------------------------------------------------------------------------------


def test_the_published_network_has_the_published_size():
    """Conv 3-128, blocks 128, 128, 256, 256, 256, 256, linear, scale; counted by hand."""

    def conv(a: int, b: int, k: int = 3, bias: bool = True) -> int:
        return a * b * k * k + (b if bias else 0)

    blocks = [(128, 128, True), (128, 128, False), (128, 256, True)]
    blocks += [(256, 256, False), (256, 256, True), (256, 256, False)]
    expected = conv(3, 128) + 256 + 1 + 2
    for a, b, halve in blocks:
        expected += conv(a, b) + conv(b, b) + (conv(a, b, 1, bias=False) if halve or a != b else 0)
    network = EnergyOfPictures(3, width=128, generator=stream(0))
    assert sum(p.numel() for p in network.parameters()) == expected
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2,)


def test_energies_add_up_over_pixels():
    """The pool is a sum: away from borders an energy grows with the picture's area."""
    network = EnergyOfPictures(1, width=4, generator=stream(3))
    nn.init.zeros_(network.leave.bias)
    nn.init.constant_(network.scale.weight, 1.0)
    nn.init.zeros_(network.scale.bias)
    small, large, wide = (network(torch.ones(1, 1, 64, n)).item() for n in (64, 128, 192))
    assert wide - large == pytest.approx(large - small, rel=1e-4)
    assert abs(large - small) > 1e-3


def test_its_first_weights_are_those_of_the_seed_alone():
    one = EnergyOfVectors(2, width=5, generator=stream(4)).state_dict()
    again = EnergyOfVectors(2, width=5, generator=stream(4)).state_dict()
    other = EnergyOfVectors(2, width=5, generator=stream(5)).state_dict()
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_the_value_s_weights_get_no_gradient_from_the_policy():
    made = trainer(DxMIFromData(energy_width=4))
    rollout = made.sample().rollout
    states = rollout.states[:, 0].clone().requires_grad_()
    value = made.critic.at(rollout)
    paths = torch.arange(12)
    value(paths * 0, states, paths).sum().backward()
    assert all(p.grad is None for p in made.critic.network.parameters())
    expected = torch.autograd.grad(
        -functional_call(made.critic.network, {}, (states,)).sum(), states
    )[0]
    torch.testing.assert_close(states.grad, expected)


# -- bad input ------------------------------------------------------------------------------------


def test_data_and_objective_must_go_together():
    environment = GaussianProblem().environment(DDIM(1.0).bind(table(), 4), 5)
    size = UpdateSize(samples=4)
    with pytest.raises(ValueError, match="learns its reward from data"):
        Trainer(environment, DxMIFromData(), size, accelerator=Process())
    with pytest.raises(ValueError, match="data is given"):
        Trainer(environment, DxMI(), size, accelerator=Process(), data=Normal())
    with pytest.raises(TypeError, match="draw"):
        require_inputs(DxMIFromData(), environment.reward, None, None, [1.0])


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (torch.zeros(12, 3), r"\[12, 2\], got \[12, 3\]"),
        (torch.zeros(1, 2), r"\[12, 2\], got \[1, 2\]"),
        (torch.full((12, 2), math.nan), "finite"),
        ([[0.0, 0.0]] * 12, "list"),
    ],
)
def test_what_is_drawn_must_be_states(drawn, message):
    class Wrong:
        def draw(self, n: int, generator: torch.Generator) -> Any:
            return drawn

    made = trainer(DxMIFromData(), data=Wrong())
    with pytest.raises(ValueError, match=message):
        made.step()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"square_weight": 0.0}, "square_weight"),
        ({"time_cost": -1.0}, "time_cost"),
        ({"move_decay": 1.0}, "move_decay"),
        ({"energy_width": 0}, "energy_width"),
        ({"std_rate": math.nan}, "std_rate"),
        ({"entropy_weight": -0.1}, "entropy_weight"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        DxMIFromData(**settings)


def test_a_rate_that_grows_is_refused():
    with pytest.raises(ValueError, match="rate_decay"):
        ContinuousDxMIReleasedFromData(rate_decay=1.5)


def test_states_of_another_kind_have_no_energy():
    with pytest.raises(ValueError, match="channels, height, width"):
        energy_network((3, 3), width=4, generator=stream(0))
