"""Roll-outs whose states lie in the CPU's memory: where they are, and that all numbers stay."""

import dataclasses

import pytest
import torch

from benchmarks.device import OBJECTIVES, model, trainer
from tests.device.memory import NAME


@pytest.mark.parametrize("name", ["GRPO", "ScoreAsActionSampled", "DxMI", "AdjointMatching"])
def test_paths_on_the_host_make_the_same_update(name):
    made, numbers = [], []
    for place in ("device", "host"):
        one = trainer(OBJECTIVES[name], model())
        one.size = dataclasses.replace(one.size, stored_paths=place)
        rollout = one.sample().rollout
        kept = (rollout.states, rollout.means, rollout.actions, rollout.noises)
        assert {value.device.type for value in kept} == {"cpu" if place == "host" else NAME}
        assert rollout.rewards.device.type == NAME
        numbers.append([one.step(), one.step()])
        made.append([p.detach().cpu() for p in one.parameters])
    for one, other in zip(*made, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(*numbers, strict=True):
        skipped = ("seconds", "memory")  # reward_queries and network_calls count the first sample
        assert not {k for k in one if k not in skipped and one[k] != other[k]}
