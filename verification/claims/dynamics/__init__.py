"""Beyond diffusions without end: exits, jumps, chains, regimes, correlated noise."""
