"""What a run goes on from: the last whole update, whenever and however it ends."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.callbacks import Callback, Callbacks
from diffusion_envs.runs.resuming import Checkpoints
from diffusion_envs.training.trainer import Trainer
from verification.problems.training_loop import Process


class Toy(Trainer):
    """A trainer as far as checkpoints know one: one weight, changed in place within an update."""

    def __init__(self, *, main: bool = True) -> None:
        self.weight, self.update = torch.zeros(3), 0
        self.environment = SimpleNamespace(reward_queries=0, model=SimpleNamespace(calls=0))
        self.accelerator = Process(int(not main), 1)

    def state(self) -> dict[str, Any]:
        environment = self.environment
        costs = {
            "reward_queries": environment.reward_queries,
            "network_calls": environment.model.calls,
        }
        return {"weight": self.weight, "update": self.update} | costs

    def load_state(self, state: dict[str, Any]) -> None:
        self.weight.copy_(state["weight"])
        self.update = state["update"]
        self.environment.reward_queries = state["reward_queries"]
        self.environment.model.calls = state["network_calls"]

    def step(self, processes: int = 1) -> dict[str, Any]:
        self.weight += 0.5  # half an update, in which a signal may come
        self.environment.reward_queries += 48
        self.environment.model.calls += 10
        self.weight += 0.5
        self.update += 1
        return {
            "update": self.update,
            "reward_queries": processes * self.environment.reward_queries,
            "network_calls": processes * self.environment.model.calls,
        }


class Memory(Callback):
    """A callback with a state."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def after(self, numbers: Any) -> None:
        self.seen.append(numbers["update"])

    def state(self) -> list[int]:
        return list(self.seen)

    def load_state(self, state: list[int]) -> None:
        self.seen = list(state)


def checkpoints(folder: Any, toy: Toy, every: int, memory: Memory | None = None) -> Checkpoints:
    return Checkpoints(folder, toy, every, [memory or Memory()])


def newest(folder: Any) -> Any:
    found = checkpoint.latest(folder)
    assert found is not None
    return found.state


@pytest.mark.parametrize("every", [1, 2, 50])
@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_in_the_middle_of_any_update_the_last_whole_one_is_written(done, every, tmp_path):
    toy, memory = Toy(), Memory()
    kept = checkpoints(tmp_path, toy, every, memory)
    kept.load()
    kept.begin()
    for _ in range(done):
        numbers = toy.step()
        memory.after(numbers)
        kept.after(numbers)
    toy.weight += 0.5  # and here it is told to end
    toy.environment.reward_queries += 20
    kept.end()
    state = newest(tmp_path)
    assert state["update"] == done
    assert state["weight"].tolist() == [float(done)] * 3
    assert (state["reward_queries"], state["network_calls"]) == (48 * done, 10 * done)
    assert state["callbacks"] == {"Memory": list(range(1, done + 1))}
    again, remembered = Toy(), Memory()
    checkpoints(tmp_path, again, every, remembered).load()
    assert again.weight.tolist() == [float(done)] * 3
    assert remembered.seen == memory.seen[:done]


def test_a_run_that_ends_before_it_begins_leaves_its_start(tmp_path):
    kept = checkpoints(tmp_path, Toy(), 50)
    kept.load()
    kept.end()
    assert newest(tmp_path)["update"] == 0


def test_what_is_on_disk_is_not_written_again(tmp_path, monkeypatch):
    toy, steps = Toy(), []
    save = checkpoint.save

    def counted(folder: Any, step: int, state: Any, **settings: Any) -> Any:
        steps.append(step)
        return save(folder, step, state, **settings)

    monkeypatch.setattr(checkpoint, "save", counted)
    kept = checkpoints(tmp_path, toy, 2)
    kept.load()
    kept.begin()
    for _ in range(4):
        kept.after(toy.step())
    kept.end()
    kept.end()
    assert steps == [2, 4]
    again = checkpoints(tmp_path, Toy(), 2)
    again.load()
    again.begin()
    again.end()
    assert steps == [2, 4]


