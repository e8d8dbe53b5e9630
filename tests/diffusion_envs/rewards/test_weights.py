import inspect
import os
import time

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffusion_envs.rewards.weights import (
    Weights,
    from_anywhere,
    locate,
    read_state,
    read_tensors,
    require_keys,
)

WEIGHTS = Weights(
    "toy",
    files={"weights": ("model.safetensors", "Toy.pt"), "vocabulary": "vocab.txt"},
    repositories={"maker/Toy": ("Toy.pt",), "other/words": ("vocab.txt",)},
)
FETCH = "python -m diffusion_envs.rewards fetch toy"
STATE = {"a.weight": torch.tensor([[0.25, -3.0]]), "a.bias": torch.tensor([1.5])}


@pytest.fixture
def folder(tmp_path):
    torch.save(STATE, tmp_path / "Toy.pt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    return tmp_path


# -- where they are --------------------------------------------------------------------------------


def test_a_folder_has_every_file_by_its_name(folder):
    assert locate(WEIGHTS, folder) == {
        "weights": folder / "Toy.pt",
        "vocabulary": folder / "vocab.txt",
    }


def test_the_first_of_two_alternatives_is_read(folder):
    save_file(STATE, folder / "model.safetensors")
    assert locate(WEIGHTS, str(folder))["weights"] == folder / "model.safetensors"


@pytest.mark.parametrize("name", ["Toy.pt", "mine.pth"])
def test_a_file_stands_for_the_weights_and_the_rest_lies_beside_it(folder, name):
    (folder / "Toy.pt").rename(folder / name)
    assert locate(WEIGHTS, folder / name) == {
        "weights": folder / name,
        "vocabulary": folder / "vocab.txt",
    }


def test_a_file_with_the_name_of_another_entry_is_that_one(folder):
    assert locate(WEIGHTS, folder / "vocab.txt") == locate(WEIGHTS, folder)


def test_what_a_folder_lacks_is_listed_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError) as refused:
        from_anywhere(WEIGHTS, tmp_path)
    words = str(refused.value)
    assert "lacks model.safetensors or Toy.pt, vocab.txt;" in words
    assert f"{FETCH} --output {tmp_path}" in words
    assert "Toy.pt of maker/Toy; vocab.txt of other/words" in words


def test_what_is_missing_beside_a_file_is_listed(folder):
    (folder / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=rf"Toy\.pt, lacks vocab\.txt; get .*{FETCH}"):
        locate(WEIGHTS, folder / "Toy.pt")


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/a/b", "~/a/b", "a/b/c", "a/b.pt", "a//b"])
def test_a_path_that_is_not_there_is_refused_at_once(name):
    with pytest.raises(FileNotFoundError, match=rf"does not exist; get them with: {FETCH}"):
        from_anywhere(WEIGHTS, name)


def test_an_empty_name_is_refused():
    with pytest.raises(ValueError, match="model of toy must be a folder, a file or a hub id"):
        locate(WEIGHTS, " ")


