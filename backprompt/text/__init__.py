"""Texts: the node `Text`, its segments and operators, and the protocol of its questions to a model.

May know errors and checks of arguments at the root; no tokenizer, no model, no tensor.
A new operator goes into `node.py`, a new kind of segment into `segments.py`, a new question into `engine.py`.
"""