def test_a_checkpoint_whose_writing_is_interrupted_is_written_at_the_end(tmp_path, monkeypatch):
    toy, save = Toy(), checkpoint.save
    kept = checkpoints(tmp_path, toy, 1)
    kept.load()
    kept.begin()
    kept.after(toy.step())

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kept.after(toy.step())
    monkeypatch.setattr(checkpoint, "save", save)
    kept.end()
    assert newest(tmp_path)["update"] == 2


# 144 queries are done by however many processes; then comes one update of 48 by each of the others.
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (3, 2), (1, 1)])
def test_costs_go_on_from_the_total_of_all_processes(first, then, tmp_path):
    toy = Toy()
    kept = checkpoints(tmp_path, toy, 1)
    kept.load()
    kept.begin()
    kept.after(toy.step(processes=first))
    total = {"reward_queries": 48 * first, "network_calls": 10 * first}
    assert {name: newest(tmp_path)[name] for name in total} == total
    world = [Toy(main=k == 0) for k in range(then)]
    for each in world:
        checkpoints(tmp_path, each, 1).load()
        each.step()
    assert sum(each.environment.reward_queries for each in world) == 48 * (first + then)
    assert sum(each.environment.model.calls for each in world) == 10 * (first + then)


def test_the_state_that_is_held_is_a_copy(tmp_path):
    state = {"a": torch.arange(3.0), "b": [torch.ones(2), {"c": 1}], "d": (1, None)}
    held = checkpoint.copied(state)
    expected = copy.deepcopy(state)
    state["a"].zero_()
    state["b"][0].zero_()
    state["b"][1]["c"] = 2
    assert torch.equal(held["a"], expected["a"])
    assert torch.equal(held["b"][0], expected["b"][0])
    assert held["b"][1] == {"c": 1}
    assert held["d"] == (1, None)


class Part(Callback):
    """Tells what is asked of it."""

    def __init__(self, name: str, told: list[str], reasons: dict[int, str] | None = None) -> None:
        self.name, self.told, self.reasons = name, told, reasons or {}

    def begin(self) -> str | None:
        self.told.append(f"{self.name} begins")
        return self.reasons.get(0)

    def after(self, numbers: Any) -> str | None:
        return self.reasons.get(numbers["update"])

    def end(self) -> None:
        self.told.append(f"{self.name} ends")
        if self.name == "broken":
            raise OSError("disk full")


class Alone(Accelerator):
    """One process."""

    num_processes = 1

    def __init__(self) -> None:
        """Nothing is started."""


ALONE = Alone()


def test_all_callbacks_end_whatever_is_raised():
    told: list[str] = []
    parts = [Part("one", told), Part("broken", told), Part("two", told)]
    with pytest.raises(OSError, match="disk full"), Callbacks(parts, ALONE).running():
        raise KeyboardInterrupt
    assert told == [
        *("one begins", "broken begins", "two begins"),
        *("two ends", "broken ends", "one ends"),
    ]


def test_the_reasons_to_stop_are_said_together():
    told: list[str] = []
    parts = [Part("one", told, {3: "far"}), Part("two", told, {0: "done", 3: "worse"})]
    callbacks = Callbacks(parts, ALONE)
    with callbacks.running() as reason:
        assert reason == "done"
        assert callbacks.after({"update": 2}) is None
        assert callbacks.after({"update": 3}) == "far; worse"
    with Callbacks([], ALONE).running() as reason:
        assert reason is None


def test_what_a_kill_left_of_an_older_checkpoint_goes_when_the_run_is_resumed(tmp_path):
    """Killed while it removed the oldest: of the last update's, after which none is written."""
    for step in (2, 3):
        checkpoint.save(tmp_path, step, Toy().state() | {"update": step, "callbacks": {}})
    half = tmp_path / "step-000001"
    half.mkdir()
    (half / "manifest.json").write_text("{}")
    Checkpoints(tmp_path, Toy(main=False), 1, []).load()  # another process leaves it to the main
    assert half.exists()
    trainer = Toy()
    Checkpoints(tmp_path, trainer, 1, []).load()
    assert trainer.update == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
