"""Rewards that are asked while more is sampled: the same numbers, in an order that saves time."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrl import DeterministicPolicy
from diffusion_envs import objectives, rewards, sd15
from diffusion_envs.environment import Environment, Sample
from diffusion_envs.rewards import RewardError, VLMJudge, Weighted, overlapped
from diffusion_envs.rewards.transformed import Cached, Limited
from diffusion_envs.runs.options import RunOptions
from diffusion_envs.runs.settings import describe, differences
from diffusion_envs.samplers import DDIM, Scheduler
from diffusion_envs.training import parallel
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize

AMPLE = 60.0  # seconds that a test waits for what must come
PROMPTS = ["a photo of a cat", "a photo of a ship"]
STEPS, BATCH, PATHS = 2, 2, 6


@pytest.fixture(scope="module")
def model():
    return sd15.StableDiffusion("tiny", lora_rank=2).load(
        device=torch.device("cpu"), batch=BATCH, seed=0
    )


def environment_of(model, reward, overlap: int, **settings: Any) -> Environment:
    sampler = settings.pop("sampler", DDIM())
    return Environment(
        model=model,
        sampler=sampler.bind(model.table, STEPS, model.prediction_type),
        reward=reward,
        prompts=PROMPTS,
        seed=3,
        batch=BATCH,
        overlap=overlap,
        **settings,
    )


def sampled(environment: Environment, *, denoised: bool = True) -> Sample:
    return environment.sample(
        lambda mean, _: DeterministicPolicy(mean),
        range(4, 4 + PATHS),
        torch.arange(PATHS) % len(PROMPTS),
        stream="train",
        denoised=denoised,
        group=2,
        shared_start=True,
    )


class Noted:
    """A reward with a state: what it is asked, in order, and from which threads."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], Tensor]] = []
        self.threads: set[int] = set()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.threads.add(threading.get_ident())
        self.asked.append((list(prompts), images.clone()))
        return images.mean((1, 2, 3)) + len(self.asked)  # depends on the order


# -- the same numbers ------------------------------------------------------------------------------


def test_a_reward_is_asked_the_same_in_the_same_order_from_one_thread(model):
    notes, samples, costs = [Noted(), Noted()], [], []
    for overlap, reward in enumerate(notes):
        environment = environment_of(model, reward, overlap)
        model.calls = 0
        samples.append(sampled(environment))
        costs.append(environment.spent)
    plain, overlapped = samples
    for name in ("states", "means", "actions", "noises", "reference_scores", "costs", "rewards"):
        was, now = (getattr(sample.rollout, name) for sample in samples)
        assert torch.equal(was, now), name
        assert was.stride() == now.stride(), name  # what is added up later is so in one order
    assert torch.equal(plain.images, overlapped.images)
    assert torch.equal(plain.denoised_rewards, overlapped.denoised_rewards)
    assert costs[0] == costs[1]
    assert costs[0][0] == PATHS * (STEPS + 1)
    for was, now in zip(notes[0].asked, notes[1].asked, strict=True):
        assert was[0] == now[0]
        assert torch.equal(was[1], now[1])
    assert [len(note.threads) for note in notes] == [1, 1]
    assert notes[0].threads == {threading.get_ident()}
    assert notes[1].threads.isdisjoint(notes[0].threads)


@pytest.mark.parametrize("sampler", [DDIM(), Scheduler("DPMSolverMultistepScheduler")])
def test_parts_black_boxes_and_several_calls_at_once_give_the_same(model, sampler):
    reward = Weighted({"red": (Concurrent(), 1.0), "twice": (Concurrent(), 2.0)})
    kinds = {"sampler": sampler}
    samples = [
        sampled(environment_of(model, reward, overlap, **kinds), denoised=isinstance(sampler, DDIM))
        for overlap in (0, 3)
    ]
    for name in ("states", "rewards", "reward_parts"):
        assert torch.equal(*(getattr(sample.rollout, name) for sample in samples)), name
    assert torch.equal(*(sample.images for sample in samples))
    assert (samples[0].denoised_rewards is None) == (not isinstance(sampler, DDIM))


class Concurrent:
    """Brightness, from any thread."""

    concurrent = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


def test_two_updates_of_a_method_with_a_value_network_are_the_same(model):
    start = [p.detach().clone() for p in model.parameters]
    lines, weights = [], []
    for overlap in (0, 1):
        with torch.no_grad():
            for parameter, value in zip(model.parameters, start, strict=True):
                parameter.copy_(value)
        model.calls = 0
        trainer = Trainer(
            environment_of(model, Noted(), overlap),
            objectives.ScoreAsAction(),
            UpdateSize(samples=4, batch=BATCH, value_epochs=1),
            accelerator=parallel.start("cpu"),
        )
        line = [trainer.step(), trainer.step()][-1]
        lines.append({k: str(v) for k, v in line.items() if k not in ("seconds", "memory")})
        weights.append([p.detach().clone() for p in model.parameters])
    assert lines[0] == lines[1]
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


# -- the order of events ---------------------------------------------------------------------------


