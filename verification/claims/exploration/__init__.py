"""Exploratory control: relaxed dynamics, linear-quadratic problems, policies and their entropy."""
