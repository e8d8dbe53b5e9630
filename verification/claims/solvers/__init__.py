"""Solvers and noise: orders, gradients, quadrature, bridges, random streams."""
