"""What a run would cost: against what can be counted by hand, and against a run that is metered."""

import dataclasses

import pytest
import torch
from torch import nn

from diffusion_envs import objectives, rewards, samplers
from diffusion_envs.models import available_memory
from diffusion_envs.models.counting import META, Meter, counted_for
from diffusion_envs.runs import command_line, estimate
from diffusion_envs.runs.finetune import make_environment
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.sd15 import StableDiffusion, finetune
from diffusion_envs.sd15.__main__ import FAMILY
from diffusion_envs.training import parallel
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

SIZE = UpdateSize(samples=4, batch=4, value_epochs=1)
RED = rewards.Colour("red")


def cost_of(model: StableDiffusion, **more) -> estimate.RunCost:
    arguments = {
        "reward": RED,
        "prompts": ["a cat"],
        "objective": objectives.DDPO(),
        "steps": 2,
        "size": SIZE,
        "options": RunOptions(evaluation_samples=2),
        "timed": False,
    }
    return estimate.estimate(model, **arguments | more)


# -- what is kept for a gradient -------------------------------------------------------------------


def test_bytes_kept_of_a_small_network_are_those_counted_by_hand():
    """x W: the input is there already; SiLU keeps its input, the second product that and SiLU's."""
    rows, width, inner = 7, 5, 11
    layers = nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, 3, bias=False))
    layers.to(META)
    states = torch.zeros(rows, width, device=META)
    with Meter() as meter:
        answer = layers(states)
        assert meter.alive == 4 * rows * (2 * inner + 3)  # before SiLU, after it, the answer
        assert meter.flops == 2 * rows * inner * (width + 3)
        answer.sum().backward()
    weights = sum(p.numel() for p in layers.parameters())
    del answer
    assert meter.alive == 4 * weights  # the gradients


@pytest.mark.parametrize(
    ("settings", "slack"),
    [({}, 0), ({"gradient_checkpointing": True}, 0), ({"precision": "bfloat16"}, 5e-3)],
    ids=["float32", "recomputed", "bfloat16"],
)
def test_a_network_without_weights_keeps_what_the_one_with_weights_keeps(settings, slack):
    """To the byte in float32; autocast also keeps a cast or two that are told otherwise."""
    peaks = []
    for device in (META, torch.device("cpu")):
        model = StableDiffusion("tiny", **settings).load(device=device, batch=2, seed=0)
        states = torch.zeros(2, *model.event, device=device)
        for parameter in model.parameters:
            parameter.grad = torch.zeros_like(parameter)
        condition = model.condition(["one", "two"])
        with counted_for("cpu"), Meter() as meter:
            answer = model(states, torch.zeros(2, dtype=torch.long, device=device), condition)
            answer.backward(torch.ones_like(answer))
        peaks.append(meter.peak)
    assert abs(peaks[0] - peaks[1]) <= slack * peaks[1]


# -- what is held ----------------------------------------------------------------------------------


def test_what_is_held_is_what_the_parameters_say():
    model = StableDiffusion("tiny", lora_rank=3)
    held = cost_of(model, size=dataclasses.replace(SIZE, average=0.9)).held
    loaded = model.load(device=torch.device("cpu"), batch=4, seed=0)
    adapter = sum(p.nbytes for p in loaded.parameters)
    assert held["adapter"] == held["gradients"] == adapter
    assert held["copies of what trains"] == 2 * adapter  # of the policy that samples, and the mean
    optimiser = torch.optim.AdamW(loaded.parameters)
    for parameter in loaded.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    moments = [x for state in optimiser.state.values() for x in state.values()]
    assert held["state of the optimiser"] == sum(x.nbytes for x in moments if x.numel() > 1)
    everything = {id(t): t for n in loaded.networks.values() for t in n.state_dict().values()}
    parts = {t.data_ptr(): t.nbytes for t in everything.values()}
    assert held["weights of the networks"] >= sum(parts.values()) - adapter  # and buffers
    assert held["weights of the networks"] < 1.01 * sum(parts.values())


