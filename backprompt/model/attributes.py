"""A monitor of one attribute of all modules of a model; its values are compared by identity."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence


class AttributeMonitor:
    """Notices if an attribute of a module has become another object, or if a module has gained the attribute.

    Args:
        tables: each module's own attributes, `vars(module)`.
        name: the name of the attribute. A check is quickest if no module has the attribute, which is the usual case.

    """

    def __init__(self, tables: Sequence[Mapping[str, object]], name: str) -> None:
        self._tables = tables
        self._name = name
        self._get = operator.methodcaller("get", name)
        self._is_nowhere = not self._is_somewhere()
        self._values = self._read()

    def has_changed(self) -> bool:
        """Return whether the attribute of a module is another object than at construction."""
        if self._is_nowhere:
            return self._is_somewhere()
        return not all(map(operator.is_, self._read(), self._values))

    def _is_somewhere(self) -> bool:
        name = self._name
        return bool([1 for table in self._tables if name in table])  # quicker than `any` of a generator

    def _read(self) -> list[object]:
        return list(map(self._get, self._tables))
