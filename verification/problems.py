"""The problems of the claims, as users would write them.

Constants are chosen for sensitivity: no zero, no one, no two equal, no symmetric state, no
stationary start, an uneven grid. A mistake that is invisible at 0 or 1 is visible here.
"""

import ctrl
from verification.claim import Setting
from verification.closed_form.ornstein_uhlenbeck import OrnsteinUhlenbeck

NODES = (0.0, 0.1, 0.35, 0.5, 0.9)  # uneven
HORIZON = NODES[-1]


def grid(setting: Setting) -> ctrl.TimeGrid:
    """The uneven grid of four steps."""
    return ctrl.TimeGrid(setting.tensor(NODES))


def ornstein_uhlenbeck(
    p: OrnsteinUhlenbeck,
) -> tuple[ctrl.ControlProblem, ctrl.DeterministicPolicy, ctrl.DeterministicPolicy]:
    """dX = a dt + noise dW without reward, the policy of law 1 and that of the reference law."""
    sde = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: p.noise)
    policy = ctrl.DeterministicPolicy(lambda t, x: p.shift - p.pull * x)
    reference = ctrl.DeterministicPolicy(lambda t, x: p.reference_shift - p.reference_pull * x)
    return ctrl.ControlProblem(sde, HORIZON), policy, reference
