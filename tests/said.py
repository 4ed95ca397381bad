"""What a process said on standard error, without what libraries say while they are imported."""

import re

# transformers imports torchao where it is installed. It says what it cannot load, and torch comments on it.
_OF_LIBRARIES = re.compile(r"torchao/|torch/utils/_pytree")


def own_lines(said: str) -> list[str]:
    """Return the lines that are not those of such libraries."""
    return [line for line in said.splitlines() if not _OF_LIBRARIES.search(line)]
