"""Path laws, terminal laws, initial laws: which KL is which, and by how much they differ.

The field writes "the KL between the models" for two numbers, that of the paths and that of the
generated samples. Theorem 3.1's integral is the first; the second is smaller, by exactly the mean
KL of the paths given where they end, and equal only if dP/dP_ref is a function of X_T alone.
"""

from verification.closed_form import ornstein_uhlenbeck as closed

P = closed.OrnsteinUhlenbeck()


def columns(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The first and the second of every pair."""
    return [first for first, _ in pairs], [second for _, second in pairs]
