"""Choose a prompt with scikit-learn: three templates, three numbers of shots, with and without calibration.

    instruction + shots + template with a message in it     a prompt
    ├── account                                             scored: log p(this label | everything before it)
    ├── delivery ...

Messages to a shop go to one of five desks. `GridSearchCV` tries 18 candidates in 3-fold cross-validation on the tuning
questions; all of them share one cache. The best one is then asked about the other questions, which nothing was chosen
on; and `TunedThresholdClassifierCV` chooses, again on the tuning questions, from which probability on a message goes to
one of the desks.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence

import numpy as np
from intents import DATA, print_row, read_questions
from sklearn.base import clone
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, TunedThresholdClassifierCV

from backprompt import LM
from backprompt.integrations.sklearn import PromptClassifier
from demo_model import add_model_argument, load_model

DESKS = {
    "account": ("reset a password", "delete an account"),
    "delivery": ("track an order", "change the delivery address"),
    "payment": ("get an invoice", "report a failed payment", "use a discount code"),
    "returns": ("return an item", "report a damaged item", "cancel an order"),
    "other": ("ask if something is in stock", "none of these"),
}
DESK_OF_INTENT = {intent: desk for desk, intents in DESKS.items() for intent in intents}
ONE_DESK = "returns"

INSTRUCTION = "Messages to our online kitchen shop.\n\n"
GRID = {
    "calibrate_on": [None, "training"],
    "template": ["Message: {text}\nDesk:", 'Customer: "{text}"\nThis is about', "{text} ->"],
    "shots": [0, 4, 8],
}
FOLDS = StratifiedKFold(3)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_argument(parser)
    lm = load_model(parser.parse_args(argv).model)
    messages, desks = read_messages("tuning_questions.tsv")
    new_messages, new_desks = read_messages("questions.tsv")
    print(f"{len(messages)} messages to tune on, {len(new_messages)} others, {len(DESKS)} desks.\n")

    before = lm.stats
    search = tune(lm, messages, desks)
    searched = lm.stats
    tune(lm, messages, desks)
    searched_again = lm.stats
    print_scores(search)
    print_best(search, new_messages, new_desks)
    print_threshold(search.best_estimator_, messages, desks, new_messages, new_desks)

    stats = searched - before
    print_row("\ntokens in all strings", f"{stats.tokens_requested:,}", "of the search")
    print_row(
        "tokens computed", f"{stats.tokens_computed:,}", f"1 in {stats.tokens_requested / stats.tokens_computed:.1f}"
    )
    print_row("for a second search", f"{(searched_again - searched).tokens_computed:,}")


def read_messages(name: str) -> tuple[list[str], list[str]]:
    """The messages of a file, and the desk of each."""
    questions = read_questions(DATA / name)
    return [question.string for question in questions], [DESK_OF_INTENT[question.intent] for question in questions]


def tune(lm: LM, messages: Sequence[str], desks: Sequence[str]) -> GridSearchCV:
    """The search, which ends with the best candidate fitted on all the messages."""
    classifier = PromptClassifier(lm, GRID["template"][0], instruction=INSTRUCTION)
    return GridSearchCV(classifier, GRID, cv=FOLDS, error_score="raise").fit(messages, desks)


def print_scores(search: GridSearchCV) -> None:
    """A row a template: the accuracy with each number of shots, as it is and calibrated."""
    names = {None: "as it is", "training": "calibrated"}
    width = 7 * len(GRID["shots"])
    print("Share that is right in 3-fold cross-validation, by the number of shots:")
    print(f"{'':<34}" + "".join(f"{names[value]:>{width}}" for value in GRID["calibrate_on"]))
    print(f"{'template':<34}" + "".join(f"{shots:>7}" for _ in GRID["calibrate_on"] for shots in GRID["shots"]))
    scores = search.cv_results_["mean_test_score"]
    params = search.cv_results_["params"]
    for template in GRID["template"]:
        row = [score for score, candidate in zip(scores, params, strict=True) if candidate["template"] == template]
        print(f"{template!r:<34}" + "".join(f"{score:>7.2f}" for score in row))


def print_best(search: GridSearchCV, messages: Sequence[str], desks: Sequence[str]) -> None:
    """What the search chose, and how it does on messages that nothing was chosen on, next to the first candidate."""
    best = search.best_estimator_
    first = clone(best).set_params(**search.cv_results_["params"][0]).fit(*read_messages("tuning_questions.tsv"))
    how = "as it is" if best.calibrate_on is None else "calibrated"
    frequent, count = Counter(desks).most_common(1)[0]
    print(f"\nBest: {best.template!r} with {best.shots} shots, {how}.")
    print(
        f"Of the {len(messages)} other messages it sends {num_right(best, messages, desks)} to the right desk;", end=" "
    )
    print(f"{first.template!r}, as it is and without shots,\n{num_right(first, messages, desks)};", end=" ")
    print(f"and {count} are for {frequent!r}.")


def num_right(classifier: PromptClassifier, messages: Sequence[str], desks: Sequence[str]) -> int:
    return int((classifier.predict(messages) == desks).sum())


def print_threshold(
    best: PromptClassifier,
    messages: Sequence[str],
    desks: Sequence[str],
    new_messages: Sequence[str],
    new_desks: Sequence[str],
) -> None:
    """Whether a message is for one desk, at the usual threshold and at one that the tuning questions choose."""
    classifier = clone(best).set_params(labels={True: ONE_DESK, False: "other"})
    tuned = TunedThresholdClassifierCV(classifier, scoring="balanced_accuracy", cv=FOLDS)
    tuned.fit(messages, np.array(desks) == ONE_DESK)
    is_for_it = np.array(new_desks) == ONE_DESK
    print(f"\nIs it for {ONE_DESK!r} or not? Of the other messages, {is_for_it.sum()} are.")
    print(f"{'':<34}{'found':>7}{'false alarms':>14}{'balanced accuracy':>19}")
    thresholds = {"from probability 0.50 on": tuned.estimator_}
    thresholds[f"from {tuned.best_threshold_:.2f} on, as tuned"] = tuned
    for name, chosen in thresholds.items():
        found = chosen.predict(new_messages)
        score = balanced_accuracy_score(is_for_it, found)
        print(f"{name:<34}{(found & is_for_it).sum():>7}{(found & ~is_for_it).sum():>14}{score:>19.2f}")


if __name__ == "__main__":
    main()
