"""Fixtures and settings that every test shares."""

import hashlib
import os

import hypothesis
import jaxtyping
import pytest
import torch

from tests import checked_types

# Before any package is imported whose functions the import hook decorates.
jaxtyping.jaxtyped = checked_types.jaxtyped

hypothesis.settings.register_profile("dev", max_examples=50, deadline=None)
hypothesis.settings.register_profile(
    "ci", max_examples=100, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile("nightly", max_examples=5000, deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")

# One thread unless another number is asked for: two on a busy machine are slower than one.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


# Files that take a minute of processor time or more: begun first, so that no core waits for one.
DEAREST = [
    "tests/diffusion_envs/runs/test_estimate.py",
    "tests/diffusion_envs/sd15/test_early_stop.py",
    "tests/verification/test_claims.py",
    "tests/benchmarks/test_faults.py",
    "tests/benchmarks/test_fault_processes.py",
    "tests/diffusion_envs/training/test_sharded.py",
    "tests/diffusion_envs/training/test_several_processes.py",
    "tests/docs/test_blocks.py",
    "tests/diffusion_envs/sd15/test_command_line.py",
    "tests/diffusion_envs/runs/test_servers_that_die.py",
    "tests/diffusion_envs/training/test_control.py",
    "tests/ctrl/test_examples.py",
    "tests/benchmarks/test_figures.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those files first, in this order; all others as pytest has them."""
    ranks = {name: rank for rank, name in enumerate(DEAREST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator seeded from the test's name: the same numbers on every run of that test."""
    digest = hashlib.sha256(request.node.nodeid.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


@pytest.fixture
def as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shapes and types are checked at every call, which takes most of a long run's time.

    It is for many repetitions of calls that other tests make with these checks.
    """
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


@pytest.fixture(autouse=True)
def _skip_gpu_tests_without_cuda(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
