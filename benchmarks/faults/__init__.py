"""Faults that are done to runs, and whether a run keeps what it promises: ``make faults``."""
