"""The GPU script without a GPU: its stages run tiny, and its pages say what was not measured."""

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as stages
from benchmarks.gpu import full_size, pages, rollouts
from benchmarks.gpu.timing import Device
from diffusion_envs.models.folders import TINY

ROOT = Path(__file__).parents[2]
REHEARSAL = Device(torch.device("cpu"), rehearsal=True)


def test_roll_outs_are_timed_case_by_case():
    rows = list(rollouts.rows(REHEARSAL))
    assert len(rows) == len(rollouts.cases(torch.device("cpu"), 4, 2, 3))
    assert all(0 < row["least"] <= row["seconds"] <= row["most"] for row in rows)


def test_the_plain_loop_has_the_old_policys_densities():
    """Else the comparison is with something that does not train: its ratios begin at 1."""
    model, environment = full_size._built(REHEARSAL, TINY, 2)
    plain = full_size._plain(model, environment, 2, 2)
    x = torch.randn(2, *plain.event, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mean, std = plain.transition(0, x)
        found = plain.log_prob(0, x, mean + std * noise)
    # (mean + std z - mean) / std misses z by eps |mean| / std, about 1e-6 here
    torch.testing.assert_close(found, -noise.square().flatten(1).mean(1) / 2, rtol=1e-4, atol=1e-5)
    before = [p.detach().clone() for p in model.parameters]
    plain.update(4, torch.Generator().manual_seed(2))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters, strict=True))


def test_out_of_memory_is_a_line_and_the_others_go_on(monkeypatch):
    def too_large(where, model, batch):
        if batch == 1:
            raise torch.OutOfMemoryError
        yield {"case": "sampled", "batch": batch, "seconds": 1.0}

    monkeypatch.setattr(full_size, "_of_batch", too_large)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 6 * 2**30))
    rows = list(full_size.rows(REHEARSAL))
    assert rows[0]["says"] == "this GPU has 6 GiB, 1.0 of them free: too few for batch 1"
    assert rows[1]["batch"] == 2


def test_a_stage_that_fails_leaves_what_it_had(tmp_path, monkeypatch):
    def broken(where):
        yield {"case": "first"}
        raise ValueError("no second")

    monkeypatch.setitem(stages.STAGES, "tiny", broken)
    assert stages.run("tiny", REHEARSAL, tmp_path) == 1
    found = json.loads((tmp_path / "tiny.json").read_text())
    assert (found["status"], found["error"]) == ("failed", "ValueError: no second")
    assert found["rows"] == [{"case": "first"}]
    assert stages.ended(tmp_path, "tiny", 1) == 0  # what it said itself stays
    assert json.loads((tmp_path / "tiny.json").read_text()) == found
    stages.ended(tmp_path, "rollouts", 124)
    pages.write(tmp_path, tmp_path / "docs", list(stages.STAGES))
    page = (tmp_path / "docs" / "gpu.md").read_text()
    assert "Failed after 0 s on CPU: ValueError: no second." in page
    assert "Stopped after 0 s on CPU: ran out of its time." in page


def test_without_a_gpu_only_a_rehearsal_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--rehearse"):
        stages.device_of(rehearsal=False)


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (None, "Nothing was measured on a GPU so far"),
        ({"rehearsal": True}, "A rehearsal on the CPU"),
        (
            {"rehearsal": False, "gpu": "A card"},
            "| the embedded model, resumed bit for bit | yes |",
        ),
    ],
)
def test_pages_say_what_was_measured_and_what_not(tmp_path, machine, words):
    if machine is not None:
        row = {"case": "resumed", "same_adapter_bits": True, "seconds": 1.23456}
        found = {"stage": "tiny", "status": "done", "machine": machine, "rows": [row]}
        stages.write(tmp_path, "tiny", found)
    pages.write(tmp_path, tmp_path, list(stages.STAGES))
    page = (tmp_path / "gpu.md").read_text()
    assert words in page
    assert "| seconds of roll-outs and path KLs | no |" in page
    assert ("measured on a GPU so far" in page) == (machine is None)
    if machine is not None:
        assert "| resumed | yes | 1.235 |" in page


def test_the_page_in_the_repository_is_made_of_its_numbers(tmp_path):
    found = json.loads((ROOT / "docs" / "gpu.json").read_text())
    assert (ROOT / "docs" / "gpu.md").read_text() == pages.page(found, list(stages.STAGES))


@pytest.mark.parametrize("arguments", [["--rehearse"], []])
def test_the_script_goes_through_all_stages_though_one_fails(tmp_path, arguments):
    """With an interpreter that notes what it is asked for, and fails at one stage."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ "$3" != rollouts ]\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    script = tmp_path / "benchmarks" / "gpu.sh"
    script.parent.mkdir()
    script.write_text((ROOT / "benchmarks" / "gpu.sh").read_text())
    environ = os.environ | {"PYTHON": str(fake)}
    done = subprocess.run(["bash", str(script), *arguments], env=environ, capture_output=True)
    assert done.returncode == 1
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[2] for line in asked] == [
        "tests", "rollouts", "ended", "tiny", "full_size", "pages",
    ]  # fmt: skip
    assert asked[2].endswith("--code 1")
    assert ("--rehearse" in asked[0]) == bool(arguments)
    assert asked[-1].endswith("--to runs/gpu" if arguments else "--to docs")
    unknown = subprocess.run(["bash", str(script), "--fast"], env=environ, capture_output=True)
    assert unknown.returncode == 2