class Waiting:
    """A reward that answers only once something else has happened meanwhile."""

    concurrent = True

    def __init__(self, until: Callable[[], bool]) -> None:
        self.until, self.calls, self.late = until, 0, 0
        self.now, self.most = 0, 0  # calls under way

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls, self.now = self.calls + 1, self.now + 1
        self.most = max(self.most, self.now)
        for _ in range(int(AMPLE * 100)):
            if self.until():
                break
            threading.Event().wait(0.01)
        else:
            self.late += 1
        self.now -= 1
        return images.mean((1, 2, 3))


@pytest.fixture
def called(model, monkeypatch) -> list[bool]:
    """For each row that went through the network: whether the pretrained one was asked."""
    rows: list[bool] = []
    ask = type(model).__call__

    def noted(self, states, *rest):
        rows.extend([self.score.adapter.is_off] * len(states))
        return ask(self, states, *rest)

    monkeypatch.setattr(type(model), "__call__", noted)
    return rows


def test_the_next_piece_and_the_reference_come_before_the_first_answer(model, called):
    everything = [False] * PATHS * STEPS + [True] * PATHS * STEPS
    reward = Waiting(lambda: called == everything)
    sample = sampled(environment_of(model, reward, 1), denoised=False)
    assert reward.late == 0
    assert reward.most == 1  # though all pieces were there before the first answer
    assert reward.calls == PATHS // BATCH
    assert len(sample.rollout.rewards) == PATHS


def test_without_overlap_they_do_not(model, called):
    seen = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append(list(called))
        return images.mean((1, 2, 3))

    sampled(environment_of(model, reward, 0), denoised=False)
    assert all(rows == seen[0] and len(rows) == 2 * PATHS * STEPS for rows in seen)


def test_several_calls_are_on_their_way_at_once(model):
    together = threading.Barrier(3)

    class Meeting(Concurrent):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            together.wait(AMPLE)  # raises if fewer than three come
            return images.mean((1, 2, 3))

    sampled(environment_of(model, Meeting(), 3), denoised=False)


def test_few_pictures_of_denoised_states_wait_at_once(model, monkeypatch):
    decoded, held = [0], []
    waits = threading.Event()  # set once sampling waits for an answer
    decode, wait = model.decode, overlapped.wait

    def counted(states):
        decoded[0] += 1
        return decode(states)

    def noted(*pending, **settings):
        waits.set()
        return wait(*pending, **settings)

    def first_is_slow(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if not held:
            waits.wait(AMPLE)
            held.append(decoded[0])
        return images.mean((1, 2, 3))

    monkeypatch.setattr(model, "decode", counted)
    monkeypatch.setattr(overlapped, "wait", noted)
    sampled(environment_of(model, first_is_slow, 1))
    pieces = PATHS // BATCH
    assert held == [pieces + 1]  # all samples, which are kept in any case, and one more
    assert decoded[0] == pieces * (1 + STEPS)


# -- what goes wrong -------------------------------------------------------------------------------


class Failing(Noted):
    """A reward that fails in one call."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        values = super().__call__(images, prompts)
        if len(self.asked) == self.at:
            raise ConnectionError("gone")
        return values


@pytest.mark.parametrize("at", [2, 5])
def test_errors_come_out_as_without_overlap_and_nothing_is_asked_after_them(model, at):
    told = []
    for overlap in (0, 1):
        reward = Failing(at)
        with pytest.raises(RewardError, match=r"ConnectionError.*gone") as raised:
            sampled(environment_of(model, reward, overlap))
        assert len(reward.asked) == at
        told.append((str(raised.value), type(raised.value.__cause__)))
    assert told[0] == told[1]


def test_a_late_call_ends_it_too(model):
    released = threading.Event()

    def hanging(images: Tensor, prompts: Sequence[str]) -> Tensor:
        released.wait()
        return images.mean((1, 2, 3))

    environment = environment_of(model, hanging, 1, reward_timeout=0.1)
    with pytest.raises(RewardError, match=r"hanging on pictures 4 to 5: no answer within 0\.1 s"):
        sampled(environment)
    released.set()


def test_an_interrupt_does_not_wait_for_the_reward(model, monkeypatch):
    released, began = threading.Event(), threading.Event()

    def hanging(images: Tensor, prompts: Sequence[str]) -> Tensor:
        began.set()
        released.wait()
        return images.mean((1, 2, 3))

    def interrupted(*_: Any, **__: Any) -> Tensor:
        began.wait(AMPLE)
        raise KeyboardInterrupt

    monkeypatch.setattr(Environment, "_pretrained_scores", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampled(environment_of(model, hanging, 1))
    released.set()


def test_several_calls_at_once_are_for_rewards_that_declare_it():
    judge = VLMJudge("http://127.0.0.1:9", model="m")
    for bearing in (Concurrent(), judge, Limited(judge, upper=1.0), Weighted({"j": (judge, 1.0)})):
        rewards.require_calls(2, bearing)
    for other in (Noted(), Cached(judge), Weighted({"j": (judge, 1.0), "n": (Noted(), 1.0)})):
        rewards.require_calls(1, other)
        with pytest.raises(ValueError, match=r"overlap=2 .*concurrent = True.*use overlap=1"):
            rewards.require_calls(2, other)
    for bad in (-1, True):
        with pytest.raises(ValueError, match="overlap must be an integer of at least 0"):
            rewards.require_calls(bad, Noted())


def test_it_may_differ_on_resuming():
    then, now = (describe(RunOptions(overlap=calls)) for calls in (0, 4))
    assert differences({"options": then}, {"options": now}) == []
