"""Engines for texts whose model lies in other processes: on Ray, several copies of an `LM` behind one `RayLM`.

The driver keeps the tokenizer, and which worker was given which texts. Token ids go to the workers, and results come
back, as flat arrays. All that computes is the `LM` of each worker.
"""
