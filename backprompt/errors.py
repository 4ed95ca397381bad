"""The errors of backprompt: one small family, each also a built-in kind.

Every message says what was given, what was needed and what to do instead. `except BackpromptError` catches them
all; `except ValueError` and the like keep working for callers who do not know this library.
"""

from backprompt.visible import visible_lines


class BackpromptError(Exception):
    """Base of every error that backprompt raises on purpose."""

    def __str__(self) -> str:
        """Return the message, fit to be shown: it may quote texts, file names and other people's messages."""
        return visible_lines(super().__str__())


class TextTypeError(BackpromptError, TypeError):
    """Something that is neither a `str` nor a `Text` was used as one, or something that is no sequence as several."""


class MixedModelsError(BackpromptError, ValueError):
    """Texts of two different `LM` objects met in one text."""


class UnboundTextError(BackpromptError, ValueError):
    """A text without a model was asked for something that only a model or a tokenizer can tell."""


class EmptyTextError(BackpromptError, ValueError):
    """A text of zero tokens was evaluated; nothing predicts from nothing."""


class TextTooLongError(BackpromptError, ValueError):
    """A text has more tokens than the model has positions."""


class TokenIdError(BackpromptError, IndexError):
    """A token id that the model's embedding does not have."""


class TokenizerError(BackpromptError, ValueError):
    """The tokenizer cannot encode what it was given in the way that was asked for."""


class GroupError(BackpromptError, ValueError):
    """What was asked for does not exist for a text with groups or frozen segments, or for one that ends in a group."""


class JoinError(BackpromptError, ValueError):
    """Under `joins="error"`: joining two segments changed their tokens."""


class UnsupportedModelError(BackpromptError, NotImplementedError):
    """The model cannot be evaluated in packed passes with the numbers of its plain call."""


class NonFiniteError(BackpromptError, ArithmeticError):
    """The model returned NaN or infinity, or gives probability 0 to all that there is to choose from."""


class DriftError(BackpromptError, ArithmeticError):
    """What was computed lies further from the model's plain call than was tolerated."""


class GenerationError(BackpromptError, ValueError):
    """Options of `generate` that contradict each other, that it does not have, or that leave no token to choose."""


class MemoryBudgetError(BackpromptError, MemoryError):
    """What was asked to be held does not fit the `LM`'s `memory_bytes`."""


class DamagedEntryError(BackpromptError, ValueError):
    """An entry is not what was written, or not what an entry is made of.

    Where one is read it is caught: it is reported and set aside, and evaluation goes on.
    """


class StoreVersionError(BackpromptError, ValueError):
    """A store was written by another version of backprompt, in a format that this one does not read."""


class EntryTooLargeError(BackpromptError, OSError):
    """What was to be stored is larger than the store may be."""


class NoStoreError(BackpromptError, RuntimeError):
    """Something was to be stored, but the `LM` has no store."""


class StaleRepresentationError(BackpromptError, RuntimeError):
    """A `ModelRepr` was read after the weights that it was computed with had changed, or they changed meanwhile."""


class ModelLoadError(BackpromptError, OSError):
    """A model or its tokenizer could not be loaded."""


class DrawingError(BackpromptError, RuntimeError):
    """A picture could not be made: there is nothing to lay it out or to draw it with, or no such format."""


class MissingDependencyError(BackpromptError, ImportError):
    """A package that an optional feature needs is not installed."""


class NotPicklableError(BackpromptError, TypeError):
    """An `LM` was pickled; it holds a model, a lock and a cache of tensors."""


class CommandError(BackpromptError, ValueError):
    """The command line was given what it cannot use: a file, a row of it, or options that contradict each other."""
