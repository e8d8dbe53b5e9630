import hashlib
import inspect
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.checkpoint import CheckpointError

FILES = ("tensors.safetensors", "state.json", "manifest.json")
STATE = {"weights": torch.arange(12.0).view(3, 4), "update": 7, "note": "uneven"}


def assert_same(found: Any, expected: Any) -> None:
    """Equal in type, dtype, shape and every bit (NaN included)."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        same_bytes = [t.contiguous().flatten().view(torch.uint8) for t in (found, expected)]
        assert torch.equal(*same_bytes)
    elif isinstance(expected, dict):
        assert isinstance(found, dict)
        assert list(found) == list(expected)
        assert [type(k) for k in found] == [type(k) for k in expected]
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    else:
        assert type(found) is type(expected)
        assert repr(found) == repr(expected)  # repr: NaN equals itself, -0.0 is not 0.0


def make_tensor(shape: list[int], dtype: torch.dtype, layout: str) -> torch.Tensor:
    count = int(torch.tensor(shape).prod()) if shape else 1
    values = (torch.arange(count) % 2 if dtype is torch.bool else torch.arange(count) - 3).to(dtype)
    tensor = values.view(shape)
    if layout == "transposed":
        return tensor.transpose(0, -1) if shape else tensor
    if layout == "expanded":
        return tensor[None].expand(2, *shape)
    if layout == "strided":
        return tensor.repeat(2, *[1] * len(shape))[::2] if shape else tensor
    return tensor.requires_grad_() if layout == "trained" and dtype.is_floating_point else tensor


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
TENSORS = st.builds(
    make_tensor,
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([*DTYPES, torch.uint8]),
    st.sampled_from(["plain", "transposed", "expanded", "strided", "trained"]),
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | TENSORS
KEYS = st.integers() | st.text() | st.sampled_from(["~tensor", "~items", "~tuple", "a.b", "a", "b"])
STATES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


@given(state=STATES)
def test_every_nested_state_comes_back_bit_for_bit(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("run")
    path = checkpoint.save(folder, 3, state)
    found = checkpoint.load(path)
    assert (found.step, found.path) == (3, path)
    assert_same(found.state, state)


def test_names_that_flatten_alike_do_not_overwrite_each_other(tmp_path):
    state = {
        "a.b": torch.ones(2),
        "a": {"b": torch.zeros(3), 1: torch.ones(1)},
        "a.1": torch.ones(5),
    }
    assert_same(checkpoint.load(checkpoint.save(tmp_path, 0, state)).state, state)


def test_shared_tensors_come_back_each_on_its_own(tmp_path):
    whole = torch.arange(6.0)
    state = {"whole": whole, "again": whole, "part": whole[2:4], "tied": [whole.view(2, 3)] * 2}
    found = checkpoint.load(checkpoint.save(tmp_path, 0, state)).state
    assert_same(found, state)
    found["whole"].zero_()
    assert_same(found["again"], torch.arange(6.0))


def test_saving_copies_so_later_training_does_not_reach_the_file(tmp_path):
    weights = torch.ones(4)
    path = checkpoint.save(tmp_path, 0, {"weights": weights})
    weights.zero_()
    assert_same(checkpoint.load(path).state, {"weights": torch.ones(4)})


def test_changing_what_was_loaded_does_not_change_the_file(tmp_path):
    path = checkpoint.save(tmp_path, 0, STATE)
    checkpoint.load(path).state["weights"].zero_()
    assert_same(checkpoint.load(path).state, STATE)


def adamw() -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
    weight = torch.nn.Parameter(torch.tensor([0.3, -1.7, 2.2]))
    return weight, torch.optim.AdamW([weight], lr=0.07, weight_decay=0.03)


def test_an_optimiser_goes_on_bit_for_bit(tmp_path):
    weight, optimiser = adamw()

    def improve(weight, optimiser, steps):
        for _ in range(steps):
            optimiser.zero_grad()
            (weight**3).sum().backward()
            optimiser.step()

    improve(weight, optimiser, 5)
    state = {"weight": weight, "optimiser": optimiser.state_dict()}
    path = checkpoint.save(tmp_path, 5, state)
    improve(weight, optimiser, 4)
    fresh, fresh_optimiser = adamw()
    found = checkpoint.load(path).state
    with torch.no_grad():
        fresh.copy_(found["weight"])
    fresh_optimiser.load_state_dict(found["optimiser"])
    improve(fresh, fresh_optimiser, 4)
    assert_same(fresh.detach(), weight.detach())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"reward": object()}, r"state\.reward is <object"),
        ({"a": [1, {2, 3}]}, r"state\.a\.1 is \{2, 3\}"),
        ({(1, 2): 0}, r"keys of a checkpoint .* state has \(1, 2\)"),
        ({None: 0}, "keys of a checkpoint"),
    ],
)
def test_what_cannot_be_stored_is_named_and_leaves_no_trace(tmp_path, state, message):
    with pytest.raises(TypeError, match=message):
        checkpoint.save(tmp_path / "checkpoints", 1, state)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("step", [-1, 1.0, True, "3"])
def test_a_step_that_is_no_count_is_refused(tmp_path, step):
    save = inspect.unwrap(checkpoint.save)  # without the types that tests enforce
    with pytest.raises(ValueError, match="step must be an integer of at least 0"):
        save(tmp_path, step, STATE)


def test_keep_must_be_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        checkpoint.save(tmp_path, 1, STATE, keep=0)


# -- damage ----------------------------------------------------------------------------------------


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_are_refused_with_the_file_named(tmp_path, name):
    path = checkpoint.save(tmp_path, 12, STATE)
    whole = (path / name).read_bytes()
    for bit in range(0, 8 * len(whole), 3):  # every byte, every place in it; all bits: 9 seconds
        (path / name).write_bytes(flipped(whole, bit))
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(path)
        assert str(path) in str(caught.value), bit
        if name != "manifest.json":
            assert name in str(caught.value)
    (path / name).write_bytes(whole)
    assert_same(checkpoint.load(path).state, STATE)


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_refused_with_the_file_named(tmp_path, name):
    path = checkpoint.save(tmp_path, 12, STATE)
    whole = (path / name).read_bytes()
    for length in range(len(whole)):
        (path / name).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            checkpoint.load(path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    path = checkpoint.save(tmp_path, 12, STATE)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}.* missing"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", FILES)
def test_files_swapped_between_two_steps_are_refused(tmp_path, name):
    one = checkpoint.save(tmp_path, 1, {"w": torch.zeros(3), "k": 1})
    two = checkpoint.save(tmp_path, 2, {"w": torch.ones(3), "k": 2})
    first, second = (one / name).read_bytes(), (two / name).read_bytes()
    (one / name).write_bytes(second)
    (two / name).write_bytes(first)
    for path in (one, two):
        with pytest.raises(CheckpointError):
            checkpoint.load(path)


def test_folders_swapped_between_two_steps_are_refused(tmp_path):
    one = checkpoint.save(tmp_path, 1, STATE)
    one.rename(tmp_path / "step-000002")
    with pytest.raises(CheckpointError, match="does not describe this checkpoint"):
        checkpoint.load(tmp_path / "step-000002")


def test_an_unknown_format_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, STATE)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="has format 99; this version reads format 1"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"format": 1, "step": 1, "files": [1]}'])
def test_a_manifest_of_another_form_is_refused(tmp_path, content):
    path = checkpoint.save(tmp_path, 1, STATE)
    (path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing or unreadable"):
        checkpoint.load(path)


def test_a_damaged_newest_is_passed_over_with_a_warning(tmp_path, caplog):
    checkpoint.save(tmp_path, 1, {"k": 1})
    newest = checkpoint.save(tmp_path, 2, {"k": 2})
    (newest / "state.json").write_text('{"k": 3}')
    with caplog.at_level(logging.WARNING):
        found = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.step, found.state) == (1, {"k": 1})
    assert str(newest / "state.json") in caplog.text


def test_when_all_are_damaged_the_newest_damage_is_told(tmp_path):
    for step in (1, 2):
        (checkpoint.save(tmp_path, step, STATE) / "state.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no valid checkpoint .*step-000002/state\.json is m"
    ):
        checkpoint.latest(tmp_path)


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None


# -- which ones stay -------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_stay(tmp_path):
    for step in range(5):
        checkpoint.save(tmp_path, step, {"k": step}, keep=3)
    assert names(tmp_path) == ["step-000002", "step-000003", "step-000004"]


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999_999, 1_000_000):
        checkpoint.save(tmp_path, step, {"k": step}, keep=1)
    assert names(tmp_path) == ["step-1000000"]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 1_000_000


def test_a_damaged_later_step_does_not_push_out_what_was_just_saved(tmp_path):
    damaged = checkpoint.save(tmp_path, 20, {"k": 20})
    (damaged / "state.json").unlink()
    checkpoint.save(tmp_path, 11, {"k": 11}, keep=1)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.state == {"k": 11}


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 1, {"k": 1})
    path = checkpoint.save(tmp_path, 1, {"k": 2})
    assert checkpoint.load(path).state == {"k": 2}
    assert names(tmp_path) == ["step-000001"]


def test_a_crash_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"k": 1})
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 1, {"k": 2})
    monkeypatch.undo()
    assert "step-000001" not in names(tmp_path)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.state == {"k": 1}
    checkpoint.save(tmp_path, 1, {"k": 3})
    assert names(tmp_path) == ["step-000001"]


# -- crashes and full disks ------------------------------------------------------------------------

WRITERS = """
import os, sys
import torch
from diffusion_envs.runs import checkpoint

