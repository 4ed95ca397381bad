"""PromptClassifier: classify's numbers, scikit-learn's own tools on top, and one cache for all candidates."""

import importlib
import itertools
import pickle
import sys

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import NotFittedError, SkipTestWarning
from sklearn.model_selection import GridSearchCV, StratifiedKFold, TunedThresholdClassifierCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks
from sklearn.utils.validation import validate_data

from backprompt import LM, MixedModelsError, NotPicklableError, Text, TextTooLongError, classify
from backprompt.integrations.sklearn import PromptClassifier
from comparing import beginnings
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

TEMPLATE = "Review: {text}\nLabel:"
OTHER_TEMPLATE = "{text} It was"
SENTENCES = ["the cat sat", "the film was great", "Hello there", "we'll see", "the ending wasn't", "They're sure"]
X = [f"{sentence} {number}" for number in (12, 34) for sentence in SENTENCES]
Y = ["positive", "negative", "mixed"] * 4
BINARY = ["yes", "no"] * 6
NEW = ["the mat", "General Kenobi!", "the other cat"]


def distinct_tokens(lm, prompts, completions):
    """The distinct tokens that scoring a forest forwards, each known by all that stands before it: no last ones."""
    prefixes = set()
    ids = lm.session.completion_ids([f" {completion}" for completion in completions])
    for prompt in prompts:
        for completion in ids:
            text = prompt.tokens + completion
            prefixes |= beginnings([text[:-1]])
    return prefixes


# Numbers


@pytest.mark.parametrize("options", [{}, {"aggregate": "sum"}, {"end_of_prompt": ""}, {"discount_completions": -0.5}])
def test_probabilities_are_those_of_classify(lm, options):
    shots = [("a bold one", "negative"), ("a square", "mixed")]
    end = options.get("end_of_prompt", " ")
    context = f"Reviews.\nReview: a bold one\nLabel:{end}bad##Review: a square\nLabel:{end}so so##"
    prompts = [f"{context}Review: {x}\nLabel:" for x in NEW]
    labels = {"positive": "good", "negative": "bad", "mixed": "so so"}
    classifier = PromptClassifier(
        lm, TEMPLATE, labels, shots=shots, instruction="Reviews.\n", separator="##", **options
    ).fit(X, Y)
    assert lm.stats.tokens_computed == 0, "fit computes nothing"
    assert [prompt.string for prompt in classifier.prompts(NEW)] == prompts
    assert classifier.context_.string == context
    assert classifier.classes_.tolist() == ["mixed", "negative", "positive"]
    assert classifier.completions_ == ("so so", "bad", "good")

    expected = classify.predict_proba(prompts, ["so so", "bad", "good"], lm, **options)
    found = classifier.predict_proba(NEW)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(classifier.predict_log_proba(NEW), np.log(expected))
    assert classifier.predict(NEW).tolist() == [["mixed", "negative", "positive"][row.argmax()] for row in expected]


def test_shots_have_the_space_that_the_inputs_have(lm):
    shots = [("a bold one", "yes"), ("a square", "no")]
    classifier = PromptClassifier(lm, "{text}\nLabel:\n", shots=shots, separator="##").fit(X, BINARY)
    assert classifier.context_.string == "a bold one\nLabel:\nyes##a square\nLabel:\nno##"
    (prompt,) = classifier.prompts(NEW[:1])
    expected = classify.predict_proba(prompt, ["no", "yes"], lm, end_of_prompt="")
    np.testing.assert_array_equal(classifier.predict_proba(NEW[:1])[0], expected)


def test_priors(lm):
    y = ["b"] * 6 + ["a"] * 2 + ["c"] * 4
    prompts = [f"Review: {x}\nLabel:" for x in NEW]
    for prior, expected in (("training", [2 / 12, 6 / 12, 4 / 12]), ([0.7, 0, 0.3], [0.7, 0, 0.3])):
        classifier = PromptClassifier(lm, TEMPLATE, prior=prior).fit(X, y)
        np.testing.assert_array_equal(
            classifier.predict_proba(NEW), classify.predict_proba(prompts, ["a", "b", "c"], lm, prior=expected)
        )
    assert classifier.predict_log_proba(NEW)[0, 1] == -np.inf


