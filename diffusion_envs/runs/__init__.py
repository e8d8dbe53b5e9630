"""Runs: what fine-tuning does around its updates, leaves in a folder and survives."""
