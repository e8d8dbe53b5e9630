"""Randomness: quadrature in its place, bridges, streams that have names, and normal increments.

What can be counted is counted: distinct noise vectors among so many requests. What is linear is
probed: the law of a refined path is read off a matrix. Only what is left is sampled.
"""

STEPS = (0.3, 0.55)
