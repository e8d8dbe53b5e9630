"""Several processes wait for people together: one set of images, one error, no one goes on."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffusion_envs.exact.problems import GaussianProblem, table
from diffusion_envs.objectives import D3PO
from diffusion_envs.preferences import MissingChoicesError, Recorded
from diffusion_envs.runs.human_choices import leaving_images
from diffusion_envs.samplers import DDIM
from diffusion_envs.training import parallel
from diffusion_envs.training.trainer import Trainer
from diffusion_envs.training.update_size import UpdateSize
from tests.diffusion_envs.training.processes import run_worlds


def main(folder: Path) -> None:
    """One of two processes."""
    accelerator = parallel.start("cpu")
    assert accelerator.num_processes == 2
    environment = GaussianProblem().environment(DDIM(1.0).bind(table(), 2), 5)
    model: Any = environment.model
    model.decode = lambda x: x[:, :1, None, None].sigmoid().expand(-1, 3, 8, 8)
    environment.reward = lambda images, prompts: images.mean((1, 2, 3))
    for name in ("none", "half", "all"):
        trainer = Trainer(
            environment,
            D3PO(),
            UpdateSize(samples=8),
            accelerator=accelerator,
            preference=Recorded(folder / f"{name}.jsonl"),
        )
        try:
            lines = list(leaving_images(trainer.updates(1), folder / name, accelerator))
            said = f"{len(lines)} update"
        except MissingChoicesError as missing:
            images: Any = missing.images
            said = f"{missing.groups} {len(images)} {missing.prompts} {missing}"
        (folder / f"{name}-{accelerator.process_index}.txt").write_text(said)


@pytest.mark.slow
def test_two_processes_leave_all_images_once_and_stop_with_one_error(tmp_path):
    """Samples 0-3 are the first process's, 4-7 the second's."""
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    for name, chosen in (("half", pairs[:2]), ("all", pairs)):
        lines = [json.dumps({"order": pair}) for pair in chosen]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    run_worlds(__name__, tmp_path)
    for name, missing in (("none", pairs), ("half", pairs[2:])):
        said = [(tmp_path / f"{name}-{k}.txt").read_text() for k in range(2)]
        assert said[0] == said[1]
        assert said[0].startswith(f"{missing} {2 * len(missing)} ")
        assert f"{name}.jsonl" in said[0]
        place = tmp_path / name / "to_choose"
        assert str(place) in said[0]
        wanted = [f"sample-{k:06d}.png" for pair in missing for k in pair]
        assert sorted(p.name for p in place.glob("sample-*.png")) == wanted
        left = (place / "groups.jsonl").read_text().splitlines()
        assert [json.loads(line)["order"] for line in left] == missing
    for k in range(2):
        assert (tmp_path / f"all-{k}.txt").read_text() == "1 update"
    assert not (tmp_path / "all").exists()
