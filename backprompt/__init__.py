"""Compose prompts with `+` and evaluate a forest of them in packed passes, each distinct token once."""

from backprompt.errors import (
    BackpromptError,
    DamagedEntryError,
    EmptyTextError,
    JoinError,
    MemoryBudgetError,
    MixedModelsError,
    ModelLoadError,
    NonFiniteError,
    NoStoreError,
    NotPicklableError,
    StaleRepresentationError,
    StoreVersionError,
    TextTooLongError,
    TextTypeError,
    TokenIdError,
    TokenizerError,
    UnboundTextError,
    UnsupportedModelError,
)
from backprompt.lm import LM, Stats, evaluate, load
from backprompt.representation import ModelRepr, Pin
from backprompt.store import DiskStore, MemoryStore, Store
from backprompt.text import Text, eager
from backprompt.tokens import Join

__version__ = "0.1.0"

__all__ = [
    "LM",
    "BackpromptError",
    "DamagedEntryError",
    "DiskStore",
    "EmptyTextError",
    "Join",
    "JoinError",
    "MemoryBudgetError",
    "MemoryStore",
    "MixedModelsError",
    "ModelLoadError",
    "ModelRepr",
    "NoStoreError",
    "NonFiniteError",
    "NotPicklableError",
    "Pin",
    "StaleRepresentationError",
    "Stats",
    "Store",
    "StoreVersionError",
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
