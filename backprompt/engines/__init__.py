"""Engines that compute texts elsewhere: a `RayLM` with an `LM` in each of its workers on Ray, a `VllmLM` with vLLM.

The driver of a `RayLM` keeps the tokenizer, and a record of the texts that each worker was given. Token ids go to the
workers, and results come back, as flat arrays. Only the `LM` of each worker computes.
"""