def write(folder, again):
    log = os.open(folder + ".log", os.O_WRONLY | os.O_CREAT)
    for step in range(1, 10**6):
        state = {"w": torch.full((40_000,), float(step)), "step": step}
        checkpoint.save(folder, 1 if again else step, state, keep=1)
        os.write(log, b"%d\\n" % step)

for line in sys.stdin:  # fork for each: importing torch takes longer than a hundred saves
    folder, mode = line.split()
    child = os.fork()
    if child == 0:
        write(folder, mode == "again")
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def writers():
    with subprocess.Popen(
        [sys.executable, "-c", WRITERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("mode", ["forward", "again"])
def test_a_kill_at_any_time_never_loses_the_last_good_checkpoint(tmp_path, writers, mode):
    random_ = random.Random(1)
    for trial in range(30):  # 60 in both modes: a failure rate above 5 % would show (95 %)
        folder, log = tmp_path / str(trial), tmp_path / f"{trial}.log"
        print(folder, mode, file=writers.stdin, flush=True)
        child = int(writers.stdout.readline())
        while not log.exists() or not log.read_text():  # the first checkpoint is promised
            time.sleep(0.001)
        time.sleep(random_.uniform(0, 0.03))  # several saves
        os.kill(child, signal.SIGKILL)
        assert int(writers.stdout.readline()) == signal.SIGKILL
        promised = int(log.read_text().split()[-1])
        found = checkpoint.latest(folder)
        assert found is not None
        # one more than promised if the kill came between the rename and the log
        assert found.state["step"] in (promised, promised + 1)
        assert_same(found.state["w"], torch.full((40_000,), float(found.state["step"])))
        later = checkpoint.save(folder, found.step + 9, STATE, keep=1)
        assert names(folder) == [later.name]  # nothing half written stays for ever


@pytest.mark.parametrize("goes_on", ["a later save", "resuming"])
def test_what_a_kill_left_half_written_of_another_step_is_removed(tmp_path, goes_on):
    checkpoint.save(tmp_path, 3, STATE)
    left = ("step-000002.partial", "step-000003.replaced", "step-000005.partial")
    for name in (*left, "step-000001.replaced"):  # this one's successor never came
        shutil.copytree(tmp_path / "step-000003", tmp_path / name)
    if goes_on == "resuming":
        checkpoint.drop_older(tmp_path, 3)
        assert names(tmp_path) == ["step-000001", "step-000003"]
    else:
        checkpoint.save(tmp_path, 6, STATE, keep=3)
        assert names(tmp_path) == ["step-000001", "step-000003", "step-000006"]


@pytest.mark.parametrize("limit", [0, 100, 4_000, 79_000])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_rubbish(tmp_path, limit):
    before = {"w": torch.zeros(20_000), "step": 1}
    checkpoint.save(tmp_path, 1, before)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # no file may grow beyond it
    try:
        with pytest.raises(CheckpointError, match=r"step 2 to .* free space"):
            checkpoint.save(tmp_path, 2, {"w": torch.ones(20_000), "step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)
    assert names(tmp_path) == ["step-000001"]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert_same(found.state, before)


def test_a_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="could not write the checkpoint of step 1"):
        checkpoint.save(tmp_path / "checkpoints", 1, STATE)


def test_the_manifest_describes_the_files(tmp_path):
    path = checkpoint.save(tmp_path, 1, STATE)
    files = json.loads((path / "manifest.json").read_text())["files"]
    for name, known in files.items():
        data = (path / name).read_bytes()
        assert known == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
