"""Computed rows: their blocks, the tiers that hold blocks within byte budgets, and the order of eviction.

The folder may import spans. It does not import the computation of rows. Only `blocks.py` knows the layout of keys,
values and states.
`eviction.py` chooses the spans that leave the device; a new tensor goes into `blocks.py`, a new tier beside `host.py`.
"""
