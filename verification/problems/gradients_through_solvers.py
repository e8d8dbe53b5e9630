"""Gradients through roll-outs, and solvers that must be one another.

The derivative of an expectation of the discrete scheme, on quadrature paths, is a number that a
polynomial recursion gives by complex steps, to round-off; whatever is detached on the way is seen.
"""

NODES = (0.0, 0.2, 0.5, 0.9)
