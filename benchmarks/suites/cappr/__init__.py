"""`backprompt.classify` against CAPPr itself."""

from benchmarks.suites.cappr.suite import SUITE

__all__ = ["SUITE"]
