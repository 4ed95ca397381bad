"""Training: scores of groups of completions that share a prompt, against the plain padded batch of trainers.

`batches.py` draws the batches, `scoring.py` scores them without gradients, `gradients.py` with a backward, `suite.py`
measures and tabulates. Another kind of step is another `Step` of `suite.STEPS`.
"""

from benchmarks.suites.training.suite import SUITE

__all__ = ["SUITE"]
