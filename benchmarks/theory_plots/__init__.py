"""The pictures of the pages of theory, each by a few lines of the library's own code.

``python -m benchmarks.theory_plots`` writes them all to docs/theory/plots, the same bytes again on
the same machine.
"""
