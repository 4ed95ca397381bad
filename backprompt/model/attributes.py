"""A monitor of two attributes of all modules of a model; their values are compared by identity."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence


class AttributeMonitor:
    """Notices if an attribute of a module has become another object, or if a module has gained an attribute.

    Args:
        tables: each module's own attributes, `vars(module)`.
        names: the names of the attributes. A check is quickest if no module has one, which is the usual case.

    """

    def __init__(self, tables: Sequence[Mapping[str, object]], names: tuple[str, str]) -> None:
        self._tables = tables
        self._names = names
        self._are_nowhere = not self._are_somewhere()
        self._values = self._read()

    def have_changed(self) -> bool:
        """Return whether an attribute of a module is another object than at construction."""
        if self._are_nowhere:
            return self._are_somewhere()
        return not all(map(operator.is_, self._read(), self._values))

    def _are_somewhere(self) -> bool:
        first, second = self._names
        return bool([1 for table in self._tables if first in table or second in table])  # quicker than `any`

    def _read(self) -> list[object]:
        return [table.get(name) for name in self._names for table in self._tables]
