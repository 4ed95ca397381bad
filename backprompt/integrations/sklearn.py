"""A prompt as a classifier of scikit-learn: `PromptClassifier`.

The classifier scores with `backprompt.classify`; cross-validation, search, ensembles, calibration by labels and
decision thresholds are scikit-learn's own. Clones keep the `LM`, so all candidates of a search share its results.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal, TypeAlias

import numpy as np

from backprompt import classify
from backprompt.arguments import as_choice, as_int, as_list, as_number, check_encodable, is_int
from backprompt.bound import as_lm
from backprompt.classify import Aggregate, Example
from backprompt.classify.completions import EndOfPrompt, ends_behind, space_before
from backprompt.classify.weighing import Floats
from backprompt.errors import TextTypeError
from backprompt.lm import LM
from backprompt.text.node import Text
from backprompt.visible import abbreviated
from backprompt.warn import warn_caller

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import check_consistent_length, check_random_state, column_or_1d
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted
except ModuleNotFoundError as error:
    if error.name != "sklearn":
        raise
    raise ModuleNotFoundError(
        "PromptClassifier needs scikit-learn 1.6 or newer: pip install 'scikit-learn>=1.6'.",
        name="sklearn",
    ) from error

Shots: TypeAlias = "int | Sequence[tuple[str, Any]]"

FIELD = "text"
ENCODED = (
    "Within a VotingClassifier and the like, classes are the numbers 0, 1, ... in the order of the sorted classes."
)


class PromptClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    r"""Classify strings by the completion that a language model finds the most probable behind a prompt.

        instruction + shot 1 + separator + shot 2 + separator + ... + template with the input in it

    A shot is the template with an example in it, followed by the example's label; `end_of_prompt` decides whether a
    space stands between them. `backprompt.classify.predict_proba` gives the probability of each label behind the
    prompt. `fit` trains nothing: it chooses classes, shots, prior and calibration.

    `X` is a one-dimensional sequence, array or series of strings, as for scikit-learn's text vectorizers. From a data
    frame take one column, `X["message"]`.

    Clones share the `LM` and its results. An `LM` cannot be pickled: in searches leave `n_jobs` at 1 (packed passes use
    all cores), or use joblib's "threading" backend.

    Args:
        lm: the model, a `backprompt.LM` or a `(model, tokenizer)` tuple; the attribute is an `LM` in either case.
        template: the prompt of one input, with the field `{text}`: "Message: {text}\nKeywords:". Literal braces are
            doubled, as in `str.format`.
        labels: the completion of each class: a mapping from classes, or a sequence in the order of `classes_`; by
            default `str(class)`. A mapping may have more classes than the data. Some ensembles, such as
            VotingClassifier, number the sorted classes 0, 1, ... for their members, and so require a sequence.
        shots: the number of labelled examples to draw from the training data, or the `(x, class)` pairs themselves.
            Drawn shots take the classes in turn. The first 4 of 8 drawn shots are those that `shots=4` draws, so such
            prompts share them.
        instruction: the beginning of all prompts.
        separator: the string behind each shot.
        end_of_prompt: the string between prompt and label, also in shots: "auto", " " or ""; see `classify.log_probs`.
        prior: a probability for each of `classes_`; "training": the classes' frequencies in the training data; None:
            all are equal. Applied after calibration.
        calibrate_on: inputs that show the prompt's own preferences; all probabilities are divided by their mean
            probabilities. Neutral inputs such as `["N/A", ""]` (contextual calibration, Zhao et al. 2021, arXiv
            2102.09690), or "training": the training inputs that are no shots, without labels (batch calibration, Zhou
            et al. 2023, arXiv 2309.17249). None: no correction.
        aggregate: the "mean" or the "sum" of a label's token log-probabilities; see `classify.predict_proba`.
        discount_completions: see `classify.predict_proba`.
        random_state: the seed for drawing shots. With None each fit draws different shots, so fits share little.

    Attributes:
        classes_: the classes, sorted, `(classes,)`.
        completions_: the label of each class, a tuple of strings.
        shots_: the `(x, class)` pairs of the prompt.
        context_: the `Text` that all prompts begin with: instruction and shots.
        prior_: the prior, `(classes,)`, or None.
        calibration_probabilities_: the probabilities to divide by, `(classes,)`, or None.

    """

    def __init__(
        self,
        lm: LM | tuple[Any, Any],
        template: str,
        labels: Mapping[Any, str] | Sequence[str] | None = None,
        *,
        shots: Shots = 0,
        instruction: str | Text = "",
        separator: str = "\n\n",
        end_of_prompt: EndOfPrompt = "auto",
        prior: Sequence[float] | Literal["training"] | None = None,
        calibrate_on: Sequence[str] | Literal["training"] | None = None,
        aggregate: Aggregate = "mean",
        discount_completions: float = 0.0,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.lm = lm
        self.template = template
        self.labels = labels
        self.shots = shots
        self.instruction = instruction
        self.separator = separator
        self.end_of_prompt = end_of_prompt
        self.prior = prior
        self.calibrate_on = calibrate_on
        self.aggregate = aggregate
        self.discount_completions = discount_completions
        self.random_state = random_state

    @property
    def lm(self) -> LM:
        """The model."""
        return self._lm

    @lm.setter
    def lm(self, given: LM | tuple[Any, Any]) -> None:
        # The tuple is wrapped here, not in `fit`: clones share an `LM`, but copy the contents of a tuple.
        self._lm = as_lm(given) if isinstance(given, tuple) else given

    def fit(self, X: Any, y: Any) -> PromptClassifier:
        """Choose classes, shots and prior; with `calibrate_on`, score its inputs. Nothing else is computed.

        Args:
            X: `(inputs,)` strings.
            y: `(inputs,)` classes: strings, ints or booleans.

        Raises:
            TypeError, ValueError: invalid data or options, before anything is computed.

        """
        # This attribute is set last, so that a failed fit leaves an unfitted classifier.
        self.__dict__.pop("calibration_probabilities_", None)
        self._check_options()
        inputs, classes_of_inputs = _checked_inputs(X), _checked_classes(y)
        check_consistent_length(inputs, classes_of_inputs)
        self.classes_, class_idx = np.unique(classes_of_inputs, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has only one class, {self.classes_[0]!r}. A classifier needs at least two classes.")
        completions, prior = _completions(self.labels, self.classes_), _prior(self.prior, class_idx)
        checked = Example(self.template, completions, prior=prior, end_of_prompt=self.end_of_prompt)
        self.completions_, self.prior_ = checked.completions, checked.prior
        if isinstance(self.shots, Sequence):
            self.shots_ = _checked_shots(self.shots, self.classes_)
        else:
            drawn = _drawn(self.shots, class_idx, self.random_state)
            self.shots_ = [(inputs[idx], self.classes_[class_idx[idx]]) for idx in drawn]
        self.context_ = self._context()
        calibration_inputs = _calibration_inputs(self.calibrate_on, inputs, {x for x, _ in self.shots_})
        self.calibration_probabilities_ = (
            None
            if calibration_inputs is None
            else self._score(calibration_inputs, prior=None, name="calibrate_on").mean(axis=0)
        )
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "calibration_probabilities_")

    def prompts(self, X: Any) -> list[Text]:
        """Return the prompts before the labels, one `Text` per input.

        Raises:
            ValueError: a prompt is empty.
            The errors of `predict_proba` for such an `X`.

        """
        check_is_fitted(self)
        return self._prompts(_checked_inputs(X))

    def predict_proba(self, X: Any) -> Floats:
        """Return the probability of each class for each input, `(inputs, classes)`.

        Raises:
            NotFittedError: before `fit`.
            TypeError, ValueError: `X` is not one-dimensional, or not of strings.
            The errors of `classify.predict_proba`, such as TextTooLongError.

        """
        check_is_fitted(self)
        probabilities = self._score(_checked_inputs(X), self.prior_)
        if self.calibration_probabilities_ is None:
            return probabilities
        return classify.calibrate(probabilities, self.calibration_probabilities_)

    def predict_log_proba(self, X: Any) -> Floats:
        """Return the logarithms of `predict_proba`, in nats; -inf for a class that the prior excludes."""
        probabilities = self.predict_proba(X)
        with np.errstate(divide="ignore"):
            logarithms: Floats = np.log(probabilities)
        return logarithms

    def predict(self, X: Any) -> Any:
        """Return the most probable class of each input, `(inputs,)`."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.classifier_tags.poor_score = True  # on columns of numbers, which scikit-learn's checks use
        return tags

    # Prompts

    def _context(self) -> Text:
        context = Text("", self.lm) + self.instruction
        for x, label in self.shots_:
            completion = self.completions_[self.classes_.tolist().index(label)]
            prompt = context + self.template.format(text=x)
            (end,) = ends_behind(self.lm, [(prompt, self.end_of_prompt)])
            context = prompt + space_before(completion, end) + completion + self.separator
        return context

    def _prompts(self, inputs: Sequence[str], name: str = "X") -> list[Text]:
        prompts = [self.context_ + self.template.format(text=x) for x in inputs]
        for idx, prompt in enumerate(prompts):
            if not prompt.segments:
                raise ValueError(
                    f"{name}[{idx}] is an empty string, and so is its prompt. Leave this input out, or put words "
                    "into the template."
                )
        return prompts

    def _score(self, inputs: Sequence[str], prior: Any, name: str = "X") -> Floats:
        found: Floats = classify.predict_proba(
            self._prompts(inputs, name),
            self.completions_,
            self.lm,
            prior=prior,
            end_of_prompt=self.end_of_prompt,
            aggregate=self.aggregate,
            discount_completions=self.discount_completions,
            show_progress_bar=False,
        )
        return found

    # Arguments

    def _check_options(self) -> None:
        as_lm(self.lm)
        _check_template(self.template)
        for name, given, kinds in (("instruction", self.instruction, (str, Text)), ("separator", self.separator, str)):
            if not isinstance(given, kinds):
                raise TextTypeError(f"{name} must be a str, not {type(given).__name__}.")
        as_choice(self.aggregate, "aggregate", classify.AGGREGATES)
        as_number(self.discount_completions, "discount_completions")
        shots = self.shots
        if isinstance(shots, (str, Text)) or not (is_int(shots) or isinstance(shots, Sequence)):
            raise TypeError(f"shots must be a number or a list of (x, class) pairs, not {shots!r}.")
        if is_int(shots):
            as_int(shots, "shots", at_least=0)


