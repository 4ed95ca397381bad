"""Attention over a packed forest: the contract, the kernels, and the implementations that carry out a plan.

The folder may import plans of passes. It imports no texts, no models and no store.
A new backend implements `ForestAttention` of `base.py` in a module here, as `calls.py` does, and `choice.py` chooses
the backend. A kernel for a single call goes into `kernels.py`.
"""
