"""All that `import backprompt` offers, imported when the first of it is asked for: see `__getattr__` of the package."""

from backprompt import classify
from backprompt._chat import chat
from backprompt._draw import draw
from backprompt._explain import explain
from backprompt._generate import Stream, generate
from backprompt._graph import to_networkx
from backprompt._plot import plot_probabilities
from backprompt._show import ShownText, ShownToken
from backprompt._verify import NodeDrift, Verification, verify
from backprompt.bound import evaluate
from backprompt.continued import GeneratedText
from backprompt.drawing import Drawing
from backprompt.errors import (
    BackpromptError,
    DamagedEntryError,
    DrawingError,
    DriftError,
    EmptyTextError,
    EntryTooLargeError,
    GenerationError,
    GroupError,
    JoinError,
    MemoryBudgetError,
    MissingDependencyError,
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
from backprompt.explanation import Divergence, Explanation
from backprompt.extents import Extent, Join
from backprompt.independence import IndependenceGap, independence_gap
from backprompt.lm import LM
from backprompt.loading import load
from backprompt.lookup import Piece
from backprompt.missing import Miss
from backprompt.representation import ModelRepr, Pin
from backprompt.scores import TokenScores
from backprompt.selected import SelectedText
from backprompt.stats import Stats
from backprompt.store import DiskStore, MemoryStore, Store
from backprompt.text import Text, eager, parallel

__all__ = [
    "LM",
    "BackpromptError",
    "DamagedEntryError",
    "DiskStore",
    "Divergence",
    "Drawing",
    "DrawingError",
    "DriftError",
    "EmptyTextError",
    "EntryTooLargeError",
    "Explanation",
    "Extent",
    "GeneratedText",
    "GenerationError",
    "GroupError",
    "IndependenceGap",
    "Join",
    "JoinError",
    "MemoryBudgetError",
    "MemoryStore",
    "Miss",
    "MissingDependencyError",
    "MixedModelsError",
    "ModelLoadError",
    "ModelRepr",
    "NoStoreError",
    "NodeDrift",
    "NonFiniteError",
    "NotPicklableError",
    "Piece",
    "Pin",
    "SelectedText",
    "ShownText",
    "ShownToken",
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
    "Verification",
    "chat",
    "classify",
    "draw",
    "eager",
    "evaluate",
    "explain",
    "generate",
    "independence_gap",
    "load",
    "parallel",
    "plot_probabilities",
    "to_networkx",
    "verify",
]
