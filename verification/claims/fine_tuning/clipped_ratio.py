"""The clipped surrogate: values and slopes on both sides of both ends.

The clipped surrogate is min(r A, clip(r) A): for A > 0 its gradient ends where r is above
the range, for A < 0 where it is below, and nowhere else. False: that clipping alone bounds
the ratio; outside the range on the other side the gradient is that of r A.
"""

from collections.abc import Iterator

import torch

from ctrl.trust_region import clipped_surrogate
from verification.claim import Check, Setting, array, pathwise
from verification.closed_form import linear_adapter

SOURCE = "Schulman et al. 2017, equation 7"


def checks(setting: Setting) -> Iterator[Check]:
    """Values and slopes on both sides of both ends, for good and bad decisions."""
    half_width = 0.35
    one = torch.linspace(-0.83, 0.97, 13)
    log_ratio = setting.tensor(torch.cat([one, one]).double()).requires_grad_()
    advantage = setting.tensor([1.7] * 13 + [-0.6] * 13)
    gain = clipped_surrogate(log_ratio, advantage, torch.full_like(advantage, half_width))
    (slope,) = torch.autograd.grad(gain.sum(), log_ratio)
    x, a = (array(v) for v in (log_ratio, advantage))
    want, slopes = linear_adapter.surrogate(x, a, half_width)
    yield pathwise("surrogate", gain, want)
    yield pathwise("its slope in the log-ratio", slope, slopes)


MISTAKES = """
ctrl.trust_region.clipped_surrogate
    max for min | return torch.minimum(ratio * advantage => return torch.maximum(ratio * advantage
    sides swapped for negative advantage | return torch.minimum(ratio * advantage, trusted * advantage)
        => return torch.minimum(ratio, trusted) * advantage
    never clipped | return torch.minimum(ratio * advantage, trusted * advantage) => return ratio * advantage
    range of half the width | half_width).exp() => half_width / 2).exp()
    ratio detached | ratio = log_ratio.exp() => ratio = log_ratio.exp().detach()
shared
    clipped always
    lower end of the range missing
    ratio to first order
"""
