"""Nothing here is collected but in a process of its own: ``make test-device``."""

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.pluginmanager.has_plugin("tests.device.plugin") else True
