"""Measurements: ratios in one run, with the state of the machine."""
