"""Strong orders, without a single random number.

Of geometric Brownian motion the mean square error of a scheme is a product over the steps, of
moments that quadrature gives through the production step; it is compared with the same error by
polynomials written out by hand, then its order is read off. Of linear systems, whose solution is
not known, the mean square difference of two runs along one Brownian path, on a grid and on the
refined one, is a linear recursion for the second moments of the pair.
"""

import torch

import ctrl

STILL = ctrl.DeterministicPolicy(lambda t, x: torch.zeros_like(x))
