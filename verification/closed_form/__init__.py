"""Reference values by formula: numpy and scipy only, never ``ctrl``; agreement is then evidence."""
