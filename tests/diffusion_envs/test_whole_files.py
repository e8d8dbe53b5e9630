"""Files are written whole or not at all, and a full disk is told by their names."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffusion_envs.whole_files import append, naming, whole


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Within this context no file may grow beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_in_its_place_only_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "table.txt"
    with whole(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(path.parent) == ["table.txt"]


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ValueError])
def test_the_old_file_stays_whatever_is_raised(raised, tmp_path):
    path = tmp_path / "table.txt"
    path.write_text("old")

    def write() -> None:
        with whole(path) as partial:
            partial.write_text("half")
            raise raised

    with pytest.raises(raised):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["table.txt"]


@pytest.mark.parametrize("size", [0, 7])
def test_a_full_disk_names_the_file_and_what_to_do_and_leaves_the_old_one(size, tmp_path):
    path = tmp_path / "table.txt"
    path.write_text("old")
    with (
        no_file_beyond(size),
        pytest.raises(OSError, match=r"free space, then resume.*: '.*/table\.txt'"),
        whole(path) as partial,
    ):
        partial.write_text("longer than that")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["table.txt"]


def test_lines_that_do_not_fit_leave_the_log_as_it_was(tmp_path):
    path = tmp_path / "log.jsonl"
    append(path, '{"a": 1}\n')
    with no_file_beyond(15), pytest.raises(OSError, match=r"too large.*log\.jsonl"):
        append(path, '{"a": 22222}\n')
    assert path.read_text() == '{"a": 1}\n'
    append(path, '{"a": 3}\n')
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_an_error_keeps_its_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing/log\.jsonl"):
        append(tmp_path / "missing" / "log.jsonl", "")
    with pytest.raises(OSError, match="cannot be written: odd"), naming(tmp_path / "x"):
        raise OSError("odd")
    with pytest.raises(PermissionError, match="denied"), naming(tmp_path / "x"):
        raise OSError(13, os.strerror(13))