def _check_template(template: object) -> None:
    if not isinstance(template, str):
        raise TextTypeError(f"template must be a str, not {type(template).__name__}.")
    advice = f"Write a template as in 'Message: {{{FIELD}}}\\nKeywords:'; braces that stand for themselves are doubled."
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        unknown = [name for name in names if name != FIELD]
        if not unknown:
            template.format(**{FIELD: "x"})
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"The template {template!r} is invalid: {error}. {advice}") from error
    if unknown:
        raise ValueError(f"The template {template!r} has the unknown field {{{unknown[0]}}}. {advice}")
    if not names:
        raise ValueError(f"The template {template!r} has no field {{{FIELD}}} for the input. {advice}")


def _drawn(num_shots: int, class_idx: Any, random_state: Any) -> list[int]:
    """Return the indices of the shots in the training data, in order: drawn at random, the classes taking turns."""
    if num_shots > len(class_idx):
        raise ValueError(f"shots={num_shots}, but there are only {len(class_idx)} training examples to draw from.")
    order = check_random_state(random_state).permutation(len(class_idx)).tolist()
    num_before: Counter[int] = Counter()  # of the class
    turns = {}
    for idx in order:
        turns[idx] = num_before[class_idx[idx]]
        num_before[class_idx[idx]] += 1
    return sorted(order, key=turns.__getitem__)[:num_shots]


