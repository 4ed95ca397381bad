"""All public names of `backprompt`, imported when the first of them is used: see `__getattr__` of the package."""

from backprompt import classify
from backprompt.asynchronous import AsyncStream
from backprompt.bound import evaluate
from backprompt.drawing import Drawing
from backprompt.errors import (
    AdapterError,
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
    WorkerError,
)
from backprompt.evaluation.lookup import Piece
from backprompt.evaluation.scores import TokenScores
from backprompt.generation.chat import chat
from backprompt.generation.continued import GeneratedText
from backprompt.generation.generate import Stream, generate
from backprompt.generation.selected import SelectedText
from backprompt.inspection.draw import draw
from backprompt.inspection.explain import explain
from backprompt.inspection.explanation import Divergence, Explanation
from backprompt.inspection.graph import to_networkx
from backprompt.inspection.independence import IndependenceGap, independence_gap
from backprompt.inspection.missing import Miss
from backprompt.inspection.plot import plot_attention, plot_probabilities
from backprompt.inspection.show import ShownText, ShownToken
from backprompt.inspection.verify import NodeDrift, Verification, verify
from backprompt.lm import LM
from backprompt.loading import load
from backprompt.session.distributions import Entropies, TopLogprobs
from backprompt.session.representation import ModelRepr, Pin
from backprompt.session.stats import Stats
from backprompt.store import CachedStore, DiskStore, MemoryStore, ObjectStore, Store
from backprompt.text.extents import Extent, Join
from backprompt.text.node import Text, eager, parallel
from backprompt.tokens.constraints import Grammar, JsonSchema, Regex

__all__ = [
    "LM",
    "AdapterError",
    "AsyncStream",
    "BackpromptError",
    "CachedStore",
    "DamagedEntryError",
    "DiskStore",
    "Divergence",
    "Drawing",
    "DrawingError",
    "DriftError",
    "EmptyTextError",
    "Entropies",
    "EntryTooLargeError",
    "Explanation",
    "Extent",
    "GeneratedText",
    "GenerationError",
    "Grammar",
    "GroupError",
    "IndependenceGap",
    "Join",
    "JoinError",
    "JsonSchema",
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
    "ObjectStore",
    "Piece",
    "Pin",
    "Regex",
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
    "TopLogprobs",
    "UnboundTextError",
    "UnsupportedModelError",
    "Verification",
    "WorkerError",
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
    "plot_attention",
    "plot_probabilities",
    "to_networkx",
    "verify",
]
