"""The errors of backprompt: subclasses of `BackpromptError`, each also a subclass of a built-in error.

Every message names the given value, the needed value and the next step. `except BackpromptError` catches all of
them. Callers who do not know this library catch them with `except ValueError` and the like.
"""

from backprompt.visible import visible_lines


class BackpromptError(Exception):
    """Base of every error that backprompt raises on purpose."""

    def __str__(self) -> str:
        """Return the message with invisible characters escaped: it may quote texts, file names and other messages."""
        return visible_lines(super().__str__())


class TextTypeError(BackpromptError, TypeError):
    """A value has the wrong type where a `str`, a `Text` or a sequence is needed."""


class MixedModelsError(BackpromptError, ValueError):
    """Texts of two different `LM` objects met in one text."""


class UnboundTextError(BackpromptError, ValueError):
    """A text without a model was asked for a result that needs a model or a tokenizer."""


class EmptyTextError(BackpromptError, ValueError):
    """A text of zero tokens was evaluated; a prediction needs at least one token."""


class TextTooLongError(BackpromptError, ValueError):
    """A text has more tokens than the model has positions."""


class TokenIdError(BackpromptError, IndexError):
    """A token id is not in the model's embedding, or stands for an image or a sound."""


class TokenizerError(BackpromptError, ValueError):
    """The tokenizer cannot encode the given text in the requested way."""


class GroupError(BackpromptError, ValueError):
    """The request is undefined for texts with groups or frozen segments, or for texts that end in a group."""


class JoinError(BackpromptError, ValueError):
    """Under `joins="error"`: joining two segments changed their tokens."""


class UnsupportedModelError(BackpromptError, NotImplementedError):
    """Packed passes cannot reproduce the numbers of the model's plain call."""


class AdapterError(BackpromptError, ValueError):
    """A segment names an adapter that the model does not have, or that cannot be active for some tokens only."""


class NonFiniteError(BackpromptError, ArithmeticError):
    """The model returned NaN or infinity, or gives probability 0 to every available choice."""


class DriftError(BackpromptError, ArithmeticError):
    """Results differ from the model's plain call by more than the tolerance."""


class GenerationError(BackpromptError, ValueError):
    """Options of `generate` contradict each other, do not exist, or leave no token to choose."""


class MemoryBudgetError(BackpromptError, MemoryError):
    """The pinned texts together do not fit the `LM`'s `memory_bytes`."""


class DamagedEntryError(BackpromptError, ValueError):
    """An entry of a store differs from the one that was written, or is not a valid entry.

    Stores catch this error on reading: the entry is reported and set aside, and evaluation continues.
    """


class StoreVersionError(BackpromptError, ValueError):
    """A store was written by another version of backprompt, in a format that this version does not read."""


class EntryTooLargeError(BackpromptError, OSError):
    """An entry to be stored is larger than the whole store may be."""


class NoStoreError(BackpromptError, RuntimeError):
    """Storing was requested, but the `LM` has no store."""


class StaleRepresentationError(BackpromptError, RuntimeError):
    """A `ModelRepr` was read after the weights behind it had changed, or the weights changed during the call."""


class ModelLoadError(BackpromptError, OSError):
    """A model or its tokenizer could not be loaded."""


class DrawingError(BackpromptError, RuntimeError):
    """A picture could not be made: a program for layout or drawing is missing, or the format does not exist."""


class MissingDependencyError(BackpromptError, ImportError):
    """A package that an optional feature needs is not installed."""


class WorkerError(BackpromptError, RuntimeError):
    """A worker of an engine died over the same work twice, or could not be started again."""


class NotPicklableError(BackpromptError, TypeError):
    """An `LM` was pickled; it holds a model, a lock and a cache of tensors."""


class CommandError(BackpromptError, ValueError):
    """The command line got unusable input: a file, a row of a file, or options that contradict each other."""