def test_calibration(lm):
    prompts = [f"Review: {x}\nLabel:" for x in NEW]
    labels, prior = ["mixed", "negative", "positive"], [0.2, 0.3, 0.5]
    for inputs in (["N/A"], ["N/A", ""]):
        neutral_prompts = [f"Review: {x}\nLabel:" for x in inputs]
        classifier = PromptClassifier(lm, TEMPLATE, calibrate_on=inputs, prior=prior).fit(X, Y)
        given, neutral = (
            classify.predict_proba(prompts, labels, lm, prior=prior),
            classify.predict_proba(neutral_prompts, labels, lm),
        )
        np.testing.assert_allclose(classifier.predict_proba(NEW), classify.calibrate(given, neutral))
    one = PromptClassifier(lm, TEMPLATE, calibrate_on=["N/A"]).fit(X, Y).predict_proba(NEW)
    neutral_prompt = "Review: N/A\nLabel:"
    np.testing.assert_allclose(one, classify.predict_proba(prompts, labels, lm, neutral_prompt=neutral_prompt))


def test_calibration_on_the_training_inputs_leaves_the_shots_out(lm):
    classifier = PromptClassifier(lm, TEMPLATE, shots=3, calibrate_on="training").fit(X, Y)
    rest = [x for x in X if x not in dict(classifier.shots_)]
    assert len(rest) == 9
    uncalibrated = clone(classifier).set_params(calibrate_on=None).fit(X, Y)
    mean = uncalibrated.predict_proba(rest).mean(axis=0)
    np.testing.assert_allclose(classifier.calibration_probabilities_, mean)
    np.testing.assert_allclose(classifier.predict_proba(NEW), classify.calibrate(uncalibrated.predict_proba(NEW), mean))


# Shots


def test_classes_take_turns_and_fewer_shots_are_the_first_of_more(lm):
    y = ["a"] * 8 + ["b"] * 3 + ["c"]
    contexts = []
    for num_shots in range(13):
        classifier = PromptClassifier(lm, TEMPLATE, shots=num_shots).fit(X, y)
        assert len(classifier.shots_) == num_shots
        assert set(classifier.shots_) <= set(zip(X, y, strict=True))
        contexts.append(classifier.context_.string)
    classes = [label for _, label in classifier.shots_]
    assert sorted(classes[:3]) == ["a", "b", "c"]
    assert sorted(classes[3:5]) == sorted(classes[5:7]) == ["a", "b"]
    assert classes[7:] == ["a"] * 5
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(contexts))
    assert len(set(contexts)) == 13


