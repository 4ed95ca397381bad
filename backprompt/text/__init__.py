"""Texts: the class `Text`, its segments and operators, and the protocol of the questions that a text asks a model.

The folder may import errors and checks of arguments from the root. It imports no tokenizer, no model and no tensor.
A new operator goes into `node.py`, a new kind of segment into `segments.py`, a new question into `engine.py`.
"""
