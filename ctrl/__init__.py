"""Exploratory continuous-time control: SDEs, policies, path-space likelihoods, martingale losses."""
