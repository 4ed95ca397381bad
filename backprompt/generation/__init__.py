"""Generation: texts that the model continues, many at once, and the rules that choose tokens.

The folder may import sessions, evaluation and classification (for `select`). Spans are computed elsewhere.
A new decoding rule is a class like those of `decoding.py` and `beams.py`; a new option goes into `options.py`.
"""
