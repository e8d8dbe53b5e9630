import sys

import pytest

from diffusion_envs import rewards, sd15
from diffusion_envs.runs.options import RunOptions


@pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely
def test_a_run_refused_for_want_of_it_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    settings = {"reward": rewards.Colour("red"), "prompts": ["a cat"], "updates": 0}
    options = RunOptions(wandb=True)
    with pytest.raises(ValueError, match="wandb is not installed"):
        sd15.finetune(output=tmp_path / "run", options=options, **settings)
    assert not (tmp_path / "run").exists()
