"""Diffusion models: schedules, scores, time reversal, samplers and the laws of their chains."""
