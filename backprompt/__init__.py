"""Compose prompts with `+` and evaluate a forest of them in packed passes, each distinct token once."""

from backprompt import classify
from backprompt._chat import chat
from backprompt._draw import Drawing, draw
from backprompt._generate import GeneratedText, SelectedText, Stream, generate
from backprompt._graph import to_networkx
from backprompt.errors import (
    BackpromptError,
    DamagedEntryError,
    DrawingError,
    EmptyTextError,
    EntryTooLargeError,
    GenerationError,
    GroupError,
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
from backprompt.evaluator import TokenScores
from backprompt.independence import IndependenceGap, independence_gap
from backprompt.lm import LM, Stats, evaluate, load
from backprompt.lookup import Piece
from backprompt.representation import ModelRepr, Pin
from backprompt.store import DiskStore, MemoryStore, Store
from backprompt.text import Text, eager, parallel
from backprompt.tokens import Join

__version__ = "0.1.0"

__all__ = [
    "LM",
    "BackpromptError",
    "DamagedEntryError",
    "DiskStore",
    "Drawing",
    "DrawingError",
    "EmptyTextError",
    "EntryTooLargeError",
    "GeneratedText",
    "GenerationError",
    "GroupError",
    "IndependenceGap",
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
    "Piece",
    "Pin",
    "SelectedText",
    "StaleRepresentationError",
    "Stats",
    "Store",
    "StoreVersionError",
    "Stream",
    "Text",
    "TextTooLongError",
    "TextTypeError",
    "TokenIdError",
    "TokenScores",
    "TokenizerError",
    "UnboundTextError",
    "UnsupportedModelError",
    "chat",
    "classify",
    "draw",
    "eager",
    "evaluate",
    "generate",
    "independence_gap",
    "load",
    "parallel",
    "to_networkx",
]
