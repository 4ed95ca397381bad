"""The user's model: a private copy, its forward passes and output head, and the identity of its weights.

The folder may import passes, attention and blocks; no texts, no scores, no lock.
A new kind of model, or a refusal, goes into `skeleton.py`; a new keyword of transformers' attention into `executor.py`.
"""
