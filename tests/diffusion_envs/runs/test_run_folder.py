"""A folder belongs to one run and to one process, however the one before it ended."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import pytest

from diffusion_envs.runs.run_folder import open_run, read_settings

SETTINGS = {"updates": 3, "steps": 2, "options": {}}
HOLDER = """
import os, sys, time
from diffusion_envs.runs.run_folder import open_run

with open_run(sys.argv[1], {"updates": 3, "steps": 2, "options": {}}, resume=True):
    if sys.argv[2] == "leaving a child" and os.fork() == 0:
        time.sleep(60)  # which inherits the open file, and so the lock
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_a_folder_that_is_at_work_is_refused_by_pid_and_host(tmp_path):
    folder = tmp_path / "run"
    with open_run(folder, SETTINGS, resume=False):
        for resume in (False, True):
            with (
                pytest.raises(FileExistsError, match="another process that is running") as refused,
                open_run(folder, SETTINGS, resume=resume),
            ):
                pass
            assert f"pid {os.getpid()} on host {socket.gethostname()}" in str(refused.value)
    with open_run(folder, SETTINGS, resume=True):  # it has ended
        pass
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("how", ["alone", "leaving a child"])
def test_the_lock_of_a_killed_process_is_taken_over(how, tmp_path):
    folder = tmp_path / "run"
    with open_run(folder, SETTINGS, resume=False):
        pass
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), how],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        pid = int(holder.stdout.readline())
        with (
            pytest.raises(FileExistsError, match=f"pid {pid} on host"),
            open_run(folder, SETTINGS, resume=True),
        ):
            pass
        holder.kill()
        holder.wait()
        with open_run(folder, SETTINGS, resume=True):
            assert f"pid {os.getpid()} " in (folder / "run.lock").read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()
        holder.stdout.close()


def test_a_lock_of_another_machine_that_is_held_is_never_taken_over(tmp_path):
    folder, ended = tmp_path / "run", subprocess.Popen(["true"])
    ended.wait()
    with open_run(folder, SETTINGS, resume=False):
        (folder / "run.lock").write_text(f"pid {ended.pid} on host elsewhere")
        with (
            pytest.raises(FileExistsError, match=f"pid {ended.pid} on host elsewhere"),
            open_run(folder, SETTINGS, resume=True),
        ):
            pass


@pytest.mark.parametrize("left", [[], ["run.lock"], ["run.lock", "config.json.partial"]])
def test_a_start_that_was_killed_before_its_config_goes_on_as_a_new_one(left, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in left:
        (folder / name).write_text("pid 1 on")
    with (
        pytest.raises(FileNotFoundError, match="holds no config"),
        open_run(folder, SETTINGS, resume=True),
    ):
        pass
    with open_run(folder, SETTINGS, resume=False):
        assert read_settings(folder) == SETTINGS


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with (
        pytest.raises(FileExistsError, match="holds other files"),
        open_run(tmp_path, SETTINGS, resume=False),
    ):
        pass
    assert not (tmp_path / "config.json").exists()


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with open_run("~/runs/x", SETTINGS, resume=False) as folder:
        assert folder == tmp_path / "runs" / "x"
    assert (folder / "config.json").is_file()


def test_updates_may_grow_and_are_stored_before_anything_is_trained(tmp_path):
    with open_run(tmp_path, SETTINGS, resume=False):
        pass
    with (
        pytest.raises(KeyboardInterrupt),
        open_run(tmp_path, SETTINGS | {"updates": 30}, resume=True),
    ):
        raise KeyboardInterrupt
    assert read_settings(tmp_path)["updates"] == 30
    with (
        pytest.raises(ValueError, match=r"updates must be at least 30, .* got 3: leave it"),
        open_run(tmp_path, SETTINGS, resume=True),
    ):
        pass
    with (
        pytest.raises(ValueError, match="steps: 2 then, 5 now"),
        open_run(tmp_path, SETTINGS | {"updates": 30, "steps": 5}, resume=True),
    ):
        pass
    assert json.loads((tmp_path / "config.json").read_text())["versions"]["torch"]


def test_the_config_of_an_earlier_version_and_a_damaged_one_are_named(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"settings": {"updates": 3}, "command": None}))
    with pytest.raises(ValueError, match="written by an earlier version"):
        read_settings(tmp_path)
    for text in ('{"settings"', "[]", '{"settings": 3}', "{}"):
        config.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            read_settings(tmp_path)


def test_what_is_refused_says_how_to_go_on(tmp_path):
    folder = tmp_path / "my run"
    with open_run(folder, SETTINGS, resume=False):
        pass
    with (
        pytest.raises(FileExistsError, match=rf"--resume '{re.escape(str(folder))}' \(resume=True"),
        open_run(folder, SETTINGS, resume=False),
    ):
        pass
    with (
        pytest.raises(ValueError, match="steps: 2 then, 5 now; resume with those of the start"),
        open_run(folder, SETTINGS | {"steps": 5}, resume=True),
    ):
        pass
