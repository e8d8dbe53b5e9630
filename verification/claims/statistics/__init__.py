"""The sequential test by which sampled checks are decided."""