def test_shots_are_drawn_as_random_state_says(lm):
    def drawn(random_state):
        return PromptClassifier(lm, TEMPLATE, shots=6, random_state=random_state).fit(X, Y).shots_

    assert drawn(0) == drawn(0)
    assert drawn(1) == drawn(np.random.RandomState(1))
    assert len({tuple(drawn(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("y", "labels", "classes", "completions"),
    [
        ([3, 1] * 6, None, [1, 3], ("1", "3")),
        ([True, False] * 6, None, [False, True], ("False", "True")),
        ([True, False] * 6, {True: "good", False: "bad"}, [False, True], ("bad", "good")),
        ([1, 0] * 6, ["bad", "good"], [0, 1], ("bad", "good")),
        ([1, 0] * 6, np.array(["bad", "good"]), [0, 1], ("bad", "good")),
        (pd.Series(BINARY), {"yes": "good", "no": "bad", "unseen": "?"}, ["no", "yes"], ("bad", "good")),
        (np.array(BINARY, dtype=object), None, ["no", "yes"], ("no", "yes")),
    ],
)
def test_classes_and_their_labels(lm, y, labels, classes, completions):
    classifier = PromptClassifier(lm, TEMPLATE, labels, shots=2).fit(X, y)
    assert classifier.classes_.tolist() == classes
    assert classifier.completions_ == completions
    found = classifier.predict(NEW)
    assert found.dtype == classifier.classes_.dtype
    assert set(found.tolist()) <= set(classes)
    assert all(label in classes for _, label in classifier.shots_)
    assert classifier.score(X, y) == np.mean(classifier.predict(X) == np.asarray(y))
    for (x, label), part in zip(classifier.shots_, classifier.context_.string.split("\n\n"), strict=False):
        assert part == f"Review: {x}\nLabel: {completions[classes.index(label)]}"


def test_numbers_that_may_be_encoded_classes_are_warned_of(lm):
    with pytest.warns(UserWarning, match="VotingClassifier"):
        PromptClassifier(lm, TEMPLATE).fit(X, [0, 1] * 6)


@pytest.mark.parametrize(
    "inputs", [np.array(NEW), np.array(NEW, dtype=object), pd.Series(NEW), tuple(NEW)], ids=lambda x: type(x).__name__
)
def test_what_holds_strings_is_an_input(lm, inputs):
    classifier = PromptClassifier(lm, TEMPLATE).fit(inputs, BINARY[:3])
    np.testing.assert_array_equal(classifier.predict_proba(inputs), classifier.predict_proba(NEW))


def test_an_empty_input_has_a_prompt(lm):
    classifier = PromptClassifier(lm, "Review: {text:.3}{{}}\nLabel:").fit(["", *X], ["yes", *BINARY])
    assert [prompt.string for prompt in classifier.prompts(["", "abcde"])] == [
        "Review: {}\nLabel:",
        "Review: abc{}\nLabel:",
    ]
    np.testing.assert_allclose(classifier.predict_proba([""]).sum(), 1)


def test_an_instruction_may_be_a_text(lm):
    instruction = Text("See ", lm) + (Text("the cat") | "the mat") + "\n"
    classifier = PromptClassifier(lm, TEMPLATE, instruction=instruction).fit(X, Y)
    expected = classify.predict_proba([instruction + f"Review: {x}\nLabel:" for x in NEW], classifier.completions_, lm)
    np.testing.assert_array_equal(clone(classifier).fit(X, Y).predict_proba(NEW), expected)


# scikit-learn's tools


def test_cross_val_score_is_that_of_the_folds_by_hand(lm):
    classifier, folds = PromptClassifier(lm, TEMPLATE, shots=2), StratifiedKFold(3)
    expected = [fitted.score(inputs, classes) for fitted, inputs, classes in fitted_on_folds(classifier, folds)]
    assert cross_val_score(classifier, X, Y, cv=folds).tolist() == expected
    assert len(set(expected)) > 1


def fitted_on_folds(classifier, folds):
    """The classifier fitted on each fold's training part, with what it is scored on."""
    for train, test in folds.split(X, Y):
        fitted = clone(classifier).fit([X[idx] for idx in train], [Y[idx] for idx in train])
        yield fitted, [X[idx] for idx in test], [Y[idx] for idx in test]


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_candidates_of_a_search_share_one_cache(lm, n_jobs):
    classifier, folds = PromptClassifier(lm, TEMPLATE), StratifiedKFold(3)
    grid = {"template": [TEMPLATE, OTHER_TEMPLATE], "shots": [0, 1, 3]}
    search = GridSearchCV(classifier, grid, cv=folds, refit=False, error_score="raise", n_jobs=n_jobs)
    with joblib.parallel_config("threading"):
        search.fit(X, Y)
        computed = lm.stats.tokens_computed
        search.fit(X, Y)
    assert lm.stats.tokens_computed == computed, "a second search computes nothing"

    each = []
    for params, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True):
        candidate = list(fitted_on_folds(clone(classifier).set_params(**params), folds))
        assert score == pytest.approx(np.mean([fitted.score(inputs, classes) for fitted, inputs, classes in candidate]))
        each += [distinct_tokens(lm, fitted.prompts(inputs), fitted.completions_) for fitted, inputs, _ in candidate]
    assert len(each) == 2 * 3 * 3
    assert computed == len(set.union(*each)), "each distinct token of all candidates was computed once"
    assert computed < sum(map(len, each)), "candidates and folds have tokens in common"


def test_clones_of_a_model_and_a_tokenizer_share_their_lm(lm):
    pair = (lm.model, lm.tokenizer)
    classifier = PromptClassifier(pair, TEMPLATE)
    assert isinstance(classifier.lm, LM)
    assert clone(classifier).lm is classifier.lm is classifier.get_params()["lm"]
    found = classifier.fit(X, BINARY).predict_proba(NEW)
    np.testing.assert_array_equal(found, PromptClassifier(classifier.lm, TEMPLATE).fit(X, BINARY).predict_proba(NEW))
    shared = classifier.lm
    assert classifier.set_params(lm=lm).lm is lm
    assert classifier.set_params(lm=pair).lm is shared


def test_processes_are_refused(lm):
    classifier = PromptClassifier(lm, TEMPLATE, shots=2).fit(X, Y)
    assert clone(classifier).lm is lm
    with pytest.raises(NotPicklableError):
        pickle.dumps(classifier)
    with pytest.raises(pickle.PicklingError) as raised:
        cross_val_score(classifier, X, Y, cv=2, n_jobs=2)
    assert "An LM cannot be pickled" in str(raised.value.__cause__)
    assert lm.stats.tokens_computed == 0


def test_a_pipeline(lm):
    strip = FunctionTransformer(lambda inputs: [x.strip() for x in inputs])
    pipeline = Pipeline([("strip", strip), ("prompt", PromptClassifier(lm, TEMPLATE))]).fit(X, Y)
    found = pipeline.predict_proba([f"  {x}\n" for x in NEW])
    np.testing.assert_array_equal(found, pipeline[-1].predict_proba(NEW))


def test_calibrated_by_labels(lm):
    calibrated = CalibratedClassifierCV(PromptClassifier(lm, TEMPLATE, shots=2), cv=3).fit(X, Y)
    found = calibrated.predict_proba(NEW)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    of_members = [member.predict_proba(NEW) for member in calibrated.calibrated_classifiers_]
    np.testing.assert_allclose(found, np.mean(of_members, axis=0))
    member = calibrated.calibrated_classifiers_[0]
    given = member.estimator.predict_proba(NEW)
    for class_idx, calibrator in enumerate(member.calibrators):
        scaled = member.predict_proba(NEW)[:, class_idx] * sum(
            c.predict(given[:, idx]) for idx, c in enumerate(member.calibrators)
        )
        np.testing.assert_allclose(scaled, calibrator.predict(given[:, class_idx]))


def test_a_tuned_threshold(lm):
    """The threshold is best_threshold's, up to which of several that are as good is taken."""
    classifier = PromptClassifier(lm, TEMPLATE, {"yes": "mat", "no": "cat"}).fit(X, BINARY)
    of_yes = classifier.predict_proba(X)[:, 1]
    y = ["yes" if p > np.median(of_yes) else "no" for p in of_yes]  # so that there is one to be found
    tuned = TunedThresholdClassifierCV(classifier, cv="prefit", refit=False, scoring="accuracy", thresholds=200)
    tuned.fit(X, y)
    assert tuned.best_score_ == 1 > classifier.score(X, y)
    threshold = classify.best_threshold(of_yes, [label == "yes" for label in y])
    for chosen in (tuned.best_threshold_, threshold):
        assert of_yes[np.array(y) == "no"].max() < chosen <= of_yes[np.array(y) == "yes"].min()
    assert tuned.predict(X).tolist() == y


def test_a_vote_of_templates(lm):
    labels = ["so so", "bad", "good"]  # in the order of the sorted classes, as members are given numbers for them
    templates = {"review": TEMPLATE, "it was": OTHER_TEMPLATE}
    members = [(name, PromptClassifier(lm, template, labels, shots=2)) for name, template in templates.items()]
    vote = VotingClassifier(members, voting="soft").fit(X, Y)
    alone = [member.fit(X, Y).predict_proba(NEW) for _, member in members]
    assert np.abs(alone[0] - alone[1]).max() > 0.01
    np.testing.assert_allclose(vote.predict_proba(NEW), np.mean(alone, axis=0))
    assert set(vote.predict(NEW)) <= set(Y)
    assert [member.lm for member in vote.estimators_] == [lm, lm]


# scikit-learn's checks


class ClassifierOfRows(PromptClassifier):
    """PromptClassifier for what scikit-learn's checks feed: rows of numbers, written out; all else is inherited."""

    def fit(self, X, y):
        X, y = validate_data(self, X, y)
        return super().fit(written_out(X), y)

    def predict_proba(self, X):
        return super().predict_proba(written_out(validate_data(self, X, reset=False)))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = tags.input_tags.string = False
        tags.input_tags.two_d_array = True
        return tags


def written_out(rows):
    return [" ".join(f"{value:.2g}" for value in row[:3]) for row in rows]


EXPECTED_FAILURES = {
    "check_estimators_pickle": "an LM holds a model, a lock and a cache, and refuses to be pickled",
    "check_estimators_overwrite_params": "it pickles the parameters to see whether `fit` changes them",
}


def test_scikit_learn_checks_no_more_of_what_takes_strings_only(lm):
    """Its checks feed rows of numbers, so it skips all but one of them; ClassifierOfRows is for the others."""
    with pytest.warns(SkipTestWarning, match=r"Can't test estimator PromptClassifier .*string=True"):
        results = check_estimator(PromptClassifier(lm, TEMPLATE))
    assert [(result["check_name"], result["status"]) for result in results] == [("check_estimator_cloneable", "passed")]


@pytest.mark.filterwarnings("ignore:The classes are the numbers 0 to")
@parametrize_with_checks(
    [ClassifierOfRows(LM(build("gpt2"), byte_level_bpe()), "{text}:", shots=2)],
    expected_failed_checks=lambda estimator: EXPECTED_FAILURES,
    xfail_strict=True,
)
def test_scikit_learns_checks(estimator, check, monkeypatch):
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")  # one check wants it
    check(estimator)


def test_what_the_pickling_check_was_for(lm):
    """`fit` and `predict` leave the parameters as they were given."""
    given = {"labels": {"yes": "mat", "no": "cat"}, "shots": [("a", "yes"), ("b", "no")], "prior": [0.5, 0.5]}
    copies = {name: type(value)(value) for name, value in given.items()}
    classifier = PromptClassifier(lm, TEMPLATE, calibrate_on=["N/A"], **given)
    before = classifier.get_params()
    classifier.fit(X, BINARY).predict(NEW)
    assert all(value is before[name] for name, value in classifier.get_params().items())
    assert given == copies


# Errors


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"lm": "gpt2"}, TypeError, r"an LM or a \(model, tokenizer\) tuple, not str"),
        ({"template": 3}, TypeError, "template must be a str"),
        ({"template": "Review: {review}"}, ValueError, "unknown field {review}"),
        ({"template": "Review: {text} {}"}, ValueError, "unknown field {}"),
        ({"template": "Review: {text.upper}"}, ValueError, "unknown field {text.upper}"),
        ({"template": "Review:"}, ValueError, "no field {text}"),
        ({"template": "Review: {text"}, ValueError, "is invalid: expected '}'"),
        ({"template": "Review: {text:d}"}, ValueError, "is invalid"),
        ({"template": "Review: {text:{width}}"}, ValueError, "is invalid"),
        ({"labels": {"yes": "mat"}}, ValueError, "no completion for the class 'no'; it has completions of 'yes'"),
        ({"labels": ["mat"]}, ValueError, "1 completions for 2 classes, 'no', 'yes'"),
        ({"labels": "mat"}, TypeError, "mapping or a sequence"),
        ({"labels": {"mat", "cat"}}, TypeError, "mapping or a sequence"),
        ({"labels": ["mat", "mat"]}, ValueError, "more than once"),
        ({"labels": ["mat", ""]}, ValueError, "is empty"),
        ({"labels": ["mat", 3]}, TypeError, "not a str"),
        ({"shots": 13}, ValueError, "only 12 training examples"),
        ({"shots": -1}, ValueError, "at least 0"),
        ({"shots": True}, TypeError, "number or a list"),
        ({"shots": 1.5}, TypeError, "number or a list"),
        ({"shots": ["ab"]}, TypeError, r"shots\[0\] must be a pair"),
        ({"shots": [("a", "yes"), (3, "yes")]}, TypeError, r"shots\[1\] has a int"),
        ({"shots": [("a", "maybe")]}, ValueError, "class 'maybe', but y has only 'no', 'yes'"),
        ({"shots": 12, "calibrate_on": "training"}, ValueError, "All training examples are shots"),
        ({"calibrate_on": "N/A"}, ValueError, "Put one input in a list"),
        ({"calibrate_on": []}, ValueError, "calibrate_on is empty"),
        ({"calibrate_on": ["N/A", None]}, TypeError, r"calibrate_on\[1\]"),
        ({"calibrate_on": ["N/A", ""], "template": "{text}"}, ValueError, "and so is its prompt"),
        ({"calibrate_on": ["very " * 200]}, TextTooLongError, "positions"),
        ({"prior": [1.0]}, ValueError, r"shape \(1,\) for 2"),
        ({"prior": [0.5, 0.6]}, ValueError, "sum to 1"),
        ({"prior": "balanced"}, ValueError, "'training'"),
        ({"end_of_prompt": "\n"}, ValueError, "end_of_prompt"),
        ({"discount_completions": "0.5"}, TypeError, "discount_completions must be a finite"),
        ({"prior": {"yes": 0.5, "no": 0.5}}, TypeError, "prior must be numbers in order"),
        ({"labels": {"a", "b"}}, TypeError, "labels must be a mapping or a sequence"),
        ({"labels": ["yes", "no\ud800"]}, ValueError, r"completions\[1\].* lone surrogate at character 2"),
        ({"calibrate_on": ["a", "\ud800"]}, ValueError, r"calibrate_on\[1\].* lone surrogate at character 0"),
        ({"aggregate": "max"}, ValueError, "'mean', 'sum'"),
        ({"separator": None}, TypeError, "separator must be a str"),
        ({"instruction": None}, TypeError, "instruction must be a str"),
    ],
)
def test_options_that_make_no_sense(lm, options, error, match):
    classifier = PromptClassifier(lm, TEMPLATE).fit(X, BINARY)
    classifier.set_params(**options)
    with pytest.raises(error, match=match):
        classifier.fit(X, BINARY)
    assert lm.stats.tokens_computed == 0
    with pytest.raises(NotFittedError):
        classifier.predict(NEW)