def _calibration_inputs(given: Any, inputs: Sequence[str], shown: Set[str]) -> list[str] | None:
    if given is None:
        return None
    if not isinstance(given, str):
        return _checked_inputs(given, "calibrate_on")
    if given != "training":
        raise ValueError(f"calibrate_on must be inputs or 'training', not {given!r}. Put one input in a list.")
    rest = [x for x in inputs if x not in shown]
    if not rest:
        raise ValueError(
            "All training examples are shots, so there are none to calibrate on. Lower `shots`, or give neutral "
            "inputs: calibrate_on=['N/A']."
        )
    return rest


def _checked_inputs(given: Any, name: str = "X") -> list[str]:
    """Return strings as a list."""
    is_ordered = hasattr(given, "__len__") and hasattr(given, "__getitem__") and not isinstance(given, Mapping)
    if isinstance(given, (str, Text)) or not is_ordered:
        raise ValueError(
            f"{name} must be a sequence of strings, not {type(given).__name__}. Put a single string in a list."
        )
    num_dimensions = getattr(given, "ndim", 1)
    if num_dimensions != 1:
        raise ValueError(
            f"{name} must have one dimension, not {num_dimensions}: a string for each input. Give one column, such as "
            f'{name}["message"] of a data frame or {name}[:, 0] of an array.'
        )
    inputs = list(given)
    if not inputs:
        raise ValueError(f"{name} is empty: 0 samples, where at least 1 is needed.")
    for idx, x in enumerate(inputs):
        if not isinstance(x, str):
            raise TextTypeError(
                f"{name}[{idx}] is a {type(x).__name__}, not a str: {abbreviated(x)}. Convert inputs to strings, and "
                "fill or drop missing ones."
            )
        check_encodable(x, f"{name}[{idx}]")
    return inputs