def test_all_weights_are_held_six_times_and_read_back_at_the_end():
    cost = cost_of(StableDiffusion("tiny", trains="all"))
    trained = cost.held["weights that train"]
    for name in ("pretrained copy", "gradients", "copies of what trains"):
        assert cost.held[name] == pytest.approx(trained, rel=0.01), name
    assert cost.held["state of the optimiser"] == pytest.approx(2 * trained, rel=0.01)
    assert cost.phases["checkpoint"] > sum(cost.held.values()) + 2.9 * trained
    sharded = cost_of(StableDiffusion("tiny", trains="all", sharded=True), processes=2)
    for name in ("weights that train", "pretrained copy", "gradients", "copies of what trains"):
        assert sharded.held[name] == cost.held[name] // 2, name
    assert sharded.held["state of the optimiser"] == cost.held["state of the optimiser"] // 2
    whole = (trained + cost.held["pretrained copy"]) // 2
    for phase in ("first update", "update", "evaluation"):
        assert sharded.phases[phase] > sum(sharded.held.values()) + whole, phase


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("objective", ["DDPO", "ScoreAsAction"])
def test_the_peak_of_an_update_is_that_of_one_that_is_metered(objective):
    """The real update, with every tensor counted: the same but for single rows of a loss.

    5 %: a piece of 4 rows holds 4 states more, of which the rehearsal counts some twice.
    """
    objective = getattr(objectives, objective)()
    model = StableDiffusion("tiny").load(device=torch.device("cpu"), batch=4, seed=0)
    environment = make_environment(
        model, sampler=samplers.DDIM(), steps=2, reward=RED, prompts=["a cat"], seed=0, batch=4
    )
    trainer = Trainer(environment, objective, SIZE, accelerator=parallel.start("cpu"))
    trainer.step()
    with Meter() as meter:
        trainer.step()
    cost = cost_of(StableDiffusion("tiny"), objective=objective)
    assert cost.phase in ("update", "first update")
    said = sum(size for name, size in cost.at_peak.items() if name != estimate.HEAP)
    assert said == pytest.approx(meter.peak, rel=0.05)
    assert cost.calls == model.calls // 2 // 2  # of two updates, with two branches of guidance


def test_larger_states_are_told_from_smaller_ones(as_users_run_it):
    """The rehearsal with few numbers a state says what one with all of them says."""
    model = StableDiffusion("tiny").load(device=META, batch=4, seed=0)

    def plan(event: tuple[int, ...]) -> estimate.Plan:
        loaded = dataclasses.replace(model, event=event)
        picture = (3, 2 * event[1], 2 * event[2])
        return estimate.Plan(
            model=loaded,
            picture=picture,
            objective=objectives.GRPO(group=2),
            sampler=samplers.DDIM(),
            steps=3,
            size=UpdateSize(samples=256, batch=64),
            reward=RED,
            prompts=1,
            evaluation_samples=2,
            evaluate=lambda environment, n, batch: None,
        )

    large = plan((4, 64, 48))
    small, twice = large._small()
    assert small[1] < 64
    assert twice[2] == 2 * small[2]
    told = large.rehearse().update
    exact = large._with((4, 64, 48)).update
    assert [m.what for m in told] == [m.what for m in exact]
    for one, other in zip(told, exact, strict=True):
        assert one.alive == pytest.approx(other.alive, rel=1e-3, abs=2000)
        assert one.before == pytest.approx(other.before, rel=1e-2, abs=2000)


# -- time ------------------------------------------------------------------------------------------


def test_seconds_are_those_of_every_call_and_grow_with_them():
    """Counts are exact: 4 paths of 2 steps are sampled and learned from, 4 pictures decoded."""
    cost = cost_of(StableDiffusion("tiny", guidance=1.0), timed=True)
    assert set(cost.seconds) == {"sampling", "gradients", "decoding", "evaluation"}
    assert cost.calls == 4 * 2 * 2
    assert cost.seconds["gradients"] > cost.seconds["sampling"] > 0
    longer = cost_of(StableDiffusion("tiny", guidance=1.0), steps=20)
    assert longer.calls == 10 * cost.calls
    assert longer.seconds_of_an_update is None  # not timed


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_fit_is_refused_with_the_largest_part_and_a_remedy(monkeypatch, capsys):
    words = ["--estimate", "--samples", "4", "--steps", "2", "--device", "cpu"]
    words += ["--reward", "red", "--evaluation-samples", "2", "--objective", "ddpo"]
    with monkeypatch.context() as patch:
        patch.setattr(estimate, "available", lambda kind: 10 * 2**20)
        assert command_line.main(FAMILY, words) == 1
    out, err = capsys.readouterr()
    assert "peak memory" in out
    assert "seconds an update" in out
    assert "it does not fit: the run needs about" in err
    assert "the device has 10.0 MiB" in err
    assert "MiB, is for activations: recompute them (--gradient-checkpointing)" in err
    assert command_line.main(FAMILY, words) == 0
    assert "fit" not in capsys.readouterr().err


def test_a_run_refuses_what_certainly_cannot_fit_before_weights_are_read(monkeypatch, tmp_path):
    arguments = {"reward": RED, "prompts": ["a cat"], "steps": 2, "updates": 1, "size": SIZE}
    room = {"bytes": 10 * 2**20}
    monkeypatch.setattr(available_memory, "available", lambda kind: room["bytes"])
    with pytest.raises(available_memory.TooLargeError, match="model tiny needs at least 21"):
        finetune("tiny", output=tmp_path / "a", **arguments)
    room["bytes"] = 30 * 2**20  # enough for the weights
    many = UpdateSize(samples=3000, batch=4)
    with pytest.raises(available_memory.TooLargeError, match=r"paths and pictures.*--stored-paths"):
        finetune("tiny", output=tmp_path / "b", **arguments | {"size": many, "steps": 10})
    assert not (tmp_path / "b").exists()


def test_no_room_is_known_of_a_gpu_that_is_not_there():
    assert estimate.available("cpu") > 2**20
    if not torch.cuda.is_available():
        assert estimate.available("cuda") is None
