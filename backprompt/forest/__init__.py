"""The forest of token spans, keys by content, and the plan of the passes that compute the spans; no tensors.

The folder may import token ids. Spans refer to rows of blocks, but no module here reads a block.
A change of the tree goes into `forest.py`, the order of passes into `passes.py`, the calls of a pass into `plan.py`.
"""
