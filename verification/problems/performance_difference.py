"""Lemma 4.2 of "Score as Action": the difference of two policies' performances, and its surrogate.

The exploratory LQ problem again. q-rates are those of the old policy's value in continuous time,
known as a power series; so are their expectations along the Euler chain of either policy.
"""

import numpy as np

from ctrl.value import Value
from verification.claim import Setting
from verification.closed_form import lq_chain
from verification.closed_form.lq_chain import LQChain
from verification.problems.exploratory_lq import continuous_value

P = LQChain()
OLD = lq_chain.THETA
NEW = np.array([-0.2, 0.6, -0.75])


def value_of_old(setting: Setting) -> Value:
    """V of the old policy, in continuous time."""
    return continuous_value(setting, P, OLD)
