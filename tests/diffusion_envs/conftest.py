"""The smallest real loop, for all tests of this package."""

from tests.diffusion_envs.objectives.conftest import small_trainer

__all__ = ["small_trainer"]
