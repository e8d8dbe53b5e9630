"""Theorem 3.1 of "Score as Action": the KL between controlled SDEs is an integral of the control.

With equal diffusions and initial laws, and u = sigma^{-1} (b - b_ref),
    KL(P || P_ref) = 1/2 E int_0^T |u|^2 dt
under the law of P. The Euler chains obey the same identity exactly, on the grid, so nothing has to
be small: the mean over all quadrature paths must equal the chain's own KL.

The Euler chain's KL differs from the continuous one by O(step): that limit is a claim of its own.
"""

from verification.closed_form import ornstein_uhlenbeck as closed

P = closed.OrnsteinUhlenbeck()
