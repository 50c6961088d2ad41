"""Tensors in, tensors out: the linear algebra and statistics that every method shares.

Kronecker products and their eigenbases, linear operators and their inverses, random projections,
rank correlations and resampling, and the exact distributions of ranks. Nothing here knows what a
model, a dataset or a task is, so each function can be held to the formula in its docstring.
"""