@pytest.mark.parametrize(
    ("inputs", "y", "error", "match"),
    [
        ("abc", ["a", "b", "c"], ValueError, "not str. Put a single string in a list"),
        ([], [], ValueError, "X is empty"),
        (iter(X), BINARY, ValueError, "sequence of strings"),
        (np.array(X)[:, None], BINARY, ValueError, "one dimension, not 2"),
        (pd.DataFrame({"message": X}), BINARY, ValueError, r'X\["message"\]'),
        (pd.Series(["a", None, "b"]), ["yes", "no", "no"], TypeError, r"X\[1\] is a .*missing"),
        ([["a"], ["b"]], ["yes", "no"], TypeError, r"X\[0\] is a list"),
        (X, BINARY[:-1], ValueError, "inconsistent numbers"),
        (X, ["yes"] * 12, ValueError, "only one class, .*'yes'"),
        (X, None, ValueError, "requires y"),
        (X, np.linspace(0, 1, 12), ValueError, "continuous"),
        (X, [["yes", "no"]] * 12, ValueError, "1d array"),
    ],
)
def test_data_that_makes_no_sense(lm, inputs, y, error, match):
    with pytest.raises(error, match=match):
        PromptClassifier(lm, TEMPLATE).fit(inputs, y)
    assert lm.stats.tokens_computed == 0