def _checked_classes(y: Any) -> Any:
    """Return the class of each input as an array, `(inputs,)`."""
    if y is None:
        raise ValueError("PromptClassifier requires y to be passed, but the target y is None: the class of each input.")
    classes = column_or_1d(y, warn=True)
    check_classification_targets(classes)
    return classes


def _completions(labels: Mapping[Any, str] | Sequence[str] | None, classes: Any) -> list[Any]:
    """Return the completion of each class."""
    listed = classes.tolist()
    if labels is None:
        if listed == list(range(len(listed))) and not isinstance(listed[0], bool):
            warn_caller(
                f"The classes are the numbers 0 to {listed[-1]}, and so are the completions that are scored. If "
                f"the numbers stand for names, give `labels`, a sequence of strings. {ENCODED}"
            )
        return list(map(str, listed))
    if isinstance(labels, Mapping):
        missing = [label for label in listed if label not in labels]
        if missing:
            raise ValueError(
                f"labels has no completion for the class {missing[0]!r}; it has completions of "
                f"{', '.join(map(repr, labels))}. Add this class, or give a sequence in the order of the sorted "
                "classes. "
                f"{ENCODED}"
            )
        return [labels[label] for label in listed]
    given = as_list(labels, "labels must be a mapping or a sequence of strings")
    if len(given) != len(listed):
        raise ValueError(
            f"labels has {len(given)} completions for {len(listed)} classes, {', '.join(map(repr, listed))}. Give "
            "one for each class, in this order, or a mapping from classes."
        )
    return given


def _prior(prior: Any, class_idx: Any) -> Any:
    """Return a probability for each class, or None; `Example` checks it."""
    if not isinstance(prior, str):
        return prior
    if prior != "training":
        raise ValueError(f"prior must be 'training', a probability for each class, or None, not {prior!r}.")
    counts = np.bincount(class_idx)
    return counts / counts.sum()


def _checked_shots(shots: Sequence[Any], classes: Any) -> list[tuple[str, Any]]:
    listed = classes.tolist()
    checked = []
    for idx, shot in enumerate(shots):
        if isinstance(shot, (str, Text)) or not isinstance(shot, Sequence) or len(shot) != 2:
            raise TypeError(f"shots[{idx}] must be a pair (x, class), not {shot!r}.")
        x, label = shot
        if not isinstance(x, str):
            raise TextTypeError(f"shots[{idx}] has a {type(x).__name__} as its input, not a str: {abbreviated(x)}.")
        if label not in listed:
            raise ValueError(
                f"shots[{idx}] has the class {label!r}, but y has only {', '.join(map(repr, listed))}. {ENCODED}"
            )
        checked.append((x, label))
    return checked
