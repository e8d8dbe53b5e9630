"""The figures of "Score as Action" (arXiv 2502.01819), each made again by one command.

A figure is one module (``one``, ``two``, ...) with

    BUDGETS: Mapping[str, Budget]    "cpu" and "gpu"; a budget is a frozen dataclass with ``seeds``
    run(budget, output, seeds) -> Figure

and nothing else knows of it: ``python -m benchmarks.figures N`` imports the module of that number.
"""
