"""Roll-outs and estimators ask the device for nothing but work, whatever the number of steps."""

import pytest

from benchmarks.device import ROLL_OUTS, per_step

PER_STEP = {"simulate, TorchSDE srk": 1}  # its interior is named by the increments, which are read


@pytest.mark.parametrize("name", ROLL_OUTS)
def test_no_step_waits(name):
    waits, _, counts = per_step(ROLL_OUTS[name])
    assert waits == PER_STEP.get(name, 0), counts.lines()