def test_inputs_that_cannot_be_classified(lm):
    classifier = PromptClassifier(lm, "{text}")
    with pytest.raises(NotFittedError):
        classifier.prompts(NEW)
    classifier.fit(X, Y)
    with pytest.raises(ValueError, match=r"X\[1\] is an empty string, and so is its prompt"):
        classifier.predict(["a", ""])
    with pytest.raises(TypeError, match=r"X\[0\] is a int"):
        classifier.predict([3])
    with pytest.raises(TextTooLongError):
        classifier.predict(["a", "very " * 200])
    assert lm.stats.tokens_computed == 0


def test_an_instruction_of_another_lm_is_refused(model, lm):
    with pytest.raises(MixedModelsError):
        PromptClassifier(lm, TEMPLATE, instruction=Text("See ", LM(model, byte_level_bpe()))).fit(X, Y)


class NotInstalled:
    """Stands first among what finds modules, for a package that cannot be found."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("missing", "match"),
    [("sklearn", "pip install 'scikit-learn>=1.6'"), ("sklearn.utils.multiclass", "^No module named")],
)
def test_without_scikit_learn_it_says_how_to_get_it(monkeypatch, missing, match):
    """One that is there but broken shows its own error."""
    for name in list(sys.modules):
        if f"{name}.".startswith((f"{missing}.", f"{PromptClassifier.__module__}.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(missing), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=match):
        importlib.import_module(PromptClassifier.__module__)


def test_inputs_have_an_order(lm):
    for given in (set(X), dict.fromkeys(X)):
        with pytest.raises(ValueError, match=r"X must be a sequence of strings, not (set|dict)"):
            PromptClassifier(lm, TEMPLATE).fit(given, Y)


def test_shots_that_are_given_are_not_calibrated_on(lm):
    shots = [(X[0], "yes"), (X[1], "no")]
    given = PromptClassifier(lm, TEMPLATE, shots=shots, calibrate_on="training").fit(X, BINARY)
    rest = PromptClassifier(lm, TEMPLATE, shots=shots, calibrate_on=X[2:]).fit(X, BINARY)
    np.testing.assert_array_equal(given.calibration_probabilities_, rest.calibration_probabilities_)
    with pytest.raises(ValueError, match=r"calibrate_on\[1\] is an empty string"):
        PromptClassifier(lm, "{text}", calibrate_on=["N/A", ""]).fit(X, BINARY)
