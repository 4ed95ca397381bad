"""Compose prompts with `+` and evaluate a forest of them in packed passes, each distinct token once.

`_public.py` holds the public names and is imported when the first of them is used. Importing torch and transformers
takes seconds; the command line answers `--help` and interrupts (Ctrl-C) without this wait.
"""

import logging as _logging
import typing as _typing
from functools import partial as _partial
from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec

from backprompt.text import engine as _engine
from backprompt.version import __version__ as __version__

if _typing.TYPE_CHECKING:
    from backprompt._public import *  # noqa: F403
    from backprompt._public import __all__ as __all__


_OUTSIDE = {
    _engine.FACTORY: "lm.shared_lm",
    "generate": "generation.generate.generate",
    "select": "generation.selected.select",
    "probability_of": "classify.language.probability_of",
    "stream": "generation.generate.stream",
    "draw": "inspection.draw.draw",
    "show": "inspection.show.show",
    "entropies": "bound.entropies",
    "top_logprobs": "bound.top_logprobs",
}
"""The places of the functions that texts call by name, so that `text/node.py` imports none of them."""


def _find(place: str) -> _typing.Any:
    module, function = place.rsplit(".", 1)
    return getattr(_import_module(f"{__name__}.{module}"), function)


for _name, _place in _OUTSIDE.items():
    _engine.register(_name, _partial(_find, _place))

_logging.getLogger(__name__).addHandler(_logging.NullHandler())  # silent unless the program configures logging


def __getattr__(name: str) -> _typing.Any:
    """Return a public name or a module of the package; both become attributes on first use."""
    if name == "__all__" or not name.startswith("__"):
        if _find_spec(f"{__name__}.{name}") is not None:
            return _import_module(f"{__name__}.{name}")
        public = _import_module(f"{__name__}._public")
        if name in ("__all__", *public.__all__):
            value = globals()[name] = getattr(public, name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names of the package, including those that are not imported yet."""
    return sorted({*globals(), *__getattr__("__all__")})
