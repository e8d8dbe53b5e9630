"""A run's device is the one that was asked for, or is refused by name."""

import pytest
import torch
from accelerate.state import AcceleratorState

from diffusion_envs import rewards
from diffusion_envs.training import parallel
from tests.diffusion_envs.sd15.calling import finetune


@pytest.fixture(autouse=True)
def _no_state_is_left():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def gpu(monkeypatch):
    """What torch says beside a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_without_a_gpu_runs_are_on_the_cpu(device):
    assert parallel.start(device).device == torch.device("cpu")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", "'cuda' is not there: .* use device='cpu', or leave it out"),
        ("cuda:1", "'cuda:1' is not there"),
        ("mps", "must be 'cpu' or 'cuda', got 'mps'.* use device='cpu'"),
        ("gpu", "must be 'cpu' or 'cuda', got 'gpu'"),
    ],
)
def test_a_device_that_is_not_there_is_refused_by_name(device, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        finetune(
            reward=rewards.Colour("red"), prompts=["a cat"], output=tmp_path / "run", device=device
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("gpu")
def test_which_gpu_is_for_the_environment_to_say():
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=1 with device='cuda'"):
        parallel.start("cuda:1")


@pytest.mark.usefixtures("gpu")
def test_the_cpu_may_be_asked_for_beside_a_gpu():
    assert parallel.start("cpu").device == torch.device("cpu")


@pytest.mark.usefixtures("gpu")
def test_the_cpu_may_be_asked_for_after_a_run_on_the_gpu():
    """Accelerate keeps the first device of a process; here that of an earlier run."""
    parallel.start("cpu")
    AcceleratorState._shared_state["device"] = torch.device("cuda")
    assert parallel.start("cpu").device == torch.device("cpu")
