"""Attention over a packed forest: the contract, the kernels, and the implementations that carry out a plan.

The folder may import plans of passes, and no texts, no models and no store.
A new backend is a module here that implements `ForestAttention` of `base.py`; a device's kernel goes into `kernels.py`.
"""
