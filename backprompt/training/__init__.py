"""Tensors for trainers: log-probabilities of padded batches, each distinct token of the rows forwarded once.

The public names are imported when they are first used. `rows.py` knows how trainers pad, and nothing of models.
Modules of this folder may import `LM`, and the folders that `LM` may import. The results depend on no text and no
tokenizer.
"""

import typing as _typing
from importlib import import_module as _import_module

if _typing.TYPE_CHECKING:
    from backprompt.training.results import Account as Account
    from backprompt.training.results import RowScores as RowScores
    from backprompt.training.rows import PaddedRows as PaddedRows
    from backprompt.training.scores import token_logprobs as token_logprobs
    from backprompt.training.states import RowStates as RowStates
    from backprompt.training.states import hidden_states as hidden_states

_PLACES = {
    "Account": "results",
    "PaddedRows": "rows",
    "RowScores": "results",
    "RowStates": "states",
    "hidden_states": "states",
    "token_logprobs": "scores",
}

__all__ = ["Account", "PaddedRows", "RowScores", "RowStates", "hidden_states", "token_logprobs"]


def __getattr__(name: str) -> _typing.Any:
    """Return a public name, which stays as an attribute."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(f"{__name__}.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    """Return the names of the module, including those that are not imported yet."""
    return sorted({*globals(), *__all__})
