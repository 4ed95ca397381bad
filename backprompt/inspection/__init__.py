"""Looking inside: pictures, explanations of costs, missing segments, comparisons with the plain call.

Modules of this folder may import sessions and evaluation. Pictures and explanations look at rows through sketches
(`evaluation/lookup.py`), which change nothing.
A new line of an explanation goes into `explanation.py`, its figure into `explain.py`, a reason into `missing.py`.
"""
