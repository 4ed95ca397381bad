"""Attention over a packed forest: the contract, kernels, and what carries out a plan."""
