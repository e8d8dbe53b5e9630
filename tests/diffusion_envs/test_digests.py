"""Files of a run tell that they were altered, wherever the bit is that has flipped."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffusion_envs import digests
from diffusion_envs.digests import LogDigests, opened, read_tensors, sealed, write_tensors
from diffusion_envs.runs import checkpoint
from diffusion_envs.runs.resuming import Checkpoints
from diffusion_envs.runs.run_folder import open_run, read_settings
from verification.problems.training_loop import Process

SETTINGS = {"updates": 3, "rate": 3e-4, "names": ("a", "b"), "options": {}, "none": None}
TENSORS = {
    "weight": torch.arange(6.0).view(2, 3) / 7,
    "half": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    "count": torch.tensor(3),
    "empty": torch.zeros(0, 4),
}


def flips(path: Path, every: int) -> Any:
    """The file with one bit after another flipped, and as it was at the end."""
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), every):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        yield bit
    path.write_bytes(content)


def test_every_flipped_bit_of_the_settings_is_refused_or_changes_nothing(tmp_path):
    with open_run(tmp_path, SETTINGS, resume=False):
        pass
    stored, said = read_settings(tmp_path), list[str]()
    for _ in flips(tmp_path / "config.json", 7):
        try:
            read = read_settings(tmp_path)
        except ValueError as error:
            said.append(str(error))
        else:
            assert read == stored
    assert len(said) > (tmp_path / "config.json").stat().st_size
    assert all("config.json is damaged" in words for words in said)
    assert read_settings(tmp_path) == stored == json.loads(json.dumps(SETTINGS))


def test_settings_that_were_edited_on_purpose_lose_their_digest(tmp_path):
    with open_run(tmp_path, SETTINGS, resume=False):
        pass
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("0.0003", "0.0004"))
    with pytest.raises(ValueError, match="edited on purpose, take out the line sha256"):
        read_settings(tmp_path)
    lines = [line for line in config.read_text().splitlines() if '"sha256"' not in line]
    config.write_text("\n".join(lines))
    assert read_settings(tmp_path)["rate"] == 0.0004


def test_settings_that_grow_are_sealed_again(tmp_path):
    for updates in (3, 5):
        with open_run(tmp_path, SETTINGS | {"updates": updates}, resume=updates == 5):
            pass
    known = json.loads((tmp_path / "config.json").read_text())
    assert known["settings"]["updates"] == 5
    assert next(iter(known)) == "sha256"
    assert opened(known, tmp_path) == {k: v for k, v in known.items() if k != "sha256"}


def test_what_is_sealed_is_what_comes_out(tmp_path):
    assert opened(sealed({"b": (1, 2.5), "a": None}), tmp_path) == {"b": (1, 2.5), "a": None}
    assert opened({"of": "before"}, tmp_path) == {"of": "before"}
    for other in ([], 3, sealed({"a": 1}) | {"a": 2}, sealed({"a": 1}) | {"b": 1}):
        with pytest.raises(ValueError, match="is damaged"):
            opened(other, tmp_path)


def test_every_flipped_bit_of_tensors_is_refused(tmp_path):
    path = tmp_path / "pictures.safetensors"
    write_tensors(path, TENSORS)
    for bit in flips(path, 7):
        try:
            read = read_tensors(path)
        except (ValueError, OSError):
            continue
        # a space of the header, or the name of the digest itself
        assert digests.of_tensors(read) == digests.of_tensors(TENSORS), bit
    for name, tensor in read_tensors(path).items():
        assert torch.equal(tensor, TENSORS[name])


@pytest.mark.parametrize(
    "other",
    [
        TENSORS | {"count": torch.tensor(4)},
        TENSORS | {"count": torch.tensor(3, dtype=torch.int32)},
        TENSORS | {"weight": TENSORS["weight"].view(3, 2)},
        {("Weight" if name == "weight" else name): t for name, t in TENSORS.items()},
        {name: tensor for name, tensor in TENSORS.items() if name != "empty"},
    ],
)
def test_names_types_shapes_and_numbers_all_count(other):
    assert digests.of_tensors(other) != digests.of_tensors(TENSORS)


def test_tensors_of_before_are_read_and_a_strided_one_is_what_it_shows(tmp_path):
    save_file({"weight": TENSORS["weight"]}, tmp_path / "before.safetensors")
    assert torch.equal(read_tensors(tmp_path / "before.safetensors")["weight"], TENSORS["weight"])
    strided = TENSORS["weight"].t()
    write_tensors(tmp_path / "t.safetensors", {"x": strided})
    assert torch.equal(read_tensors(tmp_path / "t.safetensors")["x"], strided)


# -- logs ------------------------------------------------------------------------------------------

NAMES = ("a.jsonl", "b.jsonl")


def test_a_log_that_grows_is_read_once_and_compared_as_far_as_it_had_grown(tmp_path):
    log, kept = LogDigests(tmp_path, NAMES), []
    for line in ("one\n", "two\n", "three\n"):
        with (tmp_path / "a.jsonl").open("a") as file:
            file.write(line)
        kept.append(log.state())
    assert [state["a.jsonl"]["bytes"] for state in kept] == [4, 8, 14]
    fresh = LogDigests(tmp_path, NAMES)
    assert fresh.state() == kept[-1]
    assert [fresh.altered(state) for state in kept] == [[], [], []]
    (tmp_path / "a.jsonl").write_text("one\ntwO\nthree\n")
    assert [fresh.altered(state) for state in kept] == [
        *([], [tmp_path / "a.jsonl"], [tmp_path / "a.jsonl"])
    ]
    (tmp_path / "a.jsonl").write_text("one\n")  # lines are gone
    assert [len(fresh.altered(state)) for state in kept] == [0, 1, 1]
    (tmp_path / "a.jsonl").unlink()
    assert fresh.altered(kept[0]) == [tmp_path / "a.jsonl"]
    assert fresh.altered({}) == []


@pytest.mark.parametrize("altered", [True, False])
def test_a_run_that_goes_on_says_which_log_was_altered(altered, tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"update": 1, "reward": 0.25}\n')
    log = LogDigests(tmp_path, ("metrics.jsonl",))
    state = {"logs": log.state(), "reward_queries": 8, "network_calls": 8, "callbacks": {}}
    checkpoint.save(tmp_path / "checkpoints", 1, state)
    if altered:
        (tmp_path / "metrics.jsonl").write_text('{"update": 1, "reward": 0.75}\n')
    trainer: Any = SimpleNamespace(load_state=lambda state: None, accelerator=Process())
    checkpoints = object.__new__(Checkpoints)  # without the types that tests enforce
    checkpoints._folder, checkpoints._trainer = tmp_path / "checkpoints", trainer
    checkpoints._others, checkpoints._logs = {}, log
    with caplog.at_level(logging.WARNING):
        checkpoints.load()
    assert (f"{tmp_path / 'metrics.jsonl'} is not what this run had logged" in caplog.text) == (
        altered
    )
