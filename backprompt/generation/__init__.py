"""Generation: texts that the model continues, many at once, and the rules by which tokens are chosen.

May know sessions, evaluation and classification (for `select`); nothing here computes a span.
A new decoding rule is a class beside those of `decoding.py` and `beams.py`; a new option goes into `options.py`.
"""
