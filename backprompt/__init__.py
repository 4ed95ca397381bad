"""Compose prompts with `+` and evaluate a forest of them in packed passes, each distinct token once."""

from backprompt.errors import (
    BackpromptError,
    EmptyTextError,
    JoinError,
    MixedModelsError,
    ModelLoadError,
    NonFiniteError,
    NotPicklableError,
    StaleRepresentationError,
    TextTooLongError,
    TextTypeError,
    TokenIdError,
    TokenizerError,
    UnboundTextError,
    UnsupportedModelError,
)
from backprompt.lm import LM, Stats, evaluate, load
from backprompt.representation import ModelRepr
from backprompt.text import Text, eager
from backprompt.tokens import Join

__version__ = "0.1.0"

__all__ = [
    "LM",
    "BackpromptError",
    "EmptyTextError",
    "Join",
    "JoinError",
    "MixedModelsError",
    "ModelLoadError",
    "ModelRepr",
    "NonFiniteError",
    "NotPicklableError",
    "StaleRepresentationError",
    "Stats",
    "Text",
    "TextTooLongError",
    "TextTypeError",
    "TokenIdError",
    "TokenizerError",
    "UnboundTextError",
    "UnsupportedModelError",
    "eager",
    "evaluate",
    "load",
]
