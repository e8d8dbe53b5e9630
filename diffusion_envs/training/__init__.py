"""Training: what a run does, leaves and survives."""
