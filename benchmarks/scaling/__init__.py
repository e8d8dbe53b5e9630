"""What an update takes on one machine and on many GPUs: measured, modelled, simulated."""