def test_relative_paths_become_absolute_and_hub_ids_stay(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert from_anywhere(WEIGHTS, folder.name) == str(folder)
    assert from_anywhere(WEIGHTS, "maker/Toy") == "maker/Toy"


# -- the hub ---------------------------------------------------------------------------------------


def _hub(monkeypatch, repositories, cached=()):
    """snapshot_download of repositories that are folders; a list of what was asked of it."""
    asked = []

    real = inspect.signature(huggingface_hub.snapshot_download)

    def snapshot_download(repository, *, allow_patterns, local_files_only):
        real.bind(repository, allow_patterns=allow_patterns, local_files_only=local_files_only)
        asked.append((repository, tuple(allow_patterns), local_files_only))
        if repository not in repositories or (local_files_only and repository not in cached):
            raise FileNotFoundError(f"no snapshot of {repository}")
        return str(repositories[repository])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_a_hub_id_takes_the_rest_from_the_other_repositories(tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    (tmp_path / "words").mkdir()
    torch.save(STATE, tmp_path / "toy" / "Toy.pt")
    (tmp_path / "words" / "vocab.txt").write_text("[PAD]\n")
    repositories = {"maker/Toy": tmp_path / "toy", "other/words": tmp_path / "words"}
    asked = _hub(monkeypatch, repositories)
    assert locate(WEIGHTS, "maker/Toy") == {
        "weights": tmp_path / "toy" / "Toy.pt",
        "vocabulary": tmp_path / "words" / "vocab.txt",
    }
    names = ("model.safetensors", "Toy.pt", "vocab.txt")
    assert [call for call in asked if not call[2]] == [
        ("maker/Toy", names, False),
        ("other/words", ("vocab.txt",), False),
    ]


def test_files_that_are_on_this_machine_are_used_without_the_hub(folder, monkeypatch):
    asked = _hub(monkeypatch, {"maker/Toy": folder}, cached=["maker/Toy"])
    assert locate(WEIGHTS, "maker/Toy")["weights"] == folder / "Toy.pt"
    assert [local for *_, local in asked] == [True]


def test_without_a_network_a_hub_id_gives_the_list_and_does_not_hang(tmp_path):
    """In a process of its own: huggingface_hub reads HF_HUB_OFFLINE when it is imported."""
    import subprocess
    import sys

    code = (
        "from diffusion_envs.rewards.weights import *\n"
        f"weights = {WEIGHTS!r}\n"
        "try: locate(weights, 'maker/Toy')\n"
        "except FileNotFoundError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment
    )
    assert time.monotonic() - began < 60
    assert "model of toy, maker/Toy, lacks model.safetensors or Toy.pt, vocab.txt (" in done.stdout
    assert FETCH in done.stdout, done.stderr
    assert "--output" not in done.stdout


# -- what is in them -------------------------------------------------------------------------------


def test_names_are_unwrapped_and_numbers_are_float32(tmp_path):
    stored = {f"module.{name}": value.half() for name, value in STATE.items()}
    stored["module.position_ids"] = torch.arange(3)
    torch.save({"epoch": 3, "state_dict": stored}, tmp_path / "Toy.pt")
    state = read_state(tmp_path / "Toy.pt")
    assert {name: value.dtype for name, value in state.items()} == {
        "a.weight": torch.float32,
        "a.bias": torch.float32,
        "position_ids": torch.int64,
    }
    torch.testing.assert_close(state["a.weight"], STATE["a.weight"], rtol=0, atol=0)
    assert read_tensors(tmp_path / "Toy.pt")["a.bias"].dtype == torch.float16


def test_safetensors_hold_the_same(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    torch.testing.assert_close(read_state(tmp_path / "model.safetensors"), STATE, rtol=0, atol=0)


class _Calls:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_calls_is_refused_by_name_and_not_executed(tmp_path, new):
    content = {"a": _Calls(tmp_path / "executed")}
    torch.save(content, tmp_path / "Toy.pt", _use_new_zipfile_serialization=new)
    refusal = r"Toy\.pt is refused: it names (posix|nt)\.mkdir to be called.*safetensors copy"
    with pytest.raises(ValueError, match=refusal):
        read_state(tmp_path / "Toy.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"<html>not here</html>", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("name", ["Toy.pt", "model.safetensors"])
def test_what_is_no_file_of_tensors_is_said_to_be_none(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is no .*(?i:get it again)"):
        read_state(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "must hold a dictionary of tensors, got list"),
        ({}, "must hold a dictionary of tensors, got dict"),
        ({"a": 3.0}, "must hold tensors by name, but 'a' is float"),
        ({"a": torch.tensor([1.0, float("nan")])}, "finite numbers, but a does not"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "Toy.pt")
    with pytest.raises(ValueError, match=words):
        read_state(tmp_path / "Toy.pt")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="weights must be a file"):
        read_state(tmp_path / "Toy.pt")


def test_differing_keys_are_named(tmp_path):
    network = nn.ModuleDict({"a": nn.Linear(2, 1)})
    require_keys(STATE, network, "here")
    wrong = {"a.weight": torch.ones(3, 2)} | {f"b{k}": torch.ones(1) for k in range(5)}
    rule = (
        r"here does not hold the weights of ModuleDict: it lacks a\.bias; it has in addition b0, "
        r"b1, b2 and 2 more; it has in another shape a\.weight \[3, 2\] for \[1, 2\]"
    )
    with pytest.raises(ValueError, match=rule):
        require_keys(wrong, network, "here")
