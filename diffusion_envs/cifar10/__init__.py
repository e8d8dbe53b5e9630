"""CIFAR-10: its data."""
