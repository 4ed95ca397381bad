"""Choose a prompt with scikit-learn: three templates, three numbers of shots, with and without calibration.

    instruction + shots + template with a message in it     a prompt
    ├── password, login, personal data                      scored: log p(these tokens | everything before them)
    ├── delivery, tracking, address ...

Messages to a shop go to one of five desks. `GridSearchCV` tries 18 candidates in 3-fold cross-validation on the tuning
questions; all of them share one cache. The best candidate then classifies the other questions, on which nothing was
chosen. `TunedThresholdClassifierCV` chooses, again on the tuning questions, the probability from which on a message
goes to one of the desks.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from intents import DATA, print_row, read_questions
from sklearn.base import clone
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, TunedThresholdClassifierCV

from backprompt import LM
from backprompt.integrations.sklearn import PromptClassifier
from demo_model import add_model_argument, load_model


@dataclass(frozen=True)
class Desk:
    """A desk that answers messages of some intents, and the keywords that stand for them in the prompt."""

    keywords: str
    intents: tuple[str, ...]


DESKS = {
    "account": Desk("password, login, personal data", ("reset a password", "delete an account")),
    "delivery": Desk("delivery, tracking, address", ("track an order", "change the delivery address")),
    "payment": Desk("invoice, card, voucher", ("get an invoice", "report a failed payment", "use a discount code")),
    "returns": Desk("return, broken, cancel", ("return an item", "report a damaged item", "cancel an order")),
    "other": Desk("stock, other topic", ("ask if something is in stock", "none of these")),
}
DESK_OF_INTENT = {intent: name for name, desk in DESKS.items() for intent in desk.intents}
ONE_DESK = "returns"

INSTRUCTION = "Messages to our online kitchen shop, with keywords.\n\n"
LABELS = {name: desk.keywords for name, desk in DESKS.items()}
GRID = {
    "calibrate_on": [None, "training"],
    "template": ["Message: {text}\nKeywords:", "Message: {text}\nDesk:", "{text} ->"],
    "shots": [0, 4, 8],
}
NAMES = {None: "as it is", "training": "calibrated"}  # of the values of `calibrate_on`
FOLDS = StratifiedKFold(3)


@dataclass(frozen=True)
class Messages:
    """The customers' messages, and the desk of each."""

    strings: np.ndarray
    desks: np.ndarray


def read_messages(name: str) -> Messages:
    questions = read_questions(DATA / name)
    strings = [question.string for question in questions]
    return Messages(np.array(strings), np.array([DESK_OF_INTENT[question.intent] for question in questions]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_argument(parser)
    lm = load_model(parser.parse_args(argv).model)
    tuning, others = read_messages("tuning_questions.tsv"), read_messages("questions.tsv")
    print(f"{len(tuning.strings)} messages to tune on, {len(others.strings)} others, {len(DESKS)} desks.\n")

    before = lm.stats
    search = tune(lm, tuning)
    searched = lm.stats
    tune(lm, tuning)
    searched_again = lm.stats
    print_scores(search)
    print_best(search, tuning, others)
    print_threshold(search.best_estimator_, tuning, others)

    stats = searched - before
    print()
    print_row("tokens in all strings", f"{stats.tokens_requested:,}", "of the search")
    print_row(
        "tokens computed", f"{stats.tokens_computed:,}", f"1 in {stats.tokens_requested / stats.tokens_computed:.1f}"
    )
    print_row("for a second search", f"{(searched_again - searched).tokens_computed:,}")


def tune(lm: LM, messages: Messages) -> GridSearchCV:
    """The search, which ends with the best candidate fitted on all the messages."""
    classifier = PromptClassifier(lm, GRID["template"][0], LABELS, instruction=INSTRUCTION)
    return GridSearchCV(classifier, GRID, cv=FOLDS, error_score="raise").fit(messages.strings, messages.desks)


def print_scores(search: GridSearchCV) -> None:
    """A row for each template: the accuracy with each number of shots, uncalibrated and calibrated."""
    width = 7 * len(GRID["shots"])
    print("Share that is right in 3-fold cross-validation, by the number of shots:")
    print(f"{'':<34}" + "".join(f"{NAMES[value]:>{width}}" for value in GRID["calibrate_on"]))
    print(f"{'template':<34}" + "".join(f"{shots:>7}" for _ in GRID["calibrate_on"] for shots in GRID["shots"]))
    scores, params = search.cv_results_["mean_test_score"], search.cv_results_["params"]
    for template in GRID["template"]:
        row = [score for score, candidate in zip(scores, params, strict=True) if candidate["template"] == template]
        print(f"{template!r:<34}" + "".join(f"{score:>7.2f}" for score in row))


def print_best(search: GridSearchCV, tuning: Messages, others: Messages) -> None:
    """The choice of the search, and its accuracy on messages on which nothing was chosen, next to the first
    candidate."""
    best = search.best_estimator_
    first = clone(best).set_params(**search.cv_results_["params"][0]).fit(tuning.strings, tuning.desks)
    print(f"\nThe best of them: {best.template!r}, {best.shots} shots, {NAMES[best.calibrate_on]}.")
    print(f"{f'Of the {len(others.strings)} other messages':<34}{'right':>7}")
    for name, classifier in (("the best of them", best), ("the first of them", first)):
        print(f"{name:<34}{(classifier.predict(others.strings) == others.desks).sum():>7}")
    print(f"{'always the most frequent desk':<34}{Counter(others.desks).most_common(1)[0][1]:>7}")


def print_threshold(best: PromptClassifier, tuning: Messages, others: Messages) -> None:
    """Whether a message is for one desk, at the usual threshold and at one that the tuning questions choose."""
    classifier = clone(best).set_params(labels={True: LABELS[ONE_DESK], False: "other topic"})
    tuned = TunedThresholdClassifierCV(classifier, scoring="balanced_accuracy", cv=FOLDS)
    tuned.fit(tuning.strings, tuning.desks == ONE_DESK)
    is_for_it = others.desks == ONE_DESK
    print(f"\nFor {ONE_DESK!r}, or not? Of the {len(is_for_it)} other messages {is_for_it.sum()} are.")
    print(f"{'':<34}{'found':>7}{'false alarms':>14}{'balanced accuracy':>19}")
    thresholds = {"from probability 0.50 on": tuned.estimator_}
    thresholds[f"from {tuned.best_threshold_:.2f} on, as tuned"] = tuned
    for name, chosen in thresholds.items():
        found = chosen.predict(others.strings)
        score = balanced_accuracy_score(is_for_it, found)
        print(f"{name:<34}{(found & is_for_it).sum():>7}{(found & ~is_for_it).sum():>14}{score:>19.2f}")


if __name__ == "__main__":
    main()
