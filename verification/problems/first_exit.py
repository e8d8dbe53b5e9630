"""First exit from a domain: crossings between nodes, and what a path is worth that ends there."""

import math

import ctrl
from ctrl.stopping import Interval
from verification.closed_form import first_exit as exact

MOTION = exact.Motion(0.3, 0.9)
WALLS, FLOOR = Interval(-1.0, 1.0), Interval(0.0, math.inf)
SDE = ctrl.ControlledSDE(lambda t, x, a: a, lambda t, x: MOTION.noise)
