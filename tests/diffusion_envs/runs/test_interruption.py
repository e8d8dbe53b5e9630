"""A signal ends a run in good order, a second one at once, and none goes by unseen."""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.overrides import BaseTorchFunctionMode

from diffusion_envs.runs import tracking
from diffusion_envs.runs.interruption import interruptible, whole_calls

TWICE = """
import os, signal, sys, time
from diffusion_envs.runs.interruption import interruptible

with interruptible():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:  # a run that saves, and hangs
        print("saving", flush=True)
        time.sleep(60)
"""

HANGS = """with whole_calls():
            print("ready", flush=True)
            while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                time.sleep(0.01)
            print("hangs", flush=True)  # after the first one
            time.sleep(60)
"""


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal: what a shell starts in the background is born to ignore it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_raises_and_the_handlers_come_back(number):
    former = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt), interruptible() as interruption:
        os.kill(os.getpid(), number)
    assert interruption.requested
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == former


def test_a_signal_whose_exception_is_dropped_is_seen_at_the_next_check():
    with interruptible() as interruption:
        interruption.check()
        with suppress(KeyboardInterrupt):  # as Python drops what is raised in a destructor
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interruption.check()


def drops_it() -> None:
    """What code in C may do with the exception of a handler."""
    with suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    raise RuntimeError("could not determine the shape")


def fails_after_a_signal() -> None:
    """The disk is full just when the signal comes."""
    os.kill(os.getpid(), signal.SIGTERM)
    raise OSError("full")


def fails_while_it_obeys() -> None:
    """A checkpoint that cannot be written."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        raise OSError("the disk is full") from None


def test_a_call_that_must_be_whole_is_and_then_the_signal_is_obeyed_once():
    done = []

    def calls() -> None:
        with whole_calls():
            with whole_calls():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("not reached")

    with pytest.raises(KeyboardInterrupt), interruptible() as interruption:
        calls()
    assert done == ["inner", "outer"]
    assert interruption.requested


def test_while_a_signal_is_obeyed_calls_that_must_be_whole_are_made_as_ever():
    done = []

    def closes_in_good_order() -> None:
        try:
            with whole_calls():
                os.kill(os.getpid(), signal.SIGTERM)
        finally:
            with whole_calls():
                done.append("flushed")
            done.append("closed")

    with pytest.raises(KeyboardInterrupt), interruptible():
        closes_in_good_order()
    assert done == ["flushed", "closed"]


def test_an_error_in_a_call_that_must_be_whole_hides_no_signal():
    with pytest.raises(KeyboardInterrupt) as told, interruptible(), whole_calls():
        fails_after_a_signal()
    assert isinstance(told.value.__cause__, OSError)


def test_after_such_an_error_what_closes_the_run_is_not_broken_off():
    done = []

    def closes() -> None:
        try:
            with whole_calls():
                fails_after_a_signal()
        finally:
            with whole_calls():
                done.append("flushed")
            done.append("closed")

    with pytest.raises(KeyboardInterrupt), interruptible():
        closes()
    assert done == ["flushed", "closed"]


def test_a_second_signal_ends_a_call_that_must_be_whole():
    program = TWICE.replace("import interruptible", "import interruptible, whole_calls")
    program = program.replace('print("ready", flush=True)\n        time.sleep(60)\n', HANGS)
    assert "hangs" in program
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "hangs\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == -signal.SIGTERM


@pytest.fixture
def no_hang() -> Iterator[None]:
    """What waits for ever fails instead."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError("it hangs")

    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


@pytest.mark.usefixtures("no_hang")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_tensorboards_queue_is_whole_after_a_signal_within_it(tmp_path, monkeypatch, number):
    put, signals = queue.Queue._put, []

    def told_to_end(self: queue.Queue, item: object) -> None:
        put(self, item)
        if threading.current_thread() is threading.main_thread() and not signals:
            signals.append(number)
            os.kill(os.getpid(), number)  # between what is put and its count

    def logs() -> None:
        with tracking.Tracker(tmp_path) as tracker:
            monkeypatch.setattr(queue.Queue, "_put", told_to_end)
            tracker.log({"update": 1, "reward": 0.5, "reward_std": 0.25})

    with pytest.raises(KeyboardInterrupt), interruptible():
        logs()
    assert signals == [number]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [each.value for each in events.Scalars("reward")] == [0.5]
    assert [each.value for each in events.Scalars("reward_std")] == [0.25]


@pytest.mark.parametrize("within", [interruptible, nullcontext])
def test_an_error_that_hides_a_signal_is_told_as_one(within):
    with pytest.raises(KeyboardInterrupt) as told, interruptible(), within():
        drops_it()
    assert isinstance(told.value.__cause__, RuntimeError)


def test_an_error_while_a_signal_is_obeyed_stays_what_it_is():
    with pytest.raises(OSError, match="full"), interruptible():
        fails_while_it_obeys()


def half_entered(error: RuntimeError) -> None:
    """A signal, and what torch says as its exception leaves a context that was not entered."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        raise error


def test_torchs_word_of_a_context_that_a_signal_left_half_entered_is_told_as_the_signal():
    with ThreadPoolExecutor(1) as thread:  # no context is entered in a new one
        left = thread.submit(BaseTorchFunctionMode().__exit__, None, None, None)
    error = left.exception()
    assert isinstance(error, RuntimeError)
    with pytest.raises(KeyboardInterrupt) as told, interruptible():
        half_entered(error)
    assert told.value.__cause__ is error


def test_an_error_without_a_signal_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shape"), interruptible(), interruptible():
        raise RuntimeError("could not determine the shape")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(number):
    process = subprocess.Popen([sys.executable, "-c", TWICE], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "saving\n"
        process.send_signal(number)
        assert process.wait(timeout=20) == -number


def test_within_another_one_it_is_the_same_and_the_outer_one_ends_it():
    former, outer, stack = signal.getsignal(signal.SIGTERM), None, ExitStack()
    with stack:
        outer = stack.enter_context(interruptible())
        with interruptible() as inner:
            assert inner is outer
        assert signal.getsignal(signal.SIGTERM) is not former  # still
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert outer.requested
    assert signal.getsignal(signal.SIGTERM) is former
    with interruptible() as other:
        assert other is not outer
        assert not other.requested


def test_a_handler_of_the_callers_own_is_left_alone():
    seen = []
    former = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, former)
    assert seen == [1]


def test_in_another_thread_nothing_is_set():
    raised = []

    def work() -> None:
        try:
            with interruptible() as interruption:
                interruption.check()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert raised == []
