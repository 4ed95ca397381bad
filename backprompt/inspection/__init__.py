"""Looking inside: pictures, accounts, missing segments, comparisons with the plain call.

The folder may import sessions and evaluation; pictures and accounts look at rows through sketches
(`evaluation/lookup.py`).
A new line of an account goes into `explanation.py`, its figure into `explain.py`, a reason into `missing.py`.
"""
