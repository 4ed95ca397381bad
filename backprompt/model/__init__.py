"""The user's model: a private copy, its forward passes and output head, and the identity of its weights.

The folder may import passes, attention and blocks. It imports no texts, no scores and no lock.
A new kind of model, or a refusal, goes into `skeleton.py`; a new keyword of transformers' attention into
`in_flight.py`.
"""
