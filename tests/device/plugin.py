"""``pytest -p tests.device.plugin tests/device``: tests on the simulated accelerator.

It has a process of its own because it replaces parts of torch; without this plugin nothing in this
folder is collected (``conftest.py``).
"""

from collections.abc import Iterator

import pytest
import torch

from tests.device import accelerator
from tests.device.operations import Discipline

if accelerator.SUPPORTED:
    accelerator.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not accelerator.SUPPORTED:
        needs = ".".join(map(str, accelerator.NEEDS))
        for item in items:
            item.add_marker(pytest.mark.skip(f"needs torch {needs}, got {torch.__version__}"))


@pytest.fixture(autouse=True)
def _discipline() -> Iterator[None]:
    with Discipline():
        yield
