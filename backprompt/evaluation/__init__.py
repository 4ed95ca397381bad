"""All computation with one state of the weights: spans computed and evicted, scores, results, texts that grow.

The folder may import token ids, spans, memory, stores and the model, but no `Text` and no lock.
`computation.py` asks `memory/` to evict; a new result goes into `readout.py`, a new score into `scoring.py`.
"""
