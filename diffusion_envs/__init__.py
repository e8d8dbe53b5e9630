"""Diffusion models as control problems: the score is the action, a reward judges the image."""
