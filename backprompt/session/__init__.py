"""The session behind an `LM`: the lock, the current evaluator and encoder, the fingerprint, representations, options.

The folder may import all folders up to evaluation, but not `lm.py`. Generation, inspection and classification take a
session and call its public methods.
A new option goes into `options.py`, a new result of a text into `representation.py`, a new count into `stats.py`.
"""
