"""All that is computed with one state of the weights: spans computed and evicted, scores, results, texts that grow.

May know token ids, spans, memory, stores and the model; no `Text` and no lock.
`computation.py` asks `memory/` to evict; a new result goes into `readout.py`, a new score into `scoring.py`.
"""
