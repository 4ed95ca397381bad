"""The suites, a file or a folder each, which has a `SUITE`. To add one, add its file; nothing else knows them."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from benchmarks.suite import Suite


def find_suites() -> list[Suite]:
    """All suites, in the order in which they run and are listed."""
    found = [import_module(f"{__name__}.{module.name}").SUITE for module in iter_modules(__path__)]
    return sorted(found, key=lambda suite: suite.place)
