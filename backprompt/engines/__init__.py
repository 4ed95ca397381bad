"""Engines for texts whose model lies in other processes: on Ray, several copies of an `LM` behind one `RayLM`.

The driver keeps the tokenizer, and a record of the texts that each worker was given. Token ids go to the workers, and
results come back, as flat arrays. Only the `LM` of each worker computes.
"""
